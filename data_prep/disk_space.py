"""A full disk, in numbers: what is free, and about what is needed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.outcome import PreparationError
from data_prep.store.locations import is_bucket
from data_prep.store.scratch import SIZE, folder, scratch_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_in_words(output: str, num_formats: int, num_tokens: Callable[[], int]) -> Iterator[None]:
    """Turns the error of a full disk into a PreparationError that says what is free, and about what is needed.

    Args:
      num_formats: how many copies of the stream are written.
      num_tokens: a rough estimate of the stream's length.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        if is_bucket(output):
            raise PreparationError(
                f"{folder()}: no space left ({error}). Free: {shutil.disk_usage(folder()).free / 1e9:.2f} GB; needed: "
                f"{scratch_bytes() / 1e9:g} GB ({SIZE}) and about two files for each worker. What is complete is kept "
                "in the bucket: make room, or name a folder with more by TMPDIR, and run the same command again."
            ) from error
        there = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
        # Two bytes in each copy, of which one is in the work directory.
        needed = max(0, int(2.2 * num_tokens() * (1 + num_formats)) - there)
        free = shutil.disk_usage(output).free
        raise PreparationError(
            f"{output}: no space left ({error}). Free: {free / 1e9:.2f} GB; still needed: about "
            f"{needed / 1e9:.2f} GB. What is complete is kept: make room and run the same command "
            "again."
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # ArrayRecord's writer, in C++, raises no OSError: the number's text is all that is left of it.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EFBIG))

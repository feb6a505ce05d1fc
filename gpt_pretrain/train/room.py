"""Whether a directory can take what is about to be written: before a library finds out in many threads."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from data_prep.pages.numbers import size_text


def check_room(directory: Path, num_bytes: int) -> None:
    """Raises OSError where files cannot be made in `directory`, or there is less room than `num_bytes`."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size_text(num_bytes)} needed")
    # A quota, the last inode and a file system that has become read-only show at a first file only.
    probe = tempfile.mkdtemp(prefix=".room-", dir=directory)
    try:
        for number in range(4):
            Path(probe, str(number)).write_bytes(bytes(4096))
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(probe)


def size_of(directory: Path) -> int:
    """Bytes in the files below a directory; those that vanish meanwhile are left out."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(folder, name))
    return total

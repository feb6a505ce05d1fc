"""One run at a time in a `save_dir`, and one `save_dir` for a run."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_pretrain.train.results import RunFailed

log = logging.getLogger(__name__)

_LOCK = ".lock"


class HeldDirectory:
    """A `save_dir` that this run holds.

    Args:
      lock: its lock file, opened; None in processes that only watch the first one hold it.
      called: the `save_dir`, as the user knows it, where this directory only stands for it.
    """

    def __init__(self, save_dir: str | os.PathLike, lock: int | None, called: str | None = None):
        self._save_dir, self._lock, self._called = Path(save_dir), lock, called
        self._identity = None if lock is None else _identity(os.stat(save_dir))

    def check(self) -> None:
        """Raises RunFailed where the directory was moved, deleted or replaced: what is written there now would belong
        to no run, or to another one."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            same_directory = _identity(os.stat(self._save_dir)) == self._identity
            if same_directory and _identity(os.stat(self._save_dir / _LOCK)) == _identity(os.fstat(self._lock)):
                return
        raise RunFailed(
            f"{self._save_dir} was moved, deleted or replaced while the run used it. Stopped; nothing is saved in "
            f"another directory, and what was trained since the last checkpoint is lost. {self._advice()}"
        )

    def finish(self) -> None:
        """Blocks until what was written is where it belongs: here, it is there."""

    def _advice(self) -> str:
        if self._called:
            return f"Start again, and the run resumes from {self._called}."
        try:
            now = os.path.dirname(os.readlink(f"/proc/self/fd/{self._lock}"))
        except OSError:
            now = ""
        if now and os.path.exists(os.path.join(now, _LOCK)):
            return f"It is {now} now: move it back, or resume with --save_dir={now}."
        return "Put it back and start again, and the run resumes; otherwise it begins anew."


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def exclusive(save_dir: str | os.PathLike, called: str | None = None) -> Iterator[HeldDirectory]:
    """Keeps a second run out of `save_dir`; a killed run leaves no lock behind. ValueError if one is in there.

    Args:
      called: the `save_dir`, as the user knows it, where this directory only stands for it.
    """
    is_free, lock = True, None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(Path(save_dir, _LOCK), "w"))
            lock = file.fileno()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
            except OSError as error:  # file systems without locks
                log.warning("%s cannot be locked (%s): take care that no second run uses it.", save_dir, error)
        if jax.process_count() > 1:
            is_free = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_free)))
        if not is_free:
            which = called or save_dir
            raise ValueError(f"{which}: another run is using it. Wait for its end, or choose another save_dir.")
        yield HeldDirectory(save_dir, lock, called)

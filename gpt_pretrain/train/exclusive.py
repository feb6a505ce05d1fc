"""One run at a time in a `save_dir`."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(save_dir: str | os.PathLike) -> Iterator[None]:
    """Keeps a second run out of `save_dir`; a killed run leaves no lock behind. ValueError if one is in there."""
    is_free = True
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(Path(save_dir, ".lock"), "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
            except OSError as error:  # file systems without locks
                log.warning("%s cannot be locked (%s): take care that no second run uses it.", save_dir, error)
        if jax.process_count() > 1:
            is_free = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_free)))
        if not is_free:
            raise ValueError(f"{save_dir}: another run is using it. Wait for its end, or choose another save_dir.")
        yield

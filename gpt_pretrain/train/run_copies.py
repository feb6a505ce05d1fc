"""RUN, as a user types it -> a directory of this machine to read from.

Of a run in a bucket, what is asked for is copied to the user's cache first. Nothing is written to the bucket, and its
lease is not taken: the run may be under way.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from data_prep.store import buckets
from gpt_pretrain.data import ledger as ledger_lib
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.mirrors import Mirror, Place, folder_in_cache

_LEFT_OUT = (".", "checkpoints/", "wandb")
_FOLDERS = ("tensorboard", "evaluations")
_KIND = "read"  # the folder in the cache: not the one of a run that writes


def run_at(place: str) -> Place:
    """A run's plan and ledger, without its checkpoints.

    Raises ValueError: the bucket has no run there, or cannot be read.
    """
    if not buckets.is_bucket(place):
        return Place(place, place)
    url = place.rstrip("/")
    with copy_of(url) as mirror:
        # In this order: a ledger goes on, and data.json says how far it goes at least.
        found = [mirror.stat([name]) for name in (run_lib.FILE_NAME, ledger_lib.FILE_NAME)]
        if not found[0]:
            raise ValueError(f"{url}: has no {run_lib.FILE_NAME}; expected the save_dir of a run of gpt_pretrain.main")
        for objects in found:
            mirror.fetch(objects)
        if not found[1]:
            mirror.path(ledger_lib.FILE_NAME).unlink(missing_ok=True)
    return Place(url, str(mirror.directory))


def whole_run_at(place: str) -> Place:
    """All of a run but its checkpoints and what belongs to W&B: curves, records, evaluations. Raises as `run_at`."""
    found = run_at(place)
    if found.name == found.directory:
        return found
    with copy_of(found.name) as mirror:
        there = {name: each for name, each in mirror.listing().items() if not name.startswith(_LEFT_OUT)}
        for folder in _FOLDERS:
            for path in (mirror.directory / folder).glob("*"):
                if f"{folder}/{path.name}" not in there:
                    path.unlink()
        both = (run_lib.FILE_NAME, ledger_lib.FILE_NAME)
        mirror.fetch({name: each for name, each in there.items() if name not in both})
    return found


@contextlib.contextmanager
def copy_of(url: str) -> Iterator[Mirror]:
    """The folder for a URL, in which nobody else changes anything meanwhile."""
    directory = Path(folder_in_cache(_KIND, url))
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        mirror = Mirror(url, directory)
        try:
            yield mirror
        finally:
            mirror.save_index()

"""Leave to do the jobs of one command, by which workers on other machines see whether anybody waits for the results.

On a shared disk a ticket is a file in the work directory, of one `Engine.run`. In a bucket it is the command's lease.
"""

import abc
import contextlib
import fcntl
import importlib.metadata
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from blake3 import blake3

from data_prep.engines.locks import TICKETS, Hold, wait_for_workers
from data_prep.store.buckets import BucketError
from data_prep.store.leases import Sign

# What else than our own code the bytes of files may depend on.
LIBRARIES = ("array_record", "gigatoken", "numpy", "pyarrow", "tiktoken", "tokenizers", "zstandard")


@dataclass(frozen=True)
class Ticket(abc.ABC):
    """What all kinds have."""

    directory: str  # from which relative paths start
    versions: tuple[tuple[str, str], ...]
    name: str
    look_secs: ClassVar[float]  # between two looks at it

    @abc.abstractmethod
    def problem(self) -> str | None:
        """Why this machine cannot see whether the jobs are wanted; None where it can."""

    @abc.abstractmethod
    def is_wanted(self) -> bool:
        """Whether somebody waits for the results."""

    @abc.abstractmethod
    def unseen(self) -> str:
        """Why a worker may believe that nobody does, while somebody does."""

    @abc.abstractmethod
    def at_work(self, key: str) -> contextlib.AbstractContextManager:
        """Around the job of that key."""


@dataclass(frozen=True)
class DiskTicket(Ticket):
    path: str  # of a file that is there for as long as results are wanted
    lock: str  # what workers lock
    look_secs = 1.0

    def problem(self) -> str | None:
        if os.path.isdir(os.path.dirname(self.path)):
            return None
        work = Path(self.lock).parent
        return (
            f"does not see {work}{'' if work.is_absolute() else f' from {os.getcwd()}'}; the output directory must be "
            "on a disk that all workers have, under the same path, or in a bucket"
        )

    def is_wanted(self) -> bool:
        return os.path.exists(self.path)

    def unseen(self) -> str:
        return f"does not see {self.path}; all workers must have the disk of the output"

    @contextlib.contextmanager
    def at_work(self, key: str) -> Iterator[None]:
        """Holds the lock of workers, and the job's own, for which copies of it wait."""
        own = f"{self.lock}.{self.name}.{key}"
        with open(self.lock, "w") as common, open(own, "w") as mine:
            fcntl.flock(common, fcntl.LOCK_SH)
            fcntl.flock(mine, fcntl.LOCK_EX)
            yield
            # Whoever waits for this lock, or makes it anew, finds the job done.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(own)


@dataclass(frozen=True)
class BucketTicket(Ticket):
    """Copies of a job don't take turns, and nobody waits for those that are not wanted any more.

    Each writes on its own machine, an object is whole or absent, and all copies put the same bytes.
    """

    sign: Sign
    look_secs = 3.0  # each look is a request

    def problem(self) -> str | None:
        try:
            return None if self.is_wanted() else self.unseen()
        except BucketError as error:
            return f"{error}. Every worker needs the bucket's package, credentials and variables"

    def is_wanted(self) -> bool:
        return self.sign.is_there()

    def unseen(self) -> str:
        return (
            f"finds no lease of this command at {self.sign.url}: its variables lead to another server, or this command "
            "was suspended and another one took its place"
        )

    def at_work(self, key: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


@contextlib.contextmanager
def ticket_for(hold: Hold) -> Iterator[Ticket]:
    """A ticket for the block; one on a disk ends with it, and the block when the jobs have."""
    name = uuid.uuid4().hex
    if hold.sign is not None:
        yield BucketTicket(os.getcwd(), versions(), name, hold.sign)
        return
    assert hold.workers is not None
    folder = hold.workers.parent / TICKETS
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.touch()
    try:
        yield DiskTicket(os.getcwd(), versions(), name, str(path), str(hold.workers))
    finally:
        path.unlink(missing_ok=True)
        wait_for_workers(hold.workers)


@lru_cache(maxsize=1)
def versions() -> tuple[tuple[str, str], ...]:
    """A digest of our code, and the versions of the libraries that write our files, in this process."""
    package = Path(__file__).parent.parent
    digest = blake3()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    found = [("data_prep", digest.hexdigest(8))]
    for name in LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "none"))
    return tuple(found)

"""What jobs on other machines need: the same code, the same disk, and to end when nobody wants them any more.

A cluster may do a job twice at once (a worker that it thinks dead, a copy of a slow one), and goes on with jobs
whose command was killed. So a job looks for its *ticket*, a file in the work directory, before it begins and while
it works; it holds the lock of `locks.locked` meanwhile; and copies of a job take turns.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from data_prep.engines.engine import Report
from data_prep.engines.locks import TICKETS, wait_for_workers
from data_prep.pages.progress import Done

LOOK_SECS = 1.0  # between two looks at the ticket
# What else than our own code the bytes of files may depend on.
LIBRARIES = ("array_record", "gigatoken", "numpy", "pyarrow", "tiktoken", "tokenizers", "zstandard")


class Unfit(ValueError):
    """A worker that cannot do our jobs: other code, or another disk."""


class NotWanted(Exception):
    """Nobody waits for the job's result."""


@dataclass(frozen=True)
class Ticket:
    """Leave to do the jobs of one `Engine.run`."""

    path: str  # of a file that is there for as long as results are wanted
    lock: str  # what workers lock
    directory: str  # from which relative paths start
    versions: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@contextlib.contextmanager
def ticket_for(lock: Path) -> Iterator[Ticket]:
    """A ticket that ends with the block, which ends when the jobs have.

    Args:
      lock: as `locks.locked` gave it.
    """
    folder = lock.parent / TICKETS
    folder.mkdir(exist_ok=True)
    path = folder / uuid.uuid4().hex
    path.touch()
    try:
        yield Ticket(str(path), str(lock), os.getcwd(), versions())
    finally:
        path.unlink(missing_ok=True)
        wait_for_workers(lock)


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


def problem_here(ticket: Ticket) -> str | None:
    """Why this process cannot do jobs of `ticket`; None where it can."""
    for (name, wanted), (_, here) in zip(ticket.versions, versions(), strict=True):
        if wanted != here:
            return f"has {name} {here}, expected {wanted}; install the same versions there"
    with _where_paths_start(ticket):
        if not os.path.isdir(os.path.dirname(ticket.path)):
            work = Path(ticket.lock).parent
            return (
                f"does not see {work}{'' if work.is_absolute() else f' from {os.getcwd()}'}; the output directory must "
                "be on a disk that all workers have, under the same path"
            )
    return None


def do_job(ticket: Ticket, key: str, function: Callable[[Any, Report], Any], job: Any, report: Report) -> Any:
    """The job's result, or the exception that it raised, as a value.

    Args:
      key: the job's, the same for all copies of it.
    """
    looked = 0.0

    def report_if_wanted(done: Done) -> None:
        nonlocal looked
        report(done)
        if time.monotonic() - looked > LOOK_SECS:
            looked = time.monotonic()
            _require_wanted(ticket)

    try:
        if problem := problem_here(ticket):
            return Unfit(f"worker {name_here()}: {problem}")
        with _where_paths_start(ticket), _at_work(ticket, key):
            _require_wanted(ticket)
            return function(job, report_if_wanted)
    except Exception as error:
        return error


def name_here() -> str:
    """This process, for messages."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _where_paths_start(ticket: Ticket) -> contextlib.AbstractContextManager:
    """The directory in which the command was typed, where this machine has it."""
    return contextlib.chdir(ticket.directory) if os.path.isdir(ticket.directory) else contextlib.nullcontext()


def _require_wanted(ticket: Ticket) -> None:
    if not os.path.exists(ticket.path):
        raise NotWanted(name_here())


@contextlib.contextmanager
def _at_work(ticket: Ticket, key: str) -> Iterator[None]:
    """Holds the lock of workers, and the job's own, for which copies of it wait."""
    own = f"{ticket.lock}.{ticket.name}.{key}"
    with open(ticket.lock, "w") as common, open(own, "w") as mine:
        fcntl.flock(common, fcntl.LOCK_SH)
        fcntl.flock(mine, fcntl.LOCK_EX)
        yield
        # Whoever waits for this lock, or makes it anew, finds the job done.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(own)

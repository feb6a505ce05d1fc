"""Who may work in a directory. Locks end with their process, however it ends, on whatever machine that sees the disk.

One process at a time has the directory for itself; or several tasks (`slurm.UnitRange`) share it, each
with a lock of its own. Workers hold a lock for as long as they write, so that whoever comes after
a killed process waits for what it started.

In a bucket locks are leases, and workers hold none. Whoever comes after need not wait for them: an object is whole or
absent, and what a job puts late is what would be put again. They look at the lease and end when it is another one's.
"""

import contextlib
import errno
import fcntl
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from data_prep.store import leases
from data_prep.store.locations import is_bucket
from data_prep.store.places import names_in

LOCK, WORKERS_LOCK, SPEC_LOCK = "lock", "workers.lock", "spec.lock"
TASKS = "tasks"  # folder of the locks of tasks
TICKETS = "tickets"  # folder of the tickets of jobs on other machines, see remote.py
_WAIT = "Wait, or use another directory."
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Hold:
    """What a process has that works in a directory alone.

    Attributes:
      workers: the file that its workers lock; None in a bucket.
      sign: by which its workers see in a bucket that it is still at work; None on a disk.
      confirm: to be called before what was written becomes what counts. In a bucket a lock can be lost,
        to one who saw no sign of this process for long: then it raises LeaseLost.
    """

    workers: Path | None
    sign: leases.Sign | None
    confirm: Callable[[], None]

    @classmethod
    def on_disk(cls, workers: Path) -> "Hold":
        return cls(workers, None, lambda: None)

    @classmethod
    def in_bucket(cls, lease: leases.Lease) -> "Hold":
        return cls(None, lease.sign, lease.check)


@contextlib.contextmanager
def locked(where: str) -> Iterator[Hold]:
    """Only this process works in a directory, which is made if need be.

    The workers of a killed process end within moments, those of other machines as soon as they miss
    their ticket; entering waits for them, so that they don't write into files that are ours now.

    Raises ValueError when another process, or a task, has a lock.
    """
    if is_bucket(where):
        with leases.hold(where, what="preparation", say=_say) as lease:
            try:
                leases.require_ended(where, _task_leases(where), _say)
            except leases.InUse as error:
                raise ValueError(f"{_output(where)}: {_in_words(_tasks_named(error.names))}. {_WAIT}") from None
            yield Hold.in_bucket(lease)
        return
    directory = Path(where)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "w") as own:
        if not try_lock(own, fcntl.LOCK_EX):
            raise ValueError(_at_work(directory))
        for ticket in directory.glob(f"{TICKETS}/*"):
            ticket.unlink(missing_ok=True)
        for path in [directory / WORKERS_LOCK, *directory.glob(f"{TASKS}/*.{WORKERS_LOCK}")]:
            wait_for_workers(path)
        yield Hold.on_disk(directory / WORKERS_LOCK)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def shared(where: str, index: int, num_tasks: int) -> Iterator[Hold]:
    """This process is task `index` of `num_tasks` that work in one directory.

    Raises ValueError when one process has the directory for itself, the same task is at work
    already, or tasks are that divide the work in another way.
    """
    if is_bucket(where):
        with _shared_bucket(where, index, num_tasks) as lease:
            yield Hold.in_bucket(lease)
        return
    directory = Path(where)
    (directory / TASKS).mkdir(parents=True, exist_ok=True)
    task = f"{index}-of-{num_tasks}"
    with open(directory / LOCK, "w") as common, open(directory / TASKS / task, "w") as own:
        if not try_lock(common, fcntl.LOCK_SH):
            raise ValueError(_at_work(directory))
        if not _lock_soon(own):
            raise ValueError(f"{directory.parent}: --unit_range={index}/{num_tasks} is at work already. Wait for it.")
        if others := tasks_at_work(directory, but_of=num_tasks):
            raise ValueError(f"{directory.parent}: {_divides_otherwise(others[0], index, num_tasks)}")
        workers = directory / TASKS / f"{task}.{WORKERS_LOCK}"
        wait_for_workers(workers)
        yield Hold.on_disk(workers)


@contextlib.contextmanager
def _shared_bucket(where: str, index: int, num_tasks: int) -> Iterator[leases.Lease]:
    """As `shared`: a lease for each task. Each looks for others when it has its own: of any two one sees the other."""
    own = f"{leases.FILE_NAME}-{index}-of-{num_tasks}"
    with leases.hold(where, what=f"--unit_range={index}/{num_tasks}", name=own, say=_say) as lease:
        others = [name for name in _task_leases(where) if not name.endswith(f"-of-{num_tasks}")]
        try:
            leases.require_ended(where, [leases.FILE_NAME, *others], _say)
        except leases.InUse as error:
            tasks = _tasks_named(error.names)
            what = _divides_otherwise(tasks[0], index, num_tasks) if tasks else f"{_in_words([])}. {_WAIT}"
            raise ValueError(f"{_output(where)}: {what}") from None
        yield lease


def _output(where: str) -> str:
    return where.rpartition("/")[0]


def _task_leases(where: str) -> list[str]:
    return [name for name in names_in(where) if _tasks_named([name])]


def _tasks_named(names: Iterable[str]) -> list[str]:
    """`--unit_range` of tasks, from the names of their locks or leases."""
    found = [re.fullmatch(rf"(?:{re.escape(leases.FILE_NAME)}-)?(\d+)-of-(\d+)", name) for name in names]
    in_order = sorted((int(each[2]), int(each[1])) for each in found if each)
    return [f"{index}/{num_tasks}" for num_tasks, index in in_order]


def _divides_otherwise(other: str, index: int, num_tasks: int) -> str:
    return (
        f"--unit_range={other} is at work, which divides the units in another way than {index}/{num_tasks}. Wait for "
        "it, or divide them in the same way."
    )


@contextlib.contextmanager
def spec_locked(directory: str) -> Iterator[None]:
    """One task at a time reads and writes the notes that all tasks share; the others wait.

    In a bucket nobody waits: `update_note` sees that no change is lost.
    """
    if is_bucket(directory):
        yield
        return
    with open(Path(directory, SPEC_LOCK), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tasks_at_work(directory: Path, but_of: int | None = None) -> list[str]:
    """The tasks that have a lock now, as `--unit_range` names them; without those of `but_of` tasks."""
    found = []
    for path in (directory / TASKS).glob("*-of-*"):
        if _tasks_named([path.name]) and not path.name.endswith(f"-of-{but_of}"):
            with open(path) as lock:
                if not try_lock(lock, fcntl.LOCK_SH):
                    found.append(path.name)
    return _tasks_named(found)


def _at_work(directory: Path) -> str:
    return f"{directory.parent}: {_in_words(tasks_at_work(directory))}. {_WAIT}"


def _in_words(tasks: Sequence[str]) -> str:
    """Who is at work: these tasks, or one process alone."""
    if not tasks:
        return "another process is at work in this directory"
    more = f" and {len(tasks) - 5} more" if len(tasks) > 5 else ""
    return f"tasks are at work in this directory (--unit_range={', '.join(tasks[:5])}{more})"


def _lock_soon(file: TextIO) -> bool:
    """Whether the lock was had within a second: someone may just be looking whether it is taken."""
    for _ in range(20):
        if try_lock(file, fcntl.LOCK_EX):
            return True
        time.sleep(0.05)
    return False


def try_lock(file: TextIO, kind: int) -> bool:
    """Whether the lock could be had now. ValueError where the disk has no locks at all."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ValueError(
            f"{file.name}: this disk has no locks ({error.strerror}), without which two processes could write one "
            "file. Mount it with them (Lustre: -o flock; NFS: version 4)."
        ) from None
    return True


def wait_for_workers(path: Path) -> None:
    """Until no worker holds the lock at `path`, which is made if need be."""
    with open(path, "w") as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            print("waiting for workers to end jobs that nobody wants any more", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)

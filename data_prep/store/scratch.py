"""What lies in a bucket, as files of this machine: on their way there, and copies of what is read.

They lie in one folder below TMPDIR that a process shares with its workers. It goes with the process; what a killed one
left goes when the next one starts. Copies stay while there is room, so that what several jobs read is fetched once.
"""

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from blake3 import blake3

from data_prep.store import buckets
from data_prep.store.local_files import digest_of
from data_prep.store.locations import file_name, is_bucket
from data_prep.store.variables import positive_number

SIZE = "GPT_PRETRAIN_SCRATCH_GB"
DEFAULT_GB = 8.0
MAX_COPIES = 4096  # all are looked at when there is one more
FETCHES = 3  # of what arrives with another digest than it should
_SHARED = "DATA_PREP_SCRATCH"  # tells workers where their parent's folder is
_PREFIX = "data_prep-scratch-"
_NUM_LOCKS = 256


class OtherContent(ValueError):
    """An object has another digest than it should have."""

    def __init__(self, url: str, found: str, expected: str):
        super().__init__(
            f"{url}: digest is {found}, expected {expected}; its content was changed. Restore it, or remove it and run "
            "the same command again"
        )
        self.found = found


@contextlib.contextmanager
def local_copy(path: str | os.PathLike, digest: str = "") -> Iterator[str]:
    """A file with the content of an object, for the block; a path of this machine is given as it is.

    What was opened or mapped in the block may be read after it, too.

    Args:
      digest: what an object must have, where that is known. A local file is not looked at.

    Raises:
      OtherContent: it has another digest, also when it is fetched again.
      BucketError: it cannot be fetched.
    """
    where = os.fspath(path)
    if not is_bucket(where):
        yield where
        return
    copy, file = _hold_copy(where, digest)
    with file:
        try:
            yield str(copy)
        except ValueError as error:  # speaks of the file that nobody knows
            if str(copy) not in str(error) or error.args != (str(error),):
                raise
            raise type(error)(str(error).replace(str(copy), where)) from error


@contextlib.contextmanager
def uploaded(url: str) -> Iterator[Path]:
    """Gives a temporary path; when the block succeeds what was written there becomes the object, whole."""
    partial = folder() / f".{secrets.token_hex(8)}.partial"
    try:
        yield partial
        made = buckets.upload(partial, url)
        os.replace(partial, _copy_of(url, made.version))  # it may be read soon
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _make_room(0)


def folder() -> Path:
    """The scratch folder of this process and its workers."""
    return _folder(os.getpid()).path


def scratch_bytes() -> int:
    """How much may lie in it beside what is in use."""
    return int(positive_number(SIZE, DEFAULT_GB, "gigabytes") * 1e9)


@dataclass(frozen=True)
class _Folder:
    path: Path
    lock: IO[str]  # held while the process lives: then nobody takes the folder for a dead one's


def share() -> None:
    """Makes the folder of this process that of the workers which it starts from now on, whoever needs it first."""
    _path(os.getpid())


@lru_cache(maxsize=1)
def _path(pid: int) -> Path:
    """Where the folder is or will be."""
    parent = multiprocessing.parent_process()
    owner, _, shared = os.environ.get(_SHARED, "").partition(":")
    if parent is not None and owner == str(parent.pid):
        return Path(shared)
    path = Path(tempfile.gettempdir(), f"{_PREFIX}{secrets.token_hex(8)}")
    os.environ[_SHARED] = f"{pid}:{path}"
    atexit.register(_remove_own, path, pid)
    return path


@lru_cache(maxsize=1)
def _folder(pid: int) -> _Folder:
    path = _path(pid)
    if not path.exists():
        _remove_abandoned(path.parent)
        # Under its name only when it is locked: before, it would be taken for abandoned.
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=path.parent))
        with _locked(made).lock:
            try:
                made.rename(path)
            except OSError:  # another worker was faster
                shutil.rmtree(made)
            return _locked(path)
    return _locked(path)


def _locked(path: Path) -> _Folder:
    lock = open(path / "lock", "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_SH)
    return _Folder(path, lock)


def _remove_own(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not in its fork
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(where: Path) -> None:
    for path in where.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), open(path / "lock", "r+") as lock:  # else somebody else's, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)


def _copy_of(url: str, version: str) -> Path:
    """Ends like the object: some readers go by that."""
    return folder() / f"{blake3(f'{url} {version}'.encode()).hexdigest()[:32]}-{file_name(url)[-100:]}"


def _hold_copy(url: str, digest: str) -> tuple[Path, IO[bytes]]:
    """The copy, and the open file that keeps it from being removed."""
    found = ""
    for fetches_left in reversed(range(FETCHES)):
        there = buckets.stat(url)
        if there is None:
            raise buckets.BucketError(f"{url}: no such object")
        copy = _copy_of(url, there.version)
        with _alone(copy):  # of those who want it one fetches it
            file = _hold(copy)
            while file is None:
                _make_room(there.num_bytes)
                try:
                    buckets.download(url, copy)
                except buckets.Changed:  # a job that was done twice put the same bytes a second time
                    if not fetches_left:
                        raise
                    break
                file = _hold(copy)
        if file is None:
            continue
        state = os.fstat(file.fileno())
        found = _known_digest(copy, state.st_ino, state.st_mtime_ns) if digest else ""
        if found == digest:
            return copy, file
        file.close()
        copy.unlink(missing_ok=True)
    raise OtherContent(url, found, digest)


@contextlib.contextmanager
def _alone(copy: Path) -> Iterator[None]:
    number = int(copy.name[:8], 16) % _NUM_LOCKS
    with open(folder() / f"lock-{number}", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _hold(copy: Path) -> IO[bytes] | None:
    """None: it is not there."""
    try:
        file = open(copy, "rb")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_SH)
        there = os.stat(copy)
    except FileNotFoundError:
        return None
    if there.st_ino != os.fstat(file.fileno()).st_ino:  # removed, and perhaps made again, in between
        file.close()
        return None
    os.utime(copy, ns=(time.time_ns(), there.st_mtime_ns))
    return file


@lru_cache(maxsize=MAX_COPIES)
def _known_digest(copy: Path, inode: int, mtime_ns: int) -> str:
    """Nobody writes into a copy: it is read once a process, and again when it was fetched again."""
    return digest_of(copy)


def _make_room(num_bytes: int) -> None:
    """Removes the copies that were not used for longest, until there is room for so many bytes more."""
    copies = []
    for path in folder().glob("*-*"):
        with contextlib.suppress(FileNotFoundError):
            if not path.name.startswith((".", "lock")):
                copies.append((path.stat(), path))
    copies.sort(key=lambda each: each[0].st_atime_ns)
    free = shutil.disk_usage(folder()).free
    too_much = max(sum(stat.st_size for stat, _ in copies) + num_bytes - scratch_bytes(), num_bytes - free)
    too_many = len(copies) - MAX_COPIES
    for stat, path in copies:
        if too_much <= 0 and too_many <= 0:
            break
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where it is in use
            path.unlink()
            too_much, too_many = too_much - stat.st_size, too_many - 1

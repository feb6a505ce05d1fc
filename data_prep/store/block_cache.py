"""A cache on this machine's disk of what lies in buckets, found by its BLAKE3 digest.

    <folder>/blocks/<2 hex>/<digest>    a block of a stream (see `fingerprints.py`)
    <folder>/files/<2 hex>/<digest>     a whole file of a dataset
    <folder>/locks/<2 hex>              held by who fetches what begins so
    <folder>/locks/room                 held by who makes room; says how many bytes are in use

A file appears by a rename after its digest was compared, and is compared again when a process opens it first: what is
there is what it is called, whoever wrote it. All processes of a machine share the folder, and each thing is fetched by
one of them.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from data_prep.store.files import FileProblem, file_problem, whole_file

log = logging.getLogger(__name__)

Kind = Literal["blocks", "files"]
KINDS: tuple[Kind, ...] = ("blocks", "files")
MOST_BYTES = 10**12  # of a cache whose size nobody said
LEAST_BYTES = 1 << 23  # two blocks of the wider ids, and room to fetch the next two
MAX_ARRIVALS = 3  # of other bytes than the digest says, after which it is an error
FETCHING_THREADS = 8
SOON = -1.0
_SLACK = 32  # a part of the cache that is emptied beyond what is needed just now: each look at the folder takes time
_IN_USE_SECS = 600  # since it was opened last: another run may need it
_STRAY_SECS = 3600  # of a file that is half there, after which nobody is writing it
_DIGEST = re.compile(r"[0-9a-f]{64}")


def default_folder() -> str:
    """`gpt_pretrain/data` in the user's cache folder, beside the compiled programs."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "gpt_pretrain", "data")


class Future(Protocol):
    """Who knows what will be needed when."""

    def next_uses(self, digests: Sequence[str]) -> list[float | None]:
        """When each is needed next, in any unit above 0; SOON: it must stay; None: not known."""
        ...


class Forgets(Protocol):
    """Who keeps files of the cache open."""

    def forget(self, digest: str) -> None:
        """The file was removed: its bytes stay on the disk as long as it is open."""
        ...


@dataclass(frozen=True)
class Entry:
    path: str
    digest: str
    num_bytes: int
    used_secs: float  # when it was opened last, by time.time()


class Meter:
    """How many bytes arrived, and in how many seconds in which any were under way."""

    def __init__(self) -> None:
        self._lock, self._under_way, self._since = threading.Lock(), 0, 0.0
        self._num_bytes, self._secs = 0, 0.0

    @contextlib.contextmanager
    def fetching(self, num_bytes: int) -> Iterator[None]:
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1
        arrived = 0
        try:
            yield
            arrived = num_bytes
        finally:
            with self._lock:
                self._under_way -= 1
                self._num_bytes += arrived
                if not self._under_way:
                    self._secs += time.monotonic() - self._since

    def read(self) -> tuple[int, float]:
        """(bytes, seconds) so far."""
        with self._lock:
            running = time.monotonic() - self._since if self._under_way else 0.0
            return self._num_bytes, self._secs + running


class BlockCache:
    """
    Args:
      folder: made where it is not there.
      max_bytes: how many it may hold; None for half of what is free on its disk, the cache itself included, and at
        most MOST_BYTES. What other processes are just fetching may come on top.

    Attributes:
      future: knows what goes last when room is needed. Without it, what was opened last.
      meter: of what this process fetched.
      threads: for who fetches several things at once.

    Raises ValueError: the folder cannot be written to, or its disk has no room.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_bytes: int | None = None):
        self.folder = os.fspath(folder or default_folder())
        self.future: Future | None = None
        self.meter = Meter()
        self.threads = ThreadPoolExecutor(FETCHING_THREADS, "fetch")
        self._good: dict[str, tuple[int, ...]] = {}  # what was compared with its digest, and what it was then
        self._under_way: dict[str, int] = {}  # bytes of what this process is fetching
        self._users: weakref.WeakSet[Forgets] = weakref.WeakSet()
        try:
            for name in (*KINDS, "locks"):
                os.makedirs(os.path.join(self.folder, name), exist_ok=True)
            with self._locked("room") as room:
                used = sum(each.num_bytes for each in self._entries())
                _write_number(room, used)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._unusable(error) from None
        self.max_bytes = max_bytes or max(LEAST_BYTES, min((free + used) // 2, MOST_BYTES))
        if self.max_bytes > free + used:
            raise ValueError(
                f"{self.folder}: has room for {free + used} bytes, expected {self.max_bytes} for the cache. Lower "
                "data.cache_bytes, or name a folder on another disk: data.cache_dir."
            )

    def get(
        self, kind: Kind, digest: str, num_bytes: int, fill: Callable[[Path], None], *, what: str, advice: str = ""
    ) -> Path:
        """The file with this digest, fetched if it is not there.

        Args:
          fill: writes the content to a path.
          what: is fetched, for errors; `advice` is what to do where it stays wrong.

        Raises ValueError: other bytes arrive each time, there is no room, and what `fill` raises.
        """
        path = self.path(kind, digest)
        if self._is_good(path, digest, num_bytes):
            return path
        try:
            with self._locked(digest[:2]):
                if self._is_good(path, digest, num_bytes):  # another one was faster
                    return path
                if path.exists():
                    log.warning("%s: was damaged on this disk; it is fetched again.", path)
                    self._remove(path, digest)
                self._make_room(digest, num_bytes)
                try:
                    with self.meter.fetching(num_bytes):
                        self._land(path, digest, num_bytes, fill, what, advice)
                except BaseException:
                    self._add_used(-num_bytes)
                    raise
                finally:
                    self._under_way.pop(digest, None)
        except OSError as error:
            raise self._unusable(error) from None
        return path

    def path(self, kind: Kind, digest: str) -> Path:
        """Where the file with this digest is, or will be. ValueError where it is no digest: no name leads elsewhere."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r:.80}: expected a BLAKE3 digest in hex. Prepare the dataset again.")
        return Path(self.folder, kind, digest[:2], digest)

    def has(self, kind: Kind, digest: str) -> bool:
        """Whether a file of this name is there, good or not."""
        return os.path.exists(f"{self.folder}/{kind}/{digest[:2]}/{digest}")

    def problem(self, kind: Kind, digest: str, num_bytes: int) -> FileProblem | None:
        """What is wrong with a file that is there now, read anew."""
        path = self.path(kind, digest)
        found = file_problem(path, num_bytes, digest)
        return None if found and found.kind == "missing" else found

    def drop(self, kind: Kind, digest: str) -> None:
        """Removes a file: it will be fetched again."""
        self._remove(self.path(kind, digest), digest)

    def add_user(self, user: Forgets) -> None:
        """Will be told what is removed."""
        self._users.add(user)

    def _is_good(self, path: Path, digest: str, num_bytes: int) -> bool:
        """Compared with its digest once a process, and again where it was changed; its size each time."""
        try:
            there = os.stat(path)
            state = there.st_ino, there.st_size, there.st_mtime_ns
            if self._good.get(digest) != state:
                if file_problem(path, num_bytes, digest):
                    return False
                self._good[digest] = state
        except OSError:
            return False
        with contextlib.suppress(OSError):  # of another user, or removed just now
            os.utime(path, ns=(time.time_ns(), there.st_mtime_ns))
        return True

    def _land(self, path: Path, digest: str, num_bytes: int, fill, what: str, advice: str) -> None:
        path.parent.mkdir(exist_ok=True)
        problem: FileProblem | None = None
        for _ in range(MAX_ARRIVALS):
            with contextlib.suppress(_WrongBytes), whole_file(path, durable=False) as partial:
                fill(partial)
                if problem := file_problem(partial, num_bytes, digest):
                    raise _WrongBytes
                there = os.stat(partial)  # a rename changes none of these
                self._good[digest] = there.st_ino, there.st_size, there.st_mtime_ns
            if problem is None:
                return
        assert problem is not None
        raise ValueError(f"{what}: {problem.reason} (fetched {MAX_ARRIVALS} times). {advice}".rstrip())

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """Holds a lock that all threads and processes know; gives the open file."""
        file = os.open(os.path.join(self.folder, "locks", name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _make_room(self, digest: str, num_bytes: int) -> None:
        """Counts what is to be fetched as used, after removing what is needed last."""
        with self._locked("room") as room:
            used = _read_number(room)
            if used is None or used + num_bytes > self.max_bytes:
                used = self._evict(num_bytes)
            self._under_way[digest] = num_bytes
            _write_number(room, used + num_bytes)

    def _add_used(self, num_bytes: int) -> None:
        with self._locked("room") as room:
            used = _read_number(room)
            if used is not None:
                _write_number(room, max(0, used + num_bytes))

    def _evict(self, num_bytes: int) -> int:
        """Removes files until there is room for so many bytes; how many are in use then."""
        entries = self._entries()
        used = sum(each.num_bytes for each in entries) + sum(self._under_way.copy().values())
        if used + num_bytes <= self.max_bytes:  # a process that was killed had counted what never came
            return used
        slack = self.max_bytes // _SLACK
        for each in self._last_needed_first(entries):
            if used + num_bytes <= self.max_bytes - (slack if slack > num_bytes else 0):
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each.path)
            self._forget(each.digest)
            used -= each.num_bytes
        return used

    def _last_needed_first(self, entries: Sequence[Entry]) -> list[Entry]:
        """What may go, in this order: what nobody has used for a while; what the plan needs, the last first; what
        others have used lately. What is needed soon is not among it."""
        uses = self.future.next_uses([each.digest for each in entries]) if self.future else [None] * len(entries)
        keys, now = [], time.time()
        for each, use in zip(entries, uses, strict=True):
            if use == SOON or each.digest in self._under_way:
                continue
            if use is not None:
                keys.append((1, -use, each))
            else:
                keys.append((0 if now - each.used_secs > _IN_USE_SECS else 2, each.used_secs, each))
        return [each for *_, each in sorted(keys, key=lambda key: key[:2])]

    def _entries(self) -> list[Entry]:
        """All files; removes what killed processes left half there."""
        out, now = [], time.time()
        for kind in KINDS:
            for folder in _scan(os.path.join(self.folder, kind)):
                for each in _scan(folder.path):
                    try:
                        there = each.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if not each.name.startswith("."):
                        out.append(Entry(each.path, each.name, there.st_size, there.st_atime))
                    elif now - there.st_mtime > _STRAY_SECS:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(each.path)
        return out

    def _remove(self, path: Path, digest: str) -> None:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        self._forget(digest)
        self._add_used(-size)

    def _forget(self, digest: str) -> None:
        self._good.pop(digest, None)
        for user in list(self._users):
            user.forget(digest)

    def _unusable(self, error: OSError) -> ValueError:
        return ValueError(
            f"{self.folder}: cannot hold the cache of data from buckets ({error.strerror or error}). Name a folder on "
            "a disk with room: data.cache_dir; data.cache_bytes says how much it may hold."
        )


class _WrongBytes(Exception):
    pass


def _scan(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_number(file: int) -> int | None:
    content = os.pread(file, 32, 0)
    return int(content) if content.isdigit() else None


def _write_number(file: int, number: int) -> None:
    os.pwrite(file, b"%032d" % number, 0)

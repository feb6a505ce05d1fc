"""Files that a process keeps open: of datasets with thousands of shards, no more than its limit allows.

The limit on open files is one for the whole process, and so is what is counted here, whichever source opened it.
"""

import collections
import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

T = TypeVar("T")
_MOST = 1 << 14  # Linux allows 65,530 memory maps
_LEAST = 16
_WANTED = 1 << 16
_NO_FILE_LEFT = (errno.EMFILE, errno.ENFILE)


class OutOfFiles(ValueError):
    """The process may open no more files."""


class HoldsFiles(Protocol):
    """Something that can close a file of its own and open it again when it is needed."""

    def let_go(self, number: int) -> None:
        """Forgets one of its open files. Called from any thread; who reads from it just now reads on."""
        ...


class OpenFiles:
    """At most half of the files that the process may have open; those that were opened first are closed first."""

    def __init__(self):
        self._lock = threading.Lock()
        self._opened: collections.deque[tuple[weakref.ref[HoldsFiles], int]] = collections.deque()

    def open(self, path: str, number: int, owner: HoldsFiles, opener: Callable[[str], T]) -> T:
        """`opener(path)`, which `owner` knows by a number.

        Raises OutOfFiles, and OSError like `os.open`.
        """
        self._keep(min(_MOST, max(_LEAST, (max_open_files() or _MOST) // 2)) - 1)
        try:
            opened = _open(path, opener)
        except OSError as error:
            if error.errno not in _NO_FILE_LEFT:
                raise
            self._keep(0)
            try:
                opened = _open(path, opener)
            except OSError as again:
                raise (
                    OutOfFiles(f"{path}: {no_file_left(again)}") if again.errno in _NO_FILE_LEFT else again
                ) from None
        with self._lock:
            self._opened.append((weakref.ref(owner), number))
        return opened

    def _keep(self, num_files: int) -> None:
        while True:
            with self._lock:
                if len(self._opened) <= num_files:
                    return
                reference, number = self._opened.popleft()
            if owner := reference():
                owner.let_go(number)


def _open(path: str, opener: Callable[[str], T]) -> T:
    os.close(os.open(path, os.O_RDONLY))  # libraries in C++ do not say why they fail
    return opener(path)


OPEN_FILES = OpenFiles()


def max_open_files() -> int | None:
    """How many files the process may have open (the soft limit); None if there is no limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_max_open_files() -> None:
    """Lets the process open as many files as it may give itself: the usual 1,024 are fewer than some datasets have."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def no_file_left(error: OSError) -> str:
    """Why a file could not be opened, and what to do, where the limit on open files was reached."""
    whose = "the system" if error.errno == errno.ENFILE else f"this process (at most {max_open_files()}, `ulimit -n`)"
    return f"{whose} has as many files open as it may. Raise the limit (`ulimit -n 65536`) and start again."

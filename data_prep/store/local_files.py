"""Files of this machine that are either whole or absent, and their digests."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

READ_BYTES = 1 << 20


@contextmanager
def whole_file(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path`; when the block succeeds the file appears as `path`.

    The temporary name is a function of `path`, so a killed run leaves at most one stray file per
    output and the same work done again replaces it. `durable=False` does not wait for the disk:
    for files whose digest is checked before they are used.

        with whole_file("a.parquet") as partial:
            pq.write_table(table, partial)
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # in a directory from elsewhere it may be a link to anything
    try:
        yield partial
        if durable:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            sync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary directory beside `path`; when the block succeeds it appears as `path`, which is not there yet.

    As for `whole_file`, a killed run leaves at most one stray directory, which the same work done again replaces.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.iterdir()):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        sync_directory(partial)
        os.rename(partial, path)
        sync_directory(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    """A directory and what is in it, or a link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def sync_directory(directory: Path) -> None:
    """Makes renames and removals inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading, without a buffer. Never waits: ValueError for a FIFO, a device, a directory."""
    _refuse_special(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb", buffering=0)
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)  # what is there now
    except ValueError:
        file.close()
        raise
    return file  # pyright: ignore[reportReturnType]


def _refuse_special(path: str | os.PathLike, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is {kind_in_words(mode)}, expected a file")


def kind_in_words(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def digest_of(path: str | os.PathLike) -> str:
    """BLAKE3 digest of a file's content, in hex.

    BLAKE3 because it is faster than any disk (4.8 GB/s a core where sha256 runs at 1.8) and still
    a cryptographic digest: a fingerprint names a dataset that nobody can forge, which the even
    faster xxh3 could not promise.
    """
    digest = blake3()
    with open_regular(path) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()

"""Files that are either whole or absent, and their digests."""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from blake3 import blake3

READ_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 28  # of what is parsed: a file that somebody made large must not fill the memory


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


def write_json(path: str | os.PathLike, value: Any, *, durable: bool = True) -> None:
    """Writes `value` so that equal values always give equal bytes."""
    with whole_file(path, durable=durable) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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
        raise ValueError(f"{path}: is {_kind_in_words(mode)}, expected a file")


def _kind_in_words(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of a small file. ValueError for what is no file, or holds more than `max_bytes`."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"{path}: holds {size} bytes, expected at most {max_bytes}; it is something else")
        pieces = []
        while piece := file.read(max_bytes):
            pieces.append(piece)
    return b"".join(pieces)


def read_json(path: str | os.PathLike) -> Any:
    """The parsed file, or None where it is absent. ValueError, with the path, where it is not JSON or no file."""
    try:
        content = [read_bytes(path)]
    except FileNotFoundError:
        return None
    try:
        return json.loads(content.pop().decode("utf-8"))  # the bytes are gone while the text is parsed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file was damaged") from None


def write_note(path: str | os.PathLike, fields: Mapping[str, Any], *, durable: bool = True) -> None:
    """Writes what unfinished work has to know later, with a digest of itself."""
    write_json(path, {**fields, "digest": digest_json(fields)}, durable=durable)


def read_note(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `write_note` wrote. None where that is absent or was changed: the work is then done again."""
    try:
        fields = read_json(path)
    except (ValueError, OSError):
        return None
    if not isinstance(fields, dict):
        return None
    digest = fields.pop("digest", None)
    return fields if digest_json(fields) == digest else None


def digest_json(value: Any) -> str:
    """BLAKE3 digest of the canonical JSON text of `value`.

    >>> digest_json({"b": 1, "a": [2]}) == digest_json({"a": [2], "b": 1})
    True
    """
    digest = blake3()
    for piece in _canonical_text(value):
        digest.update(piece.encode())
    return digest.hexdigest()


_LONG = 4096  # entries of a list


def _canonical_text(value: Any) -> Iterator[str]:
    """In pieces: a manifest of 150,000 shards has 100 MB of it."""
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        for number, name in enumerate(sorted(value)):
            yield f"{',' if number else '{'}{json.dumps(name)}:"
            yield from _canonical_text(value[name])
        yield "}"
    elif isinstance(value, list | tuple) and len(value) > _LONG:
        for first in range(0, len(value), _LONG):
            text = json.dumps(value[first : first + _LONG], sort_keys=True, separators=(",", ":"))
            yield f"{',' if first else '['}{text[1:-1]}"
        yield "]"
    else:
        yield json.dumps(value, sort_keys=True, separators=(",", ":"))


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


@dataclass(frozen=True)
class FileProblem:
    """Why a file is not what a manifest or note says of it.

    >>> print(FileProblem("a.bin", "size", found=90, expected=100))
    a.bin: holds 90 bytes, expected 100; it was cut short or written to
    """

    path: str
    kind: Literal["missing", "no file", "elsewhere", "unreadable", "size", "digest"]
    found: int | str | None  # bytes or digest; of the three that are neither there nor missing, in words
    expected: int | str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

    @property
    def reason(self) -> str:
        """What was found and expected, without the path."""
        match self.kind:
            case "missing":
                return f"missing, expected {self.expected} bytes"
            case "no file":
                return f"is {self.found}, expected a file"
            case "elsewhere":
                return f"is a link that leaves its directory (to {self.found}), expected the file itself"
            case "unreadable":
                return f"cannot be read ({self.found})"
            case "size":
                return f"holds {self.found} bytes, expected {self.expected}; it was cut short or written to"
            case "digest":
                return f"digest is {self.found}, expected {self.expected}; its content was changed"


def file_problem(path: str | os.PathLike, num_bytes: int, digest: str, *, read: bool = True) -> FileProblem | None:
    """What is wrong with a file of which size and digest are known; None if nothing is.

    A link is followed only to a file in the same directory, or below it.

    Args:
      read: also compare the digest, for which the whole file is read; the size comes first, as it is free.
    """
    where = os.fspath(path)
    try:
        if os.path.islink(where):
            target = os.path.realpath(where)
            if not target.startswith(os.path.join(os.path.realpath(os.path.dirname(where) or "."), "")):
                return FileProblem(where, "elsewhere", target, num_bytes)
        there = os.stat(where)
        if not stat.S_ISREG(there.st_mode):
            return FileProblem(where, "no file", _kind_in_words(there.st_mode), num_bytes)
        if there.st_size != num_bytes:
            return FileProblem(where, "size", there.st_size, num_bytes)
        if read and (found := digest_of(path)) != digest:
            return FileProblem(where, "digest", found, digest)
    except FileNotFoundError:  # perhaps removed meanwhile
        return FileProblem(where, "missing", None, num_bytes)
    except OSError as error:
        return FileProblem(where, "unreadable", error.strerror or type(error).__name__, num_bytes)
    return None


def require_whole(path: str | os.PathLike, num_bytes: int, digest: str) -> None:
    """ValueError unless the file is what its manifest says. It is read once a process, and again where it was changed.

    A GB takes about 0.2 s from memory.
    """
    try:
        there = os.stat(path)
        state = there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
    except OSError:
        state = ()
    if problem := _known_problem(os.fspath(path), num_bytes, digest, state):
        directory = os.path.dirname(os.fspath(path))
        raise ValueError(f"{problem}. `python -m data_prep.check {directory} --repair` makes it again, if it can.")


@lru_cache(maxsize=1 << 14)
def _known_problem(path: str, num_bytes: int, digest: str, state: tuple[int, ...]) -> FileProblem | None:
    """`file_problem` of a file in this state: a path may stand for another file a moment later."""
    return file_problem(path, num_bytes, digest)

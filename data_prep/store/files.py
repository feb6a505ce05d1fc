"""Files that are either whole or absent, and their digests; here or in a bucket.

A path may be the URL of an object everywhere here; `local_files` is for files of this machine only.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from data_prep.store import bucket_transfers, buckets, local_files
from data_prep.store.buckets import BucketError
from data_prep.store.local_files import kind_in_words, open_regular
from data_prep.store.locations import is_bucket
from data_prep.store.scratch import OtherContent, local_copy, uploaded

MAX_JSON_BYTES = 1 << 28  # of what is parsed: a file that somebody made large must not fill the memory


@contextmanager
def whole_file(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """`local_files.whole_file`; of an object the temporary path is in the scratch folder."""
    where = os.fspath(path)
    with uploaded(where) if is_bucket(where) else local_files.whole_file(where, durable=durable) as partial:
        yield partial


def write_json(path: str | os.PathLike, value: Any, *, durable: bool = True) -> None:
    """Writes `value` so that equal values always give equal bytes."""
    if is_bucket(path):
        buckets.write(os.fspath(path), json_bytes(value))
        return
    with whole_file(path, durable=durable) as partial:
        partial.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of a small file. ValueError for what is no file, or holds more than `max_bytes`."""
    if is_bucket(path):
        found = buckets.stat(os.fspath(path))
        if found is None:
            raise FileNotFoundError(f"{path}: no such object")
        _refuse_large(path, found.num_bytes, max_bytes)
        is_large = found.num_bytes > bucket_transfers.PIECE_BYTES
        return buckets.read_in_pieces(found) if is_large else buckets.read(os.fspath(path))
    with open_regular(path) as file:
        _refuse_large(path, os.fstat(file.fileno()).st_size, max_bytes)
        pieces = []
        while piece := file.read(max_bytes):
            pieces.append(piece)
    return b"".join(pieces)


def _refuse_large(path: str | os.PathLike, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ValueError(f"{path}: holds {num_bytes} bytes, expected at most {max_bytes}; it is something else")


def read_json(path: str | os.PathLike) -> Any:
    """The parsed file, or None where it is absent. ValueError, with the path, where it is not JSON or no file."""
    try:
        content = [read_bytes(path)]
    except FileNotFoundError:
        return None
    return parse_json(content, path)


def parse_json(content: list[bytes], path: str | os.PathLike) -> Any:
    """The value that a file holds, whose bytes are taken out of the list: they are gone while the text is parsed.

    Raises ValueError, with the path, where it is not JSON.
    """
    try:
        return json.loads(content.pop().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file was damaged") from None


def write_note(path: str | os.PathLike, fields: Mapping[str, Any], *, durable: bool = True) -> None:
    """Writes what unfinished work has to know later, with a digest of itself."""
    write_json(path, _with_digest(fields), durable=durable)


def update_note(path: str | os.PathLike, change: Callable[[dict[str, Any] | None], Mapping[str, Any] | None]) -> None:
    """Makes of a note what `change` makes of it; None: leaves it as it is.

    Changes that several make at once come one after the other: in a bucket, where `change` may be asked again of what
    another one wrote. On a disk the caller has a lock.
    """
    while True:
        there = buckets.stat(os.fspath(path)) if is_bucket(path) else None
        fields = change(read_note(path))
        if fields is None:
            return
        if not is_bucket(path):
            write_note(path, fields)
            return
        with suppress(buckets.Changed):
            content = json_bytes(_with_digest(fields))
            buckets.write(os.fspath(path), content, if_version=there.version if there else "absent")
            return


def _with_digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**fields, "digest": digest_json(fields)}


def read_note(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `write_note` wrote. None where that is absent or was changed: the work is then done again.

    Raises BucketError: a bucket does not say what is there.
    """
    try:
        fields = read_json(path)
    except BucketError:
        raise
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
    """`local_files.digest_of`, of an object by its copy."""
    with local_copy(path) as copy:
        return local_files.digest_of(copy)


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

    Raises BucketError: an object that is there cannot be read.
    """
    where = os.fspath(path)
    if is_bucket(where):
        return _object_problem(where, num_bytes, digest, read=read)
    try:
        if os.path.islink(where):
            target = os.path.realpath(where)
            if not target.startswith(os.path.join(os.path.realpath(os.path.dirname(where) or "."), "")):
                return FileProblem(where, "elsewhere", target, num_bytes)
        there = os.stat(where)
        if not stat.S_ISREG(there.st_mode):
            return FileProblem(where, "no file", kind_in_words(there.st_mode), num_bytes)
        if there.st_size != num_bytes:
            return FileProblem(where, "size", there.st_size, num_bytes)
        if read and (found := digest_of(path)) != digest:
            return FileProblem(where, "digest", found, digest)
    except FileNotFoundError:  # perhaps removed meanwhile
        return FileProblem(where, "missing", None, num_bytes)
    except OSError as error:
        return FileProblem(where, "unreadable", error.strerror or type(error).__name__, num_bytes)
    return None


def _object_problem(url: str, num_bytes: int, digest: str, *, read: bool) -> FileProblem | None:
    there = buckets.stat(url)
    if there is None:
        return FileProblem(url, "missing", None, num_bytes)
    if there.num_bytes != num_bytes:
        return FileProblem(url, "size", there.num_bytes, num_bytes)
    try:
        if read:
            with local_copy(url, digest):
                pass
    except OtherContent as error:
        return FileProblem(url, "digest", error.found, digest)
    return None


def require_whole(path: str | os.PathLike, num_bytes: int, digest: str) -> None:
    """ValueError unless the file is what its manifest says. It is read once a process, and again where it was changed.

    A GB takes about 0.2 s from memory. An object is fetched once, and again where it was changed.
    """
    if is_bucket(path):
        problem = file_problem(path, num_bytes, digest)
    else:
        problem = _known_problem(os.fspath(path), num_bytes, digest, _state_of(path))
    if problem:
        directory = os.path.dirname(os.fspath(path))
        raise ValueError(f"{problem}. `python -m data_prep.check {directory} --repair` makes it again, if it can.")


def _state_of(path: str | os.PathLike) -> tuple[int, ...]:
    try:
        there = os.stat(path)
        return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
    except OSError:
        return ()


@lru_cache(maxsize=1 << 14)
def _known_problem(path: str, num_bytes: int, digest: str, state: tuple[int, ...]) -> FileProblem | None:
    """`file_problem` of a file in this state: a path may stand for another file a moment later."""
    return file_problem(path, num_bytes, digest)

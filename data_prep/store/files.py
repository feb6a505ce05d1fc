"""Files that are either whole or absent, and their digests."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


def read_json(path: str | os.PathLike) -> Any:
    """The parsed file, or None where it is absent. ValueError where it is not JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file was damaged") from None


def digest_json(value: Any) -> str:
    """BLAKE3 digest of the canonical JSON text of `value`.

    >>> digest_json({"b": 1, "a": [2]}) == digest_json({"a": [2], "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode()).hexdigest()


def digest_of(path: str | os.PathLike) -> str:
    """BLAKE3 digest of a file's content, in hex.

    BLAKE3 because it is faster than any disk (4.8 GB/s a core where sha256 runs at 1.8) and still
    a cryptographic digest: a fingerprint names a dataset that nobody can forge, which the even
    faster xxh3 could not promise.
    """
    digest = blake3()
    with open(path, "rb", buffering=0) as file:
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
    kind: Literal["missing", "size", "digest"]
    found: int | str | None  # bytes or digest
    expected: int | str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

    @property
    def reason(self) -> str:
        """What was found and expected, without the path."""
        if self.kind == "missing":
            return f"missing, expected {self.expected} bytes"
        if self.kind == "size":
            return f"holds {self.found} bytes, expected {self.expected}; it was cut short or written to"
        return f"digest is {self.found}, expected {self.expected}; its content was changed"


def file_problem(path: str | os.PathLike, num_bytes: int, digest: str, *, read: bool = True) -> FileProblem | None:
    """What is wrong with a file of which size and digest are known; None if nothing is.

    Args:
      read: also compare the digest, for which the whole file is read; the size comes first, as it is free.
    """
    where = os.fspath(path)
    try:
        if not os.path.isfile(path):
            return FileProblem(where, "missing", None, num_bytes)
        if (size := os.path.getsize(path)) != num_bytes:
            return FileProblem(where, "size", size, num_bytes)
        if read and (found := digest_of(path)) != digest:
            return FileProblem(where, "digest", found, digest)
    except FileNotFoundError:  # removed meanwhile
        return FileProblem(where, "missing", None, num_bytes)
    return None

"""Files that are either whole or absent, and their digests."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """BLAKE3 digest of the canonical JSON text of `value`."""
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


def is_intact(path: str | os.PathLike, num_bytes: int, digest: str) -> bool:
    """Whether `path` is there with exactly this size and digest (the size first: it is free)."""
    try:
        return os.path.getsize(path) == num_bytes and digest_of(path) == digest
    except FileNotFoundError:
        return False

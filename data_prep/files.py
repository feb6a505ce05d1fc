"""Files that are either whole or absent, and their digests."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`; when the block succeeds the file appears as `path`.

    The temporary name is a function of `path`, so a killed run leaves at most one stray file per
    output and the same work done again replaces it.

        with whole_file("a.parquet") as partial:
            pq.write_table(table, partial)
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
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


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` so that equal values always give equal bytes."""
    with whole_file(path) as partial:
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
    """sha256 of the canonical JSON text of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: str | os.PathLike, num_bytes: int, sha256: str) -> bool:
    """Whether `path` is there with exactly this size and digest (the size first: it is free)."""
    try:
        return os.path.getsize(path) == num_bytes and sha256_of(path) == sha256
    except FileNotFoundError:
        return False

"""An index beside each table of documents: id or url -> rows, without reading the table.

A .npy file of (hash, row) pairs, sorted by hash: 12 bytes for each id and each url. Finding a
document is a binary search in a memory map, which touches a page or two.
"""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from data_prep.files import whole_file

ENTRY = np.dtype([("hash", "<u8"), ("row", "<u4")])
KEYS = ("id", "url")


def key_hash(column: str, value: str) -> int:
    """64 bits of BLAKE2b over the column's name and the value."""
    return int.from_bytes(hashlib.blake2b(f"{column}\0{value}".encode(), digest_size=8).digest())


def index_table(table: pa.Table) -> np.ndarray:
    """The sorted entries of a table's ids and urls; rows count from 0. Nulls are left out."""
    parts = [np.empty(0, ENTRY)]
    for column in KEYS:
        values = table[column].to_pylist()
        rows = np.array([row for row, value in enumerate(values) if value is not None], np.uint32)
        hashes = np.fromiter(_hashes(column, values), np.uint64, len(rows))
        parts.append(np.empty(len(rows), ENTRY))
        parts[-1]["hash"], parts[-1]["row"] = hashes, rows
    return np.sort(np.concatenate(parts), order=("hash", "row"))


def _hashes(column: str, values: Iterable[str | None]) -> Iterable[int]:
    return (key_hash(column, value) for value in values if value is not None)


def write_index(path: str | os.PathLike, entries: np.ndarray) -> int:
    """Writes the entries; returns how many there are."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.save(file, entries)
    return len(entries)


def find_rows(path: str | os.PathLike, column: str, value: str) -> list[int]:
    """Rows whose hash is that of the value; the caller compares the values themselves."""
    entries = np.load(path, mmap_mode="r")
    hashes, wanted = entries["hash"], np.uint64(key_hash(column, value))
    first, last = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
    return entries["row"][first:last].tolist()

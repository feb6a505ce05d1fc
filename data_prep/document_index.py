"""An index beside each table of documents: id or url -> rows, without reading the table.

A .npy file of sorted uint64: the CRC-32 of an id or url in the upper half, its row in the lower.
Finding a document is a binary search in a memory map, which touches a page or two. The few rows
whose checksum agrees by chance are told apart by reading them.
"""

import os
import zlib
from collections.abc import Iterable
from itertools import repeat

import numpy as np
import pyarrow as pa

from data_prep.files import whole_file

KEYS = ("id", "url")


def _checksums(column: str, values: list[bytes]) -> Iterable[int]:
    # Begun with the column's number, so that an id that is some url's text is not taken for it.
    return map(zlib.crc32, values, repeat(KEYS.index(column) + 1))


def index_table(table: pa.Table) -> np.ndarray:
    """The sorted entries of a table's ids and urls: uint64 (n,). Nulls are left out."""
    parts = [np.empty(0, np.uint64)]
    for column in KEYS:
        values = table[column].cast(pa.binary())
        rows = np.flatnonzero(np.asarray(values.is_valid())).astype(np.uint64)
        checksums = _checksums(column, values.drop_null().to_pylist())
        parts.append(np.fromiter(checksums, np.uint64, len(rows)) << np.uint64(32) | rows)
    return np.sort(np.concatenate(parts))


def write_index(path: str | os.PathLike, entries: np.ndarray) -> int:
    """Writes the entries; returns how many there are."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.save(file, entries.astype("<u8"))
    return len(entries)


def find_rows(path: str | os.PathLike, column: str, value: str) -> list[int]:
    """Rows that may hold the value; the caller compares the values themselves."""
    entries = np.load(path, mmap_mode="r")
    (checksum,) = _checksums(column, [value.encode()])
    bounds = np.array([checksum << 32, (checksum + 1 << 32) - 1], np.uint64)
    first, last = np.searchsorted(entries, bounds)
    # The upper bound is itself a possible entry, of row 2**32 - 1; no table is that long.
    return (entries[first:last] & np.uint64(0xFFFFFFFF)).astype(np.int64).tolist()

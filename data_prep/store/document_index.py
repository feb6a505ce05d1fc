"""An index beside each table of documents: id or url -> rows, without reading the table.

A file of sorted little-endian uint64, nothing else: the CRC-32 of an id or url in the upper half,
its row in the lower. Checksums are spread evenly, so a value's place is known within a few hundred
entries: a look-up reads some kilobytes. The few rows whose checksum agrees by chance are told apart
by reading them.
"""

import math
import os
import zlib

import numpy as np
import pyarrow as pa

from data_prep.store.files import whole_file
from data_prep.store.local_files import open_regular

KEYS = ("id", "url")


def index_table(table: pa.Table) -> np.ndarray:
    """The sorted entries of a table's ids and urls: uint64 (n,). Nulls are left out."""
    parts = [np.empty(0, np.uint64)]
    for column in KEYS:
        values = table[column].cast(pa.binary())
        rows = np.flatnonzero(np.asarray(values.is_valid())).astype(np.uint64)
        checksums = map(zlib.crc32, values.drop_null().to_pylist())
        parts.append(np.fromiter(checksums, np.uint64, len(rows)) << np.uint64(32) | rows)
    return np.sort(np.concatenate(parts))


def write_index(path: str | os.PathLike, entries: np.ndarray) -> int:
    """Writes the entries; returns how many there are."""
    with whole_file(path) as partial:
        entries.astype("<u8").tofile(partial)
    return len(entries)


def find_rows(path: str | os.PathLike, value: str) -> list[int]:
    """Rows that may have the value as id or url; the caller compares the values themselves.

    The caller has compared the file with its digest, too.
    """
    checksum = zlib.crc32(value.encode("utf-8", "surrogatepass"))
    with open_regular(path) as file:
        num_entries = os.fstat(file.fileno()).st_size // 8
        if not num_entries:
            return []
        # Five standard deviations of the place of a checksum among num_entries even ones, and more.
        reach = 64 + 3 * math.isqrt(num_entries)
        middle = checksum * num_entries >> 32
        while True:
            first, last = max(0, middle - reach), min(num_entries, middle + reach)
            content = os.pread(file.fileno(), 8 * (last - first), 8 * first)
            if len(content) != 8 * (last - first):
                raise ValueError(f"{path}: was cut short while it was read")
            entries = np.frombuffer(content, "<u8")
            found = entries >> np.uint64(32)
            starts_before = first == 0 or found[0] < checksum
            if starts_before and (last == num_entries or found[-1] > checksum):
                return (entries[found == checksum] & np.uint64(0xFFFFFFFF)).astype(int).tolist()
            reach *= 4

"""The ArrayRecord format: each record a `tf.train.Example` that holds the same number of ids.

Record k of a split holds tokens `[k * record_tokens, (k + 1) * record_tokens)` of its stream; the
last one of the split is padded (the manifest has the true count). The protobuf has one feature,
`tokens`, of one bytes value, hence every record of a dataset starts with the same few bytes and
the ids sit at a fixed offset: the reader compares those bytes instead of parsing.

No TensorFlow: the wire format of this one message is short enough to write down.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.store.addresses import Addresses
from data_prep.store.files import whole_file
from data_prep.store.open_files import OPEN_FILES, OutOfFiles

FEATURE = "tokens"
# One record a group: random access reads what it needs.
COMPRESSION = {"none": "group_size:1,uncompressed", "zstd": "group_size:1,zstd:3"}


def record_prefix(record_tokens: int, dtype: np.dtype | type = np.uint16) -> bytes:
    """The bytes before the ids in each record: Example > Features > map entry > BytesList."""
    if record_tokens < 1:
        raise ValueError(f"record_tokens={record_tokens}: a record holds at least one token")
    size = np.dtype(dtype).itemsize * record_tokens
    prefix = b""
    # From the inside out: each level is (key, length of everything inside); all the fields
    # have number 1 but the map entry's value, which has 2 and follows the map entry's key.
    name = FEATURE.encode()
    levels = [b"\x0a", b"\x0a", b"\x0a" + _varint(len(name)) + name + b"\x12", b"\x0a", b"\x0a"]
    for level in levels:
        prefix = level + _varint(size + len(prefix)) + prefix
    return prefix


def _varint(value: int) -> bytes:
    """Protobuf's integer: seven bits a byte, low bits first.

    >>> _varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def check_record(record: bytes, record_tokens: int, dtype: np.dtype | type = np.uint16) -> None:
    """ValueError unless `record` has the layout that the fixed offset relies on."""
    prefix = record_prefix(record_tokens, dtype)
    expected_bytes = len(prefix) + np.dtype(dtype).itemsize * record_tokens
    if len(record) != expected_bytes:
        raise ValueError(
            f"record of {len(record)} bytes, expected {expected_bytes} "
            f"({record_tokens} tokens after a {len(prefix)}-byte prefix)"
        )
    if not record.startswith(prefix):
        raise ValueError(
            f"record starts with {record[: len(prefix)].hex()}, expected {prefix.hex()}: not a "
            f"tf.train.Example of {record_tokens} {np.dtype(dtype).name} ids named {FEATURE!r}"
        )


def write_records(
    path: str | os.PathLike,
    chunks: Iterable[np.ndarray],
    num_tokens: int,
    *,
    record_tokens: int,
    pad_id: int = 0,
    dtype: np.dtype | type = np.uint16,
    compression: str = "none",
) -> None:
    """Writes `chunks` of ids of `dtype`, `num_tokens` in all, as records of `record_tokens` ids.

    Chunks may have any length; what is missing from the last record is filled with `pad_id`.
    """
    from array_record.python import array_record_module  # pyright: ignore

    prefix, stored = record_prefix(record_tokens, dtype), np.dtype(dtype).newbyteorder("<")
    num_read = 0
    with whole_file(path) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), COMPRESSION[compression])
        rest = np.empty(0, stored)
        for chunk in chunks:
            assert chunk.dtype == dtype, chunk.dtype
            num_read += len(chunk)
            chunk = np.concatenate([rest, chunk]) if len(rest) else chunk
            num_whole = len(chunk) // record_tokens * record_tokens
            for start in range(0, num_whole, record_tokens):
                writer.write(prefix + chunk[start : start + record_tokens].tobytes())
            rest = chunk[num_whole:]
        if len(rest):
            padding = np.full(record_tokens - len(rest), pad_id, stored)
            writer.write(prefix + rest.tobytes() + padding.tobytes())
        writer.close()
        assert num_read == num_tokens, (num_read, num_tokens)


# A record at a time by seeking: five times as fast as reading a list, which the library hands to a pool of threads.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class RecordReader:
    """Records of several files, in order, as one array of rows. Picklable; threads take turns.

    Files are opened when they are first read, and a bounded number of them stays open.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        record_tokens: int,
        dtype: np.dtype | type = np.uint16,
    ):
        if not paths:
            raise ValueError("no ArrayRecord files were given")
        self.paths = [os.fspath(path) for path in paths]
        self.record_tokens = record_tokens
        self.dtype = np.dtype(dtype)
        self._prefix = np.frombuffer(record_prefix(record_tokens, dtype), np.uint8)
        self._addresses = Addresses(num_records(path) for path in self.paths)
        self._open()

    def _open(self) -> None:
        self._readers: list[Any] = [None] * len(self.paths)
        self._lock = threading.Lock()  # a reader has one place in its file

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Number of records in all files."""
        return self._addresses.total

    def read(self, record_indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Records by index, in the order asked for: (n, record_tokens) of `dtype`.

        Raises:
          IndexError: an index outside [0, len(self)).
          OutOfFiles: too many files are open already.
          ValueError: a record that cannot be read or has another layout. Names the file.
        """
        indices = np.asarray(record_indices, np.int64)
        if len(indices) == 0:
            return np.empty((0, self.record_tokens), self.dtype)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"record indices must be in [0, {len(self)})")
        try:
            records = self._records(indices)
        except OutOfFiles:
            raise
        except Exception as error:  # the C++ reader raises many types
            names = ", ".join(sorted({self._place(int(i))[0] for i in indices}))
            raise ValueError(f"{names}: cannot read a record: {error}") from error
        num_bytes = len(self._prefix) + self.dtype.itemsize * self.record_tokens
        if all(len(record) == num_bytes for record in records):
            bytes_NB = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), num_bytes)
            offset = len(self._prefix)
            if (bytes_NB[:, :offset] == self._prefix).all():
                return np.ascontiguousarray(bytes_NB[:, offset:]).view(self.dtype)
        raise self._first_bad(indices, records)

    def let_go(self, number: int) -> None:
        """See `HoldsFiles`: the file is closed when the read under way, if any, has ended."""
        self._readers[number] = None

    def _reader(self, file: int) -> Any:
        reader = self._readers[file]
        if reader is None:
            reader = self._readers[file] = OPEN_FILES.open(self.paths[file], file, self, _open_reader)
        return reader

    def _records(self, indices: np.ndarray) -> list[bytes]:
        files = self._addresses.files_of(indices)
        places = indices - self._addresses.starts[files]
        records = []
        with self._lock:
            for file, place in zip(files.tolist(), places.tolist(), strict=True):
                reader = self._reader(file)
                reader.seek(place)
                records.append(reader.read())
        return records

    def _first_bad(self, indices: np.ndarray, records: Sequence[bytes]) -> ValueError:
        for index, record in zip(indices, records, strict=True):
            try:
                check_record(record, self.record_tokens, self.dtype)
            except ValueError as error:
                path, place = self._place(int(index))
                return ValueError(f"{path}: record {place}: {error}")
        raise AssertionError("every record passes the check that the block failed")

    def _place(self, index: int) -> tuple[str, int]:
        """Global record index -> (file, index inside the file)."""
        file, place = self._addresses.find(index)
        return self.paths[file], place


def open_records(
    paths: Sequence[str | os.PathLike],
    record_tokens: int,
    dtype: np.dtype | type = np.uint16,
) -> RecordReader:
    """A reader over the records of `paths`, in order: `open_records(paths, 2048).read([0, 7])` is (2, 2048).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not a whole ArrayRecord file, or `paths` is empty.
    """
    return RecordReader(paths, record_tokens, dtype)


def _open_reader(path: str) -> Any:
    from array_record.python import array_record_module  # pyright: ignore

    return array_record_module.ArrayRecordReader(path, options=_READER_OPTIONS)


def num_records(path: str | os.PathLike) -> int:
    """Number of records in one ArrayRecord file. ValueError naming the file if it is damaged."""
    from array_record.python import array_record_module  # pyright: ignore

    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such ArrayRecord file")
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except Exception as error:
        raise ValueError(f"{path}: not a whole ArrayRecord file: {error}") from error
    return count

"""Units of input, and the documents in them.

A *unit* is a run of row groups of one parquet file, a run of examples of one TFDS split, or one
JSONL or text file. It is the piece of input that is tokenized on its own, and what a unit holds
depends on its file only.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.inputs.paths import TFDS
from data_prep.inputs.tfds import TFDSSplit
from data_prep.store.documents import PROVENANCE
from data_prep.store.locations import InputError, describe, file_info, file_name, open_file
from data_prep.store.text import without_surrogates

UNIT_BYTES = 32 << 20  # uncompressed text in one unit of a parquet file or TFDS split, roughly
BATCH_BYTES = 4 << 20  # text in memory at a time, roughly
BATCH_ROWS = 4096  # at most
TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class Unit:
    path: str
    index: int  # of the file among the inputs
    first_group: int = 0  # row groups of a parquet file; in a TFDS split each unit is a group
    num_groups: int = 0
    first_row: int = 0  # parquet and TFDS only
    num_rows: int = 0  # TFDS only
    num_bytes: int = 0  # how much work it is: text (parquet, TFDS) or file (others) bytes

    @property
    def name(self) -> str:
        return f"{self.index:05d}-{self.first_group:06d}"


def input_of(unit_name: str) -> int:
    """The index, among the inputs, of the file that a unit is of.

    >>> input_of(Unit("a.parquet", index=12, first_group=3).name)
    12
    """
    return int(unit_name.partition("-")[0])


@dataclass(frozen=True)
class Inspection:
    """What can be known of an input file before reading it."""

    identity: dict[str, Any]  # path, size, and what changes with its content, as far as is known
    units: tuple[Unit, ...] = ()
    error: str = ""  # why it cannot be read at all: the other files still can


class Batch(NamedTuple):
    """Some documents in a row, as Arrow has them."""

    texts: pa.LargeStringArray  # valid UTF-8; may hold nulls
    provenance: dict[str, pa.Array]  # strings or nulls, for each name in PROVENANCE
    rows: np.ndarray  # row or line (from 0) in the input file: int64
    num_bytes: int  # share of the unit's num_bytes


def text_bytes(texts: pa.LargeStringArray) -> np.ndarray:
    """Length of each text in bytes of UTF-8; texts without nulls -> int64 (n,)."""
    return pc.call_function("binary_length", [texts]).to_numpy()


def inspect(path: str, index: int, text_column: str) -> Inspection:
    """Identity and units of one input file.

    Raises InputError where no work should start: the file is absent, or has no text column.
    """
    if path.startswith(TFDS):
        split = TFDSSplit(path, text_column, PROVENANCE)
        identity, num_bytes = split.inspect()
        return Inspection(identity, tuple(_tfds_units(split, index, num_bytes)))
    info = file_info(path)
    lfs = info.get("lfs")  # the Hugging Face Hub knows every file's digest
    version = lfs.get("sha256", "") if isinstance(lfs, dict) else info.get("blob_id", "")
    identity = {"path": path, "size": info.get("size"), "tail_sha256": "", "version": version}
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            tail = hashlib.sha256(file.read()).hexdigest()
            identity |= {"size": size, "tail_sha256": tail}
            if not file_name(path).endswith(".parquet"):
                return Inspection(identity, (Unit(path, index, num_bytes=size),))
            file.seek(0)
            parquet = pq.ParquetFile(file)
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowInvalid, OSError) as error:
        return Inspection(identity, error=f"{path}: not parquet, or cut short: {str(error).strip()}")
    except Exception as error:  # each file system raises its own types
        return Inspection(identity, error=f"{path}: cannot be read: {describe(error)}")
    if text_column not in schema.names:
        raise InputError(
            f"{path}: no column {text_column!r}; the columns are {', '.join(schema.names)}. "
            "Choose one with --text_column."
        )
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
        raise InputError(
            f"{path}: column {text_column!r} holds {kind}, not text; the columns are "
            + ", ".join(f"{f.name} ({f.type})" for f in schema)
        )
    return Inspection(identity, tuple(_parquet_units(path, index, metadata, text_column)))


def _parquet_units(path: str, index: int, metadata: Any, text_column: str) -> Iterator[Unit]:
    """Consecutive row groups, taken together until they hold about UNIT_BYTES of text."""
    first_group = first_row = num_rows = num_bytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        columns = (row_group.column(i) for i in range(row_group.num_columns))
        num_rows += row_group.num_rows
        num_bytes += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_column)
        if num_bytes >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            num_groups = group + 1 - first_group
            yield Unit(path, index, first_group, num_groups, first_row, num_bytes=num_bytes)
            first_group, first_row, num_rows, num_bytes = group + 1, first_row + num_rows, 0, 0


def _tfds_units(split: TFDSSplit, index: int, num_bytes: int) -> Iterator[Unit]:
    """Equal ranges of examples, of about UNIT_BYTES of text each."""
    num_rows = split.num_examples
    num_units = min(num_rows, max(1, num_bytes // UNIT_BYTES))
    ends = [num_rows * group // num_units for group in range(num_units + 1)] if num_units else []
    for group, (start, stop) in enumerate(itertools.pairwise(ends)):
        share = num_bytes * (stop - start) // num_rows
        yield Unit(split.path, index, group, 1, start, stop - start, share)


def read_unit(unit: Unit, text_column: str) -> Iterator[Batch]:
    """The unit's documents in order, in batches of bounded size.

    Raises InputError: the file cannot be read to the end, or a row has no text column.
    """
    name = file_name(unit.path)
    try:
        if unit.path.startswith(TFDS):
            yield from _read_tfds(unit, text_column)
            return
        with open_file(unit.path) as file:
            if name.endswith(".parquet"):
                yield from _read_parquet(file, unit, text_column)
            elif name.endswith(".txt"):
                yield make_batch([file.read().decode("utf-8")], {}, [0], unit.num_bytes)
            else:
                yield from _read_jsonl(file, unit, text_column)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{unit.path}: not UTF-8 text: {error}") from error
    except Exception as error:  # each file system and codec raises its own types
        raise InputError(
            f"{unit.path}: cannot be read to the end: {describe(error)}. It may be damaged or cut short."
        ) from error


def make_batch(
    texts: Sequence[str | None],
    provenance: Mapping[str, Sequence[str | None]],
    rows: Sequence[int],
    num_bytes: int,
) -> Batch:
    """A batch from Python strings."""
    try:
        column = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        repaired = [text and without_surrogates(text) for text in texts]
        column = pa.array(repaired, pa.large_string())
    columns = {name: pa.array(provenance.get(name, [None] * len(texts)), pa.string()) for name in PROVENANCE}
    return Batch(column, columns, np.array(rows, np.int64), num_bytes)


def _read_parquet(file: BinaryIO, unit: Unit, text_column: str) -> Iterator[Batch]:
    parquet = pq.ParquetFile(
        file,
        buffer_size=1 << 20,  # with a buffer, columns are streamed
        page_checksum_verification=True,  # where the writer made them
    )
    present = [c for c in PROVENANCE if c in parquet.schema_arrow.names and c != text_column]
    groups = list(range(unit.first_group, unit.first_group + unit.num_groups))
    row = unit.first_row
    rows_left = sum(parquet.metadata.row_group(g).num_rows for g in groups)
    bytes_left = unit.num_bytes
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows_left // max(1, bytes_left)))
    for table in parquet.iter_batches(batch_rows, groups, [text_column, *present], use_threads=False):
        num_rows = table.num_rows
        texts = table.column(text_column).cast(pa.large_string())
        # Parquet promises UTF-8 and nothing checks it; "\xff" would become other tokens.
        texts.validate(full=True)
        share = bytes_left * num_rows // max(1, rows_left)
        yield Batch(
            texts,
            {name: _strings(table.column(name)) if name in present else pa.nulls(num_rows) for name in PROVENANCE},
            np.arange(row, row + num_rows),
            share,
        )
        row, rows_left, bytes_left = row + num_rows, rows_left - num_rows, bytes_left - share


def _read_tfds(unit: Unit, text_column: str) -> Iterator[Batch]:
    split = TFDSSplit(unit.path, text_column, PROVENANCE)
    stop, bytes_left = unit.first_row + unit.num_rows, unit.num_bytes
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * unit.num_rows // max(1, unit.num_bytes)))
    for row in range(unit.first_row, stop, batch_rows):
        rows = np.arange(row, min(row + batch_rows, stop))
        share = bytes_left * len(rows) // (stop - row)
        yield Batch(*split.read(rows), rows, share)
        bytes_left -= share


def _strings(column: pa.Array) -> pa.Array:
    """A provenance column as text, whatever its type."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        values = column.to_pylist()
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _read_jsonl(file: BinaryIO, unit: Unit, text_column: str) -> Iterator[Batch]:
    name = file_name(unit.path)
    compression = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    # Arrow's codecs join concatenated streams and, unlike others, refuse one that was cut short.
    lines: Any = file
    if compression:
        lines = io.BufferedReader(pa.CompressedInputStream(file, compression), 1 << 20)  # type: ignore
    texts: list[str | None] = []
    provenance: dict[str, list[str | None]] = {name: [] for name in PROVENANCE}
    rows: list[int] = []
    num_chars = position = 0
    for row, line in enumerate(lines):
        if not line.strip():
            continue
        text, values = _parse_line(unit.path, row, line, text_column)
        texts.append(text)
        for column, value in zip(provenance.values(), values, strict=True):
            column.append(value)
        rows.append(row)
        num_chars += len(line)
        if len(rows) == BATCH_ROWS or num_chars >= BATCH_BYTES:
            moved = file.tell() - position
            yield make_batch(texts, provenance, rows, moved)
            texts, provenance, rows = [], {name: [] for name in PROVENANCE}, []
            num_chars, position = 0, position + moved
    yield make_batch(texts, provenance, rows, max(0, unit.num_bytes - position))


def _parse_line(path: str, row: int, line: bytes, text_column: str) -> tuple[str | None, list[str | None]]:
    where = f"{path}: line {row + 1}"
    try:
        fields = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object, found {type(fields).__name__}")
    if text_column not in fields:
        raise InputError(
            f"{where}: no column {text_column!r}; the columns are {', '.join(fields)}. Choose one with --text_column."
        )
    text = fields[text_column]
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: {text_column!r} holds {type(text).__name__}, not text")
    values = (fields.get(name) if name != text_column else None for name in PROVENANCE)
    return text, [None if value is None else _encodable(str(value)) for value in values]


def _encodable(text: str) -> str:
    """JSON can spell lone surrogates, which a parquet table cannot hold."""
    return text.encode("utf-8", "replace").decode()

"""Units of input, and the documents in them.

A *unit* is a run of row groups of one parquet file, a run of examples of one TFDS split, or one
JSONL or text file. It is the piece of input that is tokenized on its own, and what a unit holds
depends on its file only.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.inputs.columns import as_provenance, as_text, find_column, first_not_utf8, take_column
from data_prep.inputs.contents import HEAD_BYTES, misnamed
from data_prep.inputs.kinds import PARQUET, TEXT, kind_of
from data_prep.inputs.lines import Line, looks_empty, read_lines, read_text
from data_prep.inputs.paths import TFDS
from data_prep.inputs.tfds import TFDSSplit
from data_prep.store.documents import PROVENANCE
from data_prep.store.locations import (
    DamagedInput,
    InputError,
    describe,
    file_info,
    is_remote,
    open_file,
    readable_error,
)
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
    error: InputError | None = None  # why it cannot be read at all: the other files still can
    is_empty: bool = False  # as far as its beginning says


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

    Raises InputError where no work should start: the file is absent or may not be read, is something else than
    its name says, or has no text column.
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
            kind = kind_of(path)
            if kind == PARQUET:
                return Inspection(identity, _inspect_parquet(path, index, file, size, text_column))
            is_empty = kind is not None and looks_empty(path, file)
            return Inspection(identity, (Unit(path, index, num_bytes=size),), is_empty=is_empty)
    except DamagedInput as error:
        return Inspection(identity, error=error)
    except InputError:
        raise
    except Exception as error:  # each file system raises its own types
        if not is_remote(path):
            raise readable_error(path, error) from None
        return Inspection(identity, error=readable_error(path, error))


def _inspect_parquet(path: str, index: int, file: BinaryIO, size: int, text_column: str) -> tuple[Unit, ...]:
    if not size:
        raise DamagedInput(f"{path}: not parquet: is empty (0 bytes)")
    file.seek(0)
    try:
        parquet = pq.ParquetFile(file)
        schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowInvalid, OSError) as error:
        file.seek(0)
        head = file.read(HEAD_BYTES)
        if problem := misnamed(path, head, head):
            raise InputError(problem) from None
        raise DamagedInput(f"{path}: not parquet, or cut short: {str(error).strip()}") from None
    names = find_column(path, schema, text_column)
    return tuple(_parquet_units(path, index, metadata, ".".join(names)))


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
    try:
        if unit.path.startswith(TFDS):
            yield from _read_tfds(unit, text_column)
            return
        with open_file(unit.path) as file:
            kind = kind_of(unit.path)
            if kind == PARQUET:
                yield from _read_parquet(file, unit, text_column)
            elif kind == TEXT:
                yield make_batch([read_text(unit.path, file)], {}, [0], unit.num_bytes)
            else:
                yield from _read_json_lines(file, unit, text_column)
    except InputError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise readable_error(unit.path, error) from error
    except Exception as error:  # each file system and codec raises its own types
        raise DamagedInput(
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
    found = find_column(unit.path, parquet.schema_arrow, text_column)
    present = [c for c in PROVENANCE if c in parquet.schema_arrow.names and c != text_column]
    groups = list(range(unit.first_group, unit.first_group + unit.num_groups))
    row = unit.first_row
    rows_left = sum(parquet.metadata.row_group(g).num_rows for g in groups)
    bytes_left = unit.num_bytes
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows_left // max(1, bytes_left)))
    for table in parquet.iter_batches(batch_rows, groups, [".".join(found), *present], use_threads=False):
        num_rows = table.num_rows
        column = take_column(table, found)
        try:
            texts = as_text(column)
        except pa.ArrowInvalid:
            raise _not_utf8(unit.path, text_column, column, row) from None
        share = bytes_left * num_rows // max(1, rows_left)
        yield Batch(
            texts,
            {
                name: as_provenance(take_column(table, [name])) if name in present else pa.nulls(num_rows)
                for name in PROVENANCE
            },
            np.arange(row, row + num_rows),
            share,
        )
        row, rows_left, bytes_left = row + num_rows, rows_left - num_rows, bytes_left - share


def _not_utf8(path: str, text_column: str, column: pa.Array, first_row: int) -> InputError:
    place, value, error = first_not_utf8(column) or (0, b"?", UnicodeDecodeError("utf-8", b"?", 0, 1, "invalid"))
    return InputError(
        f"{path}: row {first_row + place}: column {text_column!r} holds bytes that are invalid UTF-8 "
        f"(0x{value[error.start]:02x} at byte {error.start}), so it is not text or in another encoding. Choose "
        "another by --text_column, or write the file anew with its text in UTF-8."
    )


def _read_tfds(unit: Unit, text_column: str) -> Iterator[Batch]:
    split = TFDSSplit(unit.path, text_column, PROVENANCE)
    stop, bytes_left = unit.first_row + unit.num_rows, unit.num_bytes
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * unit.num_rows // max(1, unit.num_bytes)))
    for row in range(unit.first_row, stop, batch_rows):
        rows = np.arange(row, min(row + batch_rows, stop))
        share = bytes_left * len(rows) // (stop - row)
        yield Batch(*split.read(rows), rows, share)
        bytes_left -= share


def _read_json_lines(file: BinaryIO, unit: Unit, text_column: str) -> Iterator[Batch]:
    lines: list[Line] = []
    size = position = 0
    for line in read_lines(unit.path, file, text_column):
        lines.append(line)
        size += line.size
        if len(lines) == BATCH_ROWS or size >= BATCH_BYTES:
            moved = file.tell() - position
            yield _batch_of(lines, moved)
            lines, size, position = [], 0, position + moved
    yield _batch_of(lines, max(0, unit.num_bytes - position))


def _batch_of(lines: Sequence[Line], num_bytes: int) -> Batch:
    columns = {name: [line.provenance[i] for line in lines] for i, name in enumerate(PROVENANCE)}
    return make_batch([line.text for line in lines], columns, [line.row for line in lines], num_bytes)

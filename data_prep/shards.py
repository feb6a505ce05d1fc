"""Stage 2: segments -> output files. Each file is one pure, idempotent job.

A job says which pieces of which stored tokens make up its range of a split's stream, so it can
be done by any process at any time, and shards can be the source of other shards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.engines.local import Report
from data_prep.parts import DOCUMENT_COLUMNS, read_documents
from data_prep.store.document_index import index_table, write_index
from data_prep.store.documents import GROUP_ROWS
from data_prep.store.files import digest_of, is_intact, read_json, whole_file, write_json
from data_prep.store.fingerprints import BLOCK_TOKENS, block_digests
from data_prep.store.manifest import DOCUMENTS, INDEX, Shard
from data_prep.store.token_bin import open_tokens, token_dtype, write_tokens
from data_prep.store.token_records import open_records, write_records

DATASET_NAME = "fineweb"  # as TFDS knows it, and the front of every file's name
CHUNK_TOKENS = 1 << 20  # read at a time


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of one stored file, which are a stretch of a stream.

    A piece of a table of documents stands for those that start there, as the table counts.
    """

    path: str
    format: str  # "segment" (tokens and documents), "bin", "array_record" or "documents"
    digest: str
    start: int
    stop: int
    record_tokens: int | None = None  # of an ArrayRecord file, where it is not the job's


@dataclass(frozen=True)
class ShardJob:
    """One output file: tokens [start, stop) of a split's stream."""

    name: str
    format: str
    split: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    bin_header: str
    record_tokens: int
    record_compression: str
    end_of_text: int
    vocab_size: int
    output_dir: str
    work_dir: str

    def source(self) -> dict[str, Any]:
        """All that the file's bytes depend on."""
        fields = asdict(self)
        del fields["output_dir"], fields["work_dir"]
        pieces = [{"digest": p.digest, "start": p.start, "stop": p.stop} for p in self.pieces]
        return fields | {"pieces": pieces}


@dataclass(frozen=True)
class FingerprintJob:
    """A stretch of a split's stream that starts at a block boundary."""

    split: str
    start: int
    pieces: tuple[Piece, ...]
    record_tokens: int
    vocab_size: int


def shard_name(format: str, split: str, index: int, num_shards: int) -> str:
    """fineweb_train_000000.bin; ArrayRecord files are named as TFDS expects them."""
    if format == "bin":
        return f"{DATASET_NAME}_{split}_{index:06d}.bin"
    if format == DOCUMENTS:
        return f"{DOCUMENTS}_{split}_{index:06d}.parquet"
    if format == INDEX:
        return f"{DOCUMENTS}_{split}_{index:06d}.index"
    return f"{DATASET_NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


def shard_ranges(num_tokens: int, format: str, spec: dict[str, Any]) -> list[tuple[int, int]]:
    """The (start, stop) of each shard; ArrayRecord shards end at a record's end."""
    step = spec["shard_tokens"]
    if format == "array_record":
        step = max(1, step // spec["record_tokens"]) * spec["record_tokens"]
    return [(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


def write_shard(job: ShardJob, report: Report) -> Shard:
    """Writes the job's file, unless it is there already, whole and from the same source."""
    path = Path(job.output_dir, job.name)
    note_path = Path(job.work_dir, f"{job.name}.json")
    try:
        note = read_json(note_path)
    except ValueError:
        note = None  # damaged: the shard is written again
    num_tokens = job.stop - job.start
    if note and note["source"] == job.source():
        shard = Shard(**note["shard"])
        if is_intact(path, shard.num_bytes, shard.digest):
            report(0, num_tokens, 0, 2 * num_tokens)
            return shard
    if job.format == "bin":
        num_rows = num_tokens
        dtype = token_dtype(job.vocab_size)
        write_tokens(path, _reported(job, report), num_tokens, dtype=dtype, header=job.bin_header)
    elif job.format == "array_record":
        num_rows = -(-num_tokens // job.record_tokens)
        write_records(
            path,
            _reported(job, report),
            num_tokens,
            record_tokens=job.record_tokens,
            pad_id=job.end_of_text,
            dtype=token_dtype(job.vocab_size),
            compression=job.record_compression,
        )
    else:
        table = _documents(job)
        if job.format == INDEX:
            num_rows = write_index(path, index_table(table))
        else:
            num_rows = table.num_rows
            write_documents(path, table)
        report(0, num_tokens, 0, 2 * num_tokens)
    size, digest = path.stat().st_size, digest_of(path)
    shard = Shard(job.name, job.format, job.split, num_tokens, num_rows, size, digest)
    write_json(note_path, {"source": job.source(), "shard": asdict(shard)})
    return shard


def _reported(job: ShardJob, report: Report) -> Iterator[np.ndarray]:
    for chunk in read_pieces(job.pieces, job.record_tokens, token_dtype(job.vocab_size)):
        yield chunk
        report(0, len(chunk), 2 * len(chunk), 2 * len(chunk))


def _documents(job: ShardJob) -> pa.Table:
    """The documents that start in the job's range, with starts counted in the split."""
    columns = ["start", "id", "url"] if job.format == INDEX else DOCUMENT_COLUMNS.names
    tables = [DOCUMENT_COLUMNS.empty_table().select(columns)]
    position = job.start
    for piece in job.pieces:
        if piece.format == DOCUMENTS:
            table = _read_groups(piece, columns)
        else:
            table = read_documents(Path(piece.path).parent, Path(piece.path).stem, columns)
        starts_D = table["start"].to_numpy()
        first, last = np.searchsorted(starts_D, [piece.start, piece.stop])
        moved = pa.array(starts_D[first:last] + (position - piece.start))
        tables.append(table.slice(first, last - first).set_column(0, "start", moved))
        position += piece.stop - piece.start
    return pa.concat_tables(tables).combine_chunks()


def write_documents(path: str | Path, table: pa.Table) -> None:
    """Writes a table of documents so that a look-up reads one of its row groups."""
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=GROUP_ROWS)


def _read_groups(piece: Piece, columns: list[str]) -> pa.Table:
    """Those row groups of a table of documents that the piece may need."""
    with pq.ParquetFile(piece.path) as file:
        groups = []
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            starts = group.column(0).statistics
            if group.num_rows and starts.max >= piece.start and starts.min < piece.stop:
                groups.append(index)
        return file.read_row_groups(groups, columns, use_threads=False).select(columns)


def read_pieces(pieces: Sequence[Piece], record_tokens: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The pieces' tokens, in chunks of bounded size, as `dtype`, which must hold them."""
    for piece in pieces:
        if piece.format == "array_record":
            yield from _read_records(piece, piece.record_tokens or record_tokens, dtype)
            continue
        is_bin = piece.format == "bin"
        tokens = open_tokens(piece.path) if is_bin else np.memmap(piece.path, dtype, "r")
        for start in range(piece.start, piece.stop, CHUNK_TOKENS):
            chunk = np.asarray(tokens[start : min(start + CHUNK_TOKENS, piece.stop)])
            yield chunk.astype(dtype, copy=False)


def _read_records(piece: Piece, record_tokens: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    reader = open_records([piece.path], record_tokens, dtype)
    first, last = piece.start // record_tokens, -(-piece.stop // record_tokens)
    step = max(1, CHUNK_TOKENS // record_tokens)
    for index in range(first, last, step):
        tokens = reader.read(range(index, min(index + step, last))).reshape(-1)
        offset = index * record_tokens
        yield tokens[max(0, piece.start - offset) : piece.stop - offset]


def fingerprint_blocks(job: FingerprintJob, report: Report) -> tuple[list[bytes], np.ndarray]:
    """Digests of the job's blocks, and how often each id occurs there: int64 (num_ids,).

    num_ids is what the stored integers can hold (uint16) or the vocabulary and one more for all
    ids beyond it (uint32).
    """
    assert job.start % BLOCK_TOKENS == 0
    dtype = token_dtype(job.vocab_size)
    counts_V = np.zeros(num_ids(job.vocab_size), np.int64)

    def counted() -> Iterator[np.ndarray]:
        for chunk in read_pieces(job.pieces, job.record_tokens, dtype):
            counts_V[:] += count_ids(chunk, job.vocab_size)
            yield chunk
            report(0, len(chunk), 2 * len(chunk), 2 * len(chunk))

    return list(block_digests(counted())), counts_V


def num_ids(vocab_size: int) -> int:
    """Length of `count_ids`."""
    return 1 << 16 if token_dtype(vocab_size).itemsize == 2 else vocab_size + 1


def count_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs: int64 (num_ids,); uint32 ids beyond the vocabulary count as one."""
    if tokens.dtype.itemsize == 4:
        tokens = np.minimum(tokens, vocab_size)
    return np.bincount(tokens, minlength=num_ids(vocab_size))


def tfds_metadata(shards: Sequence[Shard], record_tokens: int, vocab_size: int) -> dict[str, Any]:
    """The two JSON files that make the ArrayRecord shards a dataset for TFDS, by file name.

    `tfds.builder_from_directory(dir).as_data_source("train")` opens it, without TensorFlow.
    """
    splits = sorted({shard.split for shard in shards})
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    core = "tensorflow_datasets.core.features"
    tensor = {
        "pythonClassName": f"{core}.tensor_feature.Tensor",
        "tensor": {
            "dtype": token_dtype(vocab_size).name,
            "encoding": "bytes",
            "shape": {"dimensions": [str(record_tokens)]},
        },
    }
    return {
        "dataset_info.json": {
            "fileFormat": "array_record",
            "name": DATASET_NAME,
            "version": "1.0.0",
            "splits": [
                {
                    "name": split,
                    "filepathTemplate": template,
                    "shardLengths": [str(s.num_rows) for s in shards if s.split == split],
                    "numBytes": str(sum(s.num_bytes for s in shards if s.split == split)),
                }
                for split in splits
            ],
        },
        "features.json": {
            "pythonClassName": f"{core}.features_dict.FeaturesDict",
            "featuresDict": {"features": {"tokens": tensor}},
        },
    }

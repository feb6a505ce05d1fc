"""Stage 2: stored tokens -> output files. Each file is one pure, idempotent job.

A job says which ranges of which stored files make up its range of a split's stream, so it can
be done by any process at any time, and shards can be the source of other shards.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.engines.engine import Report
from data_prep.pages.progress import Done
from data_prep.parts import name_of, read_documents
from data_prep.store.document_index import index_table, write_index
from data_prep.store.documents import DOCUMENT_COLUMNS, read_starting_in, write_documents
from data_prep.store.files import digest_of, read_note, write_note
from data_prep.store.fingerprints import BLOCK_TOKENS, block_digests
from data_prep.store.manifest import DOCUMENTS, INDEX, Shard
from data_prep.store.places import is_file, join
from data_prep.store.scratch import local_copy
from data_prep.store.streams import FileRange, read_ranges
from data_prep.store.token_bin import read_header, token_dtype, write_tokens
from data_prep.store.token_records import num_records, write_records


@dataclass(frozen=True)
class ShardJob:
    """One output file: tokens [start, stop) of a split's stream."""

    name: str
    format: str
    split: str
    start: int
    stop: int
    ranges: tuple[FileRange, ...]
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
        ranges = [{"digest": each.digest, "start": each.start, "stop": each.stop} for each in self.ranges]
        return fields | {"ranges": ranges}

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def path(self) -> str:
        return join(self.output_dir, self.name)

    @property
    def note_path(self) -> str:
        return join(self.work_dir, f"{self.name}.json")


@dataclass(frozen=True)
class FingerprintJob:
    """A stretch of a split's stream that starts at a block boundary."""

    split: str
    start: int
    ranges: tuple[FileRange, ...]
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        return sum(each.num_tokens for each in self.ranges)


@dataclass(frozen=True)
class Fingerprints:
    """What `fingerprint_blocks` finds in a stretch."""

    digests: list[bytes]  # of its blocks
    counts_V: np.ndarray  # how often each id occurs: int64 (num_ids,)


def write_shard(job: ShardJob, report: Report) -> Shard:
    """Writes the job's file, unless it is there already, whole and from the same source."""
    if shard := _find_shard(job):
        report(_work_of(job.num_tokens))
        return shard
    if job.format in (DOCUMENTS, INDEX):
        _write_documents(job, report)
    else:
        _write_stream(job, report)
    digest = digest_of(job.path)
    write_note(job.note_path, {"source": job.source(), "digest_of_file": digest})
    return _shard_of(job, digest)


def _find_shard(job: ShardJob) -> Shard | None:
    note = read_note(job.note_path)
    if note is None or note.get("source") != job.source():
        return None
    if not is_file(job.path) or digest_of(job.path) != note.get("digest_of_file"):
        return None
    return _shard_of(job, note["digest_of_file"])


def _shard_of(job: ShardJob, digest: str) -> Shard:
    """What the manifest says of a whole file: all of it is what the file is, nothing what a note remembers."""
    with local_copy(job.path, digest) as path:
        num_bytes = os.path.getsize(path)
        match job.format:
            case "bin":
                num_rows = read_header(path).num_tokens
            case "array_record":
                num_rows = num_records(path)
            case "documents":
                with pq.ParquetFile(path) as file:
                    num_rows = file.metadata.num_rows
            case _:
                num_rows = num_bytes // 8
    return Shard(job.name, job.format, job.split, job.num_tokens, num_rows, num_bytes, digest)


def _work_of(num_tokens: int) -> Done:
    """Work is counted in bytes of tokens, whatever is done with them."""
    return Done(tokens=num_tokens, work=2 * num_tokens)


def _write_stream(job: ShardJob, report: Report) -> None:
    """Writes tokens."""
    dtype = token_dtype(job.vocab_size)
    chunks = _reported(read_ranges(job.ranges, dtype), report)
    if job.format == "bin":
        write_tokens(job.path, chunks, job.num_tokens, dtype=dtype, header=job.bin_header)
        return
    write_records(
        job.path,
        chunks,
        job.num_tokens,
        record_tokens=job.record_tokens,
        pad_id=job.end_of_text,
        dtype=dtype,
        compression=job.record_compression,
    )


def _reported(chunks: Iterator[np.ndarray], report: Report) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield chunk
        report(Done(tokens=len(chunk), text_bytes=2 * len(chunk), work=2 * len(chunk)))


def _write_documents(job: ShardJob, report: Report) -> None:
    """Writes a table of documents or its index."""
    table = _documents(job)
    if job.format == INDEX:
        write_index(job.path, index_table(table))
    else:
        write_documents(job.path, table)
    report(_work_of(job.num_tokens))


def _documents(job: ShardJob) -> pa.Table:
    """The documents that start in the job's range, with starts counted in the split."""
    columns = ["start", "id", "url"] if job.format == INDEX else DOCUMENT_COLUMNS.names
    tables = [DOCUMENT_COLUMNS.empty_table().select(columns)]
    position = job.start
    for each in job.ranges:
        if each.format == DOCUMENTS:
            table = read_starting_in(each.path, each.digest, each.start, each.stop, columns)
        else:
            table = read_documents(os.path.dirname(each.path), name_of(each), columns)
        starts_D = table["start"].to_numpy()
        first, last = np.searchsorted(starts_D, [each.start, each.stop])
        moved = pa.array(starts_D[first:last] + (position - each.start))
        tables.append(table.slice(first, last - first).set_column(0, "start", moved))
        position += each.num_tokens
    return pa.concat_tables(tables).combine_chunks()


def fingerprint_blocks(job: FingerprintJob, report: Report) -> Fingerprints:
    """Digests of the job's blocks, and how often each id occurs there."""
    assert job.start % BLOCK_TOKENS == 0
    counts_V = np.zeros(num_ids(job.vocab_size), np.int64)

    def counted() -> Iterator[np.ndarray]:
        for chunk in read_ranges(job.ranges, token_dtype(job.vocab_size)):
            counts_V[:] += count_ids(chunk, job.vocab_size)
            yield chunk

    return Fingerprints(list(block_digests(_reported(counted(), report))), counts_V)


def num_ids(vocab_size: int) -> int:
    """Length of `count_ids`: all that uint16 holds, or the vocabulary and one for all the ids beyond it (uint32).

    >>> num_ids(257), num_ids(100_000)
    (65536, 100001)
    """
    return 1 << 16 if token_dtype(vocab_size).itemsize == 2 else vocab_size + 1


def count_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs: int64 (num_ids,); uint32 ids beyond the vocabulary count as one."""
    if tokens.dtype.itemsize == 4:
        tokens = np.minimum(tokens, vocab_size)
    return np.bincount(tokens, minlength=num_ids(vocab_size))

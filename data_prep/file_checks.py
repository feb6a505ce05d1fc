"""One file of a prepared dataset: is it what the manifest says, and can that be right?"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.engines.engine import Report
from data_prep.pages.progress import Done
from data_prep.shards import count_ids, num_ids
from data_prep.store.addresses import Addresses
from data_prep.store.document_index import index_table
from data_prep.store.documents import DOCUMENT_COLUMNS
from data_prep.store.files import FileProblem, file_problem, require_whole
from data_prep.store.fingerprints import BLOCK_TOKENS, block_digests
from data_prep.store.manifest import DOCUMENTS, INDEX, Manifest, Shard
from data_prep.store.places import join
from data_prep.store.scratch import local_copy
from data_prep.store.spec import FORMATS
from data_prep.store.streams import FileRange, read_ranges, stored_stream
from data_prep.store.token_bin import read_header, token_dtype
from data_prep.store.token_records import num_records


@dataclass(frozen=True)
class FileCheck:
    """One file, and what it should hold."""

    directory: str
    shard: Shard
    start: int  # of its range in the split's stream
    # Of token files: from the first fingerprint block that begins in the range to the end of the
    # last; so that reading them finds the file in the page cache, right after its digest.
    blocks_start: int
    ranges: tuple[FileRange, ...]
    neighbours: dict[str, Shard] = field(hash=False)  # the files of the ranges, by name
    tables: tuple[tuple[Shard, int], ...]  # the split's tables, and the start of the range of each
    record_tokens: int
    vocab_size: int
    end_of_text: int

    @property
    def path(self) -> str:
        return join(self.directory, self.shard.name)


@dataclass
class Finding:
    """What a look at one file found."""

    problem: FileProblem | None = None  # the file itself is not what was written
    contradictions: list[str] = field(default_factory=list)  # it is, and still cannot be right
    blocks: list[bytes] = field(default_factory=list)
    counts_V: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    first: int = 0  # of a table: start of its first document, and the end of its last
    end: int = 0


def check_file(job: FileCheck, report: Report) -> Finding:
    """Compares one file with what the manifest says of it."""
    path = job.path
    finding = Finding(file_problem(path, job.shard.num_bytes, job.shard.digest))
    if finding.problem is None:
        try:
            if job.shard.format in FORMATS:
                with local_copy(path, job.shard.digest) as copy:
                    _check_rows(copy, job)
                _check_tokens(job, finding)
            elif job.shard.format == DOCUMENTS:
                _check_table(path, job, finding)
            else:
                with local_copy(path, job.shard.digest) as copy:
                    _check_index(copy, job, finding)
        except Exception as error:  # it was bad already when it was written; the libraries raise many types
            finding.contradictions.append(_with_path(path, error))
    report(Done(tokens=job.shard.num_tokens, text_bytes=job.shard.num_bytes, work=job.shard.num_bytes))
    return finding


def _with_path(path: str, error: Exception) -> str:
    """One line that begins with the file that is to blame."""
    text = " ".join(str(error).split()) or "cannot be read"
    if text.startswith(os.path.dirname(path)):  # this file, or one that the tokens go on in
        return text
    words = isinstance(error, ValueError | OSError) and not isinstance(error, pa.ArrowException)
    return f"{path}: {text}" if words else f"{path}: cannot be read ({type(error).__name__}: {text})"


def _check_rows(path: str, job: FileCheck) -> None:
    """ValueError unless a file of tokens has as many as the manifest says."""
    shard, size = job.shard, job.record_tokens
    if shard.format == "bin":
        header = read_header(path)
        if header.dtype != token_dtype(job.vocab_size):
            raise ValueError(f"{path}: holds ids of {header.dtype.name}, expected {token_dtype(job.vocab_size).name}")
        found = expected = header.num_tokens
    else:
        found, expected = num_records(path), -(-shard.num_tokens // size)
    if found != shard.num_rows or (shard.num_tokens if shard.format == "bin" else expected) != found:
        raise ValueError(
            f"{path}: holds {found} rows, the manifest says {shard.num_rows} rows of {shard.num_tokens} tokens"
        )


def _check_tokens(job: FileCheck, finding: Finding) -> None:
    """Blocks and counts of the stretch, and end-of-text against the tables of documents."""
    finding.counts_V = np.zeros(num_ids(job.vocab_size), np.int64)
    ends = [np.empty(0, np.int64)]
    position = job.blocks_start

    def seen() -> Iterator[np.ndarray]:
        nonlocal position
        for each in job.ranges:
            if each.format == "array_record":  # the next one: its reader ends the process on some damaged files
                shard = job.neighbours[os.path.basename(each.path)]
                require_whole(each.path, shard.num_bytes, shard.digest)
        for chunk in read_ranges(job.ranges, token_dtype(job.vocab_size)):
            finding.counts_V += count_ids(chunk, job.vocab_size)
            ends.append(np.flatnonzero(chunk == job.end_of_text) + position)
            position += len(chunk)
            yield chunk

    finding.blocks = list(block_digests(seen()))
    found = np.concatenate(ends)
    expected = _document_starts(job, position)
    if expected is None:
        return
    if job.blocks_start == 0 and found[:1].tolist() != [0]:
        found = np.concatenate([[0], found])  # a stream that begins inside a document
    if not np.array_equal(found, expected):
        finding.contradictions.append(
            f"{job.path}: split {job.shard.split} as {job.shard.format}, tokens "
            f"[{job.blocks_start}, {position}): end-of-text is not exactly where the documents "
            "tables say"
        )


def _document_starts(job: FileCheck, stop: int) -> np.ndarray | None:
    """Starts of the documents in the job's blocks, by the tables; None where they are damaged."""
    starts = [np.empty(0, np.int64)]
    lasts = [*(first for _, first in job.tables[1:]), stop]
    for (shard, first), last in zip(job.tables, lasts, strict=True):
        if first < stop and last > job.blocks_start:
            try:
                starts.append(_read_table(job, shard, ["start"])["start"].to_numpy())
            except ValueError:
                return None
    all_starts = np.concatenate(starts)
    return all_starts[(all_starts >= job.blocks_start) & (all_starts < stop)]


def _read_table(job: FileCheck, shard: Shard, columns: list[str]) -> pa.Table:
    """Those columns of a table of documents. ValueError where it is damaged or has others than it should."""
    path = join(job.directory, shard.name)
    require_whole(path, shard.num_bytes, shard.digest)
    try:
        with local_copy(path, shard.digest) as copy, pq.ParquetFile(copy) as file:
            if not file.schema_arrow.equals(DOCUMENT_COLUMNS):
                raise ValueError(f"{path}: its columns are not those of a documents table")
            table = file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())})") from None
    for name in {"start", "length"}.intersection(columns):
        if table[name].null_count:
            raise ValueError(f"{path}: has documents without {name}")
    return table


def _check_table(path: str, job: FileCheck, finding: Finding) -> None:
    """Whether the documents follow one another without gap, and start in the table's range."""
    table = _read_table(job, job.shard, ["start", "length"])
    starts_D, lengths_D = (table[name].to_numpy() for name in ("start", "length"))
    say = finding.contradictions.append
    if len(starts_D) != job.shard.num_rows:
        say(f"{path}: {len(starts_D)} documents, the manifest says {job.shard.num_rows}")
    if not len(starts_D):
        finding.first = finding.end = -1
        return
    wrong = np.flatnonzero(starts_D[1:] != starts_D[:-1] + lengths_D[:-1])
    if len(wrong):
        row = int(wrong[0]) + 1
        expected = starts_D[row - 1] + lengths_D[row - 1]
        say(f"{path}: row {row} starts at {starts_D[row]}, expected {expected}")
    stop = job.start + job.shard.num_tokens
    if starts_D[0] < job.start or starts_D[-1] >= stop:
        say(f"{path}: lists documents that start outside [{job.start}, {stop})")
    finding.first, finding.end = int(starts_D[0]), int(starts_D[-1] + lengths_D[-1])


def _check_index(path: str, job: FileCheck, finding: Finding) -> None:
    shard = next((shard for shard, start in job.tables if start == job.start), None)
    if shard is None:
        raise ValueError(f"{path}: is the index of no table")
    try:
        table = _read_table(job, shard, ["id", "url"])
    except ValueError:
        return  # the table's own check says it
    entries = index_table(table)
    found = os.path.getsize(path), job.shard.num_rows
    if found != (8 * len(entries), len(entries)) or not np.array_equal(np.fromfile(path, "<u8"), entries):
        finding.contradictions.append(f"{path}: is not the index of {shard.name}")


def file_checks(directory: str, manifest: Manifest) -> list[FileCheck]:
    """A job for each file that the manifest names."""
    spec, jobs = manifest.spec, []
    for split in manifest.splits:
        tables = manifest.shards_of(split, DOCUMENTS)
        starts = Addresses(shard.num_tokens for shard in tables).starts.tolist()
        named = tuple(zip(tables, starts[:-1], strict=True))
        for format in (*spec.formats, DOCUMENTS, INDEX):
            stream = stored_stream(directory, manifest, split, format)
            own = {shard.name: shard for shard in manifest.shards_of(split, format)}
            start = 0
            for shard in manifest.shards_of(split, format):
                stop = start + shard.num_tokens
                first, last = (-(-edge // BLOCK_TOKENS) * BLOCK_TOKENS for edge in (start, stop))
                last = min(last, stream.num_tokens)
                jobs.append(
                    FileCheck(
                        directory=directory,
                        shard=shard,
                        start=start,
                        blocks_start=first,
                        ranges=(ranges := stream.ranges(first, last) if format in FORMATS and first < last else ()),
                        neighbours={name: own[name] for name in (os.path.basename(each.path) for each in ranges)},
                        tables=named,
                        record_tokens=spec.record_tokens,
                        vocab_size=spec.vocab_size,
                        end_of_text=spec.end_of_text,
                    )
                )
                start = stop
    return jobs

"""A .bin shard of unknown origin -> its digest and the documents that begin in it, found by end-of-text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_prep.engines.engine import Report
from data_prep.pages.progress import Done
from data_prep.store.documents import DOCUMENT_COLUMNS, write_documents
from data_prep.store.files import digest_of
from data_prep.store.locations import InputError
from data_prep.store.manifest import DOCUMENTS
from data_prep.store.scratch import local_copy
from data_prep.store.streams import FileRange, read_ranges
from data_prep.store.text import without_surrogates
from data_prep.store.token_bin import read_header


@dataclass(frozen=True)
class ScanJob:
    path: str  # as the user named it
    files: tuple[str, ...]  # itself, and those that follow in the split: where they are here
    is_first: bool  # of the split
    tokenizer: str
    vocab_size: int
    end_of_text: int
    table: str  # what to write
    layouts: tuple[str, ...]  # of the files: see token_bin.LAYOUTS


@dataclass(frozen=True)
class Scan:
    """A file's tokens, and the table of the documents that begin there."""

    tokens: FileRange
    table: FileRange


def scan(job: ScanJob, report: Report) -> Scan:
    """Reads a file once: its digest, whether its ids are the tokenizer's, and its documents.

    `row` counts the documents that begin in the file. Raises InputError for ids out of range.
    """
    digest, num_tokens = digest_of(job.files[0]), 0
    starts = [np.empty(0, np.int64)]
    for chunk in _chunks(job.files[0], job.layouts[0]):
        if chunk.max() >= job.vocab_size or chunk.min() < 0:
            place = int(np.argmax((chunk >= job.vocab_size) | (chunk < 0)))
            raise InputError(
                f"{job.path}: token {num_tokens + place} is {chunk[place]}, but tokenizer "
                f"{job.tokenizer} has ids below {job.vocab_size}. Name the one that made the file "
                f"by --tokenizer, or copy the file again.{_about_kind(job)}"
            )
        starts.append(np.flatnonzero(chunk == job.end_of_text) + num_tokens)
        num_tokens += len(chunk)
        report(Done(tokens=len(chunk), text_bytes=chunk.nbytes, work=len(chunk)))
    starts_D = np.concatenate(starts)
    if job.is_first and starts_D[:1].tolist() != [0]:
        starts_D = np.insert(starts_D, 0, 0)  # begun in a file that nobody gave us
    write_documents(job.table, _table_of(job, starts_D, num_tokens))
    return Scan(
        FileRange(job.files[0], job.layouts[0], digest, 0, num_tokens),
        FileRange(job.table, DOCUMENTS, digest_of(job.table), 0, num_tokens),
    )


def _table_of(job: ScanJob, starts_D: np.ndarray, num_tokens: int) -> pa.Table:
    """The file's documents, of which nothing but place and length is known."""
    num_documents = len(starts_D)
    end = num_tokens + (_tail(job) if num_documents else 0)
    known = {
        "start": starts_D,
        "length": np.diff(starts_D, append=end),
        "source_file": pa.repeat(pa.scalar(without_surrogates(job.path), pa.string()), num_documents),
        "row": np.arange(num_documents),
    }
    columns = [known.get(c.name, pa.nulls(num_documents, c.type)) for c in DOCUMENT_COLUMNS]
    return pa.table(columns, schema=DOCUMENT_COLUMNS)


def _tail(job: ScanJob) -> int:
    """How many tokens of the files that follow belong to this one's last document."""
    num_tokens = 0
    for path, layout in zip(job.files[1:], job.layouts[1:], strict=True):
        for chunk in _chunks(path, layout):
            ends = np.flatnonzero(chunk == job.end_of_text)
            if len(ends):
                return num_tokens + int(ends[0])
            num_tokens += len(chunk)
    return num_tokens


def _chunks(path: str, layout: str) -> Iterator[np.ndarray]:
    with local_copy(path) as copy:
        header = read_header(copy, layout)
        yield from read_ranges([FileRange(copy, layout, "", 0, header.num_tokens)], header.dtype)


def _about_kind(job: ScanJob) -> str:
    is_guess = job.layouts[0] in ("uint16", "uint32")
    return " Or its ids are of another kind than --headerless says." if is_guess else ""

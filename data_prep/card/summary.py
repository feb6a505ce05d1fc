"""What a dataset's documents tables add up to, in memory that does not grow with the dataset.

A table becomes a `Summary`, and summaries add up to one. Lengths are counted in bins that are
exact below 2,048 tokens and at most 0.1 % wide above; of a column's values only the most frequent
are kept, and `Counts.slack` says by how much that may make a count too low.
"""

import contextlib
import os
import shlex
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.card.length_bins import bin_starts, length_bins, quantile
from data_prep.engines.engine import Report
from data_prep.engines.local import Workers
from data_prep.pages.progress import Done, Progress
from data_prep.store.files import require_whole
from data_prep.store.manifest import DOCUMENTS, Manifest
from data_prep.store.places import join
from data_prep.store.scratch import local_copy

pc: Any = pyarrow.compute  # it makes its functions when imported: no type checker knows them
COLUMNS = ("length", "text_bytes", "url", "dump", "language")
BATCH_ROWS = 1 << 18  # read at a time: more than the tables of 100 M-token shards have
MAX_VALUES = 2000  # of one column, kept from one batch of rows
MAX_MERGED = 50_000  # of one column, kept from all of them
MAX_VALUE_CHARS = 256  # a longer one is cut: no host name or dump has more
# Scheme, user, "www." and port are not part of a domain; without "//" it is not a web address.
HOST = r"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?//(?:[^/?#]*@)?(?i:www\.)?(?P<host>\[[^/?#]*\]|[^/?#:]+)"


@dataclass(frozen=True)
class Bin:
    """Documents of `start` to `stop - 1` tokens."""

    start: int
    stop: int
    num_documents: int
    num_tokens: int


class Count(NamedTuple):
    """How many documents, and how many tokens they hold."""

    num_documents: int = 0
    num_tokens: int = 0

    def plus(self, other: "Count") -> "Count":
        """The sum of both."""
        return Count(self.num_documents + other.num_documents, self.num_tokens + other.num_tokens)


@dataclass(frozen=True)
class Counts:
    """Documents and tokens for each value of a column."""

    of_value: dict[str, Count]
    of_none: Count  # rows without a value
    slack: int  # documents that a value may have more than counted; 0 where all is exact

    def top(self, num_values: int | None = None) -> list[tuple[str, Count]]:
        """The most frequent values; by name where equally frequent."""
        return sorted(self.of_value.items(), key=lambda item: (-item[1].num_documents, item[0]))[:num_values]

    def __add__(self, other: "Counts") -> "Counts":
        of_value = dict(self.of_value)
        for value, count in other.of_value.items():
            of_value[value] = of_value.get(value, Count()).plus(count)
        total = Counts(of_value, self.of_none.plus(other.of_none), self.slack + other.slack)
        if len(of_value) <= 2 * MAX_MERGED:
            return total
        top = total.top()
        first_left_out = top[MAX_MERGED][1]
        return Counts(dict(top[:MAX_MERGED]), total.of_none, total.slack + first_left_out.num_documents)


@dataclass(frozen=True)
class Summary:
    """Sums over documents. Axis B: length bins, as `length_bins` numbers them."""

    num_documents: int
    num_tokens: int
    num_text_bytes: int  # 0 where the tables do not say
    max_tokens: int  # of one document
    documents_B: np.ndarray  # int64
    tokens_B: np.ndarray  # int64
    domains: Counts
    dumps: Counts
    languages: Counts

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(
            num_documents=self.num_documents + other.num_documents,
            num_tokens=self.num_tokens + other.num_tokens,
            num_text_bytes=self.num_text_bytes + other.num_text_bytes,
            max_tokens=max(self.max_tokens, other.max_tokens),
            documents_B=_add_padded(self.documents_B, other.documents_B),
            tokens_B=_add_padded(self.tokens_B, other.tokens_B),
            domains=self.domains + other.domains,
            dumps=self.dumps + other.dumps,
            languages=self.languages + other.languages,
        )

    def quantile(self, percent: int) -> int:
        """Least length such that `percent` % of the documents are not longer; 0 of none.

        From 2,048 tokens on rounded down, by less than 0.1 %.
        """
        return quantile(self.documents_B, percent)

    def token_quantile(self, percent: int) -> int:
        """Least length such that documents which are not longer hold `percent` % of the tokens."""
        return quantile(self.tokens_B, percent)

    def histogram(self, bins_per_octave: int) -> list[Bin]:
        """The lengths in bins of equal width on a log scale, without a gap, over whole octaves.

        Among very short lengths, where such bins hold no integer, there are fewer.
        """
        if not self.num_documents:
            return []
        starts_B = bin_starts(np.arange(len(self.documents_B)))
        there_B = starts_B[self.documents_B > 0]
        low, high = int(there_B[0]).bit_length() - 1, int(there_B[-1]).bit_length()
        exponents = np.arange(low * bins_per_octave, high * bins_per_octave + 1) / bins_per_octave
        edges = np.unique(np.ceil(2.0**exponents).astype(np.int64))
        cuts = np.searchsorted(starts_B, edges)
        documents = np.concatenate([[0], np.cumsum(self.documents_B)])[cuts]
        tokens = np.concatenate([[0], np.cumsum(self.tokens_B)])[cuts]
        columns = edges[:-1], edges[1:], np.diff(documents), np.diff(tokens)
        return [Bin(*map(int, row)) for row in zip(*columns, strict=True)]


_NO_COUNTS = Counts({}, Count(), slack=0)
_NO_BINS = np.zeros(0, np.int64)
NOTHING = Summary(
    num_documents=0,
    num_tokens=0,
    num_text_bytes=0,
    max_tokens=0,
    documents_B=_NO_BINS,
    tokens_B=_NO_BINS,
    domains=_NO_COUNTS,
    dumps=_NO_COUNTS,
    languages=_NO_COUNTS,
)


@dataclass(frozen=True)
class SummaryJob:
    path: str  # of a documents table
    num_bytes: int
    digest: str


def summarize(job: SummaryJob, report: Report) -> Summary:
    """The summary of one documents table. ValueError, with its path, where it cannot be read."""
    summary = NOTHING
    require_whole(job.path, job.num_bytes, job.digest)
    try:
        with local_copy(job.path, job.digest) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(COLUMNS), use_threads=False):
                new = _summarize_batch(pa.Table.from_batches([batch]))
                summary += new
                done = Done(
                    documents=new.num_documents,
                    tokens=new.num_tokens,
                    text_bytes=new.num_text_bytes,
                    work=batch.num_rows,
                )
                report(done)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{job.path}: cannot be read as parquet ({str(error).strip()}). Run "
            f"`python -m data_prep.check {shlex.quote(os.path.dirname(job.path))}`."
        ) from error
    return summary


def _summarize_batch(table: pa.Table) -> Summary:
    lengths = table["length"]
    lengths_D = lengths.to_numpy()
    bins_D = length_bins(lengths_D)
    documents_B = np.bincount(bins_D).astype(np.int64)
    tokens_B = np.zeros(len(documents_B), np.int64)
    np.add.at(tokens_B, bins_D, lengths_D)
    return Summary(
        num_documents=table.num_rows,
        num_tokens=int(lengths_D.sum()),
        num_text_bytes=pc.sum(table["text_bytes"]).as_py() or 0,
        max_tokens=int(lengths_D.max(initial=0)),
        documents_B=documents_B,
        tokens_B=tokens_B,
        domains=_count(domains_of(table["url"]), lengths),
        dumps=_count(table["dump"], lengths),
        languages=_count(table["language"], lengths),
    )


def domains_of(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """Hosts in small letters without "www."; null where there is none.

    "https://me@www.Example.org:80/a" -> "example.org"
    """
    return pc.utf8_lower(pc.struct_field(pc.extract_regex(urls, HOST), "host"))


def _count(values: pa.ChunkedArray, lengths: pa.ChunkedArray) -> Counts:
    values = pc.utf8_slice_codeunits(values, 0, MAX_VALUE_CHARS)
    values = pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)
    groups = pa.table({"value": values, "length": lengths}).group_by("value", use_threads=False)
    table = groups.aggregate([("length", "count"), ("length", "sum")])
    columns = ("value", "length_count", "length_sum")
    none = table.filter(pc.is_null(table["value"]))
    of_none = Count(none[columns[1]][0].as_py(), none[columns[2]][0].as_py()) if none.num_rows else Count()
    table = table.filter(pc.is_valid(table["value"]))
    table = table.sort_by([("length_count", "descending"), ("value", "ascending")])
    slack = table["length_count"][MAX_VALUES].as_py() if table.num_rows > MAX_VALUES else 0
    kept = (table[name].slice(0, MAX_VALUES).to_pylist() for name in columns)
    of_value = {value: Count(documents, tokens) for value, documents, tokens in zip(*kept, strict=True)}
    return Counts(of_value, of_none, slack)


def _add_padded(a_B: np.ndarray, b_B: np.ndarray) -> np.ndarray:
    """Sum of two counts of which one may have seen longer documents."""
    longer, shorter = (a_B, b_B) if len(a_B) >= len(b_B) else (b_B, a_B)
    total_B = longer.copy()
    total_B[: len(shorter)] += shorter
    return total_B


def summarize_splits(directory: str, manifest: Manifest, num_workers: int = 1) -> dict[str, Summary]:
    """The summary of each split's documents.

    Raises ValueError where a table cannot be read, or disagrees with the manifest.
    """
    tables = [shard for shard in manifest.shards if shard.format == DOCUMENTS]
    jobs = {SummaryJob(join(directory, shard.name), shard.num_bytes, shard.digest): shard.split for shard in tables}
    waiting = list(jobs)  # summaries are added in this order: who is kept depends on it
    done: dict[SummaryJob, Summary] = {}
    totals = dict.fromkeys(manifest.splits, NOTHING)
    progress = Progress("summarize", sum(shard.num_rows for shard in tables))
    with Workers(min(num_workers, len(jobs))) as workers, contextlib.closing(progress):
        for job, result in workers.run(summarize, jobs, progress):
            if isinstance(result, Exception):
                raise result
            done[job] = result
            while waiting and waiting[0] in done:
                first = waiting.pop(0)
                totals[jobs[first]] += done.pop(first)
    for name, split in manifest.splits.items():
        found = totals[name].num_documents, totals[name].num_tokens
        if found != (split.num_documents, split.num_tokens):
            raise ValueError(
                f"{join(directory, DOCUMENTS)}_{name}_*: {found[0]} documents of {found[1]} tokens, the "
                f"manifest says {split.num_documents} of {split.num_tokens}. Run `python -m "
                f"data_prep.check {shlex.quote(directory)}`."
            )
    return totals

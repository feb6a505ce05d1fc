"""Which document is where: the tables of documents of a prepared dataset.

The tables are sorted by their place in the stream and cut like the shards, so a token's document is found by the
statistics of the row groups, and an id or url by the index beside each table. Nothing is scanned. A file is compared
with its digest before the first answer from it: 3 ms for a table of 15 MB; an id may be in any table, so all indexes
are (16 bytes a document).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.store.addresses import Addresses
from data_prep.store.block_cache import BlockCache
from data_prep.store.dataset_files import require_whole_file
from data_prep.store.document_index import find_rows
from data_prep.store.files import whole_file
from data_prep.store.manifest import DOCUMENTS, INDEX, Manifest, Shard, load
from data_prep.store.places import join
from data_prep.store.scratch import local_copy

GROUP_ROWS = 4096  # documents in a row group of a table: what a look-up reads
_VERIFYING_THREADS = 8  # digests are computed without Python's lock
PROVENANCE = ("id", "url", "dump", "language")  # columns that are kept where the input has them
DOCUMENT_COLUMNS = pa.schema(
    [
        ("start", pa.int64()),  # position of the document's end-of-text token
        ("length", pa.int64()),  # in tokens, with the end-of-text token
        ("text_bytes", pa.int64()),  # of the text in UTF-8
        *((name, pa.string()) for name in PROVENANCE),
        ("source_file", pa.string()),
        ("row", pa.int64()),  # row or line in the source file, from 0
    ]
)


@dataclass(frozen=True)
class Document:
    """One document of a prepared dataset; None where the input did not say."""

    split: str
    start: int  # of its end-of-text token in the split's stream
    length: int  # in tokens, with the end-of-text token
    text_bytes: int | None
    id: str | None
    url: str | None
    dump: str | None
    language: str | None
    source_file: str
    row: int  # in the source file, from 0


class DocumentTables:
    """The documents of one split of a prepared dataset; from a bucket, a file is fetched when it is first asked.

    Raises ValueError for a directory that is not one, or a split that is not there; each method for a file that is
    not what the manifest says, or says what cannot be.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        manifest: Manifest | None = None,
        cache: BlockCache | None = None,
    ):
        self._directory, self._cache = directory, cache
        manifest = manifest or load(directory)
        if split not in manifest.splits:
            raise ValueError(f"{directory}: no split {split!r}; the splits are {', '.join(manifest.splits)}")
        self.split = split
        self.num_tokens = manifest.splits[split].num_tokens
        self._tables = manifest.shards_of(split, DOCUMENTS)
        self._indexes = manifest.shards_of(split, INDEX)
        self._addresses = Addresses(shard.num_tokens for shard in self._tables)
        if self._addresses.total != self.num_tokens:
            raise ValueError(
                f"{directory}: the documents tables of {split} are of {self._addresses.total} tokens, the split has "
                f"{self.num_tokens}. Run `python -m data_prep.check {directory}`."
            )

    def at(self, token: int) -> Document:
        """The document that token `token` of the split's stream belongs to.

        Raises IndexError outside the stream.
        """
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token}: split {self.split} has tokens 0 to {self.num_tokens - 1}")
        # A document may begin in an earlier table than the one that its tokens reach into.
        for table in range(self._addresses.find(token)[0], -1, -1):
            firsts = self._group_firsts(table)
            group = bisect_right(firsts, (token, self._tables[table].num_rows)) - 1
            if group >= 0:
                rows = self._group(table, firsts[group][1])
                row = int(np.searchsorted(rows["start"].to_numpy(), token, side="right")) - 1
                document = self._document(table, rows, row)
                if not document.start <= token < document.start + document.length:
                    raise self._nonsense(table, f"token {token} belongs to no document")
                return document
        raise self._nonsense(0, f"no document starts at or before token {token}")

    def between(self, start: int, stop: int) -> Iterator[Document]:
        """The documents with a token in [start, stop), in order."""
        while start < min(stop, self.num_tokens):
            document = self.at(start)
            yield document
            start = document.start + document.length  # beyond `start`: `at` made sure that the document holds it

    def whole_tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All documents in order, those of one table at a time (about a shard's): `columns` of them, with start and
        length, which are checked."""
        for number in range(len(self._tables)):
            with self._readable(number):
                table = self._file(number).read(list(dict.fromkeys(["start", "length", *columns])))
            starts, lengths = table["start"].to_numpy(), table["length"].to_numpy()
            ends = starts + lengths
            if len(starts) and not (
                starts[0] >= 0 and ends[-1] <= self.num_tokens and lengths.min() > 0 and (ends[:-1] <= starts[1:]).all()
            ):
                raise self._nonsense(number, "its documents are not in order, or not within the stream")
            yield table

    def find(self, column: str, value: str) -> list[Document]:
        """The documents whose `column`, "id" or "url", is `value`; empty if there are none."""
        if len(self._indexes) != len(self._tables):
            raise ValueError(
                f"{self._directory}: {self.split} has {len(self._tables)} documents tables and {len(self._indexes)} "
                f"indexes. Run `python -m data_prep.check {self._directory}`."
            )
        found = []
        for table, (index, path) in enumerate(zip(self._indexes, self._whole(self._indexes), strict=True)):
            for row in find_rows(path, value):
                group, offset = divmod(row, GROUP_ROWS)
                rows = self._group(table, group)
                if offset >= rows.num_rows:
                    raise self._nonsense(table, f"{index.name} names its row {row}, which is not there")
                document = self._document(table, rows, offset)
                if getattr(document, column) == value:
                    found.append(document)
        return found

    def _whole(self, shards: Sequence[Shard]) -> list[Path]:
        """Where these files can be read. ValueError unless all of them are what the manifest says."""

        def require(shard: Shard) -> Path:
            return require_whole_file(self._directory, shard, self._cache)

        if len(shards) == 1:
            return [require(shards[0])]
        with ThreadPoolExecutor(_VERIFYING_THREADS) as threads:
            return list(threads.map(require, shards))

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the tables do
    def _file(self, table: int) -> pq.ParquetFile:
        (path,) = self._whole([self._tables[table]])
        with self._readable(table):
            file = pq.ParquetFile(path)
        if not file.schema_arrow.equals(DOCUMENT_COLUMNS):
            raise self._nonsense(table, "its columns are not those of a documents table")
        return file

    @lru_cache(maxsize=64)  # noqa: B019
    def _group_firsts(self, table: int) -> list[tuple[int, int]]:
        """(start of the first document, number) of each row group, ascending."""
        metadata = self._file(table).metadata
        firsts = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if group.num_rows:
                statistics = group.column(0).statistics
                if statistics is None or not isinstance(statistics.min, int):
                    raise self._nonsense(table, f"row group {number} does not say where its documents start")
                firsts.append((statistics.min, number))
        if firsts != sorted(firsts):
            raise self._nonsense(table, "its documents are not in order")
        return firsts

    @lru_cache(maxsize=4)  # noqa: B019
    def _group(self, table: int, group: int) -> pa.Table:
        file = self._file(table)
        if group >= file.num_row_groups:
            raise self._nonsense(table, f"has {file.num_row_groups} row groups, asked for number {group}")
        with self._readable(table):
            rows = file.read_row_group(group, use_threads=False)
        for name in ("start", "length", "source_file", "row"):
            if rows[name].null_count:
                raise self._nonsense(table, f"row group {group} has documents without {name}")
        return rows

    @contextmanager
    def _readable(self, table: int) -> Iterator[None]:
        """pyarrow's errors with the table's name."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            text = " ".join(str(error).split())
            raise self._nonsense(table, f"cannot be read as parquet ({text})") from None

    def _document(self, table: int, rows: pa.Table, row: int) -> Document:
        if row < 0:
            raise self._nonsense(table, "a row group does not begin where it says")
        document = Document(self.split, **{name: rows[name][row].as_py() for name in rows.column_names})
        if document.length < 1 or not 0 <= document.start <= self.num_tokens - document.length:
            raise self._nonsense(
                table,
                f"lists a document of {document.length} tokens from token {document.start} on, of a split of "
                f"{self.num_tokens}",
            )
        return document

    def _nonsense(self, table: int, what: str) -> ValueError:
        """A file is what the manifest says, and cannot be right."""
        path = join(self._directory, self._tables[table].name)
        return ValueError(f"{path}: {what}. Run `python -m data_prep.check {self._directory}`.")


def write_documents(path: str | Path, table: pa.Table) -> None:
    """Writes a table of documents so that a look-up reads one of its row groups."""
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=GROUP_ROWS)


def read_starting_in(path: str, digest: str, start: int, stop: int, columns: list[str]) -> pa.Table:
    """Of a table of documents those row groups that may list one that starts in [start, stop)."""
    with local_copy(path, digest) as copy, pq.ParquetFile(copy) as file:
        groups = []
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            starts = group.column(0).statistics
            if group.num_rows and starts.max >= start and starts.min < stop:
                groups.append(index)
        return file.read_row_groups(groups, columns, use_threads=False).select(columns)

"""Which document is where: the tables of documents of a prepared dataset.

The tables are sorted by their place in the stream and cut like the shards, so a token's document is found by the
statistics of the row groups, and an id or url by the index beside each table. Nothing is scanned: milliseconds,
whatever the size of the dataset.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.store.addresses import Addresses
from data_prep.store.document_index import find_rows
from data_prep.store.files import whole_file
from data_prep.store.manifest import DOCUMENTS, INDEX, Manifest, load

GROUP_ROWS = 4096  # documents in a row group of a table: what a look-up reads
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
    """The documents of one split of a prepared dataset.

    Raises ValueError for a directory that is not one, or a split that is not there.
    """

    def __init__(self, directory: str | Path, split: str = "train", manifest: Manifest | None = None):
        self._directory = Path(directory)
        manifest = manifest or load(directory)
        if split not in manifest.splits:
            raise ValueError(f"{directory}: no split {split!r}; the splits are {', '.join(manifest.splits)}")
        self.split = split
        self.num_tokens = manifest.splits[split].num_tokens
        tables = manifest.shards_of(split, DOCUMENTS)
        self._names = [shard.name for shard in tables]
        self._indexes = [shard.name for shard in manifest.shards_of(split, INDEX)]
        self._addresses = Addresses(shard.num_tokens for shard in tables)

    def at(self, token: int) -> Document:
        """The document that token `token` of the split's stream belongs to.

        Raises IndexError outside the stream.
        """
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token}: split {self.split} has tokens 0 to {self.num_tokens - 1}")
        # A document may begin in an earlier table than the one that its tokens reach into.
        for table in range(self._addresses.find(token)[0], -1, -1):
            firsts = self._group_firsts(table)
            group = bisect_right(firsts, token) - 1
            if group >= 0:
                rows = self._group(table, group)
                row = int(np.searchsorted(rows["start"].to_numpy(), token, side="right")) - 1
                return self._document(rows, row)
        raise AssertionError(f"no document starts at or before token {token}")

    def between(self, start: int, stop: int) -> Iterator[Document]:
        """The documents with a token in [start, stop), in order."""
        while start < min(stop, self.num_tokens):
            document = self.at(start)
            yield document
            start = document.start + document.length

    def find(self, column: str, value: str) -> list[Document]:
        """The documents whose `column`, "id" or "url", is `value`; empty if there are none."""
        found = []
        for table, name in enumerate(self._indexes):
            for row in find_rows(self._directory / name, value):
                group, offset = divmod(row, GROUP_ROWS)
                document = self._document(self._group(table, group), offset)
                if getattr(document, column) == value:
                    found.append(document)
        return found

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the tables do
    def _file(self, table: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._directory / self._names[table])

    @lru_cache(maxsize=64)  # noqa: B019
    def _group_firsts(self, table: int) -> list[int]:
        """Start of the first document of each row group."""
        metadata = self._file(table).metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [group.column(0).statistics.min for group in groups if group.num_rows]

    @lru_cache(maxsize=4)  # noqa: B019
    def _group(self, table: int, group: int):
        return self._file(table).read_row_group(group, use_threads=False)

    def _document(self, rows, row: int) -> Document:
        return Document(self.split, **{name: rows[name][row].as_py() for name in rows.column_names})


def write_documents(path: str | Path, table: pa.Table) -> None:
    """Writes a table of documents so that a look-up reads one of its row groups."""
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=GROUP_ROWS)


def read_starting_in(path: str, start: int, stop: int, columns: list[str]) -> pa.Table:
    """Of a table of documents those row groups that may list one that starts in [start, stop)."""
    with pq.ParquetFile(path) as file:
        groups = []
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            starts = group.column(0).statistics
            if group.num_rows and starts.max >= start and starts.min < stop:
                groups.append(index)
        return file.read_row_groups(groups, columns, use_threads=False).select(columns)

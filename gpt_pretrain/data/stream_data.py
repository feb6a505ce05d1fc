"""The datasets behind the streams of a plan, opened by each process that reads them."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from data_prep.store.block_cache import BlockCache
from data_prep.store.buckets import is_bucket
from data_prep.store.datasets import Format, TokenDataset, Verify, open_dataset
from data_prep.store.documents import Document, DocumentTables
from gpt_pretrain.data.stages import Stage, Stream


class DatasetPlace(NamedTuple):
    """Where a dataset is and which of its formats is read; of one in a bucket, the cache (see `DataConfig`)."""

    directory: str
    format: Format = "auto"
    cache_dir: str | None = None
    cache_bytes: int | None = None

    def open(self, verify: Verify) -> TokenDataset:
        """ValueError where it is not there or damaged."""
        cache = BlockCache(self.cache_dir, self.cache_bytes) if is_bucket(self.directory) else None
        return open_dataset(self.directory, format=self.format, verify=verify, cache=cache)


class StreamData:
    """Datasets by the fingerprint of their stream.

    Each process opens them when it first needs them: open files survive neither a fork (ArrayRecord's reader has
    threads) nor a pickle, and workers of other trainers' loaders get both.

    Args:
      places: by fingerprint.
      missing: by fingerprint, why a dataset is not there.
      verify: see `open_dataset`; by the first process only.
    """

    def __init__(
        self, places: Mapping[str, DatasetPlace], missing: Mapping[str, str] | None = None, verify: Verify = "auto"
    ):
        self.places, self._missing = dict(places), dict(missing or {})
        self._verify: Verify = verify
        self._become_this_process()

    def __or__(self, other: "StreamData") -> "StreamData":
        """The datasets of both."""
        return StreamData(self.places | other.places, {**self._missing, **other._missing}, self._verify)

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places, "_missing": self._missing, "_verify": "size"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._become_this_process()

    def _become_this_process(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()
        self._datasets: dict[str, TokenDataset] = {}
        self._tables: dict[str, DocumentTables | None] = {}

    @contextmanager
    def _here(self) -> Iterator[None]:
        if self._process != os.getpid():
            self._verify = "size"
            self._become_this_process()
        with self._lock:
            yield

    def dataset(self, stream: Stream) -> TokenDataset:
        """ValueError where it is not there, damaged, or another one than the plan's."""
        with self._here():
            if stream.fingerprint not in self._datasets:
                self._datasets[stream.fingerprint] = self._open(stream)
            return self._datasets[stream.fingerprint]

    def of(self, stage: Stage) -> dict[str, TokenDataset]:
        """Those of a stage by the name of their stream, and those that it inserts from; errors as above."""
        return {stream.name: self.dataset(stream) for stream in stage.read_from}

    def documents(self, stream: Stream, start: int, stop: int) -> tuple[Document, ...]:
        """The documents with one of the tokens [start, stop) of the stream; none where nobody recorded them.

        Raises ValueError for a damaged table.
        """
        with self._here():  # one thread at a time: a table's reader is not made for several
            if stream.fingerprint not in self._tables:
                dataset = self.dataset(stream)
                is_prepared = dataset.tokenizer_digest is not None
                self._tables[stream.fingerprint] = DocumentTables(dataset.directory) if is_prepared else None
            tables = self._tables[stream.fingerprint]
            return () if tables is None else tuple(tables.between(start, stop))

    def _open(self, stream: Stream) -> TokenDataset:
        if stream.fingerprint not in self.places:
            raise ValueError(self._missing[stream.fingerprint])
        dataset = self.places[stream.fingerprint].open(self._verify)
        if dataset.fingerprint != stream.fingerprint:
            raise ValueError(
                f"{dataset.directory}: has the fingerprint {dataset.fingerprint:.16}, the plan is of a dataset with "
                f"{stream.fingerprint:.16}. Say where that one is: data_dirs."
            )
        return dataset

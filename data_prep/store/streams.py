"""A token stream, which lies in many files, read from one end to the other, or a piece of it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_prep.store import buckets, token_bin, token_records
from data_prep.store.addresses import Addresses
from data_prep.store.block_source import open_blocks
from data_prep.store.dataset_files import default_cache
from data_prep.store.files import require_whole
from data_prep.store.manifest import DOCUMENTS, Manifest
from data_prep.store.places import join
from data_prep.store.scratch import local_copy

CHUNK_TOKENS = 1 << 20  # read at a time where a stream is read from one end to the other
RAW = "raw"  # a file of ids and nothing else, of which an unfinished preparation has many


@dataclass(frozen=True)
class FileRange:
    """Tokens [start, stop) of one stored file, which are a stretch of a stream.

    A range of a table of documents stands for those that start there, as the table counts.
    """

    path: str
    format: str  # "array_record", "documents", RAW, or one of token_bin.LAYOUTS
    digest: str  # of the file, or of its tokens where it is raw
    start: int
    stop: int
    record_tokens: int | None = None  # of an ArrayRecord file

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class StoredStream:
    """A stream that lies in ranges of several files, one after the other."""

    def __init__(self, ranges: Iterable[FileRange]):
        self._ranges = tuple(ranges)
        self._addresses = Addresses(each.num_tokens for each in self._ranges)
        self.num_tokens = self._addresses.total

    def ranges(self, start: int, stop: int) -> tuple[FileRange, ...]:
        """Where tokens [start, stop) of the stream are."""
        out = []
        for file, first, last in self._addresses.stretches(start, stop):
            whole = self._ranges[file]
            out.append(replace(whole, start=whole.start + first, stop=whole.start + last))
        return tuple(out)

    def cut(self, start: int, stop: int) -> "StoredStream":
        """Tokens [start, stop) as a stream."""
        return StoredStream(self.ranges(start, stop))


def stored_stream(directory: str | os.PathLike, manifest: Manifest, split: str, format: str) -> StoredStream:
    """The stream of one split of a prepared dataset, as it lies in the files of one format.

    Of "documents": as its tables of documents list it, which count from the split's first token.
    """
    record_tokens = manifest.spec.record_tokens if format == "array_record" else None
    ranges, first = [], 0
    for shard in manifest.shards_of(split, format):
        start = first if format == DOCUMENTS else 0
        path = join(directory, shard.name)
        ranges.append(FileRange(path, format, shard.digest, start, start + shard.num_tokens, record_tokens))
        first += shard.num_tokens
    return StoredStream(ranges)


def read_ranges(ranges: Sequence[FileRange], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Their tokens in order, in chunks (n,) of at most about CHUNK_TOKENS, as `dtype`, which must hold them."""
    for each in ranges:
        with local_copy(each.path, each.digest) as path:
            yield from _read_range(each, path, dtype)


def _read_range(each: FileRange, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    if each.format == "array_record":
        yield from _read_records(each, path, dtype)
        return
    tokens = np.memmap(path, dtype, "r") if each.format == RAW else token_bin.open_tokens(path, each.format)
    for start in range(each.start, each.stop, CHUNK_TOKENS):
        chunk = np.asarray(tokens[start : min(start + CHUNK_TOKENS, each.stop)])
        yield chunk.astype(dtype, copy=False)


def _read_records(each: FileRange, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    size = each.record_tokens
    assert size is not None, each
    reader = token_records.open_records([path], size, dtype)
    last, step = -(-each.stop // size), max(1, CHUNK_TOKENS // size)
    for record in range(each.start // size, last, step):
        tokens = reader.read(range(record, min(record + step, last))).reshape(-1)
        offset = record * size
        yield tokens[max(0, each.start - offset) : each.stop - offset]


def read_tokens(directory: str | os.PathLike, manifest: Manifest, split: str, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) of a split's stream, or up to its end: (n,), from the first stored format.

    From .bin files of a bucket, the blocks that hold them are fetched; else whole files.

    Raises ValueError where a file that holds them is not what the manifest says: 40 ms for one of 100 M tokens.
    """
    format = manifest.spec.formats[0]
    stream = stored_stream(directory, manifest, split, format)
    stop = min(stop, stream.num_tokens)
    if not 0 <= start <= stop:
        raise ValueError(f"{directory}: tokens [{start}, {stop}) asked of a {split} stream of {stream.num_tokens}")
    dtype = token_bin.token_dtype(manifest.spec.vocab_size)
    if buckets.is_bucket(directory) and format == "bin":
        source = open_blocks(os.fspath(directory), manifest, split, default_cache())
        return source.read(np.array([start]), stop - start)[0] if stop > start else np.empty(0, dtype)
    ranges = stream.ranges(start, stop)
    shards = {join(directory, shard.name): shard for shard in manifest.shards_of(split, format)}
    for each in ranges:
        require_whole(each.path, shards[each.path].num_bytes, each.digest)
    chunks = read_ranges(ranges, dtype)
    return np.concatenate([np.empty(0, dtype), *chunks])

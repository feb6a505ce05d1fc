"""A split's token stream as the trainer reads it: rows at random places, from either stored format."""

import abc
import contextlib
import math
import mmap
import os
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from data_prep.store import token_bin, token_records
from data_prep.store.addresses import Addresses, EqualPieces
from data_prep.store.files import FileProblem
from data_prep.store.open_files import OPEN_FILES, max_open_files


class TokenSource(Protocol):
    """One split's token stream.

    One that lies on a disk may also have `fetch_ahead(starts, length)`: those tokens will be asked for soon.
    """

    num_tokens: int
    dtype: np.dtype  # of the ids: uint16 or uint32

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens `[start, start + length)` for each start: (n, length), uint16 or uint32 as they are stored."""
        ...


def num_windows(source: TokenSource, seq_len: int) -> int:
    """How many windows of `seq_len` inputs (and one more token) the stream holds; ValueError if none."""
    count = (source.num_tokens - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"data.seq_len={seq_len} needs {seq_len + 1} tokens for one window; the stream holds {source.num_tokens}"
        )
    return count


# A row of 1,024 takes 1 us from memory; from a fast disk 17 if it was asked for ahead, hundreds if not.
_SLOW_SECS_A_ROW = 8e-6
_LOOK_AGAIN_SECS = 0.1  # whether a shard still has its size: a look at each row would take a sixth of the loader's time


class MappedSource(abc.ABC):
    """A stream in several files, "shards" here, that are memory-mapped: a read touches only the pages it needs.

    Shards are mapped when they are first read, and a bounded number of them stays so.

    Args:
      addresses: of the shards. There may be millions: what is kept here is kept of those that are open.
    """

    def __init__(self, addresses: Addresses | EqualPieces, dtype: np.dtype):
        self._addresses = addresses
        self.num_tokens, self.dtype = addresses.total, dtype
        self._mapped: dict[int, token_bin.MappedTokens] = {}
        self._tokens: dict[int, np.ndarray] = {}  # of these: one look-up less a row
        # When each shard had its size, by time.perf_counter().
        self._looked_secs = zeros_as_touched((len(addresses),), np.dtype(np.float64))
        # Put together at once: each piece keeps its shard open until then.
        self._pieces_at_once = max(16, (max_open_files() or 1 << 14) // 16)
        self._waited = True  # for the disk, in the last read; the first one is likely to

    @abc.abstractmethod
    def _map(self, shard: int) -> token_bin.MappedTokens:
        """Opens a shard and notes it in `_mapped` and `_tokens`."""

    @abc.abstractmethod
    def _look_at(self, shard: int, now: float) -> None:
        """Notes in `_looked_secs` that the file still holds the shard: to touch what is gone would kill the process
        without a word (SIGBUS)."""

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        if not len(starts):
            return np.empty((0, length), self.dtype)
        starts = np.asarray(starts, np.int64)
        begin, end = _range_of(starts, length, self.num_tokens)
        started = time.perf_counter()
        if self._waited:
            self.fetch_ahead(starts, length)
        out = self._read(starts, length, begin, end, started)
        self._waited = time.perf_counter() - started > _SLOW_SECS_A_ROW * len(starts)
        return out

    def fetch_ahead(self, starts: np.ndarray, length: int) -> None:
        """Has the kernel fetch those tokens at once and nothing else, where it would fetch one after the other as they
        are touched, each with 128 KiB around it. Three times as fast from a disk; from memory a third slower."""
        for start in np.asarray(starts).tolist():
            for shard, *edges in self._addresses.stretches(start, min(start + length, self.num_tokens)):
                _, mapped, offset = self._mapped.get(shard) or self._map(shard)
                first, last = (offset + edge * self.dtype.itemsize for edge in edges)
                page = first // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, last - page)

    def let_go(self, number: int) -> None:
        """See `HoldsFiles`."""
        self._tokens.pop(number, None)
        self._mapped.pop(number, None)

    def _tokens_of(self, shard: int) -> np.ndarray:
        tokens = self._tokens.get(shard)  # another thread may let it go meanwhile
        return self._map(shard).tokens if tokens is None else tokens

    def _read(self, starts: np.ndarray, length: int, begin: int, end: int, now: float) -> np.ndarray:
        shard, place = self._addresses.find(begin)
        if end <= self._addresses.edges(shard)[1]:
            if self._looked_secs[shard] < now - _LOOK_AGAIN_SECS:
                self._look_at(shard, now)
            return _gather(self._tokens_of(shard), starts - (begin - place), length)  # all of one shard: half the time
        shards = self._addresses.files_of(starts)
        for shard in shards[self._looked_secs[shards] < now - _LOOK_AGAIN_SECS].tolist():
            self._look_at(shard, now)
        begins = starts - self._addresses.starts_of(shards)
        out, pieces, opened, filled = np.empty(len(starts) * length, self.dtype), [], self._tokens, 0
        for start, shard, begin in zip(starts.tolist(), shards.tolist(), begins.tolist(), strict=True):
            try:
                tokens = opened[shard]  # which is faster than `get`
            except KeyError:
                tokens = self._map(shard).tokens
            piece = tokens[begin : begin + length]
            pieces.append(piece if len(piece) == length else self._across(start, length, now))
            if len(pieces) == self._pieces_at_once:
                np.concatenate(pieces, out=out[filled : filled + len(pieces) * length])
                filled += len(pieces) * length
                pieces = []
        if pieces:
            np.concatenate(pieces, out=out[filled:])
        return out.reshape(len(starts), length)

    def _across(self, start: int, length: int, now: float) -> np.ndarray:
        """A window that lies in several shards."""
        pieces = []
        for shard, first, last in self._addresses.stretches(start, start + length):
            self._look_at(shard, now)
            pieces.append(self._tokens_of(shard)[first:last].copy())
        return np.concatenate(pieces)


class BinSource(MappedSource):
    """The stream as .bin shards.

    Args:
      headers: of the shards, where they are known; then each is compared with its shard's when that is first read.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], headers: Sequence[token_bin.Header] | None = None):
        self._paths = [os.fspath(path) for path in paths]
        self.headers = headers = headers or [token_bin.read_header(path) for path in self._paths]
        super().__init__(Addresses(header.num_tokens for header in headers), headers[0].dtype)
        for path, header in zip(self._paths, headers, strict=True):
            if header.dtype != self.dtype:
                raise ValueError(f"{path}: holds {header.dtype.name} ids, but {paths[0]} holds {self.dtype.name}")

    def _map(self, shard: int) -> token_bin.MappedTokens:
        opened = OPEN_FILES.open(self._paths[shard], shard, self, token_bin.map_tokens)
        found, expected = opened.tokens, self.headers[shard]
        if (len(found), found.dtype) != (expected.num_tokens, self.dtype):
            raise ValueError(
                f"{self._paths[shard]}: holds {len(found)} tokens ({found.dtype.name}), and held "
                f"{expected.num_tokens} ({self.dtype.name}) when the run began. Put the file back and start again."
            )
        self._mapped[shard], self._tokens[shard] = opened, opened.tokens
        return opened

    def _look_at(self, shard: int, now: float) -> None:
        """ValueError where the file does not hold the shard any more."""
        _, mapped, _ = self._mapped.get(shard) or self._map(shard)
        if (found := mapped.size()) < len(mapped):
            problem = FileProblem(self._paths[shard], "size", found, len(mapped))
            raise ValueError(f"{problem} while it was being read. Put the file back and start again.")
        self._looked_secs[shard] = now


class RecordSource:
    """The stream as ArrayRecord: record `k` holds tokens `[k * record_tokens, (k + 1) * record_tokens)`."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        record_tokens: int,
        num_tokens: int,
        dtype: DTypeLike = np.uint16,
    ):
        self.dtype = np.dtype(dtype)
        self._records = token_records.open_records(paths, record_tokens, self.dtype)
        self._record_tokens = record_tokens
        self.num_tokens = num_tokens
        expected = -(-num_tokens // record_tokens)
        if len(self._records) != expected:
            raise ValueError(
                f"{os.path.dirname(os.fspath(paths[0]))}: found {len(self._records)} records, expected {expected} "
                f"for {num_tokens} tokens. Run `python -m data_prep.check` on the directory."
            )

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        if not len(starts):
            return np.empty((0, length), self.dtype)
        starts = np.asarray(starts, np.int64)
        _range_of(starts, length, self.num_tokens)
        first, offset = np.divmod(starts, self._record_tokens)
        last = (starts + length - 1) // self._record_tokens
        neighbours = np.arange((last - first).max() + 1)
        # Each record is fetched once for all windows. Neighbours stay neighbours when they are sorted, so a window
        # is contiguous in what was fetched, too.
        fetched = np.unique(np.minimum(first[:, None] + neighbours, last[:, None]))
        tokens = self._records.read(fetched).reshape(-1)
        return _gather(tokens, np.searchsorted(fetched, first) * self._record_tokens + offset, length)


def zeros_as_touched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that take memory where they are first written to, a page of 4 KiB at a time.

    `np.zeros` of many MB asks for pages of 2 MiB, of which some hundred places at random touch all, and of less may get
    memory that was in use before, which has to be cleared.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < 1 << 16 or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not shared with a fork's child
    with contextlib.suppress(OSError):  # a kernel without such pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def _gather(tokens: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
    """Rows `tokens[begin : begin + length]`, by one fancy index into a view of all windows."""
    size = tokens.itemsize
    windows_WT = np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens, strides=(size, size))
    return windows_WT[begins]


def _range_of(starts: np.ndarray, length: int, num_tokens: int) -> tuple[int, int]:
    """[first token, end) of what is asked for. IndexError unless the stream has it."""
    begin, end = int(starts.min()), int(starts.max()) + length
    if begin < 0 or end > num_tokens:
        raise IndexError(f"tokens [{begin}, {end}) asked of a stream of {num_tokens}")
    return begin, end

"""Step -> this process's rows of the global batch, by Grain.

One Grain element is one whole batch: one vectorised look-up of the order and one gather, not a
Python call an example. An element depends on its index alone, so starting at any position costs nothing.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from gpt_pretrain.data import order
from gpt_pretrain.data.token_sources import TokenSource


class Batches:
    """Random access to batches: a Grain data source whose element `k` is the batch that begins at
    position `start + k * batch_size`.

    An element is a dict of
      tokens: uint16 or uint32, as stored (num_microbatches, local rows, seq_len + 1)
      windows: int64 (num_microbatches, local rows), which windows those are
      position: int, where the global batch begins
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        seed: int,
        seq_len: int,
        vocab_size: int,
        num_microbatches: int,
        microbatch: int,
        rows: np.ndarray | None = None,
        start: int = 0,
        num_batches: int,
    ):
        """`rows` are the rows of each microbatch that this process holds (default: all), in global order."""
        self._source = source
        self._seed = seed
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._num_windows = num_windows(source, seq_len)
        rows = np.arange(microbatch) if rows is None else rows
        self._offsets = np.arange(num_microbatches)[:, None] * microbatch + rows
        self._batch_size = num_microbatches * microbatch
        self._start = start
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> dict:
        position = self._start + int(index) * self._batch_size
        windows = order.window_at(position + self._offsets, num_windows=self._num_windows, seed=self._seed)
        tokens = self._source.read(windows.reshape(-1) * self._seq_len, self._seq_len + 1)
        if tokens.max(initial=0) >= self._vocab_size:
            bad = windows.reshape(-1)[(tokens >= self._vocab_size).any(1)]
            raise ValueError(
                f"window {bad[0]} (tokens {bad[0] * self._seq_len} to {(bad[0] + 1) * self._seq_len} of the stream) "
                f"holds token id {tokens.max()}, expected ids below {self._vocab_size}. The shard is damaged or was "
                "made with another tokenizer; run `python -m data_prep.check` on it."
            )
        tokens = tokens.reshape(*windows.shape, self._seq_len + 1)
        return {"tokens": tokens, "windows": windows, "position": position}


def num_windows(source: TokenSource, seq_len: int) -> int:
    """How many windows of `seq_len` inputs (and one more token) the stream holds; ValueError if none."""
    count = (source.num_tokens - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"data.seq_len={seq_len} needs {seq_len + 1} tokens for one window; the stream holds {source.num_tokens}"
        )
    return count


def load(batches: Batches) -> Iterator[dict]:
    """Iterates in order, read ahead by one Grain thread (more only contend for the interpreter)."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))  # pyright: ignore


def local_rows(sharding: NamedSharding, num_microbatches: int, microbatch: int) -> np.ndarray:
    """The rows of a microbatch that this process's devices hold, ascending, from the batch's sharding."""
    shape = (num_microbatches, microbatch)
    held = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(microbatch)[index[1]] for index in held if index]))


def to_devices(local: np.ndarray, sharding: NamedSharding, microbatch: int, rows: np.ndarray) -> jax.Array:
    """This process's rows -> the global array (num_microbatches, microbatch, ...), each row in its place."""
    shape = (local.shape[0], microbatch, *local.shape[2:])

    def shard(index):
        wanted = np.arange(microbatch)[index[1]]
        return local[:, np.searchsorted(rows, wanted)]

    return jax.make_array_from_callback(shape, sharding, shard)


def prefetch_to_devices(
    elements: Iterable[dict], sharding: NamedSharding, microbatch: int, rows: np.ndarray, depth: int = 2
) -> Iterator[tuple[dict, jax.Array]]:
    """Yields (element, its tokens on the devices) with `depth` transfers under way ahead of the step."""
    pairs = ((each, to_devices(each["tokens"], sharding, microbatch, rows)) for each in elements)
    queue = collections.deque(itertools.islice(pairs, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(pairs, 1))

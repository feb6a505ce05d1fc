"""From batches to devices: Grain reads ahead, each row goes to the device that holds it.

One Grain element is one whole batch, or several small ones: one vectorised look-up of the order and
one gather, not a Python call an example.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from gpt_pretrain.data.batches import Batches, Element
from gpt_pretrain.parallel.mesh import BatchLayout, batch_layout

# In one Grain element: handing one from its thread to ours costs 70 us, as much as reading 2**16 tokens.
_ELEMENT_TOKENS = 1 << 19


def load(batches: Batches) -> Iterator[Element]:
    """Iterates in order, read ahead by one Grain thread (more only contend for the interpreter)."""
    if not len(batches):
        return
    source = _Groups(batches, max(1, _ELEMENT_TOKENS // max(1, batches[0]["tokens"].size)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    for group in grain.MapDataset.source(source).to_iter_dataset(options):  # pyright: ignore
        yield from group


class _Groups:
    """Random access to groups of consecutive batches."""

    def __init__(self, batches: Batches, size: int):
        self._batches, self._size = batches, size

    def __len__(self) -> int:
        return -(-len(self._batches) // self._size)

    def __getitem__(self, index: int) -> list[Element]:
        first = int(index) * self._size
        return [self._batches[i] for i in range(first, min(first + self._size, len(self._batches)))]


class Placement:
    """Which rows of a batch lie where, for batches of any size.

    Args:
      sharding: of (num_microbatches, microbatch, ...) arrays.
      per_device_batch_size: rows that a device holds at once; a larger batch is cut into microbatches.
    """

    def __init__(self, sharding: NamedSharding, per_device_batch_size: int):
        self.sharding = sharding
        self._per_device_batch_size = per_device_batch_size

    @lru_cache(maxsize=64)  # noqa: B019 - there is one for the whole run
    def layout(self, batch_size: int) -> BatchLayout:
        """How a batch is cut. ValueError where it cannot be split over the devices."""
        return batch_layout(batch_size, self._per_device_batch_size, self.sharding.mesh.size)

    @lru_cache(maxsize=64)  # noqa: B019
    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of the global batch that this process's devices hold: int64 (num_microbatches, local rows)."""
        layout = self.layout(batch_size)
        return np.arange(layout.num_microbatches)[:, None] * layout.microbatch + self._local(batch_size)

    @lru_cache(maxsize=64)  # noqa: B019
    def _local(self, batch_size: int) -> np.ndarray:
        """Rows of a microbatch that this process's devices hold, ascending."""
        layout = self.layout(batch_size)
        shape = (layout.num_microbatches, layout.microbatch)
        held = self.sharding.addressable_devices_indices_map(shape).values()
        return np.unique(np.concatenate([np.arange(layout.microbatch)[index[1]] for index in held if index]))

    def to_devices(self, local: np.ndarray, batch_size: int) -> jax.Array:
        """This process's rows -> the global array (num_microbatches, microbatch, ...), each row in its place."""
        layout, rows = self.layout(batch_size), self._local(batch_size)
        assert local.shape[:2] == (layout.num_microbatches, len(rows)), (local.shape, layout)

        def shard(index):
            wanted = np.arange(layout.microbatch)[index[1]]
            return local[:, np.searchsorted(rows, wanted)]

        shape = (local.shape[0], layout.microbatch, *local.shape[2:])
        return jax.make_array_from_callback(shape, self.sharding, shard)


def prefetch_to_devices(
    elements: Iterable[Element], placement: Placement, depth: int = 2
) -> Iterator[tuple[Element, jax.Array]]:
    """Yields (element, its tokens on the devices) with `depth` transfers under way ahead of the step."""
    pairs = ((each, placement.to_devices(each["tokens"], each["batch_size"])) for each in elements)
    queue = collections.deque(itertools.islice(pairs, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(pairs, 1))


def add_up_digests(partial: np.ndarray) -> np.ndarray:
    """Digests of this process's rows -> digests of the whole batches: uint64 (n,), the same on every process."""
    if jax.process_count() == 1 or not len(partial):
        return partial
    halves = partial.view(np.uint32).reshape(-1, 2)  # JAX has no 64-bit integers unless asked
    everybody = np.asarray(multihost_utils.process_allgather(halves))
    return np.ascontiguousarray(everybody).view(np.uint64)[..., 0].sum(axis=0, dtype=np.uint64)

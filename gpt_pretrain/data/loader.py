"""Reading ahead: Grain runs the batches of a plan in a thread of its own.

One Grain element is one whole batch, or several small ones: one vectorised look-up of the order and
one gather, not a Python call an example.
"""

from collections.abc import Iterator

import grain

from gpt_pretrain.data.batches import Batches, HostBatch

# In one Grain element: handing one from its thread to ours costs 70 us, as much as reading 2**16 tokens.
_ELEMENT_TOKENS = 1 << 19


def load(batches: Batches) -> Iterator[HostBatch]:
    """Iterates in order, read ahead by one Grain thread (more only contend for the interpreter)."""
    if not len(batches):
        return
    source = _Groups(batches, max(1, _ELEMENT_TOKENS // max(1, batches[0].tokens.size)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    for group in grain.MapDataset.source(source).to_iter_dataset(options):  # pyright: ignore
        yield from group


class _Groups:
    """Random access to groups of consecutive batches."""

    def __init__(self, batches: Batches, size: int):
        self._batches, self._size = batches, size

    def __len__(self) -> int:
        return -(-len(self._batches) // self._size)

    def __getitem__(self, index: int) -> list[HostBatch]:
        first = int(index) * self._size
        return [self._batches[i] for i in range(first, min(first + self._size, len(self._batches)))]

"""Batches on their way to the devices."""

import collections
import itertools
from collections.abc import Iterable, Iterator

import jax

from gpt_pretrain.data.batches import Batches, HostBatch
from gpt_pretrain.data.loader import load
from gpt_pretrain.parallel.placement import Placement
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.start import Start

Fed = Iterator[tuple[HostBatch, jax.Array]]


def feed(built: Built, start: Start) -> Fed:
    """The batches of a run from its start to its end: (this process's rows, the global array on the devices)."""
    batches = Batches(
        built.data.sources("train"),
        start.plan,
        vocab_size=built.spec.vocab_size,
        first_index=start.step,
        num_steps=built.total_steps - start.step,
        rows_of=built.placement.rows,
    )
    return prefetch_to_devices(load(batches), built.placement)


def prefetch_to_devices(batches: Iterable[HostBatch], placement: Placement, depth: int = 2) -> Fed:
    """Yields (batch, its tokens on the devices) with `depth` transfers under way ahead of the step."""
    pairs = ((each, placement.to_devices(each.tokens, each.batch_size)) for each in batches)
    queue = collections.deque(itertools.islice(pairs, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(pairs, 1))

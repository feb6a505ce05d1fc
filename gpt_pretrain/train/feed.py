"""Batches on their way to the devices."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax

from gpt_pretrain.data.batches import Batches, HostBatch
from gpt_pretrain.data.fetching import FetchAhead
from gpt_pretrain.data.loader import load
from gpt_pretrain.parallel.placement import Placement
from gpt_pretrain.train import report
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.start import Start

Fed = Iterator[tuple[HostBatch, jax.Array]]


def fetch_ahead(built: Built, start: Start) -> FetchAhead:
    """Begins to fetch what the steps of a run need of datasets in buckets; does nothing where there are none."""
    fetching = FetchAhead(
        built.data.read_sources(),
        start.plan,
        first_index=start.step,
        num_steps=built.total_steps - start.step,
        say=report.say_first_batch if jax.process_index() == 0 else lambda _: None,
    )
    fetching.start()
    return fetching


def feed(built: Built, start: Start, on_step: Callable[[int], None] = lambda step_index: None) -> Fed:
    """The batches of a run from its start to its end: (this process's rows, the global array on the devices).

    `on_step` as for `Batches`.
    """
    batches = Batches(
        built.data.read_sources(),
        start.plan,
        vocab_size=built.spec.vocab_size,
        first_index=start.step,
        num_steps=built.total_steps - start.step,
        rows_of=built.placement.rows,
        on_step=on_step,
    )
    return prefetch_to_devices(load(batches), built.placement)


def prefetch_to_devices(batches: Iterable[HostBatch], placement: Placement, depth: int = 2) -> Fed:
    """Yields (batch, its tokens on the devices) with `depth` transfers under way ahead of the step."""
    pairs = ((each, placement.to_devices(each.tokens, each.batch_size)) for each in batches)
    queue = collections.deque(itertools.islice(pairs, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(pairs, 1))

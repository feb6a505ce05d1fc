"""Which stream each example comes from: exact proportions, at any position, both ways."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from gpt_pretrain.data import order


def counts_of(weights: Sequence[float], block: int) -> tuple[int, ...]:
    """How many examples of each stream a block of `block` examples has, by largest remainder.

    [0.5, 0.3, 0.2], 1000 -> (500, 300, 200). ValueError where a stream would get none.
    """
    if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"mixture weights {list(weights)}: expected numbers above 0")
    # The decimals as they are written, exactly: rounding would decide ties, and `sum` of floats differs between
    # versions of Python.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight * block / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    # Ties go to the earlier stream, so that the result is a function of the weights alone.
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for index in by_remainder[: block - sum(counts)]:
        counts[index] += 1
    if 0 in counts:
        raise ValueError(
            f"mixture weights {list(weights)}: one of them is less than 1 in {block}, so that a block of "
            f"data.mixture_block={block} examples has none of it. Raise data.mixture_block."
        )
    return tuple(counts)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An endless sequence of streams in which every block of `sum(counts)` examples has exactly `counts` of each.

    Offsets count examples from where the mixture begins; draws count those of one stream among them, so that
    each stream is seen in its own order, without gap or repetition.
    """

    counts: tuple[int, ...]
    seed: int = 0
    salt: str = ""  # tells the mixtures of a run's plan apart

    @property
    def block(self) -> int:
        return sum(self.counts)

    def at(self, offsets) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (any shape) -> (which stream, which draw of it), int64 each."""
        offsets = np.asarray(offsets, np.int64)
        if len(self.counts) == 1:
            return np.zeros_like(offsets), offsets
        streams, draws = np.empty_like(offsets), np.empty_like(offsets)
        blocks, slots = np.divmod(offsets, self.block)
        counts = np.array(self.counts)
        for number, chosen in order.grouped(blocks):
            layout = _layout(self, number)
            streams.flat[chosen] = layout.streams[slots.flat[chosen]]
            draws.flat[chosen] = layout.ranks[slots.flat[chosen]]
        return streams, blocks * counts[streams] + draws

    def offsets_of(self, stream: int, draws) -> np.ndarray:
        """Draws of one stream -> offsets: the inverse of `at`. int64."""
        draws = np.asarray(draws, np.int64)
        if len(self.counts) == 1:
            return draws
        blocks, ranks = np.divmod(draws, self.counts[stream])
        offsets = np.empty_like(draws)
        for number, chosen in order.grouped(blocks):
            offsets.flat[chosen] = number * self.block + _layout(self, number).slots[stream][ranks.flat[chosen]]
        return offsets

    def draws_before(self, offset: int) -> tuple[int, ...]:
        """How many of the first `offset` examples come from each stream."""
        number, rest = divmod(offset, self.block)
        begun = _layout(self, number).streams[:rest]
        return tuple(number * count + int((begun == i).sum()) for i, count in enumerate(self.counts))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One block: the stream of each slot, its rank among that stream's slots, and the slots of each stream."""

    streams: np.ndarray
    ranks: np.ndarray
    slots: tuple[np.ndarray, ...]


@functools.lru_cache(maxsize=64)
def _layout(mixture: Mixture, number: int) -> _Layout:
    labels = np.repeat(np.arange(len(mixture.counts)), mixture.counts)
    round_keys = order.key(mixture.seed, number, f"mixture{mixture.salt}")
    streams = labels[order.permute(np.arange(mixture.block), mixture.block, round_keys)]
    slots = tuple(np.flatnonzero(streams == i) for i in range(len(mixture.counts)))
    ranks = np.empty(mixture.block, np.int64)
    for places in slots:
        ranks[places] = np.arange(len(places))
    return _Layout(streams, ranks, slots)

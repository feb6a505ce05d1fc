"""The order of one token stream's windows, as a function that can be asked both ways.

The windows of a stream are seen in an endless sequence, epoch after epoch; inside an epoch they are
shuffled by a keyed permutation. Nothing is stored and nothing is drawn from a stateful generator, so
"which window has index i" and "which index has window w in epoch e" both cost O(1) and need only the
fields of `WindowOrder`.

The permutation is a Feistel network over the smallest even-bit domain that holds the number of things
to permute; a value that leaves the range is encrypted again until it comes back ("cycle walking",
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The domain is less than four times
as large, so that takes fewer than four rounds on average. docs/data-order.md has it in full, with
test vectors.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

Shuffle = Literal["global", "block", "none"]
SHUFFLES = ("global", "block", "none")
_NUM_ROUNDS = 6  # Luby-Rackoff needs 4 with ideal round functions; ours is a 64-bit hash finalizer.


@dataclasses.dataclass(frozen=True)
class WindowOrder:
    """The endless sequence in which a stream's windows are seen.

    Attributes:
      num_windows: how many windows the stream holds.
      seed: of the order; every epoch of every seed has its own permutation.
      stream: the stream's fingerprint, so that two streams of one length are shuffled apart.
      shuffle: "global" permutes all windows. "block" permutes blocks of `block_windows` consecutive windows,
        then the windows within each group of `group_blocks` blocks: reads stay within a group's blocks for
        a while, which suits disks and object stores. "none" keeps the stream's own order.
    """

    num_windows: int
    seed: int = 0
    stream: str = ""
    shuffle: Shuffle = "global"
    block_windows: int = 1024
    group_blocks: int = 32

    def windows_at(self, indices) -> np.ndarray:
        """Indices of the endless sequence (>= 0, any shape) -> windows in [0, num_windows), int64."""
        indices = np.asarray(indices, np.int64)
        if indices.size and indices.min() < 0:
            raise ValueError(f"index {indices.min()} is negative; the sequence counts from 0")
        epochs, offsets = np.divmod(indices, self.num_windows)
        windows = np.empty_like(offsets)
        for epoch, chosen in grouped(epochs):
            windows.flat[chosen] = self._shuffled(offsets.flat[chosen], epoch)
        return windows

    def indices_of(self, windows, epoch: int) -> np.ndarray:
        """Windows -> their indices in `epoch`: the inverse of `windows_at`. int64."""
        windows = np.asarray(windows, np.int64)
        if windows.size and not (windows.min() >= 0 and windows.max() < self.num_windows):
            raise ValueError(
                f"window out of range: found [{windows.min()}, {windows.max()}], expected [0, {self.num_windows})"
            )
        return epoch * self.num_windows + self._unshuffled(windows, epoch)

    def _key(self, epoch: int, part: str = "") -> np.ndarray:
        return key(self.seed, epoch, part, self.stream)

    def _shuffled(self, offsets: np.ndarray, epoch: int) -> np.ndarray:
        if self.shuffle == "none":
            return offsets
        if self.shuffle == "global" or self._num_blocks < 2:
            return permute(offsets, self.num_windows, self._key(epoch))
        # A block's slot is its place among the permuted blocks. What is left of the stream after the last
        # whole block is a short block of its own, always in the last slot.
        inner = self._in_groups(offsets, epoch, permute)
        slots, within = np.divmod(inner, self.block_windows)
        blocks, whole = slots.copy(), slots < self._num_blocks
        blocks[whole] = permute(slots[whole], self._num_blocks, self._key(epoch, "blocks"))
        return blocks * self.block_windows + within

    def _unshuffled(self, windows: np.ndarray, epoch: int) -> np.ndarray:
        if self.shuffle == "none":
            return windows
        if self.shuffle == "global" or self._num_blocks < 2:
            return unpermute(windows, self.num_windows, self._key(epoch))
        blocks, within = np.divmod(windows, self.block_windows)
        slots, whole = blocks.copy(), blocks < self._num_blocks
        slots[whole] = unpermute(blocks[whole], self._num_blocks, self._key(epoch, "blocks"))
        return self._in_groups(slots * self.block_windows + within, epoch, unpermute)

    @property
    def _num_blocks(self) -> int:
        return self.num_windows // self.block_windows

    def _in_groups(self, offsets: np.ndarray, epoch: int, function) -> np.ndarray:
        """Permutes offsets within their groups of slots; the last group takes what is left."""
        size = self.block_windows * self.group_blocks
        num_groups = max(1, self.num_windows // size)
        groups = np.minimum(offsets // size, num_groups - 1)
        out = np.empty_like(offsets)
        for group, chosen in grouped(groups):
            first = group * size
            group_size = size if group < num_groups - 1 else self.num_windows - first
            round_keys = self._key(epoch, f"group{group}")
            out.flat[chosen] = first + function(offsets.flat[chosen] - first, group_size, round_keys)
        return out


def grouped(numbers: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Each number that occurs, and the flat indices where it does. [5, 5, 3] -> (3, [2]), (5, [0, 1])."""
    numbers = numbers.reshape(-1)
    if numbers.size and numbers.min() == numbers.max():
        yield int(numbers[0]), slice(None)
    elif numbers.size:
        by_number = np.argsort(numbers, kind="stable")
        ends = np.flatnonzero(np.diff(numbers[by_number])) + 1
        for chosen in np.split(by_number, ends):
            yield int(numbers[chosen[0]]), chosen


@functools.lru_cache(maxsize=256)
def key(seed: int, epoch: int, part: str = "", stream: str = "") -> np.ndarray:
    """The round keys, uint64 (rounds,), of one epoch of one seed; `part` separates several permutations there.

    Only `stream` may hold a slash: it comes last, so that no two keys are made of one text.
    """
    text = f"order/{seed}/{epoch}/{part}/{stream}"
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def permute(indices, size: int, round_keys: np.ndarray) -> np.ndarray:
    """Applies the permutation of [0, size) that `round_keys` selects. int64 in, int64 out."""
    return _cycle_walk(indices, size, round_keys, _encrypt)


def unpermute(indices, size: int, round_keys: np.ndarray) -> np.ndarray:
    """The inverse of `permute`."""
    return _cycle_walk(indices, size, round_keys, _decrypt)


def _cycle_walk(indices, size, round_keys, step) -> np.ndarray:
    indices = np.asarray(indices, np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(f"index out of range: found [{indices.min()}, {indices.max()}], expected [0, {size})")
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    rounds = [functools.partial(_round, round_key=round_key, half_bits=half_bits) for round_key in round_keys]
    if indices.size >= 1 << half_bits:
        # As many indices as there are halves: hash every half once, and look it up each time it comes by.
        rounds = [round_(np.arange(1 << half_bits)).take for round_ in rounds]
    values = step(indices.reshape(-1), half_bits, rounds)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = step(values[outside], half_bits, rounds)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.reshape(indices.shape)


def _encrypt(values, half_bits, rounds) -> np.ndarray:
    left, right = values >> half_bits, values & ((1 << half_bits) - 1)
    for round_ in rounds:
        left, right = right, left ^ round_(right)
    return (left << half_bits) | right


def _decrypt(values, half_bits, rounds) -> np.ndarray:
    left, right = values >> half_bits, values & ((1 << half_bits) - 1)
    for round_ in reversed(rounds):
        left, right = right ^ round_(left), left
    return (left << half_bits) | right


def _round(half_values, *, round_key, half_bits) -> np.ndarray:
    """A keyed hash of each half, `half_bits` wide (the constants are MurmurHash3's 64-bit finalizer). int64."""
    x = half_values.astype(np.uint64) + round_key  # uint64 arithmetic wraps, as it should here
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    return (x >> np.uint64(64 - half_bits)).astype(np.int64)

"""The order of training, as a function that can be asked both ways.

Position `p` of a run (how many examples came before it) lies in epoch `p // num_windows`; inside an
epoch the windows are shuffled by a keyed permutation. Nothing is stored and nothing is drawn from a
stateful generator, so "which window is at position p" and "at which position is window w" both cost
O(1) and need only (num_windows, seed).

The permutation is a Feistel network over the smallest even-bit domain that holds `num_windows`
indices; an index that leaves the range is encrypted again until it comes back ("cycle walking",
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The domain is less than four times
`num_windows`, so that takes fewer than four rounds on average.
"""

import hashlib

import numpy as np

_NUM_ROUNDS = 6  # Luby-Rackoff needs 4 with ideal round functions; ours is a 64-bit hash finalizer.


def window_at(positions, *, num_windows: int, seed: int) -> np.ndarray:
    """Positions in the run -> the windows that are trained on there.

    Args:
      positions: integers >= 0, any shape.
      num_windows: how many windows the split holds.
      seed: of the order; every epoch of every seed has its own permutation.

    Returns:
      int64 window indices in [0, num_windows), of the shape of `positions`.
    """
    positions = np.asarray(positions, np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"position {positions.min()} is negative; positions count from 0")
    epochs, offsets = np.divmod(positions, num_windows)
    windows = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(offsets[chosen], num_windows, key(seed, int(epoch)))
    return windows


def position_of(windows, epoch: int, *, num_windows: int, seed: int) -> np.ndarray:
    """Windows -> the positions at which a run meets them in `epoch`: the inverse of `window_at`."""
    offsets = unpermute(windows, num_windows, key(seed, epoch))
    return epoch * num_windows + offsets


def key(seed: int, epoch: int) -> np.ndarray:
    """The round keys, uint64 (rounds,), of one epoch of one seed."""
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
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
    values = step(indices.reshape(-1).astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = step(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(indices.shape)


def _encrypt(values, half_bits, round_keys) -> np.ndarray:
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        left, right = right, left ^ _round(right, round_key, half_bits)
    return (left << half) | right


def _decrypt(values, half_bits, round_keys) -> np.ndarray:
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> half, values & mask
    for round_key in reversed(round_keys):
        left, right = right ^ _round(left, round_key, half_bits), left
    return (left << half) | right


def _round(half_values, round_key, half_bits) -> np.ndarray:
    """A keyed hash of each half, `half_bits` wide (the constants are MurmurHash3's 64-bit finalizer)."""
    x = half_values + round_key  # uint64 arithmetic wraps, as it should here
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(64 - half_bits)

"""Bins of document lengths: exact below 2,048 tokens, at most 0.1 % wide above."""

import numpy as np
from numpy.typing import ArrayLike

EXACT_BELOW = 2048  # tokens; a power of two


def length_bins(lengths: np.ndarray) -> np.ndarray:
    """Lengths in [0, 2**52) -> numbers of their bins: int64, of the same shape.

    Each octave from 2,048 on has 1,024 bins of equal width:

    >>> length_bins(np.array([2047, 4100])).tolist()
    [2047, 3073]
    """
    bits = np.frexp(lengths.astype(np.float64))[1].astype(np.int64)
    shifts = np.maximum(bits - (EXACT_BELOW.bit_length() - 1), 0)
    return (lengths >> shifts) + shifts * (EXACT_BELOW // 2)


def bin_starts(bins: ArrayLike) -> np.ndarray:
    """Numbers of bins -> the least lengths in them, int64: the inverse of `length_bins`.

    >>> bin_starts([2047, 3073]).tolist()
    [2047, 4100]
    """
    bins = np.asarray(bins, np.int64)
    shifts = np.maximum(bins // (EXACT_BELOW // 2) - 1, 0)
    return (bins - shifts * (EXACT_BELOW // 2)) << shifts


def quantile(counts_B: np.ndarray, percent: int) -> int:
    """Least length such that the bins up to its own hold `percent` % of the counts; 0 of none."""
    if not counts_B.any():
        return 0
    rank = max(1, -(-int(counts_B.sum()) * percent // 100))
    return int(bin_starts(np.searchsorted(np.cumsum(counts_B), rank)))

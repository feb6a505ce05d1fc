"""Where a curve leaps up for a moment."""

from typing import NamedTuple

import numpy as np

from gpt_pretrain.history.curves import Curve

_BEFORE = 64  # points that say what is usual
_FEWEST = 16
_DEVIATIONS = 8.0  # from the median of these, in standard deviations as their median deviation gives them


class Spike(NamedTuple):
    """The highest point of one leap.

    Attributes:
      usual: the median of the points before.
    """

    step: int
    value: float
    usual: float


def spikes_of(curve: Curve, *, least_ratio: float, most: int) -> list[Spike]:
    """The highest `most` spikes, in their order.

    A point is part of one if it is at least `least_ratio` times the median of the 64 points before it and 8 of their
    standard deviations above it (as their median deviation gives them, which spikes among them do not change); spikes
    that less than 16 points lie between are one. The first 16 points are none.
    """
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if len(values) <= _FEWEST:
        return []
    padded = np.concatenate([np.full(_BEFORE - _FEWEST, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, _BEFORE)[:-1]  # of point 16 and those after it
    usual, deviation = np.empty(len(windows)), np.empty(len(windows))
    for first in range(0, len(windows), 1 << 14):  # a window each would be much memory
        part = slice(first, first + (1 << 14))
        some = windows[part]
        usual[part] = np.nanmedian(some, axis=1)
        deviation[part] = 1.4826 * np.nanmedian(np.abs(some - usual[part, None]), axis=1)
    here = values[_FEWEST:]
    is_high = (here > usual + _DEVIATIONS * deviation) & (here > least_ratio * np.abs(usual))
    high = np.flatnonzero(is_high)
    if not len(high):
        return []
    groups = np.split(high, np.flatnonzero(np.diff(high) >= _FEWEST) + 1)
    tops = [int(group[np.argmax(here[group])]) for group in groups]
    tops = sorted(sorted(tops, key=lambda i: here[i] / max(abs(usual[i]), 1e-30), reverse=True)[:most])
    return [Spike(int(steps[_FEWEST + i]), float(here[i]), float(usual[i])) for i in tops]

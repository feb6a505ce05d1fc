"""A stream as a stage sees it: its endless sequence from one index on, without what is left out or replaced."""

import functools
from collections.abc import Sequence

import numpy as np

from gpt_pretrain.data.order import WindowOrder
from gpt_pretrain.data.row_edits import Substitution


class Passage:
    """A stream's endless sequence from one index on, without the excluded windows; draws count from there.

    The excluded ones are stepped over: the rest keeps its order, and is seen once an epoch as before. From draw
    `begin` on, substituted windows are replaced.
    """

    def __init__(
        self,
        window_order: WindowOrder,
        start: int,
        excluded: Sequence[int],
        substitution: Substitution | None = None,
        begin: int = 0,
    ):
        self.order, self._start = window_order, start
        self._substitution, self._begin = substitution, begin
        self._excluded = np.array(excluded, np.int64)
        self._known_holes: dict[int, np.ndarray] = {}
        self._num_left = window_order.num_windows - len(excluded)  # in a whole epoch
        self._first_epoch, offset = divmod(start, window_order.num_windows)
        self._skipped = offset - self._num_excluded_before(self._first_epoch, offset)  # left ones before the start

    def _holes(self, epoch: int) -> np.ndarray:
        """Offsets in an epoch of the excluded windows, ascending. Keeps those of the two epochs asked for last."""
        holes = self._known_holes.get(epoch)
        if holes is None:
            holes = np.sort(self.order.indices_of(self._excluded, epoch)) - epoch * self.order.num_windows
            self._known_holes = dict([*self._known_holes.items(), (epoch, holes)][-2:])
        return holes

    def _num_excluded_before(self, epoch: int, offset: int) -> int:
        return int(np.searchsorted(self._holes(epoch), offset)) if len(self._excluded) else 0

    def windows_at(self, draws: np.ndarray) -> np.ndarray:
        indices = self.indices_at(draws)
        windows = self.order.windows_at(indices)
        if self._substitution:
            replaced, spares = self.substitutes
            if len(replaced):
                places = np.minimum(np.searchsorted(replaced, indices), len(replaced) - 1)
                windows = np.where(replaced[places] == indices, spares[places], windows)
        return windows

    def planned_at(self, draws: np.ndarray) -> np.ndarray:
        """Without the substitution."""
        return self.order.windows_at(self.indices_at(draws))

    @functools.cached_property
    def substitutes(self) -> tuple[np.ndarray, np.ndarray]:
        """(indices at which another window is seen, ascending; these windows). ValueError where there are too few."""
        if not self._substitution:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        targets = np.array(self._substitution.windows, np.int64)
        begin = int(self.indices_at(np.array([self._begin]))[0])
        indices = np.sort(self.order.indices_of(np.setdiff1d(targets, self._excluded), 0))
        indices = indices[(indices >= begin) & (indices < self._substitution.until)]
        left_out = np.union1d(targets, self._excluded)
        return indices, spare_windows(self.order, left_out, self._substitution.until, len(indices))

    def indices_at(self, draws: np.ndarray) -> np.ndarray:
        """Draws -> indices of the endless sequence."""
        if not len(self._excluded):
            return self._start + draws
        epochs, ranks = np.divmod(draws + self._skipped, self._num_left)
        epochs += self._first_epoch
        indices = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            holes = self._holes(epoch)
            # Before hole number h there are h holes, and its offset less h windows that are left.
            jumped = np.searchsorted(holes - np.arange(len(holes)), ranks[chosen], side="right")
            indices[chosen] = epoch * self.order.num_windows + ranks[chosen] + jumped
        return indices

    def about_next(self, windows: np.ndarray, num_draws: int) -> np.ndarray:
        """About how many draws after so many each window comes next; as if none were excluded."""
        now = int(self.indices_at(np.array([num_draws]))[0])
        epoch = now // self.order.num_windows
        here, later = (self.order.indices_of(windows, each) for each in (epoch, epoch + 1))
        return np.where(here >= now, here, later) - now

    def whole_epochs(self, num_draws: int) -> int | None:
        """How many epochs have ended with that many draws, if one ends just there."""
        epochs, rest = divmod(num_draws + self._skipped, self._num_left)
        return None if rest else self._first_epoch + epochs

    def draws_of(self, windows, num_draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every draw among the first `num_draws` that gives one of the windows: (draws, windows, epochs)."""
        draws, planned, epochs = self.planned_draws_of(windows, num_draws)
        if not self._substitution:
            return draws, planned, epochs
        replaced, spares = self.substitutes
        stays = ~np.isin(self.indices_at(draws), replaced)
        chosen = np.isin(spares, np.asarray(windows, np.int64))
        # Of epoch 0, in which the stage then began: what is before its first draw is skipped.
        offsets, spares = replaced[chosen], spares[chosen]
        before = np.searchsorted(self._holes(0), offsets) if len(self._excluded) else 0
        others = offsets - before - self._skipped
        inside = others < num_draws
        return (
            np.concatenate([draws[stays], others[inside]]),
            np.concatenate([planned[stays], spares[inside]]),
            np.concatenate([epochs[stays], np.zeros(int(inside.sum()), np.int64)]),
        )

    def planned_draws_of(self, windows, num_draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`draws_of` without the substitution."""
        windows = np.setdiff1d(np.asarray(windows, np.int64), self._excluded)
        parts: list[tuple[np.ndarray, ...]] = []
        last = (num_draws + self._skipped) // self._num_left
        for epoch in range(self._first_epoch, self._first_epoch + last + 1):
            offsets = self.order.indices_of(windows, epoch) - epoch * self.order.num_windows
            before = np.searchsorted(self._holes(epoch), offsets) if len(self._excluded) else 0
            draws = (epoch - self._first_epoch) * self._num_left + offsets - before - self._skipped
            inside = (draws >= self._begin) & (draws < num_draws)
            parts.append((draws[inside], windows[inside], np.full(int(inside.sum()), epoch)))
        draws, windows, epochs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return draws, windows, epochs

    def replaced_of(self, windows, num_draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every draw among the first `num_draws` at which another window is seen instead of one of these: (draws,
        windows, those that are seen)."""
        draws, windows, _ = self.planned_draws_of(windows, num_draws)
        replaced, spares = self.substitutes
        is_replaced = np.isin(indices := self.indices_at(draws), replaced)
        draws, windows, indices = draws[is_replaced], windows[is_replaced], indices[is_replaced]
        return draws, windows, spares[np.searchsorted(replaced, indices)]


def spare_windows(order: WindowOrder, left_out: np.ndarray, first: int, count: int) -> np.ndarray:
    """The first `count` windows of epoch 0 from index `first` on that are not among `left_out`.

    Raises ValueError where there are fewer.
    """
    found, num_found = [np.empty(0, np.int64)], 0
    while num_found < count:
        some = order.windows_at(np.arange(first, min(order.num_windows, first + 2 * count + 1024)))
        if not len(some):
            raise ValueError(f"{count} windows are substituted, but there are {num_found} to take their place")
        first += len(some)
        found.append(some[~np.isin(some, left_out)])
        num_found += len(found[-1])
    return np.concatenate(found)[:count]

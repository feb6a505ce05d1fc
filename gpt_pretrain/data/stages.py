"""A stage: a stretch of a run with one order. Which examples its batches hold, and where each window is seen.

Users count steps from 1. Here a step's *index* counts from 0: it is the number of updates made before.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.store.typed import Count
from gpt_pretrain import checks
from gpt_pretrain.data.mixture import Mixture
from gpt_pretrain.data.order import Shuffle, WindowOrder


@dataclasses.dataclass(frozen=True)
class Stream:
    """One token stream within a stage.

    Attributes:
      name: in a mixture; "" for one alone.
      fingerprint: of the dataset. It is what the stream is known by: it keeps its order and its place in it
        under another name, in a mixture or alone.
      num_tokens: of its training split.
      count: how many examples of each block of the mixture are from it.
      start: index in its endless sequence (see `WindowOrder`) at which the stage begins.
      excluded: windows that are left out, ascending.
    """

    name: str
    fingerprint: str
    num_tokens: Count
    count: Count = 1
    start: Count = 0
    excluded: tuple[Count, ...] = ()


class BatchIndex(NamedTuple):
    """Which examples a step consumes, in the order of the rows of the global batch."""

    step_index: int
    position: int  # of row 0
    streams: np.ndarray  # int64 (batch_size,): index into the stage's streams
    windows: np.ndarray  # int64 (batch_size,)


class Occurrence(NamedTuple):
    """One place of the run at which a window is seen."""

    step_index: int
    row: int  # of the global batch
    position: int
    window: int
    epoch: int  # of its stream, from 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of a run in which the order's parameters do not change.

    Attributes:
      from_step, from_position: updates made and examples seen before it.
      batch_sizes: (updates made, size) pairs, ascending from 0: after so many updates, batches have that size.
      change: what was changed at its beginning, in words.

    Raises ValueError for what has no order: a stream without a window, or with none that is not excluded.
    """

    seed: int
    seq_len: Count
    batch_sizes: tuple[tuple[Count, Count], ...]
    streams: tuple[Stream, ...]
    shuffle: Shuffle = "global"
    block_windows: Count = 1024
    group_blocks: Count = 32
    from_step: Count = 0
    from_position: Count = 0
    change: str = "start"

    def __post_init__(self):
        firsts, sizes = zip(*self.batch_sizes or [(-1, 0)], strict=True)
        if firsts[0] != 0 or list(firsts) != sorted(set(firsts)) or min(sizes) < 1:
            raise ValueError(
                f"train.batch_size: found {sizes_in_words([*self.batch_sizes])}; expected sizes of at least 1, the "
                "first from step 1, each from a later step than the one before"
            )
        for name in ("seq_len", "block_windows", "group_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.streams or min(stream.count for stream in self.streams) < 1:
            raise ValueError("streams: expected at least one, with counts of at least 1")
        for i in range(len(self.streams)):
            self._check_stream(i)

    def _check_stream(self, index: int) -> None:
        stream, num_windows = self.streams[index], self.num_windows(index)
        label, excluded = label_of(stream), stream.excluded
        if num_windows < 1:
            raise ValueError(
                f"{label}: data.seq_len={self.seq_len} needs {self.seq_len + 1} tokens for one window; "
                f"the stream holds {stream.num_tokens}"
            )
        if list(excluded) != sorted(set(excluded)):
            raise ValueError(f"{label}: the excluded windows are not ascending")
        if excluded and not (excluded[0] >= 0 and excluded[-1] < num_windows):
            raise ValueError(
                f"{label}: found excluded windows from {excluded[0]} to {excluded[-1]}, expected [0, {num_windows})"
            )
        if len(excluded) == num_windows:
            raise ValueError(f"{label}: all of its {num_windows} windows are excluded, nothing is left to train on")
        for other in self.streams[:index]:
            if other.name == stream.name or other.fingerprint == stream.fingerprint:
                raise ValueError(
                    f"{label} and {label_of(other)} are one dataset, expected different ones in a mixture. "
                    "Raise the weight of one and leave the other out."
                )

    def num_windows(self, stream: int) -> int:
        """Windows of one stream; each has `seq_len` inputs and one more token, shared with the next."""
        return (self.streams[stream].num_tokens - 1) // self.seq_len

    def batch_size(self, step_index: int) -> int:
        """Of one step."""
        return [size for first, size in self.batch_sizes if first <= step_index][-1]

    def batch_sizes_from(self, step_index: int) -> list[int]:
        """Of a step and of later ones, as the schedule has them."""
        return [size for _, size in sizes_from(self.batch_sizes, step_index)]

    def position(self, step_index: int) -> int:
        """How many examples came before a step, which is not before the stage."""
        position = self.from_position
        for first, last, size in self._stretches:
            position += size * (min(step_index, last) - first if step_index > first else 0)
        return position

    def steps_at(self, positions) -> np.ndarray:
        """The index of the step that consumes each position."""
        positions = np.asarray(positions, np.int64)
        steps = np.full_like(positions, self.from_step)
        begin = self.from_position
        for first, last, size in self._stretches:
            later = positions >= begin
            steps[later] = first + (positions[later] - begin) // size
            begin += size * (last - first)
        return steps

    @functools.cached_property
    def _stretches(self) -> list[tuple[int, int, int]]:
        """(index of the first step, of the step after the last, batch size) of each stretch of one batch size."""
        firsts = [max(first, self.from_step) for first, _ in self.batch_sizes]
        lasts = [*firsts[1:], 1 << 62]
        sizes = [size for _, size in self.batch_sizes]
        return [part for part in zip(firsts, lasts, sizes, strict=True) if part[0] < part[1]]

    def examples_at(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """Positions within the stage (any shape) -> (stream indices, windows), int64 each."""
        streams, draws = self._mixture.at(np.asarray(positions, np.int64) - self.from_position)
        windows = np.empty_like(draws)
        for index in np.unique(streams).tolist():
            chosen = streams == index
            windows[chosen] = self._passage(index).windows_at(draws[chosen])
        return streams, windows

    def occurrences(self, stream: int, windows, stop: int) -> list[Occurrence]:
        """Every time that one of the windows of a stream is seen in the stage before position `stop`."""
        stop_offset = stop - self.from_position
        num_draws = self._mixture.draws_before(stop_offset)[stream]
        draws, windows, epochs = self._passage(stream).draws_of(windows, num_draws)
        positions = self.from_position + self._mixture.offsets_of(stream, draws)
        steps = self.steps_at(positions)
        found = [
            Occurrence(
                int(step_index), int(position - self.position(int(step_index))), int(position), int(window), int(epoch)
            )
            for step_index, position, window, epoch in zip(steps, positions, windows, epochs, strict=True)
        ]
        return sorted(found)

    def index_after(self, stream: int, position: int) -> int:
        """Index in a stream's endless sequence of the next window of it that is seen at `position` or later."""
        draws = self._mixture.draws_before(position - self.from_position)[stream]
        return int(self._passage(stream).indices_at(np.array([draws]))[0])

    def about_next(self, stream: int, windows: np.ndarray, position: int) -> np.ndarray:
        """About how many examples after `position` each window of a stream is seen next: float64, of the same shape."""
        draws = self._mixture.draws_before(position - self.from_position)[stream]
        return self._passage(stream).about_next(windows, draws) * (self._mixture.block / self.streams[stream].count)

    def epochs(self, stream: int, position: int) -> float:
        """How often a stream has been seen before `position`: whole where an epoch's last window was just seen."""
        draws = self._mixture.draws_before(position - self.from_position)[stream]
        whole = self._passage(stream).whole_epochs(draws)
        return self.index_after(stream, position) / self.num_windows(stream) if whole is None else float(whole)

    @functools.cached_property
    def _mixture(self) -> Mixture:
        return Mixture(tuple(stream.count for stream in self.streams), self.seed, str(self.from_position or ""))

    def _passage(self, stream: int) -> "_Passage":
        return self._passages[stream]

    @functools.cached_property
    def _passages(self) -> tuple["_Passage", ...]:
        shuffle = self.shuffle, self.block_windows, self.group_blocks
        return tuple(
            _Passage(WindowOrder(self.num_windows(i), self.seed, each.fingerprint, *shuffle), each.start, each.excluded)
            for i, each in enumerate(self.streams)
        )


class _Passage:
    """A stream's endless sequence from one index on, without the excluded windows; draws count from there.

    The excluded ones are stepped over: the rest keeps its order, and is seen once an epoch as before.
    """

    def __init__(self, window_order: WindowOrder, start: int, excluded: Sequence[int]):
        self._order, self._start = window_order, start
        self._excluded = np.array(excluded, np.int64)
        self._known_holes: dict[int, np.ndarray] = {}
        self._num_left = window_order.num_windows - len(excluded)  # in a whole epoch
        self._first_epoch, offset = divmod(start, window_order.num_windows)
        self._skipped = offset - self._num_excluded_before(self._first_epoch, offset)  # left ones before the start

    def _holes(self, epoch: int) -> np.ndarray:
        """Offsets in an epoch of the excluded windows, ascending. Keeps those of the two epochs asked for last."""
        holes = self._known_holes.get(epoch)
        if holes is None:
            holes = np.sort(self._order.indices_of(self._excluded, epoch)) - epoch * self._order.num_windows
            self._known_holes = dict([*self._known_holes.items(), (epoch, holes)][-2:])
        return holes

    def _num_excluded_before(self, epoch: int, offset: int) -> int:
        return int(np.searchsorted(self._holes(epoch), offset)) if len(self._excluded) else 0

    def windows_at(self, draws: np.ndarray) -> np.ndarray:
        return self._order.windows_at(self.indices_at(draws))

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
            indices[chosen] = epoch * self._order.num_windows + ranks[chosen] + jumped
        return indices

    def about_next(self, windows: np.ndarray, num_draws: int) -> np.ndarray:
        """About how many draws after so many each window comes next; as if none were excluded."""
        now = int(self.indices_at(np.array([num_draws]))[0])
        epoch = now // self._order.num_windows
        here, later = (self._order.indices_of(windows, each) for each in (epoch, epoch + 1))
        return np.where(here >= now, here, later) - now

    def whole_epochs(self, num_draws: int) -> int | None:
        """How many epochs have ended with that many draws, if one ends just there."""
        epochs, rest = divmod(num_draws + self._skipped, self._num_left)
        return None if rest else self._first_epoch + epochs

    def draws_of(self, windows, num_draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every draw among the first `num_draws` that gives one of the windows: (draws, windows, epochs)."""
        windows = np.setdiff1d(np.asarray(windows, np.int64), self._excluded)
        parts: list[tuple[np.ndarray, ...]] = []
        last = (num_draws + self._skipped) // self._num_left
        for epoch in range(self._first_epoch, self._first_epoch + last + 1):
            offsets = self._order.indices_of(windows, epoch) - epoch * self._order.num_windows
            before = np.searchsorted(self._holes(epoch), offsets) if len(self._excluded) else 0
            draws = (epoch - self._first_epoch) * self._num_left + offsets - before - self._skipped
            inside = (draws >= 0) & (draws < num_draws)
            parts.append((draws[inside], windows[inside], np.full(int(inside.sum()), epoch)))
        draws, windows, epochs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return draws, windows, epochs


def label_of(stream: Stream) -> str:
    return stream.name or "the dataset"


def batch_sizes_of(name: str, given: object) -> tuple[tuple[int, int], ...]:
    """A setting, a size or a schedule of them -> (updates made, size) pairs, the first from 0.

    >>> batch_sizes_of("train.batch_size", 64), batch_sizes_of("train.batch_size", [(0, 64), (1000, 512)])
    (((0, 64),), ((0, 64), (1000, 512)))

    Raises ValueError where it is neither.
    """
    schedule: tuple[tuple[int, int], ...] = ()
    try:
        pairs = given if isinstance(given, Sequence) and not isinstance(given, str) else ((0, given),)
        schedule = tuple(
            (
                checks.whole_number("updates made", first, least=0),
                checks.whole_number("size", size, least=1, most=checks.MOST_ROWS),
            )
            for first, size in pairs
        )
        firsts = [first for first, _ in schedule]
        good = firsts[0] == 0 and firsts == sorted(set(firsts))
    except (TypeError, ValueError, IndexError):
        good = False
    if not good:
        raise ValueError(
            f"{name}: found {given!r}, expected a size, or ((0, size), (updates made, size), ...) with "
            "ascending numbers of updates"
        )
    return schedule


def sizes_in_words(batch_sizes: list[tuple[int, int]]) -> str:
    return ", ".join(
        f"{size}" + (f" from step {first + 1}" if i else "") for i, (first, size) in enumerate(batch_sizes)
    )


def sizes_from(batch_sizes: tuple[tuple[int, int], ...], step_index: int) -> list[tuple[int, int]]:
    """The schedule as far as it concerns a step and later ones."""
    begun = [size for first, size in batch_sizes if first <= step_index][-1:]
    out = [(step_index, size) for size in begun]
    for first, size in batch_sizes:
        if first > step_index and (not out or out[-1][1] != size):
            out.append((first, size))
    return out

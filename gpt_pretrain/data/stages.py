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
from gpt_pretrain.data.passage import Passage
from gpt_pretrain.data.row_edits import Insertion, Substitution


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
      substitution: windows that are replaced in place.
      masked: tokens [a, b) of the stream that do not count as targets, ascending, apart from one another.
    """

    name: str
    fingerprint: str
    num_tokens: Count
    count: Count = 1
    start: Count = 0
    excluded: tuple[Count, ...] = ()
    substitution: Substitution | None = None
    masked: tuple[tuple[Count, Count], ...] = ()


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
      inserted: documents that overwrite rows.
      order_from: position at which the stage began whose order this one keeps, where it changes nothing but edits in
        place; None where it begins an order of its own.

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
    inserted: tuple[Insertion, ...] = ()
    order_from: Count | None = None

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
        if self.origin > self.from_position:
            raise ValueError(f"order_from is {self.order_from}, expected at most {self.from_position}")
        self._check_inserted()

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
        substituted = stream.substitution.windows if stream.substitution else ()
        if substituted and substituted[-1] >= num_windows:
            raise ValueError(f"{label}: window {substituted[-1]} is substituted, expected [0, {num_windows})")
        edges = [edge for span in stream.masked for edge in span]
        if edges and (edges != sorted(edges) or edges[-1] > stream.num_tokens or any(a == b for a, b in stream.masked)):
            raise ValueError(f"{label}: the masked tokens are no ascending spans of its {stream.num_tokens} tokens")
        for other in self.streams[:index]:
            if other.name == stream.name or other.fingerprint == stream.fingerprint:
                raise ValueError(
                    f"{label} and {label_of(other)} are one dataset, expected different ones in a mixture. "
                    "Raise the weight of one and leave the other out."
                )

    def _check_inserted(self) -> None:
        taken: set[tuple[int, int]] = set()
        for each in self.inserted:
            if each.name in {stream.name for stream in self.streams}:
                raise ValueError(f"{each.name}: is the name of a stream, and of a dataset that a document is from")
            for step_index, row, part in each.places:
                where = f"{each.name}: a document is inserted at step {step_index + 1}, row {row}"
                if step_index < self.from_step:
                    raise ValueError(f"{where}, before the stage")
                if row >= (size := self.batch_size(step_index)):
                    raise ValueError(f"{where}; the batch has the rows 0 to {size - 1}")
                if part >= each.num_parts(self.seq_len):
                    raise ValueError(f"{each.name}: part {part} of a document of {each.num_parts(self.seq_len)}")
                if (step_index, row) in taken:
                    raise ValueError(
                        f"step {step_index + 1}, row {row}: two documents are inserted there, expected one"
                    )
                taken.add((step_index, row))

    @property
    def origin(self) -> int:
        """The position from which the examples of this order count."""
        return self.from_position if self.order_from is None else self.order_from

    @property
    def read_from(self) -> tuple[Stream, ...]:
        """What rows are read from: the streams, and what documents are inserted from."""
        return self.streams + tuple(Stream(*key) for key in dict.fromkeys(each.source for each in self.inserted))

    @functools.cached_property
    def masks(self) -> bool:
        """Whether there are masked tokens."""
        return any(stream.masked for stream in self.streams)

    @property
    def is_edited(self) -> bool:
        """Whether anything is edited in place."""
        return self.edits_tokens or any(stream.substitution for stream in self.streams)

    @property
    def edits_tokens(self) -> bool:
        """Whether there are masked or inserted tokens."""
        return bool(self.inserted) or self.masks

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
        streams, draws = self._mixture.at(np.asarray(positions, np.int64) - self.origin)
        windows = np.empty_like(draws)
        for index in np.unique(streams).tolist():
            chosen = streams == index
            windows[chosen] = self._passage(index).windows_at(draws[chosen])
        return streams, windows

    def occurrences(self, stream: int, windows, stop: int) -> list[Occurrence]:
        """Every time that one of the windows of a stream is seen in the stage before position `stop`."""
        stop_offset = stop - self.origin
        num_draws = self._mixture.draws_before(stop_offset)[stream]
        draws, windows, epochs = self._passage(stream).draws_of(windows, num_draws)
        positions = self.origin + self._mixture.offsets_of(stream, draws)
        steps = self.steps_at(positions)
        found = [
            Occurrence(
                int(step_index), int(position - self.position(int(step_index))), int(position), int(window), int(epoch)
            )
            for step_index, position, window, epoch in zip(steps, positions, windows, epochs, strict=True)
        ]
        return sorted(found)

    def replaced(self, stream: int, windows, stop: int) -> list[tuple[Occurrence, int]]:
        """Every time that one of the windows would be seen before position `stop`, were it not substituted; and the
        window that is seen instead."""
        num_draws = self._mixture.draws_before(stop - self.origin)[stream]
        draws, originals, spares = self._passage(stream).replaced_of(windows, num_draws)
        positions = self.origin + self._mixture.offsets_of(stream, draws)
        found = []
        for position, original, spare in zip(positions.tolist(), originals.tolist(), spares.tolist(), strict=True):
            step_index = int(self.steps_at(position))
            row = position - self.position(step_index)
            found.append((Occurrence(step_index, row, position, original, 0), spare))
        return sorted(found)

    def planned_at(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """As `examples_at`, without substitutions."""
        streams, draws = self._mixture.at(np.asarray(positions, np.int64) - self.origin)
        windows = np.empty_like(draws)
        for index in np.unique(streams).tolist():
            chosen = streams == index
            windows[chosen] = self._passage(index).planned_at(draws[chosen])
        return streams, windows

    def planned_indices(self, stream: int, windows, start: int, stop: int) -> np.ndarray:
        """Indices of the endless sequence, ascending, at which windows of a stream would be seen at positions [start,
        stop), were none substituted."""
        first, last = (self._mixture.draws_before(each - self.origin)[stream] for each in (start, stop))
        draws, _, _ = self._passage(stream).planned_draws_of(windows, last)
        return np.sort(self._passage(stream).indices_at(draws[draws >= first]))

    def substitutes(self, stream: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the endless sequence at which another window is seen before position `stop`, ascending; these
        windows)."""
        indices, spares = self._passage(stream).substitutes
        count = int(np.searchsorted(indices, self.index_after(stream, stop)))
        return indices[:count], spares[:count]

    def window_order(self, stream: int) -> WindowOrder:
        """The endless sequence of one stream."""
        return self._passage(stream).order

    def insertions_at(self, positions: np.ndarray) -> list[tuple[int, Insertion, int]]:
        """Which of positions (n,) have a document inserted: (number in `positions`, the insertion, its part)."""
        if not self.inserted:
            return []
        placed, numbers, parts = self._placed
        found = np.minimum(np.searchsorted(placed, positions), len(placed) - 1)
        return [
            (int(i), self.inserted[int(numbers[found[i]])], int(parts[found[i]]))
            for i in np.flatnonzero(placed[found] == positions)
        ]

    @functools.cached_property
    def _placed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions at which documents are inserted, ascending; which insertion each is; which part."""
        places = np.array([(i, *place) for i, each in enumerate(self.inserted) for place in each.places], np.int64)
        steps, inverse = np.unique(places[:, 1], return_inverse=True)
        positions = np.array([self.position(step) for step in steps.tolist()])[inverse] + places[:, 2]
        ascending = np.argsort(positions)
        return positions[ascending], places[ascending, 0], places[ascending, 3]

    def index_after(self, stream: int, position: int) -> int:
        """Index in a stream's endless sequence of the next window of it that is seen at `position` or later."""
        draws = self._mixture.draws_before(position - self.origin)[stream]
        return int(self._passage(stream).indices_at(np.array([draws]))[0])

    def about_next(self, stream: int, windows: np.ndarray, position: int) -> np.ndarray:
        """About how many examples after `position` each window of a stream is seen next: float64, of the same shape."""
        draws = self._mixture.draws_before(position - self.origin)[stream]
        return self._passage(stream).about_next(windows, draws) * (self._mixture.block / self.streams[stream].count)

    def epochs(self, stream: int, position: int) -> float:
        """How often a stream has been seen before `position`: whole where an epoch's last window was just seen."""
        draws = self._mixture.draws_before(position - self.origin)[stream]
        whole = self._passage(stream).whole_epochs(draws)
        return self.index_after(stream, position) / self.num_windows(stream) if whole is None else float(whole)

    @functools.cached_property
    def _mixture(self) -> Mixture:
        return Mixture(tuple(stream.count for stream in self.streams), self.seed, str(self.origin or ""))

    def _passage(self, stream: int) -> Passage:
        return self._passages[stream]

    @functools.cached_property
    def masked_edges(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """(starts, stops) of each stream's masked tokens, int64."""
        edges = (np.array(each.masked, np.int64).reshape(-1, 2).T for each in self.streams)
        return tuple((np.ascontiguousarray(starts), np.ascontiguousarray(stops)) for starts, stops in edges)

    @functools.cached_property
    def _passages(self) -> tuple[Passage, ...]:
        shuffle = self.shuffle, self.block_windows, self.group_blocks
        return tuple(
            Passage(
                WindowOrder(self.num_windows(i), self.seed, each.fingerprint, *shuffle),
                each.start,
                each.excluded,
                each.substitution,
                self._mixture.draws_before(self.from_position - self.origin)[i],
            )
            for i, each in enumerate(self.streams)
        )


def label_of(stream: Stream) -> str:
    return stream.name or "the dataset"


def windows_overlapping(start: int, length: int, seq_len: int, num_windows: int) -> range:
    """Windows that hold any of the tokens [start, start + length), be it as the last target only."""
    first = max(0, -(-(start - seq_len) // seq_len))
    return range(first, min(num_windows, (start + length - 1) // seq_len + 1))


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

"""The data plan of a run: what every batch holds, past and to come, from a few numbers.

A plan is a list of segments, and is only ever added to: when a run goes on with another batch size, mixture,
sequence length or list of exclusions, the new order begins a segment where the old one stopped. Any batch of
any step, and every step at which a window was or will be met, follow from the plan alone.

Steps count updates from 0 here: the batch of step 0 is the one that update number 1 consumes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt_pretrain.data.mixture import Mixture
from gpt_pretrain.data.order import Shuffle, WindowOrder

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Stream:
    """One token stream within a segment.

    Attributes:
      name: in a mixture; "" for one alone.
      fingerprint: of the dataset. It is what the stream is known by: it keeps its order and its place in it
        under another name, in a mixture or alone.
      num_tokens: of its training split.
      count: how many examples of each block of the mixture are from it.
      start: index in its endless sequence (see `WindowOrder`) at which the segment begins.
      excluded: windows that are left out, ascending.
    """

    name: str
    fingerprint: str
    num_tokens: int
    count: int = 1
    start: int = 0
    excluded: tuple[int, ...] = ()


class Batch(NamedTuple):
    """The examples of one step, in the order of the rows of the global batch."""

    step: int
    position: int  # of row 0
    streams: np.ndarray  # int64 (batch_size,): index into the segment's streams
    windows: np.ndarray  # int64 (batch_size,)


class Sighting(NamedTuple):
    """One place of the run at which a window is met."""

    step: int
    row: int  # of the global batch
    position: int
    window: int
    epoch: int  # of its stream, from 0


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a run in which the order's parameters do not change.

    Attributes:
      from_step, from_position: updates made and examples met before it.
      batch_sizes: (step, size) pairs, ascending from step 0: from that step on batches have that size.
      change: what was changed at its beginning, in words.

    Raises ValueError for what has no order: a stream without a window, or with none that is not excluded.
    """

    seed: int
    seq_len: int
    batch_sizes: tuple[tuple[int, int], ...]
    streams: tuple[Stream, ...]
    shuffle: Shuffle = "global"
    block_windows: int = 1024
    group_blocks: int = 32
    from_step: int = 0
    from_position: int = 0
    change: str = "start"

    def __post_init__(self):
        firsts, sizes = zip(*self.batch_sizes, strict=True)
        if firsts[0] != 0 or list(firsts) != sorted(set(firsts)) or min(sizes) < 1:
            raise ValueError(
                f"train.batch_size: found {_in_words([*self.batch_sizes])}; expected sizes of at least 1, the first "
                "from step 0, each from a later step than the one before"
            )
        for i in range(len(self.streams)):
            self._check_stream(i)

    def _check_stream(self, index: int) -> None:
        stream, num_windows = self.streams[index], self.num_windows(index)
        label, excluded = _label(stream), stream.excluded
        if num_windows < 1:
            raise ValueError(
                f"{label}: data.seq_len={self.seq_len} needs {self.seq_len + 1} tokens for one window; "
                f"the stream holds {stream.num_tokens}"
            )
        assert list(excluded) == sorted(set(excluded)), "excluded windows are not ascending"
        if excluded and not (excluded[0] >= 0 and excluded[-1] < num_windows):
            raise ValueError(
                f"{label}: found excluded windows from {excluded[0]} to {excluded[-1]}, expected [0, {num_windows})"
            )
        if len(excluded) == num_windows:
            raise ValueError(f"{label}: all of its {num_windows} windows are excluded, nothing is left to train on")
        for other in self.streams[:index]:
            if other.name == stream.name or other.fingerprint == stream.fingerprint:
                raise ValueError(
                    f"{label} and {_label(other)} are one dataset, expected different ones in a mixture. "
                    "Raise the weight of one and leave the other out."
                )

    def num_windows(self, stream: int) -> int:
        """Windows of one stream; each has `seq_len` inputs and one more token, shared with the next."""
        return (self.streams[stream].num_tokens - 1) // self.seq_len

    def batch_size(self, step: int) -> int:
        """Of the batch of `step`."""
        return [size for first, size in self.batch_sizes if first <= step][-1]

    def batch_sizes_from(self, step: int) -> list[int]:
        """Of the batch of `step` and of later ones, as the schedule has them."""
        return [size for _, size in _from(self.batch_sizes, step)]

    def position(self, step: int) -> int:
        """How many examples came before `step`, which is not before the segment."""
        position = self.from_position
        for first, last, size in self._stretches:
            position += size * (min(step, last) - first if step > first else 0)
        return position

    def steps_at(self, positions) -> np.ndarray:
        """The step whose batch each position is in."""
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
        """(first step, step after the last, batch size) of each stretch of one batch size."""
        firsts = [max(first, self.from_step) for first, _ in self.batch_sizes]
        lasts = [*firsts[1:], 1 << 62]
        sizes = [size for _, size in self.batch_sizes]
        return [part for part in zip(firsts, lasts, sizes, strict=True) if part[0] < part[1]]

    def examples_at(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """Positions within the segment (any shape) -> (stream indices, windows), int64 each."""
        streams, draws = self._mixture.at(np.asarray(positions, np.int64) - self.from_position)
        windows = np.empty_like(draws)
        for index in np.unique(streams).tolist():
            chosen = streams == index
            windows[chosen] = self._passage(index).windows_at(draws[chosen])
        return streams, windows

    def sightings(self, stream: int, windows, stop: int) -> list[Sighting]:
        """Every time that one of the windows of a stream is met in the segment before position `stop`."""
        stop_offset = stop - self.from_position
        num_draws = self._mixture.draws_before(stop_offset)[stream]
        draws, windows, epochs = self._passage(stream).draws_of(windows, num_draws)
        positions = self.from_position + self._mixture.offsets_of(stream, draws)
        steps = self.steps_at(positions)
        found = [
            Sighting(int(step), int(position - self.position(int(step))), int(position), int(window), int(epoch))
            for step, position, window, epoch in zip(steps, positions, windows, epochs, strict=True)
        ]
        return sorted(found)

    def index_after(self, stream: int, position: int) -> int:
        """Index in a stream's endless sequence of the next window of it that is met at `position` or later."""
        draws = self._mixture.draws_before(position - self.from_position)[stream]
        return int(self._passage(stream).indices_at(np.array([draws]))[0])

    def epochs(self, stream: int, position: int) -> float:
        """How often a stream has been met before `position`: whole where an epoch's last window was just met."""
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

    The excluded ones are stepped over: the rest keeps its order, and is met once an epoch as before.
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
            met = (draws >= 0) & (draws < num_draws)
            parts.append((draws[met], windows[met], np.full(int(met.sum()), epoch)))
        draws, windows, epochs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return draws, windows, epochs


class PlanError(ValueError):
    """The order that is asked for cannot go on from the one that is there."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The segments of a run, in order. Only ever added to."""

    segments: tuple[Segment, ...]

    def segment_at(self, step: int) -> Segment:
        """The segment that the batch of `step` belongs to."""
        return [segment for segment in self.segments if segment.from_step <= step][-1]

    def position(self, step: int) -> int:
        """How many examples came before `step`."""
        return self.segment_at(step).position(step)

    def batch_size(self, step: int) -> int:
        """Of the batch of `step`."""
        return self.segment_at(step).batch_size(step)

    def batch(self, step: int) -> Batch:
        """What `step` consumes."""
        segment = self.segment_at(step)
        position = segment.position(step)
        return Batch(step, position, *segment.examples_at(position + np.arange(segment.batch_size(step))))

    def tokens_before(self, step: int) -> int:
        """How many tokens all updates before `step` were trained on."""
        return sum(
            (self.segments[i].position(min(step, stop)) - self.segments[i].from_position) * self.segments[i].seq_len
            for i, stop in enumerate(self._stops())
            if self.segments[i].from_step < step
        )

    def num_steps(self, num_tokens: int) -> int:
        """How many whole steps a run of `num_tokens` has, or has had if there were more already."""
        last = self.segments[-1]
        step, left = last.from_step, num_tokens - self.tokens_before(last.from_step)
        for first, end, size in last._stretches:
            here = min(end - first, max(0, left) // (size * last.seq_len))
            step, left = first + here, left - here * size * last.seq_len
            if here < end - first:
                break
        return step

    def sightings(self, fingerprint: str, windows_of, num_steps: int) -> list[tuple[Segment, Sighting]]:
        """Every time that windows of a stream are met in the first `num_steps` steps, whatever its name was there.

        `windows_of(segment)` gives the windows, which depend on the segment's sequence length.
        """
        found = []
        for segment, stop in zip(self.segments, self._stops(), strict=True):
            stop = min(stop, num_steps)
            for index, stream in enumerate(segment.streams):
                if stream.fingerprint == fingerprint and stop > segment.from_step:
                    windows = windows_of(segment)
                    found += [(segment, each) for each in segment.sightings(index, windows, segment.position(stop))]
        return found

    def epochs(self, step: int) -> dict[str, float]:
        """How often each stream has been met before `step`: 1.5 is once and a half."""
        segment = self.segment_at(max(0, step - 1))
        position = segment.position(step)
        return {
            stream.name: segment.epochs(i, position)
            for i, stream in enumerate(segment.streams)
        }

    def _stops(self) -> list[int]:
        """The step after the last of each segment."""
        return [*(segment.from_step for segment in self.segments[1:]), 1 << 62]

    def continued(self, wanted: Segment, step: int, *, fork: bool = False) -> "Plan":
        """This plan, or this plan with `wanted` from `step` on if that asks for anything else.

        Args:
          wanted: what the configuration says; its `from_*` and `start` fields are not looked at.
          fork: also take up another seed or other data under the name of a stream, as a new branch of the run.

        Raises PlanError for what cannot be continued, unless `fork`.
        """
        last = self.segment_at(step)
        if last is not self.segments[-1]:
            raise PlanError(f"step {step} lies before the plan's last change at step {self.segments[-1].from_step}")
        changes = _differences(last, wanted, step)
        if not changes:
            return self
        kept = tuple(segment for segment in self.segments if segment.from_step < step)
        if kept and last is not kept[-1]:  # no batch was taken from the last segment: it leaves no trace
            return Plan(kept).continued(wanted, step, fork=fork)
        refused = [line for line, needs_fork in changes if needs_fork]
        if refused and not fork:
            raise PlanError("\n".join(f"  {line}" for line in refused))
        position = last.position(step)
        streams = tuple(
            dataclasses.replace(stream, start=self._start_of(stream, wanted, i, step))
            for i, stream in enumerate(wanted.streams)
        )
        change = ("fork: " if refused else "") + "; ".join(line for line, _ in changes)
        new = dataclasses.replace(wanted, streams=streams, from_step=step, from_position=position, change=change)
        return Plan((*kept, new))

    def _start_of(self, stream: Stream, wanted: Segment, index: int, step: int) -> int:
        """Where in its endless sequence a stream goes on.

        Its own place, if it is cut into the same windows in the same order; else the next epoch, which nobody
        has seen anything of. A stream that is new to the run begins with its first epoch.
        """
        for segment, stop in zip(reversed(self.segments), reversed(self._stops()), strict=True):
            for i, old in enumerate(segment.streams):
                if old.fingerprint == stream.fingerprint:
                    at = segment.index_after(i, segment.position(min(step, stop)))
                    if _order_of(segment) == _order_of(wanted):
                        return at
                    return -(-at // segment.num_windows(i)) * wanted.num_windows(index)
        return 0

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {"version": VERSION, "segments": [dataclasses.asdict(segment) for segment in self.segments]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Plan":
        """The inverse of `to_json`. ValueError for another version."""
        if fields.get("version") != VERSION:
            raise ValueError(f"data plan of version {fields.get('version')}, expected {VERSION}")
        segments = []
        for each in fields["segments"]:
            streams = tuple(Stream(**s | {"excluded": tuple(s["excluded"])}) for s in each["streams"])
            sizes = tuple((int(step), int(size)) for step, size in each["batch_sizes"])
            segments.append(Segment(**each | {"streams": streams, "batch_sizes": sizes}))
        return cls(tuple(segments))


def _order_of(segment: Segment) -> dict[str, Any]:
    """What cuts a stream into windows and shuffles them."""
    names = ("seed", "seq_len", "shuffle") + (("block_windows", "group_blocks") if segment.shuffle == "block" else ())
    return {name: getattr(segment, name) for name in names}


def _label(stream: Stream) -> str:
    return stream.name or "the dataset"


def _differences(last: Segment, wanted: Segment, step: int) -> list[tuple[str, bool]]:
    """(what differs from `step` on, whether it cannot simply be continued)."""
    lines = []
    for name in _order_of(wanted):
        old, new = getattr(last, name), getattr(wanted, name)
        if old != new:
            lines.append((f"data.{name}: {old} until now, {new} from here on", name == "seed"))
    if _from(last.batch_sizes, step) != _from(wanted.batch_sizes, step):
        old, new = (_in_words(_from(each.batch_sizes, step)) for each in (last, wanted))
        lines.append((f"train.batch_size: {old} until now, {new} from here on", False))
    left = list(last.streams)
    for stream in wanted.streams:
        # The same data, whatever its name; else what had the name until now.
        same = [old for old in left if old.fingerprint == stream.fingerprint]
        same = same or [old for old in left if old.name == stream.name]
        if not same:
            lines.append((f"{_label(stream)}: added to the mixture", False))
            continue
        old = same[0]
        left.remove(old)
        lines += [(f"{_label(stream)}: {line}", needs_fork) for line, needs_fork in _stream_differences(old, stream)]
        if old.count != stream.count and len(last.streams) + len(wanted.streams) > 2:
            share = [f"{s.count} of {sum(t.count for t in x.streams)}" for s, x in ((old, last), (stream, wanted))]
            lines.append((f"{_label(stream)}: {share[0]} examples until now, {share[1]} from here on", False))
    return lines + [(f"{_label(stream)}: taken out of the mixture", False) for stream in left]


def _stream_differences(old: Stream, new: Stream) -> list[tuple[str, bool]]:
    lines = []
    if old.fingerprint != new.fingerprint:
        lines.append((f"fingerprint {old.fingerprint:.16} until now, {new.fingerprint:.16} now", True))
    if old.name != new.name:
        lines.append((f"was {_label(old)} until now", False))
    if old.excluded != new.excluded:
        lines.append((f"{len(old.excluded)} windows excluded until now, {len(new.excluded)} from here on", False))
    return lines


def _from(batch_sizes: tuple[tuple[int, int], ...], step: int) -> list[tuple[int, int]]:
    """The schedule as far as it concerns `step` and later ones."""
    begun = [size for first, size in batch_sizes if first <= step][-1:]
    out = [(step, size) for size in begun]
    for first, size in batch_sizes:
        if first > step and (not out or out[-1][1] != size):
            out.append((first, size))
    return out


def _in_words(batch_sizes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{size}" + (f" from step {first}" if i else "") for i, (first, size) in enumerate(batch_sizes))

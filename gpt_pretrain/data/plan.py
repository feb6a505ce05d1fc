"""The data plan of a run: what every batch holds, past and to come, from a few numbers.

A plan is a list of segments, and is only ever added to: when a run goes on with another batch size, mixture,
sequence length or list of exclusions, the new order begins a segment where the old one stopped. Any batch of
any step, and every step at which a window was or will be met, follow from the plan alone.

Steps count updates from 0 here: the batch of step 0 is the one that update number 1 consumes.
"""

import dataclasses
from typing import Any

import numpy as np

from gpt_pretrain.data.stages import Batch, Occurrence, Segment, Stream, label_of, sizes_from, sizes_in_words

VERSION = 1


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

    def occurrences(self, fingerprint: str, windows_of, num_steps: int) -> list[tuple[Segment, Occurrence]]:
        """Every time that windows of a stream are met in the first `num_steps` steps, whatever its name was there.

        `windows_of(segment)` gives the windows, which depend on the segment's sequence length.
        """
        found = []
        for segment, stop in zip(self.segments, self._stops(), strict=True):
            stop = min(stop, num_steps)
            for index, stream in enumerate(segment.streams):
                if stream.fingerprint == fingerprint and stop > segment.from_step:
                    windows = windows_of(segment)
                    found += [(segment, each) for each in segment.occurrences(index, windows, segment.position(stop))]
        return found

    def epochs(self, step: int) -> dict[str, float]:
        """How often each stream has been met before `step`: 1.5 is once and a half."""
        segment = self.segment_at(max(0, step - 1))
        position = segment.position(step)
        return {stream.name: segment.epochs(i, position) for i, stream in enumerate(segment.streams)}

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


def _differences(last: Segment, wanted: Segment, step: int) -> list[tuple[str, bool]]:
    """(what differs from `step` on, whether it cannot simply be continued)."""
    lines = []
    for name in _order_of(wanted):
        old, new = getattr(last, name), getattr(wanted, name)
        if old != new:
            lines.append((f"data.{name}: {old} until now, {new} from here on", name == "seed"))
    if sizes_from(last.batch_sizes, step) != sizes_from(wanted.batch_sizes, step):
        old, new = (sizes_in_words(sizes_from(each.batch_sizes, step)) for each in (last, wanted))
        lines.append((f"train.batch_size: {old} until now, {new} from here on", False))
    left = list(last.streams)
    for stream in wanted.streams:
        # The same data, whatever its name; else what had the name until now.
        same = [old for old in left if old.fingerprint == stream.fingerprint]
        same = same or [old for old in left if old.name == stream.name]
        if not same:
            lines.append((f"{label_of(stream)}: added to the mixture", False))
            continue
        old = same[0]
        left.remove(old)
        lines += [(f"{label_of(stream)}: {line}", needs_fork) for line, needs_fork in _stream_differences(old, stream)]
        if old.count != stream.count and len(last.streams) + len(wanted.streams) > 2:
            share = [f"{s.count} of {sum(t.count for t in x.streams)}" for s, x in ((old, last), (stream, wanted))]
            lines.append((f"{label_of(stream)}: {share[0]} examples until now, {share[1]} from here on", False))
    return lines + [(f"{label_of(stream)}: taken out of the mixture", False) for stream in left]


def _stream_differences(old: Stream, new: Stream) -> list[tuple[str, bool]]:
    lines = []
    if old.fingerprint != new.fingerprint:
        lines.append((f"fingerprint {old.fingerprint:.16} until now, {new.fingerprint:.16} now", True))
    if old.name != new.name:
        lines.append((f"was {label_of(old)} until now", False))
    if old.excluded != new.excluded:
        lines.append((f"{len(old.excluded)} windows excluded until now, {len(new.excluded)} from here on", False))
    return lines

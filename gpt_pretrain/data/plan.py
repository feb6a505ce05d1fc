"""The data plan of a run: what every batch holds, past and to come, from a few numbers.

A plan is a list of stages, and is only ever added to: when a run is resumed with another batch size, mixture,
sequence length or list of exclusions, the new order begins a stage where the old one stopped. The batch of
any step, and every step at which a window was or will be seen, follow from the plan alone.

Users count steps from 1. Here a step's *index* counts from 0: it is the number of updates made before.
"""

import dataclasses
from typing import Any

import numpy as np

from data_prep.store.typed import typed
from gpt_pretrain.data.stages import BatchIndex, Occurrence, Stage, Stream, label_of, sizes_from, sizes_in_words

VERSION = 1
MAX_BATCH_TOKENS = 1 << 28
MAX_BATCH_SIZE = 1 << 24  # of a plan that is read: the windows of a batch are computed at once


class PlanError(ValueError):
    """The order that is asked for cannot continue the one that is there."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a run, in order. Only ever added to."""

    stages: tuple[Stage, ...]

    def stage_at(self, step_index: int) -> Stage:
        """The stage of one step."""
        return [stage for stage in self.stages if stage.from_step <= step_index][-1]

    def position(self, step_index: int) -> int:
        """How many examples came before a step."""
        return self.stage_at(step_index).position(step_index)

    def batch_size(self, step_index: int) -> int:
        """Of one step."""
        return self.stage_at(step_index).batch_size(step_index)

    def batch(self, step_index: int) -> BatchIndex:
        """What a step consumes."""
        stage = self.stage_at(step_index)
        position = stage.position(step_index)
        return BatchIndex(step_index, position, *stage.examples_at(position + np.arange(stage.batch_size(step_index))))

    def tokens_before(self, step_index: int) -> int:
        """How many tokens all steps before this one are trained on."""
        return sum(
            (self.stages[i].position(min(step_index, stop)) - self.stages[i].from_position) * self.stages[i].seq_len
            for i, stop in enumerate(self.stops())
            if self.stages[i].from_step < step_index
        )

    def num_steps(self, num_tokens: int) -> int:
        """How many whole steps a run of `num_tokens` has, or has had if there were more already."""
        last = self.stages[-1]
        num_steps, left = last.from_step, num_tokens - self.tokens_before(last.from_step)
        for first, end, size in last._stretches:
            here = min(end - first, max(0, left) // (size * last.seq_len))
            num_steps, left = first + here, left - here * size * last.seq_len
            if here < end - first:
                break
        return num_steps

    def occurrences(self, fingerprint: str, windows_of, num_steps: int) -> list[tuple[Stage, Occurrence]]:
        """Every occurrence of windows of a stream in the first `num_steps` steps, whatever its name was there.

        `windows_of(stage)` gives the windows, which depend on the stage's sequence length.
        """
        found = []
        for stage, stop in zip(self.stages, self.stops(), strict=True):
            stop = min(stop, num_steps)
            for index, stream in enumerate(stage.streams):
                if stream.fingerprint == fingerprint and stop > stage.from_step:
                    windows = windows_of(stage)
                    found += [(stage, each) for each in stage.occurrences(index, windows, stage.position(stop))]
        return found

    def replaced(self, fingerprint: str, windows_of, num_steps: int) -> list[tuple[Stage, Occurrence, int]]:
        """Every place in the first `num_steps` steps at which another window is seen instead of one of a stream, and
        that window; as `occurrences`."""
        found: list[tuple[Stage, Occurrence, int]] = []
        for stage, stop in zip(self.stages, self.stops(), strict=True):
            stop = min(stop, num_steps)
            for index, stream in enumerate(stage.streams):
                if stream.fingerprint == fingerprint and stream.substitution and stop > stage.from_step:
                    windows = windows_of(stage)
                    found += [(stage, *each) for each in stage.replaced(index, windows, stage.position(stop))]
        return found

    def epochs(self, step_index: int) -> dict[str, float]:
        """How often each stream has been seen before a step: 1.5 is once and a half."""
        stage = self.stage_at(max(0, step_index - 1))
        position = stage.position(step_index)
        return {stream.name: stage.epochs(i, position) for i, stream in enumerate(stage.streams)}

    def check_epochs(self, num_steps: int, most: int) -> None:
        """ValueError where a stage of so many steps would see a stream more often than any run does."""
        for i, (stage, stop) in enumerate(zip(self.stages, self.stops(), strict=True)):
            examples = stage.position(max(stage.from_step, min(stop, num_steps))) - stage.from_position
            fewest = min(stage.num_windows(j) - len(each.excluded) for j, each in enumerate(stage.streams))
            if examples > most * fewest:
                raise ValueError(f"stages[{i}] sees {examples} examples, more than {most} epochs of a stream")

    def stops(self) -> list[int]:
        """The index of the step after the last of each stage."""
        return [*(stage.from_step for stage in self.stages[1:]), 1 << 62]

    def continued(self, wanted: Stage, step_index: int, *, fork: bool = False) -> "Plan":
        """This plan, or this plan with `wanted` from the step of `step_index` on if that asks for anything else.

        Args:
          wanted: what the configuration says; its `from_*` and `start` fields are not looked at, nor are edits in
            place: those of the last stage stay where nothing else changes, and end with its order (`edits.edited`).
          fork: also take up another seed or other data under the name of a stream, as a new branch of the run.

        Raises PlanError for what cannot be continued, unless `fork`.
        """
        last = self.stage_at(step_index)
        if last is not self.stages[-1]:
            raise PlanError(
                f"step {step_index + 1} lies before the plan's last change, at step {self.stages[-1].from_step + 1}"
            )
        changes = differences(last, wanted, step_index)
        if not changes:
            return self
        kept = tuple(stage for stage in self.stages if stage.from_step < step_index)
        if kept and last is not kept[-1]:  # no batch was taken from the last stage: it leaves no trace
            return Plan(kept).continued(wanted, step_index, fork=fork)
        refused = [line for line, needs_fork in changes if needs_fork]
        if refused and not fork:
            raise PlanError("\n".join(f"  {line}" for line in refused))
        position = last.position(step_index)
        streams = tuple(
            dataclasses.replace(
                stream, start=self._start_of(stream, wanted, i, step_index), substitution=None, masked=()
            )
            for i, stream in enumerate(wanted.streams)
        )
        change = ("fork: " if refused else "") + "; ".join(line for line, _ in changes)
        new = dataclasses.replace(
            wanted,
            streams=streams,
            from_step=step_index,
            from_position=position,
            change=change,
            inserted=(),
            order_from=None,
        )
        return Plan((*kept, new))

    def _start_of(self, stream: Stream, wanted: Stage, index: int, step_index: int) -> int:
        """Where in its endless sequence a stream continues.

        Its own place, if it is cut into the same windows in the same order; else the next epoch, which nobody
        has seen anything of. A stream that is new to the run begins with its first epoch.
        """
        for stage, stop in zip(reversed(self.stages), reversed(self.stops()), strict=True):
            for i, old in enumerate(stage.streams):
                if old.fingerprint == stream.fingerprint:
                    at = stage.index_after(i, stage.position(min(step_index, stop)))
                    if order_of(stage) == order_of(wanted):
                        return at
                    return -(-at // stage.num_windows(i)) * wanted.num_windows(index)
        return 0

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {"version": VERSION, "segments": [_fields_of(stage) for stage in self.stages]}

    @classmethod
    def from_json(cls, fields: Any) -> "Plan":
        """The inverse of `to_json`. ValueError for another version, or a value that cannot be; names it."""
        version = fields.get("version") if isinstance(fields, dict) else None
        if version != VERSION:
            raise ValueError(f"data plan of version {version!r:.80}, expected {VERSION}")
        stages = typed(tuple[Stage, ...], fields.get("segments"), "stages")
        for i, stage in enumerate(stages):
            before = stages[i - 1].from_step if i else -1
            if stage.from_step <= before or (i == 0 and stage.from_step):
                raise ValueError(
                    f"stages[{i}].from_step is {stage.from_step}, expected more than that of the one before"
                )
            if (size := max(size for _, size in stage.batch_sizes)) > MAX_BATCH_SIZE:
                raise ValueError(f"stages[{i}].batch_sizes has {size}, expected at most {MAX_BATCH_SIZE}")
            if size * stage.seq_len > MAX_BATCH_TOKENS:
                raise ValueError(
                    f"stages[{i}] has batches of {size} x {stage.seq_len} tokens, expected at most {MAX_BATCH_TOKENS}"
                )
            if (counts := sum(stream.count for stream in stage.streams)) > MAX_BATCH_SIZE:
                raise ValueError(f"stages[{i}].streams have counts of {counts}, expected at most {MAX_BATCH_SIZE}")
        if not stages:
            raise ValueError("stages is empty, expected at least one")
        return cls(stages)


def _fields_of(stage: Stage) -> dict[str, Any]:
    """JSON values; those of edits in place only where there are some."""

    def without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in names or value not in (None, ())}

    fields = without(dataclasses.asdict(stage), ("inserted", "order_from"))
    return fields | {"streams": [without(each, ("substitution", "masked")) for each in fields["streams"]]}


def order_of(stage: Stage) -> dict[str, Any]:
    """What cuts a stream into windows and shuffles them."""
    names = ("seed", "seq_len", "shuffle") + (("block_windows", "group_blocks") if stage.shuffle == "block" else ())
    return {name: getattr(stage, name) for name in names}


def differences(last: Stage, wanted: Stage, step_index: int) -> list[tuple[str, bool]]:
    """(what of two stages differs from a step on, whether it cannot simply be continued)."""
    lines = []
    for name in order_of(wanted):
        old, new = getattr(last, name), getattr(wanted, name)
        if old != new:
            lines.append((f"data.{name}: {old} until now, {new} from here on", name == "seed"))
    if sizes_from(last.batch_sizes, step_index) != sizes_from(wanted.batch_sizes, step_index):
        old, new = (sizes_in_words(sizes_from(each.batch_sizes, step_index)) for each in (last, wanted))
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

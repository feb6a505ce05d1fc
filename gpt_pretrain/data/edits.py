"""Edits of a plan that leave every other row where it is: substituted windows, masked targets, inserted documents.

`data.exclude` steps over windows, so that all later rows move. With these two runs differ at the edited rows alone:
what the model would be without a document, or with one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_pretrain.data.asked_edits import Edits, InsertedDocument
from gpt_pretrain.data.plan import Plan, PlanError, order_of
from gpt_pretrain.data.row_edits import Insertion, Substitution
from gpt_pretrain.data.stages import Stage, Stream, label_of


def edited(plan: Plan, step_index: int, edits: Edits, *, num_steps: int, on_top: bool = False) -> Plan:
    """The plan with these edits from the step of `step_index` on, and no others; its other rows are the same.

    Where the plan has them already it is returned as it is; else a stage is added that keeps the order of the one
    before. Stages that the plan has after the step are edited, too.

    Args:
      num_steps: of the run: windows that it reaches take nobody's place.
      on_top: of the edits that the plan has from there on, which stay.

    Raises ValueError, in a line: windows that have no substitutes, a document that does not fit its places.
    """
    if not 0 <= step_index <= num_steps:
        raise PlanError(f"step {step_index + 1} is none of the run's {num_steps}")
    done = [stage for stage in plan.stages if stage.from_step < step_index]
    todo = [stage for stage in plan.stages if stage.from_step >= step_index]
    if done and todo and todo[0].from_step == step_index and _is_only_edited(done[-1], todo[0]) and not on_top:
        todo = todo[1:]  # no batch was taken from it: it leaves no trace
    if done and not (todo and todo[0].from_step == step_index):
        todo = [done[-1], *todo]
    _check_past_insertions(plan, step_index, edits)
    stops = [*(stage.from_step for stage in todo[1:]), num_steps]
    made: list[Stage] = []
    for number, (stage, stop) in enumerate(zip(todo, stops, strict=True)):
        is_begun = stage.from_step < step_index
        part = _part(stage, step_index) if is_begun else stage
        before = [*done, *made]
        past = zip(before, [each.from_step for each in [*before, part][1:]], strict=True)
        wanted = _Wanted(plan, edits, stage, num_steps, _windows_seen_instead(past), _ends(todo[number:], num_steps))
        stop = max(part.from_step, min(stop, num_steps))
        new = wanted.resolved(part, stop, is_last=number == len(todo) - 1, on_top=stage if on_top else None)
        if wanted.is_as_wanted(stage, new, part.from_step, stop):
            new = stage
            if is_begun:
                done.pop()
        elif is_begun:
            new = dataclasses.replace(new, change=_in_words(stage, new))
        else:
            is_only_edited = bool(before) and _is_only_edited(before[-1], new)
            words = _in_words(before[-1] if is_only_edited else None, new)
            change = words if is_only_edited else "; ".join(filter(None, [_without_edits(stage), words]))
            new = dataclasses.replace(new, change=change)
        made.append(new)
    return Plan((*done, *made))


def check_edits(plan: Plan, num_steps: int) -> None:
    """ValueError where a run of so many steps would see a window again that took another's place, or a substituted
    one: it is longer than the run that the windows were chosen for."""
    stops = [max(stage.from_step, min(stop, num_steps)) for stage, stop in zip(plan.stages, plan.stops(), strict=True)]
    past = _windows_seen_instead(zip(plan.stages, stops, strict=True))
    ends = _ends(plan.stages, num_steps)
    for stage, stop in zip(plan.stages, stops, strict=True):
        for i, stream in enumerate(stage.streams):
            targets = stream.substitution.windows if stream.substitution else ()
            windows = np.union1d(past.get(_key(stage, stream), ()), targets).astype(np.int64)
            if not len(windows) or ends[_key(stage, stream)] > stage.num_windows(i):
                continue
            hits = stage.planned_indices(i, windows, stage.from_position, stage.position(stop))
            again = np.setdiff1d(hits, stage.substitutes(i, stage.position(stop))[0])
            if len(again):
                raise ValueError(
                    f"{label_of(stream)}: with {num_steps} steps, windows would be seen again that took the place "
                    f"of substituted ones, from index {again[0]} of its sequence on: it was edited for a shorter run. "
                    "Resume the run with more train.num_tokens, which edits the plan anew, or ask for fewer steps."
                )


@dataclasses.dataclass
class _Wanted:
    """What edits come to in one stage.

    Attributes:
      stage: as the plan has it.
      past: windows that took another's place before, by `_key` of their stream.
      ends: index at which the run stops in the sequence of each stream, by `_key`.
    """

    plan: Plan
    edits: Edits
    stage: Stage
    num_steps: int
    past: Mapping[Any, np.ndarray]
    ends: Mapping[Any, int]

    def resolved(self, part: Stage, stop: int, *, is_last: bool, on_top: Stage | None) -> Stage:
        """The part of the stage that is edited, up to step `stop`, with these edits."""
        streams = []
        for i, stream in enumerate(part.streams):
            old = on_top.streams[i] if on_top else None
            masked = _merged(
                [
                    *(old.masked if old else ()),
                    *((each.start, each.stop) for each in self.edits.mask if each.fingerprint == stream.fingerprint),
                ]
            )
            substitution = self._substitution(part, i, stop, old)
            streams.append(dataclasses.replace(stream, substitution=substitution, masked=masked))
        inserted = self._inserted(part, stop, is_last, on_top)
        return dataclasses.replace(part, streams=tuple(streams), inserted=inserted)

    def _targets(self, index: int, old: Stream | None = None) -> np.ndarray:
        """Windows that are to be substituted."""
        fingerprint = self.stage.streams[index].fingerprint
        found = set(old.substitution.windows) if old and old.substitution else set()
        for target in self.edits.substitute:
            if target.fingerprint in (fingerprint, None):
                found.update(target.windows(self.plan, self.stage, index))
        return np.array(sorted(found), np.int64)

    def _all_targets(self, index: int, old: Stream | None = None) -> np.ndarray:
        """These, and what has taken another's place, where it would be seen again as planned."""
        stream, key = self.stage.streams[index], _key(self.stage, self.stage.streams[index])
        if self.ends[key] > self.stage.num_windows(index):  # a run of several epochs repeats all
            return self._targets(index, old)
        return np.union1d(self._targets(index, old), self.past.get(_key(self.stage, stream), np.empty(0, np.int64)))

    def _substitution(self, part: Stage, index: int, stop: int, old: Stream | None) -> Substitution | None:
        stream, num_windows = part.streams[index], part.num_windows(index)
        targets = self._all_targets(index, old)
        if not len(targets):  # where nothing is edited, nothing is counted: a plan may be of any length
            return None
        needed = len(part.planned_indices(index, targets, part.from_position, part.position(stop)))
        if not needed:
            return None
        end = self.ends[_key(part, stream)]
        if end > num_windows:
            raise ValueError(
                f"{label_of(stream)}: {needed} rows from step {part.from_step + 1} on are to be substituted, and no "
                f"window of it is left for that: the run sees its {num_windows} windows {end / num_windows:.2f} times "
                f"in {self.num_steps} steps. Mask the documents (data.mask), or lower train.num_tokens."
            )
        order = part.window_order(index)
        left_out = np.union1d(targets, np.array(stream.excluded, np.int64))
        left = num_windows - end - int((order.indices_of(left_out, 0) >= end).sum())
        if left < needed:
            raise ValueError(
                f"{label_of(stream)}: {needed} rows from step {part.from_step + 1} on are to be substituted, and too "
                f"few windows are left for that: of its {num_windows}, the run sees {end} in {self.num_steps} steps, "
                f"{num_windows - end - left} more were used or are left out, {left} are left. Lower "
                "train.num_tokens, or mask the documents (data.mask)."
            )
        return Substitution(tuple(targets.tolist()), end)

    def _inserted(self, part: Stage, stop: int, is_last: bool, on_top: Stage | None) -> tuple[Insertion, ...]:
        documents: dict[_Document, list[tuple[int, int, int]]] = {}
        for each in on_top.inserted if on_top else ():
            documents.setdefault(_document(each), []).extend(
                place for place in each.places if place[0] >= part.from_step
            )
        for each in self.edits.insert:
            num_parts = -(-each.length // part.seq_len)
            if len(each.places) % num_parts:
                raise ValueError(
                    f"{each.name}: a document of {each.length} tokens takes {num_parts} rows of {part.seq_len}; "
                    f"{len(each.places)} places are given, expected a multiple of {num_parts}"
                )
            for number, (step_index, row) in enumerate(each.places):
                if step_index >= self.num_steps:
                    raise ValueError(
                        f"{each.name}: a document is inserted at step {step_index + 1}, the run has {self.num_steps}"
                    )
                if part.from_step <= step_index and (is_last or step_index < stop):
                    place = (step_index, row, number % num_parts)
                    documents.setdefault(_document(each), []).append(place)
        return tuple(Insertion(*key, places=tuple(sorted(places))) for key, places in documents.items() if places)

    def is_as_wanted(self, stage: Stage, new: Stage, step_index: int, stop: int) -> bool:
        """Whether from a step on, up to step `stop`, a stage's rows are those of `new`."""
        if _places(stage, step_index) != _places(new, step_index):
            return False
        for i, stream in enumerate(stage.streams):
            if stream.masked != new.streams[i].masked:
                return False
            if stream.substitution is None and new.streams[i].substitution is None:
                continue
            first, last = stage.position(step_index), stage.position(stop)
            wanted = self._all_targets(i, new.streams[i])
            hits = stage.planned_indices(i, wanted, first, last)
            replaced, spares = stage.substitutes(i, stage.position(stop))
            is_ahead = replaced >= stage.index_after(i, first)
            if not np.array_equal(hits, replaced[is_ahead]) or np.isin(spares[is_ahead], wanted).any():
                return False
            begins_late = stream.substitution is None or stream.substitution.until >= self.ends[_key(stage, stream)]
            if len(hits) and not begins_late:
                return False
        return True


def _part(stage: Stage, step_index: int) -> Stage:
    """A stage from one of its steps on, in its order."""
    position = stage.position(step_index)
    return dataclasses.replace(
        stage, from_step=step_index, from_position=position, order_from=stage.origin, inserted=(), change=""
    )


def _is_only_edited(before: Stage, stage: Stage) -> bool:
    """Whether a stage keeps the order of the one before."""
    return stage.order_from is not None and _unedited(before) == _unedited(stage)


def _unedited(stage: Stage) -> tuple:
    streams = tuple(dataclasses.replace(each, substitution=None, masked=()) for each in stage.streams)
    return stage.origin, streams, tuple(order_of(stage).items()), stage.batch_sizes


def _key(stage: Stage, stream: Stream) -> tuple:
    """Two stages with a stream of the same key cut it into the same windows in the same order."""
    return (stream.fingerprint, *order_of(stage).values())


def _ends(stages: Sequence[Stage], num_steps: int) -> dict[tuple, int]:
    """Index at which the run stops in the sequence of each stream."""
    found: dict[tuple, int] = {}
    stops = [*(stage.from_step for stage in stages[1:]), num_steps]
    for stage, stop in zip(stages, stops, strict=True):
        for i, stream in enumerate(stage.streams):
            end = stage.index_after(i, stage.position(max(stage.from_step, min(stop, num_steps))))
            found[_key(stage, stream)] = max(end, found.get(_key(stage, stream), 0))
    return found


def _windows_seen_instead(stages: Iterable[tuple[Stage, int]]) -> dict[tuple, np.ndarray]:
    """Windows that took another's place in stages up to their stops, by `_key` of their stream."""
    found: dict[tuple, np.ndarray] = {}
    for stage, stop in stages:
        for i, stream in enumerate(stage.streams):
            if stream.substitution and stop > stage.from_step:
                _, spares = stage.substitutes(i, stage.position(stop))
                key = _key(stage, stream)
                found[key] = np.union1d(found.get(key, np.empty(0, np.int64)), spares)
    return found


def _check_past_insertions(plan: Plan, step_index: int, edits: Edits) -> None:
    past = {place[:2] for stage in plan.stages for each in stage.inserted for place in each.places}
    for each in edits.insert:
        for place in each.places:
            if place[0] < step_index and place not in past:
                raise ValueError(
                    f"{each.name}: a document is inserted at step {place[0] + 1}, which is past: {step_index} steps "
                    "were made without it"
                )


def _places(stage: Stage, step_index: int) -> dict[tuple[int, int], tuple]:
    """What is inserted from a step on, by step and row."""
    return {
        (step, row): (_document(each)[1:], part)
        for each in stage.inserted
        for step, row, part in each.places
        if step >= step_index
    }


_Document = tuple[str, str, int, int, int, int]


def _document(each: InsertedDocument | Insertion) -> "_Document":
    return each.name, each.fingerprint, each.num_tokens, each.start, each.length, each.end_of_text


def _merged(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending, apart from one another.

    >>> _merged([(5, 9), (1, 3), (8, 12)])
    ((1, 3), (5, 12))
    """
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return tuple(found)


def _in_words(before: Stage | None, stage: Stage) -> str:
    """What the edits of a stage are, and what they were before it."""
    lines = []
    for i, stream in enumerate(stage.streams):
        old = before.streams[i] if before else None
        counts = {what: (count(old) if old else 0, count(stream)) for what, count in _COUNTS.items()}
        lines += [f"{label_of(stream)}: {_changed(*pair, what)}" for what, pair in counts.items() if any(pair)]
    was, now = (sum(len(each.places) for each in one.inserted) if one else 0 for one in (before, stage))
    return "; ".join(lines + ([_changed(was, now, "rows with inserted documents")] if was or now else []))


_COUNTS: dict[str, Callable[[Stream], int]] = {
    "windows substituted": lambda stream: len(stream.substitution.windows) if stream.substitution else 0,
    "tokens masked": lambda stream: sum(b - a for a, b in stream.masked),
}


def _changed(was: int, now: int, what: str) -> str:
    return f"{now} {what} from here on" if not was else f"{was} {what} until now, {now} from here on"


def _without_edits(stage: Stage) -> str:
    """Its `change`, without what `_in_words` says of the edits that it has."""
    words = _in_words(None, stage)
    return stage.change.removesuffix(words).removesuffix("; ") if words else stage.change

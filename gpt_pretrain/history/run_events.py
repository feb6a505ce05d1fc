"""What happened to a run, step by step: from its plan, its records and its curves."""

import dataclasses
from collections.abc import Iterator

from data_prep.pages.numbers import plural
from gpt_pretrain.history.curves import Session
from gpt_pretrain.history.reported_run import ReportedRun
from gpt_pretrain.history.spikes import spikes_of
from gpt_pretrain.train.events import Kind

MOST_SPIKES = 20  # of one curve
_SPIKES = {
    "train/loss": ("loss", 1.1),
    "train/grad_norm": ("gradient norm", 2.0),
}  # tag: name, least ratio to the usual
_STARTS = (Kind.STARTED, Kind.RESUMED)


@dataclasses.dataclass(frozen=True)
class RunEvent:
    """One of them.

    Attributes:
      step: where it stands on the curves: updates made.
      batch: the step whose batch it leads to, from 1; None where there is none, or nobody knows the plan.
      time: seconds since 1970, where it is known.
      kind: a word.
    """

    step: int
    batch: int | None
    time: float | None
    kind: str
    words: str


def events_of(run: ReportedRun) -> list[RunEvent]:
    """By step; of one step in the order in which they were written."""
    found = [*_starts(run), *_noted(run), *_plan_changes(run), *_setting_changes(run), *_spikes(run)]
    most = run.data.num_steps if run.data else 0
    found = [each if 1 <= (each.batch or 0) <= most else dataclasses.replace(each, batch=None) for each in found]
    return sorted(found, key=lambda each: (each.step, each.time or 0.0))


def _starts(run: ReportedRun) -> Iterator[RunEvent]:
    """As the run noted them; before it did, as its event files show them."""
    noted = [each for each in run.events if each.kind in _STARTS]
    sessions = run.curves.sessions
    for number, session in enumerate(sessions):
        if not noted or session.began < noted[0].time:
            step = max(0, session.first_step - 1)
            kind = Kind.RESUMED if step else Kind.STARTED
            yield RunEvent(step, step + 1, session.began, kind, _lost(sessions, number).lstrip(", "))
    for index, each in enumerate(noted):
        until = noted[index + 1].time if index + 1 < len(noted) else float("inf")
        lost = "".join(_lost(sessions, i) for i, s in enumerate(sessions) if each.time <= s.began < until)
        yield RunEvent(each.step, each.step + 1, each.time, each.kind, each.words + lost)


def _lost(sessions: tuple[Session, ...], number: int) -> str:
    """What the session before had logged and this one makes again."""
    step = max(0, sessions[number].first_step - 1)
    lost = sessions[number - 1].last_step - step if number else 0
    return f", {plural(lost, 'step')} after step {step} made again" if lost > 0 else ""


def _noted(run: ReportedRun) -> Iterator[RunEvent]:
    for each in run.events:
        if each.kind not in _STARTS:
            yield RunEvent(each.step, max(1, each.step), each.time, each.kind, each.words)


def _plan_changes(run: ReportedRun) -> Iterator[RunEvent]:
    stages = run.data.plan.stages if run.data else ()
    for index, stage in enumerate(stages):
        if index:
            yield RunEvent(stage.from_step, stage.from_step + 1, None, "plan", stage.change)
        end = stages[index + 1].from_step if index + 1 < len(stages) else run.num_steps
        for first, size in stage.batch_sizes:
            if stage.from_step < first < end:
                yield RunEvent(first, first + 1, None, "plan", f"batch size {size:,} from here on, as scheduled")


def _setting_changes(run: ReportedRun) -> Iterator[RunEvent]:
    """But for those that the plan tells."""
    told = {stage.from_step: stage.change for stage in run.data.plan.stages} if run.data else {}
    for each in run.changes:
        words = [
            f"{name}: {_value(values, 'before')} until now, {_value(values, 'after')} from here on"
            for name, values in each.settings.items()
            if name not in told.get(each.step, "")
        ]
        if words:
            yield RunEvent(each.step, each.step + 1, None, "settings", "; ".join(words))


def _value(values, which: str) -> str:
    return repr(values[which]) if which in values else "not set"


def _spikes(run: ReportedRun) -> Iterator[RunEvent]:
    for tag, (name, least_ratio) in _SPIKES.items():
        curve = run.curves.scalars.get(tag)
        if curve is None:
            continue
        times = dict(zip(curve.steps.tolist(), curve.wall_times.tolist(), strict=True))
        for spike in spikes_of(curve, least_ratio=least_ratio, most=MOST_SPIKES):
            words = f"{name} {spike.value:.4g}, where {spike.usual:.4g} was usual"
            yield RunEvent(spike.step, spike.step, times[spike.step], "spike", words)

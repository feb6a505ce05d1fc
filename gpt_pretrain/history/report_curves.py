"""Which of a run's curves a report shows where, and the axes they are drawn against."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.pages.plots import Line, Mark, Plot, averaged, reduced
from data_prep.pages.text import printable
from gpt_pretrain.history.curves import Curve
from gpt_pretrain.history.reported_run import ReportedRun

Points = tuple[list[int], list[float]]  # steps, and what belongs to each
_MOST_TIMES = 500  # points between which wall time is linear
_SELDOM = 60  # points; each is a dot


class _Shown(NamedTuple):
    tag: str
    title: str
    second: str = ""  # drawn dashed in the same plot
    may_be_log: bool = False


_TRAINING = (
    _Shown("train/loss", "Loss, nats a token", "validation/loss", True),
    _Shown("train/accuracy", "Accuracy", "validation/accuracy"),
    _Shown("train/learning_rate", "Learning rate"),
    _Shown("train/grad_norm", "Norm of the gradient", may_be_log=True),
    _Shown("train/param_norm", "Norm of the parameters", may_be_log=True),
    _Shown("train/update_norm", "Norm of the update", may_be_log=True),
)
_SPEED = (
    _Shown("train/tokens_per_sec", "Tokens a second"),
    _Shown("train/mfu", "MFU"),
    _Shown("time_percent/goodput", "Goodput: % of wall time in steps that were kept, so far"),
)
_ELSEWHERE = ("statistics/", "time_percent/", "train/examples_seen", "train/eta_secs")


def training_plots(runs: Sequence[ReportedRun]) -> list[Plot]:
    """Loss, rates and norms."""
    return _plots(runs, _TRAINING, "t")


def speed_plots(runs: Sequence[ReportedRun]) -> list[Plot]:
    """Throughput."""
    return _plots(runs, _SPEED, "s")


def evaluation_plots(runs: Sequence[ReportedRun]) -> list[Plot]:
    """Validation of each dataset, and results of tasks that were evaluated more than once."""
    drawn = {each.second for each in _TRAINING if any(each.tag in run.curves.scalars for run in runs)}
    tags = {tag for run in runs for tag in run.curves.scalars if tag.startswith("validation/")} - drawn
    shown = [_Shown(tag, f"Validation: {tag.removeprefix('validation/')}", may_be_log=True) for tag in sorted(tags)]
    plots = _plots(runs, shown, "v")
    keys = sorted({key for run in runs for key, by_step in run.results.items() if len(by_step) > 1})
    for index, key in enumerate(keys):
        lines = []
        for number, run in reversed(list(enumerate(runs))):
            by_step = sorted(run.results.get(key, {}).items())
            if by_step:
                x, y = np.array(by_step, np.float64).T
                lines.append(Line(number, "", x, y, has_dots=True))
        plots.append(Plot(f"e{index}", f"{key[0]}: {key[1]}", tuple(lines)))
    return plots


def other_plots(runs: Sequence[ReportedRun]) -> list[Plot]:
    """Every other scalar."""
    known = {name for each in (*_TRAINING, *_SPEED) for name in (each.tag, each.second)}
    tags = {tag for run in runs for tag in run.curves.scalars if not tag.startswith((*_ELSEWHERE, "validation/"))}
    tags = {tag for tag in tags - known if not tag.startswith("evaluation/")}
    return _plots(runs, [_Shown(tag, tag) for tag in sorted(tags)], "o")


def _plots(runs: Sequence[ReportedRun], shown: Sequence[_Shown], key: str) -> list[Plot]:
    plots = []
    for index, (tag, title, second, may_be_log) in enumerate(shown):
        lines = []
        for number, run in reversed(list(enumerate(runs))):  # the first run lies on top
            for each, label in ((tag, ""), (second, "validation")):
                if each in run.curves.scalars:
                    lines.append(_line(number, label, run.curves.scalars[each]))
        if lines:
            plots.append(Plot(f"{key}{index}", title, tuple(lines), tag == "train/loss", may_be_log))
    return plots


def _line(number: int, label: str, curve: Curve) -> Line:
    return Line(number, label, curve.steps.astype(np.float64), curve.values, has_dots=len(curve) <= _SELDOM)


def plot_data(plot: Plot) -> dict[str, Any]:
    """For the page's script."""
    lines = []
    for line in plot.lines:
        x, y = reduced(line.x, line.y)
        fields = {"run": line.run, "label": line.label, "dots": line.has_dots, "x": _whole(x), "y": _short(y)}
        if len(x) < np.isfinite(line.y).sum():
            mean_x, mean_y = averaged(line.x, line.y)
            fields |= {"mx": _whole(mean_x), "my": _short(mean_y)}
        lines.append(fields)
    return {
        "key": plot.key,
        "title": printable(plot.title),
        "wide": plot.is_wide,
        "log": plot.may_be_log,
        "lines": lines,
    }


def run_data(run: ReportedRun, name: str, marks: Sequence[Mark]) -> dict[str, Any]:
    """For the page's script: the name, and steps -> tokens, seconds as points of lines."""
    return {
        "name": printable(name),
        "tokens": _tokens(run),
        "time": _seconds(run),
        "marks": [{"x": mark.x, "kind": mark.kind, "text": printable(mark.text), "at": mark.target} for mark in marks],
    }


def _tokens(run: ReportedRun) -> Points | None:
    """[steps, tokens that were trained on until then]; None where nobody knows the plan."""
    if run.data is None:
        return None
    plan, last = run.data.plan, run.num_steps
    steps = {0, last} | {stage.from_step for stage in plan.stages}
    steps |= {first for stage in plan.stages for first, _ in stage.batch_sizes}
    chosen = sorted(step for step in steps if step <= last)
    return chosen, [plan.tokens_before(step) for step in chosen]


def _seconds(run: ReportedRun) -> Points | None:
    """[steps, seconds of wall time until then, without the pauses between sessions]."""
    sessions, curve = run.curves.sessions, max(run.curves.scalars.values(), key=len, default=None)
    if curve is None:
        return None
    anew = max((i for i, session in enumerate(sessions) if session.first_step == 0), default=0)
    sessions = sessions[anew:]  # a run that began anew has no part in what was before
    pauses = [max(0.0, b.began - a.ended) for a, b in itertools.pairwise(sessions)]
    paused = np.concatenate([[0.0], np.cumsum(pauses)])
    chosen = np.unique(np.linspace(0, len(curve) - 1, _MOST_TIMES).astype(int))
    began = np.array([session.began for session in sessions])
    first = np.searchsorted(curve.steps, [session.first_step for session in sessions])
    ends = np.unique(np.concatenate([chosen, first, first - 1]))
    chosen = ends[(ends >= 0) & (ends < len(curve))]
    times = curve.wall_times[chosen]
    number = np.maximum(np.searchsorted(began, times, side="right") - 1, 0)
    seconds = np.maximum.accumulate(np.maximum(times - began[0] - paused[number], 0.0))
    return curve.steps[chosen].tolist(), np.round(seconds, 2).tolist()


def _whole(values: np.ndarray) -> list[int]:
    return np.round(values).astype(np.int64).tolist()


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]

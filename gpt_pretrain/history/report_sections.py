"""Parts of the page of runs, as HTML: plots, events, time, results, samples, settings."""

import shlex
from collections.abc import Sequence

import numpy as np

from data_prep.pages.blocks import Cell, Code, Name, Table
from data_prep.pages.numbers import duration, plural
from data_prep.pages.plots import Plot, number_text, plot_svg
from data_prep.pages.render_html import block_html
from data_prep.pages.text import html_text, one_line
from gpt_pretrain.history.curves import Text
from gpt_pretrain.history.reported_run import ReportedRun
from gpt_pretrain.history.run_events import RunEvent
from gpt_pretrain.history.shown_run import ShownRun, clock, css_class
from gpt_pretrain.train.time_ledger import Category

MOST_PLOTS = 60  # of a section
_MOST_EVENTS = 200  # of a run, in the list
_MOST_STEPS = 8  # columns of results
_MOST_SAMPLES = 12  # steps of one prompt
_SAMPLES = "samples/"


def legend(shown: Sequence[ShownRun]) -> str:
    """Colours of the runs; with JavaScript, each can be hidden."""
    items = "".join(
        f'<li><label><input type="checkbox" checked hidden value="{each.number}"><i class="swatch r{each.number}"></i>'
        f"{html_text(each.name)}</label></li>\n"
        for each in shown
    )
    dashes = '<svg viewBox="0 0 24 8" aria-hidden="true"><path class="line second" d="M0 4H24"/></svg>'
    return f'<ul class="legend" id="legend">\n{items}<li class="key">{dashes}validation</li>\n</ul>\n'


def controls(shown: Sequence[ShownRun]) -> str:
    """Hidden without JavaScript, which they need."""
    axes = ["steps"] + ["tokens"] * any(each.run.data for each in shown)
    axes += ["time"] * any(each.run.curves.scalars for each in shown)
    options = "".join(f'<option value="{axis}">{axis}</option>' for axis in axes)
    return (
        f'<form id="controls" class="controls" hidden><label>Against <select id="axis">{options}</select></label>'
        '<label>Smoothing <input type="range" id="smoothing" min="0" max="100" value="0"></label>'
        '<label><input type="checkbox" id="log"> logarithmic</label></form>\n'
    )


def plots_html(plots: Sequence[Plot], shown: Sequence[ShownRun]) -> str:
    """A grid of figures, each with the events of the first run; "" for none."""
    if not plots:
        return ""
    marks = shown[0].marks()
    figures = "".join(plot_svg(plot, marks, "step") for plot in plots[:MOST_PLOTS])
    left = f"<p>{len(plots) - MOST_PLOTS} more are not shown.</p>\n" if len(plots) > MOST_PLOTS else ""
    return f'<div class="charts">\n{figures}</div>\n{left}'


def folded(summary: str, html: str) -> str:
    """Shown when it is asked for."""
    return f"<details><summary>{html_text(summary)}</summary>\n{html}</details>\n"


def event_section(shown: Sequence[ShownRun], python: str) -> str:
    """All events of all runs, each with the command that shows its batch."""
    has_runs = len(shown) > 1
    lines = [
        _event(each, index, python, has_runs=has_runs)
        for each in shown
        for index in range(min(len(each.events), _MOST_EVENTS))
    ]
    if not lines:
        return "<p>None is known.</p>\n"
    run = '<th scope="col">Run</th>' if has_runs else ""
    left = "".join(
        f"<p>{html_text(each.name)}: {len(each.events) - _MOST_EVENTS} later ones are not listed.</p>\n"
        for each in shown
        if len(each.events) > _MOST_EVENTS
    )
    return (
        "<p>The command shows the batch of the step; of a start or a change, the first batch after it. Spikes are "
        "points of the curves far above those before them.</p>\n"
        '<div class="scroll" role="region" aria-label="Events" tabindex="0"><table class="events">\n<thead><tr>'
        f'<th scope="col" class="number">Step</th>{run}<th scope="col">What</th><th scope="col"></th></tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n{left}"
    )


def _event(each: ShownRun, index: int, python: str, *, has_runs: bool) -> str:
    event = each.events[index]
    run = f'<td><i class="swatch r{each.number}"></i>{html_text(each.name)}</td>' if has_runs else ""
    when = f"<small>{clock(event.time)}</small>" if event.time else ""
    command = inspect_command(python, each.run.name, event)
    return (
        f'<tr id="{each.target(index)}"><th scope="row" class="number">{event.step:,}</th>{run}<td><span class="kind '
        f'{css_class(event)}">{html_text(event.kind)}</span></td><td class="words">{html_text(event.words)}{when}'
        + (f"<code>{html_text(command)}</code>" if command else "")
        + "</td></tr>\n"
    )


def inspect_command(python: str, run: str, event: RunEvent) -> str:
    """What shows the batch of an event; "" where none is to be seen."""
    if event.batch is None:
        return ""
    return f"{python} -m gpt_pretrain.inspect {shlex.quote(run)} --step {event.batch}"


def time_section(shown: Sequence[ShownRun]) -> str:
    """Where the wall time of each run went."""
    html = ""
    for each in shown:
        if not (times := each.run.times):
            continue
        wall = max(sum(times.secs.values()), 1e-9)
        spent = sorted(((times.secs.get(name, 0.0), name) for name in Category), reverse=True)
        spent = [(secs, category) for secs, category in spent if secs > 0]
        caption = f"Where {duration(wall)} of wall time went, in {plural(times.num_sessions, 'session')}"
        table = Table(
            f"{each.name}: {caption}" if len(shown) > 1 else caption,
            ("", "Time", "Share"),
            tuple((category.words, duration(secs), f"{100 * secs / wall:.1f} %") for secs, category in spent),
            bars=tuple(secs / spent[0][0] for secs, _ in spent),
        )
        html += block_html(table)
    return html or "<p>No time ledger is there.</p>\n"


def evaluation_section(shown: Sequence[ShownRun]) -> str:
    """Tables of validation and of tasks."""
    has_runs = len(shown) > 1
    rows: list[tuple[Cell, ...]] = []
    for each in shown:
        for tag, curve in each.run.curves.scalars.items():
            if tag.startswith("validation/") and np.isfinite(curve.values).any():
                best = int(np.nanargmax(curve.values) if tag.endswith("accuracy") else np.nanargmin(curve.values))
                cells = [f"{_number(curve.values[i])} at {int(curve.steps[i]):,}" for i in (0, best, -1)]
                rows.append((*[each.name] * has_runs, tag.removeprefix("validation/"), *cells))
    names = ("Run",) * has_runs + ("Validation", "First", "Best", "Last")
    table = Table("Value at step", names, tuple(rows), num_text_columns=len(names) - 3)
    html = block_html(table) if rows else ""
    html += "".join(_task_results(each, has_runs=has_runs) for each in shown if each.run.results)
    return html or "<p>Nothing was evaluated yet.</p>\n"


def _task_results(each: ShownRun, *, has_runs: bool) -> str:
    """Of tasks, over steps."""
    results = each.run.results
    steps = sorted({step for by_step in results.values() for step in by_step})
    chosen = [steps[i] for i in _spread(len(steps), _MOST_STEPS)]
    some = f", {len(chosen)} of {len(steps)} steps" if len(steps) > len(chosen) else ""
    rows = tuple(
        (*key, *(_number(by_step[step]) if step in by_step else "" for step in chosen))
        for key, by_step in sorted(results.items())
    )
    header = ("Task", "Metric", *(f"step {step:,}" for step in chosen))
    caption = f"{each.name}: tasks{some}" if has_runs else f"Tasks{some}"
    return block_html(Table(caption, header, rows, num_text_columns=2))


def _number(value: float) -> str:
    return number_text(float(f"{value:.4g}"))


def _spread(number: int, most: int) -> list[int]:
    """Indices, at most so many, evenly; the first and the last are among them."""
    return np.unique(np.linspace(0, number - 1, most).astype(int)).tolist()


def sample_section(shown: Sequence[ShownRun]) -> str:
    """What the model wrote, prompt by prompt; "" where no samples are."""
    prompts = [
        _prompt(each.name if len(shown) > 1 else "", tag, texts)
        for each in shown
        for tag, texts in sorted(each.run.curves.texts.items(), key=lambda item: _prompt_number(item[0]))
        if tag.startswith(_SAMPLES)
    ]
    return f'<div class="prompts">\n{"".join(prompts)}</div>\n' if prompts else ""


def _prompt_number(tag: str) -> tuple[int, str]:
    number = tag.rpartition("/")[2]
    return (int(number) if number.isdecimal() and len(number) < 10 else 1 << 40, tag)


def _prompt(name: str, tag: str, texts: Sequence[Text]) -> str:
    """The newest text, and earlier ones folded."""
    chosen = [texts[i] for i in _spread(len(texts), _MOST_SAMPLES)][::-1]
    items = "".join(
        f"<details{' open' * (index == 0)}><summary>step {each.step:,}</summary>"
        f'<blockquote dir="auto" tabindex="0">{html_text(each.text.strip())}</blockquote></details>\n'
        for index, each in enumerate(chosen)
    )
    some = f", {len(chosen)} of {len(texts)} steps" if len(texts) > len(chosen) else ""
    title = ", ".join(filter(None, [name, f"prompt {tag.removeprefix(_SAMPLES)}{some}"]))
    return f"<article><h3>{html_text(title)}</h3>\n{items}</article>\n"


def settings_section(shown: Sequence[ShownRun]) -> str:
    """What differs between the runs, and all settings of each."""
    known = [each for each in shown if each.run.settings]
    html = _differences(known) if len(known) > 1 else ""
    for each in shown:
        if text := each.run.config_text.strip():
            html += folded(f"All settings of {each.name}", block_html(Code("gin", text)))
    return html


def _differences(shown: Sequence[ShownRun]) -> str:
    names = sorted({name for each in shown for name in each.run.settings})
    values = {name: [_setting(each.run, name) for each in shown] for name in names}
    rows = tuple((Name(name), *map(Name, found)) for name, found in values.items() if len(set(found)) > 1)
    if not rows:
        return "<p>All settings are the same.</p>\n"
    header = ("Setting", *(each.name for each in shown))
    return block_html(Table("What differs between the runs, as they are now", header, rows, len(header)))


def _setting(run: ReportedRun, name: str) -> str:
    return one_line(repr(run.settings[name])) if name in run.settings else "not set"

"""Runs as one HTML file that needs nothing but itself: what ran, curves, statistics, time, results, samples, events."""

from collections.abc import Sequence

import numpy as np

from data_prep.pages.blocks import Cell, Name, Table, Tile
from data_prep.pages.numbers import duration, plural, short
from data_prep.pages.plots import MAX_POINTS
from data_prep.pages.render_html import block_html
from data_prep.pages.shell import shell
from data_prep.pages.text import html_text, script_json
from gpt_pretrain.data.stages import Stage
from gpt_pretrain.history import report_curves
from gpt_pretrain.history.report_heat import heat_data, heat_html, heat_of
from gpt_pretrain.history.report_sections import (
    MOST_PLOTS,
    controls,
    evaluation_section,
    event_section,
    folded,
    legend,
    plots_html,
    sample_section,
    settings_section,
    time_section,
)
from gpt_pretrain.history.reported_run import ReportedRun
from gpt_pretrain.history.shown_run import ShownRun, clock, shown_runs
from gpt_pretrain.train.time_ledger import Category

MAX_RUNS = 8  # that have a colour of their own
_SHAPE = {"n_layer": "layers", "n_head": "heads", "n_embd": "wide"}


def render_report(runs: Sequence[ReportedRun], *, python: str, made_by: str, now: float) -> str:
    """The page; every text in it is escaped, and its policy lets nothing run but the script of this project.

    Args:
      runs: the first one is the one that it is about.
      python: how to call the interpreter, in commands.
      made_by: the command that was typed.
      now: seconds since 1970.
    """
    shown = shown_runs(runs)
    training, speed = report_curves.training_plots(runs), report_curves.speed_plots(runs)
    evaluations, others = report_curves.evaluation_plots(runs), report_curves.other_plots(runs)
    heats = [(f"h{each.number}", each, heat) for each in shown if (heat := heat_of(each.run))]
    curves = plots_html(training, shown) or "<p>No curves of training are there.</p>\n"
    sections = [
        ("What ran", _what_ran(shown)),
        ("Curves", legend(shown) + controls(shown) + curves),
        ("Events", event_section(shown, python)),
        ("Layers and sites", _heat_section(shown, heats)),
        ("Speed and time", plots_html(speed, shown) + time_section(shown)),
        ("Evaluations", plots_html(evaluations, shown) + evaluation_section(shown)),
        ("Samples", sample_section(shown)),
        ("Settings", settings_section(shown)),
        ("Other curves", folded("Show them", plots_html(others, shown)) if others else ""),
        ("Not shown", _notes(shown)),
    ]
    drawn = [plot for plots in (training, speed, evaluations, others) for plot in plots[:MOST_PLOTS]]
    data = {
        "runs": [report_curves.run_data(each.run, each.name, each.marks()) for each in shown],
        "plots": [report_curves.plot_data(plot) for plot in drawn],
        "heats": [heat_data(heat, key) for key, _, heat in heats],
    }
    others_too = f" and {plural(len(shown) - 1, 'other run')}" if len(shown) > 1 else ""
    return shell(
        title=shown[0].name + others_too,
        kind="Training runs" if others_too else "Training run",
        tiles=_tiles(runs[0], now),
        sections="".join(f"<section>\n<h2>{title}</h2>\n{html}</section>\n" for title, html in sections if html),
        footer=_footer(made_by, now),
        style="report.css",
        script="report.js",
        data=script_json(data),
    )


def _tiles(run: ReportedRun, now: float) -> list[Tile]:
    """Of the first run."""
    scalars, last = run.curves.scalars, run.last_step
    written = max((session.ended for session in run.curves.sessions), default=None)
    if run.data:
        state = "finished" if run.num_consumed >= run.data.num_steps else "not finished"
        of = f"of {run.num_steps:,}"
    else:
        state, of = "unknown", "as far as the curves go"
    tiles = [Tile("State", state, _ago(written, now)), Tile("Step", f"{last:,}", of)]
    if run.data:
        examples = run.data.plan.position(last)
        tiles.append(Tile("Tokens", short(run.data.plan.tokens_before(last)), plural(examples, "example")))
    for tag, name in (("train/loss", "Loss"), ("validation/loss", "Validation loss")):
        if tag in scalars:
            curve = scalars[tag]
            tiles.append(Tile(name, f"{curve.values[-1]:.4g}", f"nats, at step {int(curve.steps[-1]):,}"))
    if "train/tokens_per_sec" in scalars:
        speed = scalars["train/tokens_per_sec"].values
        tiles.append(Tile("Tokens a second", short(round(float(np.median(speed)))), "median"))
    if run.times:
        wall = sum(run.times.secs.values())
        share = 100 * run.times.secs.get(Category.STEP, 0.0) / max(wall, 1e-9)
        remark = f"{plural(run.times.num_sessions, 'session')}, goodput {share:.0f} %"
        tiles.append(Tile("Wall time", duration(wall), remark))
    return tiles


def _ago(written: float | None, now: float) -> str:
    if written is None:
        return "no curves yet"
    if now - written > 600:
        return f"last curve {clock(written)}"
    return f"last curve {duration(max(0.0, now - written))} ago"


def _what_ran(shown: Sequence[ShownRun]) -> str:
    facts = [_facts(each.run) for each in shown]
    names = dict.fromkeys(name for each in facts for name in each)
    rows = tuple((name, *(each.get(name, "") for each in facts)) for name in names)
    header = ("", *(each.name if len(shown) > 1 else "" for each in shown))
    return block_html(Table("As its directory says", header, rows, num_text_columns=len(header)))


def _facts(run: ReportedRun) -> dict[str, Cell]:
    facts: dict[str, Cell] = {"directory": Name(run.name)}
    made, settings = run.provenance, run.settings
    if run.data and run.data.run_id:
        facts["run id"] = Name(run.data.run_id)
    if made:
        shape = [f"{settings[f'model.{key}']} {word}" for key, word in _SHAPE.items() if f"model.{key}" in settings]
        facts["model"] = ", ".join([f"{made.num_params:,} parameters", *shape])
        for name, each in made.datasets.items():
            facts["data" if name == "data" else f"data {name}"] = (
                f"{each.directory}: {each.num_train_tokens:,} tokens by {each.tokenizer}, "
                f"fingerprint {each.fingerprint:.12}"
            )
    if made and made.interventions:
        facts["interventions"] = "; ".join(made.interventions)
    for index, stage in enumerate(run.data.plan.stages if run.data else ()):
        facts[f"plan, stage {index + 1}"] = _in_words(stage)
    if made:
        mesh = " x ".join(f"{axis}={size}" for axis, size in made.mesh.items())
        facts["devices"] = f"{made.num_devices} x {made.device_kind} as {mesh}, {made.num_processes} process(es)"
        versions = {"Python": made.python, **made.versions}
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        if made.code:
            facts["code"] = f"commit {made.code.commit:.12}" + ", with changes since" * made.code.is_dirty
    return facts


def _in_words(stage: Stage) -> str:
    sizes = " and ".join(f"{size:,}" + f" after step {first:,}" * bool(first) for first, size in stage.batch_sizes)
    mixture = ", ".join(f"{stream.name} {stream.count}" for stream in stage.streams if stream.name)
    excluded = sum(len(stream.excluded) for stream in stage.streams)
    return (
        f"from step {stage.from_step + 1:,}: batches of {sizes} windows of {stage.seq_len:,} tokens, "
        f"shuffle {stage.shuffle}, seed {stage.seed}"
        + f", mixture {mixture}" * bool(mixture)
        + f", {excluded:,} windows excluded" * bool(excluded)
    )


def _heat_section(shown: Sequence[ShownRun], heats) -> str:
    if not heats:
        return "<p>No statistics are there: train.statistics_interval was 0, or none was due yet.</p>\n"
    intro = (
        "<p>Activations at each hook site, and norms of the gradient and of the parameters. A colour is a "
        "magnitude, on a logarithmic scale between the least and the greatest of its column over all steps.</p>\n"
    )
    return intro + "".join(heat_html(heat, key, f"{each.name}, " * (len(shown) > 1)) for key, each, heat in heats)


def _notes(shown: Sequence[ShownRun]) -> str:
    notes = [f"{each.name}: {note}" if len(shown) > 1 else note for each in shown for note in each.run.notes]
    items = "".join(f"<li>{html_text(note)}</li>\n" for note in notes)
    return f'<ul class="notes">\n{items}</ul>\n' if items else ""


def _footer(made_by: str, now: float) -> str:
    return (
        f"Made by <code>{html_text(made_by)}</code>, {clock(now)}. A curve of more than {MAX_POINTS:,} points is "
        "shown by the lowest and the highest of each of equal stretches, so no spike is left out; smoothing is an "
        "exponential mean of their averages, both ways. Time is wall time since the first curve was begun, without "
        "the pauses between sessions."
    )

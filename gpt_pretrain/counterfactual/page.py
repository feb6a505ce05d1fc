"""The answer to a question as one HTML file that needs nothing but itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.pages.blocks import Block, Cell, Name, Paragraph, Table, Tile
from data_prep.pages.line_chart import Line, LineChart, Mark, line_chart
from data_prep.pages.numbers import plural
from data_prep.pages.render_html import blocks_html
from data_prep.pages.shell import shell
from gpt_pretrain.counterfactual.probes import DOCUMENTS, NEIGHBOURS, VALIDATION
from gpt_pretrain.model.interventions import Intervention

_TITLES = {
    DOCUMENTS: "Loss of the documents in question",
    NEIGHBOURS: "Loss of their neighbours",
    VALIDATION: "Validation loss",
}
_NOTES = {
    DOCUMENTS: "Of all their tokens, in the windows of the stream that hold them.",
    NEIGHBOURS: "Of the other tokens in the same windows. Where windows are substituted the edited arm is not trained "
    "on these either; where targets are masked it is.",
    VALIDATION: "Of the first windows of the validation split.",
}
_MOST_MARKS = 60


def render(result: Mapping[str, Any], lines: Sequence[str]) -> str:
    """The page; every text in it is escaped.

    Args:
      result: see `arms.result_of`.
      lines: what was checked, in words.
    """
    sections = [
        ("What was asked", blocks_html([_asked(result), *(Paragraph((line,)) for line in lines)])),
        ("Losses", "".join(_loss_charts(result))),
        ("How far the arms are apart", _apart(result)),
        ("Gradients at the first difference", blocks_html(_gradients(result))),
        ("Samples", blocks_html(_samples(result))),
    ]
    return shell(
        title=_title(result),
        kind=f"Counterfactual of {result['run']}",
        tiles=_tiles(result),
        sections="".join(f"<section>\n<h2>{title}</h2>\n{html}</section>\n" for title, html in sections),
        footer=blocks_html([Paragraph(("Made by ", Name(str(result["command"])), "."))]),
        style="lines.css",
    )


def _title(result: Mapping[str, Any]) -> str:
    asked = result["asked"]
    parts = []
    if asked["without"]:
        what = plural(len(asked["without"]), "document")
        parts.append(f"{what} not learned" if asked["is_masked"] else f"without {what}")
    if asked["insert"]:
        parts.append(f"with {plural(len(asked['insert']), 'document')} inserted")
    if asked["interventions"]:
        parts.append("with an intervention")
    return f"{result['run']} {' and '.join(parts)}"


def _asked(result: Mapping[str, Any]) -> Block:
    asked, names = result["asked"], []
    are = "are" if len(asked["without"]) > 1 else "is"
    verb = (
        f"{are} read and not learned"
        if asked["is_masked"]
        else f"{are} replaced by windows that the run does not reach"
    )
    for each in asked["without"][:5]:
        names += [Name(each), " "]
    more = f"and {len(asked['without']) - 5} more " if len(asked["without"]) > 5 else ""
    parts: list[str | Name] = [*names, f"{more}{verb}. "] if names else []
    for directory, document, places in asked["insert"]:
        parts += [Name(document), " of ", Name(directory), f" is inserted {plural(len(places), 'time')}. "]
    for fields in asked["interventions"]:
        parts += ["In the edited arm: ", Intervention.from_json(fields).described(), ". "]
    begin = f"the checkpoint of step {result['begin']:,}" if result["begin"] else "the beginning"
    parts.append(
        f"The arms begin at {begin} and end after step {asked['until']:,}; {plural(len(result['steps']), 'step')} "
        f"and {plural(result['num_rows'], 'row')} are concerned."
    )
    return Paragraph(tuple(parts))


def _tiles(result: Mapping[str, Any]) -> list[Tile]:
    tiles = [
        Tile("First step that differs", f"{result['first']:,}", f"of {result['asked']['until']:,}"),
        Tile("Steps concerned", f"{len(result['steps']):,}", plural(result["num_rows"], "row")),
    ]
    last = _last_losses(result)
    for group in (DOCUMENTS, NEIGHBOURS, VALIDATION):
        if group in last["edited"] and group in last.get("control", {}):
            before, after = last["control"][group], last["edited"][group]
            tiles.append(
                Tile(
                    _TITLES[group]
                    .replace("Loss of the d", "D")
                    .replace("Loss of their n", "N")
                    .replace(" in question", ""),
                    f"{after - before:+.4f}",
                    f"{before:.4f} to {after:.4f} nats",
                )
            )
    if result["distance"]:
        tiles.append(
            Tile("Parameters apart", f"{100 * result['distance'][-1]['parameters']['all']:.3g} %", "of their norm")
        )
    return tiles


def _last_losses(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each arm, at the last step that both have."""
    by_step = {arm: {each["step"]: each["loss"] for each in notes} for arm, notes in result["losses"].items() if notes}
    both = set.intersection(*map(set, by_step.values())) if by_step else set()
    return {arm: each[max(both)] if both else {} for arm, each in by_step.items()} | ({} if by_step else {"edited": {}})


def _loss_charts(result: Mapping[str, Any]) -> list[str]:
    losses = result["losses"]
    known = {name for notes in losses.values() for each in notes for name in each["loss"]}
    names = [name for name in _TITLES if name in known] + sorted(known - set(_TITLES))
    marks = [Mark(step, f"step {step} differs") for step in result["steps"][:_MOST_MARKS]]
    charts = []
    for name in names:
        lines = []
        for colour, (arm, notes) in enumerate(losses.items(), start=1):
            points = [(each["step"], each["loss"][name]) for each in notes if name in each["loss"]]
            label = arm if arm == "edited" or result["baseline"].endswith("control") else f"{result['run']}, as it was"
            lines.append(Line(label, [x for x, _ in points], [y for _, y in points], colour))
        note = _NOTES.get(name, "") + (" Dotted lines: steps that differ." if name == DOCUMENTS else "")
        charts.append(
            line_chart(LineChart(_TITLES.get(name, name), "step", "loss, nats", lines, marks, note=note.strip()))
        )
    return charts


def _apart(result: Mapping[str, Any]) -> str:
    notes = result["distance"]
    if not notes:
        return blocks_html([Paragraph(("There is no step at which both have a checkpoint.",))])
    steps = [each["step"] for each in notes]
    parts = [name for name in notes[-1]["parameters"] if name != "all"]
    lines = [Line("all", steps, [each["parameters"]["all"] for each in notes], 1)]
    chart = LineChart(
        "Parameters: norm of the difference, over the norm", "step", "relative distance", lines, has_zero=True
    )
    html = line_chart(chart) if len(steps) > 1 else ""
    rows: list[tuple[Cell, ...]] = []
    for name in parts:
        rows.append((name, *(f"{each['parameters'][name]:.3e}" for each in notes)))
    rows.append(("all", *(f"{each['parameters']['all']:.3e}" for each in notes)))
    header = ("part", *(f"step {step:,}" for step in steps))
    html += blocks_html([Table("Relative distance of the parameters", header, tuple(rows))])
    apart = [each for each in notes if each.get("activations")]
    if apart:
        found = apart[-1]["activations"]
        rows = [
            (f"layer {layer}", f"{distance:.3e}", f"{cosine:.6f}")
            for layer, (distance, cosine) in enumerate(zip(found["relative_distance"], found["cosine"], strict=True))
        ]
        caption = f"Residual stream after each layer, at step {apart[-1]['step']:,}, on windows of the validation split"
        html += blocks_html([Table(caption, ("layer", "relative distance", "cosine"), tuple(rows))])
    return html


def _gradients(result: Mapping[str, Any]) -> list[Block]:
    if not result["gradients"]:
        return [Paragraph(("No batch differs.",))]
    (note,) = result["gradients"][-1:]
    rows = tuple((name, f"{value:.4f}") for name, value in note["cosine"].items())
    words = (
        f"At step {note['step']:,} both arms have the same parameters. The cosine is that of the gradients of their "
        "two batches."
    )
    return [Paragraph((words,)), Table("Cosine of the gradients", ("part", "cosine"), rows)]


def _samples(result: Mapping[str, Any]) -> list[Block]:
    arms = result["samples"]
    rows = []
    for index, each in enumerate(arms["edited"]):
        cells: list[Cell] = [_visible(each["prompt"])]
        for notes in arms.values():
            cells.append(_visible(notes[index]["continuation"]) if index < len(notes) else "")
        rows.append(tuple(cells))
    if not rows:
        return [Paragraph(("None was written.",))]
    header = ("prompt", *arms)
    return [Table("The most likely continuations", header, tuple(rows), num_text_columns=len(header))]


def _visible(text: str) -> str:
    """A text in one line, in which ends of lines can be seen."""
    return text.replace("\n", " ↵ ")

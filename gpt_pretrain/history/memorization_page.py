"""What a run has memorized, as one HTML file that needs nothing but itself."""

import shlex
from collections.abc import Sequence

import numpy as np

from data_prep.pages.blocks import Block, Name, Paragraph, Table, Tile
from data_prep.pages.line_chart import Line, LineChart, Mark, line_chart
from data_prep.pages.numbers import plural
from data_prep.pages.render_html import blocks_html
from data_prep.pages.shell import shell
from gpt_pretrain.history.memorization import Memorization, by_group

_COLOURS = {"seen": 1, "held out": 2}
_MOST_LINES = 40  # of single documents, behind their groups
_FEW = 4  # as many documents at most are drawn one by one, each with its exposures


def render_memorization(run: str, result: Memorization, command: str) -> str:
    """The page; every text in it is escaped."""
    sections = [
        ("Loss", line_chart(_loss_chart(result)) + _single_charts(result)),
        ("Extraction", blocks_html([_extraction_words(result)]) + line_chart(_extraction_chart(result))),
        ("Documents", blocks_html([_table(result)])),
    ]
    return shell(
        title=f"Memorization in {run}",
        kind="Memorization",
        tiles=_tiles(result),
        sections="".join(f"<section>\n<h2>{title}</h2>\n{html}</section>\n" for title, html in sections),
        footer=blocks_html(
            [
                Paragraph(
                    (
                        "Made by ",
                        Name(command),
                        ". Losses are means over the targets of a document's front, from its end-of-text token on, "
                        "without dropout and interventions. Which updates held a document: ",
                        Name(f"python -m gpt_pretrain.inspect {shlex.quote(run)} --document ID"),
                    )
                )
            ]
        ),
        style="lines.css",
    )


def _tiles(result: Memorization) -> list[Tile]:
    means = {group: result.loss[chosen, -1].mean() for group, chosen in by_group(result)}
    last = result.checkpoints[-1]
    tiles = [Tile("Checkpoints", str(len(result.checkpoints)), f"updates {result.checkpoints[0]} to {last}")]
    for group, chosen in by_group(result):
        tiles.append(Tile(f"Loss, {group}", f"{means[group]:.3f}", f"nats, {plural(len(chosen), 'document')}"))
    if len(means) == 2:
        tiles.append(Tile("Difference", f"{means['held out'] - means['seen']:+.3f}", "held out less seen, nats"))
    for group, chosen in by_group(result):
        asked = result.extracted[chosen, -1]
        asked = asked[asked >= 0]
        if len(asked):
            whole = int((asked == result.asked_tokens).sum())
            tiles.append(Tile(f"Extracted, {group}", f"{whole} of {len(asked)}", f"all {result.asked_tokens} tokens"))
    return tiles


def _loss_chart(result: Memorization) -> LineChart:
    lines = []
    for _, chosen in by_group(result):
        lines += [Line("", result.checkpoints, result.loss[index].tolist(), 0) for index in chosen[:_MOST_LINES]]
    for group, chosen in by_group(result):
        name = f"{group}, mean of {plural(len(chosen), 'document')}"
        lines.append(Line(name, result.checkpoints, result.loss[chosen].mean(0).tolist(), _COLOURS[group]))
    note = "Thin lines are single documents."
    return LineChart("Loss of documents at each kept checkpoint", "update", "loss, nats", lines, note=note)


def _single_charts(result: Memorization) -> str:
    """A chart for each document, where they are few: its loss, and when it was seen."""
    seen = [int(index) for index in result.of_group("seen")]
    if len(seen) > _FEW:
        return ""
    charts = []
    for index in seen:
        each = result.passages[index]
        marks = [Mark(step, f"seen in update {step}") for step in each.steps]
        lines = [Line("this document", result.checkpoints, result.loss[index].tolist(), 1)]
        if len(held := result.of_group("held out")):
            lines.append(Line("held out, mean", result.checkpoints, result.loss[held].mean(0).tolist(), 2))
        note = f"Dotted lines: the {plural(len(each.steps), 'update')} that held its front."
        charts.append(line_chart(LineChart(each.name, "update", "loss, nats", lines, marks, note)))
    return "".join(charts)


def _extraction_words(result: Memorization) -> Block:
    return Paragraph(
        (
            f"The model is given the end-of-text token and the first {result.prefix_tokens} tokens of a document, and "
            f"continues with the most likely token, {result.asked_tokens} times. Counted is how many tokens it "
            "continues word for word, up to the first that differs.",
        )
    )


def _extraction_chart(result: Memorization) -> LineChart:
    lines = []
    for group, chosen in by_group(result):
        asked = chosen[result.extracted[chosen, 0] >= 0]
        if len(asked):
            means = result.extracted[asked].mean(0).tolist()
            name = f"{group}, mean of {plural(len(asked), 'document')}"
            lines.append(Line(name, result.checkpoints, means, _COLOURS[group]))
    return LineChart(
        "Tokens continued word for word", "update", f"tokens, of {result.asked_tokens}", lines, has_zero=True
    )


def _table(result: Memorization) -> Table:
    rows = []
    for index in np.argsort(result.loss[:, -1]):
        each, extracted = result.passages[index], int(result.extracted[index, -1])
        rows.append(
            (
                Name(each.name),
                each.group,
                len(each.tokens),
                len(each.steps),
                _steps(each.steps),
                f"{result.loss[index, 0]:.3f}",
                f"{result.loss[index, -1]:.3f}",
                str(extracted) if extracted >= 0 else "too short",
            )
        )
    first, last = result.checkpoints[0], result.checkpoints[-1]
    header = ("document", "", "tokens", "seen", "last seen", f"loss, {first}", f"loss, {last}", "extracted")
    return Table("Each document, the best known first", header, tuple(rows), num_text_columns=2)


def _steps(steps: Sequence[int]) -> str:
    return f"update {steps[-1]:,}" if steps else "never"

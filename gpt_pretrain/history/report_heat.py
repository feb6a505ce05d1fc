"""The statistics of a run as a table of layers and sites, coloured; a step of it at a time."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from data_prep.pages.numbers import plural
from data_prep.pages.plots import number_text
from data_prep.pages.text import html_text, printable
from gpt_pretrain.history.reported_run import ReportedRun
from gpt_pretrain.model.sites import LAYER_SITES

_MOST_STEPS = 50
_STATISTICS = ("rms", "std", "mean", "max_abs")  # in the order in which they are offered
_NORMS = {
    "gradients": "gradient",
    "parameters": "parameters",
    "update_to_weight": "update to weight",
}  # columns that every statistic of a site has beside it
_TAG = re.compile(
    r"statistics/(?:activations/(\d+)/(.+)/([^/]+)|(gradients|parameters|update_to_weight)/(?:layers/(\d+)|(.+)))"
)


@dataclasses.dataclass(frozen=True)
class Heat:
    """Statistics of one run.

    Attributes:
      steps: ascending, at most 50 of those that there are.
      num_steps: that there are.
      rows: layers, then other parts of the model.
      columns: (site, statistic), and (norm, "") for those of gradients and parameters.
      values: (steps, rows, columns); NaN where there is none.
    """

    steps: list[int]
    num_steps: int
    rows: list[str]
    columns: list[tuple[str, str]]
    values: np.ndarray

    @property
    def statistics(self) -> list[str]:
        """That sites have."""
        found = dict.fromkeys(name for _, name in self.columns if name)
        return sorted(found, key=lambda name: _STATISTICS.index(name) if name in _STATISTICS else len(_STATISTICS))


def heat_of(run: ReportedRun) -> Heat | None:
    """None where no statistics were written."""
    cells: dict[tuple[str, tuple[str, str]], dict[int, float]] = {}
    for tag, curve in run.curves.scalars.items():
        if match := _TAG.fullmatch(tag):
            layer, site, statistic, norm, norm_layer, part = match.groups()
            row = f"layer {layer or norm_layer}" if layer or norm_layer else part.replace("_", " ")
            column = (site, statistic) if site else (_NORMS[norm], "")
            cells[row, column] = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    if not cells:
        return None
    steps = sorted({step for by_step in cells.values() for step in by_step})
    chosen = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, _MOST_STEPS).astype(int)).tolist()]
    rows = sorted({row for row, _ in cells}, key=lambda row: (not _number(row), int(_number(row) or 0), row))
    columns = sorted({column for _, column in cells}, key=_order_of)
    values = np.full((len(chosen), len(rows), len(columns)), np.nan)
    for (row, column), by_step in cells.items():
        place = rows.index(row), columns.index(column)
        values[(slice(None), *place)] = [by_step.get(step, math.nan) for step in chosen]
    values[~np.isfinite(values)] = np.nan
    return Heat(chosen, len(steps), rows, columns, values)


def _order_of(column: tuple[str, str]) -> tuple[bool, int, str, str]:
    """Sites as a layer has them, those that are not known here after them; norms last."""
    site, statistic = column
    return not statistic, LAYER_SITES.index(site) if site in LAYER_SITES else len(LAYER_SITES), site, statistic


def _number(row: str) -> str:
    return row.removeprefix("layer ") if row.startswith("layer ") else ""


def ranges_of(heat: Heat) -> list[tuple[float, float] | None]:
    """For each column the least and greatest magnitude of all steps and rows, but for zeros; what colours stand for."""
    found = []
    for column in range(len(heat.columns)):
        sizes = np.abs(heat.values[:, :, column])
        sizes = sizes[sizes > 0]
        found.append((float(sizes.min()), float(sizes.max())) if len(sizes) else None)
    return found


def shade_of(value: float, span: tuple[float, float] | None) -> float:
    """From 0 to 1, on a logarithmic scale of magnitudes.

    >>> shade_of(-10.0, (1.0, 100.0)), shade_of(0.0, (1.0, 100.0))
    (0.5, 0.0)
    """
    if span is None or not value or math.isnan(value):
        return 0.0
    low, high = map(math.log, span)
    return 0.5 if high == low else (math.log(abs(value)) - low) / (high - low)


def heat_html(heat: Heat, key: str, caption: str) -> str:
    """The newest step; the page's script offers the others."""
    first, spans = heat.statistics[0] if heat.statistics else "", ranges_of(heat)
    head = "".join(
        f'<th scope="col" class="number"{_hidden(name, first)}>{html_text(site.replace("_", " "))}'
        f"<small>{html_text(name.replace('_', ' ') or 'norm')}</small></th>"
        for site, name in heat.columns
    )
    lines = []
    for number, row in enumerate(heat.rows):
        cells = "".join(
            f'<td class="heat"{_hidden(name, first)} style="--k:{shade_of(value, spans[i]):.3f}">{_cell(value)}</td>'
            for i, ((_, name), value) in enumerate(zip(heat.columns, heat.values[-1, number].tolist(), strict=True))
        )
        lines.append(f'<tr><th scope="row">{html_text(row)}</th>{cells}</tr>\n')
    options = "".join(
        f'<option value="{html_text(each)}">{html_text(each.replace("_", " "))}</option>' for each in heat.statistics
    )
    last = len(heat.steps) - 1
    what = f'<label>Of the activations <select class="which">{options}</select></label>' if options else ""
    controls = (
        f'<form class="controls" hidden>{what}<label>Step <input type="range" class="step" min="0" max="{last}" '
        f'value="{last}" aria-label="Step of the statistics"></label></form>\n'
    )
    some = f", {len(heat.steps)} of {plural(heat.num_steps, 'step')}" if heat.num_steps > len(heat.steps) else ""
    text = html_text(f"{caption}step {heat.steps[-1]:,}")
    return (
        f'<div id="{key}">{controls}<div class="scroll" role="region" aria-label="{text}" tabindex="0">'
        f'<table class="layers">\n<caption>{html_text(caption)}step <span class="at">{heat.steps[-1]:,}</span>{some}'
        f"</caption>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div></div>\n"
    )


def heat_data(heat: Heat, key: str) -> dict[str, Any]:
    """For the page's script."""
    return {
        "key": key,
        "steps": heat.steps,
        "of": [printable(name) for _, name in heat.columns],
        "spans": ranges_of(heat),
        "values": [
            [None if math.isnan(value) else float(f"{value:.4g}") for value in step.reshape(-1).tolist()]
            for step in heat.values
        ],
    }


def _hidden(name: str, shown: str) -> str:
    return "" if name in ("", shown) else " hidden"


def _cell(value: float) -> str:
    return "" if math.isnan(value) else number_text(float(f"{value:.3g}"))

"""Curves as SVG, within a page: lines over one axis, with marks where something happened. No script."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep.pages.text import html_text

_WIDTH, _HEIGHT = 720, 300  # of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 16, 44
_NUM_COLOURS = 6  # line-1 to line-6 in lines.css


@dataclass(frozen=True)
class Line:
    """A curve through its points; one that is not finite interrupts it.

    Attributes:
      colour: 1 to 6, or 0 for one that stands behind the others.
      is_dashed: tells two lines of one colour apart.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 1
    is_dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the horizontal axis."""

    x: float
    text: str


@dataclass(frozen=True)
class LineChart:
    """
    Attributes:
      x_axis, y_axis: what they measure, with the unit.
      lines: drawn in this order. Those of colour 0 are not in the legend.
      note: a sentence below the title.
      has_zero: the vertical axis begins at 0, as that of counts.
    """

    title: str
    x_axis: str
    y_axis: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    note: str = ""
    has_zero: bool = False


def line_chart(chart: LineChart) -> str:
    """The chart as a figure."""
    points = [
        (float(x), float(y))
        for line in chart.lines
        for x, y in zip(line.xs, line.ys, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    title, note = html_text(chart.title), html_text(chart.note)
    caption = f"<figcaption>{title}{f'<p>{note}</p>' if note else ''}</figcaption>"
    if not points:
        return f'<figure class="lines">{caption}<p>There is nothing to draw.</p></figure>\n'
    across = _Axis([x for x, _ in points] + [mark.x for mark in chart.marks], _LEFT, _WIDTH - _RIGHT, margin=0.0)
    heights = [y for _, y in points] + [0.0] * chart.has_zero
    up = _Axis(heights, _HEIGHT - _BOTTOM, _TOP, margin=0.06)
    parts = [
        *_grid(across, up, chart),
        *(_mark(mark, across) for mark in chart.marks),
        *(_line(line, across, up) for line in chart.lines),
    ]
    label = html_text(f"{chart.title}: {chart.y_axis} over {chart.x_axis}, {len(chart.lines)} lines")
    return (
        f'<figure class="lines">{caption}\n{_legend(chart.lines)}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">\n' + "\n".join(parts) + "\n</svg></figure>\n"
    )


class _Axis:
    """Values -> places between two ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float, *, margin: float):
        low, high = min(values), max(values)
        room = margin * (high - low) or (0.5 * abs(high) or 0.5) * (high == low)
        self.low, self.high = low - room, high + room
        self._start, self._stop = start, stop

    def place(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Three to six round values within."""
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _round_step(least: float) -> float:
    """
    >>> _round_step(0.13), _round_step(7)
    (0.2, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(least))
    return next(round(power * factor, 12) for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _number(value: float) -> str:
    """
    >>> _number(1500.0), _number(0.25), _number(-0.0)
    ('1,500', '0.25', '0')
    """
    value = value or 0.0
    return f"{value:,.0f}" if value == int(value) else f"{value:.6g}"


def _grid(across: _Axis, up: _Axis, chart: LineChart) -> Iterator[str]:
    floor = _HEIGHT - _BOTTOM
    for value in up.ticks():
        y = f"{up.place(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 7}" y="{y}" dy="4" text-anchor="end">{_number(value)}</text>'
    for value in across.ticks():
        x = f"{across.place(value):.1f}"
        yield (
            f'<line class="grid" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 5}"/>'
            f'<text x="{x}" y="{floor + 19}" text-anchor="middle">{_number(value)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{html_text(chart.x_axis)}</text>'
    yield (
        f'<text transform="translate(13 {(_TOP + floor) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{html_text(chart.y_axis)}</text>"
    )


def _mark(mark: Mark, across: _Axis) -> str:
    x = f"{across.place(mark.x):.1f}"
    title = f"<title>{html_text(mark.text)}</title>"
    return f'<g class="happened">{title}<path d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/></g>'


def _line(line: Line, across: _Axis, up: _Axis) -> str:
    """Its points joined; a single one is a dot."""
    drawn, shapes = [], []
    for x, y in itertools.chain(zip(line.xs, line.ys, strict=True), [(math.nan, math.nan)]):
        if math.isfinite(x) and math.isfinite(y):
            drawn.append(f"{across.place(x):.1f} {up.place(y):.1f}")
            continue
        if len(drawn) == 1:
            shapes.append(f"M{drawn[0]}h.01")
        elif drawn:
            shapes.append("M" + "L".join(drawn))
        drawn = []
    kind = f"line-{1 + (line.colour - 1) % _NUM_COLOURS}" if line.colour else "behind"
    dashes = " dashed" if line.is_dashed else ""
    return f'<path class="{kind}{dashes}" d="{"".join(shapes)}"><title>{html_text(line.name)}</title></path>'


def _legend(lines: Sequence[Line]) -> str:
    items = []
    for name, line in {line.name: line for line in lines if line.colour}.items():
        kind = f"line-{1 + (line.colour - 1) % _NUM_COLOURS}" + " dashed" * line.is_dashed
        sample = f'<svg viewBox="0 0 26 8" aria-hidden="true"><path class="{kind}" d="M1 4H25"/></svg>'
        items.append(f"<li>{sample}{html_text(name)}</li>")
    return f'<ul class="legend-of-lines">{"".join(items)}</ul>\n' if items else ""

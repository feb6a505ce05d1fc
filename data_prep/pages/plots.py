"""Curves as SVG, within a page that `report.js` makes movable; without it they stand still."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.pages.text import html_text

MAX_POINTS = 2000  # of a curve
_STILL_POINTS = 500  # of one that stands still
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 26, 12, 40


@dataclass(frozen=True)
class Line:
    """A curve in a plot.

    Attributes:
      run: which run it is of, from 0; names its colour.
      label: what it is, "validation"; "" where the plot says it.
      x, y: float64 arrays of one length, x ascending.
      has_dots: few points, each of which counts.
    """

    run: int
    label: str
    x: np.ndarray
    y: np.ndarray
    has_dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step; `target` is the id of where the page says more."""

    run: int
    x: float
    kind: str
    text: str
    target: str


@dataclass(frozen=True)
class Plot:
    """
    Attributes:
      key: unique in a page.
      lines: those behind come first.
      is_wide: it has a row of the page to itself.
      may_be_log: of positive values that a logarithmic axis is offered for.
    """

    key: str
    title: str
    lines: tuple[Line, ...]
    is_wide: bool = False
    may_be_log: bool = False


def reduced(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points of a curve: of each of equal stretches its lowest and its highest one.

    No spike is lost. First and last point stay. Values that are not finite are left out.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    chosen = [0, len(x) - 1]
    for part in _stretches(len(x), most // 2):
        chosen += [part.start + int(np.argmin(y[part])), part.start + int(np.argmax(y[part]))]
    chosen = np.unique(chosen)
    return x[chosen], y[chosen]


def averaged(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS // 2) -> tuple[np.ndarray, np.ndarray]:
    """The means of equal stretches, which a smoothed curve is drawn from: lowest and highest points would bias it."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    parts = _stretches(len(x), most)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _stretches(length: int, number: int) -> list[slice]:
    edges = np.linspace(0, length, number + 1).astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]


def plot_svg(plot: Plot, marks: Sequence[Mark], axis: str) -> str:
    """A figure with a linear vertical axis; the marks are links."""
    width, height = (940, 300) if plot.is_wide else (460, 220)
    kept = [(line, *reduced(line.x, line.y, _STILL_POINTS)) for line in plot.lines]
    xs, ys = (np.concatenate(each) for each in ([x for _, x, _ in kept], [y for _, _, y in kept]))
    title = html_text(plot.title)
    name = f'<figcaption id="{plot.key}-title">{title}</figcaption>'
    if not len(xs):
        return f'<figure class="plot" id="{plot.key}">{name}<p class="none">no finite value</p></figure>\n'
    to_x = _Scale(float(xs.min()), float(xs.max()), _LEFT, width - _RIGHT)
    to_y = _Scale(float(ys.min()), float(ys.max()), height - _BOTTOM, _TOP)
    parts = [*_y_ticks(to_y, width), *_x_ticks(to_x, width, height)]
    for mark in marks:
        if to_x.low <= mark.x <= to_x.high:
            at = to_x(mark.x)
            parts.append(
                f'<a href="#{mark.target}" class="mark {mark.kind}"><title>{html_text(mark.text)}</title>'
                f'<path d="M{at:.1f} {_TOP}V{height - _BOTTOM}"/>'
                f'<path class="head" d="M{at:.1f} {_TOP + 7}l-4-7h8z"/></a>'
            )
    for line, x, y in kept:
        points = [f"{to_x(a):.1f} {to_y(b):.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        dashed = " second" if line.label else ""
        parts.append(f'<path class="line r{line.run}{dashed}" d="M{"L".join(points)}"/>')
        if line.has_dots or len(points) == 1:
            circles = "".join(f'<circle cx="{p.split()[0]}" cy="{p.split()[1]}" r="2.6"/>' for p in points)
            parts.append(f'<g class="dots r{line.run}">{circles}</g>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 5}" text-anchor="middle">{html_text(axis)}</text>')
    wide = " wide" if plot.is_wide else ""
    return (
        f'<figure class="plot{wide}" id="{plot.key}">{name}\n<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{plot.key}-title">{"".join(parts)}</svg></figure>\n'
    )


class _Scale:
    """Values -> places, linear; a range without width is widened."""

    def __init__(self, low: float, high: float, first: float, last: float):
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = 0.05 * max(abs(low), abs(high)) or 1.0
            low, high = low - room, high + room
        self.low, self.high, self._first, self._last = low, high, first, last

    def __call__(self, value: float) -> float:
        return self._first + (value - self.low) / (self.high - self.low) * (self._last - self._first)


def ticks(low: float, high: float, about: int = 5, finest: float = 0.0) -> list[float]:
    """Round values between two, both included; `finest` or more apart.

    >>> ticks(0, 10), ticks(2.96, 11.2)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [4.0, 6.0, 8.0, 10.0])
    """
    least = max(finest, (high - low) / about)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def number_text(value: float, digits: int = 4) -> str:
    """As short as a tick wants it.

    >>> number_text(120000.0), number_text(0.00034), number_text(5.25), number_text(-0.0)
    ('120k', '3.4e-04', '5.25', '0')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        return f"{value:.1e}" if f"{value:.1e}"[2] != "0" else f"{value:.0e}"
    for power, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= power and size >= 1e4:
            return f"{value / power:.{digits}g}{sign}"
    return f"{value:.{digits}g}"


def _y_ticks(to_y: _Scale, width: int) -> Iterator[str]:
    levels = ticks(to_y.low, to_y.high, 6)
    texts = next(
        (found for n in range(4, 9) if len(set(found := [number_text(each, n) for each in levels])) == len(found)), []
    )
    for tick, text in zip(levels, texts or map(str, levels), strict=True):
        y = f"{to_y(tick):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{text}</text>'


def _x_ticks(to_x: _Scale, width: int, height: int) -> Iterator[str]:
    for tick in ticks(to_x.low, to_x.high, width // 80, 1):
        x, floor = f"{to_x(tick):.1f}", height - _BOTTOM
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 5}"/>'
        yield f'<text x="{x}" y="{floor + 18}" text-anchor="middle">{number_text(tick)}</text>'

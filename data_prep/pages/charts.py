"""Drawings as SVG, within a page."""

import math
from collections.abc import Iterator

from data_prep.pages.blocks import Bar, Histogram
from data_prep.pages.numbers import range_label, short
from data_prep.pages.text import html_text

_WIDTH, _HEIGHT = 460, 236  # of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 22, 24, 44  # margins around the bars
_FLOOR = _HEIGHT - _BOTTOM


def histogram(chart: Histogram) -> str:
    """A bar chart with a logarithmic horizontal axis, and a line where half of the sum is."""
    bars = chart.bars
    step = tick_step(max(bar.value for bar in bars))
    # Bars end below the highest tick's line.
    scale = (_FLOOR - _TOP) / (math.ceil(max(bar.value for bar in bars) / step) * step)
    axis = _LogAxis(bars[0].start, bars[-1].stop)
    parts = [
        *_value_ticks(max(bar.value for bar in bars), step, scale),
        f'<g class="{html_text(chart.key)}">',
        *(_bar(chart, bar, axis, scale) for bar in bars if bar.value),
        "</g>",
        *axis.ticks(),
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">'
        f"{html_text(chart.axis)}</text>",
        _median_line(chart.median, axis),
    ]
    fullest = max(bars, key=lambda bar: (bar.value, bar.start))
    text = (
        f"Bar chart of {chart.things} by {chart.size}, from {bars[0].start:,} to {bars[-1].stop:,} "
        f"{chart.size_unit}. Half of the {chart.things} are at {chart.median:,} or less; the highest bar is at "
        f"{range_label(fullest.start, fullest.stop)}."
    )
    key, title = html_text(chart.key), html_text(chart.title)
    return (
        f'<figure><figcaption>{title}</figcaption>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{key}-title {key}-text"><title id="{key}-title">{title}</title>'
        f'<desc id="{key}-text">{html_text(text)}</desc>\n' + "\n".join(parts) + "\n</svg></figure>\n"
    )


def tick_step(largest: int) -> int:
    """A round distance between ticks so that there are three to five of them.

    >>> tick_step(430), tick_step(3)
    (100, 1)
    """
    least = max(1, largest / 5)
    power = 10 ** int(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


class _LogAxis:
    """Sizes from `start` to `stop` across the chart."""

    def __init__(self, start: int, stop: int):
        self._low, self._high = math.log2(start), math.log2(stop)

    def x(self, size: float) -> float:
        return _LEFT + (math.log2(size) - self._low) / (self._high - self._low) * (_WIDTH - _LEFT - _RIGHT)

    def ticks(self) -> Iterator[str]:
        octave_step = max(1, math.ceil((self._high - self._low) / 7))
        for octave in range(round(self._low), round(self._high) + 1, octave_step):
            place = self.x(2**octave)
            yield (
                f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_FLOOR}" y2="{_FLOOR + 5}"/>'
                f'<text x="{place:.1f}" y="{_FLOOR + 19}" text-anchor="middle">{2**octave:,}</text>'
            )


def _value_ticks(largest: int, step: int, scale: float) -> Iterator[str]:
    for tick in range(0, largest + step, step):
        y = f"{_FLOOR - tick * scale:.1f}"
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 7}" y="{y}" dy="4" text-anchor="end">{short(tick)}</text>'


def _bar(chart: Histogram, bar: Bar, axis: _LogAxis, scale: float) -> str:
    height = max(1.0, bar.value * scale)  # a single thing must not vanish
    left, width = axis.x(bar.start), axis.x(bar.stop) - axis.x(bar.start) - 1
    label = f"{range_label(bar.start, bar.stop)} {chart.size_unit}: {bar.value:,} {chart.things}"
    return (
        f'<rect x="{left:.1f}" y="{_FLOOR - height:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"><title>{html_text(label)}</title></rect>'
    )


def _median_line(median: int, axis: _LogAxis) -> str:
    place = axis.x(max(1, median))
    side, gap = ("start", 5) if place < (_LEFT + _WIDTH) / 2 else ("end", -5)
    return (
        f'<path class="halo" d="M{place:.1f} {_TOP - 18}V{_FLOOR}"/>'
        f'<path class="median" d="M{place:.1f} {_TOP - 18}V{_FLOOR}"/>'
        f'<text class="mark" x="{place + gap:.1f}" y="{_TOP - 9}" text-anchor="{side}">'
        f"median {median:,}</text>"
    )

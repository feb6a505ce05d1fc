"""The statistics of a step as one picture: a row a layer, a column a site, a panel for each kind of statistic."""

import functools
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt_pretrain.model.sites import SITES

NAME = "statistics/heat_map"

_ACTIVATION = re.compile(r"statistics/activations/(\d+)/(.+)/([^/]+)")  # layer, site, kind
_NORM = re.compile(
    r"statistics/(gradients|parameters|update_to_weight)/(?:layers/(\d+)|(.+))"
)  # layer, or another part
_SIGNED = ("mean", "rise")  # kinds around 0; all others are magnitudes

_CELL, _ROW, _GAP, _TITLE = 58, 15, 14, 48  # pixels
_FONT_SIZE = 11
_MOST_WIDTH = 1400  # pixels; more panels than fit stand below one another
_MAGNITUDES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis
_SIGNS = ((33, 102, 172), (247, 247, 247), (178, 24, 43))
_NOT_FINITE, _INK = (255, 0, 255), (30, 30, 30)


class Panel(NamedTuple):
    """One kind of statistic.

    Attributes:
      values: (rows, columns), those of `rows` and `columns`; masked where the model has no such value.
    """

    title: str
    columns: tuple[str, ...]
    values: np.ma.MaskedArray

    @property
    def finite(self) -> np.ndarray:
        found = self.values.compressed()
        return found[np.isfinite(found)]


def pictures_of(scalars: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{"statistics/heat_map": (height, width, 3) uint8}; nothing where none of the scalars are statistics of layers."""
    rows, panels = panels_of(scalars)
    return {NAME: draw(rows, panels)} if panels else {}


def panels_of(scalars: Mapping[str, Any]) -> tuple[list[str], list[Panel]]:
    """The rows, layers first, and the panels, from names such as `statistics/activations/3/attn_out/rms`."""
    found: dict[str, dict[str, dict[str, float]]] = {}  # kind -> column -> row -> value
    for name, value in scalars.items():
        if match := _ACTIVATION.fullmatch(name):
            layer, site, kind = match.groups()
            found.setdefault(f"activations: {kind}", {}).setdefault(site, {})[layer] = float(value)
        elif match := _NORM.fullmatch(name):
            of, layer, part = match.groups()
            found.setdefault(of, {}).setdefault("norm", {})[part if layer is None else layer] = float(value)
    names = {row for columns in found.values() for values in columns.values() for row in values}
    layers = sorted((name for name in names if name.isdigit()), key=int)
    if not layers:
        return [], []
    rows = layers + sorted(names - set(layers))
    return rows, [_panel(title, columns, rows) for title, columns in found.items()]


def _panel(title: str, columns: Mapping[str, Mapping[str, float]], rows: Sequence[str]) -> Panel:
    order = sorted(columns, key=lambda site: (SITES.index(site) if site in SITES else len(SITES), site))
    values = np.ma.masked_all((len(rows), len(order)))
    for column, site in enumerate(order):
        for row, name in enumerate(rows):
            if name in columns[site]:
                values[row, column] = columns[site][name]
    return Panel(title, tuple(order), values)


def draw(rows: Sequence[str], panels: Sequence[Panel]) -> np.ndarray:
    """Cells in the colour of their value, with the value, names of rows and columns, and each panel's range.

    A panel has colours of its own: from its smallest value to its largest, by their logarithms where all are above 0
    and the largest is more than 10 times the smallest; of signed values from -most to most. What is not finite is
    magenta.
    """
    from PIL import Image, ImageDraw, ImageFont  # Only a run that draws waits for it.

    font = ImageFont.load_default(_FONT_SIZE)

    def width_of(texts: Iterable[str]) -> int:
        return math.ceil(max(font.getlength(text) for text in texts))

    margin = width_of(map(_row_label, rows)) + _GAP
    widths = [max(_CELL * len(panel.columns), width_of(_titles(panel))) + _GAP for panel in panels]
    places = _places(widths, margin, _TITLE + _ROW * len(rows) + _GAP)
    right = max(left + width for (left, _), width in zip(places, widths, strict=True))
    image = Image.new("RGB", (right, places[-1][1] + _TITLE + _ROW * len(rows) + _GAP), "white")
    pen = ImageDraw.Draw(image)
    write = functools.partial(pen.text, font=font, fill=_INK)
    for top in sorted({top for _, top in places}):
        for index, row in enumerate(rows):
            write((margin - 6, top + _TITLE + _ROW * index + _ROW // 2), _row_label(row), anchor="rm")
    for panel, (left, top) in zip(panels, places, strict=True):
        for line, text in enumerate(_titles(panel)):
            write((left, top + 2 + 15 * line), text)
        for column, site in enumerate(panel.columns):
            write((left + _CELL * column + _CELL // 2, top + _TITLE - 8), site, anchor="mm")
        colours, is_absent = _colours(panel), np.ma.getmaskarray(panel.values)
        for (row, column), value in np.ndenumerate(panel.values):
            if is_absent[row, column]:
                continue
            x, y = left + _CELL * column, top + _TITLE + _ROW * row
            colour = tuple(map(int, colours[row, column]))
            pen.rectangle((x, y, x + _CELL - 2, y + _ROW - 2), fill=colour)
            is_dark = np.dot(colour, (0.299, 0.587, 0.114)) < 140
            middle = (x + _CELL // 2 - 1, y + _ROW // 2)
            pen.text(middle, f"{value:.3g}", font=font, fill="white" if is_dark else _INK, anchor="mm")
    return np.asarray(image)


def as_png(pixels_HWC: np.ndarray) -> bytes:
    """uint8 (height, width, 3) as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


def _places(widths: Sequence[int], margin: int, height: int) -> list[tuple[int, int]]:
    """(left, top) of panels beside one another, and below where the picture would become too wide.

    >>> _places([500, 600, 700], 100, 40)
    [(100, 0), (600, 0), (100, 40)]
    """
    places, left, top = [], margin, 0
    for width in widths:
        if left > margin and left + width > _MOST_WIDTH:
            left, top = margin, top + height
        places.append((left, top))
        left += width
    return places


def _row_label(row: str) -> str:
    return f"layer {row}" if row.isdigit() else row


def _titles(panel: Panel) -> tuple[str, str]:
    if not panel.finite.size:
        return panel.title, "nothing finite"
    return panel.title, f"min {panel.finite.min():.3g}  max {panel.finite.max():.3g}"


def _colours(panel: Panel) -> np.ndarray:
    """(rows, columns, 3), 0 to 255."""
    values, found = panel.values.filled(np.nan), panel.finite
    if not found.size:
        return np.full((*values.shape, 3), _NOT_FINITE, float)
    is_signed = panel.title.rpartition(" ")[2] in _SIGNED
    least, most = found.min(), found.max()
    if is_signed:
        most = np.abs(found).max()
        least = -most
    elif least > 0 and most > 10 * least:
        with np.errstate(invalid="ignore", divide="ignore"):
            values, least, most = np.log(values), np.log(least), np.log(most)
    place = (values - least) / (most - least) if most > least else np.full_like(values, 0.5)
    anchors = np.array(_SIGNS if is_signed else _MAGNITUDES, float)
    at = np.linspace(0, 1, len(anchors))
    colours = np.stack([np.interp(place, at, anchors[:, channel]) for channel in range(3)], axis=-1)
    return np.where(np.isfinite(values)[..., None], colours, _NOT_FINITE)

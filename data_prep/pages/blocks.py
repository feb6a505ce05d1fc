"""A page as plain data. `render_html` and `render_markdown` make files of it.

Whoever fills in a page hands over text as it is: the renderers escape it, so that no text from a corpus can become
markup.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Name(NamedTuple):
    """Text in fixed width: files, options, identifiers."""

    text: str


Cell = str | Name | int


@dataclass(frozen=True)
class Paragraph:
    parts: tuple[str | Name, ...]


@dataclass(frozen=True)
class Table:
    """The first `num_text_columns` columns are text, the others numbers."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_text_columns: int = 1
    bars: tuple[float, ...] = ()  # for each row, the length in [0, 1] of a bar behind its name


@dataclass(frozen=True)
class Bar:
    """`value` things of size `start` to `stop - 1`."""

    start: int
    stop: int
    value: int


@dataclass(frozen=True)
class Histogram:
    """How many things there are of each size, on a logarithmic axis.

    Attributes:
      key: names its colour in page.css, and its elements: unique in a page.
      things: what the bars count, "documents".
      size: what they are ordered by, "length of document".
      size_unit: "tokens".
      axis: the title of the axis of sizes.
      bars: of equal width on that axis, without a gap; at least one of them is not empty.
      median: half of the things are at this size or less.
    """

    title: str
    key: str
    things: str
    size: str
    size_unit: str
    axis: str
    bars: tuple[Bar, ...]
    median: int


@dataclass(frozen=True)
class Charts:
    """Histograms side by side and the numbers behind them.

    Attributes:
      coarse: wider bars, for a page without drawings; captioned as the table.
    """

    histograms: tuple[Histogram, ...]
    table: Table
    coarse: tuple[Bar, ...]


@dataclass(frozen=True)
class Code:
    language: str
    text: str


@dataclass(frozen=True)
class Sample:
    """The beginning of a text, and what is known of it."""

    text: str
    is_whole: bool
    facts: tuple[tuple[str, str | int], ...]  # name, value


Block = Paragraph | Table | Charts | Code | Sample


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tile:
    """One of the numbers at the top of a page."""

    name: str
    figure: str
    remark: str


@dataclass(frozen=True)
class Page:
    """
    Attributes:
      kind: what this is, in a few words.
      footer: how it was made.
    """

    title: str
    kind: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    footer: Paragraph

"""A page as plain data, and how it looks as Markdown; `html.py` is how it looks as HTML.

Whoever fills in a page hands over text as it is: the renderers escape it, so that no text from a
corpus can become markup.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.card.summary import Bin

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]|~#$@])")
BAR_CHARS = 40  # of the longest bar in Markdown


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
class Chart:
    """Two histograms over the same bins: how many documents, and how many tokens they hold."""

    bins: tuple[Bin, ...]
    octaves: tuple[Bin, ...]  # wider bins, for a page without drawings
    median: int  # tokens of a document
    token_median: int  # half of the tokens are in documents that are not longer


@dataclass(frozen=True)
class Code:
    language: str
    text: str


@dataclass(frozen=True)
class Sample:
    """The beginning of a document."""

    text: str
    is_whole: bool
    facts: tuple[tuple[str, str | int], ...]


Block = Paragraph | Table | Chart | Code | Sample


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    title: str
    kind: str  # what this is, in a few words
    tiles: tuple[tuple[str, str, str], ...]  # name, figure, remark
    sections: tuple[Section, ...]
    metadata: dict[str, object]  # of a Hugging Face dataset card


def printable(text: str) -> str:
    """Characters that no page may hold become U+FFFD; all ends of line become line feeds."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", re.sub("\r\n?", "\n", text))


def short(number: int, signs: str = "kMBT") -> str:
    """1500000 -> 1.5 M; 999999 -> 1 M"""
    for power, sign in reversed(list(enumerate(signs, start=1))):
        if number >= 0.9995 * 1000**power:
            return f"{number / 1000**power:.3g} {sign}"
    return str(number)


def bin_label(one: Bin) -> str:
    """64–80, or 3 where there is only one length."""
    last = one.stop - 1
    return f"{one.start:,}" if last == one.start else f"{one.start:,}–{last:,}"


def render_markdown(page: Page, html_name: str) -> str:
    """The page as a Hugging Face dataset card; `html_name` is the other page, to link to."""
    # JSON is YAML: quoted as it must be, whatever the strings hold.
    matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in page.metadata.items())
    tiles = Table("", ("", "", ""), page.tiles, num_text_columns=3)
    parts = [
        f"---\n{matter}---\n",
        f"# {_markdown(page.title)}\n",
        f"{_markdown(page.kind)}. The same page with charts: [{html_name}]({html_name}).\n",
        _table(tiles),
    ]
    for section in page.sections:
        parts.append(f"## {_markdown(section.title)}\n")
        parts += [_block(block) for block in section.blocks]
    return "\n".join(parts)


def _markdown(text: Cell) -> str:
    """Text in one line as Markdown that shows just this text, also in a cell of a table."""
    if isinstance(text, int):
        return f"{text:,}"
    line = re.sub(r"\s+", " ", printable(text.text if isinstance(text, Name) else text))
    if isinstance(text, Name) and line.strip() and not re.search(r"[`|]", line):
        return f"`{line}`"
    return MARKDOWN_SYNTAX.sub(r"\\\1", html.escape(line, quote=False))


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return "".join(map(_markdown, block.parts)) + "\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        return _fenced(block.text, block.language)
    if isinstance(block, Chart):
        return f"Documents by length in tokens:\n\n{_fenced(_bars(block.octaves), 'text')}"
    facts = ((name, f"{fact:,}" if isinstance(fact, int) else fact) for name, fact in block.facts)
    line = " · ".join(f"{_markdown(name)} {_markdown(Name(fact))}" for name, fact in facts)
    return f"{line}\n\n{_fenced(block.text + ('' if block.is_whole else ' […]'), 'text')}"


def _table(table: Table) -> str:
    rules = ["---"] * table.num_text_columns + ["---:"] * len(table.header)
    lines = [_row(map(_markdown, table.header)), _row(rules[: len(table.header)])]
    lines += [_row(map(_markdown, row)) for row in table.rows]
    caption = f"{_markdown(table.caption)}:\n\n" if table.caption else ""
    return caption + "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bars(bins: Sequence[Bin]) -> str:
    """One line a bin, with a bar whose length is exact to an eighth of a character."""
    most = max(one.num_documents for one in bins)
    labels = [bin_label(one) for one in bins]
    width = max(map(len, labels))
    lines = []
    for label, one in zip(labels, bins, strict=True):
        eighths = math.ceil(8 * BAR_CHARS * one.num_documents / most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"{label:>{width}} │{bar} {one.num_documents:,}")
    return "\n".join(lines)


def _fenced(text: str, language: str) -> str:
    """A code block with a fence that is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}\n"

"""A page as Markdown, with a front matter as Hugging Face's dataset cards have it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

from data_prep.pages.blocks import Bar, Block, Cell, Charts, Code, Name, Page, Paragraph, Table
from data_prep.pages.numbers import range_label
from data_prep.pages.text import markdown_code, markdown_fence, markdown_line

_BAR_CHARS = 40  # of the longest bar


def render_markdown(page: Page, *, front_matter: Mapping[str, object], html_name: str) -> str:
    """The page as text.

    Args:
      front_matter: JSON values by key.
      html_name: the file of the same page as HTML, to link to.
    """
    # JSON is YAML: quoted as it must be, whatever the strings hold.
    matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front_matter.items())
    rows = tuple((tile.name, tile.figure, tile.remark) for tile in page.tiles)
    parts = [
        f"---\n{matter}---\n",
        f"# {_cell(page.title)}\n",
        f"{_cell(page.kind)}. The same page with charts: [{html_name}]({html_name}).\n",
        _table(Table("", ("", "", ""), rows, num_text_columns=3)),
    ]
    for section in page.sections:
        parts.append(f"## {_cell(section.title)}\n")
        parts += [_block(block) for block in section.blocks]
    return "\n".join(parts)


def _cell(text: Cell) -> str:
    if isinstance(text, int):
        return f"{text:,}"
    return markdown_code(text.text) if isinstance(text, Name) else markdown_line(text)


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return "".join(map(_cell, block.parts)) + "\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        return markdown_fence(block.text, block.language)
    if isinstance(block, Charts):
        return f"{_cell(block.table.caption)}:\n\n{markdown_fence(_bars(block.coarse), 'text')}"
    facts = ((name, f"{fact:,}" if isinstance(fact, int) else fact) for name, fact in block.facts)
    line = " · ".join(f"{_cell(name)} {_cell(Name(fact))}" for name, fact in facts)
    return f"{line}\n\n{markdown_fence(block.text + ('' if block.is_whole else ' […]'), 'text')}"


def _table(table: Table) -> str:
    rules = ["---"] * table.num_text_columns + ["---:"] * len(table.header)
    lines = [_row(map(_cell, table.header)), _row(rules[: len(table.header)])]
    lines += [_row(map(_cell, row)) for row in table.rows]
    caption = f"{_cell(table.caption)}:\n\n" if table.caption else ""
    return caption + "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bars(bars: Sequence[Bar]) -> str:
    """One line a bar, whose length is exact to an eighth of a character."""
    most = max(bar.value for bar in bars)
    labels = [range_label(bar.start, bar.stop) for bar in bars]
    width = max(map(len, labels))
    lines = []
    for label, bar in zip(labels, bars, strict=True):
        eighths = math.ceil(8 * _BAR_CHARS * bar.value / most)
        drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"{label:>{width}} │{drawn} {bar.value:,}")
    return "\n".join(lines)

"""A page as one HTML file."""

from collections.abc import Sequence

from data_prep.pages.blocks import Block, Cell, Charts, Code, Name, Page, Paragraph, Sample, Section, Table
from data_prep.pages.charts import histogram
from data_prep.pages.shell import shell
from data_prep.pages.text import html_text


def render_html(page: Page) -> str:
    """The page as one self-contained file, without a script."""
    return shell(
        title=page.title,
        kind=page.kind,
        tiles=page.tiles,
        sections="".join(map(_section, page.sections)),
        footer=_parts(page.footer),
    )


def _section(section: Section) -> str:
    return f"<section>\n<h2>{_cell(section.title)}</h2>\n{blocks_html(section.blocks)}</section>\n"


def _cell(text: Cell) -> str:
    if isinstance(text, Name):
        return f"<code>{html_text(text.text)}</code>"
    return f"{text:,}" if isinstance(text, int) else html_text(text)


def _parts(paragraph: Paragraph) -> str:
    return "".join(map(_cell, paragraph.parts))


def blocks_html(blocks: Sequence[Block]) -> str:
    """Blocks one after the other, for a page that is put together otherwise."""
    lines: list[str] = []
    for index, block in enumerate(blocks):
        # Samples that follow one another stand in one grid.
        follows_sample = index > 0 and isinstance(blocks[index - 1], Sample)
        if isinstance(block, Sample) != follows_sample:
            lines.append("</div>\n" if follows_sample else '<div class="samples">\n')
        lines.append(block_html(block))
    if blocks and isinstance(blocks[-1], Sample):
        lines.append("</div>\n")
    return "".join(lines)


def block_html(block: Block) -> str:
    """One block; samples want a grid around them."""
    if isinstance(block, Paragraph):
        return f"<p>{_parts(block)}</p>\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Charts):
        return _charts(block)
    if isinstance(block, Code):
        return f"<pre><code>{html_text(block.text)}</code></pre>\n"
    return _sample(block)


def _table(table: Table) -> str:
    kinds = [""] * table.num_text_columns + [' class="number"'] * len(table.header)
    header = zip(kinds, table.header, strict=False)
    head = "".join(f'<th scope="col"{kind}>{_cell(name)}</th>' for kind, name in header)
    lines = []
    for index, (name, *cells) in enumerate(table.rows):
        first = _cell(name)
        if table.bars:
            width = f"{100 * table.bars[index]:.1f}%"
            first = f'<span><i style="width:{width}"></i><b>{first}</b></span>'
        rest = zip(kinds[1:], cells, strict=False)
        row = "".join(f"<td{kind}>{_cell(cell)}</td>" for kind, cell in rest)
        lines.append(f'<tr><th scope="row">{first}</th>{row}</tr>\n')
    bars = ' class="bars"' if table.bars else ""
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.header) else ""
    # With a name and a place in the tab order, so that a keyboard can scroll it sideways.
    return (
        f'<div class="scroll" role="region" aria-label="{_cell(table.caption)}" tabindex="0">'
        f"<table{bars}>\n<caption>{_cell(table.caption)}</caption>\n"
        f"{head}<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _charts(charts: Charts) -> str:
    return (
        f'<div class="charts">\n{"".join(map(histogram, charts.histograms))}</div>\n'
        f"<details><summary>The numbers behind the bars</summary>\n{_table(charts.table)}</details>\n"
    )


def _sample(sample: Sample) -> str:
    facts = "".join(f"<dt>{_cell(name)}</dt><dd>{_cell(fact)}</dd>\n" for name, fact in sample.facts)
    more = "" if sample.is_whole else '<span class="more"> […]</span>'
    return (
        f'<article>\n<blockquote dir="auto" tabindex="0">{_cell(sample.text)}{more}</blockquote>\n'
        f"<dl>\n{facts}</dl>\n</article>\n"
    )

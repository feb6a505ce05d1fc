"""A page as one HTML file that needs nothing but itself: no network, no script."""

import html
import math
from collections.abc import Sequence

from data_prep.card.pages import (
    Block,
    Cell,
    Chart,
    Code,
    Name,
    Page,
    Paragraph,
    Sample,
    Table,
    bin_label,
    printable,
    short,
)
from data_prep.card.summary import Bin

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d9dee4;--page:#fff;--box:#f5f7f9;
--docs:#2f6fbf;--toks:#0f8579;--tint:#dbe8f7;--mark:#b3470e}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ed;--soft:#9aa5b1;--line:#333b45;--page:#12161b;
--box:#1a2027;--docs:#6ea8ea;--toks:#4fbfae;--tint:#203650;--mark:#f0955c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main,header,footer{max-width:60rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:3.5rem}
main{padding-bottom:2rem}
.kind{margin:0;color:var(--soft);font-size:.8rem;letter-spacing:.09em;text-transform:uppercase}
h1{margin:.15rem 0 1.6rem;font-size:2.3rem;line-height:1.15;letter-spacing:-.02em;
overflow-wrap:anywhere}
h2{margin:3.2rem 0 .9rem;font-size:1.3rem;line-height:1.3;letter-spacing:-.01em}
p{margin:.75rem 0;max-width:44rem}
.tiles{display:flex;flex-wrap:wrap;margin:0;
border:1px solid var(--line);border-radius:.6rem;overflow:hidden}
.tiles div{flex:1 1 9.5rem;display:flex;flex-direction:column;padding:.9rem 1.1rem 1rem;
margin:0 -1px -1px 0;border:solid var(--line);border-width:0 1px 1px 0}
.tiles dt{color:var(--soft);font-size:.82rem}
.tiles dd{margin:0}
.tiles .figure{font-size:1.55rem;font-weight:600;line-height:1.35;letter-spacing:-.015em;
font-variant-numeric:tabular-nums}
.tiles .remark{color:var(--soft);font-size:.82rem;line-height:1.4}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-size:.88em;overflow-wrap:anywhere}
pre{margin:.75rem 0;padding:.9rem 1.1rem;border-radius:.5rem;background:var(--box);
font-size:.84rem;line-height:1.6;overflow-x:auto;tab-size:4}
.scroll{margin:1rem 0 1.4rem;overflow-x:auto}
table{width:100%;border-collapse:collapse;font-size:.92rem;line-height:1.4}
caption{padding:0 0 .35rem;color:var(--soft);font-size:.85rem;text-align:left}
th,td{padding:.42rem 0 .42rem 1.4rem;border-bottom:1px solid var(--line);text-align:left;
vertical-align:baseline}
th:first-child,td:first-child{padding-left:0}
thead th{color:var(--soft);font-size:.82rem;font-weight:500;white-space:nowrap}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:7rem}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.bars tbody th{padding:0;min-width:9rem;width:55%;height:2.15rem}
.bars tbody th span{display:block;position:relative;padding:.3rem .55rem}
.bars tbody th i{position:absolute;inset:.2rem auto .2rem 0;border-radius:0 .2rem .2rem 0;
background:var(--tint)}
.bars tbody th b{position:relative;font-weight:400;color:var(--soft)}
.bars tbody th code{color:var(--ink)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));
gap:1.2rem 2rem;margin:1.2rem 0}
figure{margin:0}
figcaption{font-weight:600;font-size:.92rem}
svg{display:block;width:100%;height:auto;margin-top:.3rem;font:13px/1 system-ui,-apple-system,
"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
svg text{fill:var(--soft);font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--line)}
svg .docs rect{fill:var(--docs)}
svg .toks rect{fill:var(--toks)}
svg rect:hover{opacity:.65}
svg .halo{stroke:var(--page);stroke-width:4}
svg .median{stroke:var(--mark);stroke-width:1.5}
svg text.mark{fill:var(--mark)}
details{margin:1rem 0}
summary{color:var(--soft);font-size:.88rem;cursor:pointer}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem}
article{display:flex;flex-direction:column;border:1px solid var(--line);border-radius:.6rem;
overflow:hidden}
blockquote{flex:1;margin:0;padding:1rem 1.1rem;font-size:.95rem;line-height:1.55;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;max-height:26rem;overflow-y:auto}
.more{color:var(--soft)}
article dl{display:grid;grid-template-columns:max-content 1fr;gap:.12rem .9rem;margin:0;
padding:.75rem 1.1rem;border-top:1px solid var(--line);background:var(--box);font-size:.8rem}
article dt{color:var(--soft)}
article dd{margin:0;overflow-wrap:anywhere;unicode-bidi:isolate}
footer{padding-top:1.2rem;padding-bottom:3rem;color:var(--soft);font-size:.82rem}
@media (max-width:34rem){main,header,footer{padding-left:1rem;padding-right:1rem}
header{padding-top:2rem}h1{font-size:1.8rem}
th,td{padding-left:.9rem}.tiles div{padding:.7rem .85rem .8rem;flex-basis:45%}
.tiles .figure{font-size:1.3rem}
.bars th:nth-child(2n+3),.bars td:nth-child(2n+3){display:none}}
@media print{article,figure,tr{break-inside:avoid}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # also where an escape was forgotten
WIDTH, HEIGHT = 460, 236  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 50, 22, 24, 44  # margins around the bars


def render_html(page: Page) -> str:
    """The page as one self-contained file."""
    sections = "".join(
        f"<section>\n<h2>{_html(section.title)}</h2>\n{_html_blocks(section.blocks)}</section>\n"
        for section in page.sections
    )
    footer = "Made from the manifest and the documents tables by <code>python -m data_prep.card</code>."
    return shell(page.title, page.kind, page.tiles, sections, footer)


def shell(
    title: str,
    kind: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: str,
    footer: str,
    *,
    style: str = STYLE,
    policy: str = POLICY,
) -> str:
    """A whole file around `sections` and `footer`, which are HTML already; the rest is text."""
    dl = "".join(
        f'<div><dt>{_html(name)}</dt><dd class="figure">{_html(figure)}</dd>'
        f'<dd class="remark">{_html(remark)}</dd></div>\n'
        for name, figure, remark in tiles
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(title)}: {_html(kind)}</title>\n<style>{style}</style>\n</head>\n"
        f'<body>\n<header>\n<p class="kind">{_html(kind)}</p>\n<h1>{_html(title)}</h1>\n'
        f'<dl class="tiles">\n{dl}</dl>\n</header>\n<main>\n{sections}</main>\n'
        f"<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def _html(text: Cell) -> str:
    """Text as HTML that shows just this text, in an element or in a quoted attribute."""
    if isinstance(text, Name):
        return f"<code>{_html(text.text)}</code>"
    return html.escape(f"{text:,}" if isinstance(text, int) else printable(text))


def _html_blocks(blocks: Sequence[Block]) -> str:
    lines: list[str] = []
    for index, block in enumerate(blocks):
        follows_sample = index > 0 and isinstance(blocks[index - 1], Sample)
        if isinstance(block, Sample) != follows_sample:
            lines.append("</div>\n" if follows_sample else '<div class="samples">\n')
        if isinstance(block, Paragraph):
            lines.append(f"<p>{''.join(_html(part) for part in block.parts)}</p>\n")
        elif isinstance(block, Table):
            lines.append(_html_table(block))
        elif isinstance(block, Chart):
            lines.append(_html_chart(block))
        elif isinstance(block, Code):
            lines.append(f"<pre><code>{_html(block.text)}</code></pre>\n")
        else:
            lines.append(_html_sample(block))
    if blocks and isinstance(blocks[-1], Sample):
        lines.append("</div>\n")
    return "".join(lines)


def _html_table(table: Table) -> str:
    kinds = [""] * table.num_text_columns + [' class="number"'] * len(table.header)
    header = zip(kinds, table.header, strict=False)
    head = "".join(f'<th scope="col"{kind}>{_html(name)}</th>' for kind, name in header)
    lines = []
    for index, (name, *cells) in enumerate(table.rows):
        first = _html(name)
        if table.bars:
            width = f"{100 * table.bars[index]:.1f}%"
            first = f'<span><i style="width:{width}"></i><b>{first}</b></span>'
        rest = zip(kinds[1:], cells, strict=False)
        row = "".join(f"<td{kind}>{_html(cell)}</td>" for kind, cell in rest)
        lines.append(f'<tr><th scope="row">{first}</th>{row}</tr>\n')
    bars = ' class="bars"' if table.bars else ""
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.header) else ""
    # With a name and a place in the tab order, so that a keyboard can scroll it sideways.
    return (
        f'<div class="scroll" role="region" aria-label="{_html(table.caption)}" tabindex="0">'
        f"<table{bars}>\n<caption>{_html(table.caption)}</caption>\n"
        f"{head}<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _html_sample(sample: Sample) -> str:
    facts = "".join(f"<dt>{_html(name)}</dt><dd>{_html(fact)}</dd>\n" for name, fact in sample.facts)
    more = "" if sample.is_whole else '<span class="more"> […]</span>'
    return (
        f'<article>\n<blockquote dir="auto" tabindex="0">{_html(sample.text)}{more}</blockquote>\n'
        f"<dl>\n{facts}</dl>\n</article>\n"
    )


def _html_chart(chart: Chart) -> str:
    documents = [one.num_documents for one in chart.bins]
    tokens = [one.num_tokens for one in chart.bins]
    rows = tuple((bin_label(one), one.num_documents, one.num_tokens) for one in chart.bins if one.num_documents)
    table = Table("Documents by length in tokens", ("Length", "Documents", "Tokens"), rows)
    return (
        '<div class="charts">\n'
        + _figure("Documents by length", "docs", "documents", chart.bins, documents, chart.median)
        + _figure(
            "Tokens by length of their document",
            "toks",
            "tokens",
            chart.bins,
            tokens,
            chart.token_median,
        )
        + "</div>\n<details><summary>The numbers behind the bars</summary>\n"
        + _html_table(table)
        + "</details>\n"
    )


def _figure(title: str, key: str, unit: str, bins: Sequence[Bin], values: Sequence[int], median: int) -> str:
    """A bar chart with a logarithmic horizontal axis, and a line where half of the sum is."""
    low, high = math.log2(bins[0].start), math.log2(bins[-1].stop)
    floor = HEIGHT - BOTTOM

    def x(length: float) -> float:
        return LEFT + (math.log2(length) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    step = tick_step(max(values))
    scale = (floor - TOP) / (math.ceil(max(values) / step) * step)
    parts = []
    for tick in range(0, max(values) + step, step):
        y = f"{floor - tick * scale:.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y}" dy="4" text-anchor="end">{short(tick)}</text>')
    parts.append(f'<g class="{key}">')
    for one, value in zip(bins, values, strict=True):
        if value:
            height = max(1.0, value * scale)  # a single document must not vanish
            left, width = x(one.start), x(one.stop) - x(one.start) - 1
            parts.append(
                f'<rect x="{left:.1f}" y="{floor - height:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}"><title>{bin_label(one)} tokens: {value:,} {unit}</title>'
                "</rect>"
            )
    parts.append("</g>")
    octave_step = max(1, math.ceil((high - low) / 7))
    for octave in range(round(low), round(high) + 1, octave_step):
        place = x(2**octave)
        parts.append(
            f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{floor}" y2="{floor + 5}"/>'
            f'<text x="{place:.1f}" y="{floor + 19}" text-anchor="middle">{2**octave:,}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">'
        "tokens in the document</text>"
    )
    place = x(max(1, median))
    side, gap = ("start", 5) if place < (LEFT + WIDTH) / 2 else ("end", -5)
    parts.append(
        f'<path class="halo" d="M{place:.1f} {TOP - 18}V{floor}"/>'
        f'<path class="median" d="M{place:.1f} {TOP - 18}V{floor}"/>'
        f'<text class="mark" x="{place + gap:.1f}" y="{TOP - 9}" text-anchor="{side}">'
        f"median {median:,}</text>"
    )
    fullest = max(zip(values, bins, strict=True))[1]
    text = (
        f"Bar chart of {unit} by length of document, from {bins[0].start:,} to {bins[-1].stop:,} "
        f"tokens. Half of the {unit} are at {median:,} or less; the highest bar is at "
        f"{bin_label(fullest)}."
    )
    return (
        f'<figure><figcaption>{title}</figcaption>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{key}-title {key}-text"><title id="{key}-title">{title}</title>'
        f'<desc id="{key}-text">{text}</desc>\n' + "\n".join(parts) + "\n</svg></figure>\n"
    )


def tick_step(largest: int) -> int:
    """A round distance between ticks so that there are three to five of them. 430 -> 100"""
    least = max(1, largest / 5)
    power = 10 ** int(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)

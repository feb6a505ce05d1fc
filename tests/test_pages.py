"""data_prep.pages: whatever text a page is filled with, it stays text."""

import dataclasses
import re
import typing

import pytest
from markdown_it import MarkdownIt
from support.tags import Tags

from data_prep.pages import blocks
from data_prep.pages.blocks import Bar, Charts, Code, Histogram, Name, Page, Paragraph, Sample, Section, Table, Tile
from data_prep.pages.render_html import render_html
from data_prep.pages.render_markdown import render_markdown
from data_prep.pages.shell import asset, shell
from gpt_pretrain.history.page_rows import SHADES

HOSTILE = "</style></blockquote><script>alert(1)</script>\n````\n# <b onclick='x'>b</b> [a](javascript:x) | \"'&`\x00"
BARS = (Bar(1, 2, 3), Bar(2, 4, 0), Bar(4, 9, 1))


def page_of(text: str) -> Page:
    """A page with every kind of block, with `text` in every place that takes one."""
    histogram = Histogram(text, text, text, text, text, text, BARS, median=2)
    table = Table(text, (text, text), ((text, 1), (Name(text), 2)), bars=(0.5, 1.0))
    every = (
        Paragraph((text, Name(text))),
        table,
        Charts((histogram,), table, BARS),
        Code("text", text),
        Sample(text, False, ((text, text),)),
        Sample(text, True, ()),
    )
    return Page(text, text, (Tile(text, text, text),), (Section(text, every), Section(text, ())), Paragraph((text,)))


def test_the_page_above_has_every_kind_of_block():
    kinds = {type(block) for block in page_of("a").sections[0].blocks}
    assert kinds == set(typing.get_args(blocks.Block))


def test_html_shows_hostile_text_and_has_the_tags_of_a_harmless_one():
    hostile, harmless = Tags(render_html(page_of(HOSTILE))), Tags(render_html(page_of("plain")))
    assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes and not hostile.open
    assert not {"script", "a", "img"} & set(hostile.tags)
    shown = HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    num_plain = sum(text.count("plain") for text in harmless.texts)
    assert sum(text.count(shown) for text in hostile.texts) == num_plain > 20


def test_markdown_shows_hostile_text_and_has_the_structure_of_a_harmless_one():
    def structure(text):
        page = render_markdown(page_of(text), front_matter={"title": text}, html_name="card.html")
        tokens = MarkdownIt("commonmark").enable("table").parse(page.split("---\n", 2)[2])
        inline = [token.type for one in tokens for token in (one.children or ())]
        return [token.type for token in tokens], {kind for kind in inline if kind not in ("softbreak", "code_inline")}

    assert structure(HOSTILE) == structure("plain")
    assert not {"html_inline", "image"} & structure(HOSTILE)[1]


def test_the_shell_lets_one_script_run_and_nothing_else():
    page = shell(title=HOSTILE, kind=HOSTILE, tiles=(), sections="", footer="", style="batch.css", script="batch.js")
    assert page.count("<script>") == 1 and re.search(r"default-src 'none'; .*script-src 'sha256-[\w+/=]+'", page)
    without = shell(title="a", kind="b", tiles=(), sections="", footer="")
    assert "script" not in without


@pytest.mark.parametrize("name", ["page.css", "batch.css", "batch.js"])
def test_style_and_script_stay_inside_their_element_and_off_the_network(name):
    text = asset(name)
    assert "</" not in text and not re.search(r"url\(|@import|https?://|fetch\(", text)


def test_every_shade_has_its_colour():
    rules = re.findall(r"\.k(\d+)\{--k:([\d.]+)\}", asset("batch.css"))
    assert [int(number) for number, _ in rules] == list(range(SHADES))
    assert [float(part) for _, part in rules] == [round((n / (SHADES - 1)) ** 0.9, 3) for n in range(SHADES)]


def test_blocks_are_frozen():
    kinds = [each for each in vars(blocks).values() if dataclasses.is_dataclass(each)]
    assert len(kinds) >= 9 and all(kind.__dataclass_params__.frozen for kind in kinds)

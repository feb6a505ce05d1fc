"""A batch as one HTML file that needs nothing but itself: its rows, their documents, and each token's loss."""

import base64
import hashlib
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.card.html import POLICY, STYLE, shell
from data_prep.card.pages import printable, short
from gpt_pretrain.history.rows import Part, Row
from gpt_pretrain.history.style import MAX_NATS, SCRIPT, SHADES, STYLE_OF_BATCH
from gpt_pretrain.history.token_text import Piece, pieces

if TYPE_CHECKING:  # it needs JAX, a page without losses doesn't
    from gpt_pretrain.history.token_losses import TokenLosses


_STRIP_PARTS = 48  # of a row, in the table


@dataclass(frozen=True)
class BatchPage:
    """What the page is about.

    Attributes:
      run: save_dir.
      update: from 1.
      num_seen: updates that the run has made.
      rows: those that are shown, of `batch_size`.
      losses: of these rows, or None.
    """

    run: str
    update: int
    num_updates: int
    num_seen: int
    batch_size: int
    rows: Sequence[Row]
    losses: "TokenLosses | None"


def render_batch(page: BatchPage) -> str:
    """The page; every text in it is escaped, and its policy lets nothing run but the script of this project."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    sections = (
        f"<section>\n<h2>Rows</h2>\n{_legend(page)}{_controls(page)}{_table(page)}</section>\n"
        '<section>\n<h2>Text</h2>\n<div id="rows">\n'
        + "".join(_article(page, index) for index in range(len(page.rows)))
        + f'</div>\n</section>\n<output id="token" hidden></output>\n<script>{SCRIPT}</script>\n'
    )
    footer = f"Made by <code>python -m gpt_pretrain.inspect {_text(page.run)} --step {page.update}</code>."
    if page.losses:
        mask = ", attention within documents as in its training" if page.losses.document_mask else ""
        footer += (
            f" Losses by <code>{_text(page.losses.checkpoint)}</code>, without dropout and perturbations{mask}. "
            "The first token of a row is only an input; the last one is only a target."
        )
    return shell(
        f"Update {page.update:,} of {page.num_updates:,}",
        f"Batch of {page.run}",
        _tiles(page),
        sections,
        footer,
        style=STYLE + STYLE_OF_BATCH,
        policy=f"{POLICY}; script-src 'sha256-{digest}'",
    )


def _tiles(page: BatchPage) -> list[tuple[str, str, str]]:
    rows = page.rows
    num_inputs = sum(len(row.tokens) - 1 for row in rows)
    keys = [(row.stream, part.document.start) for row in rows for part in row.parts if part.document]
    num_parts = sum(len(row.parts) for row in rows)
    num_whole = sum(row.is_whole(part) for row in rows for part in row.parts)
    seen = "consumed" if page.update <= page.num_seen else "planned"
    some = "" if len(rows) == page.batch_size else f" of {page.batch_size:,}"
    remark = f"{num_whole or 'none'} whole" if keys else "no table of them"
    tiles = [
        ("State", seen, f"{page.num_seen:,} updates are made"),
        ("Rows", f"{len(rows):,}{some}", f"positions {rows[0].position:,} to {rows[-1].position:,}"),
        ("Tokens", short(num_inputs), f"{len(rows[0].tokens) - 1:,} inputs a row"),
        ("Documents", f"{len(set(keys)) or num_parts:,}", remark),
    ]
    if page.losses:
        nll = page.losses.nll
        tiles.append(("Mean loss", f"{nll.mean():.3f}", f"nats, after update {page.losses.updates:,}"))
        share = (page.losses.rank == 1).mean()
        tiles.append(("Accuracy", f"{100 * share:.1f}%", "of targets had rank 1"))
    return tiles


def _legend(page: BatchPage) -> str:
    if not page.losses:
        return ""
    shades = "".join(f'<i class="k{shade}"></i>' for shade in range(SHADES))
    ticks = "".join(f"<span>{nats}</span>" for nats in range(0, MAX_NATS, 2))
    return (
        '<figure class="legend" aria-label="Colours: loss of a token, from 0 to 10 nats and more">'
        f"<figcaption>Loss of a token, in nats</figcaption><div>{shades}</div><p>{ticks}<span>{MAX_NATS}+</span></p>"
        "</figure>\n"
    )


def _controls(page: BatchPage) -> str:
    """Hidden without JavaScript, which they need."""
    options = '<option value="row">row</option>'
    if page.losses:
        options += '<option value="high">highest loss first</option><option value="low">lowest loss first</option>'
    order = f'<label>Order <select id="order">{options}</select></label>' if page.losses else ""
    return (
        f'<form id="controls" hidden>{order}<label>Find <input id="find" type="search" '
        'placeholder="text, id, url or stream"></label><span id="count" role="status"></span></form>\n'
    )


def _table(page: BatchPage) -> str:
    has_streams = any(row.stream for row in page.rows)
    head = ["Row", *["Stream"] * has_streams, "Window", "Tokens of the stream", "Documents"]
    cells = "".join(f'<th scope="col"{_kind(name)}>{name}</th>' for name in head)
    if page.losses:
        cells += '<th scope="col" class="number">Mean loss</th><th scope="col" class="strip">Along the row</th>'
    lines = []
    for index, row in enumerate(page.rows):
        documents = " ".join(
            f'<a href="#r{row.row}d{number}" title="{_text(_name(part))}">{number + 1}</a>'
            for number, part in enumerate(row.parts)
        )
        stream = f"<td>{_text(row.stream)}</td>" if has_streams else ""
        loss = _loss_cells(page.losses.nll[index]) if page.losses else ""
        lines.append(
            f'<tr data-row="{row.row}"><th scope="row" class="number"><a href="#r{row.row}">{row.row}</a></th>{stream}'
            f'<td class="number">{row.window:,}</td><td class="number span">{_span(row.start, row.stop)}</td>'
            f'<td class="parts">{documents}</td>{loss}</tr>\n'
        )
    return (
        '<div class="scroll" role="region" aria-label="The rows of the batch" tabindex="0"><table class="batch">\n'
        f'<thead><tr>{cells}</tr></thead>\n<tbody id="table">\n{"".join(lines)}</tbody>\n</table></div>\n'
    )


def _loss_cells(nll_T: np.ndarray) -> str:
    """Mean loss of a row, and a strip of colours: the mean loss of equal parts of it, from its first token on."""
    parts = np.array_split(nll_T, min(_STRIP_PARTS, len(nll_T)))
    strip = "".join(f'<i class="k{_shade(float(part.mean()))}"></i>' for part in parts)
    return f'<td class="number">{nll_T.mean():.3f}</td><td class="strip"><div>{strip}</div></td>'


def _kind(name: str) -> str:
    names = {"Row": "number", "Window": "number", "Tokens of the stream": "number span", "Documents": "parts"}
    return f' class="{names[name]}"' if name in names else ""


def _article(page: BatchPage, index: int) -> str:
    row, losses = page.rows[index], page.losses
    mean = float(losses.nll[index].mean()) if losses else 0.0
    loss = f' <b class="chip k{_shade(mean)}">{mean:.3f} nats</b>' if losses else ""
    stream = f"<span>{_text(row.stream)}</span>" if row.stream else ""
    parts = "".join(_part(page, index, number) for number in range(len(row.parts)))
    return (
        f'<article class="row" id="r{row.row}" data-row="{row.row}" data-loss="{mean:.5f}">\n<header><h3>'
        f'<a href="#r{row.row}">Row {row.row}</a></h3><p>{stream}<span>position {row.position:,}</span>'
        f"<span>window {row.window:,}</span><span>tokens {_span(row.start, row.stop)}</span></p>{loss}</header>\n"
        f"{parts}</article>\n"
    )


def _part(page: BatchPage, index: int, number: int) -> str:
    row = page.rows[index]
    part = row.parts[number]
    document = part.document
    facts = [f"tokens {_span(part.start, part.stop)} of the row"]
    title = f"Document {number + 1}"
    if document:
        if row.is_whole(part):
            facts.append("the whole document")
        else:
            begin = row.start + part.start - document.start
            facts.append(f"{_span(begin, begin + part.stop - part.start)} of its {document.length:,}")
        facts.append(f"{_text(document.source_file)} row {document.row:,}")
        if document.id:
            facts.append(f"<code>{_text(document.id)}</code>")
        title = _link(document.url) if document.url else _text(_name(part))
    if page.losses:
        nll = page.losses.nll[index, max(0, part.start - 1) : part.stop - 1]
        if len(nll):
            facts.append(f"mean loss {nll.mean():.3f}")
    return (
        f'<section class="part" id="r{row.row}d{number}"><h4><span>{number + 1}</span><span>{title}</span></h4>'
        f"<p>{''.join(f'<span>{fact}</span>' for fact in facts)}</p>\n"
        f'<blockquote dir="auto">{_tokens(page, index, part)}</blockquote></section>\n'
    )


def _tokens(page: BatchPage, index: int, part: Part) -> str:
    row, losses = page.rows[index], page.losses
    ids = row.tokens[part.start : part.stop]
    if losses is None:
        begin = "" if not len(ids) or ids[0] != row.tokenizer.end_of_text else f'<b class="eot">{_eot(row)}</b>'
        return begin + _text(part.text)
    out = []
    for piece in pieces(row.tokenizer, ids):
        places = range(part.start + piece.start, part.start + piece.stop)
        text = _text(piece.text).replace("\n", "<s></s>\n")
        if row.tokens[places[0]] == row.tokenizer.end_of_text:
            text = f'<b class="eot">{text}</b>'
        notes = [_note(row.tokens, losses.nll[index], losses.rank[index], place) for place in places]
        targets = [float(losses.nll[index, place - 1]) for place in places if place]
        shade = f' class="k{_shade(sum(targets) / len(targets))}"' if targets else ""
        out.append(f'<i{shade} title="{_title(piece, notes)}">{text}</i>')
    return "".join(out)


def _title(piece: Piece, notes: Sequence[str]) -> str:
    if len(notes) == 1:
        return notes[0]
    return f"{len(notes)} tokens of {len(piece.text)} character{'s' * (len(piece.text) > 1)}\n" + "\n".join(notes)


def _note(tokens: np.ndarray, nll: np.ndarray, rank: np.ndarray, place: int) -> str:
    """262: 3.21 nats, probability 4.0%, rank 5"""
    if place == 0:
        return f"id {tokens[place]}: only an input"
    loss = float(nll[place - 1])
    return f"id {tokens[place]}: {loss:.3f} nats, probability {100 * math.exp(-loss):.3g}%, rank {rank[place - 1]:,}"


def _shade(nats: float) -> int:
    return min(SHADES - 1, int(nats * SHADES / MAX_NATS)) if nats == nats else SHADES - 1


def _eot(row: Row) -> str:
    return _text(row.tokenizer.decode(np.array([row.tokenizer.end_of_text])))


def _name(part: Part) -> str:
    document = part.document
    if document is None:
        return "a document"
    return document.url or document.id or f"{document.source_file} row {document.row}"


def _link(url: str) -> str:
    """A link where the address is one of the web; any other (javascript:...) stays text."""
    text = _text(url)
    if not url.lower().startswith(("https://", "http://")):
        return text
    return f'<a href="{text}" rel="noopener noreferrer nofollow" target="_blank">{text}</a>'


def _span(start: int, stop: int) -> str:
    return f"[{start:,}, {stop:,})"


def _text(text: str) -> str:
    """Text as HTML that shows just this text, in an element or in a quoted attribute."""
    return html.escape(printable(text))

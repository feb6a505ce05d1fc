"""A row of a batch as HTML: its documents, and each token with the colour of its loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.pages.numbers import span_text
from data_prep.pages.text import html_text
from gpt_pretrain.history.rows import DocumentSlice, Row
from gpt_pretrain.history.token_text import Piece, pieces

MAX_NATS = 10  # that still have a colour of their own
SHADES = 20  # half a nat each: the classes k0 to k19 of batch.css


@dataclass(frozen=True)
class RowLosses:
    """Of each target of a row; entry i is of token i + 1, the first token is no target.

    Attributes:
      nll: in nats, (seq_len,).
      rank: (seq_len,); 1 where the target was the most likely token.
    """

    nll: np.ndarray
    rank: np.ndarray


def row_article(row: Row, losses: RowLosses | None) -> str:
    """A row with all of its text."""
    mean = float(losses.nll.mean()) if losses else 0.0
    loss = f' <b class="chip k{shade(mean)}">{mean:.3f} nats</b>' if losses else ""
    stream = f"<span>{html_text(row.stream)}</span>" if row.stream else ""
    facts = f"tokens {span_text(row.start, row.stop)}", *row.edits
    where = "".join(f"<span>{html_text(each)}</span>" for each in facts)
    slices = "".join(_slice(row, number, losses) for number in range(len(row.slices)))
    return (
        f'<article class="row" id="r{row.row}" data-row="{row.row}" data-loss="{mean:.5f}">\n<header><h3>'
        f'<a href="#r{row.row}">Row {row.row}</a></h3><p>{stream}<span>position {row.position:,}</span>'
        f"<span>window {row.window:,}</span>{where}</p>{loss}</header>\n"
        f"{slices}</article>\n"
    )


def name_of(piece: DocumentSlice) -> str:
    """What a document is called: its url, its id or its place in the input."""
    document = piece.document
    if document is None:
        return "a document"
    return document.url or document.id or f"{document.source_file} row {document.row}"


def link(url: str) -> str:
    """A link where the address is one of the web; any other (javascript:...) stays text."""
    text = html_text(url)
    if not url.lower().startswith(("https://", "http://")):
        return text
    return f'<a href="{text}" rel="noopener noreferrer nofollow" target="_blank">{text}</a>'


def shade(nats: float) -> int:
    """
    >>> shade(0.7), shade(25.0), shade(float("nan"))
    (1, 19, 19)
    """
    return min(SHADES - 1, int(nats * SHADES / MAX_NATS)) if math.isfinite(nats) else SHADES - 1


def _slice(row: Row, number: int, losses: RowLosses | None) -> str:
    piece = row.slices[number]
    title, facts = f"Document {number + 1}", [f"tokens {span_text(piece.start, piece.stop)} of the row"]
    if piece.document:
        facts += _facts(row, piece)
        title = link(piece.document.url) if piece.document.url else html_text(name_of(piece))
    if losses:
        nll = losses.nll[max(0, piece.start - 1) : piece.stop - 1]
        facts += [f"mean loss {nll.mean():.3f}"] if len(nll) else []
    text = _coloured_text(row, piece, losses) if losses else _text(row, piece)
    return (
        f'<section class="slice" id="r{row.row}d{number}"><h4><span>{number + 1}</span><span>{title}</span></h4>'
        f"<p>{''.join(f'<span>{fact}</span>' for fact in facts)}</p>\n"
        f'<blockquote dir="auto">{text}</blockquote></section>\n'
    )


def _facts(row: Row, piece: DocumentSlice) -> list[str]:
    """What is known of a document, as HTML."""
    document = piece.document
    assert document is not None
    begin = piece.inserted_from
    if begin is None:
        begin = row.start + piece.start - document.start
    stop = min(begin + piece.stop - piece.start, document.length)
    where = f"{span_text(begin, stop)} of its {document.length:,}"
    facts = ["the whole document" if row.is_whole(piece) else where]
    facts.append(f"{html_text(document.source_file)} row {document.row:,}")
    return facts + ([f"<code>{html_text(document.id)}</code>"] if document.id else [])


def _text(row: Row, piece: DocumentSlice) -> str:
    ids, end_of_text = row.tokens[piece.start : piece.stop], row.tokenizer.end_of_text
    if not len(ids) or ids[0] != end_of_text:
        return html_text(piece.text)
    return f'<b class="eot">{html_text(row.tokenizer.decode(np.array([end_of_text])))}</b>{html_text(piece.text)}'


def _coloured_text(row: Row, piece: DocumentSlice, losses: RowLosses) -> str:
    out = []
    for each in pieces(row.tokenizer, row.tokens[piece.start : piece.stop]):
        places = range(piece.start + each.start, piece.start + each.stop)
        text = html_text(each.text).replace("\n", "<s></s>\n")
        if row.tokens[places[0]] == row.tokenizer.end_of_text:
            text = f'<b class="eot">{text}</b>'
        nats = [float(losses.nll[place - 1]) for place in places if place]
        colour = f' class="k{shade(sum(nats) / len(nats))}"' if nats else ""
        notes = [_note(row.tokens, losses, place) for place in places]
        out.append(f'<i{colour} title="{_title(each, notes)}">{text}</i>')
    return "".join(out)


def _title(piece: Piece, notes: Sequence[str]) -> str:
    if len(notes) == 1:
        return notes[0]
    return f"{len(notes)} tokens of {len(piece.text)} character{'s' * (len(piece.text) > 1)}\n" + "\n".join(notes)


def _note(tokens: np.ndarray, losses: RowLosses, place: int) -> str:
    """id 262: 3.210 nats, probability 4%, rank 5"""
    if place == 0:
        return f"id {tokens[place]}: only an input"
    nats, rank = float(losses.nll[place - 1]), losses.rank[place - 1]
    return f"id {tokens[place]}: {nats:.3f} nats, probability {100 * math.exp(-nats):.3g}%, rank {rank:,}"

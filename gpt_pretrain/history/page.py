"""A batch as one HTML file that needs nothing but itself: its rows, their documents, and each token's loss."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.pages.blocks import Tile
from data_prep.pages.numbers import short, span_text
from data_prep.pages.shell import shell
from data_prep.pages.text import html_text
from gpt_pretrain.history.page_rows import MAX_NATS, SHADES, RowLosses, name_of, row_article, shade
from gpt_pretrain.history.rows import Row

if TYPE_CHECKING:  # it needs JAX, a page without losses doesn't
    from gpt_pretrain.history.token_losses import TokenLosses

_STRIP_STRETCHES = 48  # of a row, in the table


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

    def rows_and_losses(self) -> Iterator[tuple[Row, RowLosses | None]]:
        """Each row with its own losses."""
        for index, row in enumerate(self.rows):
            yield row, None if self.losses is None else RowLosses(self.losses.nll[index], self.losses.rank[index])


def render_batch(page: BatchPage) -> str:
    """The page; every text in it is escaped, and its policy lets nothing run but the script of this project."""
    sections = (
        f"<section>\n<h2>Rows</h2>\n{_legend(page)}{_controls(page)}{_table(page)}</section>\n"
        '<section>\n<h2>Text</h2>\n<div id="rows">\n'
        + "".join(row_article(row, losses) for row, losses in page.rows_and_losses())
        + '</div>\n</section>\n<output id="token" hidden></output>\n'
    )
    command = f"python -m gpt_pretrain.inspect {shlex.quote(page.run)} --step {page.update}"
    footer = f"Made by <code>{html_text(command)}</code>."
    if page.losses:
        mask = ", attention within documents as in its training" if page.losses.document_mask else ""
        footer += (
            f" Losses by <code>{html_text(page.losses.checkpoint)}</code>, without dropout and interventions{mask}. "
            "The first token of a row is only an input; the last one is only a target."
        )
        if page.losses.interventions:
            footer += f" Its training had interventions: {html_text('; '.join(page.losses.interventions))}."
    return shell(
        title=f"Update {page.update:,} of {page.num_updates:,}",
        kind=f"Batch of {page.run}",
        tiles=_tiles(page),
        sections=sections,
        footer=footer,
        style="batch.css",
        script="batch.js",
    )


def _tiles(page: BatchPage) -> list[Tile]:
    rows = page.rows
    num_inputs = sum(len(row.tokens) - 1 for row in rows)
    keys = [(row.stream, piece.document.start) for row in rows for piece in row.slices if piece.document]
    num_slices = sum(len(row.slices) for row in rows)
    num_whole = sum(row.is_whole(piece) for row in rows for piece in row.slices)
    seen = "consumed" if page.update <= page.num_seen else "planned"
    some = "" if len(rows) == page.batch_size else f" of {page.batch_size:,}"
    remark = f"{num_whole or 'none'} whole" if keys else "no table of them"
    tiles = [
        Tile("State", seen, f"{page.num_seen:,} updates are made"),
        Tile("Rows", f"{len(rows):,}{some}", f"positions {rows[0].position:,} to {rows[-1].position:,}"),
        Tile("Tokens", short(num_inputs), f"{len(rows[0].tokens) - 1:,} inputs a row"),
        Tile("Documents", f"{len(set(keys)) or num_slices:,}", remark),
    ]
    if page.losses:
        nll = page.losses.nll
        tiles.append(Tile("Mean loss", f"{nll.mean():.3f}", f"nats, after update {page.losses.updates:,}"))
        share = (page.losses.rank == 1).mean()
        tiles.append(Tile("Accuracy", f"{100 * share:.1f}%", "of targets had rank 1"))
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
    columns = [("Row", "number"), *[("Stream", "")] * has_streams, ("Window", "number")]
    columns += [("Tokens of the stream", "number span"), ("Documents", "slices")]
    columns += [("Mean loss", "number"), ("Along the row", "strip")] if page.losses else []
    head = "".join(f'<th scope="col"{_class(kind)}>{name}</th>' for name, kind in columns)
    lines = []
    for row, losses in page.rows_and_losses():
        documents = " ".join(
            f'<a href="#r{row.row}d{number}" title="{html_text(name_of(piece))}">{number + 1}</a>'
            for number, piece in enumerate(row.slices)
        )
        stream = f"<td>{html_text(row.stream)}</td>" if has_streams else ""
        lines.append(
            f'<tr data-row="{row.row}"><th scope="row" class="number"><a href="#r{row.row}">{row.row}</a></th>{stream}'
            f'<td class="number">{row.window:,}</td><td class="number span">{span_text(row.start, row.stop)}</td>'
            f'<td class="slices">{documents}</td>{_loss_cells(losses) if losses else ""}</tr>\n'
        )
    return (
        '<div class="scroll" role="region" aria-label="The rows of the batch" tabindex="0"><table class="batch">\n'
        f'<thead><tr>{head}</tr></thead>\n<tbody id="table">\n{"".join(lines)}</tbody>\n</table></div>\n'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _loss_cells(losses: RowLosses) -> str:
    """Mean loss of a row, and a strip of colours: the mean loss of equal stretches of it, from its first token on."""
    stretches = np.array_split(losses.nll, min(_STRIP_STRETCHES, len(losses.nll)))
    strip = "".join(f'<i class="k{shade(float(each.mean()))}"></i>' for each in stretches)
    return f'<td class="number">{losses.nll.mean():.3f}</td><td class="strip"><div>{strip}</div></td>'

"""A sweep of ablations as text, as a page, and as a picture of layers by sites."""

import shlex

import numpy as np

from data_prep.pages.blocks import Tile
from data_prep.pages.numbers import short
from data_prep.pages.shell import shell
from data_prep.pages.text import html_text
from gpt_pretrain.history.ablation import Ablated
from gpt_pretrain.train.writers.heat_maps import Panel, as_png, draw

_SHADES = 20  # of batch.css


def as_text(found: Ablated) -> str:
    """A table a kind, layers down and sites across: by how much the loss rises, in nats."""
    lines = [
        f"{found.checkpoint}: loss {found.loss:.4f} over {found.num_tokens:,} validation tokens, after update "
        f"{found.updates:,}; by how much it rises, in nats:"
    ]
    for kind, rises_LS in zip(found.kinds, found.rises, strict=True):
        lines += ["", f"{title_of(found, kind):<22}" + "".join(f"{site:>12}" for site in found.sites)]
        lines += [
            f"  layer {layer:<14}" + "".join(f"{rise:>+12.4f}" for rise in rises_S)
            for layer, rises_S in enumerate(rises_LS)
        ]
    return "\n".join(lines)


def title_of(found: Ablated, kind: str) -> str:
    """ "zero", or "noise 0.1" """
    return f"{kind} {found.dose:g}" if "noise" in kind else kind


def render_ablations(found: Ablated, command: str) -> str:
    """One HTML file: a table a kind, each cell in the colour of its rise."""
    most = _most(found)
    sections = "".join(
        f"<section>\n<h2>{html_text(title_of(found, kind))}</h2>\n{_table(found, rises_LS, most)}</section>\n"
        for kind, rises_LS in zip(found.kinds, found.rises, strict=True)
    )
    kind, layer, site = np.unravel_index(found.rises.argmax(), found.rises.shape)
    where = f"layer {layer}, {found.sites[site]}, {title_of(found, found.kinds[kind])}"
    tiles = [
        Tile("Loss", f"{found.loss:.4f}", f"nats, after update {found.updates:,}"),
        Tile("Highest", f"+{most:.4f}", where),
        Tile("Tokens", short(found.num_tokens), "of the validation split"),
        Tile("Time", f"{found.run_secs:.1f} s", f"and {found.compile_secs:.1f} s to compile, once"),
    ]
    footer = (
        f"Made by <code>{html_text(command)}</code>. Rise of the validation loss, in nats, when one site of one layer "
        "is changed and all else is as it was. The checkpoint's own interventions and dropout are left out. Colours "
        f"are those of the rise as a part of the highest, +{most:.4f}; a fall has none."
    )
    return shell(
        title="Ablations, layer by layer",
        kind=f"Checkpoint {found.checkpoint}",
        tiles=tiles,
        sections=sections,
        footer=footer,
        style="batch.css",
    )


def command_of(arguments: list[str]) -> str:
    """What was typed."""
    return shlex.join(["python", "-m", "gpt_pretrain.ablate", *arguments])


def picture(found: Ablated) -> bytes:
    """A PNG file: a panel a kind, layers down and sites across, each cell with its rise in it."""
    panels = [
        Panel(f"{title_of(found, kind)}: rise", tuple(found.sites), np.ma.array(rises_LS))
        for kind, rises_LS in zip(found.kinds, found.rises, strict=True)
    ]
    return as_png(draw([str(layer) for layer in range(found.rises.shape[1])], panels))


def _most(found: Ablated) -> float:
    return max(0.0, float(found.rises.max()))


def _table(found: Ablated, rises_LS: np.ndarray, most: float) -> str:
    head = "".join(f'<th scope="col" class="number">{html_text(site)}</th>' for site in found.sites)
    lines = []
    for layer, rises_S in enumerate(rises_LS):
        cells = "".join(
            f'<td class="number"><span class="k{_shade(rise, most)} chip">{rise:+.4f}</span></td>' for rise in rises_S
        )
        lines.append(f'<tr><th scope="row">layer {layer}</th>{cells}</tr>\n')
    return (
        '<div class="scroll" role="region" aria-label="Layers by sites" tabindex="0"><table class="batch">\n<thead>'
        f'<tr><th scope="col">Layer</th>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n</table></div>\n'
    )


def _shade(rise: float, most: float) -> int:
    return round(float(np.clip(rise / max(most, 1e-12), 0, 1)) * (_SHADES - 1))

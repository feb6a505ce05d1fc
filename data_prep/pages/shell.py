"""One HTML file that needs nothing but itself: head, style, tiles, and what a page puts between them.

Style and script are files of this folder, put into the page whole: no network. The page's policy lets nothing else
run, also where an escape was forgotten.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from data_prep.pages.blocks import Tile
from data_prep.pages.text import html_text


def shell(
    *,
    title: str,
    kind: str,
    tiles: Sequence[Tile],
    sections: str,
    footer: str,
    style: str | None = None,
    script: str | None = None,
    data: str = "",
) -> str:
    """A whole file around `sections` and `footer`, which are HTML already; the rest is text.

    Args:
      style: a .css file of this folder, on top of page.css.
      script: a .js file of this folder.
      data: for the script, which finds it as the text of the element "data"; by `script_json`.
    """
    css = "\n" + asset("page.css") + ("\n" + asset(style) if style else "")
    policy, code = "default-src 'none'; style-src 'unsafe-inline'", ""
    if script:
        content = f"\n{asset(script)}"
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy, code = f"{policy}; script-src 'sha256-{digest}'", f"<script>{content}</script>\n"
        if data:
            code = f'<script type="application/json" id="data">{data}</script>\n{code}'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}: {html_text(kind)}</title>\n<style>{css}</style>\n</head>\n"
        f'<body>\n<header>\n<p class="kind">{html_text(kind)}</p>\n<h1>{html_text(title)}</h1>\n'
        f'<dl class="tiles">\n{"".join(map(_tile, tiles))}</dl>\n</header>\n<main>\n{sections}</main>\n'
        f"<footer>{footer}</footer>\n{code}</body>\n</html>\n"
    )


def asset(name: str) -> str:
    """The text of a .css or .js file of this folder."""
    return resources.files("data_prep.pages").joinpath(name).read_text(encoding="utf-8")


def _tile(tile: Tile) -> str:
    return (
        f'<div><dt>{html_text(tile.name)}</dt><dd class="figure">{html_text(tile.figure)}</dd>'
        f'<dd class="remark">{html_text(tile.remark)}</dd></div>\n'
    )

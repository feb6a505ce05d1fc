"""The dataset card: `python -m data_prep.card DIR` writes `README.md` and `card.html` there.

What is in the dataset, in numbers, drawings and a few samples. Equal datasets have equal cards: no
date, no name of a directory. The two files are no part of the dataset; nothing reads them.
"""

import argparse
import os
import sys
from pathlib import Path

from data_prep.card_html import render_html
from data_prep.card_pages import render_markdown
from data_prep.card_samples import read_excerpts
from data_prep.card_sections import KIND, make_page
from data_prep.card_summary import summarize_splits
from data_prep.engines import WorkerDied
from data_prep.files import whole_file
from data_prep.manifest import load

README_NAME, HTML_NAME = "README.md", "card.html"


def write_card(directory: str | os.PathLike, num_workers: int = 1) -> None:
    """Writes the card of a prepared dataset into its directory, in place of an older one.

    Args:
      num_workers: processes; decides nothing but the time it takes.

    Raises ValueError: no dataset there, it is damaged, or it has a README.md that is not a card.
    """
    directory = Path(directory)
    manifest = load(directory)
    readme = directory / README_NAME
    if readme.exists() and KIND not in readme.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{readme}: is not a card by data_prep.card, which would replace it. Move it away, or "
            "do without a card."
        )
    summaries = summarize_splits(directory, manifest, num_workers)
    page = make_page(manifest, summaries, read_excerpts(directory, manifest))
    texts = {HTML_NAME: render_html(page), README_NAME: render_markdown(page, HTML_NAME)}
    for name, text in texts.items():
        with whole_file(directory / name) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for an error that the user can remove."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.card", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset")
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args(argv)
    try:
        write_card(args.directory, args.num_workers)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.directory}: wrote {README_NAME} and {HTML_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

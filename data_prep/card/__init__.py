"""The dataset card: `python -m data_prep.card DIR` writes `README.md` and `card.html` there.

What is in the dataset, in numbers, drawings and a few samples. Equal datasets have equal cards: no
date, no name of a directory. The two files are no part of the dataset; nothing reads them.
"""

import os

from data_prep.card.front_matter import front_matter
from data_prep.card.page import KIND, make_page
from data_prep.card.samples import read_excerpts
from data_prep.card.summary import NOTHING, summarize_splits
from data_prep.pages.render_html import render_html
from data_prep.pages.render_markdown import render_markdown
from data_prep.store.files import read_bytes, whole_file
from data_prep.store.manifest import load
from data_prep.store.places import is_file, join

README_NAME, HTML_NAME = "README.md", "card.html"


def write_card(directory: str | os.PathLike, num_workers: int = 1, tokenizer: str | None = None) -> None:
    """Writes the card of a prepared dataset into its directory, in place of an older one.

    Args:
      num_workers: processes; decides nothing but the time it takes.
      tokenizer: as the user typed it, where the dataset was made by one that is not ours.

    Raises ValueError: no dataset there, it is damaged, or it has a README.md that is not a card.
    """
    directory = join(directory)
    manifest = load(directory)
    readme = join(directory, README_NAME)
    if is_file(readme) and KIND not in read_bytes(readme).decode("utf-8", "replace"):
        raise ValueError(
            f"{readme}: is not a card by data_prep.card, which would replace it. Move it away, or do without a card."
        )
    summaries = summarize_splits(directory, manifest, num_workers)
    page = make_page(manifest, summaries, list(read_excerpts(directory, manifest, tokenizer)))
    matter = front_matter(manifest, sum(summaries.values(), NOTHING))
    texts = {
        HTML_NAME: render_html(page),
        README_NAME: render_markdown(page, front_matter=matter, html_name=HTML_NAME),
    }
    for name, text in texts.items():
        with whole_file(join(directory, name)) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")

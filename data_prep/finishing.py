"""What comes after the manifest, when a dataset is complete: its card, and an empty desk."""

import sys

from data_prep.card import write_card
from data_prep.engines.locks import locked
from data_prep.pages.text import printable
from data_prep.store.manifest import WORK_DIR
from data_prep.store.places import exists, join, remove_tree


def finish(output: str, num_workers: int, tokenizer: str | None = None) -> None:
    """Writes the card and removes the work directory; does nothing where an earlier run did.

    `tokenizer` is the name that the user typed, if any.

    The dataset is complete without a card, so a failure to write it is only logged.
    """
    work = join(output, WORK_DIR)
    if not exists(work):
        return
    with locked(work):
        try:
            write_card(output, num_workers, tokenizer)
        except Exception as error:  # the tokenizer may be a user's, and raise anything
            print(f"no dataset card: {printable(str(error))}", file=sys.stderr)
        remove_tree(work)

"""Paths and sizes as a card shows them."""

import os
import re

from data_prep.card.summary import Summary
from data_prep.pages.numbers import size_text
from data_prep.store.locations import EMBEDDED, is_remote
from data_prep.store.text import without_surrogates


def shown_path(path: str) -> str:
    """A path without what concerns only one machine or one user.

    >>> shown_path("/home/me/a.jsonl")
    'a.jsonl'
    >>> shown_path("https://me:secret@host/a.jsonl?key=1")
    'https://host/a.jsonl'
    """
    path = without_surrogates(path)
    if path.startswith(EMBEDDED):
        return path
    if is_remote(path):
        scheme, _, rest = re.split(r"[?#]", path)[0].partition("://")
        host, slash, inner = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{inner}"
    is_here = not path.startswith(("/", "~", "..", "file://"))
    return path if is_here else os.path.basename(path)


def bytes_per_token(summary: Summary) -> str:
    """UTF-8 bytes of text over tokens of the stream, in words where it is not known."""
    if not summary.num_text_bytes:
        return "unknown"
    return f"{summary.num_text_bytes / summary.num_tokens:.3f}"


def text_size(summary: Summary) -> str:
    """Size of the texts, in words where it is not known."""
    return size_text(summary.num_text_bytes) if summary.num_text_bytes else "unknown"

"""Token ids -> text token by token, where a token may be a part of a character."""

from typing import NamedTuple

import numpy as np

from data_prep.store.tokenizers import Tokenizer

_MAX_TOKENS = 8  # that are tried together; a character has at most 4 bytes, but its tokens may hold parts of others
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Piece(NamedTuple):
    """The fewest neighbouring tokens that are whole characters, and their text."""

    start: int
    stop: int
    text: str


def pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[Piece]:
    """Every token in exactly one piece, in order; one that cannot be made whole is U+FFFD, alone."""
    out: list[Piece] = []
    start, before = 0, np.empty(0, ids.dtype)
    while start < len(ids):
        stop, text = start + 1, ""
        for end in range(start + 1, min(len(ids), start + _MAX_TOKENS) + 1):
            text = _text_after(tokenizer, before, ids[start:end])
            if _BROKEN not in text:
                stop = end
                break
        else:
            text = _text_after(tokenizer, before, ids[start:stop])
        out.append(Piece(start, stop, text))
        before = ids[start:stop] if _BROKEN not in text else ids[:0]
        start = stop
    return out


def _text_after(tokenizer: Tokenizer, before: np.ndarray, ids: np.ndarray) -> str:
    """Text of ids where they follow others: some tokenizers drop the space in front of what they decode."""
    if not len(before):
        return tokenizer.decode(ids)
    return tokenizer.decode(np.concatenate([before, ids]))[len(tokenizer.decode(before)) :]

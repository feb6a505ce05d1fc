"""What a stage of a plan may edit in place: rows get other windows, targets that do not count, or a document.

All other rows stay as they are. docs/data-order.md defines it ("Edits in place"); `edits.py` makes edited plans.
"""

import dataclasses

import numpy as np
import xxhash

from data_prep.store.token_sources import TokenSource
from data_prep.store.typed import Count


@dataclasses.dataclass(frozen=True)
class Substitution:
    """Windows of a stream that are replaced where they would be seen, by others that the run does not reach.

    Attributes:
      windows: that are replaced, ascending, and take nobody's place.
      until: index in the stream's endless sequence at which the run stops. Before it windows are replaced; those from
        there on take their place.
    """

    windows: tuple[Count, ...]
    until: Count

    def __post_init__(self):
        if list(self.windows) != sorted(set(self.windows)) or not self.windows:
            raise ValueError("the substituted windows are not ascending")


@dataclasses.dataclass(frozen=True)
class Insertion:
    """A document that overwrites the front of given rows.

    Long ones come in parts of `seq_len` tokens, cut as windows are; after the last one stands one end-of-text token.

    Attributes:
      name: of its dataset, begins with "inserted/".
      fingerprint, num_tokens: of that dataset and its training split.
      start, length: of the document in that split's stream, its own end-of-text token included.
      end_of_text: the id.
      places: (index of a step, row of its batch, part of the document), ascending.
    """

    name: str
    fingerprint: str
    num_tokens: Count
    start: Count
    length: Count
    end_of_text: Count
    places: tuple[tuple[Count, Count, Count], ...]

    def __post_init__(self):
        if not self.name.startswith(INSERTED):
            raise ValueError(f"{self.name!r} is no name of an inserted dataset, expected {INSERTED}...")
        if not 0 < self.length <= self.num_tokens - self.start:
            raise ValueError(
                f"{self.name}: {self.length} tokens from token {self.start} on, the stream holds {self.num_tokens}"
            )
        if list(self.places) != sorted(set(self.places)) or not self.places:
            raise ValueError(f"{self.name}: the places of the document are not ascending")

    @property
    def source(self) -> tuple[str, str, int]:
        """(name, fingerprint, num_tokens) of the dataset's training split."""
        return self.name, self.fingerprint, self.num_tokens

    def num_parts(self, seq_len: int) -> int:
        """In how many rows all of its tokens, and the end-of-text token after them, are targets."""
        return -(-self.length // seq_len)

    def span(self, part: int, seq_len: int) -> tuple[int, int]:
        """Tokens [a, b) of the document that a row with this part begins with."""
        return part * seq_len, min(part * seq_len + seq_len + 1, self.length)

    def num_overwritten(self, part: int, seq_len: int) -> int:
        """Tokens of the row, from its front, the end-of-text token that closes the document included."""
        return min(seq_len + 1, self.length + 1 - part * seq_len)

    def read(self, source: TokenSource, part: int, seq_len: int) -> np.ndarray:
        """What the row begins with: (num_overwritten,)."""
        first, stop = self.span(part, seq_len)
        tokens = source.read(np.array([self.start + first]), stop - first)[0]
        closing = self.num_overwritten(part, seq_len) - len(tokens)
        return np.concatenate([tokens, np.full(closing, self.end_of_text, tokens.dtype)])

    def mark(self, part: int) -> int:
        """What the digest of a row with this part is told apart by, u64."""
        return xxhash.xxh3_64_intdigest(f"insert/{self.fingerprint}/{self.start}/{part}".encode())


INSERTED = "inserted/"


def kept_targets(edges: tuple[np.ndarray, np.ndarray], windows: np.ndarray, seq_len: int) -> np.ndarray:
    """Whether each target of windows (n,) lies outside the masked spans of their stream: bool (n, seq_len).

    `edges` are starts and stops of the spans, ascending. Target `t` of window `w` is token `w * seq_len + t + 1` of the
    stream.
    """
    keep = np.ones((len(windows), seq_len), bool)
    firsts = windows * seq_len + 1
    # The first span that ends after a window begins.
    numbers = np.searchsorted(edges[1], firsts, side="right")
    begun = np.append(edges[0], np.iinfo(np.int64).max)[numbers] < firsts + seq_len
    for row in np.flatnonzero(begun).tolist():
        first, number = int(firsts[row]), int(numbers[row])
        while number < len(edges[0]) and edges[0][number] < first + seq_len:
            keep[row, max(0, edges[0][number] - first) : edges[1][number] - first] = False
            number += 1
    return keep

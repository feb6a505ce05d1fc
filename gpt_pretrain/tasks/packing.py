"""Continuations of contexts -> rows of tokens, in few shapes. NumPy only.

The continuations of one context share it: a row is the context, and after it each continuation but for its last
token, which sees the context and itself. So the four endings of a question cost one context, not four.

    context 5 6, continuations 7 8 9 and 4 3

    tokens     5 6 7 8 4
    branch     0 0 1 1 2      a token sees those before it of branch 0 and of its own
    position   0 1 2 3 2
    targets      7 8 9 4 3    predicted at places 1 2 3 1 4
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SMALLEST = 16  # tokens of a row, and SMALLEST // 4 targets: a shape for each length would be compiled for each


class Request(NamedTuple):
    """Token ids whose log-likelihood is asked for: of `continuation`, after `context` of at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass
class Row:
    """A context with some of its continuations.

    Attributes:
      requests: number of the request of each continuation.
    """

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]]
    requests: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.context) + sum(len(each) - 1 for each in self.continuations)

    @property
    def num_targets(self) -> int:
        return sum(map(len, self.continuations))


class Arrays(NamedTuple):
    """Rows as a model takes them: int32 (rows, tokens), and (rows, targets) for what is predicted where.

    Attributes:
      segments: which document of its sequence a token belongs to; all 0 without the document mask.
      branches: 0 for the context, from 1 for the continuations.
      sources: place in the row whose hidden state predicts the target.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    branches_BT: np.ndarray
    sources_BN: np.ndarray
    targets_BN: np.ndarray


def padded(length: int, most: int | None = None) -> int:
    """The shape that a length gets: a power of two or 1.5 times one, at most `most`.

    >>> [padded(length) for length in (3, 17, 24, 25, 100)], padded(100, most=120)
    ([16, 24, 24, 32, 128], 120)
    """
    size = SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if most is None or length > most else min(size, most)


def padded_targets(length: int) -> int:
    """The same for targets: a power of two.

    >>> [padded_targets(length) for length in (1, 5, 33)]
    [4, 8, 64]
    """
    return max(SMALLEST // 4, 1 << (length - 1).bit_length())


def rows_of(requests: Sequence[Request], max_length: int, *, may_share: bool = True) -> list[Row]:
    """Rows of at most `max_length` tokens, the longest first. What is too long loses tokens on the left.

    Args:
      may_share: continuations of one context share a row; else each has one of its own.

    Raises ValueError: a request without context, or with a continuation that is longer than `max_length`.
    """
    by_context: dict[tuple[int, ...], list[Row]] = {}
    for number, request in enumerate(requests):
        context, continuation = tuple(request.context), tuple(request.continuation)
        if not context or len(continuation) > max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens after a context of {len(context)}: expected at most "
                f"{max_length}, the positions that the model has, after at least one token"
            )
        if not continuation:
            continue
        context = context[-(max_length + 1 - len(continuation)) :]
        rows = by_context.setdefault(context, [])
        if not rows or not may_share or rows[-1].num_tokens + len(continuation) - 1 > max_length:
            rows.append(Row(context, [], []))
        rows[-1].continuations.append(continuation)
        rows[-1].requests.append(number)
    found = [row for rows in by_context.values() for row in rows]
    return sorted(found, key=lambda row: (-row.num_tokens, -row.num_targets, row.requests))


def batches_of(
    rows: Sequence[Row], *, max_length: int, tokens_at_once: int, multiple_of: int = 1
) -> Iterator[tuple[Sequence[Row], tuple[int, int, int]]]:
    """Rows, the longest first, and the shape of their batch: (rows, tokens, targets).

    What is left of one length is put beside shorter rows, so that only the last batch has empty ones.

    Args:
      tokens_at_once: in a batch, about.
      multiple_of: the number of devices that share a batch.
    """
    start = 0
    while start < len(rows):
        num_tokens = padded(rows[start].num_tokens, max_length)
        most = max(1, tokens_at_once // (num_tokens * multiple_of))
        left = -(-(len(rows) - start) // multiple_of)
        num_rows = multiple_of * min(most, 1 << (left - 1).bit_length())
        batch = rows[start : start + num_rows]
        yield batch, (num_rows, num_tokens, padded_targets(max(row.num_targets for row in batch)))
        start += len(batch)


def arrays_of(rows: Sequence[Row], shape: tuple[int, int, int], document_end: int | None) -> Arrays:
    """Rows in arrays of that shape, filled up with zeros.

    Args:
      document_end: the id that begins each document, where attention is kept within documents: positions count from
        the last one. None without the document mask.
    """
    num_rows, num_tokens, num_targets = shape
    whole = Arrays(*(np.zeros((num_rows, num_tokens), np.int32) for _ in range(4)),
                   *(np.zeros((num_rows, num_targets), np.int32) for _ in range(2)))  # fmt: skip
    for index, row in enumerate(rows):
        for array, values in zip(whole, _of_row(row, document_end), strict=True):
            array[index, : len(values)] = values
    return whole


def _of_row(row: Row, document_end: int | None) -> Arrays:
    num_context = len(row.context)
    parts: list[tuple[np.ndarray, ...]] = []
    sources, targets, begin = [], [], num_context
    for branch, continuation in enumerate(row.continuations, start=1):
        tokens = np.array((*row.context, *continuation[:-1]), np.int32)
        place, segment = _places(tokens, document_end)
        if branch == 1:
            parts.append((tokens, place, segment, np.where(np.arange(len(tokens)) < num_context, 0, branch)))
        else:
            new = slice(num_context, None)
            parts.append((tokens[new], place[new], segment[new], np.full(len(tokens) - num_context, branch)))
        sources.append(np.array([num_context - 1, *range(begin, begin + len(continuation) - 1)], np.int32))
        targets.append(np.array(continuation, np.int32))
        begin += len(continuation) - 1
    tokens, places, segments, branches = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Arrays(tokens, places, segments, branches, np.concatenate(sources), np.concatenate(targets))


def _places(tokens_T: np.ndarray, document_end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Position and segment of each token of one sequence, as `model.document_mask` counts them."""
    index_T = np.arange(len(tokens_T))
    if document_end is None:
        return index_T, np.zeros_like(index_T)
    is_first_T = tokens_T == document_end
    return index_T - np.maximum.accumulate(np.where(is_first_T, index_T, 0)), np.cumsum(is_first_T)

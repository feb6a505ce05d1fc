"""Where a text occurs in the streams of a run: its tokens, looked for in all of them.

A text may be tokenized in more than one way, as a token often begins with the space before a word: it is looked for as
it is, and after a space. What stands around a text may also join with its first or last token to another one; such
places are not found.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_prep.store.token_sources import TokenSource
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span

_TOKENS_AT_ONCE = 1 << 20  # twice as fast as a quarter of that
_PIECES_AHEAD = 64
_SAMPLE_TOKENS = 1 << 20  # how frequent tokens are is judged from so many
_THREADS = 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """A text as tokens: as it was typed, or after a space."""

    text: str
    ids: tuple[int, ...]


def variants_of(text: str, tokenizer: Tokenizer) -> list[Variant]:
    """The ways in which a text may be tokenized. ValueError for one without a token."""
    texts = dict.fromkeys([text, text if text.startswith(" ") else " " + text])
    found = {tuple(int(each) for each in tokenizer.encode(spelt)): spelt for spelt in texts}
    if () in found:
        raise ValueError(f"--text {text!r}: has no token; expected some words")
    return [Variant(spelt, ids) for ids, spelt in found.items()]


def places_of(
    source: TokenSource, patterns: Sequence[Sequence[int]], on_progress: Callable[[int], None] = lambda tokens: None
) -> list[np.ndarray]:
    """Every position at which each pattern of ids begins in a stream, ascending, overlapping ones too: int64 each.

    Args:
      on_progress: called with how many tokens were searched since the call before.
    """
    longest = max(map(len, patterns))
    sample = source.read(np.zeros(1, np.int64), min(_SAMPLE_TOKENS, source.num_tokens))[0]
    # The rarest token of a pattern leaves the fewest places to be looked at.
    rarest = [int(np.argmin([np.count_nonzero(sample == token) for token in ids])) for ids in patterns]
    found: list[list[np.ndarray]] = [[] for _ in patterns]

    def search(first: int) -> list[np.ndarray]:
        length = min(_TOKENS_AT_ONCE + longest - 1, source.num_tokens - first)
        tokens = source.read(np.array([first]), length)[0]
        return [
            first + _matches(tokens, np.array(ids), at, _TOKENS_AT_ONCE)
            for ids, at in zip(patterns, rarest, strict=True)
        ]

    firsts = range(0, source.num_tokens, _TOKENS_AT_ONCE)
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(firsts), _PIECES_AHEAD):
            some = firsts[start : start + _PIECES_AHEAD]
            for pieces in threads.map(search, some):
                for places, piece in zip(found, pieces, strict=True):
                    if len(piece):
                        places.append(piece)
            on_progress(min(some[-1] + _TOKENS_AT_ONCE, source.num_tokens) - some[0])
    return [np.concatenate([np.empty(0, np.int64), *places]) for places in found]


def _matches(tokens: np.ndarray, ids: np.ndarray, at: int, most: int) -> np.ndarray:
    """Where `ids` begins among the first `most` tokens; token `at` of it is looked for first."""
    limits = np.iinfo(tokens.dtype)
    if ids.max() > limits.max:
        return np.empty(0, np.int64)
    starts = np.flatnonzero(tokens == tokens.dtype.type(ids[at])) - at
    starts = starts[(starts >= 0) & (starts < most) & (starts + len(ids) <= len(tokens))]
    for offset, token in enumerate(ids.tolist()):
        if len(starts) and offset != at:
            starts = starts[tokens[starts + offset] == token]
    return starts


@dataclasses.dataclass(frozen=True)
class Found:
    """A text at one place of a stream."""

    variant: Variant
    span: Span  # the tokens of the text, and the document that they are of


def search_text(
    run: OpenedRun,
    text: str,
    *,
    stream: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Found]:
    """Every place of a text in the run's datasets, in the order of the streams, training split first.

    Args:
      stream: search this stream of the mixture only.
      on_progress: called with how many tokens of all were searched.

    Raises ValueError: no such stream, a text without tokens, a dataset that is not there.
    """
    named = [each for each in run.streams() if stream is None or each.name == stream]
    streams = list({each.fingerprint: each for each in named}.values())
    if not streams:
        names = ", ".join(each.name for each in run.streams()) or "one, without a name"
        raise ValueError(f"--stream {stream}: no such stream in {run.save_dir}; it has {names}")
    work = [(each, split, source) for each in streams for split, source in run.dataset(each).splits.items()]
    total, done = sum(source.num_tokens for _, _, source in work), 0

    def searched(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_progress(done, total)

    for each, split, source in work:
        variants = variants_of(text, run.tokenizer(each))
        places = places_of(source, [variant.ids for variant in variants], searched)
        tables = run.documents(each, split)
        pairs = [(int(at), variant) for variant, found in zip(variants, places, strict=True) for at in found]
        for at, variant in sorted(pairs, key=lambda pair: (pair[0], len(pair[1].ids))):
            document = tables and tables.at(at)
            yield Found(variant, Span(each, split, at, at + len(variant.ids), document))

"""Batches of texts -> token ids, fast: gigatoken where it can, else the tokenizer text by text.

Both give the ids that `store/tokenizers.py` defines. gigatoken's are not taken on trust: a sample of
every unit is encoded again by the tokenizer itself, and a difference stops the preparation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data_prep.inputs.units import text_bytes
from data_prep.store.byte_pairs import BytePairTokenizer
from data_prep.store.tokenizers import Tokenizer

ENGINES = ("auto", "gigatoken", "tiktoken")
# gigatoken remembers every word that it meets and never forgets one: it is opened anew after this
# much text. That takes 0.05 s, and its memory stays below about 200 MB.
RENEW_BYTES = 256 << 20
SAMPLE_ONE_IN = 1024  # documents that are encoded twice


class TokenizerMismatch(ValueError):
    """The fast engine and the tokenizer gave different ids for a text."""


class Encoder(Protocol):
    """What makes ids of many texts at once."""

    name: str

    def encode_batch(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """Texts without nulls -> (their ids one after the other (n,), ids of each text int64)."""
        ...


class TextByText:
    """The tokenizer itself, a text at a time: the reference."""

    def __init__(self, tokenizer: Tokenizer):
        self.name = "tiktoken" if isinstance(tokenizer, BytePairTokenizer) else tokenizer.name
        self._tokenizer = tokenizer

    def encode_batch(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        ids = [np.asarray(self._tokenizer.encode(text)) for text in texts.to_pylist()]
        lengths = np.array([len(each) for each in ids], np.int64)
        return np.concatenate([np.empty(0, np.uint32), *ids], dtype=np.int64), lengths


class Gigatoken:
    """gigatoken, from Arrow's buffers to NumPy's without a Python string."""

    name = "gigatoken"

    def __init__(self, tokenizer: Any):
        self._open = tokenizer.open_gigatoken
        self._engine = _without_panic(self._open)
        self._num_bytes = 0

    def encode_batch(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        import awkward

        self._num_bytes += texts.nbytes
        if self._num_bytes > RENEW_BYTES:
            self._engine, self._num_bytes = _without_panic(self._open), 0
        # One thread each: workers are processes, one a core.
        encode = partial(self._engine.encode_batch, awkward.from_arrow(texts), parallel=False)
        rows = _without_panic(encode)
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))


def _without_panic(function: Callable[[], Any]) -> Any:
    """Its result. A Rust panic, which Python takes for no Exception, becomes a ValueError."""
    try:
        return function()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"gigatoken broke down ({text}). Use --tokenizer_engine=tiktoken.") from None


def choose_engine(tokenizer: Tokenizer, asked: str = "auto") -> str:
    """Which engine encodes: "gigatoken" or "tiktoken" (which means: the tokenizer itself).

    Raises ValueError where the one that was asked for cannot be used.
    """
    if asked not in ENGINES:
        raise ValueError(f"--tokenizer_engine={asked}: expected one of {', '.join(ENGINES)}")
    known = hasattr(tokenizer, "open_gigatoken")
    if asked == "tiktoken" or (asked == "auto" and not known):
        return "tiktoken"
    if not known:
        raise ValueError(
            f"--tokenizer_engine=gigatoken cannot run the tokenizer {tokenizer.name}, only "
            "byte-pair encodings. Use --tokenizer_engine=auto."
        )
    try:
        Gigatoken(tokenizer)
    except Exception as error:  # not installed, or a kind of tokenizer that it does not know
        if asked == "auto":
            return "tiktoken"
        raise ValueError(
            f"--tokenizer_engine=gigatoken cannot run the tokenizer {tokenizer.name}: {error}. "
            "Use --tokenizer_engine=auto."
        ) from None
    return "gigatoken"


def open_encoder(tokenizer: Tokenizer, engine: str) -> Encoder:
    """The encoder that `choose_engine` chose."""
    return Gigatoken(tokenizer) if engine == "gigatoken" else TextByText(tokenizer)


@dataclass
class Verifier:
    """Encodes documents of a unit once more, by the tokenizer itself.

    Args:
      which: "all", "none", or "sample": one of SAMPLE_ONE_IN, chosen by row, and the first one
        that is not empty.
    """

    tokenizer: Tokenizer
    which: str
    num_verified: int = 0

    def check(
        self,
        texts: pa.LargeStringArray,
        ids: np.ndarray,
        lengths: np.ndarray,
        rows: np.ndarray,
        where: str,
        document_ids: pa.Array,
    ) -> None:
        """Raises TokenizerMismatch, naming the document, where the tokenizer gives other ids."""
        if self.which == "none":
            return
        filled = text_bytes(texts) > 0
        wanted = (_scatter(rows) % SAMPLE_ONE_IN == 0) | (self.which == "all")
        if not self.num_verified:
            wanted |= np.cumsum(filled) == 1  # and empty ones after it, which filled removes
        chosen = np.flatnonzero(filled & wanted)
        ends = np.cumsum(lengths)
        for place in chosen.tolist():
            found = ids[ends[place] - lengths[place] : ends[place]]
            expected = self.tokenizer.encode(texts[place].as_py())
            if not np.array_equal(found, expected):
                short = min(len(found), len(expected))
                unequal = np.flatnonzero(found[:short] != expected[:short])
                at = int(unequal[0]) if len(unequal) else short
                raise TokenizerMismatch(
                    f"{where}: row {rows[place]}, document {document_ids[place].as_py()}: the fast "
                    f"engine and the tokenizer {self.tokenizer.name} differ from token {at} on "
                    f"({found[at : at + 3].tolist()}, expected {expected[at : at + 3].tolist()}). "
                    "Use --tokenizer_engine=tiktoken, and report this text to gigatoken."
                )
        self.num_verified += len(chosen)


def _scatter(rows: np.ndarray) -> np.ndarray:
    """A hash of each row number: int64 (n,) -> uint64 (n,), so that no period of rows is missed."""
    x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return x >> np.uint64(40)

"""Text -> token ids. `get_tokenizer("gpt2")` needs no network: the ranks ship in the package.

Add your own: a class with the members of `Tokenizer` and a line in `TOKENIZERS`, or no line at
all and `--tokenizer=my_module:MyTokenizer`. What is here defines the ids; `data_prep.encoders` makes
the same ids faster.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.store.byte_pairs import CL100kTokenizer, GPT2Tokenizer, O200kTokenizer, load_tiktoken_file
from data_prep.store.files import digest_json
from data_prep.store.spec import Spec
from data_prep.store.tokenizer_json import HuggingFaceTokenizer


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer.

    One that gigatoken can run as well has a method `open_gigatoken`; see `encoders.py`.
    """

    name: str
    vocab_size: int  # ids are in [0, vocab_size)
    end_of_text: int  # id that starts each document; `encode` never returns it
    digest: str  # equal digests promise equal ids for every text

    def encode(self, text: str) -> np.ndarray:
        """Text to ids (n,), of any integer type. Every text is ordinary: none is end-of-text."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as they are, plus an end-of-text id: for tests and tiny models."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256
    digest = digest_json(["utf-8 bytes", end_of_text])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        pieces = (b"<|endoftext|>" if i == self.end_of_text else bytes([i]) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", "replace")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": GPT2Tokenizer,
    "byte": ByteTokenizer,
    "cl100k_base": CL100kTokenizer,
    "o200k_base": O200kTokenizer,
}


def get_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by registry name, file, or `module:Class`.

    Files: `PATH.tiktoken[@SCHEME]`, with the scheme (gpt2, cl100k_base, o200k_base) needed where
    the number of ranks does not tell it; `PATH/tokenizer.json[@TOKEN]`, with the end-of-text token
    needed where it has none of the usual names.

    Raises ValueError for what is not there or cannot be used.
    """
    if match := re.fullmatch(r"(.+?\.(tiktoken|json))(?:@(.*))?", name):
        path, suffix, choice = match.groups("")
        load = load_tiktoken_file if suffix == "tiktoken" else HuggingFaceTokenizer
        return load(Path(path), choice, name)
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}, a file "
            "(PATH.tiktoken or PATH/tokenizer.json), or your own as module:Class"
        )
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {error}") from None


def open_tokenizer(spec: Spec) -> Tokenizer:
    """The tokenizer that made the dataset. ValueError where it is not to be had."""
    tokenizer = get_tokenizer(spec.tokenizer)
    if tokenizer.digest != spec.tokenizer_digest:
        raise ValueError(
            f"tokenizer {spec.tokenizer}: digest {tokenizer.digest}, the dataset was made with "
            f"{spec.tokenizer_digest}; it would read other text out of the tokens. "
            "Bring back the tokenizer of that time."
        )
    return tokenizer

"""Text -> token ids. `get_tokenizer("gpt2")` needs no network: the ranks ship in the package.

Add your own: a class with the members of `Tokenizer` and a line in `TOKENIZERS`, or no line at
all and `--tokenizer=my_module:MyTokenizer`.
"""

import base64
import hashlib
import importlib
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.files import digest_json

ASSETS = Path(__file__).parent / "assets"
RANKS = ASSETS / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# How GPT-2 cuts text before merging bytes, in the possessive spelling that tiktoken runs fastest.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MAX_VOCAB_SIZE = 1 << 16  # ids are stored as uint16

TOKENIZERS = {
    "gpt2": "data_prep.tokenizers:GPT2Tokenizer",
    "byte": "data_prep.tokenizers:ByteTokenizer",
}


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer."""

    name: str
    vocab_size: int  # ids are in [0, vocab_size)
    end_of_text: int  # id that starts each document; `encode` never returns it
    digest: str  # equal digests promise equal ids for every text

    def encode(self, text: str) -> np.ndarray:
        """Text to uint16 ids (n,). Every text is ordinary: no string means end-of-text."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        ...


def get_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by registry name, or by `module:Class`.

    Raises ValueError for an unknown name and for a vocabulary that uint16 cannot hold.
    """
    target = name if ":" in name else TOKENIZERS.get(name)
    if target is None:
        raise ValueError(
            f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}, "
            "or your own as module:Class"
        )
    module, _, attribute = target.partition(":")
    try:
        tokenizer = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {error}") from None
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"tokenizer {name!r} has {tokenizer.vocab_size:,} ids, but token ids are stored as "
            f"uint16: at most {MAX_VOCAB_SIZE:,}. Choose a smaller vocabulary, such as gpt2."
        )
    return tokenizer


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, run by tiktoken."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken

        self.digest = digest_json([RANKS_SHA256, GPT2_SPLIT, self.end_of_text])
        self._encoding = tiktoken.Encoding(  # never get_encoding: it would ask the network
            name="gpt2",
            pat_str=GPT2_SPLIT,
            mergeable_ranks=load_ranks(RANKS),
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # Lone surrogates, which JSON can spell: the same repair as encode_ordinary's own.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def decode(self, ids: np.ndarray) -> str:
        return self._encoding.decode(list(map(int, ids)))


class ByteTokenizer:
    """UTF-8 bytes as they are, plus an end-of-text id: for tests and tiny models."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256
    digest = digest_json(["utf-8 bytes", end_of_text])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, ids: np.ndarray) -> str:
        pieces = (b"<|endoftext|>" if i == self.end_of_text else bytes([i]) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", "replace")


def load_ranks(path: Path) -> dict[bytes, int]:
    """The byte pairs of a .tiktoken file ("base64 rank" a line) after checking its digest."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing from the installation. Install it again.") from None
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise ValueError(
            f"{path}: sha256 is {found}, expected {RANKS_SHA256}; the GPT-2 ranks are damaged. "
            "Restore the file (git checkout) or install the package again."
        )
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}

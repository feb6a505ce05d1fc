"""Text -> token ids. `user_tokenizer("gpt2")` needs no network: the ranks ship in the package.

Add your own: a class with the members of `Tokenizer` and a line in `TOKENIZERS`, or no line at
all and `--tokenizer=my_module:MyTokenizer`. What is here defines the ids; `data_prep.encoders` makes
the same ids faster.

A name that a user typed may be anything, a class to import included. A name that stands in a file, a
manifest or a checkpoint's metadata, is data: it means a tokenizer of this package or a file in the dataset's
own directory, and nothing else.
"""

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.store import buckets
from data_prep.store.byte_pairs import CL100kTokenizer, GPT2Tokenizer, O200kTokenizer, load_tiktoken_file
from data_prep.store.dataset_files import local_folder_with
from data_prep.store.files import digest_json
from data_prep.store.spec import Spec
from data_prep.store.tokenizer_json import HuggingFaceTokenizer, byte_level, byte_level_json


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer.

    One that gigatoken can run as well has a method `open_gigatoken`; see `encoders.py`. One that transformers can run
    has `to_tokenizer_json`, which gives the fields of a tokenizer.json. One whose ids are pieces of a text's UTF-8 has
    `byte_lengths`: int64 (vocab_size,), 0 for end-of-text.
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

    def byte_lengths(self) -> np.ndarray:
        """Bytes that each id stands for: int64 (vocab_size,)."""
        return (np.arange(self.vocab_size) != self.end_of_text).astype(np.int64)

    def to_tokenizer_json(self) -> dict[str, Any]:
        """The fields of a tokenizer.json with the same ids."""
        return byte_level_json({bytes([i]): i for i in range(256)}, [], byte_level(), self.end_of_text)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": GPT2Tokenizer,
    "byte": ByteTokenizer,
    "cl100k_base": CL100kTokenizer,
    "o200k_base": O200kTokenizer,
}


_FILE = re.compile(r"(.+?\.(tiktoken|json))(?:@(.*))?", re.DOTALL)


def user_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a user typed: a name of ours, a file, or `module:Class`, which is imported and called.

    Files: `PATH.tiktoken[@SCHEME]`, with the scheme (gpt2, cl100k_base, o200k_base) needed where
    the number of ranks does not tell it; `PATH/tokenizer.json[@TOKEN]`, with the end-of-text token
    needed where it has none of the usual names.

    Raises ValueError for what is not there or cannot be used.
    """
    if match := _FILE.fullmatch(name):
        path, suffix, choice = match.groups("")
        load = load_tiktoken_file if suffix == "tiktoken" else HuggingFaceTokenizer
        return load(Path(path).expanduser(), choice, name)
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
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {error}") from None


def safe_name(recorded: str, directory: str | os.PathLike | None = None) -> str:
    """A name that stands in a file -> one that `user_tokenizer` may have: never a class, nor a file from elsewhere.

    Args:
      directory: of the dataset, whose own files may be meant: by the last part of their recorded path.

    Raises ValueError for any other name, with what to do.
    """
    if recorded in TOKENIZERS:
        return recorded
    if directory is not None and (match := _FILE.fullmatch(recorded)):
        path, _, choice = match.groups("")
        if buckets.is_bucket(directory):
            directory = local_folder_with(os.fspath(directory), os.path.basename(path))
        here = Path(directory, os.path.basename(path))
        is_here = os.path.realpath(here) == os.path.join(os.path.realpath(directory), here.name)
        if is_here and here.is_file():  # no link, and nothing that a reader would wait for
            return f"{here}@{choice}" if choice else str(here)
    raise ValueError(
        f"tokenizer {recorded!r:.200} is named in a file, and neither one of ours ({', '.join(TOKENIZERS)}) nor a file "
        f"in {directory or 'a dataset'}: nothing is imported or opened because a file says so. Name it yourself: "
        "--tokenizer=... (data.tokenizer in a .gin file), or copy its file into the dataset's directory."
    )


def recorded_tokenizer(
    recorded: str, digest: str | None, directory: str | os.PathLike | None = None, *, users: str | None = None
) -> Tokenizer:
    """The tokenizer that a file speaks of.

    Args:
      recorded, digest: as they stand in the file; a digest of None is not known.
      directory: as for `safe_name`.
      users: what the user typed, if anything: it is loaded instead of the recorded name.

    Raises ValueError where it is not to be had, or is another one than the digest says.
    """
    name = users or safe_name(recorded, directory)
    tokenizer = user_tokenizer(name)
    if digest not in (None, tokenizer.digest):
        raise ValueError(
            f"tokenizer {name}: digest {tokenizer.digest}, expected {digest}, that of {recorded!r:.200}; it would read "
            "other text out of the tokens. Bring back the tokenizer of that time, or name it: --tokenizer=..."
        )
    return tokenizer


def dataset_tokenizer(spec: Spec, directory: str | os.PathLike, users: str | None = None) -> Tokenizer:
    """The tokenizer that made a prepared dataset; see `recorded_tokenizer`."""
    return recorded_tokenizer(spec.tokenizer, spec.tokenizer_digest, directory, users=users)

"""Byte-level byte-pair encodings, run by tiktoken: GPT-2's from the ranks in this package, later ones, files."""

import hashlib
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_prep.store.files import digest_json
from data_prep.store.locations import ASSETS
from data_prep.store.ranks import format_ranks, merges_of, parse_ranks, read_ranks
from data_prep.store.text import without_surrogates
from data_prep.store.tokenizer_json import byte_level, byte_level_json

if TYPE_CHECKING:
    import gigatoken
    import tiktoken

RANKS = ASSETS / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # tiktoken's \s
LONG_SPACE = 100_000  # tiktoken's regular expressions give up at ten times as much


class Scheme(NamedTuple):
    """How a family of byte-pair encodings cuts text before it merges bytes."""

    pattern: str  # in the possessive spelling, which tiktoken runs fastest
    space: str  # of what white space a run, but for its last character, is one piece
    gigatoken: str  # its name there
    num_ranks: int  # of the published encoding
    end_of_text: int  # of the published encoding

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """Of a tokenizer.json, whose expressions are Oniguruma's: `$` ends a line there, `{1,3}+` is not possessive."""
        if self.gigatoken == "gpt2":
            return byte_level(cuts=True)
        pattern = re.sub(r"([+?*}])\+", r"\1", self.pattern).replace("$", r"\z")
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, byte_level()]}


SCHEMES = {
    "gpt2": Scheme(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        SPACE,
        "gpt2",
        50256,
        50256,
    ),
    "cl100k_base": Scheme(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        rf"(?![\r\n]){SPACE}",
        "cl100k",
        100256,
        100257,
    ),
    "o200k_base": Scheme(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s++$|\s+(?!\S)|\s",
        rf"(?![\r\n]){SPACE}",
        "o200k",
        199998,
        199999,
    ),
}


class BytePairTokenizer:
    """A byte-level byte-pair encoding, run by tiktoken.

    Args:
      content: the ranks as a .tiktoken file has them; its digest identifies the tokenizer.
      num_ranks: their number; ids are 0 to num_ranks - 1, and `end_of_text`.
    """

    def __init__(self, name: str, scheme: Scheme, content: bytes, num_ranks: int, end_of_text: int):
        self.name = name
        self.end_of_text = end_of_text
        self.vocab_size = max(end_of_text + 1, num_ranks)
        sha256 = hashlib.sha256(content).hexdigest()
        self.digest = digest_json([sha256, scheme.pattern, end_of_text])
        self._scheme, self._content = scheme, content

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        # At first use: it takes 0.2 s, and whoever lets gigatoken encode may never need it.
        import tiktoken

        return tiktoken.Encoding(
            name=self.name,
            pat_str=self._scheme.pattern,
            mergeable_ranks=parse_ranks(self._content),
            special_tokens={"<|endoftext|>": self.end_of_text},
        )

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text))
        except ValueError:  # a million characters of white space: too much for `\s+(?!\S)`
            return self._encode_long_space(text)

    def _encode_long_space(self, text: str) -> np.ndarray:
        """The same ids, with long runs of white space cut out by hand."""
        ids: list[np.ndarray] = []
        start = 0
        for run in re.finditer(f"(?:{self._scheme.space}){{{LONG_SPACE},}}+", text):
            if text[run.end() : run.end() + 1] in ("", "\r", "\n"):
                continue  # other parts of the pattern take it, in one go
            before, piece = text[start : run.start()], text[run.start() : run.end() - 1]
            ids.append(self._encoding.encode_to_numpy(before, disallowed_special=()))
            ids.append(np.array(self._encoding._encode_single_piece(piece), ids[-1].dtype))
            start = run.end() - 1
        ids.append(self._encoding.encode_to_numpy(text[start:], disallowed_special=()))
        return np.concatenate(ids)

    def decode(self, ids: np.ndarray) -> str:
        return self._encoding.decode(list(map(int, ids)))

    def byte_lengths(self) -> np.ndarray:
        """Bytes that each id stands for: int64 (vocab_size,), 0 for end-of-text."""
        lengths_V = np.zeros(self.vocab_size, np.int64)
        for token, rank in parse_ranks(self._content).items():
            lengths_V[rank] = len(token)
        return lengths_V

    def to_tokenizer_json(self) -> dict[str, Any]:
        """The fields of a tokenizer.json with the same ids; `<|endoftext|>` in a text is the special token there.

        Raises ValueError where the ranks are not those of merges.
        """
        ranks = parse_ranks(self._content)
        try:
            merges = merges_of(ranks)
        except ValueError as error:
            raise ValueError(f"tokenizer {self.name}: cannot be written as tokenizer.json: {error}") from None
        return byte_level_json(ranks, merges, self._scheme.pre_tokenizer, self.end_of_text)

    def open_gigatoken(self) -> "gigatoken.Tokenizer":
        """The same encoding in gigatoken, which reads ranks from a file only."""
        import gigatoken

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(self._content)
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, self._scheme.gigatoken, {})


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's, from the ranks in this package."""

    def __init__(self):
        content = read_ranks(RANKS, RANKS_SHA256)
        super().__init__("gpt2", SCHEMES["gpt2"], content, 50256, 50256)


class _PublishedTokenizer(BytePairTokenizer):
    """One of OpenAI's that tiktoken downloads once and keeps."""

    def __init__(self, name: str):
        import tiktoken

        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:  # whatever its HTTP client raises
            raise ValueError(
                f"tokenizer {name}: tiktoken could not download its ranks "
                f"({type(error).__name__}). Where there is no network, copy {name}.tiktoken here "
                f"and use --tokenizer={name}.tiktoken, or set TIKTOKEN_CACHE_DIR to tiktoken's "
                "cache from another machine."
            ) from None
        ranks = encoding._mergeable_ranks
        scheme = SCHEMES[name]
        super().__init__(name, scheme, format_ranks(ranks), len(ranks), scheme.end_of_text)


class CL100kTokenizer(_PublishedTokenizer):
    """GPT-4's: ids to 100,257, stored as uint32."""

    def __init__(self):
        super().__init__("cl100k_base")


class O200kTokenizer(_PublishedTokenizer):
    """GPT-4o's: ids to 199,999, stored as uint32."""

    def __init__(self):
        super().__init__("o200k_base")


def load_tiktoken_file(path: Path, choice: str, name: str) -> BytePairTokenizer:
    """The tokenizer of a .tiktoken file, which holds ranks and nothing else.

    End-of-text is the published encoding's id where the number of ranks is that encoding's, else
    the first id after the ranks.
    """
    content = read_ranks(path)
    try:
        ranks = parse_ranks(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a .tiktoken file (base64 and rank a line): {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: expected the ranks 0, 1, 2, ... without a gap")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path}: has no rank for the byte {missing[0]:#04x}; expected all 256, so that every text has ids"
        )
    if choice and choice not in SCHEMES:
        raise ValueError(f"{path}@{choice}: expected @ and one of {', '.join(SCHEMES)}")
    published = {s.num_ranks: key for key, s in SCHEMES.items()}.get(len(ranks), "")
    key = choice or published
    if key not in SCHEMES:
        raise ValueError(
            f"{path}: {len(ranks):,} ranks are no published encoding's, and the file does not say "
            f"how text is cut. Say it: --tokenizer={path}@SCHEME with {' or '.join(SCHEMES)}."
        )
    end_of_text = SCHEMES[key].end_of_text if key == published else len(ranks)
    return BytePairTokenizer(name, SCHEMES[key], content, len(ranks), end_of_text)

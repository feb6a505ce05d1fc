"""Text -> token ids. `get_tokenizer("gpt2")` needs no network: the ranks ship in the package.

Add your own: a class with the members of `Tokenizer` and a line in `TOKENIZERS`, or no line at
all and `--tokenizer=my_module:MyTokenizer`. What is here defines the ids; `encoders.py` makes the
same ids faster.
"""

import base64
import hashlib
import importlib
import json
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from data_prep.store.files import digest_json

if TYPE_CHECKING:
    import gigatoken
    import tiktoken

ASSETS = Path(__file__).parent.parent / "assets"
RANKS = ASSETS / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # in tokenizer.json files


SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # tiktoken's \s
LONG_SPACE = 100_000  # tiktoken's regular expressions give up at ten times as much


class Scheme(NamedTuple):
    """How a family of byte-pair encodings cuts text before it merges bytes."""

    pattern: str  # in the possessive spelling, which tiktoken runs fastest
    space: str  # of what white space a run, but for its last character, is one piece
    gigatoken: str  # its name there
    num_ranks: int  # of the published encoding
    end_of_text: int  # of the published encoding


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
TOKENIZERS = {
    "gpt2": "data_prep.store.tokenizers:GPT2Tokenizer",
    "byte": "data_prep.store.tokenizers:ByteTokenizer",
    "cl100k_base": "data_prep.store.tokenizers:CL100kTokenizer",
    "o200k_base": "data_prep.store.tokenizers:O200kTokenizer",
}


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
    target = name if ":" in name else TOKENIZERS.get(name)
    if target is None:
        raise ValueError(
            f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}, a file "
            "(PATH.tiktoken or PATH/tokenizer.json), or your own as module:Class"
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {error}") from None


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


class HuggingFaceTokenizer:
    """A tokenizer.json, run by Hugging Face's `tokenizers`.

    Special tokens are taken out of the file's matching rules, so that their spelling in a text is
    ordinary text, and no template adds any.
    """

    def __init__(self, path: Path, choice: str, name: str):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"--tokenizer={name} needs Hugging Face's tokenizers: pip install tokenizers") from None
        self.name = name
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            added = {token["content"]: token for token in fields["added_tokens"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a tokenizer.json: {error!r}") from None
        candidates = [choice] if choice else [token for token in END_OF_TEXT if token in added]
        if not candidates or candidates[0] not in added:
            raise ValueError(
                f"{path}: which token ends a text? Say it: --tokenizer={path}@TOKEN with one of "
                + (", ".join(added) or "its added tokens, of which it has none")
            )
        self.end_of_text = int(added[candidates[0]]["id"])
        kept = [token for token in fields["added_tokens"] if not token.get("special")]
        fields |= {"added_tokens": kept, "post_processor": None, "truncation": None}
        self._content = json.dumps(fields | {"padding": None})
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content)
            # Decoding, unlike encoding, should spell the special tokens.
            self._decoder = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
        ids = self._decoder.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        self.digest = digest_json([self._content, self.end_of_text])

    def encode(self, text: str) -> np.ndarray:
        text = without_surrogates(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        return self._decoder.decode(list(map(int, ids)), skip_special_tokens=False)

    def open_gigatoken(self) -> "gigatoken.Tokenizer":
        """The same tokenizer in gigatoken. Raises where gigatoken does not know its kind."""
        import gigatoken

        return gigatoken.Tokenizer.from_json(self._content)


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


def without_surrogates(text: str) -> str:
    """Lone surrogates, which JSON can spell, become U+FFFD: the repair that tiktoken makes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_ranks(path: Path, sha256: str | None = None) -> bytes:
    """Content of a .tiktoken file, after checking its digest if that is given."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        advice = "missing from the installation. Install it again." if sha256 else "no such file"
        raise ValueError(f"{path}: {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(
            f"{path}: sha256 is {found}, expected {sha256}; the GPT-2 ranks are damaged. "
            "Restore the file (git checkout) or install the package again."
        )
    return content


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """The byte pairs of a .tiktoken file: "base64 rank" a line."""
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The inverse of `parse_ranks`, in the order of the ranks."""
    pairs = sorted(ranks.items(), key=lambda pair: pair[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in pairs)

"""Tokenizers of Hugging Face's: `tokenizer.json`, as it is read, and as it is written for tokenizers of ours."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.store.files import digest_json
from data_prep.store.text import without_surrogates

if TYPE_CHECKING:
    import gigatoken

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # the usual names


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
        self._added_tokens = fields["added_tokens"]
        kept = [token for token in self._added_tokens if not token.get("special")]
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

    def byte_lengths(self) -> np.ndarray | None:
        """Bytes that each id stands for: int64 (vocab_size,), 0 for special tokens, which no text has.

        None where the file is not byte-level, or changes the text before it cuts it.
        """
        fields = json.loads(self._content)
        decoder, vocab = fields.get("decoder") or {}, fields.get("model", {}).get("vocab")
        alters = fields.get("normalizer") is not None or '"add_prefix_space": true' in json.dumps(fields)
        if decoder.get("type") != "ByteLevel" or alters or not isinstance(vocab, dict):
            return None
        alphabet = set(_characters_of_bytes())
        lengths_V = np.zeros(self.vocab_size, np.int64)
        is_special = {token["id"]: bool(token.get("special")) for token in self._added_tokens}
        for token, number in vocab.items():
            if number not in is_special:
                if not alphabet.issuperset(token):
                    return None
                lengths_V[number] = len(token)
        for token in self._added_tokens:
            lengths_V[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
        lengths_V[self.end_of_text] = 0
        return lengths_V

    def to_tokenizer_json(self) -> dict[str, Any]:
        """The fields of a tokenizer.json with the ids of `encode`: no template adds any. Special tokens are found."""
        return json.loads(self._content) | {"added_tokens": self._added_tokens}

    def open_gigatoken(self) -> "gigatoken.Tokenizer":
        """The same tokenizer in gigatoken. Raises where gigatoken does not know its kind."""
        import gigatoken

        return gigatoken.Tokenizer.from_json(self._content)


def byte_level_json(
    ranks: Mapping[bytes, int],
    merges: Iterable[tuple[bytes, bytes]],
    pre_tokenizer: Mapping[str, Any],
    end_of_text: int,
) -> dict[str, Any]:
    """The fields of a tokenizer.json for a byte-level byte-pair encoding, with end-of-text as its only special token.

    Args:
      pre_tokenizer: what cuts text before bytes are merged, and spells them as characters.
    """
    alphabet = _characters_of_bytes()

    def spelled(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    end = {"id": end_of_text, "content": END_OF_TEXT[0], "special": True}
    is_not = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | is_not],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in merges],
        },
    }


def byte_level(*, cuts: bool = False) -> dict[str, Any]:
    """What spells bytes as characters; `cuts` text as GPT-2 does before it."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts}


def _characters_of_bytes() -> list[str]:
    """GPT-2's spelling: a byte that is a visible Latin-1 character is that, others are characters from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in range(256)]

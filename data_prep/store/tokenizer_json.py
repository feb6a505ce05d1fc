"""Tokenizers of Hugging Face's: `tokenizer.json`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

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

"""The tokens of a prepared dataset as text again."""

from data_prep.store.manifest import Manifest
from data_prep.store.tokenizers import Tokenizer, get_tokenizer


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """The tokenizer that made the dataset. ValueError where it is not to be had."""
    name, expected = manifest.spec["tokenizer"], manifest.spec["tokenizer_digest"]
    tokenizer = get_tokenizer(name)
    if tokenizer.digest != expected:
        raise ValueError(
            f"tokenizer {name}: digest {tokenizer.digest}, the dataset was made with {expected}; "
            "it would read other text out of the tokens. Bring back the tokenizer of that time."
        )
    return tokenizer

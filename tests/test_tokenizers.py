"""Tokenizers: tiktoken's own ids, whatever the text, without a network."""

import random
import unicodedata

import numpy as np
import pytest

from data_prep import tokenizers
from data_prep.tokenizers import get_tokenizer

NASTY = {
    "empty": "",
    "NUL": "a\0b\0",
    "emoji with joiners": "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301",
    "CJK": "漢字かな交じり文。" * 50,
    "1 MB without a space": "abc1" * 250_000,
    "1 MB of one letter": "a" * 1_000_000,
    "literal end-of-text": "a<|endoftext|>b",
    "lone surrogates": "x\ud800y\udc00\ud83d",
    "surrogate pair": "\ud83d\ude00",
    "white space": " \n\n\t  x  \u3000\u00a0 y \r\n",
    "apostrophes": "don't I'll WE'RE you've 'sx",
}


def encode_ordinary(text: str) -> list[int]:
    """tiktoken's own, over the same ranks but with OpenAI's spelling of the pattern."""
    import tiktoken

    global _reference
    if _reference is None:
        pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
        _reference = tiktoken.Encoding(
            "reference",
            pat_str=pattern,
            mergeable_ranks=tokenizers.load_ranks(tokenizers.RANKS),
            special_tokens={"<|endoftext|>": 50256},
        )
    return _reference.encode_ordinary(text)


_reference = None


@pytest.mark.parametrize("kind", NASTY)
def test_gpt2_equals_encode_ordinary(kind):
    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode(NASTY[kind])
    assert ids.dtype == np.uint16
    assert ids.tolist() == encode_ordinary(NASTY[kind])
    assert tokenizer.end_of_text not in ids


def test_gpt2_equals_encode_ordinary_on_random_text():
    rng = random.Random(5)
    pool = [chr(c) for c in range(1, 0x3000) if unicodedata.category(chr(c)) != "Cn"] + [" "] * 999
    tokenizer = get_tokenizer("gpt2")
    for _ in range(300):
        text = "".join(rng.choices(pool, k=rng.randrange(60)))
        ids = tokenizer.encode(text)
        assert ids.tolist() == encode_ordinary(text), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name, vocab_size, end", [("gpt2", 50257, 50256), ("byte", 257, 256)])
def test_members_and_round_trip(name, vocab_size, end):
    tokenizer = get_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == (name, vocab_size, end)
    assert tokenizer.digest == get_tokenizer(name).digest and len(tokenizer.digest) == 64
    for kind, text in NASTY.items():
        if "surrogate" not in kind:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = np.array([end, *tokenizer.encode("hi")], np.uint16)
    assert tokenizer.decode(ids) == "<|endoftext|>hi"


def test_byte_ids_are_utf8_bytes():
    assert get_tokenizer("byte").encode("aé").tolist() == [97, 0xC3, 0xA9]


def test_damaged_ranks_are_refused(tmp_path, monkeypatch):
    content = bytearray(tokenizers.RANKS.read_bytes())
    content[1000] ^= 1
    (tmp_path / "gpt2.tiktoken").write_bytes(content)
    monkeypatch.setattr(tokenizers, "RANKS", tmp_path / "gpt2.tiktoken")
    with pytest.raises(ValueError, match=r"gpt2\.tiktoken: sha256 is .* damaged"):
        get_tokenizer("gpt2")


class Large:
    """A tokenizer that a user could write: too large for uint16."""

    name, vocab_size, end_of_text, digest = "large", 100_000, 99_999, "0"


def test_what_cannot_be_used_is_refused_in_words():
    with pytest.raises(ValueError, match=r"100,000 ids.*uint16: at most 65,536"):
        get_tokenizer(f"{__name__}:Large")
    with pytest.raises(ValueError, match="'gtp2': expected one of gpt2, byte"):
        get_tokenizer("gtp2")
    with pytest.raises(ValueError, match="cannot be loaded: No module named 'no_such_module'"):
        get_tokenizer("no_such_module:Tokenizer")

"""Texts that tokenizers find hard, and vocabularies beyond GPT-2's."""

import functools
import random
import unicodedata

import pytest

from data_prep.store.byte_pairs import RANKS
from data_prep.store.ranks import format_ranks, parse_ranks
from data_prep.store.tokenizers import user_tokenizer

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


BYTES = {bytes([i]): i for i in range(256)}  # ranks of the bytes alone
SCHEMES = ["gpt2", "cl100k_base", "o200k_base"]
TIGHT = " \n\r\t'sStTlLvVeE1239aAzZ.,/!\u00a0\u3000éÀ\u0301ſK\u200b\x1c\x85"  # what the patterns cut at


@functools.cache
def large_ranks() -> bytes:
    """A .tiktoken file of 70,256 ranks: GPT-2's, and joined pairs of them."""
    ranks = parse_ranks(RANKS.read_bytes())
    encode = user_tokenizer("gpt2")._encoding._encode_single_piece
    base, rng = list(ranks), random.Random(1)
    while len(ranks) < 70_256:
        pair = rng.choice(base), rng.choice(base)
        token = b"".join(pair)
        # One that the merges before it lead to, as in a real vocabulary.
        if token not in ranks and encode(token) == [ranks[part] for part in pair]:
            ranks[token] = len(ranks)
    return format_ranks(ranks)


def large_texts() -> list[str]:
    """Texts that have ids of `large_ranks` above 65,535."""
    pieces, rng = list(parse_ranks(large_ranks()))[50_256:], random.Random(2)
    return [b"".join(rng.choices(pieces, k=40)).decode("utf-8", "replace") for _ in range(100)]


def random_texts(num_texts: int, seed: int) -> list[str]:
    """Short texts of characters from all of Unicode, and of those that patterns cut at."""
    rng = random.Random(seed)
    assigned = [chr(c) for c in range(1, 0x20000) if unicodedata.category(chr(c))[0] != "C"]
    pools = [assigned, assigned[:2000], TIGHT, TIGHT]
    return ["".join(rng.choices(rng.choice(pools), k=rng.randrange(40))) for _ in range(num_texts)]


def train_tokenizer_json(path, specials=("<|endoftext|>", "<pad>")) -> str:
    """A small byte-level tokenizer.json that puts end-of-text in front of what it encodes."""
    hf = pytest.importorskip("tokenizers")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on a mat, and the end of text came"] * 9, trainer)
    if specials:
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
        )
    tokenizer.save(str(path))
    return str(path)


def encode_ordinary(text: str) -> list[int]:
    """tiktoken's own, over the same ranks but with OpenAI's spelling of the pattern."""
    import tiktoken

    global _reference
    if _reference is None:
        pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
        _reference = tiktoken.Encoding(
            "reference",
            pat_str=pattern,
            mergeable_ranks=parse_ranks(RANKS.read_bytes()),
            special_tokens={"<|endoftext|>": 50256},
        )
    return _reference.encode_ordinary(text)


_reference = None

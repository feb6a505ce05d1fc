"""Tokenizers: tiktoken's own ids, whatever the text, without a network."""

import base64
import json
import random
import time
import unicodedata

import numpy as np
import pytest
from support.texts import (
    BYTES,
    NASTY,
    SCHEMES,
    encode_ordinary,
    large_ranks,
    large_texts,
    random_texts,
    train_tokenizer_json,
)

from data_prep.store import byte_pairs
from data_prep.store.byte_pairs import RANKS
from data_prep.store.ranks import parse_ranks
from data_prep.store.tokenizers import user_tokenizer

OPENAI_PATTERNS = {  # as tiktoken_ext.openai_public spells them
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k_base": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"""
    r"""|\s+(?!\S)|\s+""",
}


@pytest.mark.parametrize("kind", NASTY)
def test_gpt2_equals_encode_ordinary(kind):
    tokenizer = user_tokenizer("gpt2")
    ids = tokenizer.encode(NASTY[kind])
    assert ids.dtype == np.uint32
    assert ids.tolist() == encode_ordinary(NASTY[kind])
    assert tokenizer.end_of_text not in ids


def test_gpt2_equals_encode_ordinary_on_random_text():
    rng = random.Random(5)
    pool = [chr(c) for c in range(1, 0x3000) if unicodedata.category(chr(c)) != "Cn"] + [" "] * 999
    tokenizer = user_tokenizer("gpt2")
    for _ in range(300):
        text = "".join(rng.choices(pool, k=rng.randrange(60)))
        ids = tokenizer.encode(text)
        assert ids.tolist() == encode_ordinary(text), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name, vocab_size, end", [("gpt2", 50257, 50256), ("byte", 257, 256)])
def test_members_and_round_trip(name, vocab_size, end):
    tokenizer = user_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == (name, vocab_size, end)
    assert tokenizer.digest == user_tokenizer(name).digest and len(tokenizer.digest) == 64
    for kind, text in NASTY.items():
        if "surrogate" not in kind:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = np.array([end, *tokenizer.encode("hi")], np.uint16)
    assert tokenizer.decode(ids) == "<|endoftext|>hi"


def test_byte_ids_are_utf8_bytes():
    assert user_tokenizer("byte").encode("aé").tolist() == [97, 0xC3, 0xA9]


def test_damaged_ranks_are_refused(tmp_path, monkeypatch):
    content = bytearray(RANKS.read_bytes())
    content[1000] ^= 1
    (tmp_path / "gpt2.tiktoken").write_bytes(content)
    monkeypatch.setattr(byte_pairs, "RANKS", tmp_path / "gpt2.tiktoken")
    with pytest.raises(ValueError, match=r"gpt2\.tiktoken: sha256 is .* damaged"):
        user_tokenizer("gpt2")


@pytest.mark.parametrize("scheme", OPENAI_PATTERNS)
def test_a_tiktoken_file_of_a_scheme_is_cut_as_openai_cuts(tmp_path, scheme):
    import tiktoken

    (tmp_path / "mine.tiktoken").write_bytes(large_ranks())
    tokenizer = user_tokenizer(f"{tmp_path}/mine.tiktoken@{scheme}")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (70_257, 70_256)
    reference = tiktoken.Encoding(
        "reference",
        pat_str=OPENAI_PATTERNS[scheme],
        mergeable_ranks=parse_ranks(large_ranks()),
        special_tokens={},
    )
    largest = 0
    for text in [*large_texts(), *random_texts(2000, seed=3)]:
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference.encode_ordinary(text), text
        largest = max([largest, *ids])
    assert largest > 65_535


@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_of_white_space_too_long_for_tiktoken_are_cut_by_hand(tmp_path, scheme, monkeypatch):
    (tmp_path / "mine.tiktoken").write_bytes(large_ranks())
    tokenizer = user_tokenizer(f"{tmp_path}/mine.tiktoken@{scheme}")
    text = "x" + " " * 1_500_000 + "x"
    with pytest.raises(ValueError, match="Max stack size exceeded"):
        tokenizer._encoding.encode_to_numpy(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Where tiktoken can do it, both ways give the same.
    monkeypatch.setattr(byte_pairs, "LONG_SPACE", 2)
    rng = random.Random(4)
    for _ in range(3000):
        text = "".join(rng.choices("   \n\r\t\u3000\x85\x1caA1!/'", k=rng.randrange(12)))
        assert tokenizer._encode_long_space(text).tolist() == tokenizer.encode(text).tolist(), text


def test_the_published_number_of_ranks_tells_scheme_and_end_of_text(tmp_path):
    (tmp_path / "r50k_base.tiktoken").write_bytes(RANKS.read_bytes())
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "mine.tiktoken").write_bytes(RANKS.read_bytes())
    gpt2 = user_tokenizer("gpt2")
    for name in ("r50k_base.tiktoken", "r50k_base.tiktoken@gpt2", "a@b/mine.tiktoken"):
        assert user_tokenizer(f"{tmp_path}/{name}").digest == gpt2.digest
    other = user_tokenizer(f"{tmp_path}/r50k_base.tiktoken@o200k_base")
    assert other.end_of_text == 50_256 and other.digest != gpt2.digest


def _lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.mark.parametrize(
    "content, choice, message",
    [
        (None, "", "no such file"),
        (b"\x00\x01", "", r"not a \.tiktoken file \(base64 and rank a line\)"),
        (b"!!!! 0\n", "@gpt2", r"not a \.tiktoken file"),
        (b"", "@gpt2", "no rank for the byte 0x00"),
        (_lines(BYTES | {b"ab": 257}), "@gpt2", "without a gap"),
        (_lines(BYTES) + b"YQ== 256\n", "@gpt2", "without a gap"),  # "a" twice
        (_lines(dict(list(BYTES.items())[:-1])), "@gpt2", "no rank for the byte 0xff"),
        (_lines(BYTES), "", r"256 ranks are no published .*tiktoken@SCHEME with gpt2 or cl100k_b"),
        (_lines(BYTES), "@gpt4", r"tiktoken@gpt4: expected @ and one of gpt2, cl100k_base, o200k"),
    ],
)
def test_a_bad_tiktoken_file_is_named(tmp_path, content, choice, message):
    path = tmp_path / "mine.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        user_tokenizer(f"{path}{choice}")
    assert str(error.value).startswith(str(path))


def test_special_tokens_in_a_text_are_ordinary_text_for_tokenizer_json(tmp_path):
    tokenizer = user_tokenizer(train_tokenizer_json(tmp_path / "tokenizer.json"))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (0, tokenizer._decoder.get_vocab_size())
    text = "the <|endoftext|> and <pad>"
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids.tolist()) and tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array([0, *ids])) == f"<|endoftext|>{text}"
    for kind, nasty in NASTY.items():
        if "surrogate" not in kind:
            assert tokenizer.decode(tokenizer.encode(nasty)) == nasty
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_the_end_of_text_of_tokenizer_json_can_be_chosen(tmp_path):
    path = train_tokenizer_json(tmp_path / "tokenizer.json", ["<unk>", "[SEP]", "[CLS]"])
    with pytest.raises(ValueError, match=r"which token ends a text\? .*@TOKEN with one of <unk>, \["):
        user_tokenizer(path)
    with pytest.raises(ValueError, match=r"one of <unk>, \[SEP\], \[CLS\]"):
        user_tokenizer(f"{path}@[PAD]")
    chosen = [user_tokenizer(f"{path}@{token}") for token in ("[SEP]", "[CLS]")]
    assert [tokenizer.end_of_text for tokenizer in chosen] == [1, 2]
    assert chosen[0].digest != chosen[1].digest
    with pytest.raises(ValueError, match="of which it has none"):
        user_tokenizer(train_tokenizer_json(tmp_path / "none.json", []))


def test_a_bad_tokenizer_json_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    token = {"id": 0, "content": "</s>", "special": True}
    for content in (None, "{", "[]", "{}", json.dumps({"added_tokens": [token]})):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=rf"^{path}: not a tokenizer\.json: "):
            user_tokenizer(str(path))


def test_published_ranks_without_a_network_are_refused_soon_with_the_way_around(tmp_path, monkeypatch):
    import tiktoken.registry

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # also where there is a network
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cl100k_base: tiktoken could not .*TIKTOKEN_CACHE_DIR"):
        user_tokenizer("cl100k_base")
    assert time.monotonic() - start < 10


def test_what_cannot_be_used_is_refused_in_words():
    with pytest.raises(ValueError, match=r"'gtp2': expected one of gpt2, byte, cl100k_base, o200k"):
        user_tokenizer("gtp2")
    with pytest.raises(ValueError, match="cannot be loaded: No module named 'no_such_module'"):
        user_tokenizer("no_such_module:Tokenizer")

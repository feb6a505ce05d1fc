"""Encoders: the fast engine gives the tokenizer's ids, and whoever doubts it can check."""

import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.texts import (
    BYTES,
    NASTY,
    SCHEMES,
    large_ranks,
    large_texts,
    random_texts,
    train_tokenizer_json,
)

from data_prep import encoders, fineweb
from data_prep.encoders import Gigatoken, TextByText, TokenizerMismatch, Verifier, choose_engine
from data_prep.store import manifest
from data_prep.store.locations import ASSETS
from data_prep.store.ranks import format_ranks
from data_prep.store.token_bin import open_tokens, read_header
from data_prep.store.token_records import open_records
from data_prep.store.tokenizers import user_tokenizer


def column(texts: list[str]) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ranks") / "mine.tiktoken"
    path.write_bytes(large_ranks())
    return str(path)


@pytest.mark.parametrize("name", ["gpt2", *(f"large@{s}" for s in SCHEMES), "tokenizer.json"])
def test_gigatoken_gives_the_ids_of_the_tokenizer(name, large_file, tmp_path):
    if name == "tokenizer.json":
        name = train_tokenizer_json(tmp_path / "tokenizer.json")
    tokenizer = user_tokenizer(name.replace("large", large_file))
    sample = pq.read_table(ASSETS / "sample.parquet")["text"].to_pylist()
    nasty = [text for kind, text in NASTY.items() if "surrogate" not in kind]
    special = ["<|endoftext|>", "a<pad>b <|endofprompt|><|fim_prefix|>", ""]
    if "json" not in name:
        nasty.append("x" + " " * 1_100_000 + "x")
    texts = [*nasty, *special, *large_texts(), *random_texts(5000, seed=6)]
    texts += sample if name == "gpt2" else sample[:200]
    ids, lengths = Gigatoken(tokenizer).encode_batch(column(texts))
    expected_ids, expected_lengths = TextByText(tokenizer).encode_batch(column(texts))
    np.testing.assert_array_equal(lengths, expected_lengths)
    np.testing.assert_array_equal(ids, expected_ids)
    assert tokenizer.end_of_text not in ids
    assert (ids.max() > 65_535) == ("@" in name)


def test_an_engine_that_is_opened_anew_gives_the_same_ids(monkeypatch):
    texts = column(random_texts(500, seed=7))
    encoder = Gigatoken(user_tokenizer("gpt2"))
    before = encoder.encode_batch(texts)[0]
    engine = encoder._engine
    monkeypatch.setattr(encoders, "RENEW_BYTES", 1)
    np.testing.assert_array_equal(encoder.encode_batch(texts)[0], before)
    assert encoder._engine is not engine


@pytest.mark.parametrize("piece", ["a", "ab", "7", " "])
def test_texts_without_a_place_to_cut_take_linear_time(piece):
    tokenizer = user_tokenizer("gpt2")
    ids = []
    for encoder in (Gigatoken(tokenizer), TextByText(tokenizer)):
        seconds = {}
        for num_bytes in (250_000, 1_000_000):
            texts = column([piece * (num_bytes // len(piece))])
            seconds[num_bytes] = []
            for _ in range(3):  # the least, of CPU time, does not depend on what else runs
                start = time.process_time()
                ids.append(encoder.encode_batch(texts)[0])
                seconds[num_bytes].append(time.process_time() - start)
        # Quadratic would be 16. A time too short to measure is good enough.
        assert min(seconds[1_000_000]) < 8 * max(min(seconds[250_000]), 0.05), encoder.name
    np.testing.assert_array_equal(ids[3], ids[-1])


class Liar:
    """The tokenizer's own ids, but for the first one of some texts."""

    def __init__(self, *lies: str):
        self.lies = lies

    def __call__(self, _, texts: pa.LargeStringArray):
        ids, lengths = TextByText(user_tokenizer("byte")).encode_batch(texts)
        starts = np.cumsum(lengths) - lengths
        ids[[starts[texts.to_pylist().index(lie)] for lie in self.lies]] += 1
        return ids, lengths


def verify(which: str, texts: list[str], lie: str, first_row: int = 0) -> Verifier:
    """A verifier after the texts, in batches of 2 of one unit."""
    verifier = Verifier(user_tokenizer("byte"), which)
    for start in range(0, len(texts), 2):
        part = column(texts[start : start + 2])
        ids, lengths = Liar(*[lie] if lie in texts[start : start + 2] else [])(None, part)
        rows = first_row + np.arange(start, start + len(part))
        verifier.check(part, ids, lengths, rows, "a.parquet", pa.array([f"<{r}>" for r in rows]))
    return verifier


def test_a_lie_about_any_text_is_caught_where_all_are_verified():
    texts = [f"text {i}" for i in range(9)]
    for row, text in enumerate(texts):
        with pytest.raises(
            TokenizerMismatch,
            match=rf"^a\.parquet: row {row}, document <{row}>: .* byte differ from token 0 on "
            r"\(\[117, 101, 120\], expected \[116, 101, 120\]\)",
        ):
            verify("all", texts, text)
    assert verify("all", texts, "").num_verified == 9
    assert verify("none", texts, texts[0]).num_verified == 0


@pytest.mark.parametrize("first_row", [0, 1, 5000])
def test_the_first_text_that_is_not_empty_is_always_in_the_sample(first_row):
    texts = ["", "", "", "first", *(f"text {i}" for i in range(9))]
    with pytest.raises(TokenizerMismatch, match=rf"row {first_row + 3}, document"):
        verify("sample", texts, "first", first_row)


def test_the_first_text_is_verified_beside_one_that_the_sample_chose():
    chosen = next(r for r in range(5000, 9000) if encoders._scatter(np.array([r]))[0] % 1024 == 0)
    with pytest.raises(TokenizerMismatch, match=rf"row {chosen - 1}, document"):
        verify("sample", ["first", "second"], "first", chosen - 1)


def test_the_sample_is_one_text_in_1024():
    texts = column(["x"] * 100_000)
    ids, lengths = Liar()(None, texts)
    verifier = Verifier(user_tokenizer("byte"), "sample")
    verifier.check(texts, ids, lengths, np.arange(100_000), "", pa.nulls(100_000))
    assert 70 <= verifier.num_verified <= 130


def test_ids_that_are_too_few_or_too_many_are_caught():
    texts, rows, names = column(["ab"]), np.arange(1), pa.array(["<0>"])
    for found in ([97], [97, 98, 98]):
        with pytest.raises(TokenizerMismatch, match=f"from token {min(len(found), 2)} on"):
            verifier = Verifier(user_tokenizer("byte"), "all")
            verifier.check(texts, np.array(found), np.array([len(found)]), rows, "", names)


def test_a_preparation_stops_at_a_lie_and_keeps_none_of_it(tmp_path, monkeypatch, capsys):
    texts = [f"text {i}" for i in range(50)]
    table = pa.table({"text": texts, "id": [f"<{i}>" for i in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet")

    def encode_batch(self, texts):
        ids, lengths = TextByText(user_tokenizer("gpt2")).encode_batch(texts)
        ids[np.cumsum(lengths)[20] - 1] += 1  # the last one of text 20
        return ids, lengths

    monkeypatch.setattr(Gigatoken, "encode_batch", encode_batch)

    def run(which: str) -> int:
        output = f"--output_dir={tmp_path}/{which}"
        options = ["--val_tokens=0", "--num_workers=1", f"--verify_tokenizer={which}"]
        return fineweb.main([f"--input={tmp_path}/a.parquet", output, *options])

    assert run("all") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/a.parquet: row 20, document <20>: " in error
    assert "--tokenizer_engine=tiktoken" in error
    assert not list((tmp_path / "all").rglob("*.tokens"))
    assert run("none") == 0


def test_the_engine_is_chosen_by_what_can_run_the_tokenizer(tmp_path, capfd):
    gpt2, byte = user_tokenizer("gpt2"), user_tokenizer("byte")
    assert choose_engine(gpt2) == "gigatoken"
    assert choose_engine(gpt2, "tiktoken") == "tiktoken"
    assert choose_engine(byte) == choose_engine(byte, "tiktoken") == "tiktoken"
    with pytest.raises(ValueError, match="expected one of auto, gigatoken, tiktoken"):
        choose_engine(gpt2, "fast")
    # gigatoken panics where a rank is not made of two earlier ones; tiktoken does not mind.
    (tmp_path / "odd.tiktoken").write_bytes(format_ranks(BYTES | {b"abc": 256}))
    odd = user_tokenizer(f"{tmp_path}/odd.tiktoken@gpt2")
    assert choose_engine(odd) == "tiktoken" and odd.encode("abc").tolist() == [256]
    with pytest.raises(ValueError, match=r"cannot run the tokenizer .*odd.*gigatoken broke down"):
        choose_engine(odd, "gigatoken")
    out = f"--output_dir={tmp_path}/out"
    capfd.readouterr()
    assert fineweb.main(["--input=sample", out, "--tokenizer=byte", "--tokenizer_engine=gigatoken"])
    assert "cannot run the tokenizer byte, only byte-pair encodings" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_panic_is_an_error_and_an_interrupt_stays_one():
    class PanicException(BaseException):
        """What pyo3 raises."""

    for raised, expected in [(PanicException, ValueError), (KeyboardInterrupt, KeyboardInterrupt)]:

        def fail(raised=raised):
            raise raised("index out of\nbounds")

        with pytest.raises(expected, match=r"index out of\s+bounds"):
            encoders._without_panic(fail)


@pytest.mark.parametrize("header, num_bytes", [("short", 12), ("llmc", 1024)])
def test_ids_above_65535_are_stored_as_uint32_in_both_formats(large_file, tmp_path, header, num_bytes):
    import tensorflow_datasets as tfds

    texts, output = large_texts(), tmp_path / "out"
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    command = [f"--input={tmp_path}/a.parquet", f"--output_dir={output}", "--num_workers=1"]
    sizes = ["--val_tokens=0", "--shard_tokens=2000", "--record_tokens=64"]
    name = f"{large_file}@cl100k_base"
    assert fineweb.main([*command, *sizes, f"--tokenizer={name}", f"--bin_header={header}"]) == 0
    tokenizer, loaded = user_tokenizer(name), manifest.load(output)
    expected = np.concatenate([[70_256, *tokenizer.encode(text)] for text in texts])
    files = [output / shard.name for shard in loaded.shards_of("train", "bin")]
    assert len(files) > 1 and expected.max() > 65_535
    for path in files:
        words = np.fromfile(path, "<u4", 3)
        assert words[:2].tolist() == [20240801, 7]
        assert read_header(path) == (words[2], num_bytes, np.dtype("<u4"))
    np.testing.assert_array_equal(np.concatenate([open_tokens(p) for p in files]), expected)
    records = [output / shard.name for shard in loaded.shards_of("train", "array_record")]
    reader = open_records(records, 64, np.uint32)
    found = reader.read(range(len(reader))).reshape(-1)
    np.testing.assert_array_equal(found[: len(expected)], expected)
    source = tfds.builder_from_directory(output).as_data_source("train")
    assert source[0]["tokens"].dtype == np.uint32
    tokens = np.concatenate([example["tokens"] for example in source])
    np.testing.assert_array_equal(tokens, found)
    assert (loaded.spec.vocab_size, loaded.spec.end_of_text) == (70_257, 70_256)
    assert loaded.spec.tokenizer_digest == tokenizer.digest
    assert "tensorflow" not in sys.modules

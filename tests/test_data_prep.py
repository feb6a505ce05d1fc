"""The whole preparation: what the stream is, that bytes are a function, that kills cost nothing."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.prepared import byte_options, run, tree, words, write_parquet
from support.texts import NASTY, encode_ordinary

from data_prep import shards
from data_prep.store import manifest
from data_prep.store.locations import ASSETS
from data_prep.store.token_bin import open_tokens, read_header
from data_prep.store.token_records import open_records

KILL_SEED = 11


def stream(directory: Path, format: str = "bin", splits=("val", "train")) -> np.ndarray:
    """All tokens of a prepared dataset, val first, as the input has them."""
    loaded = manifest.load(directory)
    parts = [np.empty(0, np.uint16)]
    for split in splits:
        files = [directory / shard.name for shard in loaded.shards_of(split, format)]
        if format == "bin":
            parts += [open_tokens(path) for path in files]
        elif files:
            reader = open_records(files, loaded.spec.record_tokens)
            tokens = reader.read(range(len(reader))).reshape(-1)
            parts.append(tokens[: loaded.splits[split].num_tokens])
    return np.concatenate(parts)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Four small files; documents of 31 byte-tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(4):
        write_parquet(folder / f"{index}.parquet", words(200))
    return folder


def test_stream_is_end_of_text_and_encode_ordinary_of_each_document(tmp_path):
    sample = pq.read_table(ASSETS / "sample.parquet")["text"].to_pylist()
    nasty = [text for kind, text in NASTY.items() if "surrogate" not in kind]
    write_parquet(tmp_path / "nasty.parquet", [None, *nasty, None, "end"], rows_per_group=3)
    output = tmp_path / "out"
    assert (
        run(
            f"--input={ASSETS}/sample.parquet,{tmp_path}/nasty.parquet",
            f"--output_dir={output}",
            "--val_tokens=50000",
            "--shard_tokens=300001",
            "--record_tokens=1000",
            "--num_workers=2",
        )
        == 0
    )
    expected: list[int] = []
    documents = [text for text in [*sample, *nasty, "end"] if text]
    for text in documents:
        expected += [50256, *encode_ordinary(text)]
    np.testing.assert_array_equal(stream(output), np.array(expected, np.uint16))
    np.testing.assert_array_equal(stream(output, "array_record"), np.array(expected, np.uint16))
    assert sum(s.num_documents for s in manifest.load(output).splits.values()) == len(documents)


def test_embedded_sample_by_its_numbers(tmp_path, capsys):
    output = tmp_path / "sample"
    assert run("--input=sample", f"--output_dir={output}", "--num_workers=1") == 0
    loaded = manifest.load(output)
    assert loaded.splits["train"].num_tokens == 1_728_680
    assert loaded.splits["val"].num_tokens == 100_230
    assert abs(loaded.splits["train"].unigram_entropy - 6.57) < 0.01
    assert loaded.spec.inputs[0]["path"] == "embedded://sample.parquet"
    assert {path.name for path in output.iterdir()} == {
        "manifest.json",
        "dataset_info.json",
        "features.json",
        "README.md",
        "card.html",
        "blocks-train.b3",
        "blocks-val.b3",
        *(shard.name for shard in loaded.shards),
    }
    last = capsys.readouterr().out.splitlines()[-1]
    assert "2,007 documents, train 1,728,680, val 100,230 tokens" in last
    assert f"--gin_file=configs/quickstart.gin --data_dir={output}" in last


def test_tfds_opens_the_directory_and_gives_the_ids(corpus, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    assert run(*byte_options(corpus, tmp_path / "out")) == 0
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    for split in ("train", "val"):
        source = builder.as_data_source(split)
        ids = np.concatenate([source[i]["tokens"] for i in range(len(source))])
        expected = stream(tmp_path / "out", splits=(split,))
        np.testing.assert_array_equal(ids[: len(expected)], expected)
        assert (ids[len(expected) :] == 256).all() and len(ids) - len(expected) < 64
    assert "tensorflow" not in sys.modules


def test_documents_tables_lead_from_token_to_source(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.inputs.units.BATCH_ROWS", 16)  # several batches a unit
    assert run(*byte_options(corpus, tmp_path / "out")) == 0
    loaded = manifest.load(tmp_path / "out")
    tokens = stream(tmp_path / "out", splits=("train",))
    rows = []
    for index, shard in enumerate(loaded.shards_of("train", "documents")):
        part = pq.read_table(tmp_path / "out" / shard.name).to_pylist()
        assert all(index * 5000 <= row["start"] < (index + 1) * 5000 for row in part)
        rows += part
    for row in rows:
        text = bytes(tokens[row["start"] + 1 : row["start"] + row["length"]].tolist()).decode()
        assert tokens[row["start"]] == 256 and text == words(200)[row["row"]]
        stem = Path(row["source_file"]).stem
        assert row["id"] == f"<{stem}:{row['row']}>" and row["dump"] == "test"
        assert row["url"] == f"https://example.org/{row['row']}"
    assert sum(row["length"] for row in rows) == len(tokens)


@pytest.mark.parametrize("header, num_bytes", [("short", 12), ("llmc", 1024)])
def test_bin_header_option(corpus, tmp_path, header, num_bytes):
    output = tmp_path / "out"
    assert run(*byte_options(corpus, output, bin_header=header, formats="bin")) == 0
    names = [shard.name for shard in manifest.load(output).shards_of("train", "bin")]
    assert names[:2] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert {read_header(output / name).num_bytes for name in names} == {num_bytes}
    assert not list(output.glob("*array_record*")) and not (output / "features.json").exists()


def test_array_record_shards_end_at_records(corpus, tmp_path):
    assert run(*byte_options(corpus, tmp_path / "out")) == 0
    loaded = manifest.load(tmp_path / "out")
    sizes = [shard.num_tokens for shard in loaded.shards_of("train", "array_record")]
    assert set(sizes[:-1]) == {5000 // 64 * 64} and sum(sizes) == loaded.splits["train"].num_tokens


@pytest.mark.parametrize(
    "val_tokens, max_tokens, num_val, num_train",
    [
        (0, 100_000_000, 0, 800),  # documents, of 31 tokens each
        (1, 100_000_000, 1, 799),
        (31, 100_000_000, 1, 799),
        (32, 100_000_000, 2, 798),
        (6200, 100_000_000, 200, 600),  # exactly one file
        (0, 31, 0, 1),
        (0, 61, 0, 1),
        (0, 62, 0, 2),
        (40, 6201, 2, 198),
        (40, 24_800, 2, 798),
    ],
)
def test_splits_are_cut_at_documents(corpus, tmp_path, val_tokens, max_tokens, num_val, num_train):
    options = {"val_tokens": val_tokens, "max_tokens": max_tokens, "formats": "bin"}
    assert run(*byte_options(corpus, tmp_path / "out", **options)) == 0
    splits = manifest.load(tmp_path / "out").splits
    found = {name: (split.num_documents, split.num_tokens) for name, split in splits.items()}
    expected = {"train": (num_train, 31 * num_train), "val": (num_val, 31 * num_val)}
    assert found == {name: counts for name, counts in expected.items() if counts[0]}


def test_max_tokens_stops_before_the_rest_of_the_input(corpus, tmp_path, monkeypatch):
    from data_prep import tokenizing

    done = []
    original = tokenizing.tokenize_unit
    monkeypatch.setattr(
        tokenizing,
        "tokenize_unit",
        lambda job, report: done.append(job.unit.path) or original(job, report),
    )
    (corpus / "3.parquet").write_bytes(b"damaged, and never needed")
    assert run(*byte_options(corpus, tmp_path / "out", max_tokens=9000)) == 0
    assert [Path(path).name for path in done] == ["0.parquet", "1.parquet"]


def test_nothing_left_to_train_on_is_an_error_that_another_val_tokens_mends(corpus, tmp_path, capsys):
    assert run(*byte_options(corpus, tmp_path / "out", val_tokens=24_790)) == 1
    message = capsys.readouterr().err
    assert "--val_tokens=24790" in message and "24,800 tokens in all" in message
    # The parts are there for any other cut, but not for another tokenizer.
    options = {"val_tokens": 24_000, "tokenizer": "gpt2"}
    assert run(*byte_options(corpus, tmp_path / "out", **options)) == 1
    assert run(*byte_options(corpus, tmp_path / "out", **options | {"val_tokens": 99})) == 0
    expected = [50256, *encode_ordinary(str(words(200)[-1]))]
    assert stream(tmp_path / "out")[-len(expected) :].tolist() == expected


def test_the_fingerprint_is_of_the_stream_alone(corpus, tmp_path, monkeypatch):
    joined = tmp_path / "joined.parquet"
    write_parquet(joined, words(200) * 4, rows_per_group=7)
    variants = [
        byte_options(corpus, tmp_path / "a"),
        byte_options(corpus, tmp_path / "b", formats="array_record", shard_tokens=999),
        byte_options(corpus, tmp_path / "c", input=joined, bin_header="llmc", record_tokens=1),
        byte_options(corpus, tmp_path / "other", val_tokens=1001 + 31),
    ]
    for options in variants:
        assert run(*options) == 0
    a, b, c, other = (manifest.load(tmp_path / name) for name in ("a", "b", "c", "other"))
    assert a.fingerprint == b.fingerprint == c.fingerprint != other.fingerprint
    assert a.splits == b.splits == c.splits


def test_fingerprints_of_jobs_equal_the_fingerprint_of_the_whole(monkeypatch):
    from data_prep.store import fingerprints

    monkeypatch.setattr(fingerprints, "BLOCK_TOKENS", 10)
    tokens = np.arange(95, dtype=np.uint16)
    whole = list(fingerprints.block_digests([tokens]))
    parts = [tokens[:7], tokens[7:7], tokens[7:40], tokens[40:95]]
    assert list(fingerprints.block_digests(parts)) == whole and len(whole) == 10
    jobs = [*fingerprints.block_digests([tokens[:50]]), *fingerprints.block_digests([tokens[50:]])]
    assert jobs == whole


def test_started_again_it_says_so_and_does_nothing(corpus, tmp_path, capsys):
    options = byte_options(corpus, tmp_path / "out")
    assert run(*options) == 0
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run(*options) == 0
    assert "already complete" in capsys.readouterr().out
    assert run(*options[:-1], "--num_workers=2") == 0
    for path in corpus.iterdir():
        path.unlink()
    assert run(*options) == 0  # the inputs are not needed any more
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_spec_in_the_same_directory_is_refused_by_name(corpus, tmp_path, capsys, monkeypatch, finished):
    options = byte_options(corpus, tmp_path / "out")
    if not finished:
        monkeypatch.setattr(shards, "write_tokens", _raise(KeyboardInterrupt()))
    assert run(*options) == (0 if finished else 130)
    monkeypatch.undo()
    before = tree(tmp_path / "out")
    capsys.readouterr()
    assert run(*byte_options(corpus, tmp_path / "out", shard_tokens=6000, val_tokens=31)) == 1
    message = capsys.readouterr().err
    assert "shard_tokens: 5000 there, 6000 asked for" in message
    assert "val_tokens: 1000 there, 31 asked for" in message
    write_parquet(corpus / "2.parquet", words(300))
    assert run(*options) == 1
    message = capsys.readouterr().err
    assert f"inputs: {corpus}/2.parquet: size " in message and "0.parquet" not in message
    assert tree(tmp_path / "out") == before


def _raise(error: BaseException):
    def raising(*args, **options):
        raise error

    return raising


def test_a_damaged_file_costs_only_itself(corpus, tmp_path, capsys):
    reference = tmp_path / "reference"
    assert run(*byte_options(corpus, reference)) == 0
    good = (corpus / "1.parquet").read_bytes()
    (corpus / "1.parquet").write_bytes(good[: len(good) // 2])
    options = byte_options(corpus, tmp_path / "out")
    capsys.readouterr()
    assert run(*options) == 1
    message = capsys.readouterr().err
    assert f"error: {corpus}/1.parquet: not parquet, or cut short" in message
    assert "Replace the damaged input" in message and "Traceback" not in message
    parts = tmp_path / "out" / ".work" / "parts"
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.tokens")}
    assert [path.name[:5] for path in sorted(kept)] == ["00000", "00002", "00003"]
    assert run(*options) == 1  # as before, while it is still damaged
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.tokens")} == kept
    (corpus / "1.parquet").write_bytes(good)
    assert run(*options) == 0
    assert tree(tmp_path / "out") == tree(reference)


def test_damage_in_the_middle_of_a_file_costs_only_itself(corpus, tmp_path, capsys):
    good = b'{"text": "good"}\n' * 9
    (corpus / "4.jsonl").write_bytes(good + b'{"text":')
    pattern = f"{corpus}/*.parquet,{corpus}/4.jsonl"
    options = byte_options(corpus, tmp_path / "out", input=pattern)
    assert run(*options) == 1
    assert f"{corpus}/4.jsonl: line 10: not JSON" in capsys.readouterr().err
    (corpus / "4.jsonl").write_bytes(good)
    assert run(*options) == 0
    assert stream(tmp_path / "out")[-5:].tolist() == [256, *b"good"]


def test_null_and_empty_texts_are_counted_skipped_and_said(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", [None, "", *words(9), None, None])
    assert run(*byte_options(tmp_path, tmp_path / "out", val_tokens=31)) == 0
    out = capsys.readouterr().out
    assert "9 documents" in out and "skipped 3 null texts and 1 empty texts" in out
    assert len(stream(tmp_path / "out")) == 9 * 31


def test_input_without_any_text_is_an_error(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", [None, ""])
    assert run(*byte_options(tmp_path, tmp_path / "out")) == 1
    assert "every document is empty or null" in capsys.readouterr().err


def test_two_processes_cannot_prepare_one_directory(corpus, tmp_path, capsys):
    from data_prep.engines.locks import locked

    with locked(tmp_path / "out" / ".work"):
        assert run(*byte_options(corpus, tmp_path / "out")) == 1
    assert "another process is at work in this directory" in capsys.readouterr().err
    assert run(*byte_options(corpus, tmp_path / "out")) == 0


def test_files_of_an_unknown_preparation_are_not_mixed_in(corpus, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fineweb_train_000007.bin").write_bytes(b"")
    assert run(*byte_options(corpus, tmp_path / "out")) == 1
    assert "holds fineweb_train_000007.bin, but neither" in capsys.readouterr().err
    assert not (tmp_path / "out" / ".work").exists()


def test_a_damaged_part_or_shard_is_made_again(corpus, tmp_path, monkeypatch):
    reference = tmp_path / "reference"
    assert run(*byte_options(corpus, reference)) == 0
    options = byte_options(corpus, tmp_path / "out")
    monkeypatch.setattr("data_prep.pipeline.save", _raise(KeyboardInterrupt()))
    assert run(*options) == 130
    monkeypatch.undo()
    for name in (".work/parts/00002-000000.tokens", "fineweb_train_000001.bin"):
        path = tmp_path / "out" / name
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    (tmp_path / "out" / ".work" / "parts" / "00001-000000.json").write_text("{")
    assert run(*options) == 0
    assert tree(tmp_path / "out") == tree(reference)

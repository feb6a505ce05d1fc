import os
import shutil

import numpy as np
import pytest

from data_prep.store import token_bin, token_sources
from data_prep.store.datasets import open_dataset
from data_prep.store.token_sources import BinSource
from gpt_pretrain.data import order


def test_both_formats_give_identical_windows_also_across_shards_and_records(tiny_dataset):
    sources = [open_dataset(tiny_dataset, format=name).splits["train"] for name in ("bin", "array_record")]
    num_tokens = sources[0].num_tokens
    assert sources[1].num_tokens == num_tokens > 30000  # several shards of 10,000
    for length in (1, 17, 64, 65, 1000):
        starts = np.concatenate(
            [
                np.random.default_rng(0).integers(0, num_tokens - length, 300),
                [0, num_tokens - length, 9990, 10000 - length],
            ]
        )
        a, b = (source.read(starts, length) for source in sources)
        assert a.dtype == b.dtype == np.uint16
        assert np.array_equal(a, b)
    whole = sources[0].read(np.array([0]), num_tokens)[0]
    assert np.array_equal(whole[9990:10010], sources[1].read(np.array([9990]), 20)[0])


def test_reading_past_the_end_is_an_error(tiny_dataset):
    for name in ("bin", "array_record"):
        source = open_dataset(tiny_dataset, format=name).splits["train"]
        with pytest.raises(IndexError):
            source.read(np.array([source.num_tokens - 3]), 4)


def test_auto_takes_what_is_there(tiny_dataset):
    assert open_dataset(tiny_dataset).format == "bin"
    dataset = open_dataset(tiny_dataset, format="array_record")
    assert (dataset.vocab_size, dataset.tokenizer) == (257, "byte")
    assert 1.0 < dataset.unigram_entropy < 5.0
    assert dataset.fingerprint == open_dataset(tiny_dataset).fingerprint


def test_of_very_many_shards_each_header_is_compared_when_its_shard_is_first_read(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.store.datasets._MOST_HEADERS_READ", 1)
    source = open_dataset(tiny_dataset).splits["train"]
    assert np.array_equal(
        source.read(np.array([9990]), 20), open_dataset(tiny_dataset).splits["train"].read([9990], 20)
    )
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset, copy)
    (shard, *_) = sorted(copy.glob("*train*.bin"))
    token_bin.write_tokens(shard, [np.zeros(4999, np.uint32)], 4999, dtype=np.uint32)  # of nearly the same size
    with open(shard, "ab") as file:
        file.write(bytes(4))
    source = open_dataset(str(copy), verify="size").splits["train"]
    with pytest.raises(ValueError, match=f"{shard}: header says 4999 tokens"):
        source.read(np.array([0]), 10)


@pytest.mark.parametrize("header", ["short", "llmc"])
def test_a_bare_directory_of_bin_files_is_read_with_either_header(tmp_path, header, caplog):
    tokens = np.arange(100, dtype=np.uint16)
    token_bin.write_tokens(tmp_path / "x_val_0.bin", [tokens[:20]], 20, header=header)
    token_bin.write_tokens(tmp_path / "x_train_1.bin", [tokens[20:50]], 30, header=header)
    token_bin.write_tokens(tmp_path / "x_train_2.bin", [tokens[50:]], 50, header=header)
    for directory in (str(tmp_path), str(tmp_path / "*.bin")):
        dataset = open_dataset(directory)
        assert np.array_equal(dataset.splits["train"].read(np.array([0]), 80)[0], tokens[20:])
        assert dataset.splits["val"].num_tokens == 20
    assert "no manifest" in caplog.text and "cannot" not in dataset.directory


def test_a_bin_file_whose_size_contradicts_its_header_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    token_bin.write_tokens(path, [np.zeros(100, np.uint16)], 100)
    os.truncate(path, 150)
    with pytest.raises(ValueError, match=r"x\.bin.*100 tokens"):
        BinSource([path])


@pytest.mark.parametrize("name", ["bin", "array_record"])
def test_damaged_shards_are_named_before_training(tiny_dataset, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset, copy)
    shard = next(
        path for path in sorted(copy.iterdir()) if "train" in path.name and name.replace("bin", ".bin") in path.name
    )
    content = bytearray(shard.read_bytes())
    content[1001] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name}.*digest"):
        open_dataset(str(copy), format=name)
    if name == "bin":  # ArrayRecord's reader gets no small file that was not looked at
        open_dataset(str(copy), format=name, verify="size")
    shard.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=f"{shard.name}.*bytes"):
        open_dataset(str(copy), format=name, verify="size")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: missing"):
        open_dataset(str(copy), format=name)


def test_what_is_not_a_dataset_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"data_prep\.fineweb"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="expected one of"):
        open_dataset(str(tmp_path), format="parquet")


def test_the_order_does_not_depend_on_the_format(tiny_dataset):
    a, b = (open_dataset(tiny_dataset, format=name).splits["train"] for name in ("bin", "array_record"))
    windows = order.WindowOrder((a.num_tokens - 1) // 32).windows_at(np.arange(64))
    assert np.array_equal(a.read(windows * 32, 33), b.read(windows * 32, 33))


def test_rows_are_the_same_after_a_read_that_waited_for_the_disk(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 50257, 50_000).astype(np.uint16)
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, part in zip(paths, (tokens[:20_001], tokens[20_001:]), strict=True):
        token_bin.write_tokens(path, [part], len(part))
    monkeypatch.setattr(token_sources, "_SLOW_SECS_A_ROW", 0)  # every read counts as one that waited
    source = BinSource(paths)
    starts = np.array([0, 19_990, 20_000, 20_001, 49_900, 5])
    for _ in range(3):
        assert np.array_equal(source.read(starts, 100), tokens[starts[:, None] + np.arange(100)])


def test_fetching_ahead_reaches_over_shards_and_not_beyond_the_stream(tiny_dataset):
    source = open_dataset(tiny_dataset, format="bin").splits["train"]
    source.fetch_ahead(np.array([0, 9_990, source.num_tokens - 5]), 25_000)  # shards hold 10,000 tokens
    assert np.array_equal(source.read(np.array([9_990]), 20_010)[0][:10], source.read(np.array([9_990]), 10)[0])

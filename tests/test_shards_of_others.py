"""data_prep.convert of NumPy arrays, of ids without a header, and of what is not to be converted."""

import functools
import shutil

import numpy as np
import pytest
from support.conversion import converted, refused
from support.prepared import byte_options, run, words, write_parquet

from data_prep.checking import find_problems
from data_prep.store.datasets import open_dataset
from data_prep.store.shard_numbers import missing_shards
from data_prep.store.token_bin import open_tokens, read_header, write_tokens

END = 50256
TRAIN = [[END, 5, 6, END, 7], [8, 9, END, 10]]
VAL = [END, 1, END, 2, END, 3]


@pytest.fixture
def failing(capsys):
    """Converts, expects exit status 1, gives the message."""
    return functools.partial(refused, capsys)


def stream(directory, split="train") -> list[int]:
    """All tokens of a split."""
    source = open_dataset(str(directory)).splits[split]
    return source.read(np.array([0]), source.num_tokens)[0].tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8", ">u2"])
def test_arrays_of_build_nanogpt(tmp_path, dtype):
    folder, out = tmp_path / "edu", tmp_path / "out"
    folder.mkdir()
    np.save(folder / "edufineweb_val_000000.npy", np.array(VAL, dtype))
    for index, ids in enumerate(TRAIN, start=1):
        np.save(folder / f"edufineweb_train_{index:06d}.npy", np.array(ids, dtype))
    assert converted(folder, out, num_workers=2) == 0
    assert stream(out) == TRAIN[0] + TRAIN[1] and stream(out, "val") == VAL
    assert list(find_problems(out)) == []
    assert read_header(out / "fineweb_train_000000.bin").dtype == np.uint16
    assert converted(folder / "*.npy", tmp_path / "again", formats="bin") == 0


def test_bare_arrays_are_not_trained_on_and_the_command_is_printed(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    np.save(folder / "train.npy", np.array(VAL, np.uint16))
    with pytest.raises(ValueError, match=r"data_prep\.convert '.*/a b' OUT`"):
        open_dataset(str(folder))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ids_without_a_header_as_nanogpt_has_them(tmp_path, dtype, failing):
    folder, out = tmp_path / "openwebtext", tmp_path / "out"
    folder.mkdir()
    np.array(TRAIN[0] + TRAIN[1], dtype).tofile(folder / "train.bin")
    np.array(VAL, dtype).tofile(folder / "val.bin")
    assert "OUT --headerless=uint16` makes a prepared dataset of it" in failing(folder, out)
    assert converted(folder, out, headerless=dtype) == 0
    assert stream(out) == TRAIN[0] + TRAIN[1] and stream(out, "val") == VAL
    if dtype == "uint32":
        message = failing(folder, tmp_path / "other", headerless="uint16", tokenizer="byte")
        assert "ids are of another kind than --headerless says" in message


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.bin", b"odd", {"headerless": "uint16"}, "holds 3 bytes, which is no whole number of uint16 ids"),
        ("a.npy", b"\x93NUMPY\1\0", {}, "not a NumPy array, or cut short"),
        ("a.npy", b"version https://git-lfs.github.com/spec/v1\n", {}, "not a NumPy array"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\n", {}, "is a pointer of Git LFS"),
        ("a.bin", b"<!DOCTYPE html><html></html>", {}, "is a page of HTML"),
        ("a.bin", b"\x93NUMPY\1\0" + bytes(120), {}, "is a NumPy array"),
        ("a.bin", b"\x93NUMPY\1\0" + bytes(120), {"headerless": "uint16"}, "is a NumPy array"),
    ],
)
def test_files_that_are_something_else(tmp_path, failing, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    found = failing(tmp_path / name, tmp_path / "out", **options)
    assert found.startswith(f"{tmp_path}/{name}: ") and message in found


def test_arrays_that_are_no_stream(tmp_path, failing):
    for array, message in [
        (np.zeros((2, 3), np.uint16), "of uint16 and shape (2, 3), expected token ids"),
        (np.zeros(3), "of float64"),
        (np.array([5, -1]), "token 1 is -1"),
        (np.array([5, 60_000]), "token 1 is 60000"),
    ]:
        np.save(tmp_path / "a.npy", array)
        assert message in failing(tmp_path / "a.npy", tmp_path / "out")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    assert "it was cut short" in failing(tmp_path / "a.npy", tmp_path / "out")
    write_tokens(tmp_path / "b.bin", [np.array(VAL, np.uint16)], len(VAL))
    assert "Leave out --headerless" in failing(tmp_path / "b.bin", tmp_path / "out", headerless="uint16")
    assert "holds both .bin and .npy files" in failing(tmp_path, tmp_path / "out")


def test_layouts_of_files_of_ids(tmp_path):
    np.save(tmp_path / "a", np.array(VAL, np.uint32))
    assert open_tokens(tmp_path / "a.npy", "npy").tolist() == VAL
    np.array(VAL, "<u2").tofile(tmp_path / "b")
    assert open_tokens(tmp_path / "b", "uint16").tolist() == VAL
    with pytest.raises(ValueError, match=r"is a NumPy array, expected a \.bin token file"):
        open_tokens(tmp_path / "a.npy")


def test_a_gap_in_the_numbers_is_named_when_converting_and_when_training(tmp_path, capsys, caplog):
    folder = tmp_path / "shards"
    folder.mkdir()
    for index in (1, 3, 6):
        write_tokens(folder / f"x_train_{index:06d}.bin", [np.array(VAL, np.uint16)], len(VAL))
    assert converted(folder, tmp_path / "out") == 0
    named = "x_train_000002.bin, x_train_000004.bin, x_train_000005.bin are missing"
    assert f"warning: {folder}: {named}" in capsys.readouterr().err
    with caplog.at_level("WARNING"):
        open_dataset(str(folder))
    assert named in caplog.text


def test_numbers_that_leave_none_out():
    assert missing_shards(["train.bin", "val.bin"]) == []
    assert missing_shards([f"a_{i:02d}.bin" for i in range(98, 102)]) == []
    assert missing_shards(["2024-01-05.bin", "2024-02-07.bin"]) == []
    assert missing_shards(["a1.bin", "a3.bin", "b7.bin"]) == ["a2.bin"]
    assert missing_shards([f"a_{i:02d}.bin" for i in (98, 99, 101)]) == ["a_100.bin"]
    assert missing_shards(["x_20200101.bin", "x_20230101.bin"]) == []


@pytest.fixture
def prepared(tmp_path):
    """A small dataset of bytes."""
    write_parquet(tmp_path / "a.parquet", words(300))
    assert run(*byte_options(tmp_path, tmp_path / "prepared")) == 0
    return tmp_path / "prepared"


def test_a_manifest_is_never_ignored(prepared, tmp_path, failing, monkeypatch):
    out = tmp_path / "out"
    message = failing(prepared / "*.bin", out)  # its ids would be taken for GPT-2's
    assert message.startswith(f"{prepared}: is a prepared dataset") and not out.exists()
    assert "is a prepared dataset" in failing(f"{prepared},{prepared}/fineweb_val_000000.bin", out)
    assert converted(prepared / "*.bin", out, tokenizer="byte") == 0
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in prepared.iterdir():
        memory.pipe(f"/prepared/{path.name}", path.read_bytes())
    for source in ("memory://prepared", "memory://prepared/", "memory://prepared/*.bin"):
        message = failing(source, tmp_path / "other")
        assert message.startswith("memory://") and "Copy the directory here" in message
    assert not (tmp_path / "other").exists()

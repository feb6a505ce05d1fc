"""The ArrayRecord format: readable by TFDS, and by offset, and checked on the way."""

import pickle

import numpy as np
import pytest

from data_prep.store import token_records
from data_prep.store.token_records import open_records, record_prefix, write_records

RNG_SEED = 3


def _tokens(num_tokens: int, dtype: type = np.uint16) -> np.ndarray:
    rng = np.random.default_rng(RNG_SEED)
    return rng.integers(0, np.iinfo(dtype).max, num_tokens, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("record_tokens", [1, 5, 28, 57, 63, 64, 100, 2048, 8191, 70_000])
def test_records_are_what_tfds_would_serialize(record_tokens, dtype):
    tfds = pytest.importorskip("tensorflow_datasets")
    tensor = tfds.features.Tensor(shape=(record_tokens,), dtype=dtype, encoding="bytes")
    features = tfds.features.FeaturesDict({"tokens": tensor})
    ids = _tokens(record_tokens, dtype)
    expected = features.serialize_example({"tokens": ids})
    assert record_prefix(record_tokens, dtype) + ids.tobytes() == expected
    token_records.check_record(expected, record_tokens, dtype)


def test_uint32_records_come_back_and_are_not_taken_for_uint16(tmp_path):
    ids = _tokens(100, np.uint32)
    write_records(tmp_path / "a", [ids[:30], ids[30:]], 100, record_tokens=8, dtype=np.uint32)
    reader = pickle.loads(pickle.dumps(open_records([tmp_path / "a"], 8, np.uint32)))
    found = reader.read(range(13))
    assert found.dtype == np.uint32 and found.shape == (13, 8)
    np.testing.assert_array_equal(found.reshape(-1)[:100], ids)
    with pytest.raises(ValueError, match=r"a: record 0: record of 50 bytes, expected 34"):
        open_records([tmp_path / "a"], 8).read([0])
    with pytest.raises(AssertionError, match="uint32"):
        write_records(tmp_path / "b", [ids], 100, record_tokens=8)


def test_chunks_leave_no_trace_and_the_last_record_is_padded(tmp_path):
    ids = _tokens(1000)
    for name, cuts in [("a", []), ("b", [1, 2, 63, 64, 65, 500])]:
        chunks = np.split(ids, cuts)
        write_records(tmp_path / name, chunks, 1000, record_tokens=64, pad_id=7)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = open_records([tmp_path / "a"], 64).read(range(16)).reshape(-1)
    np.testing.assert_array_equal(found[:1000], ids)
    np.testing.assert_array_equal(found[1000:], np.full(24, 7))


def test_records_of_several_files_are_one_array(tmp_path):
    ids = _tokens(10 * 8)
    write_records(tmp_path / "a", [ids[:24]], 24, record_tokens=8)
    write_records(tmp_path / "b", [ids[24:]], 56, record_tokens=8)
    reader = pickle.loads(pickle.dumps(open_records([tmp_path / "a", tmp_path / "b"], 8)))
    assert len(reader) == 10
    order = [9, 0, 3, 2, 3]
    found = reader.read(np.array(order))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, ids.reshape(10, 8)[order])
    assert reader.read([]).shape == (0, 8)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            reader.read([index])


def test_another_record_length_is_refused_with_the_file_and_the_record(tmp_path):
    write_records(tmp_path / "a", [_tokens(80)], 80, record_tokens=8)
    write_records(tmp_path / "b", [_tokens(64)], 64, record_tokens=16)
    with pytest.raises(ValueError, match=r"b: record 2: record of 50 bytes, expected 34") as error:
        open_records([tmp_path / "a", tmp_path / "b"], 8).read([3, 12])
    assert str(error.value).startswith(str(tmp_path / "b"))


def test_a_record_of_the_right_length_but_another_layout_is_refused():
    good = record_prefix(8) + bytes(16)
    with pytest.raises(ValueError, match=r"not a tf.train.Example of 8 uint16 ids"):
        token_records.check_record(good.replace(b"tokens", b"tokenz"), 8)


def test_such_a_record_is_refused_by_the_reader_too(tmp_path, monkeypatch):
    write_records(tmp_path / "good", [_tokens(16)], 16, record_tokens=8)
    monkeypatch.setattr(token_records, "FEATURE", "tokenz")
    write_records(tmp_path / "bad", [_tokens(16)], 16, record_tokens=8)
    monkeypatch.undo()
    reader = open_records([tmp_path / "good", tmp_path / "bad"], 8)
    reader.read([0, 1])
    with pytest.raises(ValueError, match=r"bad: record 1: record starts with"):
        reader.read([1, 3])


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_damaged_files_are_named(tmp_path, how):
    path = tmp_path / "a"
    write_records(path, [_tokens(100_000)], 100_000, record_tokens=64)
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[70_000] ^= 1
    path.write_bytes({"flipped": content, "cut": content[:100_000], "empty": b""}[how])
    with pytest.raises(ValueError) as error:
        reader = open_records([path], 64)
        reader.read(range(len(reader)))
    assert str(error.value).startswith(f"{path}: ")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here: no such"):
        open_records([tmp_path / "nothing-here"], 64)
    with pytest.raises(ValueError, match="no ArrayRecord files"):
        open_records([], 64)

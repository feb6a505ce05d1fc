"""Small things that everything in the store stands on."""

import numpy as np
import pytest

from data_prep.pages.numbers import parse_count
from data_prep.store.addresses import Addresses
from data_prep.store.files import digest_of, file_problem
from data_prep.store.streams import RAW, FileRange, StoredStream, read_ranges
from data_prep.store.token_bin import write_tokens
from data_prep.store.token_records import write_records


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e9", 10**9),
        ("9007199254740993", 2**53 + 1),
        ("9.007199254740993e15", 2**53 + 1),
        ("100_000", 100_000),
        ("-1", -1),
    ],
)
def test_counts_are_exact(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["1.5", "inf", "nan", "many", "", "1e-3", "1e400000000"])
def test_what_is_no_whole_number_is_no_count(text):
    with pytest.raises(ValueError, match="expected a whole number"):
        parse_count(text)


def test_every_range_of_the_whole_is_found_in_its_files():
    lengths = [3, 0, 5, 1, 0, 4]
    whole = [(file, place) for file, length in enumerate(lengths) for place in range(length)]
    addresses = Addresses(lengths)
    assert addresses.total == len(whole)
    assert [addresses.find(place) for place in range(13)] == whole
    assert addresses.files_of(np.arange(13)).tolist() == [file for file, _ in whole]
    for start in range(14):
        for stop in range(start, 14):
            found = [(each.file, place) for each in addresses.stretches(start, stop) for place in range(*each[1:])]
            assert found == whole[start:stop]
    for place in (-1, 13):
        with pytest.raises(IndexError, match=rf"{place} is not in \[0, 13\)"):
            addresses.find(place)


def test_a_stream_over_files_of_every_format_reads_as_one(tmp_path):
    ids = np.arange(1000, dtype=np.uint16)
    ids[:300].tofile(tmp_path / "a.tokens")
    write_tokens(tmp_path / "b.bin", [ids[300:500]], 200, header="llmc")
    write_records(tmp_path / "c", [ids[500:]], 500, record_tokens=64)
    stream = StoredStream(
        [
            FileRange(str(tmp_path / "a.tokens"), RAW, "", 0, 300),
            FileRange(str(tmp_path / "b.bin"), "bin", "", 0, 200),
            FileRange(str(tmp_path / "c"), "array_record", "", 0, 500, record_tokens=64),
        ]
    )
    for start, stop in [(0, 1000), (0, 0), (299, 301), (350, 400), (490, 777), (563, 565), (999, 1000)]:
        chunks = read_ranges(stream.ranges(start, stop), ids.dtype)
        assert np.concatenate([ids[:0], *chunks]).tolist() == ids[start:stop].tolist()
        inner = stream.cut(start, stop)
        assert inner.num_tokens == stop - start
        assert inner.ranges(0, inner.num_tokens) == stream.ranges(start, stop)


def test_a_files_problem_says_path_found_and_expected(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    digest = digest_of(path)
    assert file_problem(path, 5, digest) is None
    path.write_bytes(b"hallo")
    assert file_problem(path, 5, digest, read=False) is None
    problem = file_problem(path, 5, digest)
    assert problem and (problem.kind, problem.found, problem.expected) == ("digest", digest_of(path), digest)
    assert str(problem) == f"{path}: digest is {digest_of(path)}, expected {digest}; its content was changed"
    path.write_bytes(b"hell")
    assert str(file_problem(path, 5, digest)).startswith(f"{path}: holds 4 bytes, expected 5")
    path.unlink()
    assert str(file_problem(path, 5, digest)) == f"{path}: missing, expected 5 bytes"

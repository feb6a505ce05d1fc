"""data_prep.check finds what is wrong, names it and repairs it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.prepared import edit_manifest

from data_prep import check
from data_prep.checking import find_problems
from data_prep.store import manifest
from data_prep.store.files import digest_of


def problems(directory: Path) -> list[str]:
    """All of them, in order."""
    return [str(problem) for problem in find_problems(directory)]


def bless(directory: Path, name: str) -> None:
    """Makes the manifest agree with a damaged file: what remains are the deeper checks."""

    def edit(fields):
        (shard,) = (shard for shard in fields["shards"] if shard["name"] == name)
        path = directory / name
        shard |= {"num_bytes": path.stat().st_size, "digest": digest_of(path)}

    edit_manifest(directory, edit)


def test_a_good_dataset_has_no_problems(words_copy, capsys):
    assert problems(words_copy) == []
    assert check.main([str(words_copy)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{words_copy}: OK, ") and "train 11,377, val 1,023 tokens" in out


@pytest.mark.parametrize(
    "name",
    [
        "fineweb_train_000001.bin",
        "fineweb-val.array_record-00000-of-00001",
        "documents_train_000000.parquet",
    ],
)
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_file_is_the_one_problem(words_copy, capsys, name, how):
    path = words_copy / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    (problem,) = problems(words_copy)
    words = {"flipped": "content was changed", "cut": "it was cut short", "missing": "missing"}
    assert problem.startswith(f"{path}: ") and words[how] in problem
    assert check.main([str(words_copy)]) == 1
    assert f"{words_copy}: 1 problem. `--repair`" in capsys.readouterr().out


def test_other_tokens_under_a_digest_that_agrees_are_found(words_copy):
    path = words_copy / "fineweb_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    bless(words_copy, path.name)
    found = problems(words_copy)
    assert "split train as bin: fingerprint" in found[0]
    assert any("holds ids that the tokenizer does not have" in problem for problem in found)


def test_two_shards_in_each_others_place_are_found(words_copy):
    a, b = (words_copy / f"fineweb_train_00000{i}.bin" for i in (0, 1))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    bless(words_copy, a.name)
    bless(words_copy, b.name)
    assert any("train as bin: fingerprint" in problem for problem in problems(words_copy))


def test_a_documents_table_with_a_gap_is_found(words_copy):
    path = words_copy / "documents_train_000001.parquet"
    table = pq.ParquetFile(path).read()
    starts = table["start"].to_numpy().copy()
    starts[3] += 1
    pq.write_table(table.set_column(0, "start", [starts]), path)
    bless(words_copy, path.name)
    found = problems(words_copy)
    assert found[0].startswith(f"{path}: row 3 starts at {starts[3]}, expected {starts[3] - 1}")
    assert any("end-of-text is not exactly where" in problem for problem in found)


def test_an_index_of_other_documents_is_found(words_copy):
    path = words_copy / "documents_train_000001.index"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    bless(words_copy, path.name)
    assert problems(words_copy) == [f"{path}: is not the index of documents_train_000001.parquet"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m["splits"]["train"].update(num_tokens=1), "split train has 1 tokens, but its"),
        (lambda m: m["splits"]["val"].update(num_documents=1), "the manifest says 1"),
        (lambda m: m["splits"]["val"].update(unigram_entropy=1.0), "the manifest says 1.0"),
        (lambda m: m["splits"]["val"].update(fingerprint="0"), "but its splits give"),
        (lambda m: m.update(fingerprint="0"), "fingerprint 0, but its splits give"),
        (lambda m: m["shards"].pop(1), "not in the manifest"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_found(words_copy, edit, message):
    edit_manifest(words_copy, edit)
    assert any(message in problem for problem in problems(words_copy))


def test_leftovers_and_the_files_for_tfds_are_looked_at(words_copy):
    (words_copy / "fineweb_train_000099.bin").write_bytes(b"")
    (words_copy / ".fineweb_train_000000.bin.partial").write_bytes(b"")
    (words_copy / "notes.txt").write_text("mine")
    (words_copy / "features.json").unlink()
    (words_copy / "dataset_info.json").write_text("{}")
    found = "\n".join(problems(words_copy))
    for message in [
        "features.json: missing",
        "dataset_info.json: does not describe",
        "fineweb_train_000099.bin: not in the manifest",
        ".fineweb_train_000000.bin.partial: not in the manifest",
    ]:
        assert message in found
    assert "notes.txt" not in found


def test_no_dataset_is_an_error(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_unigram_entropy_of_known_distributions():
    assert manifest.unigram_entropy(np.array([5, 0, 5])) == pytest.approx(np.log(2))
    assert manifest.unigram_entropy(np.array([0, 7])) == 0.0

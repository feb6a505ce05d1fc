"""data_prep.convert: what is there, in other files; the stream and its documents stay the same."""

import functools
import shutil
from pathlib import Path

import pytest
from support.conversion import converted, refused
from support.prepared import byte_options, flip, run, tree, words, write_parquet

from data_prep import conversion, convert, shards
from data_prep.store import manifest

END = 50256


@pytest.fixture
def failing(capsys):
    """Converts, expects exit status 1, gives the message."""
    return functools.partial(refused, capsys)


# From a prepared dataset


def prepared(folder: Path, name: str, **changes) -> Path:
    """A dataset of the texts in `folder`."""
    assert run(*byte_options(folder, folder / name, **changes)) == 0
    return folder / name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two files of FineWeb's shape, and in `both` what preparing them gives."""
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(folder / "a.parquet", words(300))
    write_parquet(folder / "b.parquet", [*words(40, 2000), None, "", "end"])
    prepared(folder, "both")
    return folder


def test_bin_to_array_record_and_back_is_the_same_bytes(corpus, tmp_path, capsys):
    only_bin = prepared(corpus, "bin", formats="bin")
    assert converted(only_bin, tmp_path / "records", formats="array_record") == 0
    assert tree(tmp_path / "records") == tree(prepared(corpus, "records", formats="array_record"))
    assert converted(tmp_path / "records", tmp_path / "bin", formats="bin") == 0
    assert tree(tmp_path / "bin") == tree(only_bin)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path}/bin: 341 documents, train ") and "--data_dir=" in last


ODD = {"formats": "array_record", "record_tokens": 31}


@pytest.mark.parametrize(
    "kept, changes",
    [
        ({}, {"shard_tokens": 7777, "bin_header": "llmc", "record_tokens": 100}),
        ({}, {"shard_tokens": 1_000_000, "formats": "bin"}),
        (ODD, {"record_tokens": 64, "formats": "bin,array_record"}),
        (ODD, {"record_compression": "zstd", "shard_tokens": 2500}),
    ],
)
def test_converting_gives_what_preparing_with_those_options_gives(corpus, tmp_path, monkeypatch, kept, changes):
    monkeypatch.setattr("data_prep.store.documents.GROUP_ROWS", 16)  # tables of several row groups
    before, expected = tmp_path / "before", tmp_path / "expected"
    assert run(*byte_options(corpus, before, **kept)) == 0
    assert run(*byte_options(corpus, expected, **(kept | changes))) == 0
    assert converted(before, tmp_path / "out", **changes) == 0
    assert tree(tmp_path / "out") == tree(expected)
    assert manifest.load(tmp_path / "out").fingerprint == manifest.load(before).fingerprint


@pytest.mark.parametrize("step", ["write_records", "save"])
def test_killed_it_is_continued_by_the_same_command(corpus, tmp_path, monkeypatch, step):
    changes = {"shard_tokens": 7000}
    assert converted(corpus / "both", tmp_path / "expected", **changes) == 0
    num_calls = 0

    def killed(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3 or step == "save":
            raise KeyboardInterrupt
        return write_records(*args, **kwargs)

    write_records = shards.write_records
    with monkeypatch.context() as patch:
        patch.setattr(shards if step == "write_records" else conversion, step, killed)
        assert converted(corpus / "both", tmp_path / "out", **changes) == 130
    assert not (tmp_path / "out" / "manifest.json").exists()
    written = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.bin")}
    assert written
    assert converted(corpus / "both", tmp_path / "out", num_workers=2, **changes) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert {path: path.stat().st_ino for path in written} == written  # not written again


@pytest.fixture
def damaged(corpus, tmp_path) -> Path:
    """A copy of a dataset, to be damaged."""
    shutil.copytree(corpus / "both", tmp_path / "in")
    return tmp_path / "in"


def test_damaged_files_are_refused_by_name_and_can_be_restored(corpus, damaged, tmp_path, failing):
    flip(damaged / "fineweb_train_000001.bin")
    flip(damaged / "documents_train_000000.parquet")
    (damaged / "fineweb_val_000000.bin").write_bytes(b"")
    (damaged / "fineweb_train_000002.bin").unlink()
    message = failing(damaged, tmp_path / "out")
    for words_ in [
        f"{damaged}/documents_train_000000.parquet: digest is ",
        f"{damaged}/fineweb_train_000001.bin: digest is ",
        f"{damaged}/fineweb_train_000002.bin: missing",
        f"{damaged}/fineweb_val_000000.bin: holds 0 bytes, expected ",
        f"`python -m data_prep.check {damaged}`",
    ]:
        assert words_ in message
    assert not (tmp_path / "out" / "manifest.json").exists()
    shutil.copytree(corpus / "both", damaged, dirs_exist_ok=True)
    assert converted(damaged, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(corpus / "both")


def test_other_tokens_under_a_digest_that_agrees_are_refused_and_leave_nothing(
    corpus, damaged, tmp_path, failing, monkeypatch
):
    good = (damaged / "fineweb_train_000001.bin").read_bytes()
    flip(damaged / "fineweb_train_000001.bin")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepared_dataset.verify", lambda job, report: None)
        message = failing(damaged, tmp_path / "out")
    assert f"{damaged}: split train is Split(" in message and "expected Split(" in message
    # The shards made of it must not be taken for good ones when the file is restored.
    (damaged / "fineweb_train_000001.bin").write_bytes(good)
    assert converted(damaged, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(corpus / "both")


def test_another_spec_or_dataset_in_the_same_directory_is_refused(corpus, tmp_path, monkeypatch, failing, capsys):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_dataset", killed)
        assert converted(corpus / "both", tmp_path / "out", shard_tokens=7000) == 130
    message = failing(corpus / "both", tmp_path / "out", shard_tokens=8000)
    assert "holds an unfinished preparation of another spec" in message
    assert "shard_tokens: 7000 there, 8000 asked for" in message
    assert converted(corpus / "both", tmp_path / "out", shard_tokens=7000) == 0
    before = tree(tmp_path / "out")
    message = failing(corpus / "both", tmp_path / "out", formats="bin")
    assert "formats: ['bin', 'array_record'] there, ['bin'] asked for" in message
    assert converted(corpus / "both", tmp_path / "out", shard_tokens=7000) == 0
    assert "already complete" in capsys.readouterr().out.splitlines()[-1]
    other = prepared(corpus, "other", max_tokens=50_000, shard_tokens=7000)
    message = failing(other, tmp_path / "out")
    assert "max_tokens: None there, 50000 asked for" in message and "fingerprint: " in message
    (tmp_path / "strays").mkdir()
    (tmp_path / "strays" / "fineweb_train_000000.bin").write_bytes(b"")
    assert "holds fineweb_train_000000.bin, but" in failing(corpus / "both", tmp_path / "strays")
    assert tree(tmp_path / "out") == before


def test_mistakes_are_said_before_any_work(corpus, tmp_path, failing):
    both, out = corpus / "both", tmp_path / "out"
    assert "is both IN and OUT" in failing(both, both)
    assert "not a URL" in failing(both, "hf://datasets/me/mine")
    assert "converted whole, without --num_shards" in failing(both, out, num_shards=1)
    assert "was prepared by the tokenizer byte" in failing(both, out, tokenizer="gpt2")
    assert "--formats=parquet: expected" in failing(both, out, formats="parquet")
    assert "nowhere: no such file. The presets are fineweb100B-gpt2 and " in failing("nowhere", out)
    assert "*.bin: no file matches" in failing(tmp_path, out)
    assert "unknown kind of file; expected a name ending in .bin" in failing(corpus / "a.parquet", out)
    assert not out.exists()
    with pytest.raises(SystemExit, match="2"):
        convert.main([f"--input={both}", "in", "out"])

"""check --repair makes damaged files again, byte for byte, and nothing else."""

import shutil
from pathlib import Path

import pytest
from support.prepared import byte_options, edit_manifest, flip, run, tree, words, write_parquet

from data_prep import check
from data_prep.store import manifest

DAMAGE = {
    "bin": ["fineweb_train_000001.bin"],
    "array_record": ["fineweb-train.array_record-00000-of-00003"],
    "tables": ["documents_train_000000.parquet", "documents_train_000001.index"],
    "both formats": ["fineweb_train_000000.bin", "fineweb-train.array_record-00000-of-00003"],
    "val": ["fineweb_val_000000.bin", "fineweb-val.array_record-00000-of-00001"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A prepared dataset of three inputs of four units each."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.inputs.units.UNIT_BYTES", 1000)
        for index in range(3):
            write_parquet(folder / f"{index}.parquet", words(130), rows_per_group=40)
        assert run(*byte_options(folder, folder / "out")) == 0
    return folder


@pytest.fixture
def dataset(good, monkeypatch, tmp_path) -> Path:
    """A copy of it, to be damaged. The inputs stay where they were."""
    monkeypatch.setattr("data_prep.inputs.units.UNIT_BYTES", 1000)
    shutil.copytree(good / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("what", DAMAGE)
def test_repair_gives_the_bytes_back(dataset, what, capsys):
    before = tree(dataset)
    flip(dataset / DAMAGE[what][0])
    for name in DAMAGE[what][1:]:
        (dataset / name).unlink()
    untouched = {path: path.stat().st_mtime_ns for path in dataset.iterdir()}
    untouched = {p: t for p, t in untouched.items() if p.name.startswith(("fineweb", "doc"))}
    assert check.main([str(dataset), "--num_workers=1"]) == 1
    assert "`--repair` makes damaged files again" in capsys.readouterr().out
    assert check.main([str(dataset), "--num_workers=1", "--repair"]) == 0
    out = capsys.readouterr().out
    assert tree(dataset) == before
    for name in DAMAGE[what]:
        origin = "the other format" if what in ("bin", "array_record") else "the inputs"
        assert f"{dataset}/{name}: made again from {origin}" in out
        untouched.pop(dataset / name, None)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


def test_only_the_units_that_are_needed_are_tokenized(dataset, monkeypatch):
    from data_prep import repair

    done = []
    original = repair.tokenize_unit
    monkeypatch.setattr(
        repair, "tokenize_unit", lambda job, report: done.append(job.unit.name) or original(job, report)
    )
    (dataset / "documents_val_000000.parquet").unlink()  # the first 1000 of 12,090 tokens
    assert check.main([str(dataset), "--num_workers=1", "--repair"]) == 0
    assert done == ["00000-000000"]


def test_swapped_shards_are_named_with_each_other(dataset, capsys):
    a, b = (dataset / f"fineweb_train_00000{i}.bin" for i in (0, 1))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert check.main([str(dataset), "--num_workers=1"]) == 1
    out = capsys.readouterr().out
    assert f"{a}: digest" in out and f"{a.name}'s" in out and f"{b}: digest" in out
    assert check.main([str(dataset), "--num_workers=2", "--repair"]) == 0


def test_an_altered_manifest_is_found_before_anything_else(dataset, capsys):
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace('"val_tokens": 1000', '"val_tokens": 1001'))
    assert check.main([str(dataset), "--repair"]) == 1
    assert "manifest.json: was altered" in capsys.readouterr().err


def test_a_changed_input_repairs_nothing(dataset, good, capsys):
    before = tree(dataset)
    (dataset / "documents_train_000000.parquet").unlink()
    original = (good / "1.parquet").read_bytes()
    try:
        write_parquet(good / "1.parquet", words(131), rows_per_group=40)
        assert check.main([str(dataset), "--num_workers=1", "--repair"]) == 1
        assert f"{good}/1.parquet: was changed since the dataset was made" in capsys.readouterr().err
        (good / "1.parquet").unlink()
        assert check.main([str(dataset), "--num_workers=1", "--repair"]) == 1
        assert "no such file. The dataset was made from it" in capsys.readouterr().err
    finally:
        (good / "1.parquet").write_bytes(original)
    assert check.main([str(dataset), "--num_workers=1", "--repair"]) == 0
    assert tree(dataset) == before


def test_bytes_that_are_not_the_old_ones_are_not_called_a_repair(dataset, capsys):
    """A digest in the manifest that nothing gives: as another version's writer would leave it."""
    name = "documents_train_000000.parquet"

    def edit(fields):
        (shard,) = (shard for shard in fields["shards"] if shard["name"] == name)
        shard["digest"] = "0" * 64

    edit_manifest(dataset, edit)
    assert check.main([str(dataset), "--num_workers=1", "--repair"]) == 1
    assert "made again from the inputs it has digest" in capsys.readouterr().err
    assert manifest.load(dataset).spec.val_tokens == 1000

"""A run whose save_dir is in a bucket: killed anywhere, on a machine whose disk is lost, it is the run that nobody disturbed."""

import os
import shutil
from pathlib import Path

import pytest
from support.shared import made_once
from support.training_runs import assert_bitwise_equal, final_state, finish, flags, start, train_here

from data_prep.store import buckets, leases
from gpt_pretrain.data.ledger import Ledger

NUM_STEPS = 12
TTL_SECS = 2.0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, where mirrors lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(leases.TTL, str(TTL_SECS))
    return tmp_path / "cache" / "gpt_pretrain"


@pytest.fixture(scope="session")
def undisturbed(tiny_dataset, tmp_path_factory) -> Path:
    """A run on this machine's disk."""

    def make(directory):
        train_here(run_flags(tiny_dataset, directory / "run"))

    return made_once(tmp_path_factory, "undisturbed-by-buckets", make) / "run"


def run_flags(dataset, save_dir, **changes):
    changes = {"train.save_interval": 4, "train.writers": ("console", "tensorboard")} | changes
    return flags(dataset, save_dir, num_steps=NUM_STEPS, **changes)


def names_in(url) -> set[str]:
    return {each.url[len(url) + 1 :] for each in buckets.list_objects(url)}


def committed(url) -> list[int]:
    return sorted(int(name.split("/")[1]) for name in names_in(url) if name.endswith("/digests.json"))


def downloaded(url, directory) -> Path:
    for each in buckets.list_objects(url):
        target = directory / each.url[len(url) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        buckets.download(each.url, target)
    return directory


def assert_is_the_undisturbed_run(url, directory, undisturbed):
    run = downloaded(url, directory)
    assert Ledger.read(run).to_text() == Ledger.read(undisturbed).to_text()
    step, arrays = final_state(run)
    assert step == NUM_STEPS
    assert_bitwise_equal(arrays, final_state(undisturbed)[1])


def test_a_run_leaves_in_its_bucket_what_it_would_leave_on_a_disk(bucket, tiny_dataset, tmp_path, undisturbed, cache):
    url = f"{bucket}/runs/one"
    output = train_here(run_flags(tiny_dataset, url))
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)
    assert committed(url) == [8, 12]
    local = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    ours, theirs = ({name for name in names if not name.startswith("tensorboard")} for names in (names_in(url), local))
    assert ours == theirs - {".lock"}
    assert f"checkpoints: {url}/checkpoints " in output and f"--checkpoint={url} " in output
    assert str(cache) not in output

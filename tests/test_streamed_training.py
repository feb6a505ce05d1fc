"""Training from a bucket is training from files, bit by bit, also through a cache that does not hold the dataset."""

import numpy as np
import pytest
from support.buckets import _servers, bucket, bucket_server  # noqa: F401
from support.shared import made_once
from support.streamed import make_streams, upload
from support.training_runs import flags, train_here

from data_prep.store.fingerprints import BLOCK_TOKENS
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.run import open_run
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.replayed import check_batch
from gpt_pretrain.train.provenance import Provenance

NUM_STEPS = 16
SETTINGS = {"data.shuffle": "'block'", "data.shuffle_block_windows": 4096, "data.shuffle_group_blocks": 4}


@pytest.fixture(scope="session")
def streams(tmp_path_factory):
    """16 blocks, 32 MiB."""

    def make(directory):
        make_streams(directory / "a", train=16 * BLOCK_TOKENS, val=100_000, shard_tokens=5_000_000)

    return made_once(tmp_path_factory, "streamed-training", make) / "a"


@pytest.fixture(scope="session")
def local_run(tmp_path_factory, streams):
    """The ledger of a run from files."""

    def make(directory):
        train_here(flags(streams, directory / "run", num_steps=NUM_STEPS, **SETTINGS))

    return Ledger.read(str(made_once(tmp_path_factory, "local-run", make) / "run")).digests


def test_a_run_from_a_bucket_through_a_quarter_of_a_cache_has_the_ledger_of_one_from_files(
    bucket,  # noqa: F811
    streams,
    local_run,
    tmp_path,
    monkeypatch,
):
    url, save_dir, cache = upload(streams, f"{bucket}/a"), tmp_path / "run", tmp_path / "cache"
    more = {"data.cache_dir": repr(str(cache)), "data.cache_bytes": 8 << 20}
    half = flags(url, save_dir, num_steps=NUM_STEPS // 2, **SETTINGS, **more)
    output = train_here(half)
    assert "The first batch takes " in output and "Verifying" not in output and "The cache is small" not in output
    train_here(flags(url, save_dir, num_steps=NUM_STEPS, **SETTINGS, **more))  # resumed
    found = Ledger.read(str(save_dir)).digests
    assert len(found) == NUM_STEPS and np.array_equal(found, local_run)
    assert sum(path.stat().st_size for path in (cache / "blocks").rglob("*") if path.is_file()) <= 8 << 20
    assert open_run(str(save_dir)).directories[""] == url
    assert Provenance.read(save_dir).datasets["data"].directory == url
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    run = OpenedRun(str(save_dir))
    (stream,) = run.streams()
    assert run.directory(stream) == url
    check_batch(run, 3)  # reads it again, and compares it with the ledger
    assert (tmp_path / "users" / "gpt_pretrain" / "data" / "blocks").is_dir()

"""Training from a bucket is training from files, bit by bit, also through a cache that does not hold the dataset."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from support.runs import build_anew, run_config
from support.shared import made_once
from support.streamed import make_streams, upload
from support.streams import ArraySource, make_plan
from support.training_runs import flags, train_here

from data_prep.store import buckets
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.ranks import format_ranks
from data_prep.store.tokenizers import recorded_tokenizer, user_tokenizer
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.run import open_run
from gpt_pretrain.forecast import loading
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.replayed import check_batch
from gpt_pretrain.train.actions.network import CompareNetwork
from gpt_pretrain.train.provenance import Provenance
from gpt_pretrain.train.results import StepResult
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import Category

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


@pytest.mark.slow
def test_a_run_from_a_bucket_through_a_quarter_of_a_cache_has_the_ledger_of_one_from_files(
    bucket,
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


def test_what_training_takes_is_compared_with_what_the_network_gives(caplog, monkeypatch):
    plan = make_plan(ArraySource(np.arange(100_000) % 100), batch_size=4, seq_len=25)

    class Times:
        secs: ClassVar = {Category.STEP: 0.0}

    def said(bytes_per_sec) -> str:
        caplog.clear()
        fetching = SimpleNamespace(bytes_per_sec=bytes_per_sec, bytes_per_token=2.5)
        action = CompareNetwork(Start(0, plan, Ledger()), fetching, Times)
        for step in range(1, 20):
            Times.secs[Category.STEP] = step * 0.01  # 100 tokens in 10 ms
            action.on_result(StepResult(step, 0, {}))
        return caplog.text

    with caplog.at_level("INFO"):
        assert "takes 10 k tokens/s, 2.50 bytes fetched for each: 25 KB/s; 80 KB/s are given: it keeps up" in said(80e3)
        assert "24 KB/s are given: it does NOT keep up" in said(24e3)
        assert said(None) == ""


def test_preflight_measures_what_a_bucket_offers(bucket, streams, tmp_path, caplog):
    url = upload(streams, f"{bucket}/a")
    config = run_config(url, tmp_path / "run", num_steps=2000, data={"cache_dir": str(tmp_path / "cache")})
    assert loading.is_there(config.data)
    assert not loading.is_there(DataConfig(dir=f"{bucket}/nothing"))
    with caplog.at_level("INFO"):
        assert loading.offered_tokens_per_sec(*build_anew(config), max_secs=0.5) > 0
    assert "The first batch takes " in caplog.text


def test_a_tokenizer_beside_a_dataset_in_a_bucket_is_that_of_a_directory(bucket, tmp_path):
    ranks = tmp_path / "own.tiktoken"
    ranks.write_bytes(format_ranks({bytes([i]): i for i in range(256)}))
    name = f"{ranks}@gpt2"
    digest = user_tokenizer(name).digest
    url = f"{bucket}/d"
    with pytest.raises(ValueError, match="is named in a file"):
        recorded_tokenizer(name, digest, url)
    buckets.upload(ranks, f"{url}/own.tiktoken")
    assert recorded_tokenizer(name, digest, url).encode("abc").tolist() == [97, 98, 99]
    with pytest.raises(ValueError, match="expected 00, that of"):
        recorded_tokenizer(name, "00", url)

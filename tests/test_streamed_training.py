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

NUM_STEPS = 12
BLOCK_SHUFFLE = {"data.shuffle": "'block'", "data.shuffle_block_windows": 64, "data.shuffle_group_blocks": 4}


@pytest.fixture(scope="session")
def streams(tmp_path_factory):
    """16 blocks, 32 MiB, and others of 3."""

    def make(directory):
        make_streams(directory / "a", train=16 * BLOCK_TOKENS, val=100_000, shard_tokens=5_000_000)
        make_streams(directory / "b", train=3 * BLOCK_TOKENS - 17, val=100_000, seed=1)

    return made_once(tmp_path_factory, "streamed", make)


def ledger_of(data, save_dir, **changes) -> tuple[np.ndarray, str]:
    """The batch digests of a run, and what it said."""
    output = train_here(flags(data, save_dir, num_steps=NUM_STEPS, **{"train.save_interval": 0, **changes}))
    return Ledger.read(save_dir).digests, output


@pytest.mark.parametrize("shuffle", [BLOCK_SHUFFLE, {"data.shuffle": "'global'"}, {"data.shuffle": "'none'"}])
def test_batches_from_a_bucket_are_those_of_the_files_through_a_quarter_of_a_cache(
    bucket,  # noqa: F811
    streams,
    tmp_path,
    shuffle,
):
    cache = {"data.cache_dir": repr(str(tmp_path / "cache")), "data.cache_bytes": 8 << 20}
    url = upload(streams / "a", f"{bucket}/a")
    expected, _ = ledger_of(streams / "a", tmp_path / "local", **shuffle)
    found, output = ledger_of(url, tmp_path / "remote", **shuffle, **cache)
    assert len(found) == NUM_STEPS and np.array_equal(found, expected)
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file()) <= 8 << 20
    assert open_run(str(tmp_path / "remote")).directories[""] == url
    assert "The first batch takes " in output and "Verifying" not in output
    assert ("The cache is small" in output) == (shuffle["data.shuffle"] == "'global'"), output

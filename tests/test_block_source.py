"""Windows from a bucket are those of the files."""

import numpy as np
import pytest
from support.streamed import make_streams, upload

from data_prep.store.block_cache import BlockCache
from data_prep.store.datasets import open_dataset
from data_prep.store.fingerprints import BLOCK_TOKENS

TRAIN = 3 * BLOCK_TOKENS + 12_345


@pytest.mark.parametrize("vocab_size, header", [(257, "short"), (100_000, "llmc")])
def test_random_windows_are_those_of_the_files_across_blocks_and_shards(
    bucket,
    tmp_path,
    vocab_size,
    header,
):
    local = make_streams(tmp_path / "d", train=TRAIN, vocab_size=vocab_size, bin_header=header)
    remote = open_dataset(upload(local, f"{bucket}/some/data"), cache=BlockCache(tmp_path / "cache")).splits["train"]
    source, rng = open_dataset(str(local)).splits["train"], np.random.default_rng(1)
    assert (remote.num_tokens, remote.dtype) == (source.num_tokens, source.dtype)
    for length in (1, 17, 1025, 5000, BLOCK_TOKENS + 3):
        edges = [0, TRAIN - length, BLOCK_TOKENS - 1, max(0, 2 * BLOCK_TOKENS - length + 1), 1_500_000 - 1]
        starts = np.concatenate([rng.integers(0, TRAIN - length, 6), np.minimum(edges, TRAIN - length)])
        assert np.array_equal(remote.read(starts, length), source.read(starts, length))
    with pytest.raises(IndexError):
        remote.read(np.array([TRAIN - 3]), 4)
    assert remote.read(np.array([], np.int64), 5).shape == (0, 5)

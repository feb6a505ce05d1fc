"""A stream in hundreds of shards."""

import os

import numpy as np

from data_prep.store import token_bin, token_records
from data_prep.store.token_sources import BinSource, RecordSource

NUM_SHARDS, SHARD_TOKENS = 300, 16


def make_shards(directory, format) -> list[str]:
    """300 shards of 16 tokens, which count up over all of them."""
    tokens = np.arange(NUM_SHARDS * SHARD_TOKENS, dtype=np.uint16).reshape(NUM_SHARDS, SHARD_TOKENS)
    paths = [str(directory / f"{number:03}") for number in range(NUM_SHARDS)]
    for path, each in zip(paths, tokens, strict=True):
        if format == "bin":
            token_bin.write_tokens(path, [each], SHARD_TOKENS)
        else:
            token_records.write_records(path, [each], SHARD_TOKENS, record_tokens=SHARD_TOKENS)
    return paths


def open_source(paths, format):
    return BinSource(paths) if format == "bin" else RecordSource(paths, SHARD_TOKENS, NUM_SHARDS * SHARD_TOKENS)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))

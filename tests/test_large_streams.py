"""Streams of more blocks than whose digests are fetched whole: they come in pages, as they are needed."""

import threading
import time

import numpy as np
import pytest
from support.fault_proxy import ALWAYS, Fault
from support.shared import made_once
from support.streamed import make_streams, read_blocks, upload

from data_prep.store import block_source, buckets
from data_prep.store.addresses import Addresses, EqualPieces
from data_prep.store.block_cache import SOON, BlockCache
from data_prep.store.blocks_file import Digests, find_blocks
from data_prep.store.datasets import open_dataset
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.token_sources import zeros_as_touched
from gpt_pretrain.data import fetching
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.fetching import FetchAhead
from gpt_pretrain.data.plan import Plan

NUM_BLOCKS = 5
TRAIN = NUM_BLOCKS * BLOCK_TOKENS - 1000


@pytest.fixture(scope="session")
def stream(tmp_path_factory):
    return made_once(tmp_path_factory, "large", lambda directory: make_streams(directory / "a", train=TRAIN)) / "a"


@pytest.fixture
def url(stream, bucket):
    return upload(stream, f"{bucket}/a")


@pytest.fixture
def is_large(monkeypatch):
    """Pages of two digests."""
    monkeypatch.setattr(block_source, "MOST_BLOCKS_WHOLE", NUM_BLOCKS - 1)
    monkeypatch.setattr(block_source, "PAGE_BYTES", 64)


def asked_for(bucket_server, part):
    return [each for each in bucket_server.proxy.seen if part in each.path]


def test_windows_are_those_of_the_files(stream, url, is_large, tmp_path):
    source, remote = open_dataset(str(stream)), open_dataset(url, cache=BlockCache(tmp_path))
    starts = np.random.default_rng(0).integers(0, TRAIN - 1025, 50)
    expected = source.splits["train"].read(starts, 1025)
    assert np.array_equal(remote.splits["train"].read(starts, 1025), expected)
    assert list(remote.splits["train"].digests) == [each.hex() for each in read_blocks(stream / "blocks-train.b3")]


@pytest.mark.parametrize("shuffle", ["block", "none"])
def test_batches_are_those_of_the_files_and_each_page_comes_once(
    stream, url, is_large, tmp_path, bucket_server, shuffle
):
    config = DataConfig(dir="x", seq_len=1024, shuffle=shuffle, shuffle_block_windows=512, shuffle_group_blocks=2)
    here, there = open_dataset(str(stream)), open_dataset(url, cache=BlockCache(tmp_path))
    plan = Plan((config.stage({"": here}, ((0, 16),)),))
    ahead = FetchAhead({"": there.splits["train"]}, plan, first_index=0, num_steps=300)
    ahead.start()
    expected, found = (
        Batches({"": each.splits["train"]}, plan, vocab_size=257, num_steps=300, on_step=ahead.at)
        for each in (here, there)
    )
    assert all(expected[step].digest == found[step].digest for step in range(0, 300, 25))
    ahead.close()
    ranges = [each.headers["range"] for each in asked_for(bucket_server, "blocks-") if "range" in each.headers]
    assert len(ranges) == len(set(ranges)) <= 3


def test_opening_asks_for_the_size_of_the_blocks_file_only_and_a_window_for_a_page(
    url, is_large, tmp_path, bucket_server
):
    bucket_server.proxy.seen.clear()
    source = open_dataset(url, cache=BlockCache(tmp_path)).splits["train"]
    assert len(asked_for(bucket_server, "blocks-")) == 1 and not asked_for(bucket_server, ".bin")
    assert source.read(np.array([3 * BLOCK_TOKENS + 5]), 1025).shape == (1, 1025)
    assert len(asked_for(bucket_server, "blocks-")) == 2


def test_a_small_one_is_fetched_in_one_request(url, tmp_path, bucket_server):
    bucket_server.proxy.seen.clear()
    source = open_dataset(url, cache=BlockCache(tmp_path)).splits["train"]
    assert len(asked_for(bucket_server, "blocks-")) == 1
    for path in (tmp_path / "files").rglob("*"):
        if path.is_file():
            path.unlink()  # who needs room may
    assert len(source.digests[:]) == NUM_BLOCKS
    assert len(asked_for(bucket_server, "blocks-")) == 2


def test_a_page_that_was_damaged_on_its_way_is_read_again_and_one_that_is_wrong_ends_in_a_line(
    url, is_large, tmp_path, bucket_server
):
    first, second = (open_dataset(url, cache=BlockCache(tmp_path / name)).splits["train"] for name in "ab")
    expected = first.digests[1]
    first, second = (open_dataset(url, cache=BlockCache(tmp_path / name)).splits["train"] for name in "ab")
    bucket_server.fail(Fault("wrong", times=1, having="blocks-train"))  # its middle, where the second digest begins
    assert first.read(np.array([BLOCK_TOKENS]), 10).shape == (1, 10) and first.digests[1] == expected
    bucket_server.fail(Fault("wrong", times=ALWAYS, having="blocks-train"))
    with pytest.raises(ValueError, match=r"block 3 of the stream: digest is .*its digest in blocks-\*\.b3 is") as error:
        second.read(np.array([3 * BLOCK_TOKENS]), 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [None, 96, 32 * NUM_BLOCKS + 1])
def test_a_blocks_file_that_is_missing_or_of_another_size_is_an_error_in_a_line(stream, url, is_large, tmp_path, size):
    name, content = f"{url}/blocks-train.b3", (stream / "blocks-train.b3").read_bytes()
    buckets.remove(name)
    if size:
        buckets.write(name, (content + b"x")[:size])
    found = f"holds {size} bytes, expected {32 * NUM_BLOCKS}" if size else "no such object"
    with pytest.raises(ValueError, match=rf"blocks-train\.b3: {found}.*check COPY --repair") as error:
        open_dataset(url, cache=BlockCache(tmp_path))
    assert "\n" not in str(error.value)


def test_a_page_that_cannot_be_read_does_not_end_the_fetching(url, is_large, tmp_path, bucket_server, monkeypatch):
    monkeypatch.setattr(fetching, "_AFTER_ERROR_SECS", 0.01)
    source = open_dataset(url, cache=BlockCache(tmp_path)).splits["train"]
    plan = Plan((DataConfig(dir="x", seq_len=1024).stage({"": open_dataset(url)}, ((0, 4),)),))
    bucket_server.fail(Fault("status", status=403, times=2, having="blocks-train"))
    said = []
    ahead = FetchAhead({"": source}, plan, first_index=0, num_steps=1, say=said.append)
    ahead.start()
    end = time.monotonic() + 20
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    ahead.close()
    assert said


def test_blocks_of_an_earlier_run_are_known_where_the_blocks_file_is_here(url, tmp_path, monkeypatch):
    monkeypatch.setattr(block_source, "_MOST_LOCAL_BYTES", 64)
    monkeypatch.setattr(block_source, "_LOCAL_PAGE_BYTES", 64)
    cache = BlockCache(tmp_path)
    source = open_dataset(url, cache=cache).splits["train"]
    plan = Plan((DataConfig(dir="x", seq_len=1024, shuffle="none").stage({"": open_dataset(url)}, ((0, 4),)),))
    ahead = FetchAhead({"": source}, plan, first_index=0, num_steps=10)
    file = source.digests.verified_as
    later, soon, other, blocks_file = ahead.next_uses([source.digests[4], source.digests[1], "0" * 64, file])
    assert later > soon > 0 and other is None and blocks_file == SOON
    digests = read_blocks(cache.path("files", file))
    assert find_blocks(cache.path("files", file), [digests[3].hex(), "0" * 64]) == {digests[3].hex(): 3}
    assert find_blocks(tmp_path / "nothing", ["0" * 64]) == {}


def test_many_threads_read_a_page_once_and_few_pages_are_kept():
    content, reads = bytes(range(256)) * 4, []

    def read(first, length):
        reads.append(first)
        time.sleep(0.05)
        return content[first : first + length]

    digests = Digests(len(content) // 32, read, 64, 3)
    threads = [threading.Thread(target=digests.__getitem__, args=(5,)) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert reads == [128]
    assert digests[:] == [content[first : first + 32].hex() for first in range(0, len(content), 32)]
    assert digests[31] == digests[-1 + len(digests)] and len(digests._pages) == 3


def test_equal_pieces_are_addresses():
    pieces, addresses = EqualPieces(23, 5), Addresses([5, 5, 5, 5, 3])
    assert len(pieces) == len(addresses) == 5 and pieces.total == addresses.total
    places, files = np.arange(23), np.arange(5)
    assert np.array_equal(pieces.files_of(places), addresses.files_of(places))
    assert np.array_equal(pieces.starts_of(files), addresses.starts_of(files))
    assert [pieces.edges(file) for file in range(5)] == [addresses.edges(file) for file in range(5)]
    for start in range(24):
        for stop in range(start, 24):
            assert list(pieces.stretches(start, stop)) == list(addresses.stretches(start, stop))
    with pytest.raises(IndexError, match=r"23 is not in \[0, 23\)"):
        pieces.find(23)


def test_zeros_take_memory_where_they_are_touched():
    zeros = zeros_as_touched((1 << 20, 16), np.dtype(np.uint16))
    assert zeros.shape == (1 << 20, 16) and zeros.dtype == np.uint16 and not zeros[::4096].any()
    zeros[77, 3] = 5
    assert zeros[77].sum() == 5

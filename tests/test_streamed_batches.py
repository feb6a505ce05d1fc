"""Batches from a bucket are those of the files, through a cache that holds a quarter of the dataset."""

import threading
import time

import numpy as np
import pytest
from support.fault_proxy import ALWAYS, Fault
from support.prepared import flip
from support.shared import made_once
from support.streamed import make_streams, upload

from data_prep.store import buckets
from data_prep.store.block_cache import SOON, BlockCache
from data_prep.store.block_source import BlockSource
from data_prep.store.datasets import open_dataset
from data_prep.store.fingerprints import BLOCK_TOKENS
from gpt_pretrain.data.asked_edits import Edits, InsertedDocument, WindowList
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.damage import explain
from gpt_pretrain.data.edits import edited
from gpt_pretrain.data.fetching import FetchAhead, cost_in_words
from gpt_pretrain.data.loader import load
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage

MIB = 1 << 20
ORDERS = {
    "block": {"shuffle": "block", "shuffle_block_windows": 512, "shuffle_group_blocks": 2},
    "global": {},
    "none": {"shuffle": "none"},
}


@pytest.fixture(scope="session")
def streams(tmp_path_factory):
    """8 blocks, 16 MiB; and 3."""

    def make(directory):
        make_streams(directory / "a", train=8 * BLOCK_TOKENS - 1000, shard_tokens=3_000_000)
        make_streams(directory / "b", train=3 * BLOCK_TOKENS - 17, seed=1)

    return made_once(tmp_path_factory, "streamed", make)


@pytest.fixture
def urls(streams, bucket_server):
    """Where they lie in a bucket; uploaded once a session for each store."""
    known = bucket_server.__dict__.setdefault("urls", {})
    if not known:
        where = bucket_server.make_bucket()
        known.update({name: upload(streams / name, f"{where}/{name}") for name in ("a", "b")})
    return known


def plan_of(datasets, config: DataConfig, batch_size: int = 16) -> Plan:
    return Plan((config.stage(datasets, ((0, batch_size),)),))


def batches_of(datasets, plan, num_steps, first_index=0, on_step=lambda _: None):
    sources = {name: each.splits["train"] for name, each in datasets.items()}
    settings = {"vocab_size": 257, "first_index": first_index, "num_steps": num_steps, "on_step": on_step}
    return Batches(sources, plan, **settings)


def opened(url, cache):
    return {"": open_dataset(url, cache=cache)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("is_ahead", [True, False])
def test_every_batch_has_the_digest_that_files_give(streams, urls, tmp_path, order, is_ahead):
    config = DataConfig(dir="x", seq_len=1024, **ORDERS[order])
    cache = BlockCache(tmp_path, 4 * MIB)
    here, there = opened(str(streams / "a"), None), opened(urls["a"], cache)
    plan, num_steps = plan_of(here, config), 40 if order == "global" else 600
    assert plan == plan_of(there, config)
    first = 13
    fetching = FetchAhead({"": there[""].splits["train"]}, plan, first_index=first, num_steps=num_steps)
    if is_ahead:
        fetching.start()
    expected = batches_of(here, plan, num_steps, first)
    found = batches_of(there, plan, num_steps, first, fetching.at)
    for step in range(0, num_steps, 1 if order == "global" else 7):
        a, b = expected[step], found[step]
        assert a.digest == b.digest and np.array_equal(a.tokens, b.tokens)
    fetching.close()
    assert sum(path.stat().st_size for path in (tmp_path / "blocks").rglob("*") if path.is_file()) <= 4 * MIB


def test_a_mixture_of_buckets_and_files(streams, urls, tmp_path):
    settings = {"seq_len": 512, "mixture_block": 10, "cache_dir": str(tmp_path), "cache_bytes": 8 * MIB}
    local = DataConfig(mixture={"x": (str(streams / "a"), 0.7), "y": (str(streams / "b"), 0.3)}, **settings)
    mixed = DataConfig(mixture={"x": (urls["a"], 0.7), "y": (str(streams / "b"), 0.3)}, **settings)
    remote = DataConfig(mixture={"x": (urls["a"], 0.7), "y": (urls["b"], 0.3)}, **settings)
    assert remote.directories == {"x": urls["a"], "y": urls["b"]}
    plan = plan_of(local.open(), local)
    expected = [each.digest for each in map(batches_of(local.open(), plan, 8).__getitem__, range(8))]
    for config in (mixed, remote):
        datasets = config.open()
        assert plan_of(datasets, config) == plan
        fetching = FetchAhead(
            {name: each.splits["train"] for name, each in datasets.items()}, plan, first_index=0, num_steps=8
        )
        fetching.start()
        found = batches_of(datasets, plan, 8, on_step=fetching.at)
        assert [found[step].digest for step in range(8)] == expected
        fetching.close()


def test_rows_that_are_edited_in_place_are_fetched_ahead_too(streams, urls, tmp_path):
    plan = Plan((DataConfig(dir="x", seq_len=1024).stage(opened(str(streams / "a"), None), ((0, 16),)),))
    (a,), b = plan.stages[0].streams, open_dataset(str(streams / "b"))
    start = 2 * BLOCK_TOKENS - 500  # at the end of a block, and reaching into the next
    places = ((2, 3), (2, 5))
    document = InsertedDocument(
        "inserted/b", b.fingerprint, b.splits["train"].num_tokens, start, 1500, b.end_of_text, places
    )
    targets = WindowList(a.fingerprint, tuple(plan.batch(3).windows.tolist()))
    plan = edited(plan, 1, Edits((targets,), insert=(document,)), num_steps=5)
    here, there = (
        {"": open_dataset(where("a"), cache=cache), "inserted/b": open_dataset(where("b"), cache=cache)}
        for where, cache in ((lambda name: str(streams / name), None), (urls.get, BlockCache(tmp_path, 64 * MIB)))
    )
    sources = {name: each.splits["train"] for name, each in there.items()}
    fetching = FetchAhead(sources, plan, first_index=0, num_steps=5)
    stage = plan.stages[1]
    needs = fetching._needs(stage, stage.position(2) + np.arange(32))
    assert {need.key for need in needs if need.key[0]} == {("inserted/b", 1), ("inserted/b", 2)}
    blocks = {int(w) * 1024 // BLOCK_TOKENS for w in plan.batch(3).windows}
    assert {need.key[1] for need in needs if not need.key[0]} >= blocks
    fetching.start()
    expected, found = batches_of(here, plan, 5), batches_of(there, plan, 5, on_step=fetching.at)
    assert [found[step].digest for step in range(5)] == [expected[step].digest for step in range(5)]
    fetching.close()


def test_it_fetches_in_the_order_of_use_and_no_further_than_the_look_ahead(urls, tmp_path):
    config = DataConfig(dir="x", seq_len=1024, shuffle="none")
    dataset = opened(urls["a"], BlockCache(tmp_path, 8 * MIB))
    source, said = dataset[""].splits["train"], []
    plan = plan_of(dataset, config)
    fetching = FetchAhead({"": source}, plan, first_index=0, num_steps=500, say=said.append)
    brought, bring = [], source.bring
    source.bring = lambda block: brought.append(block) or bring(block)
    fetching.start()
    wait_until(lambda: all(map(source.is_here, range(3))))
    time.sleep(0.2)
    assert sorted(brought) == [0, 1, 2]  # 6 MiB of 8
    assert fetching.next_uses(source.digests[:3]) == [SOON, SOON, SOON]
    soon, later = fetching.next_uses(source.digests[4:6])
    assert 0 < soon < later
    wait_until(lambda: said)
    assert (said[0].num_blocks, said[0].num_missing) == (1, 1) and 0 < said[0].secs < 60
    fetching.at(80)  # 64 steps of 16 windows of 1024 are a block
    wait_until(lambda: source.is_here(3))
    assert SOON not in fetching.next_uses([source.digests[0]])
    fetching.close()
    fetching.at(300)
    time.sleep(0.1)
    assert sorted(set(brought)) == [0, 1, 2, 3]


def test_what_has_no_room_in_the_look_ahead_does_not_stay(urls, tmp_path):
    dataset = opened(urls["a"], BlockCache(tmp_path, 8 * MIB))
    source = dataset[""].splits["train"]
    plan = plan_of(dataset, DataConfig(dir="x", seq_len=1024), batch_size=64)  # windows from all 8 blocks
    fetching = FetchAhead({"": source}, plan, first_index=0, num_steps=5)
    fetching.start()
    wait_until(lambda: sum(map(source.is_here, range(8))) == 3)
    time.sleep(0.2)
    assert fetching.next_uses(source.digests).count(SOON) == 3
    fetching.close()


def test_a_warm_cache_is_left_alone(urls, tmp_path, bucket_server, monkeypatch):
    dataset = opened(urls["b"], BlockCache(tmp_path))
    source, said = dataset[""].splits["train"], []
    for block in range(3):
        source.bring(block)
    config = DataConfig(dir="x", seq_len=1024)
    plan = plan_of(dataset, config)
    asked, looks, examples_at = len(bucket_server.proxy.seen), [], Stage.examples_at

    def counted(stage, positions):
        looks.append(threading.current_thread().name)
        return examples_at(stage, positions)

    monkeypatch.setattr(Stage, "examples_at", counted)
    fetching = FetchAhead({"": source}, plan, first_index=0, num_steps=100, say=said.append)
    fetching.start()
    wait_until(lambda: said)
    assert batches_of(dataset, plan, 100, on_step=fetching.at)[50].digest
    time.sleep(0.1)
    fetching.close()
    assert len(bucket_server.proxy.seen) == asked
    assert said[0].num_missing == 0 and looks.count("fetch-ahead") == 1  # the order is walked by the loader alone


def test_opening_touches_the_manifest_and_the_blocks_files_only(urls, tmp_path, bucket_server):
    bucket_server.proxy.seen.clear()
    open_dataset(urls["a"], cache=BlockCache(tmp_path))
    asked = [each.path for each in bucket_server.proxy.seen]
    assert not [path for path in asked if ".bin" in path] and len(asked) < 10
    bucket_server.proxy.seen.clear()
    open_dataset(urls["a"], cache=BlockCache(tmp_path))
    assert not [each.path for each in bucket_server.proxy.seen if "blocks-" in each.path]  # it is in the cache


def test_blocks_that_arrive_wrong_are_an_error_in_a_line(urls, tmp_path, bucket_server):
    source = open_dataset(urls["a"], cache=BlockCache(tmp_path)).splits["train"]
    bucket_server.fail(Fault("wrong", times=1, having="000001.bin"))
    starts = np.array([3 * BLOCK_TOKENS])
    assert np.array_equal(source.read(starts, 10), source.read(starts, 10))  # once is fetched again
    bucket_server.fail(Fault("wrong", times=ALWAYS, having="000001.bin"))
    with pytest.raises(
        ValueError, match=r"000001\.bin: block 4 of the stream: digest is .*\(fetched 3 times\)"
    ) as error:
        source.read(np.array([4 * BLOCK_TOKENS]), 10)
    assert "\n" not in str(error.value)


def test_a_bucket_that_cannot_be_reached_ends_the_loader_with_a_line(urls, tmp_path, bucket_server, impatient):
    dataset = opened(urls["a"], BlockCache(tmp_path))
    plan = plan_of(dataset, DataConfig(dir="x", seq_len=1024, shuffle="none"))
    bucket_server.fail(Fault("status", times=ALWAYS, having="000001.bin"))
    num_steps = 3 * 64  # the second shard begins in the third block
    fetching = FetchAhead({"": dataset[""].splits["train"]}, plan, first_index=0, num_steps=num_steps)
    fetching.start()
    with pytest.raises(ValueError, match=r"000001\.bin: cannot be read, tried again for") as error:
        list(load(batches_of(dataset, plan, num_steps, on_step=fetching.at)))
    assert "\n" not in str(error.value)
    fetching.close()


def test_a_damaged_block_of_the_cache_is_named_where_the_ledger_differs(urls, tmp_path):
    dataset = opened(urls["b"], BlockCache(tmp_path))
    config = DataConfig(dir="x", seq_len=1024, shuffle="none")
    plan = plan_of(dataset, config)
    assert batches_of(dataset, plan, 5)[0].digest
    source = dataset[""].splits["train"]
    assert explain(plan, dataset, 0).startswith("What it is read from has the digests")
    assert not dataset[""].unverified
    path = source.cache.path("blocks", source.digests[0])
    flip(path)
    assert f"{path}: was changed on this disk (digest is " in explain(plan, dataset, 0)
    assert not path.exists()


def test_what_a_cache_costs_that_is_too_small_is_said_with_its_arithmetic(urls, tmp_path):
    dataset = opened(urls["a"], BlockCache(tmp_path, 4 * MIB))
    sources = {"": dataset[""].splits["train"]}

    def cost(**settings):
        return cost_in_words(sources, DataConfig(dir="x", **settings).stage(dataset, ((0, 2),)), 2)

    # Two draws of 8 blocks touch 8 (1 - (7/8)^2) = 1.875 of them, three quarters of which are not there.
    words = cost(seq_len=1024)
    total = 2 * (8 * BLOCK_TOKENS - 1000)
    expected = round(1.875 * total / 8 * (1 - 4 * MIB / total))
    assert f"about {expected:,} bytes are fetched for every step of 2 windows" in words and "'block'" in words
    assert cost(seq_len=1024, shuffle="none") is None
    assert cost(seq_len=1024, shuffle="block", shuffle_block_windows=512, shuffle_group_blocks=1) is None
    assert "data.shuffle_group_blocks" in cost(seq_len=1024, shuffle="block", shuffle_group_blocks=8)
    sources[""].cache.max_bytes = total
    assert cost(seq_len=1024) is None


def test_the_first_tokens_of_a_block_that_was_here_are_not_fetched_again(urls, tmp_path):
    cache = BlockCache(tmp_path)
    source = open_dataset(urls["a"], cache=cache).splits["train"]
    assert isinstance(source, BlockSource)
    last_window = np.array([BLOCK_TOKENS - 1024])
    expected = source.read(last_window, 1025)
    assert source.needed(last_window, 1025).tolist() == [0] and source.needed(last_window, 1041).tolist() == [0, 1]
    cache.drop("blocks", source.digests[1])
    assert np.array_equal(source.read(last_window, 1025), expected) and not source.is_here(1)
    assert np.array_equal(source.read(last_window, 2000)[:, :1025], expected) and source.is_here(1)


@pytest.mark.parametrize(
    "change, message",
    [
        ("no blocks", r"blocks-train\.b3: no such object; .*data_prep\.check COPY --repair`"),
        ("other blocks", r"blocks-train\.b3: digest is .*data_prep\.check COPY --repair`"),
        ("bare", r"holds \.bin files without a manifest\.json.*data_prep\.convert (gs|s3)://\S+ OUT`"),
        ("nothing", r"not a prepared dataset"),
        ("records", r"stores array_record; .*data_prep\.convert COPY OUT --formats=bin`"),
        ("altered", r"manifest\.json: was altered"),
        ("format", r"data\.format='array_record'"),
        ("bucket", r"there is no bucket nowhere"),
    ],
)
def test_what_cannot_be_streamed_is_said_in_a_line(
    tmp_path,
    bucket,
    words_copy,
    change,
    message,
):
    if change in ("no blocks", "bare", "nothing"):
        for path in words_copy.glob({"no blocks": "*.b3", "bare": "manifest.json", "nothing": "*"}[change]):
            path.unlink()
    if change == "other blocks":
        flip(words_copy / "blocks-train.b3")
    if change == "altered":
        text = (words_copy / "manifest.json").read_text()
        (words_copy / "manifest.json").write_text(text.replace('"name": "fineweb"', '"name": "other"'))
    if change == "records":
        from data_prep import convert

        assert convert.main([str(words_copy), str(tmp_path / "records"), "--formats=array_record"]) == 0
        words_copy = tmp_path / "records"
    upload(words_copy, f"{bucket}/d")
    url = f"{bucket.partition('://')[0]}://nowhere/d" if change == "bucket" else f"{bucket}/d"
    config = DataConfig(dir=url, cache_dir=str(tmp_path / "c"), format="array_record" if change == "format" else "auto")
    with pytest.raises(ValueError, match=message) as error:
        config.open()
    assert "\n" not in str(error.value)


def test_a_url_is_kept_as_it_is_and_settings_of_the_cache_are_checked(tmp_path):
    assert DataConfig(dir="gs://bucket/a/b").dir == "gs://bucket/a/b"
    with pytest.raises(ValueError, match=r"data\.dir: https://h/x is a URL"):
        DataConfig(dir="https://h/x")
    with pytest.raises(ValueError, match=r"data\.cache_bytes: found 5, expected a whole number, at least"):
        DataConfig(cache_bytes=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir: .* cannot be a directory"):
        DataConfig(cache_dir=str(tmp_path / "file"))


def test_files_of_a_dataset_in_a_bucket_are_verified_and_kept(bucket, words_copy, tmp_path):
    from data_prep.store.documents import DocumentTables

    url, cache = upload(words_copy, f"{bucket}/d"), BlockCache(tmp_path / "cache")
    here, there = DocumentTables(words_copy), DocumentTables(url, cache=cache)
    document = here.at(5000)
    assert there.at(5000) == document and there.find("id", document.id) == [document]
    config = DataConfig(dir=url, seq_len=16, exclude=[document.id], cache_dir=str(tmp_path / "cache"))
    local = DataConfig(dir=str(words_copy), seq_len=16, exclude=[document.id])
    assert plan_of(config.open(), config) == plan_of(local.open(), local)
    flip(words_copy / "documents_train_000001.parquet")
    buckets.upload(words_copy / "documents_train_000001.parquet", f"{url}/documents_train_000001.parquet")
    assert there.at(5000) == document  # from the cache
    with pytest.raises(ValueError, match=r"documents_train_000001\.parquet: digest is .*\(fetched 3 times\)"):
        DocumentTables(url, cache=BlockCache(tmp_path / "other")).at(5500)


def wait_until(condition, secs: float = 20.0) -> None:
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

"""The order for other people's trainers: the same batches, digests and record as the trainer's own."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.inspected_run import prepare, simple_plan, stream, write_run
from support.other_trainers import program
from support.streamed import upload

from data_prep.store import manifest, token_bin
from gpt_pretrain import inspect, order_api, replay
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.loader import load
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.run import open_run
from gpt_pretrain.order_api import open_order

NUM_STEPS = 12
SCHEDULE = ((0, 8), (5, 12))


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("cats"))


@pytest.fixture(scope="module")
def dogs(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("dogs"), text="a dog ", name="dog", num_documents=60)


@pytest.fixture(scope="module")
def run(cats, tmp_path_factory):
    """What a run of the trainer leaves behind after five steps of six."""
    plan = simple_plan(stream(cats))
    return write_run(tmp_path_factory.mktemp("run"), {"": cats}, plan, num_steps=6, num_consumed=5)


def settings_of(case, cats, dogs) -> dict:
    """Of a data configuration."""
    if case == "mixture":
        mixture = {"cats": (cats, 3), "dogs": (dogs, 1)}
        return {"mixture": mixture, "mixture_block": 20, "exclude": ["<doc-100>", "<doc-50>", "<dog-50>"], "seed": 5}
    return {"dir": cats} | {"block shuffle": {"shuffle": "block", "shuffle_block_windows": 4}}.get(case, {})


def opened(case, cats, dogs, **changes):
    settings = {"seq_len": 32, "batch_size": SCHEDULE, "num_steps": NUM_STEPS} | settings_of(case, cats, dogs) | changes
    return open_order(settings.pop("dir", None), **settings)


def trainers(case, cats, dogs) -> list:
    """What the trainer's own loader reads, in one process."""
    config = DataConfig(**settings_of(case, cats, dogs), seq_len=32)
    datasets = config.open()
    sources = {name: each.splits["train"] for name, each in datasets.items()}
    plan = Plan((config.stage(datasets, SCHEDULE),))
    return list(load(Batches(sources, plan, vocab_size=257, num_steps=NUM_STEPS)))


def assert_same(batch, other):
    for mine, theirs in zip(batch, other, strict=True):
        assert np.array_equal(mine, theirs)


CASES = ["alone", "mixture", "block shuffle"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_together_have_the_rows_and_digests_of_the_trainers_loader(case, world_size, cats, dogs):
    order = opened(case, cats, dogs)
    readers = [order.read(rank=rank, world_size=world_size) for rank in range(world_size)]
    num_read = 0
    for expected, *parts in zip(trainers(case, cats, dogs), *readers, strict=True):
        assert {part.step_index for part in parts} == {expected.step_index}
        assert {part.position for part in parts} == {expected.position}
        assert np.concatenate([part.rows for part in parts]).tolist() == list(range(expected.batch_size))
        for name in ("tokens", "streams", "windows"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(expected, name)[0])
        assert parts[0].tokens.dtype == expected.tokens.dtype
        assert sum(part.digest for part in parts) % 2**64 == expected.digest
        num_read += 1
    assert num_read == NUM_STEPS
    if case == "mixture":
        assert order.stream_names(0) == ["cats", "dogs"]


@pytest.mark.parametrize("case", CASES)
def test_any_batch_can_be_asked_for_and_reading_can_begin_at_any_step(case, cats, dogs):
    order = opened(case, cats, dogs)
    whole = list(order.read(rank=1, world_size=2))
    batches = order.batches(1, 2)
    assert len(batches) == NUM_STEPS
    for step in np.random.default_rng(0).permutation(NUM_STEPS).tolist():
        assert_same(batches[step], whole[step])
    for step in range(NUM_STEPS + 1):
        rest = list(order.read(step, rank=1, world_size=2))
        assert len(rest) == NUM_STEPS - step
        for batch, expected in zip(rest, whole[step:], strict=True):
            assert_same(batch, expected)


def test_reading_ahead_keeps_the_order_and_ends_with_its_reader(cats, dogs, monkeypatch):
    order = opened("mixture", cats, dogs)
    expected = [batch.digest for batch in order.read()]
    monkeypatch.setattr(order_api, "_GROUP_TOKENS", 600)  # two batches, and one in the end
    assert [batch.digest for batch in order.read()] == expected
    reader = order.read()
    assert next(reader).digest == expected[0]
    threads = [each for each in threading.enumerate() if each.name.startswith("read-ahead")]
    reader.close()
    for each in threads:
        each.join(10)
    assert threads and not any(each.is_alive() for each in threads)


def test_grains_iterator_has_one_integer_as_its_state(cats, dogs):
    batches = opened("mixture", cats, dogs).batches()
    iterator = iter(batches.to_iter_dataset())
    seen = [next(iterator) for _ in range(7)]
    state = iterator.get_state()
    assert state == {"next_index": 7} and seen[-1].step_index == 6
    again = iter(batches.to_iter_dataset())
    again.set_state(state)
    for batch, expected in zip(again, iterator, strict=True):
        assert_same(batch, expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_examples_are_the_rows_of_a_ranks_batches_in_order_and_at_random(case, world_size, cats, dogs):
    order = opened(case, cats, dogs)
    rank = world_size - 1
    expected = [
        (batch.step_index, row, batch.position + row, order.stream_names(batch.step_index)[stream], window, tokens)
        for batch in order.read(rank=rank, world_size=world_size)
        for row, stream, window, tokens in zip(
            *(each.tolist() for each in (batch.rows, batch.streams, batch.windows, batch.tokens)), strict=True
        )
    ]
    examples = order.examples(rank, world_size)
    found = [(*example[:5], example.tokens.tolist()) for example in (examples[i] for i in range(len(examples)))]
    assert found == expected and len(expected) == (5 * 8 + 7 * 12) // world_size
    for i in np.random.default_rng(0).permutation(len(expected))[:20].tolist():
        for _ in range(2):
            example = examples[i]
            assert (*example[:5], example.tokens.tolist()) == expected[i] and example.documents == ()
            example.tokens[:] = 0  # who asks next has it as it is stored
    two = examples.batch(2)[0]
    assert two.tokens.shape == (2, 33) and two.position.tolist() == [expected[0][2], expected[1][2]]


def test_the_documents_of_an_example_are_those_with_a_token_in_its_window(cats, dogs):
    starts = {}
    for name, directory in (("cats", cats), ("dogs", dogs)):
        tables = manifest.load(directory).shards_of("train", "documents")
        starts[name] = [
            (row["start"], row["start"] + row["length"], row["id"])
            for table in tables
            for row in pq.read_table(f"{directory}/{table.name}").to_pylist()
        ]
    examples = opened("mixture", cats, dogs, batch_size=8, num_steps=50).examples(1, 2, with_documents=True)
    only_as_last_target = 0
    for i in range(len(examples)):
        example = examples[i]
        first = example.window * 32
        ids = [id for start, stop, id in starts[example.stream] if start < first + 33 and stop > first]
        assert [each.id for each in example.documents] == ids and ids
        assert not {"<doc-100>", "<doc-50>", "<dog-50>"} & set(ids)
        only_as_last_target += any(each.start == first + 32 for each in example.documents)
    assert only_as_last_target


def test_a_runs_plan_gives_the_batches_of_the_run(run, cats):
    ledger, order = Ledger.read(run).digests.tolist(), open_order(run)
    assert [batch.digest for batch in order.read()][:5] == ledger and order.num_steps == 6
    same = open_order(cats, seq_len=32, batch_size=8, seed=3, num_steps=6)
    assert same.plan == order.plan and (same.vocab_size, same.end_of_text) == (257, 256)
    longer = open_order(run, num_steps=9)
    assert [batch.digest for batch in longer.read()][:5] == ledger and len(longer.batches()) == 9


def recorded(order, save_dir, *, step=0, stop=None, **ranks):
    record = order.record(save_dir, step, **ranks)
    for batch in order.read(step, **{name: value for name, value in ranks.items() if name != "add_up"}):
        if batch.step_index == stop:
            break
        record.add(batch)
    record.save()
    return record


def test_the_record_is_a_real_runs_ledger_and_replay_and_inspect_read_it(five_steps, tiny_dataset, tmp_path, capsys):
    order = open_order(tiny_dataset, seq_len=32, batch_size=8, num_steps=5)
    assert len(recorded(order, tmp_path / "out")) == 5
    assert (tmp_path / "out" / "ledger.bin").read_bytes() == (five_steps / "ledger.bin").read_bytes()
    assert open_run(tmp_path / "out").plan == open_run(five_steps).plan
    assert replay.main([str(tmp_path / "out"), "--verify"]) == 0
    assert "updates 1 to 5 are as the ledger says" in capsys.readouterr().out
    assert replay.main([str(tmp_path / "out"), "--against", str(five_steps)]) == 0
    assert inspect.main([str(tmp_path / "out"), "--step", "3"]) == 0
    assert "row 0" in capsys.readouterr().out
    assert [each.digest for each in open_order(tmp_path / "out").read()] == Ledger.read(five_steps).digests.tolist()


def test_a_killed_run_goes_on_at_its_checkpoint_and_the_record_is_cut_to_it(cats, dogs, tmp_path, capsys):
    order = opened("mixture", cats, dogs)
    quiet = [batch.digest for batch in order.read()]
    recorded(order, tmp_path, stop=7)
    assert (open_run(tmp_path).mark.num_steps, len(Ledger.read(tmp_path))) == (7, 7)
    run_id = open_run(tmp_path).run_id
    record = order.record(tmp_path, 4)  # the newest checkpoint that is whole is of step 4
    assert len(record) == 4 and Ledger.read(tmp_path).digests.tolist() == quiet[:4]
    for batch in order.read(4):
        record.add(batch)  # killed again before it is saved
    assert len(record) == NUM_STEPS and Ledger.read(tmp_path).digests.tolist() == quiet[:4]
    recorded(order, tmp_path, step=4)
    assert Ledger.read(tmp_path).digests.tolist() == quiet and open_run(tmp_path).run_id == run_id
    assert replay.main([str(tmp_path), "--verify"]) == 0
    assert inspect.main([str(tmp_path), "--document", "<doc-60>"]) == 0


def test_rank_0_writes_what_all_ranks_consumed(cats, dogs, tmp_path):
    order = opened("mixture", cats, dogs)
    barrier, parts = threading.Barrier(4), {}

    def add_up_as(rank):
        def add_up(partial):
            parts[rank] = partial
            barrier.wait(10)
            total = np.sum([parts[other] for other in range(4)], axis=0, dtype=np.uint64)
            barrier.wait(10)
            return total

        return add_up

    def consume(rank):
        recorded(order, tmp_path / "out", rank=rank, world_size=4, add_up=add_up_as(rank))

    ranks = [threading.Thread(target=consume, args=(rank,)) for rank in range(4)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(20)
    assert Ledger.read(tmp_path / "out").digests.tolist() == [batch.digest for batch in order.read()]
    assert replay.main([str(tmp_path / "out"), "--verify"]) == 0


def test_what_was_asked_for_may_change_at_a_step_and_streams_go_on_in_their_place(cats, dogs, tmp_path):
    before = opened("alone", cats, dogs, batch_size=8)
    recorded(before, tmp_path, stop=6)
    after = open_order(tmp_path).continued(6, opened("mixture", cats, dogs, batch_size=4, exclude=(), seed=0))
    assert [stage.from_step for stage in after.plan.stages] == [0, 6]
    assert after.plan.stages[1].streams[0].start == 48  # cats, where six batches of 8 have stopped
    recorded(after, tmp_path, step=6)
    assert open_run(tmp_path).plan == after.plan and replay.main([str(tmp_path), "--verify"]) == 0
    for world_size in (1, 2):
        examples, batches = (
            after.examples(1 % world_size, world_size),
            after.read(rank=1 % world_size, world_size=world_size),
        )
        found = [examples[i].window for i in range(len(examples))]
        assert found == [window for batch in batches for window in batch.windows.tolist()]
    with pytest.raises(ValueError, match=r"data\.seed: 0 until now, 1 from here on"):
        before.continued(6, opened("alone", cats, dogs, seed=1))


def test_workers_that_are_forked_or_get_a_pickle_open_the_files_themselves(cats, dogs, monkeypatch):
    order = opened("mixture", cats, dogs)
    batches = order.batches(1, 2)
    expected, opened_here = batches[3], order._data.of(order.plan.stages[0])["cats"]
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        assert_same(batches[3], expected)
        assert order._data.of(order.plan.stages[0])["cats"] is not opened_here
    content = pickle.dumps(order)
    assert len(content) < 20_000
    assert_same(pickle.loads(content).batches(1, 2)[3], expected)
    assert_same(pickle.loads(pickle.dumps(order.batches(1, 2)))[3], expected)
    there = order.examples(with_documents=True)
    assert pickle.loads(pickle.dumps(there))[5].documents == there[5].documents


def test_a_dataset_in_a_bucket_gives_the_same_and_is_recorded_by_its_url(words_dataset, bucket, tmp_path):
    url = upload(words_dataset, f"{bucket}/words")
    settings = {"seq_len": 32, "batch_size": 8, "num_steps": 10}
    order = open_order(url, cache_dir=str(tmp_path / "cache"), **settings)
    recorded(order, tmp_path / "out")
    expected = [batch.digest for batch in open_order(words_dataset, **settings).read()]
    assert Ledger.read(tmp_path / "out").digests.tolist() == expected
    assert set(open_run(tmp_path / "out").directories.values()) == {url}
    assert (tmp_path / "cache").is_dir() and pickle.loads(pickle.dumps(order)).batches()[3].digest == expected[3]
    assert f"save_dir: {bucket}/out is a URL" in one_line(order.record, f"{bucket}/out")


def test_nothing_of_it_needs_jax(run, tmp_path):
    program = f"""
import sys
from gpt_pretrain.order_api import open_order
order = open_order({run!r}, num_steps=5)
record = order.record({str(tmp_path / "out")!r})
for batch in order.read():
    record.add(batch)
record.save()
print(sorted({{"jax", "flax", "optax", "orbax", "grain", "gin", "torch"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]"]
    assert Ledger.read(tmp_path / "out").digests.tolist() == Ledger.read(run).digests.tolist()


def one_line(call, *arguments, **settings) -> str:
    """The error of a call, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_gets_one_clear_line(cats, dogs, run, tmp_path):
    order = opened("alone", cats, dogs)
    assert "expected a whole number, from 0 to 1" in one_line(order.read, rank=2, world_size=2)
    assert "rank (of world_size=2): found -1" in one_line(order.batches, -1, 2)
    assert "world_size: found 0" in one_line(order.examples, 0, 0)
    assert "batch_size=8 (from step 1) cannot be split over world_size=3" in one_line(order.batches, 0, 3)
    assert "batch_size=12 (from step 6) cannot be split over world_size=8" in one_line(order.read, world_size=8)
    assert "step (updates made): found 13" in one_line(order.read, 13)

    good = {"batch_size": 8, "num_steps": 5}
    assert str(tmp_path / "nothing") in one_line(open_order, tmp_path / "nothing", **good)
    assert "is no run (it has no data.json); say batch_size and num_steps" in one_line(open_order, cats)
    assert "data.seq_len: found 0" in one_line(open_order, cats, seq_len=0, **good)
    assert "batch_size: found 'many'" in one_line(open_order, cats, batch_size="many", num_steps=5)
    assert "seqlen: no such setting, expected some of " in one_line(open_order, cats, seqlen=8, **good)
    assert "is a run, whose plan says all but num_steps; found seq_len" in one_line(open_order, run, seq_len=8)
    assert "either a dataset or a mixture" in one_line(open_order, **good)
    assert "would be seen" in one_line(open_order, cats, max_epochs=0.01, **good)
    assert "no document with the id <nobody>" in one_line(open_order, cats, exclude=["<nobody>"], **good)
    assert "the plan is of a dataset with" in one_line(open_order, run, data_dirs=[dogs])
    assert "data_dirs are of runs only" in one_line(open_order, cats, data_dirs=[cats], **good)


def test_a_record_refuses_what_does_not_go_on(cats, dogs, run, tmp_path):
    order = opened("alone", cats, dogs)
    batches = order.batches()
    assert "its record has 0 steps, expected at least the 4" in one_line(order.record, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()
    record = recorded(order, tmp_path / "out", stop=3)
    assert "the batch of step 3 was given, expected that of step 4" in one_line(record.add, batches[2])
    assert "the batch of step 5 was given, expected that of step 4" in one_line(record.add, batches[4])
    assert "has 4 rows from row 4 on, expected 8 from 0" in one_line(record.add, order.batches(1, 2)[3])
    assert "its record has 3 steps, expected at least the 4" in one_line(order.record, tmp_path / "out", 4)
    assert "world_size=2 needs add_up" in one_line(order.record, tmp_path / "out", world_size=2)
    for step in (0, 3):
        for case, changes, message in (
            ("alone", {"seed": 1}, "data.seed: 0 until now, 1 from here on"),
            ("mixture", {"seed": 0}, "dogs: added to the mixture"),
            ("alone", {"batch_size": 4}, "train.batch_size: 8, 12 from step 6 until now, 4 from here on"),
        ):
            other = opened(case, cats, dogs, **changes)
            assert message in one_line(other.record, tmp_path / "out", step)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert "holds a run of gpt_pretrain.main" in one_line(open_order(run).record, tmp_path / "run", 5)
    assert len(Ledger.read(tmp_path / "out")) == 3
    copy = shutil.copytree(tmp_path / "out", tmp_path / "copy")
    Ledger([1, 2, 3]).write(copy)
    assert "its ledger is not the one of data.json" in one_line(order.record, copy, 3)


def test_a_damaged_shard_is_named_by_batches_and_examples_alike(cats, tmp_path):
    there = shutil.copytree(cats, tmp_path / "copy")
    order = open_order(there, seq_len=32, batch_size=8, num_steps=NUM_STEPS, verify="size", shuffle="none")
    shard = manifest.load(there).shards_of("train", "bin")[0]
    with open(there / shard.name, "rb+") as file:
        file.seek(token_bin.read_header(file.name).num_bytes + 2 * 100)
        file.write(np.array([300], "<u2").tobytes())
    message = r"window 3 .*token id 300, expected ids below 257"
    with pytest.raises(ValueError, match=message):
        list(order.read())
    examples = order.examples()
    assert examples[2].window == 2
    with pytest.raises(ValueError, match=message):
        _ = examples[3]


class Killed(Exception):
    pass


class TrainerLikeNanodos:
    """Its `step`, `state` and `do_step`, for a model of counts."""

    def __init__(self, saved, kill_at=None):
        self.saved, self.kill_at = saved, kill_at
        self.step, counts = max(saved.items(), default=(0, np.zeros(257)), key=lambda item: item[0])
        self.state = jax.numpy.asarray(counts)

    def do_step(self, step, in_BxL):
        if step == self.kill_at:
            raise Killed
        assert step == self.step and in_BxL.shape == (8, 32) and in_BxL.dtype == np.int32
        self.state = 0.9 * self.state + jax.numpy.bincount(in_BxL.reshape(-1), length=257)
        self.step += 1

    def save(self, step, items):
        self.saved[step] = np.asarray(items["state"])


def test_nanodos_loop_on_the_page_is_killed_resumed_and_checked(cats, tmp_path, capsys):
    def train(workdir, saved, **kwargs):
        c = types.SimpleNamespace(
            data_dir=cats,
            workdir=workdir,
            batch_size=8,
            checkpoint_every_steps=3,
            model=types.SimpleNamespace(L=32),
            opt=types.SimpleNamespace(num_train_steps=10),
        )
        trainer = TrainerLikeNanodos(saved, **kwargs)
        exec(program("nanodo"), {"c": c, "trainer": trainer, "ckpt_mngr": trainer, "np": np, "jax": jax})
        return np.asarray(trainer.state)

    quiet = train(tmp_path / "quiet", {})
    saved = {}
    for kill_at in (2, 5, 8):
        with pytest.raises(Killed):
            train(tmp_path / "killed", saved, kill_at=kill_at)
    assert sorted(saved) == [3, 6]
    assert np.array_equal(train(tmp_path / "killed", saved), quiet)
    ledgers = [(tmp_path / name / "order" / "ledger.bin").read_bytes() for name in ("quiet", "killed")]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 8 + 8 * 10
    capsys.readouterr()
    assert replay.main([str(tmp_path / "killed" / "order"), "--verify"]) == 0
    assert "updates 1 to 10 are as the ledger says" in capsys.readouterr().out

"""Shards that are too large to be read at the start are verified while training runs."""

import itertools
import os
import shutil
from types import SimpleNamespace

import pytest
from support.interference import after_steps
from support.runs import build_anew, run_config

from data_prep.store import datasets
from data_prep.store.datasets import open_dataset
from gpt_pretrain.data import verification
from gpt_pretrain.data.verification import Suspect, Verification, steps_with, suspects_of
from gpt_pretrain.train import train as train_lib
from gpt_pretrain.train.results import RunFailed


@pytest.fixture
def large(tiny_dataset, tmp_path, monkeypatch):
    """A copy of the tiny dataset, which counts as large."""
    monkeypatch.setattr(datasets, "_ALWAYS_VERIFY_BYTES", 0)
    return shutil.copytree(tiny_dataset, tmp_path / "large")


def shard_of(directory, number):
    return sorted(directory.glob("*train*.bin"))[number]


def change_a_token(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 // 2 * 2] ^= 1
    path.write_bytes(content)


def verify_at_step_4(monkeypatch):
    """Nothing is verified before; then training waits until all is."""
    waiting = []
    begin = Verification.start
    monkeypatch.setattr(Verification, "start", lambda self: waiting.append(self))
    monkeypatch.setattr(Verification, "stop", lambda self: None)

    def verify():
        begin(waiting[-1])
        waiting[-1]._thread.join(20)

    after_steps(monkeypatch, {3: verify})  # metrics of a step are read when the next one is on its way


def test_a_large_dataset_is_verified_while_training_runs_and_once_only(large, tmp_path, caplog, monkeypatch):
    verify_at_step_4(monkeypatch)
    config = run_config(large, tmp_path / "run", num_steps=8)
    num_shards = len(open_dataset(str(large)).unverified)
    assert num_shards == 5
    with caplog.at_level("INFO", logger="gpt_pretrain"):
        assert train_lib.train(config) == 0
        assert f"Verifying {num_shards} shards" in caplog.text
        assert f"All {num_shards} shards are verified" in caplog.text
        caplog.clear()
        touched = shard_of(large, 1)
        os.utime(touched, ns=(1, 1))
        monkeypatch.undo()
        monkeypatch.setattr(datasets, "_ALWAYS_VERIFY_BYTES", 0)
        assert train_lib.train(run_config(large, tmp_path / "run", num_steps=10)) == 0
        assert "Verifying 1 shards" in caplog.text and "4 are known to be good" in caplog.text
        caplog.clear()
        assert train_lib.train(run_config(large, tmp_path / "run", num_steps=12)) == 0
        assert "Verifying" not in caplog.text


def test_wrong_tokens_stop_the_run_with_the_shard_its_steps_and_the_way_back(large, tmp_path, monkeypatch):
    verify_at_step_4(monkeypatch)
    bad = shard_of(large, 2)
    change_a_token(bad)
    config = run_config(large, tmp_path / "run", num_steps=8, save_interval=2, data={"seq_len": 8})
    with pytest.raises(RunFailed) as failed:
        train_lib.train(config)
    message = str(failed.value)
    assert message.startswith(f"{bad}: digest is ") and "4 of 4 steps used it, step 1 first, step 4 last" in message
    assert f"data_prep.check {large} --repair` makes it again" in message
    assert "No checkpoint from before step 1 is left: begin anew" in message
    shutil.rmtree(tmp_path / "run")
    # In the stream's own order, the third shard comes much later.
    with pytest.raises(RunFailed, match=r"No step has used it yet: .*--repair` makes it again, then the same command"):
        train_lib.train(run_config(large, tmp_path / "run", num_steps=8, data={"seq_len": 8, "shuffle": "none"}))


@pytest.mark.slow
def test_the_checkpoints_from_before_are_named_and_those_to_remove(large, tmp_path, monkeypatch):
    verify_at_step_4(monkeypatch)
    bad = shard_of(large, 1)
    change_a_token(bad)
    # Steps of 8 windows of 500 tokens: the second shard begins in the third step.
    data = {"seq_len": 500, "shuffle": "none"}
    config = run_config(large, tmp_path / "run", num_steps=8, save_interval=2, num_checkpoints_kept=4, data=data)
    with pytest.raises(RunFailed) as failed:
        train_lib.train(config)
    saved = tmp_path / "run" / "checkpoints"
    assert "2 of 4 steps used it, step 3 first, step 4 last" in str(failed.value)
    assert f"{saved}/2 is from before" in str(failed.value)


def test_sizes_alone_and_digests_at_the_start_leave_nothing_to_verify(large):
    assert not open_dataset(str(large), verify="size").unverified
    assert not open_dataset(str(large), verify="digest").unverified
    change_a_token(shard_of(large, 0))
    with pytest.raises(ValueError, match="digest is"):
        open_dataset(str(large), verify="digest")


@pytest.mark.parametrize("shuffle", ["none", "global", "block"])
def test_shards_come_in_the_order_of_their_first_use_and_the_steps_that_use_them_are_those_of_the_plan(large, shuffle):
    data = {"seq_len": 16, "shuffle": shuffle, "shuffle_block_windows": 64, "shuffle_group_blocks": 2}
    built, start = build_anew(run_config(large, num_steps=60, data=data))
    suspects = suspects_of(built.data.datasets, start.plan, 0)
    assert len(suspects) == 5 and [each.shard.split for each in suspects] == ["val"] + ["train"] * 4
    firsts = []
    for suspect in suspects[1:]:
        shard, uses = suspect.shard, []
        for step_index in range(400):
            first = start.plan.batch(step_index).windows * 16
            if ((first < shard.start + shard.num_tokens) & (first + 16 >= shard.start)).any():
                uses.append(step_index + 1)
        assert steps_with(suspect, start.plan, 400) == uses
        firsts.append(uses[0])
    assert firsts == sorted(firsts)
    assert steps_with(suspects[0], start.plan, 400) == []


def test_verifying_leaves_the_disk_to_others_most_of_the_time(large, tmp_path, monkeypatch):
    times, slept = itertools.count(), []
    monkeypatch.setattr(verification, "time", SimpleNamespace(monotonic=lambda: next(times)))  # each piece takes 1 s
    shards = open_dataset(str(large)).unverified
    found = Verification([Suspect(each, str(large), "") for each in shards], tmp_path, share=0.2)
    monkeypatch.setattr(found._ending, "wait", slept.append)
    found._run()
    assert found.is_done and not found.problem and slept == [pytest.approx(4.0)] * len(shards)


def test_notes_that_are_damaged_are_made_again(large, tmp_path):
    suspects = [Suspect(each, str(large), "") for each in open_dataset(str(large)).unverified]
    for text in ("{", "[]", '{"verified": 3}', '{"verified": [1, {"path": 2}]}'):
        (tmp_path / "verified.json").write_text(text)
        found = Verification(suspects, tmp_path, share=1.0)
        assert found.num_shards == len(suspects)
    found._run()
    assert Verification(suspects, tmp_path).num_shards == 0


def test_a_shard_that_is_removed_or_cut_meanwhile_is_named(large, tmp_path):
    suspects = [Suspect(each, str(large), "") for each in open_dataset(str(large)).unverified]
    os.truncate(suspects[0].shard.path, 100)
    os.remove(suspects[1].shard.path)
    for suspect, kind in zip(suspects, ("size", "missing"), strict=False):
        found = Verification([suspect], tmp_path)
        found._run()
        assert found.problem and found.problem[1].kind == kind

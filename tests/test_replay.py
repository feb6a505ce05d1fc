"""Reading batches again, comparing them with a ledger, and two runs with each other."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.inspected_run import batches_of, prepare, simple_plan, stream, write_run

from data_prep.store import manifest, token_bin
from gpt_pretrain import replay
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.replayed import replay as replay_batches


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    plan = simple_plan(stream(dataset))
    plan = plan.continued(dataclasses.replace(plan.stages[0], batch_sizes=((0, 4),)), 25)  # a second stage
    return write_run(tmp_path_factory.mktemp("run"), {"": dataset}, plan)


def copied(run, dataset, tmp_path):
    """The run with a copy of its dataset, which may be damaged."""
    there = shutil.copytree(dataset, tmp_path / "copy")
    return [run, "--data_dir", str(there)], there


def test_replay_gives_the_batches_of_the_run_in_the_users_numbering(run, dataset, capsys):
    assert replay.main([run, "--jsonl", "--from_step", "20", "--to_step", "30"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    plan = OpenedRun(run).plan
    for update, line, expected in zip(range(20, 31), lines, batches_of({"": dataset}, plan, 30)[19:], strict=True):
        assert line["update"] == update == expected.step_index + 1  # update 1 is step 0 of the plan
        assert line["position"] == expected.position and line["windows"] == expected.windows[0].tolist()
        assert int(line["digest"], 16) == expected.digest


def test_any_number_of_threads_gives_the_same_batches_in_order(run, capsys):
    opened = OpenedRun(run)
    alone = [batch for part in replay_batches(opened, 0, 40, with_rows=True) for batch in part]
    assert [batch.step_index for batch in alone] == list(range(40))
    for num_threads in (2, 3, 8):
        parts = list(replay_batches(opened, 0, 40, with_rows=True, num_threads=num_threads, chunk_tokens=1000))
        assert len(parts) > 10 and [batch for part in parts for batch in part] == alone
    assert replay.main([run, "--list", "--num_workers", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40  # what the ledger has, by default


def test_a_stream_that_came_later_is_read_from_there_on(dataset, tmp_path, capsys):
    second = prepare(tmp_path / "second", text="a dog ", name="dog")
    plan = simple_plan(stream(dataset, "cats", count=100))
    streams = stream(second, "dogs", count=100), stream(dataset, "cats", count=100)
    both = dataclasses.replace(plan.stages[0], streams=streams)
    plan, directories = plan.continued(both, 25), {"cats": dataset, "dogs": second}
    there = write_run(tmp_path / "run", directories, plan)
    capsys.readouterr()
    assert replay.main([there, "--verify", "--jsonl"]) == 0
    for line, expected in zip(capsys.readouterr().out.splitlines(), batches_of(directories, plan, 40), strict=True):
        names = ("dogs", "cats") if expected.step_index >= 25 else ("cats",)
        assert json.loads(line)["streams"] == [names[i] for i in expected.streams[0]]


def test_verify_agrees_with_the_ledger(run, capsys):
    assert replay.main([run, "--verify"]) == 0
    assert "updates 1 to 40 are as the ledger says" in capsys.readouterr().out


@pytest.mark.parametrize("token", ["another id", "an id out of range"])
def test_verify_names_the_update_and_the_file_of_one_changed_token(run, dataset, tmp_path, capsys, token):
    arguments, there = copied(run, dataset, tmp_path)
    step, row = 30, 2
    window = int(OpenedRun(run).plan.batch(step).windows[row])
    shards = manifest.load(there).shards_of("train", "bin")
    number, offset = divmod(window * 32 + 5, 5000)
    with open(there / shards[number].name, "rb+") as file:
        at = token_bin.read_header(file.name).num_bytes + 2 * offset
        old = int(np.frombuffer(os.pread(file.fileno(), 2, at), "<u2")[0])
        os.pwrite(file.fileno(), np.array([old ^ 1 if token == "another id" else 60000], "<u2").tobytes(), at)
    # The window may have been seen before: the first update that saw it is the one to name.
    seen = [
        each.step_index + 1 for each in batches_of({"": dataset}, OpenedRun(run).plan, 40) if window in each.windows
    ]
    assert replay.main([*arguments, "--verify"]) == 1
    out = capsys.readouterr().out
    assert f"the batch of update {seen[0]} " in out and shards[number].name in out and "not what its manifest" in out
    assert not any(shard.name in out for shard in shards if shard is not shards[number])


def test_verify_blames_plan_or_code_where_the_files_are_whole(run, dataset, tmp_path, capsys):
    other = write_run(tmp_path / "other", {"": dataset}, simple_plan(stream(dataset), seed=4))
    shutil.copy(os.path.join(run, "ledger.bin"), other)
    assert replay.main([other, "--verify"]) == 1
    out = capsys.readouterr().out
    assert (
        "update 1 " in out and "40 of 40 updates differ" in out and "order or the digest is computed otherwise" in out
    )


CHANGES = {
    "data.seed: 3, 4": {"seed": 4},
    "data.seq_len: 32, 16": {"seq_len": 16},
    "train.batch_size: 8, 4": {"batch_sizes": ((0, 8), (11, 4))},
    "data.shuffle: global, none": {"shuffle": "none"},
}


@pytest.mark.parametrize("expected", CHANGES)
def test_against_names_the_parameter_the_update_and_the_rows(dataset, tmp_path, capsys, expected):
    changes = CHANGES[expected]
    a = write_run(tmp_path / "a", {"": dataset}, simple_plan(stream(dataset)))
    b = write_run(tmp_path / "b", {"": dataset}, simple_plan(stream(dataset), **changes))
    assert replay.main([a, "--against", b]) == 1
    out = capsys.readouterr().out
    assert f"  {expected}\n" in out and f"part at update {12 if 'batch_sizes' in changes else 1}:" in out
    assert [line for line in out.splitlines() if line.startswith("  data.") or line.startswith("  train.")] == [
        f"  {expected}"
    ]
    if "batch_sizes" not in changes:
        assert "row 0 of" in out and "<doc-" in out  # what the rows are, with their documents


def test_against_names_exclusions_weights_and_datasets_of_a_mixture(dataset, tmp_path, capsys):
    second = prepare(tmp_path / "second", text="a dog ", name="dog")
    directories = {"cats": dataset, "dogs": second}
    streams = [stream(dataset, "cats", count=300), stream(second, "dogs", count=100)]
    a = write_run(tmp_path / "a", directories, simple_plan(*streams))
    changed = [dataclasses.replace(streams[0], count=200, excluded=(7, 9)), dataclasses.replace(streams[1], count=200)]
    b = write_run(tmp_path / "b", directories, simple_plan(*changed))
    c = write_run(tmp_path / "c", {"cats": dataset}, simple_plan(streams[0]))
    d = write_run(tmp_path / "d", {"cats": second}, simple_plan(dataclasses.replace(streams[1], name="cats")))
    assert replay.main([a, "--against", b]) == 1
    out = capsys.readouterr().out
    assert (
        "cats: weight: 300 of 400, 200 of 400" in out
        and "cats: excluded windows: 0, 2" in out
        and "dogs: weight" in out
    )
    assert replay.main([a, "--against", c]) == 1 and "streams: cats+dogs, cats" in capsys.readouterr().out
    assert replay.main([c, "--against", d]) == 1
    assert (
        f"cats: fingerprint of the dataset: {streams[0].fingerprint[:16]}, {streams[1].fingerprint[:16]}"
        in capsys.readouterr().out
    )


def test_runs_that_agree_say_so_and_where_their_plans_part(dataset, tmp_path, capsys):
    plan = simple_plan(stream(dataset))
    a = write_run(tmp_path / "a", {"": dataset}, plan)
    b = write_run(
        tmp_path / "b", {"": dataset}, simple_plan(stream(dataset), batch_sizes=((0, 8), (20, 4))), num_consumed=20
    )
    assert replay.main([a, "--against", b]) == 0
    out = capsys.readouterr().out
    assert "agree in all 20 updates that both made (of 40 and 20)" in out and "  train.batch_size: 8, 4" in out


def test_another_dataset_and_impossible_steps_are_refused(run, tmp_path, capsys):
    second = prepare(tmp_path / "second", text="a dog ")
    for arguments, message in [
        ([run, "--data_dir", second], "has the fingerprint"),
        ([run, "--to_step", "61"], "--to_step 61"),
        ([run, "--from_step", "0"], "has the updates 1 to 60"),
        ([run, "--verify", "--to_step", "50"], "ends at update 40"),
        ([str(tmp_path)], "data.json: no such file"),
        ([run, "--data_dir", str(tmp_path / "nowhere")], "--data_dir DIR"),
    ]:
        assert replay.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_neither_command_loads_jax(run):
    program = f"""
import sys
from gpt_pretrain import inspect, replay
assert replay.main([{run!r}, "--verify"]) == 0
assert inspect.main([{run!r}, "--step", "1", "--html", {os.path.join(run, "page.html")!r}]) == 0
assert inspect.main([{run!r}, "--document", "<doc-50>"]) == 0
print(sorted({{"jax", "flax", "optax", "orbax", "grain", "gin"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"

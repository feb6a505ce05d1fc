"""A run killed at random and gone on with other processes, devices and microbatches each time is the same run."""

import random
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from support.prepared import byte_options, words, write_parquet
from support.shared import made_once
from support.training_runs import environment, finish, flags, start, train_here

from data_prep import fineweb
from data_prep.store.datasets import open_dataset
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.run import open_run
from gpt_pretrain.history.opened_run import OpenedRun

NUM_STEPS = 24
SAVE_INTERVAL = 4
# (processes, devices each, rows a device holds at once): batches of 8 and 16 rows in every cut.
TOPOLOGIES = [(1, 1, 8), (2, 2, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4)]


@pytest.fixture(scope="session")
def mixture(tiny_dataset, tmp_path_factory) -> dict:
    """Two streams, three to one, in batches that grow, as gin bindings."""

    def make(folder):
        write_parquet(folder / "a.parquet", words(300))
        assert fineweb.main(byte_options(folder, folder / "out")) == 0

    folder = made_once(tmp_path_factory, "numbers", make)
    return {
        "data.mixture": {"cats": (tiny_dataset, 3), "numbers": (str(folder / "out"), 1)},
        "data.mixture_block": 20,
        "train.batch_size": ((0, 8), (10, 16)),
    }


def start_processes(arguments, topology, secs_per_step):
    num_processes, num_devices, rows = topology
    arguments = [*arguments, f"--per_device_batch_size={rows}"]
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        arguments += [f"--coordinator_address={address}", f"--num_processes={num_processes}"]
    each = [[f"--process_id={i}"] if num_processes > 1 else [] for i in range(num_processes)]
    return [
        start([*arguments, *more], consumed="/dev/null", secs_per_step=secs_per_step, num_devices=num_devices)
        for more in each
    ]


def num_saved(save_dir) -> int:
    """The newest finished checkpoint's step."""
    steps = [int(path.name) for path in (save_dir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


@pytest.mark.slow
def test_killed_and_resumed_on_another_topology_each_time_the_ledger_is_that_of_a_quiet_run(
    tiny_dataset, mixture, tmp_path
):
    sizes = {"train.num_tokens": (10 * 8 + 14 * 16) * 32, "train.save_interval": SAVE_INTERVAL}
    quiet = flags(tiny_dataset, tmp_path / "quiet", **mixture, **sizes)
    finish(start_processes(quiet, (1, 2, 4), 0.0)[0])
    expected = Ledger.read(tmp_path / "quiet")
    assert len(expected) == NUM_STEPS

    rng = random.Random(4)
    arguments = flags(tiny_dataset, tmp_path / "run", **mixture, **sizes)
    story = []
    for topology in TOPOLOGIES[:-1]:
        before = num_saved(tmp_path / "run")
        processes = start_processes(arguments, topology, 0.15)
        deadline = time.monotonic() + 200
        while num_saved(tmp_path / "run") <= before:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes), processes[
                0
            ].stdout.read()
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        for process in rng.sample(processes, len(processes)):
            process.kill()
        for process in processes:
            process.communicate()
        story.append((topology, num_saved(tmp_path / "run")))
    processes = start_processes(arguments, TOPOLOGIES[-1], 0.0)
    outputs = [finish(process) for process in processes]
    assert f"Done at step {NUM_STEPS} of {NUM_STEPS}" in outputs[0]

    found = Ledger.read(tmp_path / "run")
    print(f"\n(processes, devices, rows), saved up to: {story}, then {TOPOLOGIES[-1]} to the end")
    assert found.first_difference(expected) is None and len(found) == NUM_STEPS
    assert open_run(tmp_path / "run").plan == open_run(tmp_path / "quiet").plan
    assert story[0][1] < story[-1][1] < NUM_STEPS


def test_the_ledger_is_what_the_plan_says_and_the_same_for_another_layout(tiny_dataset, mixture, tmp_path):
    sizes = {"train.batch_size": 8, "train.num_tokens": 12 * 8 * 32, "train.save_interval": 0}
    one_device = start_processes(flags(tiny_dataset, tmp_path / "a", **(mixture | sizes)), (1, 1, 8), 0.0)[0]
    outputs = [train_here(flags(tiny_dataset, tmp_path / "b", **(mixture | sizes))), finish(one_device)]
    for output in outputs:
        assert "cats, 15 of 20 examples" in output and "Done at step 12 of 12 (96 examples)" in output
    run = open_run(tmp_path / "a")
    sources = OpenedRun(str(tmp_path / "a")).sources(run.plan.stages[0])
    batches = Batches(sources, run.plan, vocab_size=257, num_steps=12)
    expected = [batches[step].digest for step in range(12)]
    assert [Ledger.read(tmp_path / name).digests.tolist() for name in ("a", "b")] == [expected, expected]
    streams = np.concatenate([run.plan.batch(step).streams for step in range(12)])
    assert np.bincount(streams[:80]).tolist() == [60, 20]


@pytest.mark.slow
def test_another_batch_size_is_a_new_stage_and_the_past_stays(five_steps, tiny_dataset, tmp_path):
    save_dir = shutil.copytree(five_steps, tmp_path / "run")
    past = Ledger.read(save_dir).digests.tolist()
    more = {"train.batch_size": 16, "train.num_tokens": (5 * 8 + 3 * 16) * 32, "data.exclude": ()}
    output = train_here(flags(tiny_dataset, save_dir, **more))
    assert "Data plan: after step 5, train.batch_size: 8 until now, 16 from here on" in output
    assert "Done at step 8 of 8 (88 examples)" in output
    run = open_run(save_dir)
    assert [stage.from_step for stage in run.plan.stages] == [0, 5]
    assert Ledger.read(save_dir).digests[:5].tolist() == past
    # One stream, cut into other batches: the order goes on where it was.
    windows = np.concatenate([run.plan.batch(step).windows for step in range(8)])
    assert len(set(windows.tolist())) == 88
    # The same configuration again appends nothing.
    train_here(flags(tiny_dataset, save_dir, **more))
    assert open_run(save_dir).plan == run.plan


def test_a_mixture_instead_of_one_dataset_is_a_new_stage(five_steps, tiny_dataset, mixture, tmp_path):
    save_dir = shutil.copytree(five_steps, tmp_path / "run")
    more = mixture | {"train.batch_size": 8}
    output = train_here(flags(tiny_dataset, save_dir, num_steps=8, **more))
    assert "cats: was the dataset until now" in output and "numbers: added to the mixture" in output
    assert [stage.from_step for stage in open_run(save_dir).plan.stages] == [0, 5]


@pytest.mark.slow
def test_longer_sequences_and_the_document_mask_go_on_in_one_run(tiny_dataset, tmp_path):
    bindings = {"model.block_size": 32, "data.document_mask": True, "data.seq_len": 16}
    short = bindings | {"train.num_tokens": 5 * 8 * 16}
    output = train_here(flags(tiny_dataset, tmp_path / "run", **short))
    assert "attention by xla within documents" in output and "Done at step 5 of 5" in output
    plain = train_here(flags(tiny_dataset, tmp_path / "plain", **short | {"data.document_mask": False}))
    losses = [re.findall(r"loss +([\d.]+)", each) for each in (output, plain)]
    assert len(losses[0]) == len(losses[1]) and losses[0] != losses[1]
    longer = bindings | {"data.seq_len": 32, "train.num_tokens": 5 * 8 * 16 + 3 * 8 * 32}
    output = train_here(flags(tiny_dataset, tmp_path / "run", **longer))
    assert "data.seq_len: 16 until now, 32 from here on" in output and "Done at step 8 of 8" in output
    assert open_run(tmp_path / "run").plan.stages[1].streams[0].start == 32_926 // 32  # the next epoch
    for name, value in {"data.document_mask": False, "model.block_size": 64}.items():
        output = train_here(flags(tiny_dataset, tmp_path / "run", **longer | {name: value}), expect=1)
        assert "holds the checkpoint of another run" in output


def test_a_changed_shard_stops_the_run_and_is_named(five_steps, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    save_dir = shutil.copytree(five_steps, tmp_path / "run")
    bindings = {"data.verify": "'size'", "data.format": "'bin'", "train.save_interval": 0}
    window = int(open_run(save_dir).plan.batch(4).windows[0])
    shard, offset = divmod(window * 32, 10_000)
    path = data / f"fineweb_train_{shard:06d}.bin"
    content = bytearray(path.read_bytes())
    content[12 + 2 * offset] ^= 1
    path.write_bytes(content)
    assert open_dataset(str(data), format="bin", verify="size")  # size alone does not show it
    output = train_here(flags(data, save_dir, num_steps=8, **bindings), expect=1)
    assert "the batch of step 5 now has the digest" in output
    assert f"{path}: is not what its manifest says" in output and "--repair" in output
    train_here(flags(data, save_dir, num_steps=8, **bindings, **{"train.verify_steps": 0}))


@pytest.mark.slow
def test_a_schedules_past_sizes_need_not_fit_and_a_damaged_data_json_is_written_anew(tiny_dataset, tmp_path):
    ramp = {"train.batch_size": ((0, 2), (3, 8)), "train.num_tokens": (3 * 2 + 2 * 8) * 32, "train.save_interval": 0}
    finish(start(flags(tiny_dataset, tmp_path / "run", **ramp)))  # on one device
    (tmp_path / "run" / "data.json").write_text("{")
    more = flags(tiny_dataset, tmp_path / "run", **ramp | {"train.num_tokens": (3 * 2 + 4 * 8) * 32})
    output = train_here([*more, "--per_device_batch_size=2"])
    assert "data.json: not valid JSON" in output and "Done at step 7 of 7 (38 examples)" in output
    assert open_run(tmp_path / "run").num_steps == 7
    output = train_here(flags(tiny_dataset, tmp_path / "new", **ramp), expect=1)
    assert "train.batch_size=2 cannot be split over 4 devices" in output


ALONE = """
import sys
from gpt_pretrain import runtime
runtime.configure()
address, process = sys.argv[1], int(sys.argv[2])
runtime.connect(address, 2, process, timeout_secs=25, command='')
import numpy as np
from jax.experimental import multihost_utils
try:
    if process == 0:
        raise ValueError("of process 0 alone")
    multihost_utils.process_allgather(np.ones(2))  # waits for process 0
except ValueError as error:
    print(error, flush=True)
    runtime.leave(show_traceback=False, patience_secs=2.0)
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_within_seconds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, address, str(i)],
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    began = time.monotonic()
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert "of process 0 alone" in outputs[0] and processes[0].returncode == 1 and processes[1].returncode != 0
    assert time.monotonic() - began < 60, outputs


@pytest.mark.slow
def test_other_data_is_refused_and_taken_up_by_a_fork(five_steps, tiny_dataset, mixture, tmp_path):
    save_dir = shutil.copytree(five_steps, tmp_path / "run")
    other = mixture["data.mixture"]["numbers"][0]
    arguments = flags(other, save_dir, num_steps=8)
    output = train_here(arguments, expect=1)
    assert "the dataset: fingerprint" in output and "--fork" in output
    output = train_here([*arguments, "--fork"])
    assert "Done at step 8 of 8" in output
    assert open_run(save_dir).plan.stages[1].change.startswith("fork: the dataset: fingerprint")
    assert "Continuing" in train_here(flags(other, save_dir, num_steps=9))
    reseeded = flags(other, save_dir, num_steps=10, **{"train.seed": 5})
    assert "train.seed: the checkpoint has 0, this run has 5" in train_here(reseeded, expect=1)
    output = train_here([*reseeded, "--fork"])
    assert "Fork: train.seed is another after step 9" in output and "Done at step 10 of 10" in output

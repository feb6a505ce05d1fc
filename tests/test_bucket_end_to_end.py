"""From text to a model with nothing on a disk that lasts: data and run are in a bucket, and machines are lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fault_proxy import ALWAYS, Fault
from support.training_runs import (
    REPO,
    assert_bitwise_equal,
    environment,
    final_state,
    finish,
    flags,
    start,
    start_two,
    train_here,
)

from data_prep.store import buckets, leases
from gpt_pretrain.data.ledger import Ledger

NUM_STEPS = 12
SETTINGS = {
    "data.shuffle": "'block'",
    "data.shuffle_block_windows": 4096,
    "data.shuffle_group_blocks": 4,
    "train.save_interval": 4,
    "train.num_checkpoints_kept": 9,
}
PREPARE = ["--input=sample", "--tokenizer=byte", "--formats=bin", "--shard_tokens=2500000", "--val_tokens=100000"]


def command(module: str, *arguments: str, expect: int = 0) -> str:
    """A command as a user types it; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment(4),
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def run_flags(dataset, save_dir, **changes) -> list[str]:
    return flags(dataset, save_dir, num_steps=NUM_STEPS, **SETTINGS, **changes)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Dataset and run on a disk: four steps by one process, the rest by two, never killed."""
    folder = tmp_path_factory.mktemp("local")
    command("data_prep.fineweb", *PREPARE, f"--output_dir={folder}/data", "--num_workers=2")
    arguments = run_flags(folder / "data", folder / "run")
    train_here(arguments)
    for step in (8, 12):
        shutil.rmtree(folder / "run" / "checkpoints" / str(step))
    for process in start_two(arguments, folder):
        finish(process)
    return folder


def killed_when(process, server, method: str, names: tuple[str, ...]) -> None:
    """SIGKILL as soon as the store was asked for one of these names, which is never answered."""
    deadline = time.monotonic() + 120
    while not any(each.method in method and any(name in each.path for name in names) for each in server.proxy.seen):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    server.proxy.faults.clear()
    server.proxy.seen.clear()


@pytest.mark.slow
def test_prepared_in_a_bucket_trained_from_it_killed_twice_and_resumed_elsewhere_it_is_the_run_of_a_disk(
    bucket, bucket_server, local, tmp_path, monkeypatch
):
    data, run = f"{bucket}/data", f"{bucket}/runs/a"
    machines = iter(range(9))
    monkeypatch.setenv(leases.TTL, "4")

    def another_machine() -> Path:
        """Its disk has a cache, and nothing in it."""
        disk = tmp_path / f"machine-{next(machines)}"
        (disk / "tmp").mkdir(parents=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        monkeypatch.setenv("TMPDIR", str(disk / "tmp"))
        return disk

    another_machine()
    assert f"{data}: " in command("data_prep.fineweb", *PREPARE, f"--output_dir={data}", "--num_workers=2")
    assert "OK" in command("data_prep.check", data)
    for name in ("manifest.json", "blocks-train.b3"):
        assert buckets.read(f"{data}/{name}") == (local / "data" / name).read_bytes()

    arguments = run_flags(data, run, **{"data.cache_bytes": 8 << 20})
    seal = ("checkpoints/8/digests.json", "checkpoints%2F8%2Fdigests.json")
    bucket_server.fail(*(Fault("silent", secs=120, having=name, times=ALWAYS) for name in seal))
    bucket_server.proxy.seen.clear()
    # No faster than checkpoints are uploaded: that of step 4 is there before that of step 8.
    slowly = {"consumed": tmp_path / "consumed", "secs_per_step": 0.5}
    first = start([*arguments, "--per_device_batch_size=1"], num_devices=4, **slowly)
    killed_when(first, bucket_server, "PUT POST", seal)

    another_machine()
    # The manifest and the blocks file are read, and of the shards the first block only.
    bucket_server.fail(Fault("silent", secs=120, method="GET", having=".bin", times=ALWAYS, skip=1))
    bucket_server.proxy.seen.clear()
    killed_when(start([*arguments, "--per_device_batch_size=1"], num_devices=4), bucket_server, "GET", (".bin",))

    disk = another_machine()
    outputs = [finish(process) for process in start_two(arguments, tmp_path)]
    assert f"Continuing {run} from step 4 of {NUM_STEPS}" in outputs[0]
    assert re.search(rf"Done at step {NUM_STEPS} of {NUM_STEPS}", outputs[0])

    got = tmp_path / "got"
    for each in buckets.list_objects(run):
        target = got / each.url[len(run) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        buckets.download(each.url, target)
    assert Ledger.read(got).to_text() == Ledger.read(local / "run").to_text()
    step, arrays = final_state(got)
    assert step == NUM_STEPS
    assert_bitwise_equal(arrays, final_state(local / "run")[1])
    assert sum(path.stat().st_size for path in disk.rglob("blocks/*/*") if path.is_file()) <= 8 << 20

    another_machine()
    assert f"{run}: updates 1 to {NUM_STEPS} are as the ledger says" in command("gpt_pretrain.replay", run, "--verify")
    assert f"{run}: update 3 of {NUM_STEPS}, consumed" in command("gpt_pretrain.inspect", run, "--step=3", "--rows=0")
    command("gpt_pretrain.generate", f"--checkpoint={run}", "--prompt=Once", "--num_tokens=4")
    command("data_prep.documents", data, "--token=123456")

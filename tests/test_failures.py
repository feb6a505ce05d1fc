"""How a run ends, or goes on, when what it relies on fails: disks, its directory, its threads."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from support.interference import after_steps, fill, fill_with_files, small_disk, wait_for_checkpoint
from support.runs import run_config
from support.training_runs import REPO, environment, finish, flags, start

from gpt_pretrain.train import checkpoints as checkpoints_lib
from gpt_pretrain.train import train as train_lib
from gpt_pretrain.train.actions import checkpointing, evaluation
from gpt_pretrain.train.closing import closing
from gpt_pretrain.train.results import RunFailed


def saving_run(dataset, save_dir, **changes):
    return run_config(dataset, save_dir, **({"num_steps": 8, "save_interval": 2} | changes))


def steps_saved(save_dir):
    return sorted(int(each.name) for each in (save_dir / "checkpoints").iterdir() if each.name.isdigit())


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as directory:
        yield directory


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)


def make_read_only(directory):
    """For root, too."""
    mount("--bind", directory, directory)
    mount("-o", "remount,ro,bind", directory)


def once_saved(run, event):
    """After the checkpoint of step 2."""
    wait_for_checkpoint(run, 2)
    event()


BREAK = {
    "full": lambda disk: fill(disk / "filling"),
    "no inodes": lambda disk: fill_with_files(disk / "filling"),
    "read-only": lambda disk: make_read_only(disk / "run" / "checkpoints"),
}
MEND = {
    "full": lambda disk: (disk / "filling").unlink(),
    "no inodes": lambda disk: shutil.rmtree(disk / "filling"),
    "read-only": lambda disk: subprocess.run(["umount", str(disk / "run" / "checkpoints")], check=True),
}


@pytest.mark.parametrize("kind", BREAK)
def test_a_save_that_fails_is_said_and_training_goes_on_to_the_next(tiny_dataset, disk, caplog, monkeypatch, kind):
    run = disk / "run"
    after_steps(monkeypatch, {3: lambda: once_saved(run, lambda: BREAK[kind](disk)), 5: lambda: MEND[kind](disk)})
    assert train_lib.train(saving_run(tiny_dataset, run)) == 0
    (line,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR and each.name != "absl"]
    reason = {"read-only": "Read-only file system"}.get(kind, "No space left on device")
    assert line.startswith("SAVING STEP 4 FAILED: ") and reason in line and "step 6 is saved next" in line
    assert line.endswith(f"the newest good checkpoint is {run}/checkpoints/2.") and "\n" not in line
    assert steps_saved(run) == [6, 8] and checkpoints_lib.choose(run).step == 8


@pytest.mark.parametrize("kind", ["full", "no inodes"])
def test_a_run_whose_end_cannot_be_saved_ends_with_one_line_and_its_last_good_checkpoint(
    tiny_dataset, disk, monkeypatch, kind
):
    run = disk / "run"
    after_steps(monkeypatch, {3: lambda: once_saved(run, lambda: BREAK[kind](disk))})
    with pytest.raises(RunFailed) as failed:
        train_lib.train(saving_run(tiny_dataset, run))
    message = str(failed.value)
    assert message.startswith("SAVING STEP 8 FAILED: ") and "No space left on device" in message and "\n" not in message
    assert f"What was trained after {run}/checkpoints/2 is lost." in message
    assert checkpoints_lib.choose(run).step == 2
    MEND[kind](disk)
    monkeypatch.undo()
    assert train_lib.train(saving_run(tiny_dataset, run)) == 0 and steps_saved(run)[-1] == 8


def test_a_save_that_fails_in_orbax_s_threads_is_said_at_the_next_step_and_leaves_nothing(
    tiny_dataset, tmp_path, caplog, monkeypatch
):
    seal, failures = checkpoints_lib.Checkpoints._seal, [OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))]

    def failing(self):
        if self._being_saved.step == 4 and failures:
            raise failures.pop()
        seal(self)

    monkeypatch.setattr(checkpoints_lib.Checkpoints, "_seal", failing)
    run = tmp_path / "run"
    assert train_lib.train(saving_run(tiny_dataset, run)) == 0
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR and each.name != "absl"]
    assert len(lines) == 1 and lines[0].startswith("SAVING STEP 4 FAILED: Disk quota exceeded"), lines
    assert steps_saved(run) == [6, 8] and not list((run / "checkpoints").glob("*tmp*"))


def move(run):
    os.rename(run, run.with_name("elsewhere"))


def replace(run):
    move(run)
    run.mkdir()


@pytest.mark.parametrize("what", [move, shutil.rmtree, replace], ids=["moved", "deleted", "replaced"])
def test_a_save_dir_that_is_not_the_run_s_any_more_ends_it_and_nothing_is_written_there(
    tiny_dataset, tmp_path, monkeypatch, what
):
    run = tmp_path / "run"
    after_steps(monkeypatch, {3: lambda: once_saved(run, lambda: what(run))})
    with pytest.raises(RunFailed, match=f"{run} was moved, deleted or replaced") as failed:
        train_lib.train(saving_run(tiny_dataset, run))
    assert not run.exists() or not list(run.iterdir())
    if what is shutil.rmtree:
        assert "begins anew" in str(failed.value)
    else:
        assert f"--save_dir={tmp_path}/elsewhere" in str(failed.value)
        assert steps_saved(tmp_path / "elsewhere") == [2]


def test_a_save_dir_that_is_moved_during_a_save_gets_no_checkpoint_in_its_old_place(
    tiny_dataset, tmp_path, monkeypatch
):
    run, seal = tmp_path / "run", checkpoints_lib.Checkpoints._seal

    def moved(self):
        move(run)
        shutil.copytree(tmp_path / "elsewhere", run)  # Orbax's threads make again what they miss
        seal(self)

    monkeypatch.setattr(checkpoints_lib.Checkpoints, "_seal", moved)
    with pytest.raises(RunFailed, match="was moved"):
        train_lib.train(saving_run(tiny_dataset, run, num_steps=4))
    assert not steps_saved(run)


def test_a_save_dir_that_is_moved_between_saves_is_noticed_soon(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_LOOK_SECS", 0.0)
    run = tmp_path / "run"
    after_steps(monkeypatch, {3: lambda: move(run)})
    with pytest.raises(RunFailed, match="was moved"):
        train_lib.train(saving_run(tiny_dataset, run, save_interval=0))


def test_a_finished_run_makes_up_for_the_evaluation_that_a_signal_stopped(tiny_dataset, tmp_path, monkeypatch, caplog):
    config = run_config(tiny_dataset, tmp_path / "run", num_steps=4)
    sums, calls = evaluation.Evaluate._sums, []

    def stopped(self, *args):
        calls.append(self)
        self._leave.received = 15
        return sums(self, *args)

    monkeypatch.setattr(evaluation.Evaluate, "_sums", stopped)
    assert train_lib.train(config) == 128 + 15
    assert "the same command computes it" in caplog.text and steps_saved(tmp_path / "run") == [4]
    monkeypatch.undo()
    assert train_lib.train(config) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["step"] == 4 and 0 < found["loss"] < 10
    monkeypatch.setattr(evaluation.Evaluate, "_sums", stopped)
    assert train_lib.train(config) == 0 and len(calls) == 1  # it is there: not computed again


@pytest.mark.slow
def test_98_evaluation_batches_on_four_devices_end(tiny_dataset, tmp_path):
    changes = {"data.seq_len": 7, "train.eval_tokens": 98 * 4 * 7, "train.per_device_batch_size": 1}
    process = start(flags(tiny_dataset, tmp_path / "run", num_steps=2, **changes), num_devices=4)
    assert "validation loss" in finish(process, timeout_secs=60)


class Stuck:
    """Does not close."""

    def __init__(self):
        self.let_go, self.num_bytes = threading.Event(), 0

    def close(self):
        self.let_go.wait(60)


def test_after_an_error_closing_is_given_up_unless_it_gets_somewhere():
    stuck, began = Stuck(), time.monotonic()
    with pytest.raises(KeyError), closing(stuck, patience_secs=0.2, poll_secs=0.02):
        raise KeyError
    assert time.monotonic() - began < 5
    stuck.let_go.set()

    class Slow(Stuck):
        def close(self):
            for _ in range(20):
                time.sleep(0.05)
                self.num_bytes += 1
            self.let_go.set()

    slow = Slow()
    with pytest.raises(KeyError), closing(slow, patience_secs=0.3, poll_secs=0.02, progress=lambda: slow.num_bytes):
        raise KeyError
    assert slow.let_go.is_set()


WITH_THREADS = """
import sys, threading, time, atexit
from gpt_pretrain import main, runtime
runtime.configure()
from gpt_pretrain.train import loop
def failing(self, result):
    if result and result.step == 3:
        threading.Thread(target=time.sleep, args=(300,)).start()  # not a daemon: Python waits for it
        atexit.register(time.sleep, 300)
        raise {error}
loop.Loop._finished = failing
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "error, said",
    [
        ("OSError(24, 'Too many open files', 'a.bin')", "error: a.bin: this process (at most"),
        pytest.param("KeyError('k')", "KeyError: 'k'", marks=pytest.mark.slow),
    ],
)
def test_an_error_ends_the_process_within_seconds_whatever_its_threads_do(tiny_dataset, tmp_path, error, said):
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=8)
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_THREADS.replace("{error}", error), *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=REPO,
    )
    lines, since = [], None
    for line in process.stdout:
        lines.append(line)
        if said in line:
            since = time.monotonic()
    assert process.wait(30) not in (0, None) and since and time.monotonic() - since < 11, "".join(lines)
    if error.startswith("OSError"):
        assert not any("Traceback" in line for line in lines), "".join(lines)

"""Each second of a run's wall time belongs to one category, over kills and restarts."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from support.interference import after_steps
from support.runs import run_config
from support.training_runs import REPO, finish, flags, start

from data_prep.store.files import write_note
from gpt_pretrain import runtime
from gpt_pretrain.train import time_file
from gpt_pretrain.train import train as train_lib
from gpt_pretrain.train.results import RunFailed
from gpt_pretrain.train.time_file import FILE_NAME, TimeFile, TimeRecord
from gpt_pretrain.train.time_ledger import Category, TimeLedger


class Clock:
    """Set by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def spent(times):
    """Without what nothing was spent on."""
    return {str(category): round(secs, 6) for category, secs in times.secs.items() if secs}


def test_the_inner_category_counts_and_the_outer_one_waits(clock):
    times = TimeLedger(began=990.0, clock=clock)
    clock.now += 1
    with times.spent(Category.STEP):
        clock.now += 2
        with times.spent(Category.CHECKPOINT):
            clock.now += 3
            with times.spent(Category.WRITERS):
                clock.now += 4
            clock.now += 5
        clock.now += 6
        with pytest.raises(KeyError), times.spent(Category.EVALUATION):
            clock.now += 7
            raise KeyError
        assert spent(times)["step"] == 8  # also of the block that is open
    clock.now += 8
    expected = {"start": 19, "step": 8, "blocked_on_checkpoint": 8, "writers": 4, "evaluation": 7}
    assert spent(times) == expected and times.session_secs == 46


def test_whatever_is_nested_in_whatever_it_sums_to_the_wall_time():
    times, rng = TimeLedger(), random.Random(0)
    began = time.monotonic()

    def nest(depth):
        for _ in range(rng.randint(1, 3)):
            with times.spent(rng.choice(list(Category))):
                time.sleep(rng.random() * 1e-3)
                if depth:
                    nest(depth - 1)

    nest(4)
    assert sum(times.secs.values()) == pytest.approx(time.monotonic() - began, abs=2e-3)


def test_threads_other_than_the_one_that_counts_change_nothing(clock):
    times = TimeLedger(clock=clock)

    def other():
        with times.spent(Category.EVALUATION):
            clock.now += 5

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert spent(times) == {"start": 5}


def test_waiting_for_items_and_calls_of_methods_are_counted(clock):
    times = TimeLedger(clock=clock)

    def items():
        for item in range(3):
            clock.now += 2
            yield item

    class Writer:
        def write(self, secs):
            clock.now += secs
            return "written"

    writer = times.counted(Writer(), ["write"], Category.WRITERS)
    with times.spent(Category.STEP):
        for item in times.waiting(items()):
            clock.now += 10
            assert writer.write(item) == "written"
    assert spent(times) == {"waiting_for_data": 6, "step": 30, "writers": 3}
    assert times.training_secs == 36
    assert times.percentages()["time_percent/goodput"] == pytest.approx(100 * 30 / 39)
    assert sum(times.percentages().values()) == pytest.approx(100 + 100 * 30 / 39)


def test_what_jax_compiles_counts_as_compilation_wherever_it_happens():
    times = TimeLedger()
    started, ended = threading.Event(), threading.Event()

    def traced(x):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.2)
        else:
            started.set()
            ended.wait(20)
        return jax.jit(lambda y: jnp.sin(y) + 1)(x)  # traced inside a trace

    def elsewhere():
        jax.jit(lambda x: traced(x))(jnp.ones(3))

    with times.noting_compilation(), times.spent(Category.EVALUATION):
        compiled = jax.jit(traced)
        compiled(jnp.ones(2))
        first = times.secs
        assert first[Category.COMPILE] > 0.2 and first[Category.EVALUATION] < 0.2
        compiled(jnp.ones(2))
        assert times.secs[Category.COMPILE] == first[Category.COMPILE]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        assert started.wait(20)
        time.sleep(0.05)
        ended.set()
        thread.join()
        assert times.secs[Category.COMPILE] == first[Category.COMPILE]
    jax.jit(lambda x: traced(x))(jnp.ones(2))
    assert times.secs[Category.COMPILE] == first[Category.COMPILE]


def test_the_last_line_says_where_the_time_went(clock):
    times = TimeLedger(clock=clock)
    clock.now += 4
    with times.spent(Category.STEP):
        clock.now += 130
    with times.spent(Category.DATA):
        clock.now += 16
    with times.spent(Category.WRITERS):
        clock.now += 0.4
    assert times.summary() == "2:30 in 1 session: step 86% (goodput), waiting for data 11%, start 3%"


def test_a_process_began_when_the_system_says_and_else_as_long_ago_as_it_has_computed(monkeypatch):
    code = "from gpt_pretrain import runtime; print(runtime.process_began())"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert before - 0.02 < float(done.stdout) < before + 0.5 < time.monotonic() + 0.5
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert runtime.process_began() == pytest.approx(time.monotonic() - time.thread_time(), abs=0.05)


ENDING = """
import atexit, os
from gpt_pretrain import runtime
class Slow:
    def __del__(self): os.write(1, b"object taken down\\n")
runtime.configure()
atexit.register(lambda: print("what others registered"))
runtime.at_the_end(lambda: print("the last"))
slow = Slow()
runtime.end_with(3)
"""


def test_the_last_calls_come_after_all_others_and_then_the_process_ends_at_once():
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, cwd=REPO)
    assert (done.stdout, done.returncode) == ("what others registered\nthe last\n", 3), done


# The file, and what a restart makes of it.


def begun(run_id="a", step=0):
    return SimpleNamespace(run_id=run_id, step=step)


def session(directory, clock, step=0, run_id="a"):
    """(ledger, file) of a session that resumes from `step`; its file is written by hand."""
    times = TimeLedger(clock=clock)
    return times, TimeFile(directory, times, begun(run_id, step), lambda: None)


def make_steps(times, clock, first, last, secs=10):
    with times.spent(Category.STEP):
        for step in range(first, last + 1):
            times.begin_step(step)
            clock.now += secs


def save(directory, times, clock, step, secs=1):
    times.at_checkpoint(step)
    with times.spent(Category.CHECKPOINT):
        clock.now += secs
    (directory / "checkpoints" / str(step)).mkdir(parents=True)


def killed_at_14(directory, clock):
    """A session that saved steps 5 and 10, evaluated after each, and was killed in step 14."""
    times, file = session(directory, clock)
    clock.now += 7  # start
    for first in (1, 6):
        make_steps(times, clock, first, first + 4)
        save(directory, times, clock, first + 4)
        with times.spent(Category.EVALUATION):
            clock.now += 2
    make_steps(times, clock, 11, 14)
    file._write()
    return times


def test_what_a_killed_session_spent_after_the_checkpoint_that_is_resumed_is_lost(tmp_path, clock):
    wall = clock.now
    killed_at_14(tmp_path, clock)
    times, file = session(tmp_path, clock, step=10)
    assert times.num_sessions == 2
    expected = {"start": 7, "step": 100, "blocked_on_checkpoint": 2, "evaluation": 4, "lost_by_a_crash": 40}
    assert spent(times) == expected
    clock.now += 3  # killed again, before a step was made
    file._write()
    times, file = session(tmp_path, clock, step=10)
    assert spent(times) == expected | {"lost_by_a_crash": 43} and times.num_sessions == 3
    make_steps(times, clock, 11, 15)
    save(tmp_path, times, clock, 15)
    clock.now += 2  # the end of a session that was not killed: nothing of it is done again
    file._write()
    expected |= {"lost_by_a_crash": 43, "step": 150, "blocked_on_checkpoint": 3, "start": 9}
    times, file = session(tmp_path, clock, step=15)
    assert spent(times) == expected
    times.at_checkpoint(15)  # the run was complete: started again, it only looks
    clock.now += 4
    file._write()
    times, _ = session(tmp_path, clock, step=15)
    assert spent(times) == expected | {"start": 13} and times.num_sessions == 5
    assert sum(times.secs.values()) == pytest.approx(clock.now - wall)


def test_where_the_newest_checkpoint_is_damaged_all_since_the_older_one_is_lost(tmp_path, clock):
    killed_at_14(tmp_path, clock)
    times, file = session(tmp_path, clock, step=5)
    assert spent(times) == {
        "start": 7,
        "step": 50,
        "blocked_on_checkpoint": 1,
        "evaluation": 2,
        "lost_by_a_crash": 93,
    }
    file._write()
    assert list(json.loads((tmp_path / FILE_NAME).read_text())["checkpoints"]) == ["5"]  # 10 is of another past


@pytest.mark.parametrize("step, lost", [(14, 0), (20, 0), (12, 40), (4, 153)])
def test_of_a_checkpoint_that_the_file_does_not_know_what_it_knows_of_before_is_kept(tmp_path, clock, step, lost):
    killed_at_14(tmp_path, clock)
    times, _ = session(tmp_path, clock, step=step)
    assert spent(times).get("lost_by_a_crash", 0) == lost
    assert sum(times.secs.values()) == 153


def test_only_checkpoints_that_are_there_are_remembered_and_saves_that_fail_push_none_out(tmp_path, clock):
    times, file = session(tmp_path, clock)
    for step in range(1, 100):
        make_steps(times, clock, step, step)
        times.at_checkpoint(step)
        (tmp_path / "checkpoints" / f"{step}{'' if step in (3, 50) else '.orbax-checkpoint-tmp'}").mkdir(parents=True)
    file._write()
    assert list(json.loads((tmp_path / FILE_NAME).read_text())["checkpoints"]) == ["3", "50", "99"]


def test_a_run_that_begins_anew_has_a_new_ledger(tmp_path, clock):
    killed_at_14(tmp_path, clock)
    times, _ = session(tmp_path, clock, run_id="another")
    assert not spent(times) and times.num_sessions == 1


def note(path, **changes):
    """Changes it as one who also writes the digest."""
    fields = json.loads(path.read_text()) | changes
    del fields["digest"]
    write_note(path, fields)


DAMAGE = {
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a digit": lambda path: path.write_text(path.read_text().replace('"step": 100.0', '"step": 900.0')),
    "no JSON": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[]"),
    "another version": lambda path: note(path, version=2),
    "less than nothing": lambda path: note(path, secs={"step": -1.0}),
    "no step": lambda path: note(path, checkpoints={"ten": {}}),
    "an unknown category": lambda path: note(path, secs={"sleep": 1.0}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_kept_aside_and_a_new_one_begun(tmp_path, clock, caplog, kind):
    killed_at_14(tmp_path, clock)
    path = tmp_path / FILE_NAME
    DAMAGE[kind](path)
    damaged = path.read_bytes()
    times, file = session(tmp_path, clock, step=10)
    (line,) = [each.getMessage() for each in caplog.records]
    assert line.startswith(f"{path}: ") and line.endswith("The run's time is counted anew from here on.")
    assert (tmp_path / f"{FILE_NAME}.damaged").read_bytes() == damaged and not path.exists()
    assert not spent(times)
    file._write()
    assert TimeRecord.read(path).num_sessions == 1


def test_a_kill_in_the_middle_of_a_write_leaves_the_file_before_it(tmp_path, clock, caplog):
    killed_at_14(tmp_path, clock)
    (tmp_path / f".{FILE_NAME}.partial").write_bytes((tmp_path / FILE_NAME).read_bytes()[:100])
    times, file = session(tmp_path, clock, step=10)
    assert spent(times)["step"] == 100 and not caplog.records
    file._write()
    assert not list(tmp_path.glob(".*partial"))


def test_a_disk_that_is_full_is_said_once_and_stops_nothing(tmp_path, clock, caplog, monkeypatch):
    _, file = session(tmp_path, clock)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(time_file, "write_note", full)
    for _ in range(3):
        file._write()
    (line,) = [each.getMessage() for each in caplog.records]
    assert f"{FILE_NAME} cannot be written (No space left on device)" in line and "the run goes on" in line
    monkeypatch.undo()
    file._write()
    assert (tmp_path / FILE_NAME).exists()


def test_nothing_is_written_where_the_directory_is_not_the_runs_any_more_or_another_run_has_taken_it(tmp_path, clock):
    is_ours = True

    def check():
        if not is_ours:
            raise RunFailed("it is another directory")

    times = TimeLedger(clock=clock)
    with TimeFile(tmp_path, times, begun(), check) as file:
        pass
    before = (tmp_path / FILE_NAME).read_bytes()
    clock.now += 5
    is_ours = False
    file._write()
    assert (tmp_path / FILE_NAME).read_bytes() == before
    file.write_last()  # the directory is not locked any more, so that the check fails; but the file is as it was
    after = (tmp_path / FILE_NAME).read_bytes()
    assert after != before
    (tmp_path / FILE_NAME).write_bytes(before)  # as another process would
    file.write_last()
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_the_file_is_written_while_the_main_thread_is_busy(tmp_path):
    times = TimeLedger()
    path = tmp_path / FILE_NAME
    with TimeFile(tmp_path, times, begun(), lambda: None), times.spent(Category.COMPILE):
        deadline = time.monotonic() + 20
        while not path.exists() or TimeRecord.read(path).secs.get("compile", 0) < 0.2:
            assert time.monotonic() < deadline


# Runs.


def read(save_dir):
    record = TimeRecord.read(save_dir / FILE_NAME)
    assert record is not None
    return record


def wall_secs(began, save_dir):
    """(of a session that is over, and of that what its file cannot know: it came after the last write)"""
    return time.monotonic() - began, time.time() - (save_dir / FILE_NAME).stat().st_mtime


@pytest.mark.slow
def test_a_run_that_fails_and_is_resumed_sums_to_the_wall_time_of_both_sessions(tiny_dataset, tmp_path, monkeypatch):
    config = run_config(
        tiny_dataset, tmp_path / "run", num_steps=8, save_interval=3, eval_interval=4, statistics_interval=4
    )

    def fail():
        time.sleep(0.3)
        raise KeyError("bad luck")

    began = time.monotonic()
    after_steps(monkeypatch, {5: fail})
    with pytest.raises(KeyError):
        train_lib.train(config)
    (wall, tail), first = wall_secs(began, tmp_path / "run"), read(tmp_path / "run")
    assert sum(first.secs.values()) == pytest.approx(wall - tail, rel=0.01)
    monkeypatch.undo()
    began = time.monotonic()
    last_calls = []
    monkeypatch.setattr(runtime, "at_the_end", last_calls.append)
    assert train_lib.train(config, process_began=began) == 0
    at_the_end_of_training = sum(read(tmp_path / "run").secs.values())
    time.sleep(0.1)
    for call in last_calls:
        call()
    assert sum(read(tmp_path / "run").secs.values()) >= at_the_end_of_training + 0.1
    wall_2, tail_2 = wall_secs(began, tmp_path / "run")
    assert max(tail, tail_2) < 0.5
    record = read(tmp_path / "run")
    assert (record.num_sessions, record.step) == (2, 8) and list(record.checkpoints) == ["6", "8"]
    assert sum(record.secs.values()) == pytest.approx(wall + wall_2 - tail - tail_2, rel=0.01)
    assert record.secs["lost_by_a_crash"] == pytest.approx(
        sum(first.secs.values()) - sum(first.checkpoints["3"].values()), abs=0.02
    )
    assert record.secs["lost_by_a_crash"] > 0.3
    busy = {"start", "restore", "compile", "waiting_for_data", "step", "evaluation", "statistics"}
    assert busy < set(record.secs)


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_sums_to_its_wall_time_within_one_percent(tiny_dataset, tmp_path):
    """The wall time is measured from outside, from the start of each process to its end. Of the session that is killed,
    the file knows what was until its last write."""
    run, path, secs_per_step = tmp_path / "run", tmp_path / "run" / FILE_NAME, 0.3
    changes = {"train.save_interval": 5, "train.eval_interval": 5, "train.writers": ("console", "tensorboard")}
    arguments = flags(tiny_dataset, run, num_steps=12, **changes)

    def started():
        return time.monotonic(), start(arguments, consumed=tmp_path / "consumed", secs_per_step=secs_per_step)

    began, process = started()
    while not path.exists() or read(run).step < 9:
        assert time.monotonic() < began + 120 and process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    (wall, tail), killed = wall_secs(began, run), read(run)
    assert sum(killed.secs.values()) == pytest.approx(wall - tail, rel=0.01)
    assert tail < 0.1 + 0.4  # the time between writes, and a busy machine's

    began, process = started()
    output = finish(process)
    wall_2, record = time.monotonic() - began, read(run)
    assert (record.num_sessions, record.step) == (2, 12)
    assert sum(record.secs.values()) == pytest.approx(wall - tail + wall_2, rel=0.01)
    lost = record.secs["lost_by_a_crash"]
    assert lost == pytest.approx(sum(killed.secs.values()) - sum(killed.checkpoints["5"].values()), abs=0.02)
    assert 3 * secs_per_step - 0.1 < lost < 8
    assert record.secs["waiting_for_data"] > 8 * secs_per_step
    assert all(record.secs[name] > 0 for name in ("start", "restore", "compile", "step", "evaluation", "writers"))
    (line,) = [each for each in output.splitlines() if each.startswith("  time:        ")]
    assert " in 2 sessions: step " in line and "% (goodput), " in line and "lost by a crash " in line
    assert "time_percent" not in output

"""Array jobs: several processes at once on one directory, each with its share of the units, and a command that finishes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.prepared import byte_options, run, tree, words, write_parquet

from data_prep.engines.locks import locked, shared
from data_prep.engines.slurm import UnitRange

NUM_TASKS = 3
SEED = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Seven files, of a unit each."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(7):
        write_parquet(folder / f"{index}.parquet", words(60 + 30 * index))
    return folder


@pytest.fixture(scope="module")
def local(corpus, tmp_path_factory) -> dict[str, bytes]:
    """The tree that the local engine gives."""
    output = tmp_path_factory.mktemp("local") / "out"
    assert run(*byte_options(corpus, output)) == 0
    return tree(output)


def task(corpus: Path, output: Path, index: int, num_tasks: int = NUM_TASKS) -> int:
    return run(*byte_options(corpus, output, engine="slurm", unit_range=f"{index}/{num_tasks}"))


def finish(corpus: Path, output: Path, *more: str) -> int:
    return run(*byte_options(corpus, output, engine="slurm"), *more)


def test_every_unit_is_in_one_share_and_shares_are_about_equal():
    rng = np.random.default_rng(SEED)
    for num_units in (1, 2, 7, 300):
        for num_tasks in (1, 2, 3, 8):
            num_bytes = [int(n) for n in rng.integers(0, 100, num_units)]
            shares = [UnitRange(index, num_tasks).of(num_bytes) for index in range(1, num_tasks + 1)]
            assert [place for share in shares for place in share] == list(range(num_units))
            sizes = [sum(num_bytes[place] for place in share) for share in shares]
            assert all(abs(size - sum(num_bytes) / num_tasks) <= 100 for size in sizes)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "1/1000000"])
def test_what_is_no_share_is_refused_in_one_line(corpus, tmp_path, capsys, text):
    assert run(*byte_options(corpus, tmp_path / "out", engine="slurm", unit_range=text)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected i/n, from 1/n to n/n" in error
    assert not (tmp_path / "out").exists()


def test_a_share_is_of_array_jobs_only(corpus, tmp_path, capsys):
    assert run(*byte_options(corpus, tmp_path / "out", unit_range="1/2")) == 1
    assert "is of --engine=slurm, found --engine=local" in capsys.readouterr().err


def test_tasks_in_any_order_and_the_finishing_command_give_the_bytes_of_the_local_engine(
    corpus, local, tmp_path, capsys
):
    for index in (3, 1, 2):
        assert task(corpus, tmp_path / "out", index) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == NUM_TASKS and "--unit_range=3/3: 1 unit, " in lines[0]
    assert "the same command without --unit_range" in lines[0]
    assert finish(corpus, tmp_path / "out", "--require_parts") == 0
    assert tree(tmp_path / "out") == local
    assert task(corpus, tmp_path / "out", 1) == 0
    assert "already complete" in capsys.readouterr().out


def test_units_that_are_missing_are_named_or_made(corpus, local, tmp_path, capsys):
    assert task(corpus, tmp_path / "out", 1) == 0
    assert task(corpus, tmp_path / "out", 3) == 0
    capsys.readouterr()
    assert finish(corpus, tmp_path / "out", "--require_parts") == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.count("\n") == 1 and "2 of 7 units are not tokenized: 00004-000000 (" in error
    assert finish(corpus, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == local


def test_with_a_limit_only_units_that_are_needed_can_be_missing(corpus, tmp_path):
    limit = {"max_tokens": 3000}
    assert run(*byte_options(corpus, tmp_path / "local", **limit)) == 0
    assert run(*byte_options(corpus, tmp_path / "out", **limit, engine="slurm", unit_range="1/3")) == 0
    assert run(*byte_options(corpus, tmp_path / "out", **limit, engine="slurm"), "--require_parts") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_who_works_where_tasks_are_at_work(corpus, tmp_path, capsys):
    work = tmp_path / "out" / ".work"
    with shared(work, 2, NUM_TASKS):
        assert finish(corpus, tmp_path / "out") == 1
        error = capsys.readouterr().err.partition("error: ")[2]
        assert error.count("\n") == 1 and "tasks are at work in this directory (--unit_range=2/3)" in error
        assert task(corpus, tmp_path / "out", 2) == 1
        assert "--unit_range=2/3 is at work already" in capsys.readouterr().err
        assert task(corpus, tmp_path / "out", 2, num_tasks=4) == 1
        assert "--unit_range=2/3 is at work, which divides the units in another way" in capsys.readouterr().err
        assert task(corpus, tmp_path / "out", 1) == 0
    with locked(work):
        assert task(corpus, tmp_path / "out", 2) == 1
    assert "another process is at work" in capsys.readouterr().err


def test_a_task_of_another_spec_is_refused(corpus, tmp_path, capsys):
    assert task(corpus, tmp_path / "out", 1) == 0
    options = byte_options(corpus, tmp_path / "out", engine="slurm", unit_range="2/3", shard_tokens=4000)
    assert run(*options) == 1
    assert "shard_tokens: 5000 there, 4000 asked for" in capsys.readouterr().err


def test_a_damaged_input_fails_its_task_alone_and_may_be_replaced(corpus, local, tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in corpus.glob("*.parquet"):
        (folder / path.name).write_bytes(path.read_bytes())
    good = (folder / "6.parquet").read_bytes()
    (folder / "6.parquet").write_bytes(good[:500] + bytes(200) + good[700:])  # its footer is whole
    assert task(folder, tmp_path / "out", 1) == 0
    assert task(folder, tmp_path / "out", 3) == 1
    assert "6.parquet" in capsys.readouterr().err
    (folder / "6.parquet").write_bytes(good)
    os.utime(folder / "6.parquet", (1, 1))
    assert task(folder, tmp_path / "out", 3) == 0
    assert finish(folder, tmp_path / "out") == 0
    shards = [name for name in local if name.startswith("fineweb")]
    assert {name: tree(tmp_path / "out")[name] for name in shards} == {name: local[name] for name in shards}


@pytest.fixture
def start():
    """Starts a command as a process, in a group that ends with the test."""
    started = []

    def start_one(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "data_prep.fineweb", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes, start_new_session=True))
        return started[-1]

    yield start_one
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_tasks_at_the_same_time_one_killed_and_repeated(tmp_path, capsys, start):
    """Real processes with workers of their own; the finishing command meanwhile is refused."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(12):
        write_parquet(corpus / f"{index}.parquet", words(3000, length=400))
    options = {"shard_tokens": 10**6, "num_workers": 2}
    assert run(*byte_options(corpus, tmp_path / "local", **options)) == 0
    output = tmp_path / "out"
    commands = [
        byte_options(corpus, output, **options, engine="slurm", unit_range=f"{index}/{NUM_TASKS}")
        for index in range(1, NUM_TASKS + 1)
    ]
    tasks = [start(*command) for command in commands]
    while not list(output.glob(".work/parts/*.json")):
        assert all(task.poll() is None for task in tasks)
        time.sleep(0.01)
    tasks[1].send_signal(signal.SIGKILL)
    os.killpg(tasks[0].pid, signal.SIGSTOP)  # it is still at work, however fast this machine is
    capsys.readouterr()
    assert run(*byte_options(corpus, output, **options, engine="slurm")) == 1
    assert "tasks are at work in this directory (--unit_range=1/3" in capsys.readouterr().err
    os.killpg(tasks[0].pid, signal.SIGCONT)
    results = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [0, -signal.SIGKILL, 0], results
    again = start(*commands[1])
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert run(*byte_options(corpus, output, **options, engine="slurm"), "--require_parts") == 0
    assert tree(output) == tree(tmp_path / "local")

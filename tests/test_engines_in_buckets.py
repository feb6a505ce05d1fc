"""Workers that share no disk prepare into a bucket: Dask's, and tasks of array jobs. Each has a TMPDIR of its own."""

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.bucket_datasets import fresh_scratch, objects  # noqa: F401
from support.conversion import converted
from support.dask_cluster import REPO, DaskProcesses
from support.prepared import byte_options, run, tree, words, write_parquet
from support.shared import made_once

from data_prep.engines.engine import Report
from data_prep.engines.locks import locked, shared
from data_prep.engines.remote import NotWanted, Unfit, do_job, problem_here
from data_prep.engines.tickets import BucketTicket, ticket_for
from data_prep.pages.progress import Done
from data_prep.store import buckets, files, leases

pytestmark = [
    pytest.mark.usefixtures("fresh_scratch", "patient"),
    pytest.mark.parametrize("bucket_server", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True),
]
TTL_SECS = 3.0
SIZES = {"shard_tokens": 60_000, "num_workers": 1}
SLOW = "support.slow_tokenizers:Slow"
NUM_TASKS = 3


@pytest.fixture
def patient(bucket_server, monkeypatch):
    """Two busy cores and a server in Python may be slow."""
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "10")
    monkeypatch.setenv("GPT_PRETRAIN_LEASE_SECS", str(TTL_SECS))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Six units."""

    def make(directory: Path) -> None:
        for index in range(6):
            write_parquet(directory / f"{index}.parquet", words(200, 100 + index))
        assert run(*byte_options(directory, directory / "out", **SIZES)) == 0

    return made_once(tmp_path_factory, "engines-in-buckets-corpus", make)


@pytest.fixture(scope="module")
def expected(corpus) -> dict[str, bytes]:
    """What the local engine makes in a local directory."""
    return tree(corpus / "out")


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command as a process with a TMPDIR of its own, in a group that ends with the test."""
    started, numbers = [], itertools.count()

    def start_one(*options: str) -> subprocess.Popen:
        temporary = tmp_path / f"command-{next(numbers)}"
        temporary.mkdir()
        environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": f"{REPO}:{REPO}/tests"}
        command = [sys.executable, "-m", "data_prep.fineweb", *options]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes, start_new_session=True, env=environment))
        return started[-1]

    yield start_one
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(is_so: Callable[[], bool], secs: float = 60) -> None:
    deadline = time.monotonic() + secs
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_puts(server, having: str) -> int:
    return sum(each.method in ("PUT", "POST") and having in each.path for each in list(server.proxy.seen))


def one_line(capsys) -> str:
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.count("\n") == 1, error
    return error


def dask_options(corpus: Path, output: str, cluster: DaskProcesses, **changes) -> list[str]:
    return byte_options(corpus, output, engine="dask", dask_scheduler=cluster.address, **(SIZES | changes))


def task_options(corpus: Path, output: str, index: int, num_tasks: int = NUM_TASKS, **changes) -> list[str]:
    return byte_options(corpus, output, engine="slurm", unit_range=f"{index}/{num_tasks}", **(SIZES | changes))


def finishing_options(corpus: Path, output: str, **changes) -> list[str]:
    return byte_options(corpus, output, engine="slurm", **(SIZES | changes))


@pytest.mark.slow
def test_workers_without_a_shared_disk_one_killed_give_the_bytes_of_the_local_engine(
    bucket_server, bucket, corpus, expected, tmp_path, capsys
):
    output = f"{bucket}/a"
    with DaskProcesses(tmp_path / "dask") as cluster:

        def kill() -> None:
            wait_until(lambda: num_puts(bucket_server, "-000000.json") > 0)
            cluster.workers[0].kill()

        thread = threading.Thread(target=kill)
        thread.start()
        assert run(*dask_options(corpus, output, cluster)) == 0
        thread.join()
        assert "is gone; its piece of work is done again" in capsys.readouterr().err
        assert cluster.workers[0].wait() == -signal.SIGKILL
        scratch_folders = [len(list((tmp_path / "dask" / f"tmp-{number}").iterdir())) for number in range(2)]
        assert scratch_folders[1] == 1, "the worker wrote in its own folder"
    assert objects(output) == expected


@pytest.mark.slow
def test_the_command_killed_and_a_worker_too_and_the_command_typed_again_elsewhere(
    bucket_server, bucket, tmp_path, start
):
    """Jobs of six seconds that say every 0.8 s what they have done."""
    for index in range(4):
        write_parquet(tmp_path / f"{index}.parquet", words(30, length=1000), rows_per_group=4)
    assert run(*byte_options(tmp_path, tmp_path / "local", **SIZES)) == 0
    output, paths = f"{bucket}/a", f"{REPO}:{REPO}/tests"
    with DaskProcesses(tmp_path / "dask", worker_path=paths) as cluster:
        options = dask_options(tmp_path, output, cluster, tokenizer=SLOW)
        command = start(*options)
        wait_until(lambda: num_puts(bucket_server, "-000000.json") > 0)
        time.sleep(1)  # both workers are at their next job
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()
        cluster.workers[0].kill()
        cluster.start_worker()
        again = start(*options)
        assert again.wait(120) == 0, again.stderr.read()
    named = {name: content for name, content in objects(output).items() if name.startswith("fineweb")}
    assert named == {name: content for name, content in tree(tmp_path / "local").items() if name in named}


@pytest.mark.slow
def test_conversion_on_a_cluster(bucket, words_dataset, tmp_path):
    assert converted(words_dataset, tmp_path / "local", formats="array_record") == 0
    with DaskProcesses(tmp_path / "dask") as cluster:
        options = {"engine": "dask", "dask_scheduler": cluster.address, "formats": "array_record"}
        assert converted(words_dataset, f"{bucket}/a", **options) == 0
    assert objects(f"{bucket}/a") == tree(tmp_path / "local")


@contextlib.contextmanager
def job_under_way(work: str, function: Callable[[object, Report], object]) -> Iterator[list]:
    """A command, in the block, and a job of it, as on a worker; gives its answer when it has one, perhaps later."""
    answers: list = []
    with locked(work) as hold, ticket_for(hold) as ticket:
        do = partial(do_job, ticket, "0", function, None, lambda done: None)
        threading.Thread(target=lambda: answers.append(do()), daemon=True).start()
        yield answers


def endless(begun: threading.Event) -> Callable[[object, Report], None]:
    def report_for_ever(job, report):
        begun.set()
        while True:
            report(Done())
            time.sleep(0.01)

    return report_for_ever


@pytest.mark.parametrize("then", ["gone", "another's"])
def test_jobs_of_a_command_that_is_gone_end_at_their_next_report(bucket, monkeypatch, then):
    monkeypatch.setattr(BucketTicket, "look_secs", 0.1)
    work, begun = f"{bucket}/a/.work", threading.Event()
    with job_under_way(work, endless(begun)) as answers:
        assert begun.wait(20) and not answers
        time.sleep(0.5)
        assert not answers
        if then == "another's":
            buckets.write(f"{work}/.lease", leases.Holder.this_process(TTL_SECS).to_bytes())
        else:
            buckets.remove(f"{work}/.lease")
    wait_until(lambda: bool(answers), secs=10)
    assert isinstance(answers[0], NotWanted)


def test_a_job_of_a_command_that_is_gone_puts_nothing_more(bucket):
    work, written, goes_on = f"{bucket}/a/.work", threading.Event(), threading.Event()

    def putting(job, report):
        buckets.write(f"{bucket}/a/first", b"1")
        written.set()
        assert goes_on.wait(20)
        buckets.write(f"{bucket}/a/second", b"2")

    with job_under_way(work, putting) as answers:
        assert written.wait(20)
    goes_on.set()
    wait_until(lambda: bool(answers), secs=10)
    assert isinstance(answers[0], NotWanted)
    assert set(objects(f"{bucket}/a")) == {"first"}
    with locked(work) as hold, ticket_for(hold) as ticket:
        assert do_job(ticket, "0", lambda job, report: 3, None, lambda done: None) == 3


def test_a_worker_that_does_not_reach_the_bucket_is_refused_in_one_line(bucket, bucket_server, monkeypatch):
    with locked(f"{bucket}/a/.work") as hold, ticket_for(hold) as ticket:
        assert problem_here(ticket) is None
        elsewhere = dataclasses.replace(ticket, sign=leases.Sign(f"{bucket}/b/.work/.lease", hold.sign.token))
        problem = problem_here(elsewhere)
        assert problem and problem.startswith(f"finds no lease of this command at {bucket}/b/.work/.lease: its")
        nowhere = dataclasses.replace(ticket, sign=leases.Sign(f"{bucket}-not-there/.lease", hold.sign.token))
        answer = do_job(nowhere, "0", lambda job, report: 3, None, lambda done: None)
        assert isinstance(answer, Unfit) and "there is no bucket" in str(answer) and "\n" not in str(answer)


@pytest.mark.slow
def test_tasks_at_the_same_time_one_killed_and_repeated(bucket_server, bucket, tmp_path, capsys, start, monkeypatch):
    """Real processes; the finishing command is refused meanwhile. Each text takes 0.2 s."""
    monkeypatch.syspath_prepend(f"{REPO}/tests")
    for index in range(3):
        write_parquet(tmp_path / f"{index}.parquet", words(10, length=1000), rows_per_group=2)
    assert run(*byte_options(tmp_path, tmp_path / "local", **SIZES, tokenizer=SLOW, val_tokens=0)) == 0
    output, options = f"{bucket}/a", {"tokenizer": SLOW, "val_tokens": 0}
    tasks = [start(*task_options(tmp_path, output, index, **options)) for index in (1, 2, 3)]
    wait_until(lambda: all(buckets.stat(f"{output}/.work/.lease-{index}-of-3") for index in (1, 2, 3)))
    tasks[1].send_signal(signal.SIGKILL)
    assert tasks[1].wait() == -signal.SIGKILL
    again = start(*task_options(tmp_path, output, 2, **options))
    capsys.readouterr()
    assert run(*finishing_options(tmp_path, output, **options)) == 1
    assert f"{output}: tasks are at work in this directory (--unit_range=" in one_line(capsys)
    results = [(each.wait(60), each.stderr.read()) for each in (tasks[0], tasks[2], again)]
    assert [status for status, _ in results] == [0, 0, 0], results
    assert run(*finishing_options(tmp_path, output, **options), "--require_parts") == 0
    assert objects(output) == tree(tmp_path / "local")


def test_tasks_one_after_the_other_and_the_finishing_command_give_the_bytes_of_the_local_engine(
    bucket, corpus, expected, capsys
):
    output = f"{bucket}/a"
    for index in (3, 1):
        assert run(*task_options(corpus, output, index)) == 0
    capsys.readouterr()
    assert run(*finishing_options(corpus, output), "--require_parts") == 1
    assert "2 of 6 units are not tokenized: 00003-000000 (" in one_line(capsys)
    assert run(*task_options(corpus, output, 2)) == 0
    assert run(*finishing_options(corpus, output), "--require_parts") == 0
    assert objects(output) == expected


def of_another_machine(url: str, **changes) -> None:
    """Leaves a lease whose holder nobody here can see."""
    holder = dataclasses.replace(leases.Holder.this_process(TTL_SECS), host="far-away", machine="other", **changes)
    buckets.write(url, holder.to_bytes())


@contextlib.contextmanager
def renewed(url: str) -> Iterator[None]:
    """A holder on another machine, alive while the block runs."""
    ends = threading.Event()

    def renew() -> None:
        for number in itertools.count():
            of_another_machine(url, num_renewals=number)
            if ends.wait(0.1):
                break

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def test_who_works_where_tasks_of_other_machines_are_at_work(bucket, corpus, capsys):
    output = f"{bucket}/a"
    with renewed(f"{output}/.work/.lease-2-of-3"):
        time.sleep(0.2)
        assert run(*finishing_options(corpus, output)) == 1
        assert f"{output}: tasks are at work in this directory (--unit_range=2/3)" in one_line(capsys)
        assert run(*task_options(corpus, output, 2)) == 1
        assert "another --unit_range=2/3 is using it (process " in one_line(capsys)
        assert run(*task_options(corpus, output, 2, num_tasks=4)) == 1
        assert "--unit_range=2/3 is at work, which divides the units in another way than 2/4" in one_line(capsys)
        assert run(*task_options(corpus, output, 1)) == 0
    with renewed(f"{output}/.work/.lease"):
        time.sleep(0.2)
        assert run(*task_options(corpus, output, 1)) == 1
        assert f"{output}: another process is at work in this directory" in one_line(capsys)


def test_a_task_of_a_lost_machine_is_waited_for_once_and_finds_out_if_it_was_only_silent(bucket, corpus, monkeypatch):
    output = f"{bucket}/a"
    monkeypatch.setenv("GPT_PRETRAIN_LEASE_SECS", "1.2")
    of_another_machine(f"{output}/.work/.lease-2-of-3", ttl_secs=1.2)
    with shared(f"{output}/.work", 1, 3) as silent, monkeypatch.context() as patch:
        patch.setattr(leases.Holder, "is_dead", False)
        patch.setattr(leases.Lease, "_renew", lambda *_, **__: None)
        time.sleep(0.5)
        began = time.monotonic()
        with locked(f"{output}/.work"):
            assert 1.1 <= time.monotonic() - began < 3
            assert set(objects(f"{output}/.work")) == {".lease"}
        patch.undo()
        with pytest.raises(leases.LeaseLost, match=r"was removed, or its \.lease-1-of-3 was"):
            wait_until(lambda: silent.confirm() is not None)


def test_tasks_of_another_spec_are_refused_also_when_they_begin_at_the_same_moment(bucket, corpus, capsys, monkeypatch):
    output, read_note, looked = f"{bucket}/a", files.read_note, []

    def and_another_begins(path):
        """Between the first look at what is there and the put, another task puts its own."""
        found = read_note(path)
        if path.endswith("spec.json") and not looked:
            looked.append(found)
            assert run(*task_options(corpus, output, 1)) == 0
        return found

    monkeypatch.setattr(files, "read_note", and_another_begins)
    assert run(*task_options(corpus, output, 2, shard_tokens=4000)) == 1
    assert looked == [None]
    assert "shard_tokens: 60000 there, 4000 asked for" in capsys.readouterr().err
    assert run(*task_options(corpus, output, 3)) == 0

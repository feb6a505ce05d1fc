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
from support.dask_cluster import REPO, DaskProcesses
from support.prepared import byte_options, run, tree, words, write_parquet
from support.shared import made_once

from data_prep.engines.engine import Report
from data_prep.engines.locks import locked
from data_prep.engines.remote import NotWanted, Unfit, do_job, problem_here
from data_prep.engines.tickets import BucketTicket, ticket_for
from data_prep.pages.progress import Done
from data_prep.store import buckets, leases

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


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
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
    wait_until(lambda: bool(answers))
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
    wait_until(lambda: bool(answers))
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

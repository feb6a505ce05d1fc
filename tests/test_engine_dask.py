"""A Dask cluster gives the bytes of this machine, whatever dies: a real scheduler and workers, as processes on loopback."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.conversion import converted
from support.dask_cluster import REPO, DaskProcesses
from support.prepared import byte_options, run, tree, words, write_parquet
from test_data_prep_kills import HEARS_CTRL_C

SIZES = {"shard_tokens": 400_000, "num_workers": 1}
TOKENIZERS = "support.slow_tokenizers"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Eight units."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(8):
        write_parquet(folder / f"{index}.parquet", words(1000, length=300))
    return folder


def dask_options(corpus: Path, output: Path, cluster: DaskProcesses, **changes) -> list[str]:
    return byte_options(corpus, output, engine="dask", dask_scheduler=cluster.address, **(SIZES | changes))


@contextlib.contextmanager
def once(output: Path, pattern: str, then) -> None:
    """Does something as soon as a file is in `output`, while the block runs."""

    def wait():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(output.glob(pattern)):
            time.sleep(0.001)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def one_line(capsys) -> str:
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.count("\n") == 1, error
    return error


def test_a_killed_worker_costs_its_job_and_the_bytes_are_those_of_the_local_engine(corpus, tmp_path, capsys):
    assert run(*byte_options(corpus, tmp_path / "local", **SIZES)) == 0
    with DaskProcesses(tmp_path / "dask") as cluster:
        with once(tmp_path / "out", ".work/parts/*.json", cluster.workers[0].kill):
            assert run(*dask_options(corpus, tmp_path / "out", cluster)) == 0
        assert "is gone; its piece of work is done again" in capsys.readouterr().err
        assert cluster.workers[0].wait() == -signal.SIGKILL
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.mark.slow
def test_no_scheduler_is_said_soon_in_one_line(corpus, tmp_path, capsys):
    start = time.monotonic()
    nobody = "tcp://127.0.0.1:9"
    assert run(*byte_options(corpus, tmp_path / "out", engine="dask", dask_scheduler=nobody)) == 1
    assert f"--dask_scheduler={nobody}: no Dask scheduler answers there" in one_line(capsys)
    assert time.monotonic() - start < 12
    assert not (tmp_path / "out").exists()


def test_workers_of_another_version_are_refused_in_one_line(corpus, tmp_path, capsys):
    shutil.copytree(REPO / "data_prep", tmp_path / "other" / "data_prep")
    with open(tmp_path / "other" / "data_prep" / "parts.py", "a") as file:
        file.write("# changed\n")
    with DaskProcesses(tmp_path / "dask", 1, worker_path=str(tmp_path / "other")) as cluster:
        assert run(*dask_options(corpus, tmp_path / "out", cluster)) == 1
    error = one_line(capsys)
    assert error.startswith("worker tcp://127.0.0.1:") and ": has data_prep " in error
    assert not list((tmp_path / "out").glob(".work/parts/*"))


@pytest.mark.slow
def test_workers_that_do_several_jobs_in_one_process_are_refused(corpus, tmp_path, capsys):
    with DaskProcesses(tmp_path / "dask", 1, num_threads=2) as cluster:
        assert run(*dask_options(corpus, tmp_path / "out", cluster)) == 1
    assert "start it with --nthreads 1" in one_line(capsys)


@pytest.mark.slow
def test_a_worker_killed_in_either_stage_and_one_that_comes_late(corpus, tmp_path):
    assert run(*byte_options(corpus, tmp_path / "local", **SIZES)) == 0
    with DaskProcesses(tmp_path / "dask") as cluster:

        def replaced():
            cluster.workers[0].kill()
            cluster.start_worker()

        with (
            once(tmp_path / "out", ".work/parts/*.partial", replaced),
            once(tmp_path / "out", "fineweb_train_000000.bin", cluster.workers[1].kill),
        ):
            assert run(*dask_options(corpus, tmp_path / "out", cluster)) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.mark.slow
def test_conversion_on_a_cluster(words_dataset, tmp_path):
    assert converted(words_dataset, tmp_path / "local", formats="array_record") == 0
    with DaskProcesses(tmp_path / "dask") as cluster:
        options = {"engine": "dask", "dask_scheduler": cluster.address, "formats": "array_record"}
        assert converted(words_dataset, tmp_path / "out", **options) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_of_the_workers(tmp_path):
    """Jobs of six seconds that say every 0.8 s what they have done."""
    for index in range(2):
        write_parquet(tmp_path / f"{index}.parquet", words(30, length=10**6), rows_per_group=4)
    paths = f"{REPO}:{REPO}/tests"
    with DaskProcesses(tmp_path / "dask", worker_path=paths) as cluster:
        options = dask_options(tmp_path, tmp_path / "out", cluster, tokenizer=f"{TOKENIZERS}:Slow")
        command = [sys.executable, "-c", HEARS_CTRL_C, *options]
        environment = os.environ | {"PYTHONPATH": paths}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
        while len(list(tmp_path.glob("out/.work/parts/*.partial"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 5
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert not list(tmp_path.glob("out/.work/parts/*"))  # the partial files went with their jobs
        assert all(worker.poll() is None for worker in cluster.workers)


@pytest.mark.slow
def test_a_unit_that_kills_every_worker_is_named_and_the_rest_is_kept(tmp_path, capsys, monkeypatch):
    for name, text in [("a", "good"), ("b", "deadly"), ("c", "good")]:
        (tmp_path / f"{name}.txt").write_text(text)
    with DaskProcesses(tmp_path / "dask", 6, worker_path=f"{REPO}:{REPO}/tests") as cluster:
        options = dask_options(tmp_path, tmp_path / "out", cluster, tokenizer=f"{TOKENIZERS}:Deadly", val_tokens=0)
        assert run(*options, f"--input={tmp_path}/*.txt") == 1
    error = capsys.readouterr().err
    assert "died again and again at the same piece of work" in error and f"{tmp_path}/b.txt" in error


@pytest.mark.slow
def test_a_scheduler_that_goes_away_is_said_and_the_same_command_continues(corpus, tmp_path, capsys):
    assert run(*byte_options(corpus, tmp_path / "local", **SIZES)) == 0
    with (
        DaskProcesses(tmp_path / "dask") as cluster,
        once(tmp_path / "out", ".work/parts/*.json", lambda: cluster.scheduler.kill()),
    ):
        assert run(*dask_options(corpus, tmp_path / "out", cluster)) == 1
    assert "the Dask scheduler is gone. What is complete is kept" in capsys.readouterr().err
    with DaskProcesses(tmp_path / "dask2") as cluster:
        assert run(*dask_options(corpus, tmp_path / "out", cluster)) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "local")

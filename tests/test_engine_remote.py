"""What jobs on other machines look at: the code, the disk, and whether anybody waits for them."""

import dataclasses
import fcntl
import threading
import time
from pathlib import Path

import pytest
from support.prepared import byte_options, run, words, write_parquet

from data_prep.engines import choice
from data_prep.engines.choice import EngineChoice
from data_prep.engines.locks import locked
from data_prep.engines.remote import NotWanted, Unfit, do_job, problem_here
from data_prep.engines.tickets import ticket_for
from data_prep.pages.progress import Done


@pytest.fixture
def hold(tmp_path):
    with locked(tmp_path / "out" / ".work") as hold:
        yield hold


def do(ticket, function, key="0"):
    return do_job(ticket, key, function, None, lambda done: None)


def test_a_job_of_another_version_is_refused_in_one_line(hold):
    with ticket_for(hold) as ticket:
        assert do(ticket, lambda job, report: 3) == 3
        for name in ("data_prep", "pyarrow"):
            other = tuple((each, "0" if each == name else version) for each, version in ticket.versions)
            answer = do(dataclasses.replace(ticket, versions=other), lambda job, report: 3)
            assert isinstance(answer, Unfit) and f"has {name} " in str(answer) and "\n" not in str(answer)
            assert "expected 0; install the same versions there" in str(answer)


def test_a_worker_that_does_not_see_the_work_directory_is_refused_in_one_line(hold, tmp_path):
    with ticket_for(hold) as ticket:
        moved = ticket.path.replace(str(tmp_path), str(tmp_path / "elsewhere"))
        problem = problem_here(dataclasses.replace(ticket, path=moved))
        assert problem and problem.startswith(f"does not see {hold.workers.parent};") and "\n" not in problem


def test_relative_paths_start_where_the_command_was_typed(hold, tmp_path, monkeypatch):
    with ticket_for(hold) as ticket:
        (tmp_path / "here").write_text("found")
        ticket = dataclasses.replace(ticket, directory=str(tmp_path))
        monkeypatch.chdir("/")
        assert do(ticket, lambda job, report: Path("here").read_text()) == "found"


def test_a_job_that_nobody_wants_does_not_begin_and_does_not_go_on(hold):
    begun = threading.Event()

    def endless(job, report):
        begun.set()
        while True:
            report(Done())
            time.sleep(0.01)

    answers = []
    with ticket_for(hold) as ticket:
        thread = threading.Thread(target=lambda: answers.append(do(ticket, endless)))
        thread.start()
        assert begun.wait(10)
        start = time.monotonic()
    assert time.monotonic() - start < 5  # left when the job has ended
    thread.join()
    assert isinstance(answers[0], NotWanted) and isinstance(do(ticket, endless), NotWanted)


def test_jobs_of_a_killed_command_end_when_the_next_one_begins(tmp_path):
    work = tmp_path / "out" / ".work"
    with locked(work) as hold:
        with ticket_for(hold) as ticket:
            pass
        Path(ticket.path).touch()  # what a kill leaves
    with locked(work):
        assert isinstance(do(ticket, lambda job, report: 3), NotWanted)


def test_copies_of_a_job_take_turns(hold):
    inside, most, answers = [], [], []

    def job_function(job, report):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return len(most)

    with ticket_for(hold) as ticket:
        threads = [threading.Thread(target=lambda: answers.append(do(ticket, job_function))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4 and all(isinstance(each, int) for each in answers)
    assert max(most[:2]) == 1
    assert not list(hold.workers.parent.glob("workers.lock.*"))


def test_what_a_job_raises_is_its_answer(hold):
    def failing(job, report):
        raise ValueError("no")

    with ticket_for(hold) as ticket:
        answer = do(ticket, failing)
    assert isinstance(answer, ValueError) and str(answer) == "no"


def test_a_disk_without_locks_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def no_locks(file, kind):
        raise OSError(38, "Function not implemented")

    write_parquet(tmp_path / "a.parquet", words(100))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(*byte_options(tmp_path, tmp_path / "out")) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert "this disk has no locks" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dask"}, "--engine=dask: say which, by --dask_scheduler=tcp://HOST:8786"),
        ({"dask_scheduler": "tcp://h:1"}, "--dask_scheduler=tcp://h:1: is of --engine=dask, found --engine=local"),
        ({"engine": "beam"}, "--engine=beam: say which, by --beam_options="),
        ({"engine": "slurm", "beam_options": "-x"}, "--beam_options=-x: is of --engine=beam, found --engine=slurm"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, capsys, options, message):
    write_parquet(tmp_path / "a.parquet", words(100))
    assert run(*byte_options(tmp_path, tmp_path / "out", **options)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'gpt-pretrain\[dask\]'$"):
        EngineChoice("dask", dask_scheduler="tcp://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"pip install 'gpt-pretrain\[beam\]'$"):
        EngineChoice("beam", beam_options="--runner=DirectRunner")

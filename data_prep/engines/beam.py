"""Jobs as pipelines of Apache Beam, on any of its runners: an element is a job, with a key of its own.

Beam gives nothing back, so results come over the disk that all workers see, as files with a keyed
digest: they are unpickled where they are ours. The pipeline runs in a process of its own, as some of
Beam's runners can neither be interrupted nor notice that a worker died.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
    PipelineOptions,
    StandardOptions,
)
from blake3 import blake3

from data_prep.engines.engine import MAX_TRIES, POLL_SECS, Job, Report, Result, WorkerDied
from data_prep.engines.locks import Hold
from data_prep.engines.remote import NotWanted, Unfit, do_job, name_here, problem_here
from data_prep.engines.tickets import Ticket, ticket_for
from data_prep.pages.progress import Done, Progress

WAVE_JOBS = 10_000  # in one pipeline: results of earlier ones may show that no more are needed
END_SECS = 120  # that a pipeline has to end after its last job
CANCEL_SECS = 10
LOG_NAME = "beam.log"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class _Work:
    """The jobs of a pipeline, as its workers find them."""

    ticket: Ticket
    folder: str  # with the file of jobs, and the results
    key: bytes  # of the results' digests

    @property
    def jobs(self) -> Path:
        return Path(self.folder, "jobs")

    @property
    def results(self) -> Path:
        return Path(self.folder, "results")

    @property
    def refused(self) -> Path:
        return Path(self.folder, "refused")


@dataclass(frozen=True)
class _Element:
    """Where a job is in the file of jobs."""

    number: int
    offset: int
    length: int
    digest: bytes


class BeamPipelines:
    """Beam's workers, a pipeline for each `run`, or for each WAVE_JOBS of its jobs.

    Args:
      options: of Beam's own, as one would type them.
      hold: as `locks.locked` gave it, of a directory on a disk.
    """

    def __init__(self, options: str, hold: Hold):
        assert hold.workers is not None
        self._options, self._hold, self._folder = options, hold, hold.workers.parent

    def __enter__(self) -> "BeamPipelines":
        return self

    def __exit__(self, *_: Any) -> None:
        pass  # a pipeline ends with its `run`

    def run(
        self, function: Callable[[Job, Report], Result], jobs: Iterable[Job], progress: Progress
    ) -> Generator[tuple[Job, Result | Exception], None, None]:
        """As `Engine.run`; progress is by whole jobs."""
        jobs = iter(jobs)
        while wave := list(itertools.islice(jobs, WAVE_JOBS)):
            with ticket_for(self._hold) as ticket, _folder(self._folder / "beam" / ticket.name) as folder:
                work = _Work(ticket, str(folder), secrets.token_bytes(32))
                yield from self._run_wave(work, function, dict(enumerate(wave)), progress)

    def _run_wave(
        self, work: _Work, function: Any, left: dict[int, Any], progress: Progress
    ) -> Generator[tuple[Any, Any], None, None]:
        tries = 0
        elements = _write_jobs(work, function, left)
        log = self._folder / LOG_NAME
        while left:
            num_before = len(left)
            pipeline = _start(self._options, [each for each in elements if each.number in left], work, log)
            try:
                is_running = True
                while left and is_running:
                    is_running = pipeline.is_alive()
                    for number, done, answer in _new_results(work, left):
                        progress.add(done)
                        yield left.pop(number), answer
                    if left and is_running:
                        pipeline.join(POLL_SECS)
                pipeline.join(END_SECS)
            finally:
                _end(pipeline)
            if work.refused.exists():
                raise Unfit(work.refused.read_text())
            if left:
                tries = tries + 1 if len(left) == num_before else 1
                what = f"the Beam pipeline ended before {len(left):,} of its jobs did (see {log})"
                if tries == MAX_TRIES:
                    raise WorkerDied(
                        f"{what}, {MAX_TRIES} times, the next being {next(iter(left.values()))}. What is complete is "
                        "kept: run the same command again."
                    )
                print(f"{what}; they are done again", file=sys.stderr, flush=True)


def require_runner(options: str) -> None:
    """ValueError where Beam has no such runner."""
    name = PipelineOptions(shlex.split(options)).view_as(StandardOptions).runner
    try:
        beam.runners.runner.create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"--beam_options={options}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # a copy of a job may write to it still


def _write_jobs(work: _Work, function: Any, jobs: Mapping[int, Any]) -> list[_Element]:
    """All jobs in one file: a pipeline's own size is limited."""
    work.results.mkdir()
    elements, offset = [], 0
    with open(work.jobs, "wb") as file:
        for number, job in jobs.items():
            content = pickle.dumps((function, job))
            file.write(content)
            elements.append(_Element(number, offset, len(content), blake3(content).digest()))
            offset += len(content)
    return elements


def _new_results(work: _Work, left: Mapping[int, Any]) -> Iterator[tuple[int, Done, Any]]:
    for name in os.listdir(work.results):
        if name.isdigit() and int(name) in left:
            content = (work.results / name).read_bytes()
            digest, pickled = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if not secrets.compare_digest(digest, blake3(pickled, key=work.key).digest()):
                raise ValueError(f"{work.results / name}: not what a worker of ours wrote; who else writes there?")
            yield int(name), *pickle.loads(pickled)


class _DoJob(beam.DoFn):
    """On a worker: does a job, and leaves its result."""

    def __init__(self, work: _Work):
        self._work = work

    def process(self, element: _Element) -> Iterator[int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        work, total = self._work, Done()
        if problem := problem_here(work.ticket):
            raise Unfit(f"worker {name_here()}: {problem}")
        with open(work.jobs, "rb") as file:
            file.seek(element.offset)
            content = file.read(element.length)
        if blake3(content).digest() != element.digest:
            raise ValueError(f"{work.jobs}: is not what the command wrote")
        function, job = pickle.loads(content)

        def report(done: Done) -> None:
            nonlocal total
            total += done

        answer = do_job(work.ticket, str(element.number), function, job, report)
        if isinstance(answer, NotWanted):
            return
        pickled = pickle.dumps((total, answer))
        partial = work.results / f".{element.number}.{uuid.uuid4().hex}"  # copies of a job may end at once
        partial.write_bytes(blake3(pickled, key=work.key).digest() + pickled)
        os.replace(partial, work.results / str(element.number))
        yield element.number


def _start(options: str, elements: Sequence[_Element], work: _Work, log: Path) -> BaseProcess:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_pipeline, args=(options, list(elements), work, str(log)))
    process.start()
    return process


def _end(pipeline: BaseProcess) -> None:
    """Cancels a pipeline that runs, and ends what it started on this machine."""
    if pipeline.is_alive():
        pipeline.terminate()
        pipeline.join(CANCEL_SECS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        assert pipeline.pid is not None
        os.killpg(pipeline.pid, signal.SIGKILL)  # its session: workers of a local runner
    pipeline.kill()
    pipeline.join()


def _run_pipeline(options: str, elements: list[_Element], work: _Work, log: str) -> None:
    """The process of a pipeline."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to handle
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.excepthook = _end_with_thread
    result: Any = None

    def cancel(*_: Any) -> None:
        if result is not None:
            with contextlib.suppress(Exception):
                result.cancel()
        os._exit(1)

    signal.signal(signal.SIGTERM, cancel)
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(shlex.split(options)))
        _ = (
            pipeline
            | "Jobs" >> beam.Create([(str(element.number), element) for element in elements])
            | "Spread" >> beam.Reshuffle()
            | "Without keys" >> beam.Values()
            | "Do" >> beam.ParDo(_DoJob(work))
        )
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:
        if refused := re.search(r"worker [\w.-]+:\d+: (?:has|does not see) [^\n\[]*", str(error)):
            work.refused.write_text(refused[0].strip())
        raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _end_with_thread(problem: Any) -> None:
    """A local runner whose worker died raises in a thread, and then waits for ever."""
    print(problem.exc_type, problem.exc_value, file=sys.stderr, flush=True)
    time.sleep(0.1)
    os._exit(1)

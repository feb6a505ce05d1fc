"""Where jobs run: in this process, or in several processes of this machine.

A job is a frozen dataclass; the function that does it is `function(job, report)`, where
`report(documents, tokens, text_bytes, work)` says what was done since the last call.
"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from data_prep.progress import NUM_COUNTS, Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, int, int, int], None]

POLL_SECS = 0.5


LOCK, WORKERS_LOCK = "lock", "workers.lock"


class WorkerDied(RuntimeError):
    """A worker process ended without an answer."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one process at a time works in `directory`, which is made if need be.

    The lock ends with the process, however it ends. The workers of a killed process end within
    moments; entering waits for them, so that they don't write into files that are ours now.

    Raises ValueError when another process has the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "w") as own, open(directory / WORKERS_LOCK, "w") as workers:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{directory.parent}: another process is at work in this directory. Wait for it, "
                "or use another directory."
            ) from None
        fcntl.flock(workers, fcntl.LOCK_EX)
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


def run(
    function: Callable[[Job, Report], Result],
    jobs: Iterable[Job],
    num_workers: int,
    progress: Progress,
    directory: Path,
) -> Generator[tuple[Job, Result | Exception], None, None]:
    """Does every job; gives (job, result or exception) in order of completion.

    Jobs are taken from the iterable as workers become free, a few ahead, so it may be long, and
    may end early depending on the results seen so far. Closing the generator early ends the
    workers. Raises WorkerDied when one was killed.

    `directory` is the one that `locked` was given.
    """
    if num_workers == 1:
        yield from _run_here(function, jobs, progress)
    else:
        yield from _run_in_processes(function, jobs, num_workers, progress, directory)


def _run_here(function, jobs, progress):
    for job in jobs:
        try:
            result = function(job, progress.add)
        except Exception as error:
            result = error
        yield job, result


def _run_in_processes(function, jobs, num_workers, progress, directory):
    # Spawned, not forked: a fork of a process with threads (fsspec has one) can deadlock.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", NUM_COUNTS)
    before = list(progress.counts)
    initargs = (counters, directory / WORKERS_LOCK)
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, initargs)
    jobs = iter(jobs)
    running: dict[Future, Any] = {}
    finished = False
    try:
        while True:
            while len(running) < 2 * num_workers and (job := next(jobs, None)) is not None:
                running[executor.submit(_call, function, job)] = job
            if not running:
                break
            done, _ = wait(running, POLL_SECS, FIRST_COMPLETED)
            progress.set([a + b for a, b in zip(before, counters[:], strict=True)])
            for future in done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise WorkerDied(
                        "a worker process was killed (out of memory?). What is complete is kept: "
                        "run the same command again, perhaps with a smaller --num_workers."
                    )
                answer = error if isinstance(error, Exception) else future.result()
                yield running.pop(future), answer
        finished = True
    finally:
        if not finished:
            for process in list((executor._processes or {}).values()):
                process.kill()  # outputs appear whole or not at all: nothing is lost but time
        executor.shutdown(cancel_futures=True)


_counters: Any = None  # one per worker process: shared memory can only come in at its start
_lock: Any = None  # open as long as the worker lives


def _start_worker(counters, lock_path: Path) -> None:
    global _counters, _lock
    _counters = counters
    _lock = open(lock_path, "w")  # noqa: SIM115
    fcntl.flock(_lock, fcntl.LOCK_SH)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers outlive a parent that was killed, and write into files of the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(function, job):
    return function(job, _report)


def _report(*counts: int) -> None:
    with _counters.get_lock():
        for index, count in enumerate(counts):
            _counters[index] += count

"""Jobs in this process, or in several processes of this machine."""

import collections
import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from data_prep.engines.engine import MAX_TRIES, POLL_SECS, Job, Report, Result, died_again
from data_prep.pages.progress import Done, Progress
from data_prep.store.scratch import share


def all_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Processes that do jobs; started when they are first needed and kept until the end.

    As a context manager, so that they end however the work ends. With `num_workers` 1 the jobs are
    done in this process.

    Args:
      lock: the file that `locks.locked` gives for workers; None where jobs write nothing.
    """

    def __init__(self, num_workers: int, lock: Path | None = None):
        self._num_workers = num_workers
        self._lock = lock
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:  # outputs appear whole or not at all: nothing is lost but time
            worker.kill()
        self._workers = []

    def run(
        self, function: Callable[[Job, Report], Result], jobs: Iterable[Job], progress: Progress
    ) -> Generator[tuple[Job, Result | Exception], None, None]:
        """As `Engine.run`. Each worker takes the next job when it is free, so slow jobs hold up nobody."""
        if self._num_workers <= 1:
            for job in jobs:
                try:
                    result = function(job, progress.add)
                except Exception as error:
                    result = error
                yield job, result
            return
        jobs = iter(jobs)
        again: collections.deque[Job] = collections.deque()  # jobs of killed workers
        tries: collections.Counter[Job] = collections.Counter()
        try:
            while True:
                while (worker := self._idle()) and (job := _next(again, jobs)) is not None:
                    worker.start(function, job)
                busy = {w.connection: w for w in self._workers if w.job is not None}
                if not busy:
                    break
                for ready in connection.wait(list(busy), POLL_SECS):
                    worker = busy[ready]  # type: ignore[index]
                    try:
                        kind, value = worker.connection.recv()
                    except (EOFError, OSError):
                        self._end(worker)
                        progress.add(-worker.done)
                        _lost(worker, tries)
                        again.append(worker.job)
                        continue
                    if kind == "done":
                        worker.done += value
                        progress.add(value)
                    else:
                        job, worker.job = worker.job, None
                        yield job, value
        finally:
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._end(worker)

    def _idle(self) -> "_Worker | None":
        """A worker with nothing to do, started if there may be one more."""
        for worker in self._workers:
            if worker.job is None:
                return worker
        if len(self._workers) == self._num_workers:
            return None
        self._workers.append(_Worker(self._lock))
        return self._workers[-1]

    def _end(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """A process, the job that it does, and what it has reported of it."""

    def __init__(self, lock: Path | None):
        share()
        # Spawned, not forked: a fork of a process with threads (fsspec has one) can deadlock.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, lock), daemon=True)
        self.process.start()
        theirs.close()  # so that reading ends when the worker does
        self.job: Any = None
        self.done = Done()  # of the job

    def start(self, function, job) -> None:
        self.job, self.done = job, Done()
        # A worker that is dead already is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((function, job))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _next(again, jobs):
    return again.popleft() if again else next(jobs, None)


def _lost(worker: _Worker, tries: collections.Counter) -> None:
    """Says that a worker was killed, or raises if that happens to this job every time."""
    tries[worker.job] += 1
    code = worker.process.exitcode
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
    what = f"a worker process was ended {how}" + (" (out of memory?)" if code == -9 else "")
    if tries[worker.job] == MAX_TRIES:
        raise died_again(what, worker.job, "perhaps with a smaller --num_workers")
    print(f"{what}; its piece of work is done again", file=sys.stderr, flush=True)


def _work(pipe, lock_path: str | None) -> None:
    """Main loop of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(lock_path, "w") if lock_path else contextlib.nullcontext() as lock:
        if lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # held for as long as this process lives

        def report(done: Done) -> None:
            pipe.send(("done", done))

        while True:
            function, job = pipe.recv()
            try:
                answer = function(job, report)
            except Exception as error:
                answer = error
            pipe.send(("answer", answer))


def _end_with_parent() -> None:
    """Without this, workers outlive a parent that was killed, and write into files of the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)

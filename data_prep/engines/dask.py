"""Jobs on a Dask cluster that runs already, named by the address of its scheduler."""

import itertools
import logging
import queue
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import distributed
from distributed.client import FutureCancelledError

from data_prep.engines.engine import POLL_SECS, Job, Report, Result, WorkerDied
from data_prep.engines.locks import Hold
from data_prep.engines.remote import NotWanted, Unfit, do_job, problem_here
from data_prep.engines.tickets import Ticket, ticket_for
from data_prep.pages.progress import Done, Progress

CONNECT_SECS = 5
WORKERS_SECS = 30  # to wait for the first worker of a cluster that is starting
REPORT_SECS = 1.0
KEPT = "What is complete is kept: run the same command again"


@dataclass
class _Running:
    """A job that was sent, and what is known of it."""

    job: Any
    future: distributed.Future
    done: Done = field(default_factory=Done)


class DaskCluster:
    """The workers of a Dask scheduler.

    Args:
      scheduler: its address, such as tcp://host:8786.
      hold: as `locks.locked` gave it.

    Raises ValueError on entering: no scheduler answers, it has no workers, or they don't fit.
    """

    def __init__(self, scheduler: str, hold: Hold):
        self._scheduler, self._hold = scheduler, hold
        self._client: Any = None
        self._known: set[str] = set()  # addresses of workers

    def __enter__(self) -> "DaskCluster":
        self._client = _connect(self._scheduler)
        try:
            self._wait_for_workers()
            with ticket_for(self._hold) as ticket:
                self._require_fit(ticket)
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._client.close()

    def run(
        self, function: Callable[[Job, Report], Result], jobs: Iterable[Job], progress: Progress
    ) -> Generator[tuple[Job, Result | Exception], None, None]:
        """As `Engine.run`."""
        jobs, numbers = iter(jobs), itertools.count()
        running: dict[str, _Running] = {}
        events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        with ticket_for(self._hold) as ticket, self._reports(ticket, events):
            try:
                while True:
                    while len(running) < self._num_slots() and (job := next(jobs, None)) is not None:
                        key = f"{ticket.name}-{next(numbers)}"
                        future = self._client.submit(_do, ticket, key, function, job, key=key, pure=False)
                        running[key] = _Running(job, future)
                        future.add_done_callback(lambda future: events.put(("answer", future.key)))
                    if not running:
                        break
                    try:
                        kind, value = events.get(timeout=POLL_SECS)
                    except queue.Empty:
                        self._require_scheduler()
                        continue
                    key, done = value if kind == "done" else (value, None)
                    if key not in running:
                        continue
                    if done is None:
                        sent = running.pop(key)
                        done, answer = self._answer(sent, ticket)
                        progress.add(done + -sent.done)
                        yield sent.job, answer
                    else:
                        progress.add(done + -running[key].done)
                        running[key].done = done
            finally:
                if running and self._client.status == "running":
                    self._client.cancel([sent.future for sent in running.values()], force=True)

    def _answer(self, sent: _Running, ticket: Ticket) -> tuple[Done, Any]:
        try:
            done, answer = sent.future.result()
        except distributed.KilledWorker:
            raise WorkerDied(
                f"Dask workers died again and again at the same piece of work ({sent.job}). {KEPT}, perhaps with "
                "more memory for each worker."
            ) from None
        except (FutureCancelledError, distributed.CancelledError, OSError):
            raise WorkerDied(f"{self._scheduler}: the Dask scheduler is gone. {KEPT}.") from None
        if isinstance(answer, NotWanted):  # although it is
            self._hold.confirm()  # a lost lease says more
            raise Unfit(f"worker {answer}: {ticket.unseen()}")
        if isinstance(answer, Unfit):
            raise answer
        return done, answer

    def _workers(self) -> dict[str, Any]:
        return self._client.scheduler_info(n_workers=-1)["workers"]

    def _num_slots(self) -> int:
        """How many jobs may be sent: one for each worker, so that one that dies costs one. Says who is gone."""
        there = set(self._workers())
        for address in sorted(self._known - there):
            print(f"the Dask worker {address} is gone; its piece of work is done again", file=sys.stderr, flush=True)
        self._known = there
        return max(1, len(there))

    def _require_scheduler(self) -> None:
        if self._client.status not in ("running", "connecting"):
            raise WorkerDied(f"{self._scheduler}: the Dask scheduler is gone. {KEPT}.")

    def _wait_for_workers(self) -> None:
        give_up = time.monotonic() + WORKERS_SECS
        while not self._client.nthreads():
            if time.monotonic() > give_up:
                raise ValueError(
                    f"--dask_scheduler={self._scheduler}: has no workers. Start some: dask worker {self._scheduler} "
                    "--nthreads 1"
                )
            time.sleep(POLL_SECS)

    def _require_fit(self, ticket: Ticket) -> None:
        """Unfit where a worker that is there is of no use to us. Those that come later are asked with each job."""
        many = [address for address, threads in self._client.nthreads().items() if threads != 1]
        if many:
            raise Unfit(f"worker {many[0]}: does several jobs in one process; start it with --nthreads 1")
        found = self._client.run(problem_here, ticket, on_error="return")
        for address, problem in sorted(found.items()):
            if isinstance(problem, Exception):
                problem = f"has no data_prep like ours ({problem}); install the same version there"
            if problem:
                raise Unfit(f"worker {address}: {problem}")
        self._known = set(found)

    @contextmanager
    def _reports(self, ticket: Ticket, events: queue.SimpleQueue) -> Iterator[None]:
        """What workers say of jobs that they are doing, as events."""

        def heard(event: Any) -> None:
            _, (key, *numbers) = event
            events.put(("done", (key, Done(*numbers))))

        self._client.subscribe_topic(ticket.name, heard)
        try:
            yield
        finally:
            if self._client.status == "running":
                self._client.unsubscribe_topic(ticket.name)


def require_scheduler(scheduler: str) -> None:
    """ValueError, soon, where no scheduler answers."""
    _connect(scheduler).close()


def _connect(scheduler: str) -> Any:
    # What it logs are stack traces of what we say in a line.
    for name in ("distributed", "distributed.client", "distributed.core", "distributed.comm"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return distributed.Client(scheduler, timeout=CONNECT_SECS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"--dask_scheduler={scheduler}: no Dask scheduler answers there ({' '.join(str(error).split())}). Is it "
            "running, and is this machine let through to it?"
        ) from None


def _do(ticket: Ticket, key: str, function: Any, job: Any) -> tuple[Done, Any]:
    """On a worker: what was done in all, and the job's result or exception."""
    worker, total, told = distributed.get_worker(), Done(), 0.0

    def report(done: Done) -> None:
        nonlocal total, told
        total += done
        if time.monotonic() - told > REPORT_SECS:
            told = time.monotonic()
            worker.log_event(ticket.name, (key, *astuple(total)))

    answer = do_job(ticket, key, function, job, report)
    return total, answer

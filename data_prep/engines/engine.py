"""What an engine is: something that does jobs, in this process, on this machine or on many.

A job is a frozen dataclass; the function that does it is `function(job, report)`, where
`report(Done(...))` says what was done since the last call. A function is pure and idempotent: files
that it writes are whole or absent, so a job may be done again wherever its worker was killed.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, Self, TypeVar

from data_prep.pages.progress import Done, Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[Done], None]

POLL_SECS = 0.5
MAX_TRIES = 3  # of a job whose worker was killed


class WorkerDied(RuntimeError):
    """Workers were killed again and again at the same job, or what started them is gone."""


class Engine(Protocol):
    """Jobs in, results out. As a context manager, so that workers end however the work ends."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...

    def run(
        self, function: Callable[[Job, Report], Result], jobs: Iterable[Job], progress: Progress
    ) -> Generator[tuple[Job, Result | Exception], None, None]:
        """Does every job; gives (job, result or exception) in order of completion.

        The iterable may be long, and may end early depending on the results seen so far. A worker
        that is killed costs its job only, which another one does again. Closing the generator
        early ends the jobs that are being done.

        Raises WorkerDied when MAX_TRIES workers were killed at one job.
        """
        ...


def died_again(what: str, job: Any, advice: str) -> WorkerDied:
    """The error for a job whose workers were killed MAX_TRIES times."""
    return WorkerDied(
        f"{what}, {MAX_TRIES} times at the same piece of work ({job}). What is complete is kept: run the same "
        f"command again, {advice}."
    )

"""What jobs on other machines need: the same code, the same disk or bucket, and to end when nobody wants them any more.

A cluster may do a job twice at once (a worker that it thinks dead, a copy of a slow one), and goes on with jobs
whose command was killed. So a job looks for its *ticket* (tickets.py) before it begins, while it works, and before it
puts an object. On a disk it holds the lock of `locks.locked` meanwhile, and copies of a job take turns.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from data_prep.engines.engine import Report
from data_prep.engines.tickets import Ticket, versions
from data_prep.pages.progress import Done
from data_prep.store.buckets import asked_before_puts


class Unfit(ValueError):
    """A worker that cannot do our jobs: other code, another disk, or no way to the bucket."""


class NotWanted(Exception):
    """Nobody waits for the job's result."""


def problem_here(ticket: Ticket) -> str | None:
    """Why this process cannot do jobs of `ticket`; None where it can."""
    for (name, wanted), (_, here) in zip(ticket.versions, versions(), strict=True):
        if wanted != here:
            return f"has {name} {here}, expected {wanted}; install the same versions there"
    with _where_paths_start(ticket):
        return ticket.problem()


def do_job(ticket: Ticket, key: str, function: Callable[[Any, Report], Any], job: Any, report: Report) -> Any:
    """The job's result, or the exception that it raised, as a value.

    Args:
      key: the job's, the same for all copies of it.
    """
    looked = 0.0

    def report_if_wanted(done: Done) -> None:
        nonlocal looked
        report(done)
        if time.monotonic() - looked > ticket.look_secs:
            looked = time.monotonic()
            require_wanted()

    def require_wanted() -> None:
        if not ticket.is_wanted():
            raise NotWanted(name_here())

    try:
        if problem := problem_here(ticket):
            return Unfit(f"worker {name_here()}: {problem}")
        with _where_paths_start(ticket), ticket.at_work(key), asked_before_puts(require_wanted):
            require_wanted()
            return function(job, report_if_wanted)
    except Exception as error:
        return error


def name_here() -> str:
    """This process, for messages."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _where_paths_start(ticket: Ticket) -> contextlib.AbstractContextManager:
    """The directory in which the command was typed, where this machine has it."""
    return contextlib.chdir(ticket.directory) if os.path.isdir(ticket.directory) else contextlib.nullcontext()

"""Closing what has threads of its own: patiently where all went well, within seconds after an error."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)


class Closes(Protocol):
    """Anything with `close()`."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closes)


@contextlib.contextmanager
def closing(
    thing: T, *, patience_secs: float = 3.0, progress: Callable[[], int] = lambda: 0, poll_secs: float = 0.5
) -> Iterator[T]:
    """Like `contextlib.closing`, but after an error gives up on what does not close.

    Args:
      progress: a number that changes as long as closing gets somewhere: then it has more time.
    """
    try:
        yield thing
    except BaseException:
        _close_or_give_up(thing, patience_secs, progress, poll_secs)
        raise
    thing.close()


def _close_or_give_up(thing: Closes, patience_secs: float, progress: Callable[[], int], poll_secs: float) -> None:
    def close() -> None:
        try:
            thing.close()
        except Exception as error:  # the one that we are leaving for says more
            log.debug("%s could not be closed: %s", type(thing).__name__, error)

    thread = threading.Thread(target=close, daemon=True, name=f"closing-{type(thing).__name__}")
    thread.start()
    found, deadline = progress(), time.monotonic() + patience_secs
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(poll_secs)
        if found != (found := progress()):
            deadline = time.monotonic() + patience_secs

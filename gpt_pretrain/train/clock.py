"""How fast a run trains."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Tokens per second of training: evaluation, checkpoints and the first step (compilation) don't count."""

    def __init__(self):
        self._start: float | None = None
        self._paused = 0.0
        self._tokens = 0
        self.tokens_per_sec: float | None = None

    def step_done(self, num_tokens: int) -> None:
        """A step of that many tokens has finished."""
        if self._start is None:
            self._start, self._paused = time.monotonic(), 0.0
        else:
            self._tokens += num_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block is not training."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def lap(self) -> float | None:
        """The rate since the last lap, or the last one known if no step was timed since."""
        now = time.monotonic()
        if self._tokens and self._start is not None:
            self.tokens_per_sec = self._tokens / max(now - self._start - self._paused, 1e-9)
            self._start, self._paused, self._tokens = now, 0.0, 0
        return self.tokens_per_sec

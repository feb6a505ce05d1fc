"""How far the work is: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from dataclasses import dataclass
from typing import TextIO

from data_prep.pages.numbers import duration

LINE_SECS = 5.0
BAR_SECS = 0.2


@dataclass(frozen=True)
class Done:
    """What was done, or undone.

    >>> Done(tokens=3, work=6) + Done(tokens=1, work=2)
    Done(documents=0, tokens=4, text_bytes=0, work=8)
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    work: int = 0  # in the unit of the whole: bytes of input, tokens, rows, ...

    def __add__(self, other: "Done") -> "Done":
        return Done(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.work + other.work,
        )

    def __neg__(self) -> "Done":
        return Done(-self.documents, -self.tokens, -self.text_bytes, -self.work)


class Progress:
    """What is done of one stage, and its share of the whole.

    Args:
      stage: a word for it.
      total_work: how much there is to do.
      in_tokens: `total_work` is in tokens, not in the work that jobs report.
    """

    def __init__(
        self,
        stage: str,
        total_work: int,
        *,
        in_tokens: bool = False,
        stream: TextIO | None = None,
    ):
        self.stage = stage
        self.total_work = total_work
        self._in_tokens = in_tokens
        self.done = Done()
        self._stream = stream or sys.stderr
        self._start = self._shown = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            bar_format = "{percentage:3.0f}%|{bar:24}| {desc}"
            self._bar = tqdm(total=total_work, desc=stage, bar_format=bar_format, file=self._stream)

    def add(self, done: Done) -> None:
        """Adds to what is done."""
        self.set(self.done + done)

    def skip(self, work: int) -> None:
        """Takes out work that an earlier run did, so that the time left is not too hopeful."""
        self.total_work -= work

    def set(self, done: Done) -> None:
        """Replaces what is done, and shows it if it is time."""
        self.done = done
        now = time.monotonic()
        if now - self._shown < (BAR_SECS if self._bar is not None else LINE_SECS):
            return
        self._shown = now
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.total = max(1, self.total_work)
            self._bar.n = self.work_done()
            self._bar.set_description_str(f"{self.stage}: {self.line()}", refresh=True)
            return
        line = f"{self.stage}: {self.percent():.0f}%, {self.line()}"
        print(line, file=self._stream, flush=True)

    def work_done(self) -> int:
        """In the unit of `total_work`."""
        return min(self.done.tokens if self._in_tokens else self.done.work, self.total_work)

    def percent(self) -> float:
        """Share of the work that is done, in percent."""
        return 100 * self.work_done() / max(1, self.total_work)

    def line(self) -> str:
        """12,345 documents, 9.9 M tokens, 8.1 MB/s, 1:23 left"""
        done, work = self.done, self.work_done()
        seconds = self.seconds()
        parts = [f"{done.documents:,} documents"] if done.documents else []
        parts += [f"{done.tokens / 1e6:,.1f} M tokens", f"{done.text_bytes / 1e6 / seconds:.1f} MB/s"]
        if work:
            left = (self.total_work - work) * seconds / work
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def seconds(self) -> float:
        """Since it began; more than nothing."""
        return max(1e-9, time.monotonic() - self._start)

    def close(self) -> None:
        """Leaves the terminal's line."""
        if self._bar is not None:
            self._show()
            self._bar.close()

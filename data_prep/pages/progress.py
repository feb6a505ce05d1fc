"""How far the work is: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from data_prep.pages.numbers import duration

NUM_COUNTS = 4  # documents, tokens, bytes of text, work done
LINE_SECS = 5.0
BAR_SECS = 0.2


class Progress:
    """Counts of one stage, and the share of it that is done.

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
        self._measure = 1 if in_tokens else 3
        self.counts = [0] * NUM_COUNTS
        self._stream = stream or sys.stderr
        self._start = self._shown = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            bar_format = "{percentage:3.0f}%|{bar:24}| {desc}"
            self._bar = tqdm(total=total_work, desc=stage, bar_format=bar_format, file=self._stream)

    def add(self, documents: int, tokens: int, text_bytes: int, work: int) -> None:
        """Adds to the counts."""
        new = (documents, tokens, text_bytes, work)
        self.set([a + b for a, b in zip(self.counts, new, strict=True)])

    def skip(self, work: int) -> None:
        """Takes out work that an earlier run did, so that the time left is not too hopeful."""
        self.total_work -= work

    def set(self, counts: Sequence[int]) -> None:
        """Replaces the counts, and shows them if it is time."""
        self.counts = list(counts)
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
        return min(self.counts[self._measure], self.total_work)

    def percent(self) -> float:
        """Share of the work that is done, in percent."""
        return 100 * self.work_done() / max(1, self.total_work)

    def line(self) -> str:
        """12,345 documents, 9.9 M tokens, 8.1 MB/s, 1:23 left"""
        documents, tokens, text_bytes, _ = self.counts
        work = self.work_done()
        seconds = max(1e-9, time.monotonic() - self._start)
        parts = [f"{documents:,} documents"] if documents else []
        parts += [f"{tokens / 1e6:,.1f} M tokens", f"{text_bytes / 1e6 / seconds:.1f} MB/s"]
        if work:
            left = (self.total_work - work) * seconds / work
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Leaves the terminal's line."""
        if self._bar is not None:
            self._show()
            self._bar.close()

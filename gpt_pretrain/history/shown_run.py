"""A run in a page of several: its number, which is its colour, its name, its events."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.pages.plots import Mark
from gpt_pretrain.history.reported_run import ReportedRun
from gpt_pretrain.history.run_events import RunEvent, events_of

_MOST_MARKS = 60  # of a run, on the curves


@dataclass(frozen=True)
class ShownRun:
    """
    Attributes:
      number: from 0; the first is the one that the page is about.
      name: as short as the others allow.
    """

    number: int
    run: ReportedRun
    name: str
    events: tuple[RunEvent, ...]

    def target(self, index: int) -> str:
        """The id of an event in the page."""
        return f"e{self.number}-{index}"

    def marks(self) -> list[Mark]:
        """The events on the curves; spikes give way to others where there are many."""
        order = sorted(range(len(self.events)), key=lambda i: self.events[i].kind == "spike")
        return [self._mark(i) for i in sorted(order[:_MOST_MARKS])]

    def _mark(self, index: int) -> Mark:
        event = self.events[index]
        text = f"step {event.step:,}: {event.kind}" + f", {event.words}" * bool(event.words)
        return Mark(self.number, float(event.step), css_class(event), text, self.target(index))


def shown_runs(runs: Sequence[ReportedRun]) -> list[ShownRun]:
    """In the order in which they were named."""
    names = [run.name.rstrip("/") for run in runs]
    last_parts = [name.rpartition("/")[2] for name in names]
    if len(set(last_parts)) == len(names) and all(last_parts):
        names = last_parts
    return [
        ShownRun(i, run, name, tuple(events_of(run))) for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def css_class(event: RunEvent) -> str:
    """Of its kind, in report.css: "save" of "save failed"."""
    return event.kind.split()[0]


def clock(secs: float) -> str:
    """Seconds since 1970 in words."""
    return datetime.datetime.fromtimestamp(secs, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")

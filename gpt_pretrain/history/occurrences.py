"""In which updates a document was and will be: by the inverse of the order, so nothing is scanned."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt_pretrain.data.batches import kept_targets_of
from gpt_pretrain.data.stages import Occurrence, Stage
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, windows_of


@dataclass(frozen=True)
class DocumentOccurrence:
    """One row of one update that holds tokens of a span.

    Attributes:
      place: update and row, and the window that the row is.
      window_span, own_span: where they overlap, as tokens [a, b) of the window and of the document.
      only_target: the document's first token is the window's last target and nothing more of it is there.
      is_inserted: the row is not a window of the document's stream: it was inserted into it.
      num_masked: of the span's tokens that are targets here, how many do not count.
    """

    place: Occurrence
    window_span: tuple[int, int]
    own_span: tuple[int, int]
    only_target: bool
    is_inserted: bool = False
    num_masked: int = 0

    def to_json(self, num_consumed: int) -> dict[str, Any]:
        """JSON values only; updates count from 1."""
        place = self.place
        return {
            "update": place.step_index + 1,
            "seen": place.step_index < num_consumed,
            "row": place.row,
            "position": place.position,
            "epoch": place.epoch,
            "window": place.window,
            "tokens_of_window": list(self.window_span),
            "tokens_of_document": list(self.own_span),
            "only_as_last_target": self.only_target,
            **({"inserted": True} if self.is_inserted else {}),
            **({"targets_masked": self.num_masked} if self.num_masked else {}),
        }


@dataclass(frozen=True)
class ReplacedOccurrence:
    """One row that would hold tokens of a span, were its window not substituted.

    Attributes:
      place: update, row and the window that was planned there.
      instead: the window that is seen there.
    """

    place: Occurrence
    instead: int

    def to_json(self) -> dict[str, Any]:
        """JSON values only; updates count from 1."""
        place = self.place
        return {
            "update": place.step_index + 1,
            "row": place.row,
            "position": place.position,
            "window": place.window,
            "substituted_by_window": self.instead,
        }


def occurrences_of(run: OpenedRun, span: Span) -> list[DocumentOccurrence]:
    """Every row of the run, past and planned, that holds a token of the span, in order."""
    found = run.plan.occurrences(
        span.stream.fingerprint, lambda stage: list(windows_of(span, stage)), run.data.num_steps
    )
    out = []
    for stage, place in found:
        first = place.window * stage.seq_len
        overwritten = _num_overwritten(stage, place.position)
        a, b = max(span.start, first + overwritten), min(span.stop, first + stage.seq_len + 1)
        if a < b:
            out.append(
                DocumentOccurrence(
                    place,
                    window_span=(a - first, b - first),
                    own_span=(a - span.start, b - span.start),
                    only_target=a == first + stage.seq_len,
                    num_masked=_num_masked(stage, place, a - first, b - first),
                )
            )
    out += _inserted(run, span)
    return sorted(out, key=lambda each: each.place.position)


def replaced_of(run: OpenedRun, span: Span) -> list[ReplacedOccurrence]:
    """Every row of the run that would hold a token of the span, were its window not substituted."""
    found = run.plan.replaced(span.stream.fingerprint, lambda stage: list(windows_of(span, stage)), run.data.num_steps)
    return [ReplacedOccurrence(place, instead) for _, place, instead in found]


def _num_overwritten(stage: Stage, position: int) -> int:
    """Tokens at the front of a row that an inserted document stands in the place of."""
    found = stage.insertions_at(np.array([position]))
    return sum(each.num_overwritten(part, stage.seq_len) for _, each, part in found)


def _num_masked(stage: Stage, place: Occurrence, a: int, b: int) -> int:
    """Of tokens [a, b) of a row, those that are masked targets."""
    if not stage.masks:
        return 0
    position = np.array([place.position])
    keep = kept_targets_of(stage, position, *stage.examples_at(position))[0]
    return int((~keep[max(0, a - 1) : b - 1]).sum())


def _inserted(run: OpenedRun, span: Span) -> list[DocumentOccurrence]:
    """Rows that a document was inserted into which holds tokens of the span."""
    out: list[DocumentOccurrence] = []
    if span.split != "train":
        return out
    for stage, last in zip(run.plan.stages, run.plan.stops(), strict=True):
        for each in stage.inserted:
            if each.fingerprint != span.stream.fingerprint:
                continue
            for step_index, row, part in each.places:
                begin, stop = (each.start + token for token in each.span(part, stage.seq_len))
                a, b = max(span.start, begin), min(span.stop, stop)
                if a < b and step_index < min(run.data.num_steps, last):
                    position = stage.position(step_index) + row
                    _, windows = stage.examples_at(np.array([position]))
                    out.append(
                        DocumentOccurrence(
                            Occurrence(step_index, row, position, int(windows[0]), 0),
                            window_span=(a - begin, b - begin),
                            own_span=(a - span.start, b - span.start),
                            only_target=a - begin == stage.seq_len,
                            is_inserted=True,
                        )
                    )
    return out

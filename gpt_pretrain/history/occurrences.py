"""In which updates a document was and will be: by the inverse of the order, so nothing is scanned."""

from dataclasses import dataclass
from typing import Any

from gpt_pretrain.data.stages import Occurrence
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, windows_of


@dataclass(frozen=True)
class DocumentOccurrence:
    """One row of one update that holds tokens of a span.

    Attributes:
      place: update and row, and the window that the row is.
      window_span, own_span: where they overlap, as tokens [a, b) of the window and of the document.
      only_target: the document's first token is the window's last target and nothing more of it is there.
    """

    place: Occurrence
    window_span: tuple[int, int]
    own_span: tuple[int, int]
    only_target: bool

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
        }


def occurrences_of(run: OpenedRun, span: Span) -> list[DocumentOccurrence]:
    """Every row of the run, past and planned, that holds a token of the span, in order."""
    found = run.plan.occurrences(
        span.stream.fingerprint, lambda stage: list(windows_of(span, stage)), run.data.num_steps
    )
    out = []
    for stage, place in found:
        first = place.window * stage.seq_len
        a, b = max(span.start, first), min(span.stop, first + stage.seq_len + 1)
        out.append(
            DocumentOccurrence(
                place,
                window_span=(a - first, b - first),
                own_span=(a - span.start, b - span.start),
                only_target=a == first + stage.seq_len,
            )
        )
    return out

"""The places of a text in words: which documents, and in which updates."""

from collections.abc import Sequence
from typing import Any

from data_prep.pages.numbers import plural
from data_prep.pages.text import one_line
from gpt_pretrain.history.occurrences import DocumentOccurrence, occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import windows_of
from gpt_pretrain.history.text_search import Found

_MAX_PLACES = 20  # that are printed, unless all are asked for
_MAX_TRIED = 10_000  # places that are asked for their updates, to print those that have any
_MAX_UPDATES = 5  # of a place


def describe_found(run: OpenedRun, text: str, found: Sequence[Found], *, full: bool = False) -> str:
    """All places of a text, as text; `full` prints every one."""
    if not found:
        return f"{text!r}: its tokens are nowhere in the streams of {run.save_dir}, nor those of {' ' + text!r}."
    lines = [f"{text!r}: {_places(found)}."]
    training = [each for each in found if each.span.split == "train"]
    if training:
        seen, planned = _times(run, training)
        lines.append(f"In {plural(seen, 'row')} of batches seen, and {planned:,} planned.")
    spelt: dict[str, int] = {}
    for each in found:
        spelt[each.variant.text] = spelt.get(each.variant.text, 0) + 1
    lines += [f"  {count:,} as {variant!r}" for variant, count in spelt.items()]
    # Those that were in a batch first: of a short run they are few.
    known = [(each, occurrences_of(run, each.span)) for each in found] if full else _first(run, found)
    names = ("tokens", "document", "seen in update", "planned in update")
    rows = [_cells(run, *each) for each in known]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(found) > len(rows):
        lines.append(f"... and {len(found) - len(rows):,} more places: --full prints all, --jsonl as JSON")
    return "\n".join(lines)


def _first(run: OpenedRun, found: Sequence[Found]) -> list[tuple[Found, list[DocumentOccurrence]]]:
    """Some places, first those that are in a batch of the run."""
    inside, outside = [], []
    for each in found:
        places = occurrences_of(run, each.span) if len(inside) + len(outside) < _MAX_TRIED else []
        (inside if places else outside).append((each, places))
        if len(inside) == _MAX_PLACES:
            break
    return [*inside, *outside][:_MAX_PLACES]


def _cells(run: OpenedRun, each: Found, places: Sequence[DocumentOccurrence]) -> tuple[str, ...]:
    span, document = each.span, each.span.document
    name = "" if document is None else document.id or f"{document.source_file} row {document.row}"
    stream = f"{span.stream.name} " if span.stream.name else ""
    if span.split != "train":
        return f"{stream}{span.split} {span.start}", one_line(name), "never: not trained on", ""
    steps = [place.place.step_index + 1 for place in places]
    seen = [step for step in steps if step <= len(run.ledger)]
    return f"{stream}{span.start}", one_line(name), *map(_updates, (seen, steps[len(seen) :]))


def _updates(steps: Sequence[int]) -> str:
    """[3, 9, 27] -> "3, 9, 27"; of many the first few"""
    few = ", ".join(map(str, steps[:_MAX_UPDATES]))
    return few + f", ... {len(steps)} in all" if len(steps) > _MAX_UPDATES else few or "-"


def to_json(run: OpenedRun, each: Found) -> dict[str, Any]:
    """JSON values only; updates count from 1."""
    span = each.span
    return {
        "stream": span.stream.name,
        "split": span.split,
        "tokens": [span.start, span.stop],
        "text": each.variant.text,
        "document": span.document and span.document.id,
        "occurrences": [found.to_json(len(run.ledger)) for found in occurrences_of(run, span)],
    }


def _places(found: Sequence[Found]) -> str:
    """12 places in 9 documents of the train split, 1 place in 1 document of the val split"""
    parts = []
    for split in dict.fromkeys(each.span.split for each in found):
        here = [each.span for each in found if each.span.split == split]
        documents = {(span.stream.fingerprint, span.document.start) for span in here if span.document}
        inside = f" in {len(documents):,} document{'s' * (len(documents) > 1)}" if documents else ""
        parts.append(f"{len(here):,} place{'s' * (len(here) > 1)}{inside} of the {split} split")
    return ", ".join(parts)


def _times(run: OpenedRun, found: Sequence[Found]) -> tuple[int, int]:
    """Rows of the run that hold a token of any place: how many seen, how many planned."""
    streams = {each.span.stream.fingerprint: each.span.stream for each in found}
    seen = planned = 0
    for fingerprint in streams:
        spans = [each.span for each in found if each.span.stream.fingerprint == fingerprint]
        places = run.plan.occurrences(
            fingerprint,
            lambda stage, spans=spans: sorted({window for span in spans for window in windows_of(span, stage)}),
            run.data.num_steps,
        )
        num_seen = sum(place.step_index < len(run.ledger) for _, place in places)
        seen, planned = seen + num_seen, planned + len(places) - num_seen
    return seen, planned

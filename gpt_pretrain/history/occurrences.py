"""At which updates a document was and will be met: by the inverse of the order, so nothing is scanned."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from data_prep.store.documents import Document
from gpt_pretrain.data.config import windows_meeting
from gpt_pretrain.data.stages import Sighting, Stage, Stream
from gpt_pretrain.history.opened_run import OpenedRun

_MAX_LINES = 20  # of a table, unless all are asked for


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a stream, and the document that they are, if it is known."""

    stream: Stream
    split: str
    start: int
    stop: int
    document: Document | None


@dataclasses.dataclass(frozen=True)
class Meeting:
    """One row of one update in which a span is met.

    Attributes:
      window_span, own_span: where they overlap, as tokens [a, b) of the window and of the document.
      only_target: the document's first token is the window's last target and nothing more of it is there.
    """

    sighting: Sighting
    window_span: tuple[int, int]
    own_span: tuple[int, int]
    only_target: bool

    def to_json(self, num_consumed: int) -> dict[str, Any]:
        """JSON values only; updates count from 1."""
        sighting = self.sighting
        return {
            "update": sighting.step + 1,
            "seen": sighting.step < num_consumed,
            "row": sighting.row,
            "position": sighting.position,
            "epoch": sighting.epoch,
            "window": sighting.window,
            "tokens_of_window": list(self.window_span),
            "tokens_of_document": list(self.own_span),
            "only_as_last_target": self.only_target,
        }


def find_spans(
    run: OpenedRun,
    *,
    document: str | None = None,
    url: str | None = None,
    token: int | None = None,
    stream: str | None = None,
) -> list[Span]:
    """The documents with that id, with that url, or at that token of the training stream.

    Args:
      stream: look in this stream of the mixture only.

    Raises ValueError where there is none, or more than one stream that `token` may count in.
    """
    named = [each for each in run.streams() if stream is None or each.name == stream]
    streams = list({each.fingerprint: each for each in named}.values())  # one that was renamed is one
    if not streams:
        names = ", ".join(each.name for each in run.streams()) or "one, without a name"
        raise ValueError(f"--stream {stream}: no such stream in {run.save_dir}; it has {names}")
    if token is not None:
        if len(streams) > 1:
            names = ", ".join(sorted({each.name or f"the one of {run.directory(each)}" for each in streams}))
            raise ValueError(f"--token {token}: of which stream? --stream with one of {names}")
        return [_span_at(run, streams[0], token)]
    column, value = ("id", document) if document is not None else ("url", url)
    spans, searched, problems = [], [], []
    for each in streams:
        try:
            tables = [found for split in ("train", "val") if (found := run.documents(each, split))]
        except ValueError as error:
            problems.append(str(error))
            continue
        searched.append(run.directory(each) + ("" if tables else " (which has no table of documents)"))
        for table in tables:
            spans += [
                Span(each, table.split, found.start, found.start + found.length, found)
                for found in table.find(column, str(value))
            ]
    if not spans:
        places = ", ".join(searched)
        missing = f"no document has the {column} {value} in {places}" if places else ""
        raise ValueError("\n".join(filter(None, [missing, *problems])))
    return spans


def _span_at(run: OpenedRun, stream: Stream, token: int) -> Span:
    if not 0 <= token < stream.num_tokens:
        raise ValueError(f"--token {token}: the training stream has the tokens 0 to {stream.num_tokens - 1}")
    tables = run.documents(stream)
    if tables is None:
        return Span(stream, "train", token, token + 1, None)
    found = tables.at(token)
    return Span(stream, "train", found.start, found.start + found.length, found)


def windows_of(span: Span, stage: Stage) -> range:
    """Windows of a stage that hold a token of the span; those beyond the stream's last window are not there."""
    index = _index_of(stage, span.stream)
    if index is None or span.split != "train":
        return range(0)
    return windows_meeting(span.start, span.stop - span.start, stage.seq_len, stage.num_windows(index))


def meetings(run: OpenedRun, span: Span) -> list[Meeting]:
    """Every row of the run, past and planned, that holds a token of the span, in order."""
    found = run.plan.sightings(span.stream.fingerprint, lambda stage: list(windows_of(span, stage)), run.data.num_steps)
    out = []
    for stage, sighting in found:
        first = sighting.window * stage.seq_len
        a, b = max(span.start, first), min(span.stop, first + stage.seq_len + 1)
        only_target = a == first + stage.seq_len
        out.append(Meeting(sighting, (a - first, b - first), (a - span.start, b - span.start), only_target))
    return out


def notes(run: OpenedRun, span: Span) -> list[str]:
    """What of a span is in no window of the run, and why."""
    if span.split != "train":
        return [f"It is in the {span.split} split: never trained on."]
    lines = []
    for stage in run.plan.stages:
        index = _index_of(stage, span.stream)
        since = f" (from update {stage.from_step + 1})" if stage.from_step else ""
        if index is None:
            name = f"stream {span.stream.name}" if span.stream.name else "this dataset"
            lines.append(f"The run did not use {name}{since or ' at its beginning'}.")
            continue
        end = stage.num_windows(index) * stage.seq_len + 1
        if span.stop > end:
            number = span.stop - max(end, span.start)
            what = "All of it lies" if span.start >= end else f"Its last {number} tokens lie"
            lines.append(f"{what} in the stream's tail, too short for a window: met by no update{since}.")
        windows = windows_of(span, stage)
        excluded = sorted(set(windows).intersection(stage.streams[index].excluded)) if windows else []
        if excluded:
            what = f"All of its {len(windows)}" if len(excluded) == len(windows) else f"{len(excluded)} of its"
            lines.append(f"{what} windows are excluded: {_ranges(excluded)}{since}.")
    return lines


def describe(run: OpenedRun, span: Span, found: Sequence[Meeting], *, full: bool = False) -> str:
    """A span and its meetings as text; `full` prints every one."""
    num_consumed = len(run.ledger)
    seen = [each for each in found if each.sighting.step < num_consumed]
    windows = sorted({each.sighting.window for each in found})
    lines = [*_heading(span), *notes(run, span)]
    if span.split != "train":
        return "\n".join(lines)
    if not found:
        lies = windows_of(span, run.plan.stages[-1])
        where = f"; it lies in window{'s' * (len(lies) > 1)} {_ranges(lies)}" if lies else ""
        return "\n".join([*lines, f"Met by none of the {run.data.num_steps} updates of the run{where}."])
    counted = f"{len(windows)} window{'s' * (len(windows) > 1)} ({_ranges(windows)})"
    lines.append(f"Met in {counted}: {_counted(seen, 'seen')}, {_counted(found[len(seen) :], 'planned')}.")
    if len(found) > _MAX_LINES and not full:
        lines += _epochs(found, num_consumed)
    names = ("update", "", "epoch", "row", "position", "window", "of the window", "of the document")
    rows = [_cells(each, num_consumed) for each in (found if full else found[:_MAX_LINES])]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(found) > len(rows):
        lines.append(f"  ... and {len(found) - len(rows)} more: --full prints all, --jsonl as JSON")
    return "\n".join(lines)


def _cells(each: Meeting, num_consumed: int) -> tuple[str, ...]:
    """A line of the table."""
    sighting = each.sighting
    when = "seen" if sighting.step < num_consumed else "planned"
    numbers = (sighting.epoch, sighting.row, sighting.position, sighting.window)
    own = _span(each.own_span) + " only as last target" * each.only_target
    return str(sighting.step + 1), when, *map(str, numbers), _span(each.window_span), own


def _heading(span: Span) -> list[str]:
    stream = f" of stream {span.stream.name}" if span.stream.name else ""
    place = f"tokens [{span.start}, {span.stop}) of the {span.split} stream{stream}"
    if span.document is None:
        return [f"{place} (the dataset has no table of documents)"]
    each = span.document
    names = "  ".join(str(name) for name in (each.id, each.url) if name)
    lines = [names] if names else []
    return [*lines, f"{each.source_file} row {each.row}, {each.length} tokens: {place}"]


def _epochs(found: Sequence[Meeting], num_consumed: int) -> list[str]:
    """A line an epoch, where there are several: what a table that is cut short does not show."""
    epochs = sorted({each.sighting.epoch for each in found})
    if len(epochs) < 2:
        return []
    lines = []
    for epoch in epochs[:_MAX_LINES]:
        here = [each for each in found if each.sighting.epoch == epoch]
        seen = [each for each in here if each.sighting.step < num_consumed]
        lines.append(f"  epoch {epoch}: {_counted(seen, 'seen')}, {_counted(here[len(seen) :], 'planned')}")
    return lines + ["  ..."] * (len(epochs) > _MAX_LINES)


def _counted(found: Sequence[Meeting], word: str) -> str:
    if not found:
        return f"none {word}"
    first, last = found[0].sighting.step + 1, found[-1].sighting.step + 1
    return f"{len(found)} {word} (update {first}{f' to {last}' if last > first else ''})"


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"; of many stretches the first few."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and stretches[-1][1] == number - 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    words = [f"{a}-{b}" if b > a else str(a) for a, b in stretches[:8]]
    return ", ".join(words + ["..."] * (len(stretches) > 8))


def _span(span: tuple[int, int]) -> str:
    return f"[{span[0]}, {span[1]})"


def _index_of(stage: Stage, stream: Stream) -> int | None:
    """Index of a stream in a stage, under any name: a stream is known by its dataset."""
    fingerprints = [each.fingerprint for each in stage.streams]
    return fingerprints.index(stream.fingerprint) if stream.fingerprint in fingerprints else None

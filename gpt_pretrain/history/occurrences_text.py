"""The occurrences of a document in words and as a table."""

from collections.abc import Sequence

from data_prep.pages.text import one_line
from gpt_pretrain.history.occurrences import DocumentOccurrence, replaced_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, index_of, is_inserted_from, windows_of

_MAX_LINES = 20  # of a table, unless all are asked for


def describe(run: OpenedRun, span: Span, found: Sequence[DocumentOccurrence], *, full: bool = False) -> str:
    """A span and its occurrences as text; `full` prints every one."""
    num_consumed = len(run.ledger)
    seen = [each for each in found if each.place.step_index < num_consumed]
    windows = sorted({each.place.window for each in found})
    lines = [*_heading(span), *notes(run, span)]
    if span.split != "train":
        return "\n".join(lines)
    lines += _replaced(run, span, full=full)
    if not found:
        lies = windows_of(span, run.plan.stages[-1])
        where = f"; it lies in window{'s' * (len(lies) > 1)} {_ranges(lies)}" if lies else ""
        return "\n".join([*lines, f"In none of the {run.data.num_steps} updates of the run{where}."])
    counted = f"{len(windows)} window{'s' * (len(windows) > 1)} ({_ranges(windows)})"
    noun = f"occurrence{'s' * (len(seen) > 1)} " if seen else ""
    lines.append(f"In {counted}: {_counted(seen, f'{noun}seen')}, {_counted(found[len(seen) :], 'planned')}.")
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


def notes(run: OpenedRun, span: Span) -> list[str]:
    """What of a span is in no window of the run, and why."""
    if span.split != "train":
        return [f"It is in the {span.split} split: never trained on."]
    lines = []
    for stage in run.plan.stages:
        index = index_of(stage, span.stream)
        since = f" (from update {stage.from_step + 1})" if stage.from_step else ""
        if index is None and is_inserted_from(span.stream):
            continue
        if index is None:
            name = f"stream {span.stream.name}" if span.stream.name else "this dataset"
            lines.append(f"The run did not use {name}{since or ' at its beginning'}.")
            continue
        end = stage.num_windows(index) * stage.seq_len + 1
        if span.stop > end:
            number = span.stop - max(end, span.start)
            what = "All of it lies" if span.start >= end else f"Its last {number} tokens lie"
            lines.append(f"{what} in the stream's tail, too short for a window: in no update{since}.")
        windows = windows_of(span, stage)
        excluded = sorted(set(windows).intersection(stage.streams[index].excluded)) if windows else []
        if excluded:
            what = f"All of its {len(windows)}" if len(excluded) == len(windows) else f"{len(excluded)} of its"
            lines.append(f"{what} windows are excluded: {_ranges(excluded)}{since}.")
    return lines


def _replaced(run: OpenedRun, span: Span, *, full: bool) -> list[str]:
    """Where the plan has other windows in the place of the document's."""
    found = replaced_of(run, span)
    if not found:
        return []
    shown = found if full else found[:_MAX_LINES]
    lines = [f"Substituted in {len(found)} rows, where it would be seen otherwise:"]
    lines += [
        f"  update {each.place.step_index + 1}  row {each.place.row}  position {each.place.position}  window "
        f"{each.place.window}: window {each.instead} instead"
        for each in shown
    ]
    return lines + [f"  ... and {len(found) - len(shown)} more"] * (len(found) > len(shown))


def _heading(span: Span) -> list[str]:
    stream = f" of stream {span.stream.name}" if span.stream.name else ""
    place = f"tokens [{span.start}, {span.stop}) of the {span.split} stream{stream}"
    if span.document is None:
        return [f"{place} (the dataset has no table of documents)"]
    each = span.document
    names = "  ".join(one_line(name) for name in (each.id, each.url) if name)
    lines = [names] if names else []
    return [*lines, f"{one_line(each.source_file)} row {each.row}, {each.length} tokens: {place}"]


def _epochs(found: Sequence[DocumentOccurrence], num_consumed: int) -> list[str]:
    """A line an epoch, where there are several: what a table that is cut short does not show."""
    epochs = sorted({each.place.epoch for each in found})
    if len(epochs) < 2:
        return []
    lines = []
    for epoch in epochs[:_MAX_LINES]:
        here = [each for each in found if each.place.epoch == epoch]
        seen = [each for each in here if each.place.step_index < num_consumed]
        lines.append(f"  epoch {epoch}: {_counted(seen, 'seen')}, {_counted(here[len(seen) :], 'planned')}")
    return lines + ["  ..."] * (len(epochs) > _MAX_LINES)


def _counted(found: Sequence[DocumentOccurrence], word: str) -> str:
    """15 seen (update 3 to 40)"""
    if not found:
        return f"none {word}"
    first, last = found[0].place.step_index + 1, found[-1].place.step_index + 1
    return f"{len(found)} {word} (update {first}{f' to {last}' if last > first else ''})"


def _cells(each: DocumentOccurrence, num_consumed: int) -> tuple[str, ...]:
    """A line of the table."""
    place = each.place
    when = "seen" if place.step_index < num_consumed else "planned"
    numbers = (place.epoch, place.row, place.position, place.window)
    own = _span(each.own_span) + " only as last target" * each.only_target + " inserted" * each.is_inserted
    own += f" {each.num_masked} targets masked" * bool(each.num_masked)
    return str(place.step_index + 1), when, *map(str, numbers), _span(each.window_span), own


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

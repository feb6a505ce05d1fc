"""Where two runs part, from their ledgers, and why, from their plans. Reads no tokens."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpt_pretrain.data.batches import kept_targets_of
from gpt_pretrain.data.row_edits import INSERTED
from gpt_pretrain.data.stages import BatchIndex, Stage, Stream
from gpt_pretrain.history.opened_run import OpenedRun

_MAX_ROWS = 5  # that are named


@dataclass(frozen=True)
class Comparison:
    """Whether two ledgers agree as far as both go, and lines that say so or say where and why not."""

    agree: bool
    lines: list[str]


@dataclass(frozen=True)
class Difference:
    """A parameter of the order that two runs have different values of."""

    name: str
    first: object
    second: object

    def __str__(self) -> str:
        return f"{self.name}: {self.first}, {self.second}"


def compare_runs(run: OpenedRun, other: OpenedRun) -> Comparison:
    """Compares two ledgers, and the plans where they part. ValueError where a run has no ledger."""
    names = f"{run.save_dir} and {other.save_dir}"
    lengths = [len(each.ledger) for each in (run, other)]
    if not min(lengths):
        empty = (run if not lengths[0] else other).save_dir
        raise ValueError(f"{empty}: has no ledger yet (no update was saved); there is nothing to compare")
    step_index = run.ledger.first_difference(other.ledger)
    if step_index is None:
        lines = [f"{names} agree in all {min(lengths)} updates that both made (of {lengths[0]} and {lengths[1]})"]
        after = min(lengths)
        if found := parameters_that_differ(run, other, after):
            lines += [f"Their plans differ from there: update {after + 1} is", *(f"  {each}" for each in found)]
        return Comparison(True, lines)
    digests = [f"{int(each.ledger.digests[step_index]):016x}" for each in (run, other)]
    before = f". The {step_index} updates before are equal" if step_index else ""
    lines = [
        f"DIFFER: {names} part at update {step_index + 1}: the digests of its batch are {digests[0]} and "
        f"{digests[1]}{before}"
    ]
    found = parameters_that_differ(run, other, step_index)
    lines += ["What differs there, as (first, second):", *(f"  {each}" for each in found)] if found else []
    return Comparison(False, lines + _rows_that_differ(run, other, step_index, is_explained=bool(found)))


def parameters_that_differ(run: OpenedRun, other: OpenedRun, step_index: int) -> list[Difference]:
    """Each parameter of the order that is not the same at a step."""
    a, b = run.plan.stage_at(step_index), other.plan.stage_at(step_index)
    pairs = [Difference(f"data.{name}", getattr(a, name), getattr(b, name)) for name in ("seed", "seq_len", "shuffle")]
    if "block" in (a.shuffle, b.shuffle):
        pairs += [
            Difference(f"data.shuffle_{name}", getattr(a, name), getattr(b, name))
            for name in ("block_windows", "group_blocks")
        ]
    pairs += [
        Difference("train.batch_size", a.batch_size(step_index), b.batch_size(step_index)),
        Difference("examples seen before", a.position(step_index), b.position(step_index)),
        Difference("streams", _names(a), _names(b)),
    ]
    streams = [{stream.name: stream for stream in each.streams} for each in (a, b)]
    for name in [name for name in streams[0] if name in streams[1]]:
        x, y = streams[0][name], streams[1][name]
        label = f"{name}: " if name else ""
        pairs += [
            Difference(f"{label}fingerprint of the dataset", x.fingerprint[:16], y.fingerprint[:16]),
            Difference(f"{label}weight", _share(x.count, a), _share(y.count, b)),
            Difference(f"{label}excluded windows", len(x.excluded), len(y.excluded)),
        ]
        if len(x.excluded) == len(y.excluded) and x.excluded != y.excluded:
            others = f"{len(set(x.excluded) - set(y.excluded))} others"
            pairs.append(Difference(f"{label}which windows are excluded", others, others))
        if all(each.first == each.second for each in pairs):
            # Nothing in force differs, but a stream may have been taken up at another place.
            seen = [each.index_after(each.streams.index(s), each.position(step_index)) for each, s in ((a, x), (b, y))]
            pairs.append(Difference(f"{label}windows seen before", seen[0], seen[1]))
    return [each for each in pairs if each.first != each.second] + _edits_that_differ(a, b)


def _edits_that_differ(a: Stage, b: Stage) -> list[Difference]:
    """What is edited in place in one of two stages, or otherwise in the other."""
    names = {stream.name for each in (a, b) for stream in each.streams}
    found = []
    for name in sorted(names):
        x, y = (next((each for each in stage.streams if each.name == name), None) for stage in (a, b))
        label = f"{name}: " if name else ""
        for what, edits in (("substituted windows", _substituted), ("masked tokens", _masked)):
            sets = [edits(each) if each else frozenset() for each in (x, y)]
            if sets[0] != sets[1]:
                found.append(Difference(f"{label}{what}", *map(_counted, sets)))
    if a.inserted != b.inserted:
        places = (sum(len(each.places) for each in stage.inserted) for stage in (a, b))
        found.append(Difference("rows with inserted documents", *places))
    return found


def _substituted(stream: Stream) -> frozenset:
    return frozenset(stream.substitution.windows if stream.substitution else ())


def _masked(stream: Stream) -> frozenset:
    return frozenset(stream.masked)


def _counted(edits: frozenset) -> str:
    """
    >>> _counted(frozenset({(3, 7), (9, 10)})), _counted(frozenset({5}))
    ('5', '1')
    """
    return str(sum(each[1] - each[0] if isinstance(each, tuple) else 1 for each in edits))


def _names(stage: Stage) -> str:
    return "+".join(stream.name or "one" for stream in stage.streams)


def _share(count: int, stage: Stage) -> str:
    return f"{count} of {sum(stream.count for stream in stage.streams)}"


def _rows_that_differ(run: OpenedRun, other: OpenedRun, step_index: int, *, is_explained: bool) -> list[str]:
    runs = (run, other)
    stages = [each.plan.stage_at(step_index) for each in runs]
    batches = [each.plan.batch(step_index) for each in runs]
    spans = [_spans(*pair) for pair in zip(stages, batches, strict=True)]
    sizes = [len(each) for each in spans]
    both = min(sizes)
    unequal = [row for row in range(both) if spans[0][row] != spans[1][row]]
    if not unequal and sizes[0] == sizes[1]:
        if is_explained:
            return ["Their rows are the same windows of the same datasets, at another place of the order."]
        return [
            "Their plans are the same, so other tokens were read or digested: a file was damaged in one of them, or "
            f"they were made by different versions of gpt_pretrain. `python -m gpt_pretrain.replay "
            f"{shlex.quote(run.save_dir)} --verify` and the same of {other.save_dir} say which."
        ]
    counted = f"all {both}" if len(unequal) == both else f"{len(unequal) or 'none'} of {both}"
    lines = [f"Rows that differ: {counted}" + (f" that both have (of {sizes[0]}, {sizes[1]})" * (sizes[0] != sizes[1]))]
    for row in unequal[:_MAX_ROWS]:
        for each, stage, batch in zip(runs, stages, batches, strict=True):
            lines.append(f"  row {row} of {each.save_dir}: {_row_in_words(each, stage, batch, row)}")
    return lines + ["  ..."] * (len(unequal) > _MAX_ROWS)


def _spans(stage: Stage, batch: BatchIndex) -> list[tuple]:
    """What each row is, in words that mean the same in every run."""
    keys = [(stream.name, stream.fingerprint) for stream in stage.streams]
    pairs: Iterable[tuple[int, int]] = np.stack([batch.streams, batch.windows], 1).tolist()
    spans: list[tuple] = [(*keys[i], window * stage.seq_len, stage.seq_len) for i, window in pairs]
    if stage.edits_tokens:
        positions = batch.position + np.arange(len(spans))
        keep = kept_targets_of(stage, positions, batch.streams, batch.windows)
        spans = [(*span, kept.tobytes()) if not kept.all() else span for span, kept in zip(spans, keep, strict=True)]
        for row, insertion, part in stage.insertions_at(positions):
            spans[row] = (*spans[row], insertion.source, insertion.start, part)
    return spans


def _row_in_words(run: OpenedRun, stage: Stage, batch: BatchIndex, row: int) -> str:
    stream, window = stage.streams[int(batch.streams[row])], int(batch.windows[row])
    first, end = window * stage.seq_len, (window + 1) * stage.seq_len + 1
    words = f"{'stream ' + stream.name + ', ' if stream.name else ''}window {window} (tokens [{first}, {end}))"
    positions = batch.position + np.array([row])
    for _, insertion, _ in stage.insertions_at(positions):
        words += f", its front overwritten by a document from {insertion.name.removeprefix(INSERTED)}"
    if stage.masks and not kept_targets_of(stage, positions, batch.streams[[row]], batch.windows[[row]]).all():
        words += ", some targets masked"
    try:
        tables = run.documents(stream)
    except ValueError:  # the dataset is not at hand
        return words
    found = tables.between(first, end) if tables else ()
    ids = [str(each.id or f"{each.source_file} row {each.row}") for each in found]
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return words + (f": {', '.join(ids[:3])}{more}" if ids else "")

"""How often every document was seen, and when: all of them at once.

The order is asked for every example up to a step, and the windows are counted; then each table of documents is read
once. That is linear in the run and in the documents, and needs 12 bytes a window; `occurrences.py` is for one document.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.store.files import whole_file
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stream
from gpt_pretrain.history.occurrences import occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span

COLUMNS = pa.schema(
    [
        ("stream", pa.dictionary(pa.int32(), pa.string())),
        ("id", pa.string()),
        ("start", pa.int64()),  # position of the document's end-of-text token in its stream
        ("length", pa.int64()),  # in tokens, with the end-of-text token
        ("occurrences", pa.int32()),  # rows of batches that hold a token of it
        ("target_tokens", pa.int64()),  # of it that a row had to predict, added up over all rows
        ("first_step", pa.int32()),  # from 1; null where it was in no batch
        ("last_step", pa.int32()),
    ]
)
_EXAMPLES_AT_ONCE = 1 << 20
_NEVER = np.iinfo(np.int32).max
_NOTHING_MASKED = np.empty(0, np.int64), np.empty(0, np.int64)


class WindowCounts:
    """In which steps the windows of one stream were seen, for one length of windows and what is masked.

    Args:
      masked: starts and stops of the tokens that are no targets, ascending: int64 (n,) each.

    Attributes:
      seen: how often: int32 (num_windows,).
      first, last: index of the first and the last step; `_NEVER` and -1 where there is none.
    """

    def __init__(self, num_windows: int, seq_len: int, masked: tuple[np.ndarray, np.ndarray] = _NOTHING_MASKED):
        self.seq_len, self._masked = seq_len, masked
        self.seen = np.zeros(num_windows, np.int32)
        self.first = np.full(num_windows, _NEVER, np.int32)
        self.last = np.full(num_windows, -1, np.int32)

    def add(self, windows: np.ndarray, steps: np.ndarray) -> None:
        """Counts windows, some of them perhaps twice, that were seen in these steps, which ascend."""
        np.add.at(self.seen, windows, np.int32(1))
        self.last[windows] = steps  # of several values for one place, NumPy keeps the last
        new = self.first[windows] == _NEVER
        self.first[windows[new][::-1]] = steps[new][::-1]

    def of_spans(self, starts: np.ndarray, stops: np.ndarray) -> dict[str, np.ndarray]:
        """Of the tokens [start, stop) of each span: occurrences, target_tokens, first and last step."""
        num_windows, seq_len = len(self.seen), self.seq_len
        before = np.concatenate([[0], np.cumsum(self.seen, dtype=np.int64)])
        # As `windows_overlapping`, for all spans at once.
        low = np.clip(-(-(starts - seq_len) // seq_len), 0, num_windows)
        high = np.maximum(low, np.clip((stops - 1) // seq_len + 1, 0, num_windows))
        edges = np.stack([low, high], axis=1).reshape(-1)
        first, last = (np.append(each, end) for each, end in ((self.first, _NEVER), (self.last, -1)))
        is_empty = low == high
        return {
            "occurrences": (before[high] - before[low]).astype(np.int32),
            "target_tokens": self._kept_before(stops, before) - self._kept_before(starts, before),
            "first": np.where(is_empty, _NEVER, np.minimum.reduceat(first, edges)[::2]),
            "last": np.where(is_empty, -1, np.maximum.reduceat(last, edges)[::2]),
        }

    def are_all_targets(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Whether every token of each span was a target at least once: bool."""
        windows = np.maximum(np.stack([starts, stops - 1]) - 1, 0) // self.seq_len
        low, high = np.minimum(windows, len(self.seen))
        missing = np.concatenate([[0], np.cumsum(np.append(self.seen == 0, True), dtype=np.int64)])
        return (starts >= 1) & (missing[high + 1] == missing[low])

    def _kept_before(self, tokens: np.ndarray, before: np.ndarray) -> np.ndarray:
        """How often the tokens before each one were targets that counted."""
        found = self._targets_before(tokens, before)
        starts, stops = self._masked
        if not len(starts):
            return found
        whole = self._targets_before(stops, before) - self._targets_before(starts, before)
        number = np.searchsorted(starts, tokens)  # masked spans that begin before the token
        last = np.maximum(number - 1, 0)
        beyond = np.where(number > 0, self._targets_before(stops[last], before) - found, 0)  # of the last such span
        return found - np.concatenate([[0], np.cumsum(whole)])[number] + np.maximum(beyond, 0)

    def _targets_before(self, tokens: np.ndarray, before: np.ndarray) -> np.ndarray:
        """How often the tokens before each one were targets: token t is one of window (t - 1) // seq_len."""
        windows, rest = np.divmod(np.maximum(tokens - 1, 0), self.seq_len)
        windows = np.minimum(windows, len(self.seen))
        seen = np.append(self.seen, 0)  # what lies beyond the last window is no target
        return before[windows] * self.seq_len + rest * seen[windows]


def count_windows(
    plan: Plan, num_steps: int, on_progress: Callable[[int], None] = lambda examples: None
) -> dict[str, list[WindowCounts]]:
    """What the first `num_steps` steps of a plan hold: of each stream's fingerprint, its counts for each length of
    windows that the run has had."""
    found: dict[tuple, WindowCounts] = {}
    stops = [*(stage.from_step for stage in plan.stages[1:]), num_steps]
    for stage, stop in zip(plan.stages, stops, strict=True):
        last = stage.position(max(stage.from_step, min(stop, num_steps)))
        counts = []
        for i, stream in enumerate(stage.streams):
            key = stream.fingerprint, stage.seq_len, stream.masked
            new = WindowCounts(stage.num_windows(i), stage.seq_len, stage.masked_edges[i])
            counts.append(found.setdefault(key, new))
        for first in range(stage.from_position, last, _EXAMPLES_AT_ONCE):
            positions = np.arange(first, min(first + _EXAMPLES_AT_ONCE, last))
            steps = stage.steps_at(positions).astype(np.int32)
            streams, windows = stage.examples_at(positions)
            for i, each in enumerate(counts):
                chosen = slice(None) if len(counts) == 1 else np.flatnonzero(streams == i)
                each.add(windows[chosen], steps[chosen])
            on_progress(len(positions))
    by_stream: dict[str, list[WindowCounts]] = {}
    for (fingerprint, *_), each in found.items():
        by_stream.setdefault(fingerprint, []).append(each)
    return by_stream


@dataclasses.dataclass
class Exposures:
    """What was written: documents, and how many of them were in some batch."""

    num_documents: int = 0
    num_seen: int = 0


def write_exposures(
    run: OpenedRun,
    path: str | os.PathLike,
    num_steps: int,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Exposures:
    """Writes a parquet file with a row for each training document of the run's datasets: `COLUMNS`.

    Args:
      num_steps: the first steps of the run, past or planned, that are counted.
      on_progress: called with what is being done and the share of it that is done.

    Raises ValueError: a dataset is not there, or has no table of documents.
    """
    streams = list({each.fingerprint: each for each in run.streams()}.values())
    for stream in streams:
        if run.documents(stream) is None:
            raise ValueError(
                f"{run.directory(stream)}: bare .bin shards, and nobody recorded which document is where. "
                f"`python -m data_prep.convert {run.directory(stream)} OUT` makes a prepared dataset of them."
            )
    total, done = max(1, run.plan.position(num_steps)), 0

    def counted(examples: int) -> None:
        nonlocal done
        done += examples
        on_progress("examples", done / total)

    counts = count_windows(run.plan, num_steps, counted)
    result = Exposures()
    metadata = {"run": run.save_dir, "run_id": run.data.run_id, "updates": str(num_steps)}
    with whole_file(path) as partial, contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            pq.ParquetWriter(
                partial,
                COLUMNS.with_metadata(metadata),
                compression="zstd",
                compression_level=1,
                use_dictionary=["stream", "occurrences", "target_tokens"],  # pyright: ignore[reportArgumentType]
            )
        )
        for stream in streams:
            for table, share in _tables_ahead(run, stream):
                rows = _rows(stream, table, counts.get(stream.fingerprint, []))
                rows = _recounted(run, stream, rows, num_steps)
                result.num_documents += rows.num_rows
                result.num_seen += rows.num_rows - rows["first_step"].null_count
                writer.write_table(rows)
                on_progress(f"documents {stream.name}".strip(), share)
    return result


def _tables_ahead(run: OpenedRun, stream: Stream) -> Iterator[tuple[pa.Table, float]]:
    """The tables of documents of a stream, one read while the one before it is counted; and the share that it ends."""
    tables = run.documents(stream)
    assert tables is not None
    each = tables.whole_tables(["start", "length", "id"])
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, each, None)
        while (table := ahead.result()) is not None:
            ahead = thread.submit(next, each, None)
            stop = int(table["start"][-1].as_py()) + int(table["length"][-1].as_py()) if table.num_rows else 0
            yield table, stop / max(1, stream.num_tokens)


def _recounted(run: OpenedRun, stream: Stream, rows: pa.Table, num_steps: int) -> pa.Table:
    """The same, with the documents counted one by one that inserted ones overwrite, or that are inserted."""
    spans = list(_touched_by_insertions(run, stream))
    if not spans:
        return rows
    starts, stops = rows["start"].to_numpy(), rows["start"].to_numpy() + rows["length"].to_numpy()
    changed = {name: rows[name].to_pylist() for name in ("occurrences", "target_tokens", "first_step", "last_step")}
    numbers = {
        int(number)
        for first, stop in spans
        for number in range(int(np.searchsorted(stops, first, side="right")), int(np.searchsorted(starts, stop)))
    }
    for number in numbers:
        span = Span(stream, "train", int(starts[number]), int(stops[number]), None)
        found = [each for each in occurrences_of(run, span) if each.place.step_index < num_steps]
        steps = [each.place.step_index + 1 for each in found]
        targets = [each.window_span[1] - max(1, each.window_span[0]) - each.num_masked for each in found]
        values = len(found), sum(targets), min(steps, default=None), max(steps, default=None)
        for name, value in zip(changed, values, strict=True):
            changed[name][number] = value
    for name, values in changed.items():
        index = rows.column_names.index(name)
        rows = rows.set_column(index, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))
    return rows


def _touched_by_insertions(run: OpenedRun, stream: Stream) -> Iterator[tuple[int, int]]:
    """Tokens [a, b) of a stream that inserted documents overwrite in some row, and those that are inserted."""
    for stage in run.plan.stages:
        for each in stage.inserted:
            if each.fingerprint == stream.fingerprint:
                yield each.start, each.start + each.length
            for step_index, row, part in each.places:
                streams, windows = stage.examples_at(np.array([stage.position(step_index) + row]))
                if stage.streams[int(streams[0])].fingerprint == stream.fingerprint:
                    first = int(windows[0]) * stage.seq_len
                    yield first, first + each.num_overwritten(part, stage.seq_len)


def _rows(stream: Stream, table: pa.Table, counts: list[WindowCounts]) -> pa.Table:
    starts, lengths = (table[name].to_numpy() for name in ("start", "length"))
    total = {
        "occurrences": np.zeros(len(starts), np.int32),
        "target_tokens": np.zeros(len(starts), np.int64),
        "first": np.full(len(starts), _NEVER, np.int32),
        "last": np.full(len(starts), -1, np.int32),
    }
    for each in counts:
        found = each.of_spans(starts, starts + lengths)
        for name, join in zip(total, (np.add, np.add, np.minimum, np.maximum), strict=True):
            total[name] = join(total[name], found[name])
    is_never = total["last"] < 0
    steps = (pa.array(total[name] + 1, pa.int32(), mask=is_never) for name in ("first", "last"))
    name = pa.DictionaryArray.from_arrays(np.zeros(len(starts), np.int32), pa.array([stream.name]))
    columns = [name, table["id"], table["start"], table["length"], total["occurrences"], total["target_tokens"], *steps]
    return pa.table(columns, schema=COLUMNS)

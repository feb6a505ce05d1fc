"""Step -> this process's rows of the global batch: tokens, where they come from, and their digest.

A batch depends on its step alone, so starting at any step costs nothing. Nothing here knows of JAX: the
trainer, `replay` and `inspect` read the same batches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.store.token_sources import TokenSource
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.row_edits import kept_targets
from gpt_pretrain.data.stages import Stage

_CHUNK_EXAMPLES = 1 << 15  # looked up at once, at most: an order is cheap by the thousand, not by the batch
# Odd 64-bit constants (of splitmix64 and xxHash): they spread a row's place over the bits of its seed.
_SPREAD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One step's batch, as far as this process holds it.

    Attributes:
      step_index: from 0.
      position: of the global batch.
      batch_size: of the global batch.
      tokens: as stored, uint16 or uint32 (num_microbatches, local rows, seq_len + 1).
      streams, windows: where each row is from, int64 (num_microbatches, local rows).
      digest: of these rows; those of all processes add up to the batch's, modulo 2**64.
      keep: where a row of the global batch has masked targets, whether each target of these rows counts, bool
        (num_microbatches, local rows, seq_len); else None, on every process.
    """

    step_index: int
    position: int
    batch_size: int
    tokens: np.ndarray
    streams: np.ndarray
    windows: np.ndarray
    digest: int
    keep: np.ndarray | None = None


class Batches:
    """Random access to the batches of a plan: a Grain data source whose element `k` is the batch of the step with
    index `first_index + k`.

    Args:
      sources: by name of the streams of those stages of the plan that are read, and of datasets inserted from.
      rows_of: batch size -> the rows of the global batch that this process holds, int64 (num_microbatches,
        local rows); the default is all of them as one microbatch.
      vocab_size: ids must be below it.
      on_step: called with the index of each step whose batch is read.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenSource],
        plan: Plan,
        *,
        vocab_size: int,
        first_index: int = 0,
        num_steps: int,
        rows_of: Callable[[int], np.ndarray] = lambda batch_size: np.arange(batch_size)[None],
        on_step: Callable[[int], None] = lambda step_index: None,
    ):
        self._sources = sources
        self._plan = plan
        self._vocab_size = vocab_size
        self._first_index = first_index
        self._num_steps = num_steps
        self._rows_of, self._on_step = rows_of, on_step
        self._chunk: tuple[int, int, np.ndarray, np.ndarray] | None = None
        self._fetched: set[tuple[str, int]] = set()  # blocks of the last chunk

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> HostBatch:
        if not 0 <= index < self._num_steps:
            raise IndexError(f"batch {index} of {self._num_steps}")
        step_index = self._first_index + int(index)
        self._on_step(step_index)
        stage = self._plan.stage_at(step_index)
        batch_size = stage.batch_size(step_index)
        rows = self._rows_of(batch_size)
        position = stage.position(step_index)
        streams, windows = self._examples(stage, step_index, rows)
        places = (position + rows).reshape(-1), streams.reshape(-1), windows.reshape(-1)
        tokens, keep, marks = read_rows(self._sources, stage, *places)
        check_ids(stage, *places[1:], tokens, self._vocab_size)
        digest = digest_of_rows(tokens, *places, marks)
        if keep is None and rows.size < batch_size and has_masked_targets(stage, step_index):
            keep = np.ones((rows.size, stage.seq_len), bool)
        return HostBatch(
            step_index=step_index,
            position=position,
            batch_size=batch_size,
            tokens=tokens.reshape(*rows.shape, tokens.shape[1]),
            streams=streams,
            windows=windows,
            digest=digest,
            keep=None if keep is None else keep.reshape(*rows.shape, stage.seq_len),
        )

    def _examples(self, stage: Stage, step_index: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(streams, windows) of the rows of one step, from a look-up of many steps."""
        chunk = self._chunk
        if chunk is None or not chunk[0] <= step_index < chunk[1]:
            batch_size = stage.batch_size(step_index)
            # Twice as far ahead each time that steps follow one another: a look at a single step costs little.
            ahead = 2 * (chunk[1] - chunk[0]) if chunk and step_index == chunk[1] else 1
            ahead = max(1, min(ahead, _CHUNK_EXAMPLES // max(1, rows.size)))
            last, end = step_index + 1, min(step_index + ahead, self._first_index + self._num_steps)
            while last < end and self._plan.stage_at(last) is stage and stage.batch_size(last) == batch_size:
                last += 1
            firsts = stage.position(step_index) + batch_size * np.arange(last - step_index)
            chunk = step_index, last, *stage.examples_at(firsts[:, None, None] + rows)
            self._chunk = chunk  # one assignment: another thread sees the old chunk or the new one
            if stage.shuffle == "block":
                self._fetch_blocks(stage, chunk[2].reshape(-1), chunk[3].reshape(-1))
        return chunk[2][step_index - chunk[0]], chunk[3][step_index - chunk[0]]

    def _fetch_blocks(self, stage: Stage, streams: np.ndarray, windows: np.ndarray) -> None:
        """Has sources fetch whole blocks, which are read to the end before the next group's: three times as fast from a
        disk as a window at a time."""
        touched = set()
        for index, stream in enumerate(stage.streams):
            fetch = getattr(self._sources[stream.name], "fetch_ahead", None)
            blocks = np.unique(windows[streams == index] // stage.block_windows)
            keys = {(stream.name, block) for block in blocks.tolist()}
            touched |= keys
            if fetch and (new := sorted(block for _, block in keys - self._fetched)):
                tokens = stage.block_windows * stage.seq_len
                fetch(np.array(new) * tokens, tokens + 1)
        self._fetched = touched


def check_ids(stage: Stage, streams: np.ndarray, windows: np.ndarray, tokens: np.ndarray, vocab_size: int) -> None:
    """ValueError that names the window, unless all ids of `tokens` (n, seq_len + 1) are below `vocab_size`."""
    if tokens.max(initial=0) < vocab_size:
        return
    row = int(np.flatnonzero((tokens >= vocab_size).any(1))[0])
    window, name = int(windows[row]), stage.streams[int(streams[row])].name
    first = window * stage.seq_len
    raise ValueError(
        f"{name + ': ' if name else ''}window {window} (tokens {first} to {first + stage.seq_len} of the stream) "
        f"holds token id {tokens[row].max()}, expected ids below {vocab_size}. The shard is damaged or was "
        "made with another tokenizer. `python -m data_prep.check DIR` looks at all of a prepared dataset; of bare "
        ".bin shards, `python -m data_prep.convert DIR OUT --tokenizer=...` makes one."
    )


def read_windows(
    sources: Mapping[str, TokenSource], stage: Stage, streams: np.ndarray, windows: np.ndarray
) -> np.ndarray:
    """Tokens of windows, one a row: (n, seq_len + 1), as wide as those of the stage's widest stream.

    The width does not depend on which rows are asked for: all processes digest the same bytes.
    """
    starts, length = windows * stage.seq_len, stage.seq_len + 1
    if len(stage.streams) == 1:
        return sources[stage.streams[0].name].read(starts, length)
    dtype = np.result_type(*(sources[stream.name].dtype for stream in stage.streams))
    out = np.empty((len(windows), length), dtype)
    for index, stream in enumerate(stage.streams):
        chosen = np.flatnonzero(streams == index)
        if len(chosen):
            out[chosen] = sources[stream.name].read(starts[chosen], length)
    return out


class Rows(NamedTuple):
    """What rows hold.

    Attributes:
      tokens: (n, seq_len + 1), as wide as those of the stage's widest stream.
      keep: whether each target counts, bool (n, seq_len); None where all do.
      marks: what digests tell edited rows by, uint64 (n,), 0 of all others; None where none is edited.
    """

    tokens: np.ndarray
    keep: np.ndarray | None = None
    marks: np.ndarray | None = None


def read_rows(
    sources: Mapping[str, TokenSource], stage: Stage, positions: np.ndarray, streams: np.ndarray, windows: np.ndarray
) -> Rows:
    """Rows at positions (n,) of a stage, which are these windows of these streams, with what is edited in place."""
    tokens = read_windows(sources, stage, streams, windows)
    if not stage.edits_tokens:
        return Rows(tokens)
    inserted = stage.insertions_at(positions)
    if inserted and not tokens.flags.writeable:
        tokens = tokens.copy()
    marks = [0] * len(windows)
    for row, insertion, part in inserted:
        begin = insertion.read(sources[insertion.name], part, stage.seq_len)
        tokens[row, : len(begin)] = begin
        marks[row] = insertion.mark(part)
    keep = kept_targets_of(stage, positions, streams, windows)
    for row in np.flatnonzero(~keep.all(1)).tolist():
        marks[row] = (marks[row] + xxhash.xxh3_64_intdigest(keep[row].tobytes())) % 2**64
    return Rows(tokens, None if keep.all() else keep, np.array(marks, np.uint64))


def kept_targets_of(stage: Stage, positions: np.ndarray, streams: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Whether each target of rows (n,) counts: bool (n, seq_len)."""
    keep = np.ones((len(windows), stage.seq_len), bool)
    for index, stream in enumerate(stage.streams):
        if stream.masked:
            chosen = np.flatnonzero(streams == index)
            keep[chosen] = kept_targets(stage.masked_edges[index], windows[chosen], stage.seq_len)
    for row, insertion, part in stage.insertions_at(positions):
        keep[row, : insertion.num_overwritten(part, stage.seq_len) - 1] = True
    return keep


def has_masked_targets(stage: Stage, step_index: int) -> bool:
    """Whether any row of a step's global batch has a masked target."""
    if not stage.masks:
        return False
    positions = stage.position(step_index) + np.arange(stage.batch_size(step_index))
    return not kept_targets_of(stage, positions, *stage.examples_at(positions)).all()


def digest_of_rows(
    tokens: np.ndarray,
    positions: np.ndarray,
    streams: np.ndarray,
    windows: np.ndarray,
    marks: np.ndarray | None = None,
) -> int:
    """64-bit digest of examples that does not depend on the order in which they are listed.

    The sum, modulo 2**64, of each row's xxh3_64 of its tokens' bytes, seeded by its position, stream and window, and
    by its mark, if it is edited in place: so every process can digest the rows that it holds.
    """
    position_64, window_64, stream_64 = (each.astype(np.uint64) for each in (positions, windows, streams))
    seeds = position_64 * _SPREAD[0] + window_64 * _SPREAD[1] + stream_64 * _SPREAD[2]
    if marks is not None:
        seeds += marks
    content, size = tokens.tobytes(), tokens.shape[1] * tokens.itemsize  # slices of bytes are cheaper than rows
    digest = xxhash.xxh3_64_intdigest
    digests = [digest(content[i * size : (i + 1) * size], seed) for i, seed in enumerate(seeds.tolist())]
    return sum(digests) & 0xFFFFFFFFFFFFFFFF

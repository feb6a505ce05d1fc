"""The rows that each of several processes reads, with random access: whole batches, or one example at a time.

A process is known by its *rank*, from 0, among `world_size`. It has an equal part of the rows of every batch, and
rows keep their places in the global one: batches and digests do not depend on how many processes there are.
"""

import dataclasses
import os
from typing import Any, NamedTuple

import numpy as np

from data_prep.store.documents import Document
from gpt_pretrain import checks
from gpt_pretrain.data.batches import Batches, check_ids, read_rows
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream, sizes_from
from gpt_pretrain.data.stream_data import StreamData

_CHUNK_TOKENS = 1 << 19  # of examples that are read at once, at most


class Batch(NamedTuple):
    """The rows of one step's batch that a rank has.

    Attributes:
      step_index: how many updates come before it.
      position: of row 0 of the global batch.
      batch_size: of the global batch.
      rows: of the global batch, int64 (n,).
      tokens: (n, seq_len + 1), uint16 or uint32 as they are stored: inputs `[:, :-1]`, targets `[:, 1:]`.
      streams: int64 (n,), which stream of the plan's stage each row is from.
      windows: int64 (n,), of that stream.
      digest: of these rows; those of all ranks add up to the batch's, modulo 2**64.
      keep: where the global batch has masked targets (`mask`), whether each target of these rows counts, bool
        (n, seq_len); else None, on every rank.
    """

    step_index: int
    position: int
    batch_size: int
    rows: np.ndarray
    tokens: np.ndarray
    streams: np.ndarray
    windows: np.ndarray
    digest: int
    keep: np.ndarray | None = None


class Example(NamedTuple):
    """One row.

    Attributes:
      step_index, row: its batch, and its place in the global one.
      position: how many examples come before it.
      stream: its name in a mixture; "" for one alone.
      tokens: (seq_len + 1,), as they are stored.
      documents: those with a token in the window, in order; empty where not asked for or not recorded.
      keep: whether each target counts, bool (seq_len,), in a stage with masked targets (`mask`); else empty.
    """

    step_index: int
    row: int
    position: int
    stream: str
    window: int
    tokens: np.ndarray
    documents: tuple[Document, ...] = ()
    keep: np.ndarray | tuple[()] = ()  # None would be in the way of PyTorch's collating


@dataclasses.dataclass(frozen=True)
class Rank:
    """One of `world_size` processes. ValueError unless 0 <= rank < world_size."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        checks.whole_number("world_size", self.world_size, least=1, most=checks.MOST_ROWS)
        checks.whole_number(f"rank (of world_size={self.world_size})", self.rank, least=0, most=self.world_size - 1)

    def check(self, plan: Plan, num_steps: int) -> None:
        """ValueError where a batch of the first `num_steps` steps cannot be split into equal parts."""
        stops = [*(stage.from_step for stage in plan.stages[1:]), num_steps]
        for stage, stop in zip(plan.stages, stops, strict=True):
            for first, size in sizes_from(stage.batch_sizes, stage.from_step):
                if size % self.world_size and first < min(stop, num_steps):
                    raise ValueError(
                        f"batch_size={size} (from step {first + 1}) cannot be split over world_size={self.world_size}: "
                        f"{size / self.world_size:.2f} rows each. Use a multiple of {self.world_size}."
                    )

    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of the global batch, int64 (batch_size / world_size,).

        >>> Rank(1, 4).rows(8)
        array([2, 3])
        """
        share = batch_size // self.world_size
        return np.arange(self.rank * share, (self.rank + 1) * share)


class RankBatches:
    """Element `k` is the batch of the step with index `first_index + k`, of `num_steps` steps in all."""

    def __init__(self, data: StreamData, plan: Plan, num_steps: int, rank: Rank, first_index: int = 0):
        self._data, self._plan, self._num_steps = data, plan, num_steps
        self._rank, self._first_index = rank, first_index
        self._batches: dict[tuple[int, int], Batches] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": {}}

    def __len__(self) -> int:
        return self._num_steps - self._first_index

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        step_index = self._first_index + int(index)
        batch = self._of_stage(step_index)[step_index]
        return Batch(
            step_index,
            batch.position,
            batch.batch_size,
            self._rank.rows(batch.batch_size),
            batch.tokens[0],
            batch.streams[0],
            batch.windows[0],
            batch.digest,
            None if batch.keep is None else batch.keep[0],
        )

    def _of_stage(self, step_index: int) -> Batches:
        """A name may mean another dataset in another stage, and open files are of one process."""
        stage = self._plan.stage_at(step_index)
        key = os.getpid(), stage.from_step
        if key not in self._batches:
            datasets = self._data.of(stage)
            self._batches[key] = Batches(
                {name: each.splits["train"] for name, each in datasets.items()},
                self._plan,
                vocab_size=_vocab_size(self._data, stage),
                num_steps=self._num_steps,
                rows_of=lambda batch_size: self._rank.rows(batch_size)[None],
            )
        return self._batches[key]


class RankExamples:
    """Element `k` is the `k`-th of the rows that a rank has in the first `num_steps` batches, in order."""

    def __init__(self, data: StreamData, plan: Plan, num_steps: int, rank: Rank, *, with_documents: bool = False):
        self._data, self._plan, self._rank, self._with_documents = data, plan, rank, with_documents
        # All batches are split evenly, so a rank has had its part of every position.
        self._stops = [plan.position(stage.from_step) for stage in plan.stages[1:] if stage.from_step < num_steps]
        self._stops.append(plan.position(num_steps))
        self._chunk: tuple[int, list[Example]] | None = None  # the first one's number

    def __len__(self) -> int:
        return self._stops[-1] // self._rank.world_size

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        chunk = self._chunk
        if chunk is None or not chunk[0] <= index < chunk[0] + len(chunk[1]):
            # Twice as far ahead each time that examples follow one another: a look at a single one costs little.
            ahead = 2 * len(chunk[1]) if chunk and index == chunk[0] + len(chunk[1]) else 1
            chunk = index, self._read(index, ahead)
            self._chunk = chunk  # one assignment: another thread sees the old chunk or the new one
        example = chunk[1][index - chunk[0]]
        example = example._replace(tokens=example.tokens.copy())  # the reader's own, to change
        return example._replace(documents=self._documents(example)) if self._with_documents else example

    def _read(self, first: int, ahead: int) -> list[Example]:
        """Examples from number `first` on, at most `ahead` of them, all of one stage; without their documents."""
        world_size = self._rank.world_size
        stop = min(stop for stop in self._stops if stop > first * world_size)
        stage = self._stage_at(first)
        count = max(1, min(ahead, _CHUNK_TOKENS // stage.seq_len, stop // world_size - first))
        numbers = first + np.arange(count)
        steps = stage.steps_at(numbers * world_size)
        rows = np.empty_like(numbers)
        for step_index in np.unique(steps).tolist():
            chosen, share = steps == step_index, stage.batch_size(step_index) // world_size
            rows[chosen] = self._rank.rank * share + numbers[chosen] - stage.position(step_index) // world_size
        begins = np.array([stage.position(step_index) for step_index in steps.tolist()])
        streams, windows = stage.examples_at(begins + rows)
        sources = {name: each.splits["train"] for name, each in self._data.of(stage).items()}
        tokens, keep, _ = read_rows(sources, stage, begins + rows, streams, windows)
        if keep is None and stage.masks:
            keep = np.ones((count, stage.seq_len), bool)
        check_ids(stage, streams, windows, tokens, _vocab_size(self._data, stage))
        names = [stream.name for stream in stage.streams]
        lists = (each.tolist() for each in (steps, rows, begins + rows, streams, windows))
        return [
            Example(
                *(step_index, row, position, names[stream], window, tokens[i]),
                keep=() if keep is None else keep[i],
            )
            for i, (step_index, row, position, stream, window) in enumerate(zip(*lists, strict=True))
        ]

    def _stage_at(self, number: int) -> Stage:
        position = number * self._rank.world_size
        return [stage for stage in self._plan.stages if stage.from_position <= position][-1]

    def _documents(self, example: Example) -> tuple[Document, ...]:
        stage = self._plan.stage_at(example.step_index)
        (stream,) = (each for each in stage.streams if each.name == example.stream)
        start, stop = example.window * stage.seq_len, (example.window + 1) * stage.seq_len + 1
        found: list[Document] = []
        for _, each, part in stage.insertions_at(np.array([example.position])):
            span = [each.start + token for token in each.span(part, stage.seq_len)]
            found += self._data.documents(Stream(*each.source), *span)
            start += each.num_overwritten(part, stage.seq_len)
        return (*found, *(self._data.documents(stream, start, stop) if start < stop else ()))


def _vocab_size(data: StreamData, stage: Stage) -> int:
    return max(each.vocab_size for each in data.of(stage).values())

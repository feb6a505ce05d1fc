"""Batches of a run read again, and compared with the digests of what it was trained on. Knows nothing of the model."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.damage import explain
from gpt_pretrain.data.stages import Stage
from gpt_pretrain.history.opened_run import OpenedRun

CHUNK_TOKENS = 1 << 23  # what a thread reads before it reports
_ANY_ID = 1 << 32  # an id out of range is a wrong digest like any other: it is not for us to stop there


@dataclasses.dataclass(frozen=True)
class ReplayedBatch:
    """One batch.

    Attributes:
      step_index: of the plan, from 0.
      streams, windows: of each row; None where not asked for.
    """

    step_index: int
    position: int
    digest: int
    streams: list[str] | None
    windows: list[int] | None

    def to_json(self) -> dict[str, Any]:
        """JSON values only; the update counts from 1."""
        return {
            "update": self.step_index + 1,
            "position": self.position,
            "digest": f"{self.digest:016x}",
            "streams": self.streams,
            "windows": self.windows,
        }


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Steps [first, stop), all of one stage of the plan."""

    stage: Stage
    first: int
    stop: int


def replay(
    run: OpenedRun,
    first: int,
    stop: int,
    *,
    with_rows: bool = False,
    num_threads: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[list[ReplayedBatch]]:
    """Reads the batches of steps [first, stop) of the plan again, in order, some at a time.

    Args:
      with_rows: also stream and window of each row.
      num_threads: decides nothing but the time it takes: NumPy waits for the disk and copies without Python's lock.
      chunk_tokens: about how many tokens come at a time.

    Raises ValueError where a dataset is not there or is another one.
    """
    chunks = list(_chunks(run, first, stop, chunk_tokens))
    for chunk in chunks:
        run.sources(chunk.stage)  # opened here, once: a run is not opened by several threads, and errors come first
    if num_threads < 2 or len(chunks) < 2:
        yield from (_read(run, chunk, with_rows) for chunk in chunks)
        return
    with ThreadPoolExecutor(min(num_threads, len(chunks))) as pool:
        # Not all at once: what is read would wait in memory for a slow consumer.
        waiting: deque[Future[list[ReplayedBatch]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_read, run, chunk, with_rows))
            if len(waiting) >= 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chunks(run: OpenedRun, first: int, stop: int, chunk_tokens: int) -> Iterator[_Chunk]:
    """Steps [first, stop) in pieces of about `chunk_tokens`, none of which reaches into another stage."""
    while first < stop:
        stage = run.plan.stage_at(first)
        num_steps = max(1, chunk_tokens // (run.plan.batch_size(first) * stage.seq_len))
        later = [each.from_step for each in run.plan.stages if each.from_step > first]
        end = min([first + num_steps, stop, *later])
        yield _Chunk(stage, first, end)
        first = end


def _read(run: OpenedRun, chunk: _Chunk, with_rows: bool) -> list[ReplayedBatch]:
    sources, num_steps = run.sources(chunk.stage), chunk.stop - chunk.first
    batches = Batches(sources, run.plan, vocab_size=_ANY_ID, first_index=chunk.first, num_steps=num_steps)
    names = [stream.name for stream in chunk.stage.streams]
    out = []
    for index in range(num_steps):
        batch = batches[index]
        streams = windows = None
        if with_rows:
            streams = [names[i] for i in batch.streams.reshape(-1).tolist()]
            windows = batch.windows.reshape(-1).tolist()
        out.append(ReplayedBatch(batch.step_index, batch.position, batch.digest, streams, windows))
    return out


def is_as_the_ledger_says(run: OpenedRun, batch: ReplayedBatch) -> bool:
    """Whether the run was trained on just this batch."""
    return batch.digest == int(run.ledger.digests[batch.step_index])


def check_batch(run: OpenedRun, step_index: int) -> None:
    """Reads one batch that the run was trained on. ValueError, saying why, where it is not as the ledger says."""
    if step_index < len(run.ledger):
        ((batch,),) = replay(run, step_index, step_index + 1)
        if not is_as_the_ledger_says(run, batch):
            raise ValueError(describe_mismatch(run, [batch], 1))


def describe_mismatch(run: OpenedRun, unequal: Sequence[ReplayedBatch], num_updates: int) -> str:
    """The batches, of `num_updates` that were read, that are not as the ledger says, and which file is to blame."""
    one = unequal[0]
    stage = run.plan.stage_at(one.step_index)
    datasets = {stream.name: run.dataset(stream) for stream in stage.read_from}
    others = f" ({len(unequal)} of {num_updates} updates differ, the last is {unequal[-1].step_index + 1})"
    return (
        f"DIFFERS: {run.save_dir}: the batch of update {one.step_index + 1} (position {one.position}) has the digest "
        f"{one.digest:016x}, the ledger says {int(run.ledger.digests[one.step_index]):016x}"
        f"{others * (len(unequal) > 1)}.\n" + explain(run.plan, datasets, one.step_index)
    )

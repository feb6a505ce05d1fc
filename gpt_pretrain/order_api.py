"""The order of the data for other people's trainers: their model and loop, our batches, resume, ledger and `replay`.

    from gpt_pretrain.order_api import open_order

    order = open_order("data/fineweb-10BT", seq_len=1024, batch_size=480, num_steps=600_000)
    record = order.record("runs/mine")
    for batch in order.read():
        update(batch.tokens[:, :-1], batch.tokens[:, 1:])
        record.add(batch)

The whole state is one integer, the number of updates made: `order.read(step)` goes on after so many.
docs/other-trainers.md has the loops of nanoGPT and nanodo. Nothing here imports JAX; Grain, which does where it finds
it, is imported by `batches` and `examples` alone. For PyTorch: `gpt_pretrain.torch_data`.
"""

import dataclasses
import itertools
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.store.buckets import is_bucket
from data_prep.store.dataset_files import whereabouts
from data_prep.store.datasets import TokenDataset, Verify
from gpt_pretrain import checks
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.data.asked_edits import Edits
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.edits import check_edits, edited
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.ranks import Batch, Example, Rank, RankBatches, RankExamples
from gpt_pretrain.data.record import AddUp, Record
from gpt_pretrain.data.stages import batch_sizes_of
from gpt_pretrain.data.stream_data import DatasetPlace, StreamData
from gpt_pretrain.history.opened_run import OpenedRun

if TYPE_CHECKING:
    import grain

__all__ = ["Batch", "Example", "Order", "Record", "open_order"]

log = logging.getLogger(__name__)

_GROUP_TOKENS = 1 << 19  # read by the thread before it hands over
_NUM_GROUPS = 4  # read ahead
_SETTINGS = {each.name for each in dataclasses.fields(DataConfig)} - {"dir", "document_mask", "tokenizer"}


class Order:
    """Which tokens every batch of a run holds; see `open_order`.

    Attributes:
      plan: what every step consumes.
      num_steps: of the run.
      vocab_size: ids are below it.
      end_of_text: the id that begins each document.
    """

    def __init__(self, plan: Plan, num_steps: int, data: StreamData, edits: Edits | None = None):
        datasets = data.of(plan.stages[-1]).values()
        self.plan, self.num_steps, self._data, self._edits = plan, num_steps, data, edits
        self.vocab_size = max(each.vocab_size for each in datasets)
        self.end_of_text = next(iter(datasets)).end_of_text

    def batches(self, rank: int = 0, world_size: int = 1) -> "grain.MapDataset[Batch]":
        """Random access to this rank's rows of every batch: element `s` is of the step with index `s`, from 0.

        As of every `MapDataset`, an index beyond the end begins again. ValueError where a batch cannot be split.
        """
        return _map_dataset(RankBatches(self._data, self.plan, self.num_steps, self._rank(rank, world_size)))

    def examples(
        self, rank: int = 0, world_size: int = 1, *, with_documents: bool = False
    ) -> "grain.MapDataset[Example]":
        """The same, a row at a time: this rank's rows of the first batch, then those of the second, and so on.

        Args:
          with_documents: also which documents they hold, looked up in the dataset's tables.
        """
        there = self._rank(rank, world_size)
        return _map_dataset(RankExamples(self._data, self.plan, self.num_steps, there, with_documents=with_documents))

    def read(self, step: int = 0, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """This rank's rows of the batches after `step` updates, in order, read ahead by a thread.

        Raises ValueError where a batch cannot be split, or the run has no such step.
        """
        there = self._rank(rank, world_size)
        return _read_ahead(RankBatches(self._data, self.plan, self.num_steps, there, self._step(step)))

    def record(
        self,
        save_dir: str | os.PathLike,
        step: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        add_up: AddUp | None = None,
    ) -> Record:
        """Keeps what a run consumes in `save_dir`, for `replay` and `inspect`; goes on after `step` updates.

        Args:
          add_up: see `Record`; needed for several ranks.

        Raises ValueError where the directory holds another run, or not the steps before `step`.
        """
        there = self._rank(rank, world_size)
        directories = {}
        for stage in self.plan.stages:
            for stream in stage.read_from:
                if place := self._data.places.get(stream.fingerprint):
                    directories |= dict.fromkeys((stream.name, stream.fingerprint), whereabouts(place.directory))
        step = self._step(step)
        save_dir = checks.path("save_dir", save_dir)
        return Record(save_dir, self.plan, directories, self.num_steps, step=step, rank=there, add_up=add_up)

    def continued(self, step: int, wanted: "Order") -> "Order":
        """This order until `step` updates are made, and what `wanted` asks for from there on.

        Streams go on in their place (docs/data-order.md, "Stages, steps and positions"), so a batch size, a mixture, a
        sequence length, exclusions or edits in place may change on the way. PlanError for another seed, or other data
        of one name; ValueError where `wanted` is a run's own order, and edited.
        """
        kept = Plan(tuple(stage for stage in self.plan.stages if stage.from_step <= self._step(step)))
        plan = kept.continued(wanted.plan.stages[-1], step)
        edits = wanted._edits or Edits()
        if wanted._edits is None and wanted.plan.stages[-1].is_edited:
            raise ValueError(
                "the wanted order is a run's, and it is edited: open the order of its dataset instead, with the "
                "substitute, mask and insert that it should have"
            )
        plan = edited(plan, step, edits, num_steps=max(step, wanted.num_steps))
        return Order(plan, wanted.num_steps, self._data | wanted._data, edits)

    def stream_names(self, step_index: int) -> list[str]:
        """What the numbers in `Batch.streams` mean at a step; the name of a dataset alone is ""."""
        return [stream.name for stream in self.plan.stage_at(step_index).streams]

    def _rank(self, rank: int, world_size: int) -> Rank:
        found = Rank(rank, world_size)
        found.check(self.plan, self.num_steps)
        return found

    def _step(self, step: int) -> int:
        return checks.whole_number("step (updates made)", step, least=0, most=self.num_steps)


def open_order(
    source: str | os.PathLike | None = None,
    *,
    batch_size: int | Sequence[tuple[int, int]] | None = None,
    num_steps: int | None = None,
    data_dirs: Sequence[str] = (),
    **settings: Any,
) -> Order:
    """Opens the order of a dataset, or of a run.

        open_order("data/fineweb-10BT", seq_len=1024, batch_size=480, num_steps=600_000)
        open_order(mixture={"web": ("data/web", 7), "code": ("data/code", 3)}, batch_size=480, num_steps=1000)
        open_order("runs/gpt2_124m")

    Args:
      source: a prepared dataset, or a directory or glob of .bin shards; or the `save_dir` of a run, of this or of
        another trainer, whose plan it is then. None with `mixture`.
      batch_size: over all ranks; or a schedule of (updates made, size), as `train.batch_size`.
      num_steps: of the run; for a plan of a run, that run's.
      data_dirs: of a run: where its datasets are now, if not where it had them; "DIR", or "NAME=DIR" in a mixture.
      settings: of a dataset: seed, seq_len, shuffle, mixture, exclude, substitute, mask, insert and others of
        `DataConfig`, with its defaults.

    Raises ValueError, in a line, for what cannot be: no such dataset or run, a damaged one, a setting out of range, a
    plan of other data.
    """
    source = None if source is None else checks.place("source", source)
    if num_steps is not None:
        num_steps = checks.whole_number("num_steps", num_steps, least=1, most=checks.MOST_ROWS)
    if source is not None and _is_run(source, batch_size):
        given = [*settings, *(["batch_size"] if batch_size is not None else [])]
        if given:
            raise ValueError(
                f"{source}: is a run, whose plan says all but num_steps; found {', '.join(given)} as well. Leave that "
                "out, or open a dataset and use `continued`."
            )
        return _order_of_run(source, num_steps, data_dirs)
    if batch_size is None or num_steps is None:
        missing = [name for name, value in (("batch_size", batch_size), ("num_steps", num_steps)) if value is None]
        raise ValueError(
            f"{source or 'mixture'}: is no run (it has no {run_lib.FILE_NAME}); say {' and '.join(missing)}"
        )
    if data_dirs:
        raise ValueError(
            f"{source or 'mixture'}: is no run (it has no {run_lib.FILE_NAME}); data_dirs are of runs only"
        )
    return _order_of_dataset(source, batch_sizes_of("batch_size", batch_size), num_steps, settings)


def _is_run(source: str, batch_size: object) -> bool:
    if is_bucket(source):  # nothing is asked of the bucket to find that out
        return batch_size is None
    return Path(source, run_lib.FILE_NAME).exists()


def _order_of_dataset(
    source: str | None, batch_sizes: tuple[tuple[int, int], ...], num_steps: int, settings: dict[str, Any]
) -> Order:
    if unknown := sorted(settings.keys() - _SETTINGS):
        raise ValueError(f"{', '.join(unknown)}: no such setting, expected some of {', '.join(sorted(_SETTINGS))}")
    if (source is None) == (settings.get("mixture") is None):
        raise ValueError("expected either a dataset or a mixture of them")
    config = DataConfig(**settings) if source is None else DataConfig(dir=source, **settings)
    datasets = config.open()
    for dataset in datasets.values():
        _warn_of_unverified(dataset)
    inserted = config.open_inserted(datasets)
    edits = config.edits(datasets, inserted)
    plan = edited(Plan((config.stage(datasets, batch_sizes),)), 0, edits, num_steps=num_steps)
    # As a plan is read: what is refused there must not be written.
    plan = Plan.from_json(plan.to_json())
    plan.check_epochs(num_steps, run_lib.MAX_EPOCHS)
    config.check_epochs(plan, num_steps)
    places = {
        each.fingerprint: DatasetPlace(each.directory, config.format, config.cache_dir, config.cache_bytes)
        for each in datasets.values()
    }
    for each in inserted.values():
        places.setdefault(each.fingerprint, DatasetPlace(each.directory, "auto", config.cache_dir, config.cache_bytes))
    return Order(plan, num_steps, StreamData(places, verify="size"), edits)


def _order_of_run(save_dir: str, num_steps: int | None, data_dirs: Sequence[str], verify: Verify = "auto") -> Order:
    run = OpenedRun(save_dir, data_dirs, verify=verify)
    places, missing = {}, {}
    for stream in run.streams():
        try:
            places[stream.fingerprint] = DatasetPlace(run.directory(stream))
        except ValueError as error:  # of one that the run had once, it matters when its batches are asked for
            missing[stream.fingerprint] = str(error)
    check_edits(run.plan, num_steps or run.data.num_steps)
    order = Order(run.plan, num_steps or run.data.num_steps, StreamData(places, missing, verify))
    for stream in run.plan.stages[-1].streams:
        _warn_of_unverified(order._data.dataset(stream))
    return order


def _warn_of_unverified(dataset: TokenDataset) -> None:
    if dataset.unverified:
        log.warning(
            "%s: of %d files only the sizes were checked, as they are large. `python -m data_prep.check DIR`, or "
            "verify='digest', reads them all.",
            dataset.directory,
            len(dataset.unverified),
        )


def _map_dataset(elements: RankBatches | RankExamples) -> Any:
    import grain

    return grain.MapDataset.source(elements)  # pyright: ignore


def _read_ahead(batches: RankBatches) -> Iterator[Batch]:
    """In order, read by a thread of our own: the trainer's is Grain's, which imports JAX where it finds it."""
    if not len(batches):
        return
    size = max(1, _GROUP_TOKENS // batches[0].tokens.size)  # small batches come together, as `data.loader` has them
    firsts = iter(range(0, len(batches), size))

    def read(first: int) -> list[Batch]:
        return [batches[i] for i in range(first, min(first + size, len(batches)))]

    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        waiting = deque(pool.submit(read, first) for first in itertools.islice(firsts, _NUM_GROUPS))
        while waiting:
            group = waiting.popleft().result()
            waiting.extend(pool.submit(read, first) for first in itertools.islice(firsts, 1))
            yield from group
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who stops in the middle does not wait for what is not read

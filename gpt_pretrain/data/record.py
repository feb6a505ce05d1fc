"""What a run of another trainer has consumed, kept as `replay` and `inspect` read it: data.json and ledger.bin."""

import dataclasses
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gpt_pretrain.data import ledger as ledger_lib
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan, differences
from gpt_pretrain.data.ranks import Batch, Rank
from gpt_pretrain.data.run import LedgerMark, RunData

AddUp = Callable[[np.ndarray], np.ndarray]


class Record:
    """The batches of one run, step by step.

        record = order.record("runs/mine", step)   # begins it, or goes on after `step` updates
        record.add(batch)                          # after each update
        record.save()                              # before each checkpoint, on every rank

    Rank 0 alone writes. What was added since the last `save` is lost with the process, as are the weights since the
    last checkpoint; a record that reaches further than the checkpoint is cut to it.

    Args:
      directories: of the plan's datasets, by name and fingerprint of their streams.
      step: how many updates were made before.
      add_up: on every rank, a uint64 (n,) of that rank -> the sums over all ranks, modulo 2**64.

    Raises ValueError where the directory holds another run, or not the steps that were made before.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike,
        plan: Plan,
        directories: Mapping[str, str],
        num_steps: int,
        *,
        step: int,
        rank: Rank,
        add_up: AddUp | None,
    ):
        if rank.world_size > 1 and add_up is None:
            raise ValueError(
                f"world_size={rank.world_size} needs add_up, a function that adds up the ranks' digests, such as "
                "gpt_pretrain.torch_data.add_up_digests or gpt_pretrain.train.digests.add_up_digests (JAX)"
            )
        self._rank, self._add_up = rank, add_up
        self._data = RunData(os.fspath(save_dir), plan, dict(directories), num_steps)
        self._ledger = Ledger(np.zeros(step, np.uint64))
        if not rank.rank:
            self._begin(step)

    def __len__(self) -> int:
        """Steps recorded, those not saved yet included."""
        return len(self._ledger)

    def add(self, batch: Batch) -> None:
        """Records the next step's batch. ValueError for another step's, or another rank's rows."""
        if batch.step_index != len(self):
            raise ValueError(
                f"the batch of step {batch.step_index + 1} was given, expected that of step {len(self) + 1}: a record "
                "has every step once. Was the loop resumed at another step than `order.record`?"
            )
        expected = self._rank.rows(batch.batch_size)
        found = len(batch.rows), int(batch.rows[0])
        if found != (len(expected), expected[0]):
            raise ValueError(
                f"the batch of step {batch.step_index + 1} has {found[0]} rows from row {found[1]} on, expected "
                f"{len(expected)} from {expected[0]} on: those of {self._rank}"
            )
        self._ledger.add(batch.digest)

    def save(self) -> None:
        """Writes what was added; on every rank, as it adds up what they have."""
        partial = self._ledger.take_new()
        whole = partial if self._add_up is None else np.asarray(self._add_up(partial))
        if whole.shape != partial.shape or whole.dtype != np.uint64:
            raise ValueError(f"add_up gave {whole.dtype} {whole.shape}, expected uint64 {partial.shape}")
        self._ledger.extend(whole)
        if not self._rank.rank:
            self._ledger.write(self._data.save_dir)
            # After the ledger: it may go on further than its mark, not the other way round.
            dataclasses.replace(self._data, mark=LedgerMark.of(self._ledger)).write()

    def _begin(self, step: int) -> None:
        save_dir = Path(self._data.save_dir)
        if (save_dir / "checkpoints").exists():
            raise ValueError(f"{save_dir}: holds a run of gpt_pretrain.main; expected a directory for this run alone")
        run_id, ledger = uuid.uuid4().hex, Ledger()
        if (save_dir / run_lib.FILE_NAME).exists():
            known = run_lib.open_run(save_dir)
            self._check_past(known.plan, step)
            if (save_dir / ledger_lib.FILE_NAME).exists():
                ledger = Ledger.read(save_dir)
            known.check_ledger(ledger)
            run_id = known.run_id or run_id
        if len(ledger) < step:
            raise ValueError(
                f"{save_dir}: its record has {len(ledger)} steps, expected at least the {step} that were made: call "
                "`record.save()` before each checkpoint. Resume at an earlier one, or record in another directory from "
                "step 0 on."
            )
        self._ledger = Ledger(ledger.digests[:step])
        save_dir.mkdir(parents=True, exist_ok=True)
        self._data = dataclasses.replace(self._data, run_id=run_id, mark=LedgerMark.of(self._ledger))
        self._data.write()  # it knows less than the ledger that is there, so it comes first
        self._ledger.write(save_dir)

    def _check_past(self, known: Plan, step: int) -> None:
        """What is past stays as it is: ValueError where the recorded run had other batches before `step`."""
        ours, theirs = (
            [stage for stage in plan.stages if stage.from_step < max(1, step)] for plan in (self._data.plan, known)
        )
        if ours == theirs:
            return
        where = f"{self._data.save_dir}: holds the record of another order"
        advice = (
            f"Record in another directory, or open the recorded order, `open_order({self._data.save_dir!r})`, and "
            "change it from some step on by `continued`."
        )
        for one, other in zip(ours, theirs, strict=False):
            if one != other:
                found = [line for line, _ in differences(other, one, one.from_step)]
                raise ValueError(f"{where} ({'; '.join(found) or 'its stages begin elsewhere'}). {advice}")
        raise ValueError(f"{where} (it has {len(theirs)} stages until step {step}, this one {len(ours)}). {advice}")

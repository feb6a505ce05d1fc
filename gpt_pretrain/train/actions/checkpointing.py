"""Saving the run."""

import jax

from gpt_pretrain.train.actions.action import Action, Now, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.digests import add_up_digests
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.record import write_ledger
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.writers import MetricWriter


class SaveCheckpoints(Action):
    """At an interval, at the last step, and where a signal stops the run."""

    def __init__(self, built: Built, start: Start, checkpoints: Checkpoints, writer: MetricWriter):
        self.due = Schedule(built.config.save_interval, also=(built.total_steps,))
        self._built, self._start = built, start
        self._checkpoints, self._writer = checkpoints, writer
        self._saved_step = start.step

    def run(self, now: Now) -> None:
        if now.step == self._saved_step:
            return
        config, ledger = self._built.config, self._start.ledger
        self._writer.flush()  # curves up to a checkpoint are as safe as the checkpoint
        ledger.extend(add_up_digests(ledger.take_new()))
        assert len(ledger) == now.step, (len(ledger), now.step)
        if jax.process_index() == 0:
            write_ledger(config.save_dir, ledger)
        metadata = CheckpointMetadata(
            run_id=self._start.run_id,
            step=now.step,
            seed=config.seed,
            model=self._built.spec,
            seq_len=config.data.seq_len,
            plan=self._start.plan,
            ledger=ledger,
            tokenizer=self._built.data.first.tokenizer,
            tokenizer_digest=self._built.data.first.tokenizer_digest,
            config=config.describe_config(),
        )
        self._checkpoints.save(now.state, metadata)
        self._saved_step = now.step

    def at_end(self, now: Now) -> None:
        self.run(now)
        self._checkpoints.wait()

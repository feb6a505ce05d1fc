"""Saving the run."""

import logging
import shutil
import time

import jax

from data_prep.pages.numbers import size_text
from gpt_pretrain.train import events
from gpt_pretrain.train.actions.action import Action, Now, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.digests import add_up_digests
from gpt_pretrain.train.exclusive import HeldDirectory
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.record import write_ledger
from gpt_pretrain.train.results import RunFailed
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import Category, TimeLedger
from gpt_pretrain.train.writers import MetricWriter

log = logging.getLogger(__name__)

_LOOK_SECS = 10.0  # between looks whether the save_dir is still there


class SaveCheckpoints(Action):
    """At an interval, at the last step, and where a signal stops the run.

    A save that fails is said aloud, and training goes on to the next one: only a run that ends without its last
    checkpoint, or several processes, which could not agree on what is there, end with an error.
    """

    counts_as = Category.CHECKPOINT

    def __init__(
        self,
        built: Built,
        start: Start,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        held: HeldDirectory,
        times: TimeLedger,
    ):
        self._schedule = Schedule(built.config.save_interval, also=(built.total_steps,))
        self._built, self._start = built, start
        self._checkpoints, self._writer, self._held, self._times = checkpoints, writer, held, times
        self._saved_step = start.step  # or being saved
        self._looked_secs = time.monotonic()
        self._is_saving = self._is_ending = False

    def due(self, step: int) -> bool:
        if time.monotonic() - self._looked_secs > _LOOK_SECS:
            self._looked_secs = time.monotonic()
            self._held.check()
        if self._is_saving and not self._checkpoints.is_saving:
            self._settle()
        return self._schedule(step)

    def run(self, now: Now) -> None:
        """Starts saving, if this step is not saved."""
        self._settle()
        self._times.at_checkpoint(now.step)
        if now.step == self._saved_step:
            return
        self._held.check()
        step, self._saved_step = now.step, now.step
        ledger = self._start.ledger
        ledger.extend(add_up_digests(ledger.take_new()))
        assert len(ledger) == step, (len(ledger), step)
        try:
            self._writer.flush()  # curves up to a checkpoint are as safe as the checkpoint
            if jax.process_index() == 0:
                write_ledger(self._built.config.directory, ledger)
            self._checkpoints.save(now.state, self._metadata(step))
            self._is_saving = True
        except Exception as error:
            self._failed(error)

    def at_end(self, now: Now) -> None:
        self._settle()
        self._is_ending = True
        self.run(now)  # once more if it failed: perhaps there is room by now
        self._settle()
        self._held.check()

    def _metadata(self, step: int) -> CheckpointMetadata:
        config = self._built.config
        return CheckpointMetadata(
            run_id=self._start.run_id,
            step=step,
            seed=config.seed,
            model=self._built.spec,
            seq_len=config.data.seq_len,
            plan=self._start.plan,
            ledger=self._start.ledger,
            tokenizer=self._built.data.first.tokenizer,
            tokenizer_digest=self._built.data.first.tokenizer_digest,
            config=config.describe_config(),
        )

    def _settle(self) -> None:
        """Waits for the save under way, if there is one."""
        is_saving, self._is_saving = self._is_saving, False
        try:
            self._checkpoints.wait()
            if is_saving and self._checkpoints.latest_step != self._saved_step:
                raise RuntimeError("Orbax ended without an error and without a checkpoint")
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Shouts, and makes the checkpoints ready for the next save."""
        self._held.check()  # if that is why, it says so
        step, self._saved_step = self._saved_step, -1
        message = f"SAVING STEP {step} FAILED: {_reason(error)} ({self._free()})."
        if self._is_ending or jax.process_count() > 1:
            raise RunFailed(
                f"{message} What was trained after {self._newest()} is lost. Mend that, and the same command resumes "
                "from there."
            ) from error
        self._checkpoints.start_anew()
        events.note(self._built.config.directory, step, events.Kind.SAVE_FAILED, message)
        interval, last = self._built.config.save_interval, self._built.total_steps
        coming = min(step - step % interval + interval, last) if interval else last
        after = f"step {coming} is saved next" if coming > step else "it is tried once more at the end"
        log.error(
            "%s Nothing is lost as long as this process runs: training goes on, and %s. Until then the newest good "
            "checkpoint is %s.",
            message,
            after,
            self._newest(),
        )

    def _newest(self) -> str:
        step = self._checkpoints.latest_step
        return "the start (nothing was saved yet)" if step is None else self._checkpoints.name_of(step)

    def _free(self) -> str:
        try:
            free = shutil.disk_usage(self._checkpoints.directory).free
        except OSError as error:
            return f"{self._checkpoints.directory}: {error.strerror}"
        return f"{size_text(free)} free in {self._checkpoints.directory}"


def _reason(error: Exception) -> str:
    """One line: libraries in C++ tell their whole call."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:150]} ... {text[-140:]}"

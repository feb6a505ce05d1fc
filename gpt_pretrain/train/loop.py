"""The training loop: steps, and CLU periodic actions between them."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax

from gpt_pretrain.data.batches import Element
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.loader import add_up_digests
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.train.actions.evaluation import Evaluation, MetricsReader, StepResult, Throughput
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.stopping import Agreement, StopSignal
from gpt_pretrain.train.writers.console import MetricWriter, periodic_actions


class Loop:
    """One run from `step` to `total_steps`.

    Attributes:
      state: the newest one; the step donates the one before.
      step: updates made so far; with the plan, the whole state of the data.
    """

    def __init__(
        self,
        *,
        state: TrainState,
        step: int,
        total_steps: int,
        plan: Plan,
        ledger: Ledger,
        step_fn: Callable,
        statistics_fn: Callable,
        evaluation: Evaluation | None,
        checkpoints: Checkpoints,
        save_dir: str,
        metadata: Callable[[int], dict],
        writer: MetricWriter,
        flops_per_token: float,
        peak_flops: float | None,
    ):
        """
        Args:
          step_fn: (state, batch) -> (state, metrics).
          statistics_fn: (state, batch) -> {name: scalar}.
          evaluation: validation loss, if there is a validation split.
          plan: what each step consumes.
          ledger: of the steps so far; goes on here.
          metadata: step -> what is saved beside the state.
          peak_flops: of all devices together, FLOP/s; None if unknown.
        """
        self.state = state
        self.step = step
        self._total_steps = total_steps
        self._plan = plan
        self._ledger = ledger
        self._step_fn = step_fn
        self._statistics_fn = statistics_fn
        self._evaluation = evaluation
        self._checkpoints = checkpoints
        self._save_dir = save_dir
        self._metadata = metadata
        self._writer = writer
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._saved_step = step
        self._reader = MetricsReader()
        self._throughput = Throughput()
        self._stop_signal: StopSignal | None = None

    def run(
        self,
        batches: Iterable[tuple[Element, jax.Array]],
        stop_signal: StopSignal,
        agreement: Agreement,
        *,
        log_interval: int,
        eval_interval: int,
        save_interval: int,
        statistics_interval: int,
        profile_step: int,
        profile_dir: str | os.PathLike,
    ) -> None:
        """Trains until `batches` end or a signal comes, and saves. The run's last step is always logged and evaluated.

        Intervals are in steps, 0 for never. Raises Diverged.
        """
        self._stop_signal = stop_signal
        callback = periodic_actions.PeriodicCallback
        self._log_action = callback(
            every_steps=log_interval or None, on_steps=[self.step + 1, self._total_steps], callback_fn=self._log
        )
        actions: list[Any] = []
        if self._evaluation:
            actions.append(
                callback(every_steps=eval_interval or None, on_steps=[self._total_steps], callback_fn=self._evaluate)
            )
        if save_interval:
            actions.append(callback(every_steps=save_interval, callback_fn=self._save))
        if profile_step and jax.process_index() == 0:
            actions.append(
                periodic_actions.Profile(
                    logdir=os.fspath(profile_dir),
                    first_profile=profile_step,
                    num_profile_steps=5,
                    profile_duration_ms=None,
                    every_secs=None,
                )
            )

        for element, batch in batches:
            if statistics_interval and (self.step + 1) % statistics_interval == 0:
                self._write_statistics(batch)
            self.state, metrics = self._step_fn(self.state, batch)
            self.step += 1
            self._ledger.add(element["digest"])
            self._report(self._reader.push(self.step, element["position"], metrics))
            for action in actions:
                action(self.step)
            if agreement.should_stop(stop_signal.received is not None):
                break
        self._save(self.step)
        self._checkpoints.wait()

    def _report(self, result: StepResult | None) -> None:
        if result:
            before, after = (self._plan.tokens_before(step) for step in (result.step - 1, result.step))
            self._throughput.step_done(after - before)
            self._log_action(result.step, result=result)

    def _log(self, step: int, t: float, result: StepResult) -> None:
        del t
        values = {f"train/{name}": value for name, value in result.metrics.items()}
        values["train/examples_seen"] = self._plan.position(step)
        values |= self._epochs(step)
        if rate := self._throughput.lap():
            values["train/tokens_per_sec"] = rate
            left = self._plan.tokens_before(self._total_steps) - self._plan.tokens_before(step)
            values["train/eta_secs"] = left / rate
            if self._peak_flops:
                values["train/mfu"] = rate * self._flops_per_token / self._peak_flops
        self._writer.write_scalars(step, values)

    def _epochs(self, step: int) -> dict[str, float]:
        """Of a mixture, how often each stream has been met."""
        epochs = self._plan.epochs(step)
        return {f"epochs/{name}": value for name, value in epochs.items()} if len(epochs) > 1 else {}

    def _evaluate(self, step: int, t: float | None = None) -> None:
        del t
        assert self._evaluation and self._stop_signal
        self._report(self._reader.flush())
        with self._throughput.paused():
            # Processes may see a signal at different times: only one alone may leave half way.
            leave = self._stop_signal if jax.process_count() == 1 else None
            if values := self._evaluation(self.state.params, leave):
                self._writer.write_scalars(step, {f"validation/{name}": value for name, value in values.items()})

    def _save(self, step: int, t: float | None = None) -> None:
        del t
        self._report(self._reader.flush())  # raises if this step diverged: a bad state is never saved
        if step == self._saved_step:
            return
        with self._throughput.paused():
            self._writer.flush()  # curves up to a checkpoint are as safe as the checkpoint
            self._ledger.extend(add_up_digests(self._ledger.take_new()))
            assert len(self._ledger) == step, (len(self._ledger), step)
            if jax.process_index() == 0:
                self._ledger.write(self._save_dir)
            self._checkpoints.save(step, self.state, self._metadata(step) | {"ledger": self._ledger.to_text()})
        self._saved_step = step

    def _write_statistics(self, batch: jax.Array) -> None:
        with self._throughput.paused():
            values = jax.device_get(self._statistics_fn(self.state, batch))
            self._writer.write_scalars(self.step + 1, {f"statistics/{name}": float(v) for name, v in values.items()})

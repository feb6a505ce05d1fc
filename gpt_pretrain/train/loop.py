"""The training loop: steps, and actions around them."""

from collections.abc import Iterable, Sequence

import jax

from gpt_pretrain.data.batches import HostBatch
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.results import MetricsReader, StepResult
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.stopping import Agreement, StopSignal
from gpt_pretrain.train.time_ledger import Category, TimeLedger


class Loop:
    """One run, from where it starts to its last step or to a signal.

    Args:
      state: of the start. The first step donates it: keep no reference.
      actions: called in this order.
      times: gets the time of everything that happens here.

    Attributes:
      step: updates made so far; with the plan, the whole state of the data.
      is_complete: all steps are made, and all that belongs to the last one.
    """

    def __init__(self, built: Built, start: Start, state: TrainState, actions: Sequence[Action], times: TimeLedger):
        self.step = start.step
        self.is_complete = False
        self._state = state
        self._built = built
        self._ledger: Ledger = start.ledger
        self._actions = actions
        self._times = times
        self._reader = MetricsReader()

    @property
    def state(self) -> TrainState:
        """After the last step that was made."""
        return self._state

    def run(self, fed: Iterable[tuple[HostBatch, jax.Array]], stop_signal: StopSignal) -> None:
        """Trains until `fed` ends or a signal comes. Raises Diverged."""
        with self._times.spent(Category.STEP):
            self._run(fed, stop_signal)

    def _run(self, fed: Iterable[tuple[HostBatch, jax.Array]], stop_signal: StopSignal) -> None:
        agreement = Agreement(self._built.mesh)
        for batch, tokens_MBT in self._times.waiting(fed):
            self._times.begin_step(self.step + 1)
            self._run_actions(self.step + 1, tokens_MBT, before=True)
            doses = self._built.doses(self.step + 1)
            if batch.keep is None:
                self._state, metrics = self._built.train_step(self._state, tokens_MBT, *doses)
            else:  # of some rows of the batch, which need not be this process's
                keep_MBT = self._built.placement.to_devices(batch.keep, batch.batch_size)
                self._state, metrics = self._built.masked_train_step(self._state, tokens_MBT, keep_MBT, *doses)
            self.step += 1
            self._ledger.add(batch.digest)
            self._finished(self._reader.push(self.step, batch.position, metrics))
            self._run_actions(self.step, tokens_MBT, before=False)
            if agreement.should_stop(stop_signal.received is not None):
                break
        self._finished(self._reader.flush())
        now = Now(self.step, self._state, self.step == self._built.total_steps)
        for action in self._actions:
            with self._times.spent(action.counts_as):
                action.at_end(now)
        self.is_complete = now.is_last and all(action.is_complete for action in self._actions)

    def _run_actions(self, step: int, tokens_MBT: jax.Array, *, before: bool) -> None:
        for action in self._actions:
            if action.is_before_step != before or not action.due(step):
                continue
            if action.counts_as is not Category.STEP:
                # Reads what is under way, as part of the steps: a state that diverged is neither saved nor evaluated.
                self._finished(self._reader.flush())
            now = Now(self.step, self._state, step == self._built.total_steps, tokens_MBT)
            with self._times.spent(action.counts_as):
                action.run(now)

    def _finished(self, result: StepResult | None) -> None:
        if result:
            for action in self._actions:
                action.on_result(result)

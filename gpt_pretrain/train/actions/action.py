"""What an action is: something that happens around the steps of a run."""

import dataclasses
from collections.abc import Iterable

import jax

from gpt_pretrain.train.results import StepResult
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.time_ledger import Category
from gpt_pretrain.train.writers import periodic_actions


@dataclasses.dataclass(frozen=True)
class Now:
    """Where the run is while an action is called.

    Attributes:
      step: updates made.
      state: after them. The next step donates it: keep no reference.
      is_last: the run's last step (the one to come, for an action before it).
      tokens_MBT: the batch of the step, on the devices; None at the end of the run.
    """

    step: int
    state: TrainState
    is_last: bool
    tokens_MBT: jax.Array | None = None


class Action:
    """Does nothing; derive from it what you need, and add it to `actions_of`.

    Attributes:
      is_before_step: `run` is called before the step that is due, with its batch and the state that it will
        change; else after it.
      is_complete: nothing of a finished run is missing. What is, the same command makes up for.
      counts_as: what the time of `run` and `at_end` is spent on. STEP is training time, which the tokens a second are
        of; for anything else, the metrics of all steps are read before `run`.
    """

    is_before_step = False
    is_complete = True
    counts_as = Category.EVALUATION

    def due(self, step: int) -> bool:
        """Whether to run at this step, counted from 1. Called once for each step, in order."""
        return False

    def run(self, now: Now) -> None:
        """Called where `due`."""

    def on_result(self, result: StepResult) -> None:
        """Called with the metrics of every step, in order, some time after it was made."""

    def at_end(self, now: Now) -> None:
        """Called once when the run ends or is stopped, after the metrics of every step."""


class Schedule:
    """Every `interval` steps (0: never), and at the steps `also`. CLU's periodic actions decide."""

    def __init__(self, interval: int, also: Iterable[int] = ()):
        self._action = periodic_actions.PeriodicCallback(
            every_steps=interval or None, on_steps=also, callback_fn=lambda step, t: None
        )

    def __call__(self, step: int) -> bool:
        """Call once a step, in order."""
        return self._action(step)

"""A profile of a few steps, for TensorBoard or xprof."""

import os

import jax

from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.time_ledger import Category
from gpt_pretrain.train.writers import periodic_actions

NUM_STEPS = 5


class Profile(Action):
    """Records the steps that follow `first_step`, in the first process."""

    counts_as = Category.STEP

    def __init__(self, first_step: int, save_dir: str):
        self._first_step = first_step
        self._profile = periodic_actions.Profile(
            logdir=os.path.join(save_dir, "tensorboard"),
            first_profile=first_step,
            num_profile_steps=NUM_STEPS,
            profile_duration_ms=None,
            every_secs=None,
        )

    def due(self, step: int) -> bool:
        return jax.process_index() == 0

    def run(self, now: Now) -> None:
        self._profile(now.step)

    def at_end(self, now: Now) -> None:
        """A profile that is not finished when the run is ends here."""
        if jax.process_index() == 0 and now.step >= self._first_step:
            self._profile(now.step + NUM_STEPS)

"""A run that begins where another one was, and goes on otherwise: an arm of an experiment."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from gpt_pretrain.data.plan import Plan
from gpt_pretrain.train.actions.action import Action
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoints import checkpoint_path, saved_steps
from gpt_pretrain.train.start import Start


@dataclasses.dataclass(frozen=True)
class Branch:
    """How a run differs from one that begins by itself; `train` takes it. A run of its own otherwise: it can be killed
    and resumed.

    Attributes:
      plan: of all its steps, those before its first one included.
      until: it ends after so many updates. Its schedules are those of the whole run.
      checkpoint: directory of this machine with the state that it begins from; None: a fresh one.
      step: updates made there; 0 for a fresh one.
      actions: (built, start) -> what else happens around its steps.
    """

    plan: Plan
    until: int
    checkpoint: str | None = None
    step: int = 0
    actions: Callable[[Built, Start], Sequence[Action]] = lambda built, start: ()

    def begin(self, directory: str) -> None:
        """Puts the checkpoint into the `save_dir`, if it has none yet."""
        if jax.process_index() == 0 and self.checkpoint and not saved_steps(directory):
            target = checkpoint_path(directory, self.step)
            partial = target.parent / f"{target.name}.copying"
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.checkpoint, partial, copy_function=_linked_or_copied)
            partial.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("branch")

    def shortened(self, built: Built) -> Built:
        """The same run, up to its end."""
        return dataclasses.replace(built, total_steps=min(built.total_steps, self.until))


def _linked_or_copied(source: str, target: str) -> str:
    """Nobody writes into a finished checkpoint: where both are on one disk, its files are shared."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, Path(target))
    return target

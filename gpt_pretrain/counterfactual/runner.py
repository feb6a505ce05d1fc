"""One control run, and the arms that leave it: all by one compiled step."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_pretrain.counterfactual.probes import name_of, whole
from gpt_pretrain.counterfactual.question import (
    checkpoint_name,
    steps_that_differ,
)
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.history.memorization import Passage
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span
from gpt_pretrain.history.token_losses import nll_of
from gpt_pretrain.train.build import Built, build
from gpt_pretrain.train.checkpoint_copies import checkpoint_at
from gpt_pretrain.train.checkpoints import restore_state
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.digests import add_up_digests
from gpt_pretrain.train.feed import feed
from gpt_pretrain.train.loop import Loop
from gpt_pretrain.train.opened_data import open_data
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.time_ledger import TimeLedger


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of many.

    Attributes:
      number: from 0.
      spans: the documents that it is without.
      steps: that hold one of them: from 1, ascending.
      plan: of the whole run.
    """

    number: int
    spans: tuple[Span, ...]
    steps: tuple[int, ...]
    plan: Plan

    @property
    def names(self) -> list[str]:
        """Of its documents."""
        return [name_of(each) for each in self.spans]


class Runner:
    """The control run, and arms that leave it.

    Attributes:
      began: when the first step could begin, by `time.monotonic()`.
    """

    def __init__(
        self,
        run: OpenedRun,
        config: TrainConfig,
        begin: int,
        until: int,
        targets: Sequence[Passage],
        stop: StopSignal,
    ):
        self._run, self._until, self._stop, self._step = run, until, stop, begin
        data = open_data(config)
        self._built = build(config, data, Start(begin, run.plan, Ledger()))
        self._state = self._first_state(begin)
        self._targets = targets
        longest = max(len(each.tokens) for each in targets)
        self._tokens_NT = np.zeros((len(targets), max(2, longest)), targets[0].tokens.dtype)
        for row, each in zip(self._tokens_NT, targets, strict=True):
            row[: len(each.tokens)] = each.tokens
        self.began = time.monotonic()

    def _first_state(self, begin: int) -> TrainState:
        if not begin:
            return self._built.fresh_state()
        checkpoint = checkpoint_at(checkpoint_name(self._run.save_dir, begin)).directory
        return restore_state(checkpoint, self._built.abstract_state)

    def advance(self, step: int) -> bool:
        """Trains the control run up to a step; whether it came so far. ValueError: its batches are not the run's."""
        if step > self._step:
            self._state, self._step = self._trained(self._state, self._run.plan, self._step, step, ())
        return self._step == step

    def train(self, arm: Arm) -> dict[str, Any] | None:
        """An arm, from the step before its first difference, where the control run is; None: a signal came."""
        began = time.monotonic()
        if self._step != arm.steps[0] - 1:
            return None
        state = jax.tree.map(jnp.copy, self._state)
        state, step = self._trained(state, arm.plan, self._step, self._until, arm.steps)
        if step != self._until:
            return None
        trained = time.monotonic()
        losses = self.losses(state)
        return {
            "version": 1,
            "arm": arm.number,
            "without": arm.names,
            "steps": list(arm.steps),
            "losses": losses,
            "seconds": {"steps": trained - began, "losses": time.monotonic() - trained},
        }

    def control_losses(self) -> list[float] | None:
        """Of the run as it was, at the end; None: a signal came."""
        return self.losses(self._state) if self.advance(self._until) else None

    def losses(self, state: TrainState) -> list[float]:
        """Mean loss of each target document's front, in nats; in the first process."""
        params = whole(state.params)  # of all processes together; one alone measures
        if jax.process_index() != 0:
            return []
        spec = self._built.spec.plain()
        end_of_text = self._built.data.first.end_of_text
        nll = nll_of(params, spec, self._tokens_NT, end_of_text=end_of_text)
        return [float(row[: len(each.tokens) - 1].mean()) for row, each in zip(nll, self._targets, strict=True)]

    def _trained(
        self, state: TrainState, plan: Plan, begin: int, stop: int, differing: Sequence[int]
    ) -> tuple[TrainState, int]:
        """The state after step `stop`, or where a signal came; its batches are the run's, but for those `differing`."""
        built: Built = dataclasses.replace(self._built, total_steps=stop)
        start = Start(begin, plan, Ledger())
        loop = Loop(built, start, state, [], TimeLedger())
        del state
        loop.run(feed(built, start), self._stop)
        ours = add_up_digests(start.ledger.take_new())
        theirs = self._run.ledger.digests[begin : begin + len(ours)]
        found = [begin + step for step in steps_that_differ(ours, theirs)]
        expected = [step for step in differing if begin < step <= begin + min(len(ours), len(theirs))]
        if found != expected and len(ours) == stop - begin:
            raise ValueError(
                f"{self._run.save_dir}: the batches of steps {found[:10]} are not those of its ledger, expected "
                f"{expected[:10]}: the data is not what the run was trained on"
            )
        return loop.state, loop.step

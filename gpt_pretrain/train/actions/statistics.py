"""Statistics of activations, gradients and parameters, layer by layer."""

import jax

from gpt_pretrain.train.actions.action import Action, Now, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.time_ledger import Category
from gpt_pretrain.train.writers import MetricWriter


class WriteStatistics(Action):
    """At an interval, those of the step to come: of its batch, and of the parameters before it."""

    is_before_step = True
    counts_as = Category.STATISTICS

    def __init__(self, built: Built, writer: MetricWriter):
        self.due = Schedule(built.config.statistics_interval)
        self._statistics, self._doses, self._writer = built.statistics, built.doses, writer

    def run(self, now: Now) -> None:
        values = jax.device_get(self._statistics(now.state, now.tokens_MBT, *self._doses(now.step + 1)))
        self._writer.write_scalars(now.step + 1, {f"statistics/{name}": float(v) for name, v in values.items()})

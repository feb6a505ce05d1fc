"""Metrics of the steps, on their way to the writers."""

from gpt_pretrain.data.plan import Plan
from gpt_pretrain.train.actions.action import Action, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.results import StepResult
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import TimeLedger
from gpt_pretrain.train.writers import MetricWriter


class LogMetrics(Action):
    """Writes loss, norms, speed, time left, where the time went and, of a mixture, epochs: at an interval, at the first
    and last step.

    The speed is that of training since the line before: steps and waiting for their data, nothing else.
    """

    def __init__(self, built: Built, start: Start, writer: MetricWriter, times: TimeLedger):
        self._schedule = Schedule(built.config.log_interval, also=(start.step + 1, built.total_steps))
        self._plan: Plan = start.plan
        self._total_tokens = start.plan.tokens_before(built.total_steps)
        self._flops_per_token, self._peak_flops = built.flops_per_token, built.peak_flops
        self._writer, self._times = writer, times
        self._before: tuple[int, float] | None = None  # tokens and seconds of training, at the line before

    def on_result(self, result: StepResult) -> None:
        if not self._schedule(result.step):
            return
        values = {f"train/{name}": value for name, value in result.metrics.items()}
        values["train/examples_seen"] = self._plan.position(result.step)
        epochs = self._plan.epochs(result.step)
        if len(epochs) > 1:
            values |= {f"epochs/{name}": value for name, value in epochs.items()}
        tokens, secs = self._plan.tokens_before(result.step), self._times.training_secs
        if self._before is not None:
            rate = (tokens - self._before[0]) / max(secs - self._before[1], 1e-9)
            values["train/tokens_per_sec"] = rate
            values["train/eta_secs"] = (self._total_tokens - tokens) / rate
            if self._peak_flops:
                values["train/mfu"] = rate * self._flops_per_token / self._peak_flops
        self._before = tokens, secs
        self._writer.write_scalars(result.step, values | self._times.percentages())

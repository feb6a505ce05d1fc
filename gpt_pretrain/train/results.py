"""What a finished step measured, read one step late so that the host never waits for the step it has just sent."""

import math
from typing import NamedTuple

import jax


class StepResult(NamedTuple):
    """A finished step: its number (from 1), the position where its batch began, metrics as floats."""

    step: int
    position: int
    metrics: dict[str, float]


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that lies outside the program; the message says it in a line."""


class Diverged(RunFailed):
    """The loss, the gradient or the parameters after the update are not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class MetricsReader:
    """Holds each step's metrics back until the next step is on its way."""

    def __init__(self):
        self._pending: tuple[int, int, dict] | None = None

    def push(self, step: int, position: int, device_metrics: dict) -> StepResult | None:
        """Hands over a step that was just sent; returns the step before it, None at the first."""
        result = self.flush()
        self._pending = (step, position, device_metrics)
        return result

    def flush(self) -> StepResult | None:
        """Waits for the step that is held back and returns it, if there is one.

        Raises Diverged: its loss or a norm is NaN or infinite.
        """
        if self._pending is None:
            return None
        step, position, device_metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        # An update may be what breaks the parameters: then the loss shows it only a step later, after a checkpoint.
        checked = {name: metrics[name] for name in ("loss", "grad_norm", "param_norm")}
        if not all(map(math.isfinite, checked.values())):
            found = ", ".join(f"{name} is {value}" for name, value in checked.items())
            raise Diverged(f"step {step}: {found}. Its batch began at position {position}", step)
        return StepResult(step, position, metrics)

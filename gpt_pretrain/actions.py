"""What the loop does besides stepping: reading metrics one step late, timing, evaluation."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from gpt_pretrain.data.loader import num_windows, to_devices
from gpt_pretrain.data.token_sources import TokenSource
from gpt_pretrain.stopping import StopSignal


class StepResult(NamedTuple):
    """A finished step: its number (from 1), the position where its batch began, metrics as floats."""

    step: int
    position: int
    metrics: dict[str, float]


class Diverged(RuntimeError):
    """The loss or the gradient is not finite."""


class MetricsReader:
    """Holds each step's metrics back until the next step is on its way, so the host never waits for it."""

    def __init__(self):
        self._pending: tuple[int, int, dict] | None = None

    def push(self, step: int, position: int, device_metrics: dict) -> StepResult | None:
        """Hands over a step that was just sent; returns the step before it, None at the first."""
        result = self.flush()
        self._pending = (step, position, device_metrics)
        return result

    def flush(self) -> StepResult | None:
        """Waits for the step that is held back and returns it, if there is one.

        Raises:
          Diverged: its loss or gradient norm is NaN or infinite.
        """
        if self._pending is None:
            return None
        step, position, device_metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise Diverged(
                f"step {step}: loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}. "
                f"Its batch began at position {position}"
            )
        return StepResult(step, position, metrics)


class Throughput:
    """Tokens per second of training: evaluation, checkpoints and the first step (compilation) don't count."""

    def __init__(self):
        self._start: float | None = None
        self._paused = 0.0
        self._tokens = 0
        self.tokens_per_sec: float | None = None

    def step_done(self, num_tokens: int) -> None:
        if self._start is None:
            self._start, self._paused = time.monotonic(), 0.0
        else:
            self._tokens += num_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def lap(self) -> float | None:
        """The rate since the last lap, or the last one known if no step was timed since."""
        now = time.monotonic()
        if self._tokens and self._start is not None:
            self.tokens_per_sec = self._tokens / max(now - self._start - self._paused, 1e-9)
            self._start, self._paused, self._tokens = now, 0.0, 0
        return self.tokens_per_sec


class Evaluation:
    """Loss and accuracy over the first windows of the validation stream, in order: the same ones each time."""

    def __init__(
        self,
        eval_step: Callable,
        source: TokenSource,
        *,
        seq_len: int,
        max_tokens: int,
        microbatch: int,
        rows: np.ndarray,
        sharding: NamedSharding,
    ):
        self._eval_step = eval_step
        self._source = source
        self._seq_len = seq_len
        self._num_windows = min(num_windows(source, seq_len), max(1, max_tokens // seq_len))
        self._microbatch = microbatch
        self._rows = rows
        self._sharding = sharding

    @property
    def num_tokens(self) -> int:
        return self._num_windows * self._seq_len

    def __call__(self, params, leave: StopSignal | None = None) -> dict[str, float] | None:
        """Means over all target tokens: {"loss": nats, "accuracy": ...}; None if `leave` came half way."""
        sums = []
        for index, first in enumerate(range(0, self._num_windows, self._microbatch)):
            if leave and leave.received is not None:
                return None
            windows = first + self._rows
            weights = (windows < self._num_windows).astype(np.float32)  # the last microbatch may not be full
            starts = np.minimum(windows, self._num_windows - 1) * self._seq_len
            arrays = (self._source.read(starts, self._seq_len + 1)[None], weights[None])
            batch, weights = (to_devices(each, self._sharding, self._microbatch, self._rows) for each in arrays)
            sums.append(self._eval_step(params, batch, weights, np.int32(index)))
        nll, correct = np.asarray(jax.device_get(sums), np.float64).sum(0)
        return {"loss": float(nll / self.num_tokens), "accuracy": float(correct / self.num_tokens)}

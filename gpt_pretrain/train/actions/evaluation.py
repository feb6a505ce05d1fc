"""What the loop does besides stepping: reading metrics one step late, timing, evaluation."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from data_prep.store.streams import TokenSource, num_windows
from gpt_pretrain.data.loader import Placement
from gpt_pretrain.train.stopping import StopSignal


class StepResult(NamedTuple):
    """A finished step: its number (from 1), the position where its batch began, metrics as floats."""

    step: int
    position: int
    metrics: dict[str, float]


class Diverged(RuntimeError):
    """The loss, the gradient or the parameters after the update are not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


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
          Diverged: its loss or a norm is NaN or infinite.
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
    """Loss and accuracy over the first windows of validation streams, in order: the same ones each time.

    Args:
      eval_step: (params, batch, weights, index) -> sums; see `train_step.make_eval_step`.
      sources: validation streams by name; `max_tokens` are shared out equally.
      rows_at_once: how many windows the devices take together.
    """

    def __init__(
        self,
        eval_step: Callable,
        sources: dict[str, TokenSource],
        *,
        seq_len: int,
        max_tokens: int,
        rows_at_once: int,
        placement: Placement,
    ):
        self._eval_step = eval_step
        self._sources = sources
        self._seq_len = seq_len
        most = max(1, max_tokens // len(sources) // seq_len)
        try:
            self._num_windows = {name: min(num_windows(source, seq_len), most) for name, source in sources.items()}
        except ValueError as error:
            raise ValueError(f"validation split: {error}; prepare the data with a larger --val_tokens") from None
        self._rows_at_once = rows_at_once
        self._placement = placement

    @property
    def num_tokens(self) -> int:
        return sum(self._num_windows.values()) * self._seq_len

    def __call__(self, params, leave: StopSignal | None = None) -> dict[str, float] | None:
        """Means over all target tokens: {"loss": nats, "accuracy": ...}, of several streams also "NAME/loss", ...

        None if `leave` came half way.
        """
        totals = {}
        for name, source in self._sources.items():
            sums = self._sums(params, source, self._num_windows[name], leave)
            if sums is None:
                return None
            totals[name] = sums
        out = _means(np.sum(list(totals.values()), axis=0), self.num_tokens)
        if len(totals) > 1:
            for name, sums in totals.items():
                means = _means(sums, self._num_windows[name] * self._seq_len)
                out |= {f"{name}/{what}": value for what, value in means.items()}
        return out

    def _sums(self, params, source: TokenSource, num_windows: int, leave: StopSignal | None) -> np.ndarray | None:
        """Summed (nll, correct) of one stream: float64 (2,)."""
        sums = []
        rows = self._placement.rows(self._rows_at_once)[0]
        for index, first in enumerate(range(0, num_windows, self._rows_at_once)):
            if leave and leave.received is not None:
                return None
            windows = first + rows
            weights = (windows < num_windows).astype(np.float32)  # the last microbatch may not be full
            starts = np.minimum(windows, num_windows - 1) * self._seq_len
            arrays = (source.read(starts, self._seq_len + 1)[None], weights[None])
            batch, weights = (self._placement.to_devices(each, self._rows_at_once) for each in arrays)
            sums.append(self._eval_step(params, batch, weights, np.int32(index)))
        return np.asarray(jax.device_get(sums), np.float64).sum(0)


def _means(sums: np.ndarray, num_tokens: int) -> dict[str, float]:
    return {"loss": float(sums[0] / num_tokens), "accuracy": float(sums[1] / num_tokens)}

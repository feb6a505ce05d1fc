"""Loss on the validation split."""

import collections
import contextlib
import logging
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.store.files import read_json, write_json
from data_prep.store.token_sources import TokenSource, num_windows
from gpt_pretrain.train.actions.action import Action, Now, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.writers import MetricWriter

log = logging.getLogger(__name__)

FILE_NAME = "evaluation.json"
# Batches that are computed at one time. JAX on several CPU devices can deadlock with more than 32 computations under
# way, and on accelerators each one that waits holds its batch in memory.
MAX_IN_FLIGHT = 8


class Evaluate(Action):
    """Loss and accuracy over the first windows of the validation streams, in order: the same ones each time.

    Of each stream, `train.eval_tokens` are shared out equally. A finished run whose last evaluation is missing, because
    a signal came, is evaluated when it is started again: save_dir/evaluation.json holds the last one that was made.
    """

    def __init__(self, built: Built, sources: dict[str, TokenSource], writer: MetricWriter, stop: StopSignal):
        config = built.config
        self.due = Schedule(config.eval_interval, also=(built.total_steps,))
        self._eval_step, self._placement = built.eval_step, built.placement
        self._doses_at, self._doses = built.doses, built.doses(1)
        self._sources, self._seq_len = sources, config.data.seq_len
        self._writer, self._save_dir = writer, config.directory
        self._num_steps = built.total_steps
        self._evaluated_step = _evaluated_step(config.directory)
        self._last_step = 0
        # Processes may see a signal at different times: only one alone may leave half way.
        self._leave = stop if jax.process_count() == 1 else None
        most = max(1, config.eval_tokens // len(sources) // self._seq_len)
        try:
            counts = {name: num_windows(source, self._seq_len) for name, source in sources.items()}
        except ValueError as error:
            raise ValueError(f"validation split: {error}; prepare the data with a larger --val_tokens") from None
        self._num_windows = {name: min(count, most) for name, count in counts.items()}
        self._rows_at_once = built.layouts[-1].microbatch

    @property
    def is_complete(self) -> bool:
        return self._last_step < self._num_steps or self._evaluated_step == self._last_step

    def run(self, now: Now) -> None:
        self._evaluated_step = -1
        self._doses = self._doses_at(max(1, now.step))  # as strong as in the last update
        if values := self.means(now.state.params):
            self._writer.write_scalars(now.step, {f"validation/{name}": value for name, value in values.items()})
            self._evaluated_step = now.step
            if jax.process_index() == 0:
                self._note(now.step, values)

    def _note(self, step: int, values: dict[str, float]) -> None:
        try:
            write_json(Path(self._save_dir, FILE_NAME), {"step": step, **values})
        except OSError as error:
            log.warning("%s cannot be written (%s): evaluated again at the next start.", FILE_NAME, error)

    def at_end(self, now: Now) -> None:
        self._last_step = now.step
        if not self.is_complete and not (self._leave and self._leave.received is not None):
            self.run(now)
        if not self.is_complete:
            log.warning("Stopped before the validation loss was there: the same command computes it.")

    def means(self, params) -> dict[str, float] | None:
        """Over all target tokens: {"loss": nats, "accuracy": ...}, of several streams also "NAME/loss", ...

        None if a signal came half way.
        """
        totals = {}
        for name, source in self._sources.items():
            sums = self._sums(params, source, self._num_windows[name])
            if sums is None:
                return None
            totals[name] = sums
        num_tokens = sum(self._num_windows.values()) * self._seq_len
        out = _means(np.sum(list(totals.values()), axis=0), num_tokens)
        if len(totals) > 1:
            for name, sums in totals.items():
                means = _means(sums, self._num_windows[name] * self._seq_len)
                out |= {f"{name}/{what}": value for what, value in means.items()}
        return out

    def _sums(self, params, source: TokenSource, num_windows: int) -> np.ndarray | None:
        """Summed (nll, correct) of one stream: float64 (2,)."""
        total, waiting = np.zeros(2), collections.deque()
        rows = self._placement.rows(self._rows_at_once)[0]
        for index, first in enumerate(range(0, num_windows, self._rows_at_once)):
            if self._leave and self._leave.received is not None:
                return None
            windows = first + rows
            weights = (windows < num_windows).astype(np.float32)  # the last microbatch may not be full
            starts = np.minimum(windows, num_windows - 1) * self._seq_len
            arrays = (source.read(starts, self._seq_len + 1)[None], weights[None])
            batch, weights = (self._placement.to_devices(each, self._rows_at_once) for each in arrays)
            waiting.append(self._eval_step(params, batch, weights, np.int32(index), *self._doses))
            if len(waiting) > MAX_IN_FLIGHT:
                total += np.asarray(jax.device_get(waiting.popleft()), np.float64)
        return total + sum(np.asarray(jax.device_get(each), np.float64) for each in waiting)


def _evaluated_step(save_dir: str) -> int:
    """The step of the last evaluation that is on disk, -1 if there is none: as the first process sees it, in all."""
    step = -1
    if jax.process_index() == 0:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # damaged: it is made again
            step = int((read_json(Path(save_dir, FILE_NAME)) or {}).get("step", -1))
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return step


def _means(sums: np.ndarray, num_tokens: int) -> dict[str, float]:
    return {"loss": float(sums[0] / num_tokens), "accuracy": float(sums[1] / num_tokens)}

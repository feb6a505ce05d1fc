"""Loss on the validation split, and on other datasets."""

import collections
import contextlib
import functools
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
from gpt_pretrain.train.validation import byte_lengths_of, num_bytes_of
from gpt_pretrain.train.writers import MetricWriter

log = logging.getLogger(__name__)

FILE_NAME = "evaluation.json"
# Batches that are computed at one time. JAX on several CPU devices can deadlock with more than 32 computations under
# way, and on accelerators each one that waits holds its batch in memory.
MAX_IN_FLIGHT = 8


class Evaluate(Action):
    """Loss and accuracy over the first windows of the validation streams, in order: the same ones each time.

    `train.eval_tokens` are shared out equally to the streams of the run; each of `train.validation` gives as many more.
    A finished run whose last evaluation is missing, because a signal came, is evaluated when it is started again:
    save_dir/evaluation.json holds the last one that was made.

    Bits per byte are the loss of all targets, end-of-text included, over the bytes of text that these very tokens stand
    for, of which end-of-text has none. They are left out where the tokenizer does not tell.

    Args:
      sources: the run's own streams.
      named: others, which the mean over all leaves out.
    """

    def __init__(
        self,
        built: Built,
        sources: dict[str, TokenSource],
        writer: MetricWriter,
        stop: StopSignal,
        *,
        named: dict[str, TokenSource] | None = None,
    ):
        config = built.config
        self.due = Schedule(config.eval_interval, also=(built.total_steps,))
        self._eval_step, self._placement = built.eval_step, built.placement
        self._doses_at, self._doses = built.doses, built.doses(1)
        self._sources, self._named, self._seq_len = sources, named or {}, config.data.seq_len
        self._data = built.data
        self._writer, self._save_dir = writer, config.directory
        self._num_steps = built.total_steps
        self._evaluated_step = _evaluated_step(config.directory)
        self._last_step = 0
        # Processes may see a signal at different times: only one alone may leave half way.
        self._leave = stop if jax.process_count() == 1 else None
        most = max(1, config.eval_tokens // max(1, len(sources)) // self._seq_len)
        try:
            counts = {name: num_windows(source, self._seq_len) for name, source in sources.items()}
        except ValueError as error:
            raise ValueError(f"validation split: {error}; prepare the data with a larger --val_tokens") from None
        self._num_windows = {name: min(count, most) for name, count in counts.items()}
        most_of_named = max(1, config.eval_tokens // self._seq_len)
        for name, source in self._named.items():
            self._num_windows[name] = min(num_windows(source, self._seq_len), most_of_named)
        self._rows_at_once = built.layouts[-1].microbatch

    @property
    def is_complete(self) -> bool:
        return self._last_step < self._num_steps or self._evaluated_step == self._last_step

    def run(self, now: Now) -> None:
        self._evaluated_step = -1
        self._doses = self._doses_at(max(1, now.step))  # as strong as in the last update
        if values := self.means(now.state.params):
            lines: dict[str, dict[str, float]] = {}  # of the console: of all streams together, and of each
            for name, value in values.items():
                lines.setdefault(name.rpartition("/")[0], {})[f"validation/{name}"] = value
            for scalars in lines.values():
                self._writer.write_scalars(now.step, scalars)
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
        """Over all target tokens: {"loss": nats, "accuracy": ..., "bits_per_byte": ...}, of several streams also
        "NAME/loss", ..., as of those that are named.

        None if a signal came half way.
        """
        totals = {}
        for name, source in (self._sources | self._named).items():
            sums = self._sums(params, source, self._num_windows[name])
            if sums is None:
                return None
            totals[name] = sums
        out = self._means({name: totals[name] for name in self._sources}) if self._sources else {}
        for name, sums in totals.items():
            if name in self._named or len(self._sources) > 1:
                out |= {f"{name}/{what}": value for what, value in self._means({name: sums}).items()}
        return out

    def _means(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        """Of several streams together."""
        num_tokens = sum(self._num_windows[name] for name in totals) * self._seq_len
        nll, correct = np.sum(list(totals.values()), axis=0)
        out = {"loss": float(nll / num_tokens), "accuracy": float(correct / num_tokens)}
        if num_bytes := sum(self._num_bytes.get(name, 0) for name in totals):
            out["bits_per_byte"] = float(nll / np.log(2) / num_bytes)
        return out

    @functools.cached_property
    def _num_bytes(self) -> dict[str, int]:
        """Of the targets of each stream; empty where they are not known."""
        try:
            lengths_V = byte_lengths_of(self._data.tokenizer)
            problem = f"tokenizer {self._data.tokenizer.name!r:.200} does not say how many bytes its ids stand for"
        except (ValueError, OSError) as error:
            lengths_V, problem = None, str(error)
        if lengths_V is None:
            log.warning("No bits per byte: %s.", problem.rstrip("."))
            return {}
        return {
            name: num_bytes_of(source, self._num_windows[name] * self._seq_len, lengths_V)
            for name, source in (self._sources | self._named).items()
        }

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

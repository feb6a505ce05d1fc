"""Where metrics go: the console and TensorBoard event files here, W&B in wandb_writer.py.

CLU imports TensorFlow for a single class. To have CLU without TensorFlow, take it from here:

    from gpt_pretrain.train.writers.console import make_writer, metric_writers, periodic_actions
"""

import functools
import importlib.util
import os
import pathlib
import sys
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

if importlib.util.find_spec("tensorflow") is None:
    # Stands in for the one CLU module that needs TensorFlow; must come before CLU's first import.
    _stand_in = types.ModuleType("clu.metric_writers.summary_writer")
    _stand_in.__dict__["SummaryWriter"] = lambda logdir: TensorBoardWriter(logdir)
    sys.modules.setdefault(_stand_in.__name__, _stand_in)

from clu import metric_writers, periodic_actions
from tensorboardX import summary as tb_summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

MetricWriter = metric_writers.MetricWriter
__all__ = ["MetricWriter", "make_writer", "metric_writers", "periodic_actions"]
KNOWN_WRITERS = ("console", "tensorboard", "wandb")


def make_writer(
    names: Sequence[str] = KNOWN_WRITERS,
    *,
    save_dir: str | os.PathLike[str],
    total_steps: int,
    start_step: int = 0,
    config_text: str = "",
    wandb_project: str = "gpt_pretrain",
    run_name: str | None = None,
    is_primary: bool = True,
) -> MetricWriter:
    """Returns one writer that writes to all of `names`; on processes that are not primary, to none.

    The console is written at once, the others by one background thread each, in order; `flush()`
    and `close()` wait for them. No writer stops a run: what fails is logged (once per method).

    Args:
      names: any of `KNOWN_WRITERS`.
      save_dir: directory of the run; curves go to `save_dir/tensorboard` and `save_dir/wandb`.
      total_steps: where training will end, for the console's percentages.
      start_step: step that the run resumes from; TensorBoard hides what was logged after it.
      config_text: operative gin config, kept with the curves.
      wandb_project: project in W&B.
      run_name: display name in W&B, which invents one if None.

    Raises:
      ValueError: a name is not known.
    """
    check_names(names)
    if not is_primary:
        return metric_writers.MultiWriter([])
    tensorboard_dir = pathlib.Path(save_dir, "tensorboard")
    writers: list[MetricWriter] = []
    if "console" in names:
        places = {"tensorboard": f"TensorBoard in {tensorboard_dir}", "wandb": "W&B"}
        details = " and ".join(place for name, place in places.items() if name in names)
        writers.append(_log_failures(ConsoleWriter(total_steps, details=details)))
    if "tensorboard" in names:
        # A new run logs step 0 (again); a resumed one has logged `start_step` already.
        curves = TensorBoardWriter(tensorboard_dir, purge_step=start_step + 1 if start_step else 0)
        writers.append(metric_writers.AsyncWriter(_log_failures(curves)))
        if config_text:
            as_code = "\n".join(f"    {line}" for line in config_text.splitlines())
            writers[-1].write_texts(start_step, {"operative_config": as_code})
    if "wandb" in names:
        from gpt_pretrain.train.writers.wandb import WandbWriter  # Only a run that uses W&B waits for it.

        tracker = WandbWriter(save_dir, project=wandb_project, run_name=run_name, config_text=config_text)
        writers.append(metric_writers.AsyncWriter(_log_failures(tracker)))
    return metric_writers.MultiWriter(writers)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError if a name is not one of `KNOWN_WRITERS`."""
    if unknown := sorted(set(names) - set(KNOWN_WRITERS)):
        raise ValueError(f"train.writers: no such writer {unknown}; known are {list(KNOWN_WRITERS)}.")


def _log_failures(writer: MetricWriter) -> MetricWriter:
    """Makes each method of `writer` log its first exception, with traceback, and raise none."""

    def guarded(method):
        has_failed = False

        @functools.wraps(method)
        def call(*args, **kwargs):
            nonlocal has_failed
            try:
                method(*args, **kwargs)
            except Exception:
                if not has_failed:
                    where = f"{type(writer).__name__}.{method.__name__}"
                    logging.exception("%s failed; training goes on, more of it is not said.", where)
                has_failed = True

        return call

    for name in MetricWriter.__abstractmethods__:
        setattr(writer, name, guarded(getattr(writer, name)))
    return writer


def _refuse(kind: str):
    def method(self, *args, **kwargs):
        able = "scalars, texts, histograms and hparams"
        raise NotImplementedError(f"{type(self).__name__} writes {able}, not {kind}.")

    method.__name__ = f"write_{kind}"
    return method


def ignore(self, *args, **kwargs):
    pass


class RunWriter(MetricWriter):
    """Refuses, in words, the kinds of data that pretraining a language model does not produce."""

    write_summaries = _refuse("summaries")
    write_images = _refuse("images")
    write_videos = _refuse("videos")
    write_audios = _refuse("audios")


# (metric, how it is printed) in the order of the line; the widths keep a run's columns aligned.
TRAIN_COLUMNS = {
    "loss": lambda x: f"loss {x:7.4f}",
    "accuracy": lambda x: f"acc {x:.3f}",
    "learning_rate": lambda x: f"lr {x:.1e}",
    "grad_norm": lambda x: f"grad {x:5.2f}",
    "tokens_per_sec": lambda x: f"{x:9,.0f} tok/s",
    "mfu": lambda x: f"MFU {x:5.1%}",
}
CURVES_ONLY = ("param_norm", "update_norm", "examples_seen", "eta_secs")  # Too much for a line.
MAX_VALUES_PER_LINE = 8


class ConsoleWriter(RunWriter):
    """Prints one line per step and group of metrics: `train/...`, `validation/...`, and others.

    A group with more values than fit a line is only counted. `train/mfu` is a fraction, 0 to 1.

    Args:
      total_steps: number of steps of the whole run.
      details: where the values that are only counted can be seen, in words.
    """

    def __init__(self, total_steps: int, *, details: str = ""):
        self._total_steps = total_steps
        self._details = f"see {details}" if details else "not kept, as no other writer is on"

    def write_scalars(self, step, scalars):
        groups: dict[str, dict[str, Any]] = {}
        for name, value in scalars.items():
            group, _, metric = name.partition("/") if "/" in name else ("", "", name)
            groups.setdefault(group, {})[metric] = value
        for group, values in groups.items():
            if group == "train":
                self._print(step, *self._train_columns(step, values))
            elif len(values) > MAX_VALUES_PER_LINE:
                self._print(step, f"{group}: {len(values)} values, {self._details}")
            else:
                first, *others = (f"{metric} {_number(value)}" for metric, value in values.items())
                self._print(step, f"{group} {first}".lstrip(), *others)

    def _train_columns(self, step: int, values: Mapping[str, Any]) -> list[str]:
        columns = [show(values[name]) for name, show in TRAIN_COLUMNS.items() if name in values]
        for metric, value in values.items():
            if metric not in TRAIN_COLUMNS and metric not in CURVES_ONLY:
                columns.append(f"{metric} {_number(value)}")
        columns.append(f"{100 * step // self._total_steps:3d}%")
        if np.isfinite(eta_secs := values.get("eta_secs", np.nan)):
            minutes, seconds = divmod(round(eta_secs), 60)
            columns.append(f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
        return columns

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self._print(step, f"{name}:\n{text}")

    def _print(self, step: int, *columns: str) -> None:
        width = len(str(self._total_steps))
        print(f"step {step:{width}d}/{self._total_steps}", *columns, sep=" | ", flush=True)

    write_histograms = write_hparams = ignore  # Neither fits a line.
    flush = close = ignore  # Every line is flushed when printed.


def _number(x: float) -> str:
    return f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 else f"{x:.4g}"


class TensorBoardWriter(RunWriter):
    """Writes a TensorBoard event file, without TensorFlow.

    Args:
      logdir: created if needed; a resumed run takes the same one and gets a new file in it.
      purge_step: TensorBoard hides what earlier files hold for this step and later ones, so that
        the curves of a killed and resumed run do not double up. None hides nothing.
    """

    FLUSH_INTERVAL_SECS = 10.0  # What a killed process can lose, if nobody calls `flush()`.

    def __init__(self, logdir: str | os.PathLike[str], *, purge_step: int | None = None):
        os.makedirs(logdir, exist_ok=True)
        # Not tensorboardX.SummaryWriter: its flush() does not wait for the events in its queue.
        # Nanoseconds, as the rest of the name is in seconds and a name used twice is overwritten.
        self._events = EventsWriter(os.path.join(logdir, "events"), f".{time.time_ns()}")
        self._flushed_at_secs = time.monotonic()
        if purge_step is not None:
            self._write_event(purge_step, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed_at_secs > self.FLUSH_INTERVAL_SECS:
            self.flush()

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self._write_event(step, summary=tb_summary.scalar(name, value))

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self._write_event(step, summary=tb_summary.text(name, text))

    def write_histograms(self, step, arrays, num_buckets=None):
        for name, array in arrays.items():
            bins = (num_buckets or {}).get(name) or 30
            self._write_event(step, summary=tb_summary.histogram(name, array, bins))

    def write_hparams(self, hparams):
        kinds = (bool, int, float, str)
        flat = {name: x if isinstance(x, kinds) else str(x) for name, x in hparams.items()}
        for summary in tb_summary.hparams(flat, {})[:2]:  # The third says that the run has ended.
            self._write_event(0, summary=summary)

    def flush(self):
        self._events.flush()
        self._flushed_at_secs = time.monotonic()

    def close(self):
        self._events.close()

"""Where metrics go: the console, TensorBoard event files, Weights & Biases.

CLU imports TensorFlow for a single class. To have CLU without TensorFlow, take it from here:

    from gpt_pretrain.writers import make_writer, metric_writers, periodic_actions
"""

import ast
import functools
import html
import importlib.util
import os
import pathlib
import re
import secrets
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

if importlib.util.find_spec("tensorflow") is None:
    # Stands in for the one CLU module that needs TensorFlow; must come before CLU's first import.
    _stand_in = types.ModuleType("clu.metric_writers.summary_writer")
    _stand_in.__dict__["SummaryWriter"] = lambda logdir: TensorBoardWriter(logdir)
    sys.modules.setdefault(_stand_in.__name__, _stand_in)

from clu import metric_writers, periodic_actions  # noqa: E402
from tensorboardX import summary as tb_summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import (  # noqa: E402
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
    if unknown := sorted(set(names) - set(KNOWN_WRITERS)):
        raise ValueError(f"writers: no such writer {unknown}; known are {list(KNOWN_WRITERS)}.")
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
        tracker = WandbWriter(
            save_dir, project=wandb_project, run_name=run_name, config_text=config_text
        )
        writers.append(metric_writers.AsyncWriter(_log_failures(tracker)))
    return metric_writers.MultiWriter(writers)


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


def _ignore(self, *args, **kwargs):
    pass


class _RunWriter(MetricWriter):
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


class ConsoleWriter(_RunWriter):
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

    write_histograms = write_hparams = _ignore  # Neither fits a line.
    flush = close = _ignore  # Every line is flushed when printed.


def _number(x: float) -> str:
    return f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 else f"{x:.4g}"


class TensorBoardWriter(_RunWriter):
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


class WandbWriter(_RunWriter):
    """Writes to Weights & Biases: online if possible, else to files for a later `wandb sync`.

    Obeys WANDB_MODE. Goes offline without an API key, and when the server gives no answer or
    refuses the run; one printed line says where the run is, and why. `save_dir/wandb_run_id.txt`
    keeps the id, so that a resumed run continues the same W&B run. The x axis of all charts is the
    metric `step`: W&B's own counter can't go back as a resumed run does; it would drop those rows.

    Args:
      save_dir: directory of the training run.
      project: W&B project.
      run_name: display name; W&B invents one if None.
      config_text: operative gin config, saved as a file and, parameter by parameter, as config.
    """

    PROBE_TIMEOUT_SECS = 5.0
    INIT_TIMEOUT_SECS = 20.0
    FINISH_TIMEOUT_SECS = 120.0  # What is not uploaded by then can still be, by `wandb sync`.

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        *,
        project: str,
        run_name: str | None = None,
        config_text: str = "",
    ):
        # wandb also reports on itself; where it can't, it prints so and delays the exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # Not at the top: a run without W&B should not wait for it.

        self._wandb = wandb
        self._settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.INIT_TIMEOUT_SECS,
            finish_timeout=self.FINISH_TIMEOUT_SECS,
        )
        save_dir = pathlib.Path(save_dir).absolute()
        save_dir.mkdir(parents=True, exist_ok=True)
        mode, reason = self._choose_mode()
        while True:
            try:
                self._run = wandb.init(
                    project=project,
                    name=run_name,
                    id=None if mode == "disabled" else _run_id(save_dir / "wandb_run_id.txt"),
                    resume="allow",
                    dir=str(save_dir),
                    mode=mode,
                    settings=self._settings,
                )
                break
            except Exception as error:
                if mode == "disabled":
                    raise
                reason = f"{mode} failed: {_one_line(error)}"
                mode = "offline" if mode == "online" else "disabled"
                # Until its service process ends, a run that failed to start keeps the id occupied.
                wandb.teardown()
                wandb.setup(self._settings)
        where = ""
        if not self._run.disabled:
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            directory = pathlib.Path(self._run.dir).parent
            where = self._run.url or f"{directory}, upload with: wandb sync {directory}"
            if config_text:
                self.write_hparams(parse_gin_config(config_text))
                config_path = pathlib.Path(self._run.dir, "operative_config.gin")
                config_path.write_text(config_text, encoding="utf-8")
                self._run.save(str(config_path), base_path=self._run.dir, policy="now")
        print(" | ".join(part for part in (f"W&B {mode}", reason, where) if part), flush=True)

    def _choose_mode(self) -> tuple[Literal["online", "offline", "disabled"], str]:
        """Returns how to run, and why not online."""
        settings = self._wandb.setup(self._settings).settings
        if settings.mode in ("offline", "disabled"):
            return settings.mode, "as WANDB_MODE says"
        try:
            if not self._wandb.login(prompt=False, verify=False):
                return "offline", "no API key (set WANDB_API_KEY or run `wandb login`)"
            # Asked here because wandb itself, once it talks to a server that accepts connections
            # and never answers, also waits for it at the end of the process.
            urllib.request.urlopen(settings.base_url, timeout=self.PROBE_TIMEOUT_SECS).close()
        except urllib.error.HTTPError:
            pass  # An answer of any kind shows that the server is there.
        except OSError as error:
            return "offline", f"no answer from {settings.base_url}: {_one_line(error)}"
        except Exception as error:
            return "offline", f"API key not usable: {_one_line(error)}"
        return "online", ""

    def write_scalars(self, step, scalars):
        self._run.log({"step": step, **scalars})

    def write_texts(self, step, texts):
        row: dict[str, Any] = {"step": step}
        for name, text in texts.items():
            row[name] = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self._run.log(row)

    def write_histograms(self, step, arrays, num_buckets=None):
        row: dict[str, Any] = {"step": step}
        for name, array in arrays.items():
            bins = (num_buckets or {}).get(name) or 30
            row[name] = self._wandb.Histogram(np_histogram=np.histogram(array, bins))
        self._run.log(row)

    def write_hparams(self, hparams):
        self._run.config.update(dict(hparams), allow_val_change=True)

    flush = _ignore  # log() hands its row to wandb's own process, which outlives a kill of ours.

    def close(self):
        self._run.finish()


def _run_id(path: pathlib.Path) -> str:
    """Returns the id kept in `path`; the first time, makes one and keeps it."""
    if not path.exists():
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(4))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    return path.read_text(encoding="utf-8").strip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def parse_gin_config(text: str) -> dict[str, Any]:
    """Gin's operative config -> {"train.batch_size": 512, "optimizer.schedule": "@cosine", ...}.

    Values that are not Python literals (references, macros) stay text.
    """
    bindings: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if binding := re.match(r"([\w./]+) = ?(.*)", line):
            name, bindings[binding[1]] = binding[1], binding[2].rstrip("\\")
        elif name and line.startswith(" "):  # The value goes on.
            bindings[name] += line
    config: dict[str, Any] = {}
    for name, value in bindings.items():
        try:
            config[name] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            config[name] = value.strip()
    return config

"""Metrics on the console: a line a step."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt_pretrain.train.writers.base import SAMPLE, RunWriter, ignore

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
CURVES_ONLY_GROUPS = ("time_percent",)
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
            if group in CURVES_ONLY_GROUPS:
                continue
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
            if SAMPLE.fullmatch(name):
                when = "" if step == self._total_steps else f" after step {step}"
                print(f"\n--- a sample{when} ---\n{text}\n----------------", flush=True)
            else:
                self._print(step, f"{name}:\n{text}")

    def _print(self, step: int, *columns: str) -> None:
        width = len(str(self._total_steps))
        print(f"step {step:{width}d}/{self._total_steps}", *columns, sep=" | ", flush=True)

    write_histograms = write_images = write_hparams = ignore  # None fits a line.
    flush = close = ignore  # Every line is flushed when printed.


def _number(x: float) -> str:
    return f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 else f"{x:.4g}"

"""Weights & Biases as a CLU metric writer: online, else offline, never in the way of the run."""

import ast
import html
import os
import pathlib
import re
import secrets
import urllib.error
import urllib.request
from typing import Any, Literal

import numpy as np

from data_prep.store.files import whole_file
from gpt_pretrain.train.writers.base import RunWriter, ignore


class WandbWriter(RunWriter):
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
        import wandb

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

    flush = ignore  # log() hands its row to wandb's own process, which outlives a kill of ours.

    def close(self):
        self._run.finish()


def _run_id(path: pathlib.Path) -> str:
    """Returns the id kept in `path`; the first time, makes one and keeps it."""
    if not path.exists():
        with whole_file(path) as partial:
            partial.write_text(secrets.token_hex(4), encoding="utf-8")
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

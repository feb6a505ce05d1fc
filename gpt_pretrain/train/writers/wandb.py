"""Weights & Biases as a CLU metric writer: online, else offline, never in the way of the run."""

import html
import os
import pathlib
import shlex
import urllib.error
import urllib.request
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np

from gpt_pretrain.train.writers.base import RunWriter
from gpt_pretrain.train.writers.wandb_rows import Rows


class WandbWriter(RunWriter):
    """Writes to Weights & Biases: online if possible, else to files for a later `wandb sync`.

    Obeys WANDB_MODE. Goes offline without an API key, and when the server gives no answer or
    refuses the run; one printed line says where the run is, and why. `save_dir/wandb_run_id.txt`
    keeps the id, so that a resumed run continues the same W&B run: one row a logged step, with all that
    is known of the step (see `wandb_rows.py`), and W&B's own counter of steps is the step.

    Args:
      save_dir: directory of the training run.
      project: W&B project.
      run_name: display name; W&B invents one if None.
      start_step: step that the run resumes from; 0 if it begins.
      config_text: operative gin config, saved as a file.
      settings: nested, for W&B's config.
    """

    PROBE_TIMEOUT_SECS = 5.0
    INIT_TIMEOUT_SECS = 20.0
    FINISH_TIMEOUT_SECS = 120.0  # What is not uploaded by then can still be, by `wandb sync`.
    FILE_INTERVAL_SECS = 5.0  # Between writes of W&B's own process to its file.

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        *,
        project: str,
        run_name: str | None = None,
        start_step: int = 0,
        config_text: str = "",
        settings: Mapping[str, Any] | None = None,
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
            x_transaction_log_flush_interval=self.FILE_INTERVAL_SECS,
            disable_git=True,  # it would take the commit of the working directory for the code's
        )
        save_dir = pathlib.Path(save_dir).absolute()
        save_dir.mkdir(parents=True, exist_ok=True)
        mode, reason = self._choose_mode()
        self._rows = None if mode == "disabled" else Rows(save_dir, start_step=start_step, config_text=config_text)
        self._step, self._row = 0, {}  # what is known of the newest step
        while True:
            try:
                self._run = wandb.init(
                    project=project,
                    name=run_name,
                    id=None if mode == "disabled" or self._rows is None else self._rows.run_id,
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
        where = known = ""
        if self._run.disabled or self._rows is None:
            self._rows, self._last_step = None, 0
        else:
            known = self._continue(self._rows, start_step, is_online=mode == "online")
            folders = f"{shlex.quote(str(save_dir / 'wandb'))}/offline-run-*-{self._rows.run_id}"
            where = self._run.url or f"{save_dir / 'wandb'}, upload with: wandb sync {folders}"
            if settings:
                self.write_hparams(settings)
            if config_text:
                config_path = pathlib.Path(self._run.dir, "operative_config.gin")
                config_path.write_text(config_text, encoding="utf-8")
                self._run.save(str(config_path), base_path=self._run.dir, policy="now")
        print(" | ".join(part for part in (f"W&B {mode}", reason, where, known) if part), flush=True)

    def _continue(self, rows: Rows, start_step: int, *, is_online: bool) -> str:
        """Takes up the history where earlier sessions left it; says what it will leave out."""
        of_server = self._run.step - 1 if is_online and self._run.resumed else None
        self._last_step = rows.last_step(of_server=of_server)
        rows.begin_session(pathlib.Path(self._run.dir).parent, is_online=is_online)
        for step in sorted(rows.kept):
            if self._last_step < step <= start_step:  # lost with the process that should have written it
                self._add(step, rows.kept[step])
        if self._last_step <= start_step:
            return ""
        return f"has steps {start_step + 1} to {self._last_step} from an earlier session and keeps those rows"

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
        self._add(step, scalars)

    def write_texts(self, step, texts):
        self._add(step, {name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()})

    def write_histograms(self, step, arrays, num_buckets=None):
        row = {}
        for name, array in arrays.items():
            bins = (num_buckets or {}).get(name) or 30
            row[name] = self._wandb.Histogram(np_histogram=np.histogram(array, bins))
        self._add(step, row)

    def write_hparams(self, hparams):
        self._run.config.update(dict(hparams), allow_val_change=True)

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        """To the row of a step. It is handed over when a later step begins, as W&B cannot add to it after that."""
        if step <= self._last_step:
            return
        if step != self._step:
            self._hand_over()
            self._step = step
        self._row |= values
        numbers = {name: float(value) for name, value in self._row.items() if isinstance(value, Real)}
        if self._rows is not None:
            self._rows.keep(step, numbers)

    def _hand_over(self) -> None:
        if self._row:
            self._run.log({"step": self._step, **self._row}, step=self._step, commit=True)
            self._last_step, self._row = self._step, {}

    def flush(self):
        """What was written so far survives a kill."""
        if self._rows is not None:
            self._rows.sync()

    def close(self):
        self._hand_over()
        self._run.finish()
        if self._rows is not None:
            self._rows.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Weights & Biases as a CLU metric writer: online, else offline, never in the way of the run."""

import html
import os
import pathlib
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
from absl import logging

from gpt_pretrain.train.writers.base import SAMPLE, RunWriter
from gpt_pretrain.train.writers.heat_maps import pictures_of
from gpt_pretrain.train.writers.references import Reference
from gpt_pretrain.train.writers.wandb_rows import Rows

SAMPLES = "samples"
_COLUMNS: list[Any] = ["step", "prompt", "text"]


class WandbWriter(RunWriter):
    """Writes to Weights & Biases: online if possible, else to files for a later `wandb sync`.

    Obeys WANDB_MODE. Goes offline without an API key, and when the server gives no answer or
    refuses the run; one printed line says where the run is, and why. `save_dir/wandb_run_id.txt`
    keeps the id, so that a resumed run continues the same W&B run: one row a logged step, with all that
    is known of the step (see `wandb_rows.py`), and W&B's own counter of steps is the step. In a trial of a W&B sweep
    the id is the one that the sweep's agent chose.

    Statistics of layers are a picture of their row as well, samples a table of theirs. Datasets and checkpoints become
    artifacts that refer to them by their digests: nothing of them is read or uploaded.

    Args:
      save_dir: directory of the training run.
      project: W&B project.
      run_name: display name; W&B invents one if None.
      start_step: step that the run resumes from; 0 if it begins.
      config_text: operative gin config, saved as a file.
      settings: nested, for W&B's config.
      sample_prompts: what the texts `samples/1`, ... continue.
      references: what is there of datasets and checkpoints; asked at each row, in the writer's thread.
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
        sample_prompts: Sequence[str] = (),
        references: Callable[[], Iterable[Reference]] = tuple,
    ):
        # wandb also reports on itself; where it can't, it prints so and delays the exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        save_dir = pathlib.Path(save_dir).absolute()
        # W&B stages artifacts, tables among them, in the home directory, where a run on a cluster may not write.
        os.environ.setdefault("WANDB_DATA_DIR", str(save_dir / "wandb"))
        import wandb

        self._wandb = wandb
        self._prompts, self._references = sample_prompts, references
        self._referred: set[tuple[str, str]] = set()
        self._has_failed_to_refer = False
        self._settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.INIT_TIMEOUT_SECS,
            finish_timeout=self.FINISH_TIMEOUT_SECS,
            x_transaction_log_flush_interval=self.FILE_INTERVAL_SECS,
            disable_git=True,  # it would take the commit of the working directory for the code's
        )
        save_dir.mkdir(parents=True, exist_ok=True)
        mode, reason = self._choose_mode()
        self._rows = None if mode == "disabled" else Rows(save_dir, start_step=start_step, config_text=config_text)
        self._step, self._row = 0, {}  # what is known of the newest step
        in_sweep = bool(os.environ.get("WANDB_SWEEP_ID"))  # its agent has chosen project and id: W&B takes no other
        while True:
            try:
                self._run = wandb.init(
                    project=None if in_sweep else project,
                    name=run_name,
                    id=None if in_sweep or mode == "disabled" or self._rows is None else self._rows.run_id,
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
            self._refer()
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
        row, samples = {}, []
        for name, text in texts.items():
            if match := SAMPLE.fullmatch(name):
                index = int(match[1]) - 1
                samples.append([self._prompts[index] if index < len(self._prompts) else "", text])
            else:
                row[name] = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self._add(step, row | ({SAMPLES: samples} if samples else {}))

    def write_images(self, step, images):
        self._add(step, {name: self._wandb.Image(np.asarray(image)) for name, image in images.items()})

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
        kept: dict[str, Any] = {name: float(value) for name, value in self._row.items() if isinstance(value, Real)}
        if SAMPLES in self._row:
            kept[SAMPLES] = self._row[SAMPLES]
        if self._rows is not None:
            self._rows.keep(step, kept)

    def _hand_over(self) -> None:
        if not self._row:
            return
        step, row, self._row = self._step, self._row, {}
        self._last_step = step
        samples = row.pop(SAMPLES, [])
        # In two parts: what cannot be drawn costs no number.
        self._run.log({"step": step, **row}, step=step, commit=False)
        media: dict[str, Any] = {name: self._wandb.Image(picture) for name, picture in pictures_of(row).items()}
        if samples:
            media[SAMPLES] = self._wandb.Table(columns=_COLUMNS, data=[[step, *each] for each in samples])
        self._run.log(media, step=step, commit=True)
        self._refer()

    def _refer(self) -> None:
        """Makes artifacts of what is there and was not there before. A failure is logged once."""
        if self._rows is None:
            return
        try:
            for each in self._references():
                if each.name_and_digest not in self._referred:
                    self._run.log_artifact(self._artifact(each), aliases=["latest", *each.aliases])
                    self._referred.add(each.name_and_digest)
        except Exception:
            if not self._has_failed_to_refer:
                logging.exception("W&B artifacts failed; training goes on, more of it is not said.")
            self._has_failed_to_refer = True

    def _artifact(self, reference: Reference):
        """Its only entry is the place, with the digest that the run knows.

        Not `Artifact.add_reference`: it lists directories file by file, asks buckets, and knows no other digests than
        those that it computes from the bytes, or from the place alone.
        """
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
        from wandb.sdk.lib.paths import LogicalPath

        artifact = self._wandb.Artifact(reference.name, type=reference.kind, metadata=dict(reference.metadata))
        entry = ArtifactManifestEntry(path=LogicalPath(reference.entry), ref=reference.url, digest=reference.digest)
        artifact.manifest.add_entry(entry)
        return artifact

    def flush(self):
        """What was written so far survives a kill."""
        if self._rows is not None:
            self._rows.sync()

    def close(self):
        self._hand_over()
        self._refer()
        self._run.finish()
        if self._rows is not None:
            self._rows.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

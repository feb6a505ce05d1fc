"""The checkpoints of a run, asked tasks one after the other: what `gpt_pretrain.evaluate` does."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from data_prep.pages.numbers import duration
from data_prep.store.buckets import is_bucket
from data_prep.store.files import whole_file
from data_prep.store.tokenizers import recorded_tokenizer
from gpt_pretrain.checks import key_seed
from gpt_pretrain.model.interventions import Intervention, check_use
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.tasks.suite import Results, Suite, results_path, table, write_results
from gpt_pretrain.tasks.task_model import TaskModel
from gpt_pretrain.train import checkpoints, pretrained
from gpt_pretrain.train.checkpoint_copies import checkpoint_at, checkpoints_at
from gpt_pretrain.train.interventions import chosen_interventions, said
from gpt_pretrain.train.seals import read_metadata

log = logging.getLogger(__name__)

SAY_SECS = 10.0


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results of one checkpoint."""

    step: int
    results: Results

    @property
    def table(self) -> str:
        return table(self.results.metrics)


class EvaluatedRun:
    """Everything is checked when it is made: checkpoints, tokenizer, tasks and their data.

    Args:
      place: a save_dir or one checkpoint.
      names: of tasks; see `Suite`, also for `include_path`, `limit` and `num_fewshot`.
      every: all checkpoints of the save_dir, not the newest alone.
      end_of_text_first, dtype: see `TaskModel`.
      tokenizer_name: as the user typed it, if at all.
      interventions: which are done while a model is asked; see `chosen_interventions`. As strong as at its step.
      output: a file for the harness's own JSON; with several checkpoints, the step is added to its name.

    Attributes:
      checkpoints: as the user would name them, the oldest first.
      written: files with results, so far.

    Raises ValueError for what is not there or does not fit.
    """

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        *,
        every: bool = False,
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        end_of_text_first: bool | None = None,
        dtype: str | None = None,
        tokenizer_name: str | None = None,
        interventions: str = "none",
        output: Path | None = None,
    ):
        self.written: list[Path] = []
        self._every, self._output = every, output
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError(f"--output {output}: expected a file in a folder that is there")
        newest = checkpoint_at(place)
        self.checkpoints = list(checkpoints_at(place).values()) if every else [newest.name]
        if not self.checkpoints:
            raise ValueError(f"{place}: holds no checkpoints; expected the save_dir of a run of gpt_pretrain.main")
        metadata = read_metadata(Path(newest.directory))
        chosen = _chosen(interventions, metadata.model)
        self._interventions_of = (
            functools.partial(_chosen, "checkpoint") if interventions == "checkpoint" else (lambda spec: chosen)
        )
        self._said = ""
        self.tokenizer = recorded_tokenizer(
            metadata.tokenizer or "gpt2", metadata.tokenizer_digest, users=tokenizer_name
        )
        found = (self.tokenizer.vocab_size, self.tokenizer.end_of_text)
        expected = (metadata.model.vocab_size, metadata.model.end_of_text)
        if found != expected:
            raise ValueError(
                f"tokenizer {self.tokenizer.name}: has {found[0]} ids and ends texts by {found[1]}, the model was "
                f"trained on {expected[0]} and {expected[1]}. Name the one that made the data: --tokenizer=..."
            )
        self.suite = Suite(names, self.tokenizer, include_path=include_path, limit=limit, num_fewshot=num_fewshot)
        mesh = make_mesh(jax.devices())
        # Compiled functions live as long as the model that has them; all checkpoints of a run have one spec.
        self._model_of = functools.lru_cache(1)(
            lambda spec, interventions, seed: TaskModel(
                spec,
                mesh,
                self.tokenizer,
                dtype=dtype,
                end_of_text_first=end_of_text_first,
                interventions=interventions,
                seed=seed,
            )
        )
        self._mesh = mesh

    def evaluate(self, name: str, say: Callable[[str], None]) -> Evaluated:
        """Of the checkpoint of that name. ValueError where it cannot be trusted, or a task cannot be asked of it."""
        params, metadata = pretrained.load(name, mesh=self._mesh, with_interventions=True)
        interventions = self._interventions_of(metadata.model)
        line = said(interventions, metadata.model.interventions, "asked")
        if line not in ("", self._said):
            say(line)
        self._said = line
        model = self._model_of(metadata.model.plain(), interventions, key_seed(metadata.seed))
        model.params, model.step, model.between = params, metadata.step, _sayer(say)
        results = self.suite.evaluate(model)
        if not is_bucket(name) and Path(name).parent.name == checkpoints.DIRECTORY:
            path = results_path(Path(name).parent.parent, metadata.step, self.suite, model)
            try:
                write_results(path, metadata.step, self.suite, model, results)
                self.written.append(path)
            except OSError as error:
                log.warning("%s cannot be written (%s)", path, error)
        if self._output is not None:
            self._write_output(metadata.step, results, interventions)
        return Evaluated(metadata.step, results)

    @property
    def why_not_written(self) -> str:
        """Where `written` is empty: results are kept in runs on this machine alone."""
        return "Not kept in the run, which is in a bucket or is not there: --output=FILE keeps them."

    def _write_output(self, step: int, results: Results, interventions: Sequence[Intervention]) -> None:
        assert self._output is not None
        path = self._output.with_stem(f"{self._output.stem}-{step}") if self._every else self._output
        content: dict[str, Any] = dict(results.harness or {"config": {"model": "gpt_pretrain"}})
        harness_results = content.get("results", {})
        ours = {task: values for task, values in results.metrics.items() if task not in harness_results}
        content["results"] = harness_results | {
            task: {"alias": task, **{f"{name},none": value for name, value in values.items()}}
            for task, values in ours.items()
        }
        if interventions:
            content["interventions"] = [each.to_json() for each in interventions]
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, indent=2, default=_in_json, ensure_ascii=False), encoding="utf-8")
        self.written.append(path)


def _chosen(text: str, spec: ModelSpec) -> tuple[Intervention, ...]:
    """Of a checkpoint's model. ValueError for what cannot be done to it."""
    chosen = chosen_interventions(text, spec.interventions, "--interventions")
    check_use(chosen, n_layer=spec.n_layer, n_head=spec.n_head, n_embd=spec.n_embd)
    return chosen


def _in_json(value: Any) -> Any:
    """As the harness writes what JSON does not know."""
    to_plain = getattr(value, "item", None)  # of NumPy's numbers
    return list(value) if isinstance(value, set) else to_plain() if to_plain else str(value)


def _sayer(say: Callable[[str], None]) -> Callable[[int], None]:
    """Says from time to time how many requests are done."""
    began = said = time.monotonic()

    def between(num_done: int) -> None:
        nonlocal said
        if num_done and time.monotonic() - said > SAY_SECS:
            said = time.monotonic()
            say(f"{num_done:,} requests, {duration(said - began)}")

    return between

"""Tasks as a user names them, opened and checked; and what a model makes of them."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.store.files import digest_json, write_json
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.tasks.choices import SUFFIXES, Question, ask, read_questions
from gpt_pretrain.tasks.harness import HarnessTasks, metrics_of
from gpt_pretrain.tasks.task_model import TaskModel

log = logging.getLogger(__name__)

FOLDER = "evaluations"  # in a save_dir
VERSION = 1

Metrics = dict[str, dict[str, float]]


def is_file(name: str) -> bool:
    """A task that we read ourselves: the path of a file of HellaSwag."""
    return name.endswith(SUFFIXES)


def called_of(name: str) -> str:
    """What a task is called in results.

    >>> called_of("data/hellaswag_val.bin"), called_of("arc_easy")
    ('hellaswag_val', 'arc_easy')
    """
    return Path(name).stem if is_file(name) else name


def check_names(setting: str, names: Any) -> tuple[str, ...]:
    """Names of tasks as a tuple. ValueError where they are none."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(
            f'{setting}: found {names!r}, expected names of tasks, as in ("hellaswag_val.bin", "arc_easy")'
        )
    called = [called_of(name) for name in names]
    if repeated := sorted({name for name in called if called.count(name) > 1}):
        raise ValueError(f"{setting}: two tasks are called {repeated[0]!r}; expected each name once")
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Results:
    """Of one model.

    Attributes:
      metrics: numbers by task and metric; a `..._stderr` is the standard error of the metric before it.
      harness: the harness's own results, None where it was not asked.
    """

    metrics: Metrics
    harness: dict[str, Any] | None = None


class Suite:
    """Tasks, opened: nothing more is read or loaded when a model is asked.

    Args:
      names: files of HellaSwag (.bin, .jsonl), or tasks of lm-evaluation-harness; see `HarnessTasks` for what follows.
      tokenizer: of the models to be asked.

    Raises ValueError for a task that is not there, or cannot be asked of models with this tokenizer.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: Tokenizer,
        *,
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ):
        self.names = check_names("tasks", names)
        self.limit, self.num_fewshot = limit, num_fewshot
        self._questions: dict[str, list[Question]] = {
            called_of(name): read_questions(name, tokenizer)[:limit] for name in names if is_file(name)
        }
        others = [name for name in names if not is_file(name)]
        self.harness = (
            HarnessTasks(others, include_path=include_path, limit=limit, num_fewshot=num_fewshot) if others else None
        )

    def evaluate(self, model: TaskModel) -> Results:
        """Asks the model, with the parameters that it has now."""
        metrics = {name: ask(model, questions) for name, questions in self._questions.items()}
        if self.harness is None:
            return Results(metrics)
        found = self.harness.evaluate(model)
        return Results(metrics | metrics_of(found), found)

    def label(self, model: TaskModel) -> str:
        """Of the file of results: the same for the same questions, asked in the same way."""
        how = [self.limit, self.num_fewshot, model.end_of_text_first]
        how += [interventions] if (interventions := _as_json(model)) else []
        return digest_json([sorted(map(called_of, self.names)), *how])[:8]


def results_path(save_dir: str | Path, step: int, suite: Suite, model: TaskModel) -> Path:
    """Where the results of a step are kept in a run."""
    return Path(save_dir, FOLDER, f"{step}-{suite.label(model)}.json")


def write_results(path: Path, step: int, suite: Suite, model: TaskModel, results: Results) -> None:
    """One JSON, replaced as a whole. Raises OSError where it cannot be written."""
    path.parent.mkdir(exist_ok=True)
    content = {
        "version": VERSION,
        "step": step,
        "tasks": list(suite.names),
        "results": results.metrics,
        "limit": suite.limit,
        "num_fewshot": suite.num_fewshot,
        "end_of_text_first": model.end_of_text_first,
        "dtype": model.spec.dtype,
        "interventions": _as_json(model),
        "lm_eval": None if suite.harness is None else suite.harness.version,
    }
    write_json(path, content)


def _as_json(model: TaskModel) -> list[dict[str, Any]]:
    return [each.to_json() for each in model.interventions]


def table(results: Metrics) -> str:
    """
    >>> print(table({"hellaswag_val": {"acc": 0.25, "acc_stderr": 0.01, "num_questions": 3}}))
    task           metric          value   +-
    hellaswag_val  acc            0.2500   0.0100
    hellaswag_val  num_questions       3
    """
    lines = [("task", "metric", "value", "+-")]
    for task, values in results.items():
        for name, value in values.items():
            if name.endswith("_stderr") or "_stderr." in name:
                continue
            metric, dot, filtered = name.partition(".")
            error = values.get(f"{metric}_stderr{dot}{filtered}")
            lines.append((task, name, _number(value), "" if error is None else _number(error)))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{task:<{widths[0]}}  {metric:<{widths[1]}}  {value:>{widths[2]}}   {error}".rstrip()
        for task, metric, value, error in lines
    )


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"

"""Tasks of lm-evaluation-harness, by its own API: loaded before work starts, evaluated as often as one likes.

The harness is imported by whoever asks for one of its tasks, and by nobody else.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any
from unittest import mock

from gpt_pretrain.tasks.task_model import TaskModel

_LISTED = 5
# For standard errors of what is no mean, such as perplexities: known to 2 %, in a hundredth of the harness's time.
_RESAMPLES = 1000


class HarnessTasks:
    """Tasks and groups by name.

    Args:
      names: of the harness's tasks, groups and tags, or of files .yaml that describe one.
      include_path: a folder with more of them.
      limit: of the examples of each task, the first ones; None for all.
      num_fewshot: solved examples in a context; None for what the task says.

    Raises ValueError: the harness is not installed, knows no task of that name, or cannot have its data.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ):
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                f"tasks {', '.join(names)}: need lm-evaluation-harness, which is not installed: "
                "`pip install -e '.[eval]' -c constraints.txt`. HellaSwag needs none of it: name its file, "
                "hellaswag_val.bin or .jsonl."
            )
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        self._limit, self._num_fewshot = limit, num_fewshot
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self._manager = TaskManager(include_path=include_path)
        self._tasks = [task for name in names for task in self._load(name)]
        if limit is None:
            return
        for name in names:
            if name in self._manager.all_groups:
                logging.getLogger(__name__).warning("%s: the first %d examples of each of its tasks.", name, limit)

    @property
    def version(self) -> str:
        return importlib.metadata.version("lm_eval")

    def _load(self, name: str) -> list[Any]:
        """The task or group of a name; of a tag, all its tasks."""
        known = self._manager.all_tasks
        if name not in known and not name.endswith((".yaml", ".yml")):
            near = difflib.get_close_matches(name, known, n=_LISTED)
            raise ValueError(
                f"task {name!r:.200}: lm-evaluation-harness {self.version} knows none of this name"
                + (f"; near it are {', '.join(near)}" if near else f" among its {len(known):,}")
                + ". Tasks of your own: --include_path=DIR, or the .yaml itself"
            )
        try:
            with _quiet():
                loaded = self._manager.load([name])
        except Exception as error:  # of datasets, of HTTP, of a task's own code
            problem = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"task {name!r:.200}: cannot be loaded: {type(error).__name__}: {problem:.400}") from error
        groups, tasks = loaded.get("groups", {}), loaded["tasks"]
        inner = {child for children in loaded.get("group_map", {}).values() for child in children}
        return [each for key, each in (groups | tasks).items() if key not in inner]

    def evaluate(self, model: TaskModel) -> dict[str, Any]:
        """The harness's own results: the value of its JSON."""
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

        from gpt_pretrain.tasks.harness_model import HarnessModel

        with _quiet():
            return simple_evaluate(
                HarnessModel(model),
                tasks=[*self._tasks],
                num_fewshot=self._num_fewshot,
                limit=self._limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                task_manager=self._manager,
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness forks no processes, as JAX has threads that a fork does not survive, and where nobody watches a
    terminal its bars go nowhere."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        nowhere = sys.stderr if sys.stderr.isatty() else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def metrics_of(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's results -> numbers by task and metric.

    >>> metrics_of({"results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1.0}}})
    {'a': {'acc': 0.5, 'em.strict': 1.0}}
    """
    found: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and isinstance(value, Real):
                name = metric if filtered == "none" else f"{metric}.{filtered}"
                found.setdefault(task, {})[name] = float(value)
    return found

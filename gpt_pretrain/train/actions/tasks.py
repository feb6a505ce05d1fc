"""Tasks, asked while the run goes on: HellaSwag, and those of lm-evaluation-harness."""

import logging

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_pretrain.tasks.suite import Suite, results_path, write_results
from gpt_pretrain.tasks.task_model import TaskModel
from gpt_pretrain.train.actions.action import Action, Now, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.writers import MetricWriter

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """A signal came half way."""


class AskTasks(Action):
    """Asks `train.eval_tasks` of the plain model, at an interval and at the last step.

    Scalars are `evaluation/<task>/<metric>`; a file of the step is kept in save_dir/evaluations. With several
    processes, each asks for its own rows.
    """

    def __init__(self, built: Built, suite: Suite, writer: MetricWriter, stop: StopSignal):
        config = built.config
        self.due = Schedule(config.eval_tasks_interval, also=(built.total_steps,))
        self._suite, self._writer, self._save_dir = suite, writer, config.directory
        self._num_steps, self._last_step = built.total_steps, 0
        self._model = TaskModel(built.spec, built.mesh, built.data.tokenizer)
        # Processes may see a signal at different times: only one alone may leave half way.
        self._leave = stop if jax.process_count() == 1 else None
        self._model.between = self._check
        is_there = results_path(self._save_dir, self._num_steps, suite, self._model).exists()
        if jax.process_count() > 1:
            is_there = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_there)))
        self._is_asked = is_there

    @property
    def is_complete(self) -> bool:
        return self._last_step < self._num_steps or self._is_asked

    def run(self, now: Now) -> None:
        self._model.params = now.state.params
        try:
            results = self._suite.evaluate(self._model)
        except _Stopped:
            return
        finally:
            self._model.params = {}  # the next step donates them
        self._is_asked = self._is_asked or now.step == self._num_steps
        for task, values in results.metrics.items():  # a line of the console each
            metrics = {name: value for name, value in values.items() if not name.startswith("num_")}
            scalars = {f"evaluation/{task}/{name}": metrics[name] for name in metrics if "_stderr" not in name}
            self._writer.write_scalars(now.step, scalars)
        if jax.process_index() == 0:
            path = results_path(self._save_dir, now.step, self._suite, self._model)
            try:
                write_results(path, now.step, self._suite, self._model, results)
            except OSError as error:
                log.warning("%s cannot be written (%s); the curves have its numbers.", path, error)

    def at_end(self, now: Now) -> None:
        self._last_step = now.step
        if not self.is_complete and not (self._leave and self._leave.received is not None):
            self.run(now)
        if not self.is_complete:
            log.warning("Stopped before the tasks of the last step were asked: the same command makes up for it.")

    def _check(self, num_done: int) -> None:
        if self._leave and self._leave.received is not None:
            raise _Stopped

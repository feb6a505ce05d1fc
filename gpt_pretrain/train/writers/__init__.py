"""Where metrics go: console, TensorBoard, W&B. To add one: a file here, and a line in `make_writer`."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from gpt_pretrain.train.writers.clu import MetricWriter, metric_writers, periodic_actions, provide_summary_writer
from gpt_pretrain.train.writers.console import ConsoleWriter
from gpt_pretrain.train.writers.references import Reference
from gpt_pretrain.train.writers.tensorboard import TensorBoardWriter
from gpt_pretrain.train.writers.wandb_rows import check_trial

__all__ = ["KNOWN_WRITERS", "MetricWriter", "check_names", "make_writer", "metric_writers", "periodic_actions"]
KNOWN_WRITERS = ("console", "tensorboard", "wandb")
provide_summary_writer(TensorBoardWriter)


def make_writer(
    names: Sequence[str] = KNOWN_WRITERS,
    *,
    save_dir: str | os.PathLike[str],
    called: str | None = None,
    total_steps: int,
    start_step: int = 0,
    config_text: str = "",
    settings: Mapping[str, Any] | None = None,
    wandb_project: str = "gpt_pretrain",
    run_name: str | None = None,
    sample_prompts: Sequence[str] = (),
    references: Callable[[], Iterable[Reference]] = tuple,
    is_primary: bool = True,
) -> MetricWriter:
    """Returns one writer that writes to all of `names`; on processes that are not primary, to none.

    The console is written at once, the others by one background thread each, in order; `flush()`
    and `close()` wait for them. No writer stops a run: what fails is logged (once per method).

    Args:
      names: any of `KNOWN_WRITERS`.
      save_dir: directory of the run; curves go to `save_dir/tensorboard` and `save_dir/wandb`.
      called: the directory, as the user knows it.
      total_steps: where training will end, for the console's percentages.
      start_step: step that the run resumes from; TensorBoard hides what was logged after it.
      config_text: operative gin config, kept with the curves.
      settings: nested, {"train": {"batch_size": 512, ...}, ...}, kept with the curves as well.
      wandb_project: project in W&B.
      run_name: display name in W&B, which invents one if None.
      sample_prompts: what the texts `samples/1`, ... continue.
      references: the datasets and checkpoints that are there, for W&B; asked again and again.

    Raises:
      ValueError: a name is not known, or `save_dir` has the run of another trial of a W&B sweep.
    """
    check_names(names)
    if not is_primary:
        return metric_writers.MultiWriter([])
    tensorboard_dir = pathlib.Path(save_dir, "tensorboard")
    writers: list[MetricWriter] = []
    if "console" in names:
        places = {"tensorboard": f"TensorBoard in {called or save_dir}/tensorboard", "wandb": "W&B"}
        details = " and ".join(place for name, place in places.items() if name in names)
        writers.append(_log_failures(ConsoleWriter(total_steps, details=details)))
    if "tensorboard" in names:
        # A new run logs step 0 (again); a resumed one has logged `start_step` already.
        curves = TensorBoardWriter(tensorboard_dir, purge_step=start_step + 1 if start_step else 0)
        writers.append(metric_writers.AsyncWriter(_log_failures(curves)))
        if config_text:
            writers[-1].write_texts(start_step, {"operative_config": config_text})
        if settings:
            writers[-1].write_hparams(flat(settings))
            writers[-1].write_texts(start_step, {"settings": json.dumps(settings, indent=4, default=str)})
    if "wandb" in names:
        from gpt_pretrain.train.writers.wandb import WandbWriter  # Only a run that uses W&B waits for it.

        check_trial(save_dir, called or save_dir)
        tracker = WandbWriter(
            save_dir,
            project=wandb_project,
            run_name=run_name,
            start_step=start_step,
            config_text=config_text,
            settings=settings,
            sample_prompts=sample_prompts,
            references=references,
        )
        writers.append(metric_writers.AsyncWriter(_log_failures(tracker)))
    return metric_writers.MultiWriter(writers)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError if a name is not one of `KNOWN_WRITERS`."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise ValueError(f'train.writers: found {names!r}, expected some of {list(KNOWN_WRITERS)}, as in ("console",)')
    if unknown := sorted(set(names) - set(KNOWN_WRITERS)):
        raise ValueError(f"train.writers: no such writer {unknown}; known are {list(KNOWN_WRITERS)}.")


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    >>> flat({"train": {"batch_size": 512}, "seed": 0})
    {'train.batch_size': 512, 'seed': 0}
    """
    values = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            values |= {f"{name}.{inner}": each for inner, each in flat(value).items()}
        else:
            values[name] = value
    return values


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

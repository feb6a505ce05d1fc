"""How a run was configured, as it recorded it."""

from collections.abc import Sequence
from pathlib import Path

from gpt_pretrain.counterfactual.question import checkpoint_name
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.settings import values_of
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.checkpoint_copies import checkpoint_at, checkpoints_at
from gpt_pretrain.train.record import CONFIG_FILE_NAME


def recorded_config(run: OpenedRun) -> str:
    """The run's last configuration, as gin's text. ValueError where nobody recorded it."""
    path = Path(run.place.directory, CONFIG_FILE_NAME)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for step in reversed(checkpoints_at(run.save_dir)):  # of a run in a bucket: every checkpoint has it
        metadata = checkpoints.read_metadata(Path(checkpoint_at(checkpoint_name(run.save_dir, step)).directory))
        return metadata.config
    raise ValueError(f"{run.save_dir}: has no {CONFIG_FILE_NAME} and no checkpoint; nobody recorded its configuration")


def interventions_of(run: OpenedRun) -> Sequence[str]:
    """The run's interventions, as its configuration names them: "@noise/intervention()"."""
    return values_of(recorded_config(run)).get("model.interventions", ())

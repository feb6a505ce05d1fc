"""What a run leaves in its `save_dir` for people and for `replay` and `inspect`, beside checkpoints and curves."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from data_prep.store.dataset_files import whereabouts
from data_prep.store.files import whole_file
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.provenance import Provenance, provenance_of
from gpt_pretrain.train.start import Start

log = logging.getLogger(__name__)

CONFIG_FILE_NAME = "config.gin"


def write_record(built: Built, start: Start) -> Provenance:
    """Writes the configuration, the plan with the places of its datasets, the ledger and the provenance.

    Returns the provenance.
    """
    save_dir = built.config.directory
    with whole_file(Path(save_dir, CONFIG_FILE_NAME)) as partial:
        partial.write_text(built.config.describe_config(), encoding="utf-8", errors="backslashreplace")
    directories = _known_directories(save_dir) if start.is_resumed else {}
    for name, path in built.config.data.directories.items():  # by fingerprint, too: a fork gives a name other data
        fingerprint = built.data.datasets[name].fingerprint
        directories |= {key: whereabouts(path) for key in (name, fingerprint)}
    for name, dataset in built.data.inserted.items():
        directories |= dict.fromkeys((name, dataset.fingerprint), whereabouts(dataset.directory))
    mark = run_lib.LedgerMark.of(start.ledger)
    # The file that knows less comes first: between the two writes, the ledger may go on further than its mark.
    run_lib.RunData(save_dir, start.plan, directories, built.total_steps, start.run_id, mark).write()
    start.ledger.write(save_dir)
    provenance = provenance_of(built)
    provenance.write(save_dir)
    return provenance


def tracked_settings(config: TrainConfig, provenance: Provenance) -> dict[str, Any]:
    """What trackers keep beside the curves: {"train": {"batch_size": 512, ...}, ..., "provenance": {...}}."""
    settings: dict[str, Any] = {}
    for name, value in config.parse_config(config.describe_config()).items():
        owner, _, parameter = name.rpartition(".")
        settings.setdefault(owner, {})[parameter] = value
    return settings | {"provenance": provenance.to_json()}


def write_ledger(save_dir: str, ledger: Ledger) -> None:
    """Writes the ledger, which has become longer, and then its new mark."""
    ledger.write(save_dir)
    data = run_lib.open_run(save_dir)
    dataclasses.replace(data, mark=run_lib.LedgerMark.of(ledger)).write()


def _known_directories(save_dir: str) -> dict[str, str]:
    """Those of all datasets that the run has had."""
    if not Path(save_dir, run_lib.FILE_NAME).exists():
        return {}
    try:
        return run_lib.open_run(save_dir).directories
    except ValueError as error:  # all else in it is written anew
        log.warning("%s; it is written anew, without the directories of earlier datasets.", error)
        return {}

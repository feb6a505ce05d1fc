"""What of a `save_dir` is brought to a bucket, and how it is called there."""

import os
import re
from pathlib import Path

from data_prep.store import buckets
from gpt_pretrain.data import ledger as ledger_lib
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.mirrors import Mirror, Objects
from gpt_pretrain.tasks import suite
from gpt_pretrain.train import changes, events, provenance, seals, time_file
from gpt_pretrain.train.actions import evaluation
from gpt_pretrain.train.record import CONFIG_FILE_NAME
from gpt_pretrain.train.writers import wandb_rows

FILES = (
    run_lib.FILE_NAME,
    ledger_lib.FILE_NAME,
    CONFIG_FILE_NAME,
    provenance.FILE_NAME,
    changes.FILE_NAME,
    events.FILE_NAME,
    time_file.FILE_NAME,
    evaluation.FILE_NAME,
    wandb_rows.FILE_NAME,
    wandb_rows.ID_FILE_NAME,
)
FOLDERS = ("tensorboard/", f"{suite.FOLDER}/", "wandb/offline-run-")  # of an online run, W&B's server has all
CHECKPOINT = re.compile(r"checkpoints/([1-9]\d{0,17})/.+")
UPLOADING = ".uploading"  # copies of what is being uploaded; they stay here


def folder_of(mirror: Mirror, step: int) -> Path:
    return mirror.path(f"checkpoints/{step}")


def seal_of(step: int) -> str:
    return f"checkpoints/{step}/{seals.FILE_NAME}"


def belongs(name: str) -> bool:
    """Whether a file is brought to the bucket, and from there."""
    return name in FILES or name.startswith(FOLDERS) or bool(CHECKPOINT.fullmatch(name))


def by_step(listed: Objects) -> dict[int, dict[str, buckets.Object]]:
    found: dict[int, dict[str, buckets.Object]] = {}
    for name, each in listed.items():
        if match := CHECKPOINT.fullmatch(name):
            found.setdefault(int(match[1]), {})[name] = each
    return found


def files_in(directory: Path, below: str = "") -> set[str]:
    """Names of regular files; what Orbax has not finished is none of ours."""
    found = set()
    for folder, folders, names in os.walk(directory / below):
        folders[:] = [each for each in folders if ".orbax-checkpoint-tmp" not in each]
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and not name.endswith(".partial"):
                found.add(os.path.relpath(path, directory))
    return found

"""What of a run trackers refer to: its datasets, and its checkpoints as they are made."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from data_prep.store.buckets import is_bucket
from data_prep.store.files import digest_of
from gpt_pretrain.train import seals
from gpt_pretrain.train.checkpoints import saved_steps
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.provenance import DatasetIdentity, Provenance
from gpt_pretrain.train.writers.references import Reference


def references_of(config: TrainConfig, provenance: Provenance, run_id: str) -> Callable[[], list[Reference]]:
    """A function that lists the datasets of the run, and its finished checkpoints of now.

    It reads the `digests.json` of each new checkpoint, and nothing of the data.
    """
    datasets = [_dataset(name, each) for name, each in provenance.datasets.items()]
    checkpoints: dict[int, Reference] = {}

    def references() -> list[Reference]:
        for step in saved_steps(config.directory):
            if step not in checkpoints:
                with contextlib.suppress(OSError, ValueError):  # removed meanwhile, or not sealed
                    checkpoints[step] = _checkpoint(config, step, run_id)
        return [*datasets, *(checkpoints[step] for step in sorted(checkpoints))]

    return references


def _dataset(stream: str, identity: DatasetIdentity) -> Reference:
    return Reference(
        # Of the content: the same data is the same artifact, wherever it lies.
        name=f"dataset-{identity.fingerprint[:16]}",
        kind="dataset",
        entry=Path(identity.directory).name or stream,
        url=_url(identity.directory),
        digest=identity.fingerprint,
        metadata={
            "stream": stream,
            "directory": identity.directory,
            "fingerprint": identity.fingerprint,
            "num_train_tokens": identity.num_train_tokens,
            "tokenizer": identity.tokenizer,
        },
    )


def _checkpoint(config: TrainConfig, step: int, run_id: str) -> Reference:
    directory = Path(config.directory, "checkpoints", str(step))
    seal = seals.Seal.read(directory)
    if (seal.run_id, seal.step) != (run_id, step):
        raise ValueError(f"{directory}: of another run")
    digest = digest_of(directory / seals.FILE_NAME)
    return Reference(
        name=f"checkpoints-{run_id}",
        kind="model",
        entry=str(step),
        url=_url(f"{config.save_dir}/checkpoints/{step}"),
        digest=digest,
        metadata={
            "step": step,
            "run_id": run_id,
            "data_plan": seal.plan,
            "num_files": len(seal.files),
            seals.FILE_NAME: digest,
        },
        aliases=(f"step-{step}",),
    )


def _url(place: str) -> str:
    """
    >>> _url("gs://bucket/runs/a"), _url("/data/it is")
    ('gs://bucket/runs/a', 'file:///data/it%20is')
    """
    return place if is_bucket(place) else Path(place).absolute().as_uri()

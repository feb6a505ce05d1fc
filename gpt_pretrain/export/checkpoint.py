"""The checkpoint that is exported: what it is, and its parameters one at a time."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.room import check_room
from gpt_pretrain.train.weight_files.names import paths_of, shapes_of


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint: its digests were compared."""

    path: Path
    metadata: CheckpointMetadata

    @classmethod
    def open(cls, directory: str, *, drop_document_mask: bool = False) -> "Checkpoint":
        """Of a run's newest good checkpoint, or of one checkpoint.

        Raises ValueError where there is none, or its model is one that other projects' GPT-2 cannot be.
        """
        path = checkpoints.locate(directory)
        metadata = checkpoints.read_metadata(path)
        if metadata.model.document_mask and not drop_document_mask:
            raise ValueError(
                f"{path}: was trained with data.document_mask, which keeps attention within a document and counts "
                "positions from its beginning. GPT-2 elsewhere has no such mask: it gives the same logits for one "
                "document at a time, and others for several in a row. If that is enough, add --drop_document_mask."
            )
        return cls(path, metadata)

    @property
    def spec(self) -> ModelSpec:
        return self.metadata.model

    @property
    def save_dir(self) -> Path:
        """Of the run, if the checkpoint still lies in it."""
        return self.path.parent.parent

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each parameter with GPT-2's name, float32. Read from the disk when its turn comes."""
        shapes = shapes_of(self.spec)
        for name, path in paths_of(self.spec).items():
            abstract = jax.ShapeDtypeStruct(shapes[name], np.float32)
            yield name, checkpoints.restore_param(self.path, path, abstract)


def check_target(out: Path, num_bytes: int) -> None:
    """Raises ValueError where `out` is there already, OSError where there is no room for it beside it."""
    if os.path.lexists(out):
        raise ValueError(f"{out}: is there already. Remove it, or name another place.")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out.parent, num_bytes)

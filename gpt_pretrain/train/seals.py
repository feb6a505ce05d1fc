"""What ties a checkpoint to its run: `digests.json`, written last into every one.

It has the digest of every other file of the checkpoint, and says of which run, step and plan they are. So files that
were changed are found, and so is a checkpoint that was renamed, or copied from another run.
"""

import concurrent.futures
import dataclasses
import json
from pathlib import Path
from typing import Any

from data_prep.store.files import digest_json, digest_of, write_json
from gpt_pretrain.train.metadata import CheckpointMetadata

FILE_NAME = "digests.json"
VERSION = 1
# Orbax itself goes on writing these two marks while it commits; they carry no training state.
_UNSEALED = (FILE_NAME, "commit_success.txt", "_CHECKPOINT_METADATA")


@dataclasses.dataclass(frozen=True)
class Seal:
    """The content of `digests.json`.

    Attributes:
      plan: digest of the data plan.
      files: BLAKE3 of each file, by its path within the checkpoint.
    """

    step: int
    run_id: str
    plan: str
    files: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Path, metadata: CheckpointMetadata) -> "Seal":
        """Of the files that are there, for what they are meant to be."""
        return cls(*identity_of(metadata), _digests(checkpoint))

    def write(self, checkpoint: Path) -> None:
        """Puts it into the checkpoint."""
        write_json(checkpoint / FILE_NAME, {"version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, checkpoint: Path) -> "Seal":
        """ValueError where there is none that can be read."""
        try:
            fields: Any = json.loads((checkpoint / FILE_NAME).read_text(encoding="utf-8"))
            if fields.pop("version") != VERSION:
                raise ValueError(f"another version than {VERSION}")
            seal = cls(**fields)
            texts = [seal.run_id, seal.plan, *seal.files, *seal.files.values()]
            if not isinstance(seal.step, int) or not all(isinstance(each, str) for each in texts):
                raise ValueError("expected a number and texts")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{FILE_NAME} cannot be read ({type(error).__name__}: {error})") from None
        return seal


def identity_of(metadata: CheckpointMetadata) -> tuple[int, str, str]:
    """Step, run and digest of the plan."""
    return metadata.step, metadata.run_id, digest_json(metadata.plan.to_json())


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """What was saved beside the state of one checkpoint directory. ValueError where it cannot be read."""
    path = checkpoint / "run" / "metadata"
    try:
        return CheckpointMetadata.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def problem_of(checkpoint: Path, *, run_id: str | None = None) -> str | None:
    """Why a checkpoint, in a directory with the name of its step, cannot be trusted; None if it can.

    Args:
      run_id: of the run that it should be of; None for any.
    """
    try:
        seal = Seal.read(checkpoint)
    except ValueError as error:
        return str(error)
    found = _digests(checkpoint)
    for name in sorted(seal.files.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name in seal.files and found[name] != seal.files[name]:
            return f"{name} has digest {found[name]}, expected {seal.files[name]}"
    try:
        metadata = read_metadata(checkpoint)
    except ValueError as error:
        return str(error)
    if identity_of(metadata) != (seal.step, seal.run_id, seal.plan):
        return f"{FILE_NAME} is that of another checkpoint"
    if checkpoint.name != str(seal.step):
        return f"it is of step {seal.step}, but its directory says {checkpoint.name}: it was renamed or copied"
    if run_id not in (None, seal.run_id):
        return f"it is of the run {seal.run_id}, but this run is {run_id}: it was copied from elsewhere"
    return None


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in _UNSEALED)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        return dict(zip([str(path.relative_to(checkpoint)) for path in files], pool.map(digest_of, files), strict=True))

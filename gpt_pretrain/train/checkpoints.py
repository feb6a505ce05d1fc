"""Checkpoints by Orbax: saved asynchronously, verified before they are trusted.

    save_dir/checkpoints/<step>/state/         parameters, optimizer state, step (Orbax)
    save_dir/checkpoints/<step>/run/metadata   position, identity of the run, gin config (JSON)
    save_dir/checkpoints/<step>/digests.json   BLAKE3 of every file above

Orbax writes into a temporary directory and renames it at the end. The digests are written just before
that rename, so a checkpoint with its final name always has them, and one that fails its digests was
damaged later. Such a one is moved to `save_dir/damaged_checkpoints` and the newest good one is used.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from data_prep.store.files import digest_of, write_json

log = logging.getLogger(__name__)

_DIRECTORY = "checkpoints"
_DAMAGED = "damaged_checkpoints"
_DIGESTS = "digests.json"


class Checkpoints:
    """The checkpoints of one `save_dir`, for the run that writes them."""

    def __init__(self, save_dir: str | os.PathLike, *, num_kept: int = 2):
        self.directory = Path(save_dir).absolute() / _DIRECTORY
        self.directory.mkdir(parents=True, exist_ok=True)
        self._step_being_saved = -1
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "run"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(num_kept),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest finished checkpoint; one that is still being written does not count."""
        return next(iter(_steps(self.directory)), None)

    def save(self, step: int, state: Any, metadata: dict) -> None:
        """Starts saving; returns once the arrays are copied to the host. Waits for an earlier save."""
        self._manager.wait_until_finished()
        self._step_being_saved = step
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(metadata)),
            force=True,
        )
        if not saved:
            raise RuntimeError(
                f"{self.directory}: Orbax declined to save step {step}; found {self._manager.all_steps()}"
            )

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of `step`, on the devices that `abstract_state`'s shardings name, however many saved it."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        try:
            return self._manager.restore(step, args=args)["state"]
        except ValueError as error:
            if "tree structures do not match" not in str(error):
                raise
            raise ValueError(
                f"{self.directory / str(step)}: its optimizer state is that of another optimizer. Set "
                "`train.optimizer` and `optimizer.weight_decay_schedule` back, or take its weights alone: "
                f"--from_pretrained, with another --save_dir. {error}"
            ) from error

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk; raises its error, if any."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _write_digests(self) -> None:
        """Called by Orbax in its saving thread when all files are written, before the rename."""
        if jax.process_index() != 0:
            return
        (written,) = self.directory.glob(f"{self._step_being_saved}.orbax-checkpoint-tmp*")
        write_json(written / _DIGESTS, _digests(written))


@contextlib.contextmanager
def exclusive(save_dir: str | os.PathLike) -> Iterator[None]:
    """Keeps a second run out of `save_dir`; a killed run leaves no lock behind. ValueError if one is in there."""
    is_free = True
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(Path(save_dir, ".lock"), "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
            except OSError as error:  # file systems without locks
                log.warning("%s cannot be locked (%s): take care that no second run uses it.", save_dir, error)
        if jax.process_count() > 1:
            is_free = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_free)))
        if not is_free:
            raise ValueError(f"{save_dir}: another run is using it. Wait for its end, or choose another save_dir.")
        yield


def _steps(directory: Path) -> list[int]:
    """Steps that have a finished checkpoint in `directory`, good or not; the newest first."""
    return sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)


def choose(save_dir: str | os.PathLike) -> tuple[int, dict] | None:
    """The newest checkpoint that passes its digests, as (step, metadata); None if there is none.

    Damaged newer ones are moved aside, and that is said. All processes get the same answer.
    """
    directory = Path(save_dir).absolute() / _DIRECTORY
    step, num_damaged = -1, 0
    if jax.process_index() == 0:
        steps = _steps(directory)
        problems = {}
        while steps and (problem := find_damage(directory / str(steps[0]))):
            problems[steps.pop(0)] = problem
        step, num_damaged = steps[0] if steps else -1, len(problems)
        if steps:
            for damaged, problem in problems.items():
                _move_aside(directory / str(damaged), problem)
    if jax.process_count() > 1:
        step, num_damaged = map(int, multihost_utils.broadcast_one_to_all(np.array([step, num_damaged])))
    if step < 0 and num_damaged:
        raise ValueError(
            f"{directory}: all {num_damaged} checkpoints are damaged (their files do not have the digests in "
            f"{_DIGESTS}). Restore one of them from a copy, or choose another save_dir to start anew."
        )
    return None if step < 0 else (step, read_metadata(directory / str(step)))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files: found and expected; None if nothing is."""
    try:
        expected = json.loads((checkpoint / _DIGESTS).read_text())
    except (FileNotFoundError, ValueError) as error:
        return f"{_DIGESTS} cannot be read ({error})"
    found = _digests(checkpoint)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name in expected and found[name] != expected[name]:
            return f"{name} has digest {found[name]}, expected {expected[name]}"
    return None


def read_metadata(checkpoint: Path) -> dict:
    """What was saved beside the state of one checkpoint directory."""
    return json.loads((checkpoint / "run" / "metadata").read_text())


def locate(directory: str | os.PathLike) -> Path:
    """A run's `save_dir`, or one checkpoint in it -> the checkpoint directory to read weights from.

    Of a `save_dir`, the newest one that is good. Changes nothing on disk.
    """
    path = Path(directory).absolute()
    if (path / "run" / "metadata").exists():
        if problem := find_damage(path):
            raise ValueError(f"{path}: {problem}; the checkpoint is damaged. Use another one.")
        return path
    root = path / _DIRECTORY if (path / _DIRECTORY).is_dir() else path
    for step in _steps(root):
        if not (problem := find_damage(root / str(step))):
            return root / str(step)
        log.warning("%s: %s; skipping this checkpoint", root / str(step), problem)
    raise ValueError(
        f"{directory}: no good checkpoint found; expected the save_dir of a run of gpt_pretrain.main, or one "
        f"checkpoint in its '{_DIRECTORY}' directory"
    )


def restore_params(checkpoint: Path, abstract_params: Any) -> Any:
    """The parameters alone, on the devices that the shardings of `abstract_params` name."""
    target = {"params": abstract_params}
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoint / "state", args=args)["params"]


def differences(found: dict, expected: dict) -> list[str]:
    """Lines that name what differs between two flat dicts."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return [f"  {name}: the checkpoint has {expected.get(name)}, this run has {found.get(name)}" for name in names]


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    # Orbax itself goes on writing these two marks while it commits; they carry no training state.
    files = [path for path in files if path.name not in (_DIGESTS, "commit_success.txt", "_CHECKPOINT_METADATA")]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        return dict(zip([str(path.relative_to(checkpoint)) for path in files], pool.map(digest_of, files), strict=True))


def _move_aside(checkpoint: Path, problem: str) -> None:
    aside = checkpoint.parent.parent / _DAMAGED
    aside.mkdir(exist_ok=True)
    target = aside / checkpoint.name
    number = 1
    while target.exists():
        number += 1
        target = aside / f"{checkpoint.name}-{number}"
    shutil.move(checkpoint, target)
    log.warning("Checkpoint %s is damaged: %s. Moved to %s; going on from the one before.", checkpoint, problem, target)

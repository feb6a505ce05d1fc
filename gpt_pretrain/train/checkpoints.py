"""Checkpoints by Orbax: saved asynchronously, verified before they are trusted.

    save_dir/checkpoints/<step>/state/         parameters, optimizer state, step (Orbax)
    save_dir/checkpoints/<step>/run/metadata   position, identity of the run, gin config (JSON, see metadata.py)
    save_dir/checkpoints/<step>/digests.json   BLAKE3 of every file above, and whose they are (see seals.py)

Orbax writes into a temporary directory and renames it at the end. The digests are written just before
that rename, so a checkpoint with its final name always has them, and one that fails its digests was
damaged later. Such a one is moved to `save_dir/damaged_checkpoints` and the newest good one is used.
"""

import contextlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gpt_pretrain.train import events
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.room import check_room, size_of
from gpt_pretrain.train.seals import Seal, problem_of, read_metadata

log = logging.getLogger(__name__)

DIRECTORY = "checkpoints"  # in a save_dir
_DAMAGED = "damaged_checkpoints"


class Checkpoints:
    """The checkpoints of one `save_dir`, for the run that writes them."""

    def __init__(
        self,
        save_dir: str | os.PathLike,
        *,
        num_kept: int = 2,
        check_directory: Callable[[], None] = lambda: None,
        called: str | None = None,
    ):
        """
        Args:
          check_directory: raises where the `save_dir` is not the run's any more; called before a save is finished.
          called: the `save_dir`, as the user knows it.
        """
        self.directory = Path(save_dir).absolute() / DIRECTORY
        self._called = f"{called or Path(save_dir).absolute()}/{DIRECTORY}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._num_kept, self._check_directory = num_kept, check_directory
        self._being_saved: CheckpointMetadata | None = None
        self._manager = self._new_manager()

    def _new_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_names=("state", "run"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self._num_kept),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest finished checkpoint; one that is still being written does not count."""
        return next(iter(_steps(self.directory)), None)

    def name_of(self, step: int) -> str:
        """What a checkpoint is called for the user."""
        return f"{self._called}/{step}"

    def save(self, state: Any, metadata: CheckpointMetadata) -> None:
        """Starts saving; returns once the arrays are copied to the host. Waits for an earlier save."""
        step = metadata.step
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            check_room(self.directory, self._bytes_needed(state))
        self._being_saved = metadata
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(metadata.to_json())),
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
                f"{self.name_of(step)}: its optimizer state is that of another optimizer. Set "
                "`train.optimizer` and `optimizer.weight_decay_schedule` back, or take its weights alone: "
                f"--from_pretrained, with another --save_dir. {error}"
            ) from error

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk; raises its error, if any."""
        self._manager.wait_until_finished()

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def start_anew(self) -> None:
        """After a save that failed: forgets it, as if this process had just begun. What it left is removed."""
        failed = self._manager
        threading.Thread(target=lambda: _close_quietly(failed), daemon=True, name="failed-save").start()
        self._manager = self._new_manager()

    def num_bytes_unfinished(self) -> int:
        """Of the save under way, as far as it is on disk."""
        return sum(size_of(path) for path in self.directory.glob("*.orbax-checkpoint-tmp*"))

    def _bytes_needed(self, state: Any) -> int:
        """By a new checkpoint, at least: a bit less than the arrays take, as they are compressed."""
        return int(0.9 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

    def close(self) -> None:
        self._manager.close()

    def _seal(self) -> None:
        """Called by Orbax in its saving thread when all files are written, before the rename."""
        if jax.process_index() != 0:
            return
        self._check_directory()
        metadata = self._being_saved
        assert metadata is not None
        (written,) = self.directory.glob(f"{metadata.step}.orbax-checkpoint-tmp*")
        Seal.of(written, metadata).write(written)


def _close_quietly(manager: ocp.CheckpointManager) -> None:
    with contextlib.suppress(Exception):  # its error is known
        manager.close()


def _steps(directory: Path) -> list[int]:
    """Steps that have a finished checkpoint in `directory`, good or not; the newest first. Junk is passed over."""
    found = (path for path in directory.glob("*") if re.fullmatch(r"[1-9]\d{0,17}", path.name) and path.is_dir())
    return sorted((int(path.name) for path in found), reverse=True)


def saved_steps(save_dir: str | os.PathLike) -> list[int]:
    """Steps whose checkpoints are finished, good or not; the newest first."""
    return _steps(Path(save_dir, DIRECTORY))


def checkpoint_path(save_dir: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return Path(save_dir, DIRECTORY, str(step))


def choose(save_dir: str | os.PathLike, *, run_id: str | None = None) -> CheckpointMetadata | None:
    """The metadata of the newest checkpoint that can be trusted; None if there is none.

    Newer ones that cannot are moved aside, and that is logged. All processes get the same answer.

    Args:
      run_id: of the run in `save_dir`, where it is known: a checkpoint of another one is not trusted.
    """
    directory = Path(save_dir).absolute() / DIRECTORY
    step, num_bad = -1, 0
    if jax.process_index() == 0:
        steps = _steps(directory)
        problems = {}
        while steps and (problem := problem_of(directory / str(steps[0]), run_id=run_id)):
            problems[steps.pop(0)] = problem
        step, num_bad = steps[0] if steps else -1, len(problems)
        for bad, problem in problems.items():
            if steps:
                _move_aside(directory / str(bad), problem)
            else:
                log.warning("Checkpoint %s: %s", directory / str(bad), problem)
    if jax.process_count() > 1:
        step, num_bad = map(int, multihost_utils.broadcast_one_to_all(np.array([step, num_bad])))
    if step < 0 and num_bad:
        which = "the only checkpoint is" if num_bad == 1 else f"all {num_bad} checkpoints are"
        raise ValueError(
            f"{directory}: {which} damaged, or not of this run. Restore one from a copy, or choose another save_dir to "
            "start anew."
        )
    return None if step < 0 else read_metadata(directory / str(step))


def locate(directory: str | os.PathLike) -> Path:
    """A run's `save_dir`, or one checkpoint in it -> the checkpoint directory to read weights from.

    Of a `save_dir`, the newest one that is good. Changes nothing on disk.
    """
    path = Path(directory).absolute()
    if (path / "run" / "metadata").exists():
        if problem := problem_of(path):
            raise ValueError(f"{path}: {problem}. The checkpoint cannot be trusted; use another one.")
        return path
    root = path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    for step in _steps(root):
        if not (problem := problem_of(root / str(step))):
            return root / str(step)
        log.warning("%s: %s; skipping this checkpoint", root / str(step), problem)
    raise ValueError(
        f"{directory}: no good checkpoint found; expected the save_dir of a run of gpt_pretrain.main, or one "
        f"checkpoint in its '{DIRECTORY}' directory"
    )


def restore_state(checkpoint: str | os.PathLike, abstract_state: Any) -> Any:
    """All that a checkpoint holds of a run's state, on the devices that `abstract_state`'s shardings name."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(checkpoint) / "state", abstract_state)


def restore_params(checkpoint: Path, abstract_params: Any) -> Any:
    """The parameters alone, on the devices that the shardings of `abstract_params` name."""
    target = {"params": abstract_params}
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoint / "state", args=args)["params"]


def restore_param(checkpoint: Path, path: tuple, abstract: jax.ShapeDtypeStruct) -> np.ndarray:
    """One parameter, by the keys on its path through the tree, in the memory of this machine; no other one is read."""
    target: Any = abstract
    for key in reversed(("params", *path)):
        target = {key: target}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        (array,) = jax.tree.leaves(checkpointer.restore(checkpoint / "state", args=args))
    return array


def _move_aside(checkpoint: Path, problem: str) -> None:
    aside = checkpoint.parent.parent / _DAMAGED
    aside.mkdir(exist_ok=True)
    target = aside / checkpoint.name
    number = 1
    while target.exists():
        number += 1
        target = aside / f"{checkpoint.name}-{number}"
    shutil.move(checkpoint, target)
    words = f"checkpoint passed over: {problem}. Moved to {aside.name}/{target.name}"
    events.note(aside.parent, int(checkpoint.name), events.Kind.DAMAGED, words)
    log.warning(
        "Checkpoint %s cannot be trusted: %s. Moved to %s; resuming from the one before.", checkpoint, problem, target
    )

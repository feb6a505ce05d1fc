"""Verifying the shards of a large dataset while it is trained on."""

import logging
import shlex
import socket
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.pages.numbers import size_text
from data_prep.pages.terminal import python_as_typed
from gpt_pretrain.data.verification import Suspect, Verification, steps_with, suspects_of
from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.results import RunFailed
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import Category

log = logging.getLogger(__name__)


class VerifyShards(Action):
    """Stops the run when a shard is not what its manifest says. Each host verifies all files as it sees them: its
    processes share the work."""

    counts_as = Category.STEP

    def __init__(self, built: Built, start: Start, checkpoints: Checkpoints):
        suspects = suspects_of(built.data.datasets, start.plan, start.step)
        rank, count = _among_processes_of_this_host()
        self._plan, self._checkpoints = start.plan, checkpoints
        self._verification = Verification(suspects[rank::count], built.config.directory, number=jax.process_index())
        self._is_said = self._verification.is_done
        self._verification.start()
        if not self._is_said:
            log.info(
                "Verifying %d shards (%s) while training runs%s",
                self._verification.num_shards,
                size_text(self._verification.num_bytes),
                f"; {self._verification.num_known} are known to be good" if self._verification.num_known else "",
            )

    def due(self, step: int) -> bool:
        self._look(step)
        return False

    def at_end(self, now: Now) -> None:
        self._verification.stop()
        self._look(now.step)
        if not self._is_said:
            left = self._verification.num_shards - self._verification.num_verified
            log.warning(
                "%d of %d shards are not verified yet; `%s -m data_prep.check` on the dataset does it.",
                left,
                self._verification.num_shards,
                python_as_typed(),
            )

    def _look(self, step: int) -> None:
        if self._verification.problem:
            suspect, problem = self._verification.problem
            raise RunFailed(f"{problem}. {self._uses(suspect, step)}")
        if self._verification.is_done and not self._is_said:
            self._is_said = True
            log.info("All %d shards are verified: they are what the manifest says.", self._verification.num_shards)

    def _uses(self, suspect: Suspect, step: int) -> str:
        """Which steps used a bad shard, and the way back."""
        repair = f"`{python_as_typed()} -m data_prep.check {shlex.quote(suspect.directory)} --repair` makes it again"
        steps = steps_with(suspect, self._plan, step)
        if not steps:
            what = "Only validation reads it" if suspect.shard.split != "train" else "No step has used it yet"
            return f"{what}: {repair}, then the same command resumes."
        used = f"{len(steps)} of {step} steps used it, step {steps[0]} first, step {steps[-1]} last. {repair}."
        saved = sorted(int(each.name) for each in self._checkpoints.directory.iterdir() if each.name.isdigit())
        good, bad = [each for each in saved if each < steps[0]], [each for each in saved if each >= steps[0]]
        if not good:
            return f"{used} No checkpoint from before step {steps[0]} is left: begin anew, with another --save_dir."
        newest = self._checkpoints.name_of(good[-1])
        if not bad:
            return f"{used} {newest} is from before: the same command resumes from there."
        folders = [shlex.quote(self._checkpoints.name_of(each)) for each in bad]
        how = "; ".join(f"aws s3 rm --recursive {each}" for each in folders)
        if not newest.startswith("s3://"):
            how = f"{'gcloud storage ' * newest.startswith(('gs://', 'gcs://'))}rm -r {' '.join(folders)}"
        return f"{used} {newest} is from before: remove the later ones ({how}), and the same command resumes."


def _among_processes_of_this_host() -> tuple[int, int]:
    """(this one's number among them, how many they are)"""
    if jax.process_count() == 1:
        return 0, 1
    name = np.uint32(zlib.crc32(socket.gethostname().encode()))
    here = np.flatnonzero(np.asarray(multihost_utils.process_allgather(name)).reshape(-1) == name)
    return int(np.searchsorted(here, jax.process_index())), len(here)

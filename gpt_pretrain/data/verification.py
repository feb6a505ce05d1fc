"""Verifying large datasets while they are trained on: every shard once, in a thread, at a part of the disk's speed."""

import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from data_prep.store.addresses import Addresses
from data_prep.store.datasets import TokenDataset, UnverifiedShard
from data_prep.store.files import FileProblem, file_problem, read_json, write_json
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, windows_overlapping

log = logging.getLogger(__name__)

SHARE = 0.25  # of the time that the disk is kept busy
_PIECE_BYTES = 1 << 23
_LOOK_AHEAD_EXAMPLES = 1 << 18
_CHUNK_EXAMPLES = 1 << 15
NOTES = "verified*.json"


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A shard to verify, and the dataset that it is of."""

    shard: UnverifiedShard
    directory: str
    fingerprint: str


class Verification:
    """The thread that verifies, and what it has found.

    Args:
      suspects: in the order in which they are verified.
      save_dir: of the run. What was verified is noted there, with size, time and inode, so that a run that is started
        again does not begin anew.
      number: of this process, where several verify.
      share: of the time in which it reads; the rest it sleeps.
    """

    def __init__(
        self, suspects: Sequence[Suspect], save_dir: str | os.PathLike, *, number: int = 0, share: float = SHARE
    ):
        self._known = _known(save_dir)
        # A file that is copied to each host is another one on each.
        self._suspects = [each for each in suspects if _note(each.shard) not in self._known]
        self.num_bytes = sum(each.shard.num_bytes for each in self._suspects)
        self.num_shards, self.num_known = len(self._suspects), len(suspects) - len(self._suspects)
        self.num_verified = 0
        self.problem: tuple[Suspect, FileProblem] | None = None
        self._notes = Path(save_dir, NOTES.replace("*", f"-{number}" if number else ""))
        self._share, self._ending = share, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="verification")

    @property
    def is_done(self) -> bool:
        """All is verified and good."""
        return self.num_verified == self.num_shards

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, wherever it is."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        for each in self._suspects:
            note = _note(each.shard)
            problem = self._problem_of(each.shard)
            if self._ending.is_set():
                return
            if problem:
                self.problem = each, problem
                return
            self.num_verified += 1
            if note and note == _note(each.shard):  # not written to meanwhile
                self._remember(note)

    def _problem_of(self, shard: UnverifiedShard) -> FileProblem | None:
        problem = file_problem(shard.path, shard.num_bytes, shard.digest, read=False)
        if problem:
            return problem
        digest = blake3()
        try:
            with open(shard.path, "rb", buffering=0) as file:
                while not self._ending.is_set():
                    began = time.monotonic()
                    if not (piece := file.read(_PIECE_BYTES)):
                        break
                    digest.update(piece)  # releases the interpreter
                    self._ending.wait((time.monotonic() - began) * (1 / self._share - 1))
        except FileNotFoundError:
            return FileProblem(shard.path, "missing", None, shard.num_bytes)
        found = digest.hexdigest()
        return None if found == shard.digest else FileProblem(shard.path, "digest", found, shard.digest)

    def _remember(self, note: dict[str, Any]) -> None:
        self._known = [each for each in self._known if each.get("path") != note["path"]] + [note]
        try:
            write_json(self._notes, {"verified": self._known}, durable=False)
        except OSError as error:  # a restart verifies it again
            log.debug("%s: %s", self._notes, error)


def _note(shard: UnverifiedShard) -> dict[str, Any]:
    """What tells that a file is still the one that was verified; empty where it is gone."""
    try:
        status = os.stat(shard.path)
    except OSError:
        return {}
    return {
        "host": socket.gethostname(),
        "path": os.path.abspath(shard.path),
        "digest": shard.digest,
        "num_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
    }


def _known(save_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The notes of all processes; those that cannot be read are made again."""
    notes = []
    for path in sorted(Path(save_dir).glob(NOTES)):
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        listed = found.get("verified") if isinstance(found, dict) else None
        notes += [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return notes


def suspects_of(datasets: Mapping[str, TokenDataset], plan: Plan, step_index: int) -> list[Suspect]:
    """Shards to verify: those of validation, those of training in the order in which the steps from one on use them.

    Looked up so far as that is cheap; in a global shuffle, all are used within a few steps.
    """
    all_of = {
        name: [Suspect(shard, each.directory, each.fingerprint) for shard in each.unverified]
        for name, each in datasets.items()
    }
    train = {name: [each for each in found if each.shard.split == "train"] for name, found in all_of.items()}
    ordered = [each for found in all_of.values() for each in found if each.shard.split != "train"]
    left = {(name, i) for name, found in train.items() for i in range(len(found))}
    for key in _first_used(train, plan, step_index) if left else ():
        if key in left:
            left.remove(key)
            ordered.append(train[key[0]][key[1]])
    return ordered + [train[name][i] for name, i in sorted(left)]


def _first_used(train: Mapping[str, Sequence[Suspect]], plan: Plan, step_index: int) -> list[tuple[str, int]]:
    """(stream, number of its shard), in the order of use, more than once."""
    stage, out = plan.stage_at(step_index), []
    addresses = {name: Addresses(each.shard.num_tokens for each in found) for name, found in train.items() if found}
    num_left = sum(len(found) for found in train.values())
    position, seen = stage.position(step_index), set()
    for first in range(position, position + _LOOK_AHEAD_EXAMPLES, _CHUNK_EXAMPLES):
        streams, windows = stage.examples_at(np.arange(first, first + _CHUNK_EXAMPLES))
        found: list[tuple[int, str, int]] = []
        for index, stream in enumerate(stage.streams):
            if stream.name not in addresses:
                continue
            rows = np.flatnonzero(streams == index)
            starts = windows[rows] * stage.seq_len
            for edge in (starts, starts + stage.seq_len):
                shards, firsts = np.unique(addresses[stream.name].files_of(edge), return_index=True)
                used = zip(rows[firsts].tolist(), shards.tolist(), strict=True)
                found += [(row, stream.name, shard) for row, shard in used]
        out += [(name, shard) for _, name, shard in sorted(found)]
        seen.update(out)
        if len(seen) == num_left:
            break
    return out


def steps_with(suspect: Suspect, plan: Plan, num_steps: int) -> list[int]:
    """The first `num_steps` steps, counted from 1, as far as they used a training shard: ascending."""
    shard = suspect.shard
    if shard.split != "train":
        return []

    def windows_of(stage: Stage) -> list[int]:
        (index,) = (i for i, each in enumerate(stage.streams) if each.fingerprint == suspect.fingerprint)
        return list(windows_overlapping(shard.start, shard.num_tokens, stage.seq_len, stage.num_windows(index)))

    found = plan.occurrences(suspect.fingerprint, windows_of, num_steps)
    return sorted({place.step_index + 1 for _, place in found})

"""The time ledger of a run, kept over its sessions.

    save_dir/time_ledger.json    seconds by category: now, and as they were at the newest checkpoints; with a digest

One small JSON, replaced as a whole: a kill leaves the old one or the new one, and it does not grow with the run, as
lines would. It is written by a thread of its own, so that nobody waits for the disk, and however long the main thread
is in one place. A killed session loses what it spent after the last write: at most a hundredth of its time, from 10
seconds on, and never more than about 10 seconds.
"""

import dataclasses
import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from data_prep.store.files import digest_json, read_json, read_note, write_note
from data_prep.store.typed import Count, typed
from gpt_pretrain.train.checkpoints import saved_steps
from gpt_pretrain.train.results import RunFailed
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.time_ledger import Category, Secs, TimeLedger

log = logging.getLogger(__name__)

FILE_NAME = "time_ledger.json"
VERSION = 1
_PATIENCE_SECS = 5.0  # with a disk that does not answer


@dataclasses.dataclass(frozen=True)
class TimeRecord:
    """What is on disk.

    Attributes:
      run_id: what the run's other files say, too.
      num_sessions: starts of the program.
      step: that was under way.
      secs: by category, of all sessions.
      checkpoints: the same, as it was when the step of a checkpoint had all that belongs to it, by step.
    """

    run_id: str
    num_sessions: Count
    step: Count
    secs: Mapping[str, float]
    checkpoints: Mapping[str, Mapping[str, float]]

    def __post_init__(self):
        for secs in (self.secs, *self.checkpoints.values()):
            if unknown := set(secs) - set(Category):
                raise ValueError(f"{min(unknown)!r:.40} is no category of time")
            if any(each < 0 for each in secs.values()):
                raise ValueError("a number of seconds is negative")
        if bad := [step for step in self.checkpoints if not re.fullmatch(r"\d{1,18}", step)]:
            raise ValueError(f"{bad[0]!r:.40} is no step")

    @classmethod
    def of(cls, times: TimeLedger, run_id: str, saved_steps: Collection[int]) -> "TimeRecord":
        """As it is now; of checkpoints, those that are saved, and the newest, which may be on its way."""
        step, secs, checkpoints = times.snapshot()
        kept = {each for each in checkpoints if each in saved_steps or each == max(checkpoints)}
        marks = {str(each): _rounded(checkpoints[each]) for each in sorted(kept)}
        return cls(run_id, times.num_sessions, step, _rounded(secs), marks)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, path: Path) -> "TimeRecord | None":
        """None where there is none. ValueError, without the path, for what was not written so; OSError."""
        fields = read_json(path)
        if fields is None:
            return None
        if not isinstance(fields, dict) or fields.pop("digest", None) != digest_json(fields):
            raise ValueError(f"{path}: is not what was written; the file was damaged or changed")
        if (version := fields.pop("version", None)) != VERSION:
            raise ValueError(f"{path}: version {version!r:.40}, expected {VERSION}")
        try:
            return typed(cls, fields, "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def resumed_from(self, step: int) -> tuple[Secs, dict[int, Secs]]:
        """(seconds by category, and at checkpoints) for a session that resumes from the checkpoint of `step`.

        What was spent after that checkpoint is lost. Where the file does not know the checkpoint, what it knows of the
        time before counts as kept.
        """
        marks = {int(name): _secs(each) for name, each in self.checkpoints.items() if int(name) <= step}
        known = {self.step: _secs(self.secs)} | marks if self.step <= step else marks
        kept = known[max(known)] if known else _secs({})
        lost = sum(self.secs.values()) - sum(kept.values())
        return kept | {Category.LOST: kept[Category.LOST] + max(0.0, lost)}, marks


def _secs(values: Mapping[str, float]) -> Secs:
    return {category: values.get(category, 0.0) for category in Category}


def _rounded(secs: Secs) -> dict[str, float]:
    return {str(category): round(each, 3) for category, each in secs.items() if each}


class TimeFile:
    """The file of a run in `save_dir`.

    What it holds of earlier sessions is added to `times`. In a `with` block it is written time and again, and at the
    end. Nothing that goes wrong with it stops the run: it is said once.

    Args:
      check_directory: raises RunFailed where `save_dir` is not the run's any more; then nothing is written there.
    """

    LEAST_SECS, MOST_SECS, SHARE = 0.1, 10.0, 0.01  # between two writes; the share is of the session so far

    def __init__(
        self, save_dir: str | os.PathLike, times: TimeLedger, start: Start, check_directory: Callable[[], None]
    ):
        self._path, self._times, self._run_id = Path(save_dir, FILE_NAME), times, start.run_id
        self._check_directory = check_directory
        self._written: dict[str, Any] | None = None
        self._is_said = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="time-ledger")
        self._take_up(start.step)

    def _take_up(self, step: int) -> None:
        """What earlier sessions of this run left. A damaged file is moved aside, and a new one begun."""
        try:
            record = TimeRecord.read(self._path)
        except (ValueError, OSError) as error:
            aside = self._path.with_name(f"{FILE_NAME}.damaged")
            try:
                os.replace(self._path, aside)
                kept = f"moved to {aside}"
            except OSError as problem:
                kept = f"it cannot be moved aside ({problem.strerror})"
            log.warning("%s; %s. The run's time is counted anew from here on.", error, kept)
            return
        if record and record.run_id == self._run_id:
            self._times.add_earlier(*record.resumed_from(step), record.num_sessions)

    def __enter__(self) -> "TimeFile":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(_PATIENCE_SECS)
        if not self._thread.is_alive():
            self._write()

    def write_last(self) -> None:
        """Once more, when the run does not hold its `save_dir` any more: unless another one has taken it since."""
        if self._written is not None and read_note(self._path) == self._written:
            self._check_directory = lambda: None  # the file says it
            self._write(durable=False)  # as it was before, it is on disk

    def _keep(self) -> None:
        self._write()
        while not self._ends.wait(min(max(self.SHARE * self._times.session_secs, self.LEAST_SECS), self.MOST_SECS)):
            self._write()

    def _write(self, *, durable: bool = True) -> None:
        try:
            self._check_directory()
            fields = TimeRecord.of(self._times, self._run_id, saved_steps(self._path.parent)).to_json()
            write_note(self._path, fields, durable=durable)
            self._written = fields
        except RunFailed:  # the run is about to say it
            return
        except OSError as error:
            if not self._is_said:
                log.warning(
                    "%s cannot be written (%s): the run goes on. If it is killed, its time since then is not known.",
                    self._path,
                    error.strerror or error,
                )
            self._is_said = True

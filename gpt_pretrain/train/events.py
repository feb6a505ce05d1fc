"""What happened to a run beside its steps: `save_dir/events.jsonl`, a line each, only ever added to.

Starts, resumptions, stops, failed saves, checkpoints that were passed over, and why a run ended with an error. For
`gpt_pretrain.report`; nothing of it is needed to go on.
"""

import contextlib
import dataclasses
import enum
import json
import os
import time
from pathlib import Path

from data_prep.store.files import read_bytes
from data_prep.store.typed import Count, typed

FILE_NAME = "events.jsonl"
VERSION = 1
MOST_SECS = 1e11  # since 1970, that a time of anything here may be
_MOST_CHARACTERS = 2000  # of the words


class Kind(enum.StrEnum):
    """What happened."""

    STARTED = "started"
    RESUMED = "resumed"
    STOPPED = "stopped"
    FAILED = "failed"  # the run ended with an error
    SAVE_FAILED = "save failed"
    DAMAGED = "damage"  # of a checkpoint or of data


@dataclasses.dataclass(frozen=True)
class Event:
    """One line.

    Attributes:
      step: updates made until then; of a checkpoint, its step; of a run that failed, the step that did.
      time: seconds since 1970.
    """

    step: Count
    time: float
    kind: Kind
    words: str


def note(save_dir: str | os.PathLike, step: int, kind: Kind, words: str) -> None:
    """Adds a line; the same damage that is found again and again is one. Never raises.

    For the first process of a run alone, which holds `save_dir`.
    """
    event = Event(step, round(time.time(), 3), kind, " ".join(words.split())[:_MOST_CHARACTERS])
    line = json.dumps({"version": VERSION, **dataclasses.asdict(event)}, ensure_ascii=False).encode("utf-8", "replace")
    with contextlib.suppress(OSError, ValueError):
        path = Path(save_dir, FILE_NAME)
        kept = _content(path)
        last = _event_in(kept.splitlines()[-1]) if kept.strip() else None
        if kind is Kind.DAMAGED and last and dataclasses.replace(last, time=event.time) == event:
            return
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:  # a torn line, of a machine that lost power, is ended first
            os.write(file, b"\n" * (bool(kept) and not kept.endswith(b"\n")) + line + b"\n")
            os.fsync(file)
        finally:
            os.close(file)


def read_events(save_dir: str | os.PathLike) -> list[Event]:
    """In their order; lines that are no events are left out. OSError, ValueError."""
    return [event for line in _content(Path(save_dir, FILE_NAME)).splitlines() if (event := _event_in(line))]


def _content(path: Path) -> bytes:
    """Nothing where nothing is. ValueError for what is no file, or no such file: nothing waits for a pipe."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""


def _event_in(line: bytes) -> Event | None:
    try:
        fields = json.loads(line.decode("utf-8"))
        if fields["version"] != VERSION:
            return None
        step, secs = typed(Count, fields["step"], "step"), typed(float, fields["time"], "time")
        if not 0 <= secs < MOST_SECS:
            return None
        return Event(step, secs, Kind(fields["kind"]), typed(str, fields["words"], "words"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None

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

from data_prep.store.typed import Count, typed

FILE_NAME = "events.jsonl"
VERSION = 1
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
    with contextlib.suppress(OSError):
        path = Path(save_dir, FILE_NAME)
        kept = path.read_bytes() if path.exists() else b""
        last = _event_in(kept.splitlines()[-1]) if kept.strip() else None
        if kind is Kind.DAMAGED and last and dataclasses.replace(last, time=event.time) == event:
            return
        line = json.dumps({"version": VERSION, **dataclasses.asdict(event)}, ensure_ascii=False)
        with open(path, "ab") as file:  # a torn line, of a machine that lost power, is ended first
            file.write(b"\n" * (not kept.endswith(b"\n") and bool(kept)) + line.encode("utf-8", "replace") + b"\n")
            file.flush()
            os.fsync(file.fileno())


def note_start(save_dir: str | os.PathLike, step: int, words: str, *, is_resumed: bool) -> None:
    """Notes that a session begins after `step`."""
    note(save_dir, step, Kind.RESUMED if is_resumed else Kind.STARTED, words)


def read_events(save_dir: str | os.PathLike) -> list[Event]:
    """In their order; lines that are no events are left out. OSError."""
    path = Path(save_dir, FILE_NAME)
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [event for line in lines if (event := _event_in(line))]


def _event_in(line: bytes) -> Event | None:
    try:
        fields = json.loads(line.decode("utf-8"))
        if fields["version"] != VERSION:
            return None
        step, secs = typed(Count, fields["step"], "step"), typed(float, fields["time"], "time")
        return Event(step, secs, Kind(fields["kind"]), typed(str, fields["words"], "words"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None

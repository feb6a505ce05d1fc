"""The curves of a run, read back from its event files, without TensorFlow.

    save_dir/tensorboard/events.out.tfevents.<seconds>.<host>.<nanoseconds>    one a session

An event file is a row of TFRecords: the length (uint64), its masked CRC-32C, an `Event`, its masked CRC-32C,
all little-endian. A session that resumed a run begins with a mark (`SessionLog.START`) and its first step: what earlier
files hold for that step and later ones was lost with a kill and is left out, so that each step is there once.
"""

import array
import dataclasses
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

_HEADER, _CRC = struct.Struct("<QI"), struct.Struct("<I")
_MOST_SECS = 1e11  # since 1970; what is none of these says nothing
_AT_ONCE = 1 << 15  # records
_FEW = 32  # records of one length: their bytes are many, and gone through one by one
_TEXT = "/text_summary"  # what tensorboardX adds to the name of a text
_INDENT = "    "


@dataclasses.dataclass(frozen=True)
class Curve:
    """A scalar over the steps: arrays of one length, each step once, ascending.

    Attributes:
      steps: int64, counted from 1 (0: before the first).
      wall_times: float64, seconds since 1970, when it was written.
      values: float64.
    """

    steps: np.ndarray
    wall_times: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that was written at a step."""

    step: int
    wall_time: float
    text: str


@dataclasses.dataclass(frozen=True)
class Session:
    """A start of the program, as far as its file shows it.

    Attributes:
      first_step: from which on it has the run's curves; 0 for a run that begins.
      began, ended: when its mark and its last event were written, in seconds since 1970.
      last_step: that it reached, kept or not.
    """

    first_step: int
    began: float
    ended: float
    last_step: int


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a run has written.

    Attributes:
      scalars, texts: by tag, those that are still there.
      sessions: in their order.
      problems: damage that was found, a sentence a file. That a killed run left its last record half written is none.
    """

    scalars: Mapping[str, Curve]
    texts: Mapping[str, tuple[Text, ...]]
    sessions: tuple[Session, ...]
    problems: tuple[str, ...]


def read_curves(logdir: str | os.PathLike) -> Curves:
    """The curves in a run's `save_dir/tensorboard`; none where no event file is. OSError."""
    from tensorboardX.proto.event_pb2 import (  # a third of a second
        Event,  # pyright: ignore[reportAttributeAccessIssue]
        SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
    )

    kept = _Kept()
    sessions: list[list[float]] = []  # as `Session` has them
    problems: list[str] = []
    for path in _event_files(Path(logdir)):
        for record in _records(path, problems):
            try:
                event = Event.FromString(record)
            except Exception:  # protobuf's DecodeError has several homes
                problems.append(f"{path}: holds a record that is no event; what comes after it is not shown")
                break
            step, now = event.step, event.wall_time if 0 <= event.wall_time < _MOST_SECS else 0.0
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                kept.forget_from(step)
                sessions.append([step, now, now, 0])
            for value in event.summary.value:
                which = value.WhichOneof("value")
                if which == "simple_value":
                    kept.add(value.tag, step, now, value.simple_value)
                elif which == "tensor" and value.tag.endswith(_TEXT):
                    text = b"".join(value.tensor.string_val).decode("utf-8", "replace")
                    kept.texts.setdefault(value.tag.removesuffix(_TEXT), []).append(Text(step, now, _as_written(text)))
            if sessions and now > sessions[-1][2]:
                sessions[-1][2:] = now, max(sessions[-1][3], step)
    started = tuple(Session(int(first), began, ended, int(last)) for first, began, ended, last in sessions)
    return Curves(kept.scalars(), kept.last_texts(), started, tuple(problems))


class _Kept:
    """What was read so far and not forgotten."""

    def __init__(self):
        self.columns: dict[str, tuple[array.array, array.array, array.array]] = {}
        self.texts: dict[str, list[Text]] = {}

    def add(self, tag: str, step: int, wall_time: float, value: float) -> None:
        if (columns := self.columns.get(tag)) is None:
            columns = self.columns[tag] = array.array("q"), array.array("d"), array.array("d")
        columns[0].append(step)
        columns[1].append(wall_time)
        columns[2].append(value)

    def forget_from(self, step: int) -> None:
        for tag, columns in list(self.columns.items()):
            chosen = np.frombuffer(columns[0], np.int64) < step
            if not chosen.any():
                del self.columns[tag]
            elif not chosen.all():
                left = [np.frombuffer(each, each.typecode)[chosen].tobytes() for each in columns]
                self.columns[tag] = array.array("q", left[0]), array.array("d", left[1]), array.array("d", left[2])
        for tag, texts in list(self.texts.items()):
            self.texts[tag] = [each for each in texts if each.step < step]

    def scalars(self) -> dict[str, Curve]:
        return {tag: _curve(*(np.array(each) for each in columns)) for tag, columns in sorted(self.columns.items())}

    def last_texts(self) -> dict[str, tuple[Text, ...]]:
        """Of several of one step the last."""
        found = {tag: {each.step: each for each in texts} for tag, texts in sorted(self.texts.items())}
        return {tag: tuple(by_step[step] for step in sorted(by_step)) for tag, by_step in found.items() if by_step}


def _curve(steps: np.ndarray, wall_times: np.ndarray, values: np.ndarray) -> Curve:
    """What was written twice for a step, as an evaluation that was made again, counts as it was written last."""
    if (np.diff(steps) > 0).all():
        return Curve(steps, wall_times, values)
    order = np.argsort(steps, kind="stable")
    last = np.append(np.diff(steps[order]) > 0, True)
    chosen = order[last]
    return Curve(steps[chosen], wall_times[chosen], values[chosen])


def _event_files(logdir: Path) -> list[Path]:
    """In the order in which they were begun."""

    def began(path: Path) -> tuple[int, int, str]:
        match = re.search(r"tfevents\.(\d+)\..*?\.?(\d*)$", path.name)
        return (int(match[1]), int(match[2] or 0), path.name) if match else (0, 0, path.name)

    return sorted((each for each in logdir.glob("*tfevents*") if each.is_file()), key=began)


def _records(path: Path, problems: list[str]) -> Iterator[bytes]:
    """The whole records of a file that have their digests; adds what is wrong with the file to `problems`."""
    data, at, num_damaged = path.read_bytes(), 0, 0
    while True:
        starts, lengths, crcs, end = _framed(data, at)
        # Where a length is damaged, nothing says where the next record begins.
        good = _masked(_crcs([data[start - _HEADER.size : start - _CRC.size] for start in starts])) == crcs
        num_good = len(starts) if good.all() else int(np.argmin(good))
        spans = [slice(a, a + n) for a, n in zip(starts[:num_good], lengths, strict=False)]
        if num_good < len(starts):
            where = starts[num_good] - _HEADER.size
            problems.append(f"{path}: damaged at byte {where:,}; what comes after it is not shown")
        else:  # the last one may be half there: a killed run, or one that is writing it
            spans = [span for span in spans if span.stop + _CRC.size <= len(data)]
        records = [data[span] for span in spans]
        expected = np.array([_CRC.unpack_from(data, span.stop)[0] for span in spans], np.uint32)
        is_whole = (_masked(_crcs(records)) == expected).tolist()
        num_damaged += is_whole.count(False)
        yield from (record for record, each in zip(records, is_whole, strict=True) if each)
        if len(spans) < _AT_ONCE:
            break
        at = end
    if num_damaged:
        records = "1 record is" if num_damaged == 1 else f"{num_damaged:,} records are"
        problems.append(f"{path}: {records} damaged, and not shown")


def _framed(data: bytes, at: int) -> tuple[list[int], list[int], np.ndarray, int]:
    """Some records from a place on: (where they begin, their lengths, the digests of these, where they end)."""
    starts, lengths, crcs = [], [], []
    unpack, header, footer, size = _HEADER.unpack_from, _HEADER.size, _CRC.size, len(data)
    while at + header <= size and len(starts) < _AT_ONCE:
        length, crc = unpack(data, at)
        starts.append(at + header)
        lengths.append(length)
        crcs.append(crc)
        at += header + length + footer
    return starts, lengths, np.array(crcs, np.uint32), at


def _masked(crcs: np.ndarray) -> np.ndarray:
    return ((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)


def _table() -> np.ndarray:
    """CRC-32C of each byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table.astype(np.uint32)


_TABLE = _table()
_TABLE_AS_LIST: list[int] = _TABLE.tolist()


def _crcs(records: Sequence[bytes]) -> np.ndarray:
    """CRC-32C of each, uint32: those of one length together, byte by byte."""
    lengths = np.array([len(each) for each in records], np.int64)
    found = np.zeros(len(records), np.uint32)
    order = np.argsort(lengths, kind="stable")
    for indices in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        if len(indices) < _FEW:
            for index in indices.tolist():
                found[index] = _crc(records[index])
            continue
        joined = np.frombuffer(b"".join([records[index] for index in indices.tolist()]), np.uint8)
        crcs = np.full(len(indices), 0xFFFFFFFF, np.uint32)
        for column in joined.reshape(len(indices), -1).T:
            crcs = _TABLE[(crcs ^ column) & np.uint32(0xFF)] ^ (crcs >> np.uint32(8))
        found[indices] = ~crcs
    return found


def _crc(record: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in record:
        crc = _TABLE_AS_LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _as_written(text: str) -> str:
    """A text without the indentation by which our writer has TensorBoard show it as it is."""
    lines = text.split("\n")
    if any(line.strip() and not line.startswith(_INDENT) for line in lines):
        return text
    return "\n".join(line.removeprefix(_INDENT) for line in lines)

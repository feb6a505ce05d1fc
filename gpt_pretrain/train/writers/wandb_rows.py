"""The rows of one W&B run over all sessions of a training run: one a logged step, none lost and none twice.

Each session (a start of the program) writes offline to a folder of its own, and what it hands to W&B's process reaches
the disk, or the server, some seconds later: a kill loses it. So a session keeps its rows in `save_dir/wandb_rows.jsonl`
as well, and the next one asks the folders which rows they hold. Of those up to the checkpoint it hands over again what
was lost; those after the checkpoint that are there already it leaves out, as they come out the same.
"""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.store.files import whole_file

FILE_NAME = "wandb_rows.jsonl"
ID_FILE_NAME = "wandb_run_id.txt"
VERSION = 1


class Rows:
    """The rows that a run has handed to W&B so far, in all its sessions.

    A run that begins anew under another configuration, before it has a checkpoint, is another W&B run.

    Args:
      save_dir: of the training run.
      start_step: step of the checkpoint that is resumed; 0 for none.
      config_text: the configuration.

    Attributes:
      run_id: of the W&B run.
      kept: values by step, those of `wandb_rows.jsonl`.
    """

    def __init__(self, save_dir: str | os.PathLike, *, start_step: int = 0, config_text: str = ""):
        self._save_dir = Path(save_dir)
        self._path = self._save_dir / FILE_NAME
        self.kept: dict[int, dict[str, Any]] = {}
        self._sessions: list[_Session] = []
        config_digest = hashlib.blake2b(config_text.encode(), digest_size=16).hexdigest()
        header = self._load()
        is_other_run = not start_step and header is not None and header.get("config") != config_digest
        if is_other_run:
            self.kept, self._sessions = {}, []
        self.run_id = _run_id(self._save_dir / ID_FILE_NAME, anew=is_other_run)
        mode = "w" if header is None or is_other_run else "a"
        self._file = open(self._path, mode, encoding="utf-8")  # noqa: SIM115 - until `close`
        self._file.write("\n")  # ends a line that a kill cut short
        if header is None or is_other_run:
            self._write({"version": VERSION, "run_id": self.run_id, "config": config_digest})

    def begin_session(self, folder: str | os.PathLike, *, is_online: bool) -> None:
        """The rows from here on go to that folder."""
        self._write({"session": Path(folder).name, "is_online": is_online})

    def last_step(self, *, of_server: int | None) -> int:
        """Up to which step W&B has the rows.

        Args:
          of_server: the last step that W&B's server has, if it was asked.
        """
        handed_over = {session.folder: session for session in self._sessions}
        steps = [0]
        for session in handed_over.values():
            if session.is_online:
                steps.append(session.last_step if of_server is None else of_server)
            elif not (self._save_dir / "wandb" / session.folder).exists():  # uploaded and removed
                steps.append(session.last_step)
        for file in self._save_dir.glob(f"wandb/offline-run-*-{self.run_id}/run-{self.run_id}.wandb"):
            steps += steps_in(file)
        return max(steps)

    def keep(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a row down. A row that is kept twice is the last one."""
        self._write({"step": step, "values": dict(values)})

    def sync(self) -> None:
        """Blocks until all rows are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _load(self) -> dict[str, Any] | None:
        """Reads what earlier sessions wrote; returns its header, None where there is none of this version."""
        if not self._path.exists():
            return None
        header = None
        for text in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # empty, or cut short by a kill
                continue
            if "version" in line:
                header = line
            elif "session" in line:
                self._sessions.append(_Session(line["session"], line["is_online"]))
            else:
                self.kept[line["step"]] = line["values"]
                if self._sessions:
                    self._sessions[-1].last_step = max(self._sessions[-1].last_step, line["step"])
        return header if header and header["version"] == VERSION else None


class _Session:
    def __init__(self, folder: str, is_online: bool):
        self.folder, self.is_online, self.last_step = folder, is_online, 0


def steps_in(path: str | os.PathLike) -> list[int]:
    """Steps of the rows in a .wandb file, in their order."""
    steps = []
    for record in records_in(path):
        if record.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(values["_step"]))
    return steps


def records_in(path: str | os.PathLike) -> Iterator[Any]:
    """The whole records of a .wandb file, as messages of `wandb_internal.proto`; a torn end is left out.

    The format is LevelDB's log: blocks of 32 KiB with chunks (CRC, length, kind, bytes); a record that does not fit
    its block is several chunks: first (2), middle (3), last (4); a whole one is kind 1. W&B puts 7 bytes in front.
    """
    from wandb.proto import wandb_internal_pb2

    block_bytes, header = 1 << 15, struct.Struct("<IHB")
    data, at, parts = Path(path).read_bytes(), 7, []
    while at + header.size <= len(data):
        left = block_bytes - at % block_bytes
        if left < header.size:
            at += left
            continue
        _, length, kind = header.unpack_from(data, at)
        at += header.size
        if kind not in (1, 2, 3, 4) or at + length > len(data):
            return
        parts = [*(parts if kind in (3, 4) else ()), data[at : at + length]]
        at += length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            try:
                record.ParseFromString(b"".join(parts))
            except Exception:  # protobuf's DecodeError has several homes
                return
            yield record


def _run_id(path: Path, *, anew: bool) -> str:
    """The id kept in `path`; the first time, or where it is wanted `anew`, that of WANDB_RUN_ID, or a new one."""
    if anew or not path.exists():
        with whole_file(path) as partial:
            partial.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def check_trial(save_dir: str | os.PathLike, called: str | os.PathLike) -> None:
    """ValueError where a W&B sweep starts a trial in the directory of another one, which would be resumed."""
    wanted, path = os.environ.get("WANDB_RUN_ID"), Path(save_dir, ID_FILE_NAME)
    if not os.environ.get("WANDB_SWEEP_ID") or not wanted or not path.exists():
        return
    if (found := path.read_text(encoding="utf-8").strip()) != wanted:
        raise ValueError(
            f"train.save_dir={os.fspath(called)}: has W&B run {found}, expected {wanted} of this sweep. Each trial "
            'needs a directory of its own: --save_dir="runs/$WANDB_RUN_ID", see docs/training.md'
        )

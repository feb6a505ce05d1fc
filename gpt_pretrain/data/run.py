"""The data of a run, without its model: what `replay` and `inspect` open.

save_dir/data.json     the run's id, the plan, where the datasets lie, how many steps the run has; with a digest
save_dir/ledger.bin    see ledger.py
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from blake3 import blake3

from data_prep.store.files import digest_json, read_json, write_note
from data_prep.store.typed import Count, typed
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan

FILE_NAME = "data.json"
VERSION = 1
MAX_EPOCHS = 100_000  # of a run that is read: where a document was seen is listed epoch by epoch


@dataclasses.dataclass(frozen=True)
class LedgerMark:
    """How far a ledger had come, and the digest of its content up to there: a ledger that goes on keeps it.

    Attributes:
      digest: BLAKE3 of the digests of the first `num_steps` steps, as `ledger.bin` has them.
    """

    num_steps: Count
    digest: str

    @classmethod
    def of(cls, ledger: Ledger, num_steps: int | None = None) -> "LedgerMark":
        """Of all that is recorded, or of its beginning."""
        count = len(ledger.digests) if num_steps is None else num_steps
        return cls(count, blake3(ledger.digests[:count].tobytes()).hexdigest())


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run's data.

    Attributes:
      directories: of each stream's dataset, by the stream's name in the plan ("" for one alone) and by the dataset's
        fingerprint; also of streams that the run had once.
      num_steps: of the whole run, as it is planned now.
      run_id: what this run's checkpoints say, too; "" where nobody recorded it.
      mark: of the ledger when this was written; None where nobody recorded it.
    """

    save_dir: str
    plan: Plan
    directories: dict[str, str]
    num_steps: int
    run_id: str = ""
    mark: LedgerMark | None = None

    def write(self) -> None:
        """Replaces the run's file."""
        fields = {
            "version": VERSION,
            "run_id": self.run_id,
            "plan": self.plan.to_json(),
            "directories": self.directories,
            "num_steps": self.num_steps,
            "ledger": None if self.mark is None else dataclasses.asdict(self.mark),
        }
        write_note(Path(self.save_dir, FILE_NAME), fields)

    def check_ledger(self, ledger: Ledger) -> None:
        """ValueError unless the ledger is this run's, as far as this file knows it."""
        if self.mark is None or LedgerMark.of(ledger, self.mark.num_steps) == self.mark:
            return
        raise ValueError(
            f"{self.save_dir}: its ledger is not the one of {FILE_NAME}, which knows {self.mark.num_steps} steps with "
            f"the digest {self.mark.digest[:16]}; found {len(ledger)} steps. One of the two is damaged, or of another "
            "run. Every checkpoint holds a copy: start the run again, and both are written anew."
        )


def open_run(save_dir: str | os.PathLike) -> RunData:
    """The data of the run in `save_dir`. ValueError where there is none, or it is not what was written."""
    path = Path(save_dir, FILE_NAME)
    fields = read_json(path)
    if fields is None:
        raise ValueError(f"{path}: no such file; expected the save_dir of a run of gpt_pretrain.main")
    advice = "Start the run again, and it is written anew."
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{path}: version {version!r}, expected {VERSION}: written by another version of gpt_pretrain, or damaged. "
            + advice
        )
    expected = fields.pop("digest", None)
    if (found := digest_json(fields)) != expected:
        raise ValueError(
            f"{path}: was altered: its content has the digest {found}, but it says {expected!r:.80}. Restore it from a "
            "copy, or start the run again, and it is written anew."
        )
    try:
        return _typed(os.fspath(save_dir), fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {advice}") from None


def _typed(save_dir: str, fields: dict[str, Any]) -> RunData:
    plan, num_steps = Plan.from_json(fields.get("plan")), typed(Count, fields.get("num_steps"), "num_steps")
    plan.check_epochs(num_steps, MAX_EPOCHS)
    return RunData(
        save_dir,
        plan,
        typed(dict[str, str], fields.get("directories"), "directories"),
        num_steps,
        typed(str, fields.get("run_id"), "run_id"),
        typed(LedgerMark | None, fields.get("ledger"), "ledger"),
    )

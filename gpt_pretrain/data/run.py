"""The data of a run, without its model: what `replay` and `inspect` open.

save_dir/data.json     the plan, where the datasets lie, how many steps the run has; with a digest of itself
save_dir/ledger.bin    see ledger.py
"""

import dataclasses
import os
from pathlib import Path

from data_prep.store.files import digest_json, read_json, write_note
from data_prep.store.typed import Count, typed
from gpt_pretrain.data.plan import Plan

FILE_NAME = "data.json"
VERSION = 2
MAX_EPOCHS = 100_000  # of a run that is read: where a document was seen is listed epoch by epoch


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run's data.

    Attributes:
      directories: of each stream's dataset, by the stream's name in the plan ("" for one alone) and by the dataset's
        fingerprint; also of streams that the run had once.
      num_steps: of the whole run, as it is planned now.
    """

    save_dir: str
    plan: Plan
    directories: dict[str, str]
    num_steps: int

    def write(self) -> None:
        """Replaces the run's file."""
        fields = {
            "version": VERSION,
            "plan": self.plan.to_json(),
            "directories": self.directories,
            "num_steps": self.num_steps,
        }
        write_note(Path(self.save_dir, FILE_NAME), fields)


def open_run(save_dir: str | os.PathLike) -> RunData:
    """The data of the run in `save_dir`. ValueError where there is none, or it cannot be read."""
    path = Path(save_dir, FILE_NAME)
    fields = read_json(path)
    if fields is None:
        raise ValueError(f"{path}: no such file; expected the save_dir of a run of gpt_pretrain.main")
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{path}: version {version!r}, expected {VERSION}: written by another version of gpt_pretrain, or damaged. "
            "Start the run again, and it is written anew."
        )
    digest = fields.pop("digest", None)
    if (found := digest_json(fields)) != digest:
        raise ValueError(
            f"{path}: was altered: its content has the digest {found}, but it says {digest!r:.80}. Restore it from a "
            "copy, or start the run again, and it is written anew."
        )
    try:
        plan = Plan.from_json(fields.get("plan"))
        directories = typed(dict[str, str], fields.get("directories"), "directories")
        num_steps = typed(Count, fields.get("num_steps"), "num_steps")
        plan.check_epochs(num_steps, MAX_EPOCHS)
        return RunData(os.fspath(save_dir), plan, directories, num_steps)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Start the run again, and it is written anew.") from None

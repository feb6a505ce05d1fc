"""The data of a run, without its model: what `replay` and `inspect` open.

save_dir/data.json     the plan, where the datasets lie, how many steps the run has
save_dir/ledger.bin    see ledger.py
"""

import dataclasses
import os
from pathlib import Path

from data_prep.store.files import read_json, write_json
from gpt_pretrain.data.plan import Plan

FILE_NAME = "data.json"
VERSION = 1


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
        write_json(Path(self.save_dir, FILE_NAME), fields)


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
    try:
        plan = Plan.from_json(fields["plan"])
        return RunData(os.fspath(save_dir), plan, fields["directories"], fields["num_steps"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({type(error).__name__}: {error}). Start the run again, and it is written anew."
        ) from None

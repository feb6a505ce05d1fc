"""The data of a run, without its model: what `replay` and `inspect` open.

    save_dir/data.json     the plan, where the datasets lie, how many steps the run has
    save_dir/ledger.bin    see ledger.py
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.files import read_json, write_json
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.token_sources import TokenDataset, open_dataset

FILE_NAME = "data.json"


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run's data.

    Attributes:
      directories: of each stream's dataset, by the stream's name in the plan ("" for one alone).
      num_steps: of the whole run, as it is planned now.
    """

    save_dir: str
    plan: Plan
    directories: dict[str, str]
    num_steps: int

    def write(self) -> None:
        """Replaces the run's file."""
        fields = {"plan": self.plan.to_json(), "directories": self.directories, "num_steps": self.num_steps}
        write_json(Path(self.save_dir, FILE_NAME), fields)

    def ledger(self) -> Ledger:
        """What the run has consumed up to its newest save."""
        return Ledger.read(self.save_dir)

    def open_datasets(self, moved: Mapping[str, str] | None = None) -> dict[str, TokenDataset]:
        """The datasets by stream name, which must have the fingerprints of the plan's last segment.

        Args:
          moved: directories by stream name, where they are not where the run had them.

        Raises ValueError: a dataset is not there, or is another one.
        """
        datasets = {}
        for stream in self.plan.segments[-1].streams:
            directory = (moved or {}).get(stream.name, self.directories[stream.name])
            dataset = open_dataset(directory, verify="size")
            if dataset.fingerprint != stream.fingerprint:
                raise ValueError(
                    f"{directory}: has the fingerprint {dataset.fingerprint}, but {self.save_dir} was trained on "
                    f"{stream.fingerprint}. Say where that dataset is now: --data_dir."
                )
            datasets[stream.name] = dataset
        return datasets

    def batches(self, datasets: Mapping[str, TokenDataset], first_step: int, num_steps: int) -> Batches:
        """Whole batches of a range of steps, as the trainer would read them."""
        sources = {name: dataset.splits["train"] for name, dataset in datasets.items()}
        vocab_size = max(dataset.vocab_size for dataset in datasets.values())
        return Batches(sources, self.plan, vocab_size=vocab_size, first_step=first_step, num_steps=num_steps)


def open_run(save_dir: str | os.PathLike) -> RunData:
    """The data of the run in `save_dir`. ValueError where there is none."""
    path = Path(save_dir, FILE_NAME)
    fields: Any = read_json(path)
    if fields is None:
        raise ValueError(f"{path}: no such file; expected the save_dir of a run of gpt_pretrain.main")
    return RunData(os.fspath(save_dir), Plan.from_json(fields["plan"]), fields["directories"], fields["num_steps"])

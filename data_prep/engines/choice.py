"""Which engine was asked for."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.engines.engine import Engine
from data_prep.engines.local import Workers

ENGINES = ("local", "dask", "beam", "slurm")


@dataclass(frozen=True)
class EngineChoice:
    """Where jobs run. It decides no byte.

    Args:
      num_workers: processes of this machine: all of `local` and of a task of `slurm`; of the others
        those for what is done here.

    Raises ValueError where the options contradict each other.
    """

    name: str = "local"
    num_workers: int = 1

    def open(self, lock: Path) -> Engine:
        """The engine, which ends as a context manager.

        Args:
          lock: what `locks.locked` gave for workers; it lies in the work directory.
        """
        return Workers(self.num_workers, lock)

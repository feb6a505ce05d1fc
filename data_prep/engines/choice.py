"""Which engine was asked for."""

import importlib.util
from dataclasses import dataclass

from data_prep.engines.engine import Engine
from data_prep.engines.local import Workers
from data_prep.engines.locks import Hold
from data_prep.store.locations import is_bucket

ENGINES = ("local", "dask", "beam", "slurm")
_PACKAGES = {"dask": "distributed", "beam": "apache_beam"}


@dataclass(frozen=True)
class EngineChoice:
    """Where jobs run. It decides no byte.

    Args:
      num_workers: processes of this machine: all of `local` and of a task of `slurm`; of the others
        those that write the card.
      dask_scheduler: its address, such as tcp://host:8786.
      beam_options: of Beam's own, as one would type them.

    Raises ValueError where the options contradict each other, or a package is missing.
    """

    name: str = "local"
    num_workers: int = 1
    dask_scheduler: str | None = None
    beam_options: str | None = None

    def __post_init__(self):
        for engine, option, value in [
            ("dask", "--dask_scheduler", self.dask_scheduler),
            ("beam", "--beam_options", self.beam_options),
        ]:
            if value is None and engine == self.name:
                example = "tcp://HOST:8786" if engine == "dask" else "'--runner=...'"
                raise ValueError(f"--engine={engine}: say which, by {option}={example}")
            if value is not None and engine != self.name:
                raise ValueError(f"{option}={value}: is of --engine={engine}, found --engine={self.name}")
        package = _PACKAGES.get(self.name)
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--engine={self.name}: the package {package.replace('_', '-')} is not installed: "
                f"pip install 'gpt-pretrain[{self.name}]'"
            )

    def check(self, output: str) -> None:
        """ValueError, before any work, where what was named cannot be reached, or cannot write to `output`."""
        if self.name == "beam" and is_bucket(output):  # its results come over the disk
            raise ValueError(
                f"--engine=beam: works in a directory of a disk that all workers share, not in {output}. Use another "
                "engine, or prepare there and copy what is complete by data_prep.convert."
            )
        if self.dask_scheduler is not None:
            from data_prep.engines.dask import require_scheduler

            require_scheduler(self.dask_scheduler)
        if self.beam_options is not None:
            from data_prep.engines.beam import require_runner

            require_runner(self.beam_options)

    def open(self, hold: Hold) -> Engine:
        """The engine, which ends as a context manager, for jobs in the work directory that `locks.locked` holds."""
        if self.dask_scheduler is not None:
            from data_prep.engines.dask import DaskCluster

            return DaskCluster(self.dask_scheduler, hold)
        if self.beam_options is not None:
            from data_prep.engines.beam import BeamPipelines

            return BeamPipelines(self.beam_options, hold)
        return Workers(self.num_workers, hold.workers)

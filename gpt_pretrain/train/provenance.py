"""What made a run: data, model, devices, versions, code. For trackers, and as `save_dir/provenance.json`."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import gpt_pretrain
from data_prep.store.dataset_files import whereabouts
from data_prep.store.files import write_json
from data_prep.store.typed import typed
from gpt_pretrain.train.build import Built

FILE_NAME = "provenance.json"
VERSION = 1
_PACKAGES = ("gpt-pretrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Commit:
    """Of the checkout that this code runs from.

    Attributes:
      is_dirty: files that git follows were changed since.
    """

    commit: str
    is_dirty: bool


@dataclasses.dataclass(frozen=True)
class DatasetIdentity:
    """One stream of the training data; `fingerprint` depends on its tokens only."""

    directory: str
    fingerprint: str
    num_train_tokens: int
    tokenizer: str | None


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What made a run.

    Attributes:
      datasets: by stream; one alone is called "data" here.
      num_params: of the model.
      total_steps: that the run will have.
      device_kind, num_devices, num_processes: what computes.
      mesh: devices by axis.
      python: its version.
      versions: of the packages that matter; those that are not installed as such are left out.
      code: None where the code runs from no checkout (an installed package).
      interventions: at the model's hook sites, each in words; checkpoints hold them as data.
    """

    datasets: dict[str, DatasetIdentity]
    num_params: int
    total_steps: int
    device_kind: str
    num_devices: int
    num_processes: int
    mesh: dict[str, int]
    python: str
    versions: dict[str, str]
    code: Commit | None
    interventions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {"version": VERSION, **dataclasses.asdict(self), "interventions": list(self.interventions)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Provenance":
        """The inverse of `to_json`. ValueError for another version, or fields that are missing or not known."""
        version = fields.get("version") if isinstance(fields, Mapping) else None
        if version != VERSION:
            raise ValueError(f"provenance of version {version!r}, expected {VERSION}")
        try:
            values = {name: value for name, value in fields.items() if name != "version"}
            values["datasets"] = {name: DatasetIdentity(**each) for name, each in values["datasets"].items()}
            values["code"] = values["code"] and Commit(**values["code"])
            values["interventions"] = typed(tuple[str, ...], values.get("interventions", []), "interventions")
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"provenance: {type(error).__name__} {error}") from None

    def write(self, save_dir: str | os.PathLike) -> None:
        write_json(Path(save_dir, FILE_NAME), self.to_json())

    @classmethod
    def read(cls, save_dir: str | os.PathLike) -> "Provenance":
        """ValueError where there is none that can be read."""
        path = Path(save_dir, FILE_NAME)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def provenance_of(built: Built) -> Provenance:
    """Of the run on the devices that are here."""
    datasets = {
        name or "data": DatasetIdentity(
            directory=whereabouts(dataset.directory),
            fingerprint=dataset.fingerprint,
            num_train_tokens=dataset.splits["train"].num_tokens,
            tokenizer=dataset.tokenizer,
        )
        for name, dataset in built.data.datasets.items()
    }
    return Provenance(
        datasets=datasets,
        num_params=built.num_params,
        total_steps=built.total_steps,
        device_kind=built.mesh.devices.flat[0].device_kind,
        num_devices=built.mesh.size,
        num_processes=jax.process_count(),
        mesh={axis: int(size) for axis, size in built.mesh.shape.items()},
        python=platform.python_version(),
        versions=_versions(),
        code=commit_of(Path(gpt_pretrain.__file__).parent),
        interventions=tuple(each.described() for each in built.spec.interventions),
    )


def commit_of(package: Path) -> Commit | None:
    """The commit of the checkout whose part a package is, wherever the process runs.

    None where it is none: another project's checkout that merely has the package installed in a folder below it (its
    `.venv`) does not follow the package's files. None as well where git is missing or refuses.
    """

    def git(*arguments: str) -> str | None:
        # Variables such as GIT_DIR, set in git's hooks, would name another checkout.
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env["GIT_OPTIONAL_LOCKS"] = "0"  # only looks
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=20,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return None if done.returncode else done.stdout.strip()

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changed is None else Commit(commit, is_dirty=bool(changed))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

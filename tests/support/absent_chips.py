"""What preflight says of devices that are not here, by a compiler for them in an environment of its own."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_pretrain.forecast.hlo import Computation, Program
from support.training_runs import REPO

ENVIRONMENT = REPO / ".venv-aot"


def python_with_compiler() -> str:
    """Of GPT_PRETRAIN_AOT_PYTHON, or of `.venv-aot` in the checkout, which is made where it is not there.

    Skips the test where libtpu cannot be had: no network, or no wheel for this machine.
    """
    if given := os.environ.get("GPT_PRETRAIN_AOT_PYTHON"):
        return given
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    ENVIRONMENT.mkdir(exist_ok=True)
    with open(ENVIRONMENT / "lock", "w") as lock:  # workers of one session, or of several
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (REPO / "constraints.txt").read_text() + (REPO / "pyproject.toml").read_text()
        if not done.exists() or done.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
            installed = subprocess.run([*pip, "-e", ".[aot-tpu]"], cwd=REPO, capture_output=True, text=True)
            if "No matching distribution found for libtpu" in installed.stderr or "HTTPSConnection" in installed.stderr:
                pytest.skip(f"libtpu cannot be had: {installed.stderr.strip().splitlines()[-1]}")
            assert installed.returncode == 0, installed.stderr
            done.write_text(wanted)
    return str(python)


@dataclasses.dataclass(frozen=True)
class Foretold:
    """What `gpt_pretrain.preflight` said.

    Attributes:
      output: what it printed.
      hlo: the compiled program's text; empty where there is none.
    """

    status: int
    output: str
    hlo: str

    @property
    def json(self) -> dict:
        return json.loads(self.output.splitlines()[-1])

    def traffic(self, op: str) -> list[dict]:
        """The collectives of one kind, each with "bytes" and "times_a_step"."""
        return [each for each in self.json["collectives"] if each["op"] == op]


def foretell(directory: Path, *arguments: str) -> None:
    """Writes what preflight says into an empty directory; `foretold_in` reads it."""
    python = python_with_compiler()
    command = ["-m", "gpt_pretrain.preflight", "--json", "--no_search", f"--save_hlo={directory / 'hlo'}", *arguments]
    inherited = ("JAX_", "XLA_", "PYTHON", "PYTEST_")  # the session's own settings are for CPUs
    environment = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    environment |= {"PYTHONPATH": str(REPO)}
    done = subprocess.run([python, *command], cwd=REPO, env=environment, capture_output=True, text=True)
    (directory / "status").write_text(str(done.returncode))
    (directory / "output").write_text(done.stderr + done.stdout)


def foretold_in(directory: Path) -> Foretold:
    hlo = directory / "hlo"
    return Foretold(
        int((directory / "status").read_text()),
        (directory / "output").read_text(),
        hlo.read_text() if hlo.exists() else "",
    )


def inside_loops(program: Program) -> Iterator[Computation]:
    """All that a loop's body holds, whatever the program's text says of how often it runs."""
    seen: set[str] = set()

    def below(computation: Computation) -> Iterator[Computation]:
        if computation.name in seen:
            return
        seen.add(computation.name)
        yield computation
        for instruction in computation.instructions:
            for called in program.called(instruction):
                yield from below(called)

    for computation in program.computations.values():
        for instruction in computation.instructions:
            if instruction.op == "while":
                for body in program.called(instruction):
                    yield from below(body)

"""Things that happen to a run while it trains."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt_pretrain.train import loop


def after_steps(monkeypatch, events: dict[int, Callable[[], object]]) -> None:
    """Calls something as soon as a step's metrics were read."""
    finished = loop.Loop._finished

    def and_then(self, result):
        finished(self, result)
        if result and result.step in events:
            events[result.step]()

    monkeypatch.setattr(loop.Loop, "_finished", and_then)


def wait_for_checkpoint(save_dir: Path, step: int) -> None:
    """Until it is finished: tiny steps are made faster than they are saved."""
    deadline = time.monotonic() + 20
    while not (save_dir / "checkpoints" / str(step) / "digests.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def small_disk(directory: Path, *, megabytes: int = 8, inodes: int = 1000) -> Iterator[Path]:
    """A file system of that size at `directory`. The test is skipped where we may not make one."""
    directory.mkdir()
    options = f"size={megabytes}m,nr_inodes={inodes}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(path: Path) -> None:
    """Writes zeros until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", 0) as file:
        while file.write(bytes(4096)):
            pass


def fill_with_files(directory: Path) -> None:
    """Makes empty files until there may be no more."""
    directory.mkdir()
    with contextlib.suppress(OSError):
        for number in range(100_000):
            (directory / str(number)).touch()

"""A Dask scheduler and its workers, as processes of this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parent.parent.parent


class DaskProcesses:
    """Of a cluster on loopback; they end with the block. Each worker has a TMPDIR of its own.

    Args:
      folder: where they may write.
      worker_path: PYTHONPATH of the workers, where that is another one.
    """

    def __init__(self, folder: Path, num_workers: int = 2, *, worker_path: str | None = None, num_threads: int = 1):
        self._folder, self._num_workers, self._num_threads = folder, num_workers, num_threads
        self._worker_environment = os.environ | {"PYTHONPATH": worker_path or str(REPO)}
        self.address = ""
        self.workers: list[subprocess.Popen] = []

    def __enter__(self) -> "DaskProcesses":
        self._folder.mkdir(exist_ok=True)
        found = self._folder / "scheduler.json"
        arguments = ["--host=127.0.0.1", "--port=0", "--no-dashboard", f"--scheduler-file={found}"]
        self.scheduler = self._start("dask_scheduler", arguments, dict(os.environ))
        deadline = time.monotonic() + 30
        while not self.address:
            assert time.monotonic() < deadline and self.scheduler.poll() is None
            time.sleep(0.05)
            if found.exists() and (text := found.read_text()):
                self.address = json.loads(text)["address"]
        for _ in range(self._num_workers):
            self.start_worker()
        return self

    def start_worker(self) -> None:
        arguments = [self.address, f"--nthreads={self._num_threads}", "--no-nanny", "--no-dashboard"]
        arguments.append(f"--local-directory={self._folder}")
        temporary = self._folder / f"tmp-{len(self.workers)}"
        temporary.mkdir()
        environment = self._worker_environment | {"TMPDIR": str(temporary)}
        self.workers.append(self._start("dask_worker", arguments, environment))

    def _start(self, module: str, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
        with open(self._folder / f"{module}-{len(self.workers)}.log", "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self._folder)

    def __exit__(self, *_) -> None:
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()

"""Apache Beam with several worker processes gives the bytes of this machine, whatever dies.

Beam's pins differ from ours, so it has an environment of its own: the one whose Python BEAM_PYTHON names, or
one made here.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.dask_cluster import REPO
from support.prepared import byte_options, tree, words, write_parquet
from test_data_prep_kills import HEARS_CTRL_C

pytestmark = pytest.mark.slow

RUNNER = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"
# What data_prep needs of the project's dependencies.
PACKAGES = (
    "apache-beam aiohttp array_record awkward blake3 fsspec gigatoken huggingface_hub numpy pyarrow "
    "tensorflow-datasets tiktoken tqdm xxhash zstandard"
).split()
SIZES = {"shard_tokens": 400_000, "num_workers": 1}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """A Python that has Apache Beam."""
    if named := os.environ.get("BEAM_PYTHON"):
        return named
    folder = tmp_path_factory.mktemp("beam") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    found = str(folder / "bin" / "python")
    installed = subprocess.run(
        [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        pytest.skip(f"Apache Beam cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Eight units."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(8):
        write_parquet(folder / f"{index}.parquet", words(1000, length=300))
    return folder


@pytest.fixture(scope="module")
def local(python, corpus, tmp_path_factory) -> dict[str, bytes]:
    """The tree that the local engine gives in the same environment."""
    output = tmp_path_factory.mktemp("local") / "out"
    process = start(python, byte_options(corpus, output, **SIZES))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return tree(output)


def beam_options(corpus: Path, output: Path, **changes) -> list[str]:
    return byte_options(corpus, output, **(SIZES | {"engine": "beam", "beam_options": RUNNER} | changes))


def start(python: str, options: list[str], *, path: str = str(REPO), code: str = "") -> subprocess.Popen:
    """The command, as a process whose temporary working directory has no modules."""
    command = [python, "-c", code, *options] if code else [python, "-m", "data_prep.fineweb", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
        start_new_session=True,
    )


def workers_of(ancestor: int) -> list[int]:
    """Beam's worker processes below a process."""
    parents, beams = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (
                b"sdk_worker_main" in (folder / "cmdline").read_bytes()
                and b"/sh\0" not in (folder / "cmdline").read_bytes()
            ):
                beams.append(int(folder.name))
        except (OSError, ValueError):
            continue

    def is_below(pid: int) -> bool:
        return pid == ancestor or (pid in parents and is_below(parents[pid]))

    return [pid for pid in beams if is_below(pid)]


def wait_for(found, process: subprocess.Popen):
    """What `found()` gives, once it is something."""
    deadline = time.monotonic() + 90
    while not (value := found()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return value


def test_several_processes_give_the_bytes_of_the_local_engine(python, corpus, local, tmp_path):
    process = start(python, beam_options(corpus, tmp_path / "out"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert tree(tmp_path / "out") == local


def test_a_killed_worker_costs_its_jobs_only(python, corpus, local, tmp_path):
    process = start(python, beam_options(corpus, tmp_path / "out"))
    wait_for(lambda: list(tmp_path.glob("out/.work/parts/*.json")), process)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "of its jobs did" in errors and "they are done again" in errors
    assert tree(tmp_path / "out") == local


def test_interrupted_it_ends_its_workers_and_another_engine_continues(python, corpus, local, tmp_path):
    options = beam_options(corpus, tmp_path / "out")
    process = start(python, options, code=HEARS_CTRL_C)
    wait_for(lambda: list(tmp_path.glob("out/.work/parts/*.json")), process)
    workers = workers_of(process.pid)
    assert workers
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    deadline = time.monotonic() + 10  # orphans, which the system removes in a moment
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process = start(python, byte_options(corpus, tmp_path / "out", **SIZES))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert tree(tmp_path / "out") == local


def test_a_runner_that_there_is_not_is_refused_in_one_line(python, corpus, tmp_path):
    process = start(python, beam_options(corpus, tmp_path / "out", beam_options="--runner=NoSuchRunner"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.partition("error: ")[2].startswith("--beam_options=--runner=NoSuchRunner: ")
    assert not (tmp_path / "out").exists()


def test_workers_of_another_version_are_refused_in_one_line(python, corpus, tmp_path):
    """The command has one data_prep; what its workers import was changed meanwhile."""
    shutil.copytree(REPO / "data_prep", tmp_path / "code" / "data_prep")
    code = (
        "import pathlib, sys\n"
        "from data_prep import fineweb\n"
        "from data_prep.engines.remote import versions\n"
        "versions()\n"
        f"with open({str(tmp_path / 'code' / 'data_prep' / 'parts.py')!r}, 'a') as file: file.write('# changed')\n"
        "if __name__ == '__main__': sys.exit(fineweb.main(sys.argv[1:]))\n"
    )
    process = start(python, beam_options(corpus, tmp_path / "out"), path=str(tmp_path / "code"), code=code)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    error = errors.partition("error: ")[2]
    assert error.startswith("worker ") and ": has data_prep " in error and error.count("\n") == 1, errors
    assert not list(tmp_path.glob("out/.work/parts/*"))

"""Kills cost nothing: real processes, SIGKILL, at moments counted in finished files.

So they fall into every part of the work on a machine of any speed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.prepared import byte_options, run, tree, words, write_parquet

from data_prep.store import manifest
from data_prep.store.locations import ASSETS
from data_prep.store.tokenizers import ByteTokenizer

KILL_SEED = 11
NUM_KILLS = 6


@pytest.fixture(scope="module")
def sliced_sample(tmp_path_factory) -> Path:
    """The sample as ten files, so that there are ten units."""
    folder = tmp_path_factory.mktemp("sliced")
    table = pq.read_table(ASSETS / "sample.parquet").slice(0, 1000)
    for index in range(10):
        pq.write_table(table.slice(100 * index, 100), folder / f"{index}.parquet")
    return folder


def sample_options(folder: Path, output: Path, num_workers: int) -> list[str]:
    """About 30 output files."""
    return [
        f"--input={folder}/*.parquet",
        f"--output_dir={output}",
        "--val_tokens=50000",
        "--shard_tokens=100000",
        f"--num_workers={num_workers}",
    ]


@pytest.fixture(scope="module")
def uninterrupted(sliced_sample, tmp_path_factory) -> dict[str, bytes]:
    """The tree that one quiet run with one worker gives."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert run(*sample_options(sliced_sample, output, 1)) == 0
    return tree(output)


def num_files(directory: Path) -> int:
    """Files there at the moment, of any kind."""
    return sum(len(names) for _, _, names in os.walk(directory))


def living_members(group: int) -> list[int]:
    """Processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_at_random_and_resumed_gives_the_bytes_of_an_uninterrupted_run(
    sliced_sample, uninterrupted, tmp_path, num_workers
):
    rng = np.random.default_rng(KILL_SEED + num_workers)
    output = tmp_path / "out"
    options = sample_options(sliced_sample, output, num_workers)
    command = [sys.executable, "-m", "data_prep.fineweb", *options]
    total = len(uninterrupted) + 3 * 10  # and the parts' files
    kills = []
    for _ in range(NUM_KILLS):
        goal = num_files(output) + int(rng.integers(1, total // NUM_KILLS))
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and num_files(output) < goal:
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.02)))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills.append(num_files(output))
        deadline = time.monotonic() + 10
        while living_members(process.pid):
            assert time.monotonic() < deadline, "workers outlived their killed parent"
            time.sleep(0.01)
    assert len(kills) >= 4, f"the runs ended before they could be killed: {kills}"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert tree(output) == uninterrupted
    print(f"\n{num_workers} workers: killed with {kills} files there, then finished; same bytes")


def test_a_killed_worker_costs_its_unit_only(sliced_sample, uninterrupted, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep.fineweb"]
    options = sample_options(sliced_sample, output, 2)
    process = subprocess.Popen(command + options, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(output.glob(".work/parts/*.partial")):
        assert process.poll() is None
        time.sleep(0.001)
    workers = []
    for pid in living_members(process.pid):
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"spawn_main" in command_line:
            workers.append(pid)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "a worker process was ended by signal 9 (out of memory?); its piece" in errors
    assert tree(output) == uninterrupted


class Deadly(ByteTokenizer):
    """A tokenizer that kills its process at one text, as a native library can."""

    def encode(self, text):
        if text == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


def test_a_unit_that_kills_every_worker_is_named_and_the_rest_is_kept(tmp_path, capsys):
    for name, text in [("a", "good"), ("b", "deadly"), ("c", "good")]:
        (tmp_path / f"{name}.txt").write_text(text)
    options = [f"--input={tmp_path}/*.txt", f"--output_dir={tmp_path}/out", "--val_tokens=0"]
    assert run(*options, f"--tokenizer={__name__}:Deadly", "--num_workers=2") == 1
    message = capsys.readouterr().err
    assert "3 times at the same piece of work" in message and f"{tmp_path}/b.txt" in message
    assert message.count("its piece of work is done again") == 2
    kept = (tmp_path / "out" / ".work" / "parts").glob("*.json")
    assert {path.name for path in kept} >= {"00000-000000.json"}


# What runs in the background of a shell script, as the tests may, has SIGINT ignored, and so would its children.
HEARS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from data_prep import fineweb
sys.exit(fineweb.main(sys.argv[1:]))
"""


def test_interrupted_by_the_user_it_ends_in_words_and_resumes(sliced_sample, uninterrupted, tmp_path):
    output = tmp_path / "out"
    options = sample_options(sliced_sample, output, 2)
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(output.glob(".work/parts/*.partial")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command continues" in errors and "Traceback" not in errors
    assert run(*options) == 0
    assert tree(output) == uninterrupted


def test_killed_between_manifest_and_card_it_makes_the_card_alone(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "a.parquet", words(200))
    reference, output = tmp_path / "reference", tmp_path / "out"
    assert run(*byte_options(tmp_path, reference)) == 0

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.finishing.write_card", killed)
        assert run(*byte_options(tmp_path, output)) == 130
    assert manifest.load(output) == manifest.load(reference) and not (output / "card.html").exists()
    assert run(*byte_options(tmp_path, output)) == 0
    assert "already complete" in capsys.readouterr().out
    assert tree(output) == tree(reference)


def test_a_card_that_cannot_be_written_is_only_logged(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "a.parquet", words(200))

    def failing(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr("data_prep.finishing.write_card", failing)
    assert run(*byte_options(tmp_path, tmp_path / "out")) == 0
    assert "no dataset card: no ink" in capsys.readouterr().err
    assert not (tmp_path / "out" / ".work").exists()

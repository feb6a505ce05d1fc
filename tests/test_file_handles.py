"""Datasets of more shards than a process may open; files that change while they are read."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from support.shards import make_shards, num_open_files, open_source
from support.training_runs import REPO, environment, flags

from data_prep import fineweb
from data_prep.store import token_bin, token_sources
from data_prep.store.token_sources import BinSource

IN_A_PROCESS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from data_prep.store.open_files import OPEN_FILES
from support.shards import NUM_SHARDS, SHARD_TOKENS, num_open_files, open_source
format, paths = sys.argv[1], sys.argv[2:]
first, second = open_source(paths, format), open_source(paths, format)
starts = np.random.default_rng(0).permutation(NUM_SHARDS * SHARD_TOKENS - 40)
for source in (first, second, first):
    for some in np.split(starts, 20):
        assert (source.read(some, 33) == some[:, None] + np.arange(33)).all()
        assert num_open_files() < 50, num_open_files()
kept = []

def fill():
    try:
        while True:
            kept.append(open("/dev/null"))
    except OSError:
        return

fill()
assert (first.read(np.array([0, 4000]), 3)[1] == [4000, 4001, 4002]).all()  # closes others of its own
OPEN_FILES._keep(0)
fill()
try:
    second.read(np.array([2000]), 3)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["bin", "array_record"])
def test_any_number_of_shards_is_read_with_few_open_files_and_running_out_is_one_line(tmp_path, format):
    paths = make_shards(tmp_path, format)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, format, *paths],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert not done.returncode, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(paths[125]) and "at most 64, `ulimit -n`" in line and line.endswith("start again."), line


@pytest.mark.parametrize("format", ["bin", "array_record"])
def test_what_is_let_go_is_closed_also_when_a_source_is_no_longer_used(tmp_path, format, monkeypatch):
    monkeypatch.setattr("data_prep.store.open_files.max_open_files", lambda: 40)
    paths = make_shards(tmp_path, format)
    gc.collect()  # what earlier tests left
    before = num_open_files()
    source = open_source(paths, format)
    assert num_open_files() == before
    source.read(np.arange(0, 4000, 16), 16)
    assert 0 < num_open_files() - before <= 20
    del source
    gc.collect()
    assert num_open_files() <= before


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_shard_that_shrinks_or_changes_while_it_is_read_is_named(tmp_path, monkeypatch, num_shards):
    monkeypatch.setattr(token_sources, "_LOOK_AGAIN_SECS", 0.0)
    paths = [tmp_path / f"{number}.bin" for number in range(num_shards)]
    for path in paths:
        token_bin.write_tokens(path, [np.arange(10_000, dtype=np.uint16)], 10_000)
    source = BinSource(paths)
    starts = np.arange(0, num_shards * 10_000 - 100, 100)
    source.read(starts, 100)
    os.truncate(paths[-1], 4096)
    with pytest.raises(ValueError, match=f"{paths[-1]}: holds 4096 bytes, expected 20012.* while it was being read"):
        source.read(starts, 100)  # without the look: SIGBUS


def test_a_shard_that_was_replaced_by_one_of_another_length_is_named_when_it_is_opened_again(tmp_path):
    path = tmp_path / "a.bin"
    token_bin.write_tokens(path, [np.arange(100, dtype=np.uint16)], 100)
    source = BinSource([path])
    token_bin.write_tokens(path, [np.arange(90, dtype=np.uint16)], 90)
    with pytest.raises(ValueError, match=f"{path}: holds 90 tokens \\(uint16\\), and held 100 \\(uint16\\) when"):
        source.read(np.array([0]), 10)


TRAIN = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit))
from gpt_pretrain import main
sys.exit(main.main(sys.argv[2:]))
"""


def train(limit, arguments) -> subprocess.CompletedProcess:
    """A run that may raise its limit on open files from 64 to `limit`."""
    command = [sys.executable, "-c", TRAIN, str(limit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPO, timeout=120)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A prepared dataset of 280 shards of 64 tokens in each format."""
    directory = tmp_path_factory.mktemp("many")
    lines = "".join(
        f'{{"text": "{number:05} of a hundred documents, each of which has some letters in it"}}\n'
        for number in range(280)
    )
    (directory / "a.jsonl").write_text(lines)
    arguments = ["--tokenizer=byte", "--shard_tokens=64", "--val_tokens=200", "--record_tokens=64", "--num_workers=1"]
    assert not fineweb.main([f"--input={directory}/a.jsonl", f"--output_dir={directory}/prepared", *arguments])
    assert len(list((directory / "prepared").glob("*train*.bin"))) > 250
    return directory / "prepared"


@pytest.mark.slow
@pytest.mark.parametrize("format", [pytest.param("bin", marks=pytest.mark.slow), "array_record"])
def test_a_run_trains_on_more_shards_than_it_may_open_files_and_raises_its_limit(many_shards, tmp_path, format):
    changes = {"data.format": repr(format), "train.eval_tokens": 64}
    done = train(100, flags(many_shards, tmp_path / "run", num_steps=30, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done at step 30 of 30" in done.stdout

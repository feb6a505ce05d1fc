"""Four CPU devices for every test, and a tiny prepared dataset."""

from support import environment

environment.set_up()

# Before the model is imported: in tests, its functions check the axes that their annotations name.
from support import annotations

annotations.check_those_of("gpt_pretrain.model")

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.buckets import bucket, bucket_server, bucket_servers, impatient  # noqa: F401  # fixtures
from support.models import make_spec
from support.prepared import byte_options, run, words, write_parquet
from support.shared import made_once
from support.training_runs import flags, train_here

from gpt_pretrain.model.spec import ModelSpec


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> str:
    """About 36,000 byte-tokens in several shards of both formats, made by the command that users run."""
    return str(made_once(tmp_path_factory, "tiny", prepare_tiny_dataset) / "prepared")


def prepare_tiny_dataset(directory):
    from data_prep import fineweb

    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "purred"], 9000)
    lines = [" ".join(words[i : i + 30]) for i in range(0, len(words), 30)]
    text = directory / "text.jsonl"
    text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    status = fineweb.main(
        [
            f"--input={text}",
            f"--output_dir={directory / 'prepared'}",
            "--tokenizer=byte",
            "--shard_tokens=10000",
            "--val_tokens=3000",
            "--record_tokens=64",
            "--num_workers=1",
        ]
    )
    assert not status


@pytest.fixture(scope="session")
def five_steps(tiny_dataset, tmp_path_factory) -> Path:
    """The save_dir of a run of five steps, to be copied."""

    def make(directory):
        train_here(flags(tiny_dataset, directory / "run", num_steps=5))

    return made_once(tmp_path_factory, "five_steps", make) / "run"


@pytest.fixture
def tiny_spec() -> ModelSpec:
    """A tiny model with 24 positions."""
    return make_spec(24)


@pytest.fixture(scope="session")
def words_dataset(tmp_path_factory) -> Path:
    """400 documents of words in both formats, with several shards; nobody changes it."""

    def make(directory):
        write_parquet(directory / "a.parquet", words(400))
        assert run(*byte_options(directory, directory / "out")) == 0

    return made_once(tmp_path_factory, "words", make) / "out"


@pytest.fixture
def words_copy(words_dataset, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(words_dataset, tmp_path / "out")

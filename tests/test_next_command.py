"""What data_prep tells its user to type next works as printed, whatever the dataset; and its warnings fit."""

import dataclasses
import os
import shlex
import subprocess
import sys

import pytest
from support.printed_commands import REPO, commands_in, problem_with

from data_prep import fineweb
from data_prep.outcome import training_command
from data_prep.pages.terminal import python_as_typed
from data_prep.store.manifest import load


def prepare(folder, texts, *options, tokenizer="byte", val_tokens=0) -> int:
    """A dataset in `folder` of these texts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    flags = [f"--input={folder}/in.jsonl", f"--output_dir={folder}/out", f"--tokenizer={tokenizer}", "--num_workers=1"]
    return fineweb.main([*flags, f"--val_tokens={val_tokens}", *options])


def trained(command: str, folder) -> subprocess.CompletedProcess:
    """Types the command in a directory that has our configs, and stops it soon by fewer tokens."""
    words = shlex.split(command)
    assert words[:3] == [python_as_typed(), "-m", "gpt_pretrain.main"]
    (folder / "configs").symlink_to(REPO / "configs")
    short = [
        "--num_tokens=2048",
        "--optimizer.warmup_steps=1",
        "--gin_param=train.writers=('console',)",
        "--model.n_layer=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words[1:], *short], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_documents, val_tokens",
    [(6, 20), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, 0), (100, 300)])],
)
def test_the_next_command_trains_on_a_small_dataset_of_bytes(tmp_path, capsys, num_documents, val_tokens):
    folder = tmp_path / "it's a dir"
    assert prepare(folder, ["a text of bytes"] * num_documents, val_tokens=val_tokens) == 0
    command = capsys.readouterr().out.rpartition("Next: ")[2].strip()
    assert "quickstart" in command and "--model.vocab_size=320" in command
    done = trained(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "out").is_dir()


@pytest.mark.parametrize("tokenizer, num_tokens", [("gpt2", 10**4), ("gpt2", 10**10), ("byte", 10**10)])
def test_the_configuration_fits_the_size_and_the_tokenizer(tmp_path, tokenizer, num_tokens):
    assert prepare(tmp_path, ["some text"] * 9, tokenizer=tokenizer) == 0
    manifest = load(tmp_path / "out")
    split = dataclasses.replace(manifest.splits["train"], num_tokens=num_tokens)
    command = training_command(dataclasses.replace(manifest, splits={"train": split}), "a b/$c")
    assert ("gpt2_124m" in command) == (num_tokens > 10**9)
    assert ("--model.vocab_size" in command) == (tokenizer != "gpt2")
    assert not problem_with(command)
    assert "--data_dir='a b/$c'" in command and "--save_dir='runs/$c'" in command


def test_the_missing_dataset_is_made_of_the_embedded_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load("data/sample")
    (command,) = commands_in(str(error.value))
    assert command == "python -m data_prep.fineweb --input=sample --output_dir=data/sample"
    with pytest.raises(ValueError, match=r"--output_dir='a b'`"):
        load("a b")


def test_a_validation_split_larger_than_the_training_split_is_warned_of(tmp_path, capsys):
    long = "x" * 5000
    assert prepare(tmp_path / "a", [long, "short", "short"], val_tokens=10) == 0
    warning, *others = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert not others and "the first document alone is that long" in warning and "--val_tokens=0" in warning
    assert prepare(tmp_path / "b", ["short"] * 100, val_tokens=400) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    smaller = int(warning.rpartition(" ")[2])
    assert prepare(tmp_path / "c", ["short"] * 100, val_tokens=smaller) == 0
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    "texts, val_tokens, options",
    [(["short"] * 50, 10**6, []), (["x" * 999], 5, []), (["x" * 99, "y" * 9999], 200, []), (["ab", "cd"], 5, [])],
)
def test_the_val_tokens_that_are_advised_help(tmp_path, capsys, texts, val_tokens, options):
    assert prepare(tmp_path, texts, *options, val_tokens=val_tokens) == 1
    message = capsys.readouterr().err
    if len(texts) == 1:
        assert "It is a single document: use --val_tokens=0" in message
        advised = 0
    else:
        advised = int(message.partition("such as ")[2].partition(";")[0])
    assert prepare(tmp_path, texts, *options, val_tokens=advised) == 0


def test_max_tokens_below_the_first_document(tmp_path, capsys):
    assert prepare(tmp_path, ["x" * 99, "y"], "--max_tokens=50") == 1
    assert "The first document alone has 100 tokens: use a larger --max_tokens" in capsys.readouterr().err
    assert prepare(tmp_path, ["x" * 99, "y"], "--max_tokens=100") == 0

"""The command line of data_prep: every error a user can cause, in words and without a traceback."""

import re
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import write_parquet

from data_prep import fineweb


@pytest.fixture
def failing(tmp_path, capsys, monkeypatch):
    """Runs the command line in tmp_path, expects exit status 1, gives the message."""
    monkeypatch.chdir(tmp_path)

    def fail(*options: str) -> str:
        assert fineweb.main(list(options)) == 1
        captured = capsys.readouterr()
        lines = captured.err.splitlines(keepends=True)
        if lines[0].startswith("tokenizer "):  # the engine that was chosen
            del lines[0]
        assert lines[0].startswith("error: ") and "Traceback" not in captured.err
        assert not captured.out
        return "".join(lines).removeprefix("error: ")

    return fail


def test_no_such_file(failing):
    assert failing("--input=nothing.parquet", "--output_dir=o").startswith("nothing.parquet: no such file")
    assert "*.parquet: no file matches" in failing("--input=*.parquet", "--output_dir=o")


def test_no_network_for_the_hub_is_said_within_seconds(failing, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    message = failing()  # no flags at all: sample-10BT
    assert "no network" in message and "hf download HuggingFaceFW/fineweb" in message
    assert "sample/10BT" in message
    assert time.monotonic() - start < 5


def test_not_parquet_and_truncated_parquet(failing, tmp_path):
    (tmp_path / "a.parquet").write_text("hello")
    assert failing("--input=a.parquet", "--output_dir=o").startswith("a.parquet: not parquet")
    write_parquet(tmp_path / "b.parquet", ["x"] * 100)
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-100])
    message = failing("--input=b.parquet", "--output_dir=p")
    assert message.startswith("b.parquet: not parquet, or cut short")


def test_no_text_column_lists_the_columns(failing, tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": ["1"]}), tmp_path / "a.parquet")
    message = failing("--input=a.parquet", "--output_dir=o")
    assert "a.parquet: no column 'text'; the columns are body, id" in message
    assert "--text_column" in message
    assert not (tmp_path / "o").exists()


def test_token_ids_that_do_not_fit(failing, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    message = failing("--input=a.txt", "--output_dir=o", f"--tokenizer={__name__}:Lying")
    assert "gave the id 70000, but has vocab_size 10" in message


class Lying:
    """A tokenizer whose ids are not what it says."""

    name, vocab_size, end_of_text, digest = "lying", 10, 9, "0"

    def encode(self, text):
        """One id for each character, much too large."""
        import numpy as np

        return np.full(len(text), 70_000)


@pytest.mark.parametrize(
    "option, message",
    [
        ("--formats=parquet", "--formats=parquet: expected one or more of bin, array_record"),
        ("--tokenizer=gtp2", "unknown tokenizer 'gtp2': expected one of gpt2, byte"),
        ("--shard_tokens=0", "--shard_tokens=0: expected at least 1"),
        ("--shard_tokens=5e9", "--shard_tokens=5000000000: the .bin header counts to 4294967295"),
        ("--max_tokens=0", "--max_tokens=0: expected at least 1"),
        ("--max_tokens=5", "nothing is left to train on"),
        ("--val_tokens=-1", "--val_tokens=-1: expected at least 0"),
        ("--num_workers=0", "--num_workers=0: expected at least 1"),
        ("--input=sample-20BT", "sample-20BT: no such preset"),
        ("--input=gpt", "gpt: no such file. The presets are sample,"),
    ],
)
def test_values_that_cannot_be(failing, option, message):
    assert message in failing("--input=sample", "--output_dir=o", option)


def test_input_that_is_no_preset_needs_an_output_dir(failing):
    assert "so say where to: --output_dir=..." in failing("--input=a.txt")


@pytest.mark.parametrize("option", ["--bin_header=long", "--val=5", "--shard_tokens=many"])
def test_misspelt_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as exit:
        fineweb.main([option])
    assert exit.value.code == 2 and option[2:5] in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['x', '--help']; from data_prep import fineweb\n"
        "try: fineweb.main()\nexcept SystemExit: pass\n"
        "print('IMPORTED', *sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - start
    text, _, modules = done.stdout.partition("IMPORTED ")
    for option in ("input", "output_dir", "formats", "bin_header", "tokenizer", "shard_tokens"):
        assert f"--{option}" in text
    heavy = {"numpy", "pyarrow", "tiktoken", "fsspec", "array_record", "tensorflow_datasets"}
    assert not heavy & set(modules.split())
    assert seconds < 1, f"--help took {seconds:.1f} s"


def test_preparing_imports_neither_jax_nor_tensorflow(tmp_path):
    code = (
        "import sys; from data_prep import fineweb, check\n"
        f"assert fineweb.main(['--input=sample', '--output_dir={tmp_path}/o', "
        "'--num_workers=1']) == 0\n"
        f"assert check.main(['{tmp_path}/o']) == 0\n"
        "print('IMPORTED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.partition("IMPORTED ")[2].split()
    unwanted = {"jax", "flax", "gin", "gpt_pretrain", "tensorflow", "tensorflow_datasets"}
    assert not unwanted & set(modules)
    assert "huggingface_hub" not in modules


def test_progress_lines_have_documents_tokens_speed_and_time_left(capsys, monkeypatch):
    from data_prep.pages import progress

    monkeypatch.setattr(progress, "LINE_SECS", 0)
    shown = progress.Progress("tokenize", 1000)
    shown.add(progress.Done(documents=12_345, tokens=9_900_000, text_bytes=8_100_000, work=250))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"tokenize: 25%, 12,345 documents, 9\.9 M tokens, [\d.]+ MB/s, [\d:]+ left", line)

"""Options of data_prep's command lines: numbers, paths, empty ones; each refused in one line before any work."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
from support.printed_commands import command_lines

from data_prep import check, convert, documents, fineweb
from data_prep.card import __main__ as card
from data_prep.store.manifest import load

COUNTS = {
    "fineweb": ["shard_tokens", "val_tokens", "max_tokens", "record_tokens", "num_workers"],
    "convert": ["num_shards", "shard_tokens", "record_tokens", "num_workers"],
    "check": ["num_workers"],
    "card.__main__": ["num_workers"],
    "documents": ["token"],
}
ARGUMENTS = {"fineweb": ["--input=sample", "--output_dir=o"], "convert": ["in", "out"]}


def message(capsys, module: str, *arguments: str) -> str:
    """What a command line that refuses says: one line."""
    main = importlib.import_module(f"data_prep.{module}").main
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status in (1, 2) and not captured.out
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("value", ["inf", "nan", "1e22", "", "many", "1.5", "-", "1e999999999", "0x10", "١e99"])
@pytest.mark.parametrize("module, option", [(m, option) for m, options in COUNTS.items() for option in options])
def test_counts_that_cannot_be(tmp_path, monkeypatch, capsys, module, option, value):
    monkeypatch.chdir(tmp_path)
    found = message(capsys, module, *ARGUMENTS.get(module, ["d"]), f"--{option}={value}")
    assert f"--{option}" in found and value in found and "expected" in found
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", ["-1", "-1e9"])
@pytest.mark.parametrize("option", ["shard_tokens", "val_tokens", "max_tokens", "record_tokens", "num_workers"])
def test_negative_counts(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    found = message(capsys, "fineweb", *ARGUMENTS["fineweb"], f"--{option}={value}")
    assert f"--{option}={int(float(value))}: expected at least" in found


def test_counts_as_people_write_them():
    args = fineweb.make_parser().parse_args(["--max_tokens=1e9", "--val_tokens=100_000", "--shard_tokens=1.5e6"])
    assert (args.max_tokens, args.val_tokens, args.shard_tokens) == (10**9, 100_000, 1_500_000)


@pytest.mark.parametrize("option", ["input", "output_dir", "tokenizer", "text_column", "formats"])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_options(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    assert f"--{option}" in message(capsys, "fineweb", *ARGUMENTS["fineweb"], f"--{option}={value}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("url", ["hf://datasets/a/b", "https://h/x", "s3:/bucket/x", "S3://b"])
@pytest.mark.parametrize(
    "module, arguments",
    [
        ("fineweb", ["--input=sample", "--output_dir=URL"]),
        ("convert", ["IN", "URL"]),
        ("check", ["URL"]),
        ("check", ["URL", "--repair"]),
        ("documents", ["URL", "--token=1"]),
        ("card.__main__", ["URL"]),
    ],
)
def test_urls_are_refused_where_a_directory_is_worked_in(tmp_path, monkeypatch, capsys, module, arguments, url):
    monkeypatch.chdir(tmp_path)
    found = message(capsys, module, *(each.replace("URL", url) for each in arguments))
    assert f"={url}: expected a directory of this machine" in found and "not a URL of another kind" in found
    assert not os.listdir(tmp_path)


def test_a_file_in_the_place_of_a_directory(tmp_path, capsys):
    (tmp_path / "a").write_text("x")
    assert "is no directory" in message(capsys, "fineweb", "--input=sample", f"--output_dir={tmp_path}/a")


def test_home_is_expanded_in_every_option_that_takes_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n' * 9)
    (tmp_path / "ranks.tiktoken").write_bytes(
        b"".join(b"%s %d\n" % (__import__("base64").b64encode(bytes([i])), i) for i in range(256))
    )
    options = ["--tokenizer=~/ranks.tiktoken@gpt2", "--val_tokens=10", "--num_workers=1"]
    assert fineweb.main(["--input=~/a.jsonl", "--output_dir=~/out", *options]) == 0
    assert convert.main(["~/out", "~/again", "--formats=bin", "--num_workers=1"]) == 0
    assert convert.main(["~/out/*.bin", "~/bare", "--tokenizer=~/ranks.tiktoken@gpt2", "--num_workers=1"]) == 0
    assert convert.main(["--input=~/out", "~/third", "--num_workers=1"]) == 0
    assert load(tmp_path / "bare").fingerprint == load(tmp_path / "out").fingerprint
    assert check.main(["~/again"]) == 0
    assert card.main(["~/again", "--tokenizer=~/ranks.tiktoken@gpt2"]) == 0
    assert documents.main(["~/again", "--token=0"]) == 0
    capsys.readouterr()
    assert "such user" in message(capsys, "fineweb", "--input=sample", "--output_dir=~nobody-at-all/x")


def test_a_print_never_fails_a_command(tmp_path):
    folder = tmp_path / "漢字 é"
    folder.mkdir()
    (folder / "文.jsonl").write_text('{"text": "漢字 😀", "id": "文"}\n' * 40, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, env=environment, cwd=os.getcwd())

    options = ["--tokenizer=byte", "--val_tokens=50", "--num_workers=1"]
    for command in [
        ["data_prep.fineweb", f"--input={folder}", f"--output_dir={folder}/out", *options],
        ["data_prep.documents", f"{folder}/out", "--token=3", "--text"],
        ["data_prep.convert", f"{folder}/out", f"{folder}/again"],
    ]:
        done = run(*command)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    done = run("data_prep.check", f"{folder}/無")
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and b"\\u7121" in done.stderr


def test_every_command_line_prints_anything(capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "")  # preflight sets it
    modules = [
        module for module in command_lines() if "def main" in importlib.util.find_spec(module).loader.get_source(module)
    ]
    assert len(modules) >= 9
    for module in modules:
        called = []
        source = importlib.import_module(module)
        target = source if hasattr(source, "print_anything") else importlib.import_module("gpt_pretrain.runtime")
        monkeypatch.setattr(target, "print_anything", lambda called=called: called.append(1) or sys.exit(7))
        with pytest.raises(SystemExit) as stop:
            takes_gin = module in ("gpt_pretrain.main", "gpt_pretrain.preflight")
            source.main(["--gin_file=x"] if takes_gin else ["x"])
        assert stop.value.code == 7 and called, module


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/xyz\xe9.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a text"}\n' * 9)
    options = ["--tokenizer=byte", "--val_tokens=10", "--num_workers=1", f"--output_dir={tmp_path}/out"]
    command = [sys.executable, "-m", "data_prep.fineweb", os.fsencode("--input=") + path, *options]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert subprocess.run(command, capture_output=True).returncode == 0  # complete
    assert check.main([f"{tmp_path}/out"]) == 0


@pytest.mark.parametrize("module", [each for each in command_lines() if each.startswith("gpt_pretrain")])
def test_numbers_of_the_trainers_flags_are_numbers(module, capsys):
    parser = importlib.import_module(module).make_parser()
    flags = [each.option_strings[0] for each in parser._actions if each.option_strings and each.type not in (None, str)]
    for flag in flags:
        for value in ("inf", "nan", "", "many"):
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([f"{flag}={value}"])
            said = capsys.readouterr().err
            assert stop.value.code == 2 and said.startswith(f"error: argument {flag}: ") and said.count("\n") == 1, said

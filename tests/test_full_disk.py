"""A full disk is said with numbers, and the same command goes on when there is room."""

import errno
import os
import subprocess
import sys

import pytest
from support.prepared import byte_options, run, tree, words, write_parquet


@pytest.fixture
def corpus(tmp_path):
    """Four small files; documents of 31 byte-tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(4):
        write_parquet(folder / f"{index}.parquet", words(200))
    return folder


@pytest.mark.parametrize("where", ["parts.whole_file", "shards.write_tokens"])
def test_a_full_disk_is_said_with_numbers_and_mended_by_the_same_command(corpus, tmp_path, capsys, monkeypatch, where):
    reference = tmp_path / "reference"
    assert run(*byte_options(corpus, reference)) == 0
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(*args, **options):
        raise error

    monkeypatch.setattr(f"data_prep.{where}", failing)
    options = byte_options(corpus, tmp_path / "out")
    assert run(*options) == 1
    message = capsys.readouterr().err
    assert f"error: {tmp_path}/out: no space left" in message
    assert "Free: " in message and "still needed: about" in message
    monkeypatch.undo()
    assert run(*options) == 0
    assert tree(tmp_path / "out") == tree(reference)


@pytest.mark.parametrize("format", ["bin", "array_record"])
def test_the_writers_report_a_full_disk_themselves(corpus, tmp_path, format):
    """A limit on file size: the same failing write() as on a full disk, without a full disk."""
    limit = {"bin": 60_000, "array_record": 30_000}[format]
    code = (
        "import resource, sys; from data_prep import fineweb;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "sys.exit(fineweb.main(sys.argv[1:]))"
    )
    write_parquet(corpus / "9.parquet", words(200) * 6)
    options = byte_options(corpus, tmp_path / "out", formats=format, shard_tokens=10**6)
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert done.returncode == 1, done
    assert "no space left" in done.stderr and "Traceback" not in done.stderr
    assert run(*options) == 0

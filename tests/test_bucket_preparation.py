"""Datasets are prepared into buckets, and read there, by the code and with the bytes of local ones.

Against emulators of both stores. Kills are real: of processes that wait for an answer which does not come.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.bucket_datasets import fresh_scratch, objects, put_objects  # noqa: F401
from support.fault_proxy import ALWAYS, Fault
from support.prepared import byte_options, run, tree, words, write_parquet
from support.shared import made_once
from test_data_prep_kills import living_members

from data_prep import check, convert, documents
from data_prep.card.__main__ import main as card
from data_prep.engines.choice import EngineChoice
from data_prep.store import buckets, leases, scratch

pytestmark = pytest.mark.usefixtures("fresh_scratch", "patient")
NO_SPACE = "0.000000001"  # gigabytes: every copy is removed as soon as nobody uses it


@pytest.fixture
def patient(bucket_server, monkeypatch):
    """Two busy cores and a server in Python may be slow."""
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "10")
    monkeypatch.setenv("GPT_PRETRAIN_LEASE_SECS", "1.2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files, so that there are three units."""

    def make(directory: Path) -> None:
        for index in range(3):
            write_parquet(directory / f"{index}.parquet", words(150, 30 + index))
        assert run(*byte_options(directory, directory / "out")) == 0

    return made_once(tmp_path_factory, "bucket-corpus", make)


@pytest.fixture(scope="module")
def expected(corpus) -> dict[str, bytes]:
    """What a quiet run makes in a local directory."""
    return tree(corpus / "out")


@pytest.fixture
def dataset(bucket, expected) -> str:
    """The URL of a copy of it."""
    put_objects(f"{bucket}/data/set", expected)
    return f"{bucket}/data/set"


def failing(capsys, *options: str) -> str:
    """The one line that a preparation fails with."""
    capsys.readouterr()
    assert run(*options) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_dataset_in_a_bucket_has_the_names_and_bytes_of_a_local_one(bucket, corpus, expected, capsys):
    output = f"{bucket}/data/set"
    assert run(*byte_options(corpus, f"{output}/")) == 0
    assert f"--data_dir={output} --save_dir=runs/set" in capsys.readouterr().out
    assert objects(output) == expected
    assert run(*byte_options(corpus, output)) == 0
    assert "already complete" in capsys.readouterr().out
    assert objects(output) == expected
    assert "holds a dataset of another spec" in _error(capsys, corpus, output, shard_tokens=6000)
    assert objects(bucket) == {f"data/set/{name}": content for name, content in expected.items()}


def _error(capsys, corpus, output, **changes) -> str:
    capsys.readouterr()
    assert run(*byte_options(corpus, output, **changes)) == 1
    return capsys.readouterr().err


def test_without_room_for_copies_the_bytes_are_the_same(bucket, corpus, expected, monkeypatch):
    monkeypatch.setenv(scratch.SIZE, NO_SPACE)
    assert run(*byte_options(corpus, f"{bucket}/a")) == 0
    assert objects(f"{bucket}/a") == expected
    assert [path for path in scratch.folder().iterdir() if path.stat().st_size] == []


# What a killed process waits for: part of the name of an object, and how it is asked for.
STAGES = {
    "first part": ("00000-000000.arrow", "put"),
    "last note": ("00002-000000.json", "put"),
    "a table": ("documents_train_000000.parquet", "put"),
    "a shard": ("fineweb_val_000000.bin", "put"),
    "manifest": ("manifest.json", "put"),
    "card": ("card.html", "put"),
    "removing": ("00001-000000.tokens", "DELETE"),
}


def kill_at(stage: str, server, command: list[str], scratch_folder: Path) -> bool:
    """Starts a preparation, and kills it while it waits for an answer about an object.

    False: that was there already, as one of several workers was faster than the kill; it ends by itself.
    """
    name, method = STAGES[stage]
    method = method if method != "put" else {"gs": "POST", "s3": "PUT"}[server.scheme]
    server.fail(Fault("silent", secs=60, having=name, method=method))
    process = start(command, scratch_folder)
    deadline = time.monotonic() + 60
    while server.proxy.faults and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    server.proxy.faults.clear()
    process.send_signal(signal.SIGKILL)
    status = process.wait()
    deadline = time.monotonic() + 5  # less than a request is waited for
    while living_members(process.pid):
        assert time.monotonic() < deadline, "workers outlived their killed parent"
        time.sleep(0.01)
    _, errors = process.communicate()
    assert status in (0, -signal.SIGKILL), errors
    return status != 0


def start(command: list[str], scratch_folder: Path) -> subprocess.Popen:
    scratch_folder.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch_folder)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True, env=environment)


def preparation(corpus: Path, output: str, num_workers: int) -> list[str]:
    options = byte_options(corpus, output, num_workers=num_workers)
    return [sys.executable, "-m", "data_prep.fineweb", *options]


@pytest.mark.parametrize(
    "stages, num_workers",
    [
        (["a shard"], 2),
        pytest.param(list(STAGES), 1, marks=pytest.mark.slow),
        # What a second worker cannot have made before the kill.
        pytest.param(["last note", "a shard", "manifest", "card", "removing"], 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_from_an_empty_disk_gives_the_bytes_of_a_quiet_run(
    bucket_server, bucket, corpus, expected, tmp_path, stages, num_workers
):
    output = f"{bucket}/a"
    command = preparation(corpus, output, num_workers)
    there = []
    for number, stage in enumerate(stages):
        if kill_at(stage, bucket_server, command, tmp_path / f"killed-{number}"):
            there.append(len(list(buckets.list_objects(output))))
    assert len(there) >= min(4, len(stages))
    assert run(*byte_options(corpus, output)) == 0
    assert objects(output) == expected
    print(f"\n{bucket_server.scheme}, {num_workers} workers: killed with {there} objects there; then the same bytes")


def test_what_is_complete_in_the_bucket_is_not_made_again(bucket_server, bucket, corpus, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline._write", killed)
        assert run(*byte_options(corpus, f"{bucket}/a")) == 130
    parts = {name: each for name, each in objects(f"{bucket}/a").items() if "/parts/" in name}
    assert len(parts) == 9
    buckets.write(f"{bucket}/a/.work/parts/00001-000000.tokens", b"others")
    bucket_server.proxy.seen.clear()
    assert run(*byte_options(corpus, f"{bucket}/a")) == 0
    puts = [each.path for each in bucket_server.proxy.seen if each.method in ("PUT", "POST")]
    assert {name for name in ("00000", "00001", "00002") for path in puts if f"{name}-000000.tokens" in path} == {
        "00001"
    }


def test_another_spec_strays_and_another_preparation_are_refused(bucket, corpus, expected, monkeypatch, capsys):
    output = f"{bucket}/a"
    with leases.hold(f"{output}/.work", what="preparation"):
        found = failing(capsys, *byte_options(corpus, output))
        assert f"{output}/.work: another preparation is using it (process {os.getpid()} of" in found
    assert objects(output) == {}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline._write", killed)
        assert run(*byte_options(corpus, output)) == 130
    assert "holds an unfinished preparation of another spec" in _error(capsys, corpus, output, val_tokens=2000)
    with pytest.raises(ValueError, match="preparation is not finished"):
        check.load(output)
    put_objects(f"{bucket}/strays", {"fineweb_train_000007.bin": b"x"})
    assert "holds fineweb_train_000007.bin, but neither" in failing(capsys, *byte_options(corpus, f"{bucket}/strays"))


def test_a_preparation_that_lost_its_lock_commits_nothing(bucket, corpus, monkeypatch, capsys):
    from data_prep import pipeline

    written = pipeline.write_dataset

    def slowly(*args, **options):
        manifest = written(*args, **options)
        buckets.write(f"{bucket}/a/.work/.lease", b"somebody else's")
        time.sleep(0.8)
        return manifest

    monkeypatch.setattr(pipeline, "write_dataset", slowly)
    assert "did not renew its hold in time" in failing(capsys, *byte_options(corpus, f"{bucket}/a"))
    assert "manifest.json" not in objects(f"{bucket}/a")


def test_a_manifest_that_somebody_else_wrote_meanwhile_stays(bucket, corpus, monkeypatch, capsys):
    from data_prep import pipeline

    written = pipeline.write_dataset

    def meanwhile(*args, **options):
        manifest = written(*args, **options)
        buckets.write(f"{bucket}/a/manifest.json", b"{}")
        return manifest

    monkeypatch.setattr(pipeline, "write_dataset", meanwhile)
    assert "somebody else completed a dataset there" in failing(capsys, *byte_options(corpus, f"{bucket}/a"))
    assert objects(f"{bucket}/a")["manifest.json"] == b"{}"


@pytest.mark.slow
def test_of_two_preparations_at_once_one_works_and_one_is_told(bucket, corpus, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_PRETRAIN_LEASE_SECS", "2")
    both = [start(preparation(corpus, f"{bucket}/a", 2), tmp_path / str(number)) for number in range(2)]
    ends = [(process.wait(60), process.stderr.read()) for process in both]
    [process.stderr.close() for process in both]
    assert not any(each for number in range(2) for each in (tmp_path / str(number)).iterdir())
    # Who comes when the other is done finds it complete.
    assert 0 in (status for status, _ in ends)
    assert all(status == 0 or "another preparation is using it" in errors for status, errors in ends), ends
    assert objects(f"{bucket}/a") == expected


def changed(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_check_finds_what_is_wrong_and_repair_makes_it_right(dataset, corpus, expected, capsys, monkeypatch):
    monkeypatch.setenv(scratch.SIZE, NO_SPACE)
    assert check.main([dataset, "--num_workers=1"]) == 0
    assert f"{dataset}: OK, " in capsys.readouterr().out
    bin_file, records, table = (
        "fineweb_train_000001.bin",
        "fineweb-val.array_record-00000-of-00001",
        "documents_val_000000.parquet",
    )
    put_objects(dataset, {bin_file: changed(expected[bin_file]), records: expected[records][:-9], ".work/x": b""})
    buckets.remove(f"{dataset}/{table}")
    assert check.main([dataset, "--num_workers=1"]) == 1
    found = capsys.readouterr().out
    assert f"{dataset}/{bin_file}: digest is " in found
    assert f"{dataset}/{records}: holds {len(expected[records]) - 9} bytes, expected {len(expected[records])}" in found
    assert f"{dataset}/{table}: missing, expected {len(expected[table])} bytes" in found
    assert f"{dataset}/.work: not in the manifest" in found
    assert f"{dataset}: 4 problems." in found
    assert check.main([dataset, "--num_workers=1", "--repair"]) == 0
    assert f"{dataset}/{bin_file}: made again from the other format" in capsys.readouterr().out
    assert objects(dataset) == expected


def test_documents_and_cards_of_a_bucket_are_those_of_a_directory(
    dataset, bucket, corpus, expected, tmp_path, monkeypatch, capsys
):
    questions = [["--token=5000", "--text"], ["--id", "<1:7>"], ["--url", "https://example.org/149", "--split=train"]]
    for question in questions:
        answers = []
        for where in (str(corpus / "out"), dataset):
            assert documents.main([where, *question]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] and json.loads(answers[0].splitlines()[0])["split"] == "train"
    for name in ("README.md", "card.html"):
        buckets.remove(f"{dataset}/{name}")
    assert card([dataset]) == 0
    assert objects(dataset) == expected
    table = "documents_train_000000.parquet"
    put_objects(dataset, {table: changed(expected[table])})
    assert documents.main([dataset, "--token=10"]) == 0  # by a copy that has the right digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    assert documents.main([dataset, "--token=10"]) == 1
    assert f"error: {dataset}/{table}: " in capsys.readouterr().err


def test_a_bucket_may_hold_records_only(dataset, bucket, corpus, capsys):
    options = ["--formats=array_record", "--num_workers=1"]
    assert convert.main([dataset, f"{bucket}/records", *options]) == 0
    assert "card.html" in objects(f"{bucket}/records")
    assert capsys.readouterr().err == ""
    assert documents.main([f"{bucket}/records", "--token=5000", "--text"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].strip("x").strip() != ""


def test_conversion_from_and_into_buckets(dataset, bucket, corpus, tmp_path, capsys):
    changes = ["--shard_tokens=7000", "--record_tokens=32", "--bin_header=llmc", "--num_workers=1"]
    assert convert.main([str(corpus / "out"), str(tmp_path / "local"), *changes]) == 0
    expected = tree(tmp_path / "local")
    assert convert.main([dataset, f"{bucket}/converted", *changes]) == 0
    assert objects(f"{bucket}/converted") == expected
    assert convert.main([dataset, str(tmp_path / "back"), *changes]) == 0
    assert tree(tmp_path / "back") == expected
    assert convert.main([dataset, f"{dataset}/"]) == 1
    assert "is both IN and OUT" in capsys.readouterr().err


def test_bare_shards_of_a_bucket_become_a_dataset_in_a_bucket(bucket, corpus, expected, tmp_path, capsys):
    shards = {name: content for name, content in expected.items() if name.endswith(".bin")}
    put_objects(f"{bucket}/bare", shards)
    (tmp_path / "bare").mkdir()
    for name, content in shards.items():
        (tmp_path / "bare" / name).write_bytes(content)
    options = ["--tokenizer=byte", "--shard_tokens=5000", "--record_tokens=64", "--num_workers=1"]
    assert convert.main([f"{bucket}/bare", f"{bucket}/out", *options]) == 0
    assert convert.main([str(tmp_path / "bare"), str(tmp_path / "out"), *options]) == 0
    here, there = tree(tmp_path / "out"), objects(f"{bucket}/out")
    named = {name for name in here if name.endswith(("parquet", "json", "md", "html"))}  # they say where it came from
    assert here.keys() == there.keys() and all(here[name] == there[name] for name in here.keys() - named)
    assert check.main([f"{bucket}/out", "--num_workers=1"]) == 0
    assert convert.main([f"{bucket}/bare", f"{bucket}/bare", *options]) == 1
    assert "is both IN and OUT" in capsys.readouterr().err
    assert convert.main([f"{bucket}/bare/*.bin", f"{bucket}/bare", *options]) == 1
    assert f"{bucket}/bare: holds the input" in capsys.readouterr().err


PASSING = ["503", "429", "reset", "lost", "truncated", "silent", "wrong"]


def faults(kind: str, server, skip: int) -> list[Fault]:
    """Of reading and of writing. Only what is read as a file has a digest that the store does not know."""
    write = {"gs": "POST", "s3": "PUT"}[server.scheme]
    if kind == "wrong":
        return [
            Fault("wrong", method="GET", having="tokens", skip=skip // 2),
            Fault("damaged", method=write, skip=skip),
        ]
    if kind.isdigit():
        return [Fault("status", status=int(kind), method=method, skip=skip, times=2) for method in ("GET", write)]
    return [Fault(kind, secs=0.5, method=method, skip=skip) for method in ("GET", write)]


@pytest.mark.slow
def test_what_passes_costs_no_byte(bucket_server, bucket, corpus, expected, monkeypatch):
    monkeypatch.setenv(scratch.SIZE, NO_SPACE)
    for number, kind in enumerate(PASSING):
        bucket_server.fail(*faults(kind, bucket_server, 3 * number))
    assert run(*byte_options(corpus, f"{bucket}/a")) == 0
    assert objects(f"{bucket}/a") == expected
    assert not bucket_server.proxy.faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_costs_no_byte_wherever_it_is(bucket_server, bucket, corpus, expected, monkeypatch, kind):
    monkeypatch.setenv(scratch.SIZE, NO_SPACE)
    for number in range(12):
        bucket_server.fail(*faults(kind, bucket_server, 2 * number))
    assert run(*byte_options(corpus, f"{bucket}/a")) == 0
    assert objects(f"{bucket}/a") == expected


@pytest.mark.parametrize(
    "kind, having, expected_words",
    [
        ("503", "fineweb_train_000001.bin", "cannot be written, tried again for 1 s"),
        ("wrong", "00001-000000.tokens", "digest is "),
    ],
)
def test_what_stays_ends_in_one_line_and_the_next_run_goes_on(
    bucket_server, bucket, corpus, expected, monkeypatch, capsys, kind, having, expected_words
):
    monkeypatch.setenv(scratch.SIZE, NO_SPACE)
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "1")
    method = "GET" if kind == "wrong" else {"gs": "POST", "s3": "PUT"}[bucket_server.scheme]
    bucket_server.fail(Fault("wrong" if kind == "wrong" else "status", having=having, method=method, times=ALWAYS))
    found = failing(capsys, *byte_options(corpus, f"{bucket}/a"))
    assert expected_words in found and having in found and f"{bucket}/a" in found
    bucket_server.proxy.faults.clear()
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "10")
    assert run(*byte_options(corpus, f"{bucket}/a")) == 0
    assert objects(f"{bucket}/a") == expected


def test_what_cannot_be_is_said_before_any_work(bucket_server, bucket, corpus, monkeypatch, capsys):
    scheme = bucket_server.scheme
    found = failing(capsys, *byte_options(corpus, f"{scheme}://no-such-bucket/a"))
    assert "there is no bucket no-such-bucket" in found
    assert "is no URL of a bucket" in failing(capsys, *byte_options(corpus, f"{scheme}://B_C"))
    assert "not a URL of another kind" in failing(capsys, *byte_options(corpus, f"{scheme}:/{bucket[5:]}/a"))
    share = ["--engine=slurm", "--unit_range=1/2"]
    assert "there is no bucket" in failing(capsys, *byte_options(corpus, f"{scheme}://no-such-bucket/a"), *share)
    with pytest.raises(ValueError, match=f"--engine=beam: works in a directory of a disk .* {bucket}/a"):
        EngineChoice.check(SimpleNamespace(name="beam"), f"{bucket}/a")  # Beam's package is not there
    asks = {"gs": "testPermissions", "s3": "uploads"}[scheme]
    bucket_server.fail(Fault("status", status=403, having=asks, times=ALWAYS))
    assert f"{bucket}/a: cannot be written: " in failing(capsys, *byte_options(corpus, f"{bucket}/a"))
    bucket_server.proxy.faults.clear()
    assert objects(bucket) == {}
    monkeypatch.setitem(sys.modules, {"gs": "gcsfs", "s3": "s3fs"}[scheme], None)
    assert "pip install 'gpt-pretrain[" in failing(capsys, *byte_options(corpus, f"{bucket}/a"))
    monkeypatch.undo()


def test_a_full_scratch_disk_is_said_with_what_helps(bucket, corpus, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_prep.shards.write_tokens", full)
    found = failing(capsys, *byte_options(corpus, f"{bucket}/a"))
    assert f"{scratch.folder()}: no space left" in found and "TMPDIR" in found and scratch.SIZE in found

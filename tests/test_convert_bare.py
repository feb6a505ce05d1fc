"""data_prep.convert of shards made elsewhere: the stream stays the same, documents are found by end-of-text."""

import functools
import shutil
import socket
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.conversion import converted, refused
from support.prepared import byte_options, flip, run, words, write_parquet

from data_prep import bare_shards, conversion, convert, downloads
from data_prep.checking import find_problems
from data_prep.store import locations as inputs
from data_prep.store import manifest
from data_prep.store.datasets import open_dataset
from data_prep.store.documents import DocumentTables
from data_prep.store.token_bin import read_header, write_tokens

END = 50256


@pytest.fixture
def failing(capsys):
    """Converts, expects exit status 1, gives the message."""
    return functools.partial(refused, capsys)


def document(*ids: int) -> list[int]:
    """What a document adds to the stream."""
    return [END, *ids]


VAL = [*document(1, 2, 3), *document(4)]
# The first shard begins and ends inside documents, the second has no document of its own.
TRAIN = [[70, 71, *document(5, 6), *document(7, 8)], [9, 10, 11], [12, *document(), *document(13)]]
EXPECTED = {  # start, length, row, file
    "val": [(0, 4, 0, "x_val_000000.bin"), (4, 2, 1, "x_val_000000.bin")],
    "train": [
        (0, 2, 0, "x_train_000001.bin"),
        (2, 3, 1, "x_train_000001.bin"),
        (5, 7, 2, "x_train_000001.bin"),
        (12, 1, 0, "x_train_000003.bin"),
        (13, 2, 1, "x_train_000003.bin"),
    ],
}


def llmc_file(path: Path, ids: list[int], dtype="<u2") -> None:
    """A shard as llm.c writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(ids)) if dtype == "<u2" else (20240801, 7, len(ids))
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A directory of llm.c's shards, one of them empty."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    llmc_file(folder / "x_val_000000.bin", VAL)
    for index, ids in enumerate([[], *TRAIN]):
        llmc_file(folder / f"x_train_{index:06d}.bin", ids)
    return folder


def documents(directory: Path, split: str) -> list[tuple]:
    """(start, length, row, source_file) of each."""
    loaded = manifest.load(directory)
    names = [shard.name for shard in loaded.shards_of(split, "documents")]
    rows = [row for name in names for row in pq.read_table(directory / name).to_pylist()]
    nothing = {"id", "url", "dump", "language", "text_bytes"}
    assert all(row[name] is None for row in rows for name in nothing)
    return [(row["start"], row["length"], row["row"], row["source_file"]) for row in rows]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_shards_of_llmc_become_a_dataset_with_documents(elsewhere, tmp_path, dtype, capsys):
    for path in elsewhere.iterdir():
        ids = np.fromfile(path, "<u2", offset=1024)
        llmc_file(path, ids.tolist(), dtype)
    out = tmp_path / "out"
    assert converted(elsewhere, out, shard_tokens=4, record_tokens=2, num_workers=2) == 0
    assert f"{out}: 7 documents, train 15, val 6 tokens" in capsys.readouterr().out
    for split, expected in EXPECTED.items():
        found = documents(out, split)
        assert found == [(*rest, str(elsewhere / name)) for *rest, name in expected]
    stream = {"train": [i for ids in TRAIN for i in ids], "val": VAL}
    for format in ("bin", "array_record"):
        opened = open_dataset(str(out), format=format)
        for split, ids in stream.items():
            assert opened.splits[split].read(np.array([0]), len(ids))[0].tolist() == ids
    assert read_header(out / "fineweb_train_000000.bin").dtype == np.uint16
    tables = DocumentTables(out, "train")
    assert [tables.at(i).start for i in (0, 1, 2, 11, 12, 14)] == [0, 0, 2, 5, 12, 13]
    spec = manifest.load(out).spec
    assert [Path(entry["path"]).name for entry in spec.inputs] == [
        "x_val_000000.bin",
        *(f"x_train_{i:06d}.bin" for i in range(4)),
    ]
    sizes = [path.stat().st_size for path in sorted(elsewhere.iterdir())]
    assert sorted(entry["size"] for entry in spec.inputs) == sorted(sizes)
    assert all(len(entry["digest"]) == 64 for entry in spec.inputs if entry["size"] > 1024)
    # And on: what came of them is a prepared dataset like any other.
    assert list(find_problems(out)) == []
    assert " of tokens. This card" in (out / "README.md").read_text()
    assert converted(out, tmp_path / "again", shard_tokens=100, formats="bin") == 0
    assert manifest.load(tmp_path / "again").fingerprint == manifest.load(out).fingerprint
    assert documents(tmp_path / "again", "train") == documents(out, "train")


def test_a_dataset_without_its_manifest_gives_its_stream_and_documents_again(tmp_path):
    write_parquet(tmp_path / "a.parquet", words(300))
    assert run(*byte_options(tmp_path, tmp_path / "prepared")) == 0
    before = manifest.load(tmp_path / "prepared")
    glob = tmp_path / "prepared" / "*.bin"
    assert converted(glob, tmp_path / "out", tokenizer="byte", shard_tokens=9000) == 0
    after = manifest.load(tmp_path / "out")
    assert after.fingerprint == before.fingerprint and after.splits == before.splits


class FineTokenizer:
    """Ids beyond 65,535."""

    name, vocab_size, end_of_text, digest = "fine", 70_000, 69_999, "0"

    def decode(self, ids):
        """Something to show."""
        return str(ids)


def test_large_vocabularies_are_stored_as_uint32(tmp_path):
    ids = np.array([69_999, 1, 68_000, 69_999], np.uint32)
    write_tokens(tmp_path / "a.bin", [ids], 4, dtype=np.uint32)
    llmc_file(tmp_path / "b.bin", [3, 4])
    out = tmp_path / "out"
    tokenizer = f"{__name__}:FineTokenizer"
    assert converted(tmp_path, out, tokenizer=tokenizer, record_tokens=3) == 0
    assert read_header(out / "fineweb_train_000000.bin")[::2] == (6, np.dtype("<u4"))
    assert [row[:2] for row in documents(out, "train")] == [(0, 3), (3, 3)]


@pytest.mark.parametrize("dtype, wrong", [("<u2", 50257), ("<u4", 70_000)])
def test_ids_that_the_tokenizer_does_not_have_are_refused(elsewhere, tmp_path, failing, dtype, wrong):
    llmc_file(elsewhere / "x_train_000002.bin", [5, 6, wrong, 7], dtype)
    message = failing(elsewhere, tmp_path / "out")
    path = elsewhere / "x_train_000002.bin"
    assert f"{path}: token 2 is {wrong}, but tokenizer gpt2 has ids below 50257" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_files_and_bad_choices_of_files_are_refused(elsewhere, tmp_path, failing):
    out = tmp_path / "out"
    assert "holds 4 training shards, --num_shards=5" in failing(elsewhere, out, num_shards=5)
    assert "--num_shards=0: expected at least 1" in failing(elsewhere, out, num_shards=0)
    assert "none is left to train on" in failing(elsewhere / "x_val_000000.bin", out)
    assert "the train files hold no tokens" in failing(elsewhere / "x_train_000000.bin", out)
    assert "holds the input" in failing(elsewhere / "*.bin", elsewhere)
    path = elsewhere / "x_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    shutil.rmtree(out)
    assert f"{path}: header says 8 tokens, so the file should hold" in failing(elsewhere, out)
    assert not out.exists()


def test_files_are_sorted_by_name_wherever_they_are(elsewhere, tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("x_train_000002.bin", "x_val_000000.bin"):
        (elsewhere / name).rename(tmp_path / "b" / name)
    found = bare_shards.find_files(f"{tmp_path}/b,{elsewhere}/*.bin", 3)
    assert [Path(path).name for path in found["train"]] == [f"x_train_00000{i}.bin" for i in (0, 1, 2)]
    assert found["val"] == [f"{tmp_path}/b/x_val_000000.bin"]


def test_a_changed_shard_is_another_spec(elsewhere, tmp_path, failing, capsys):
    out = tmp_path / "out"
    assert converted(elsewhere, out, formats="bin") == 0
    flip(elsewhere / "x_train_000003.bin")
    assert "x_train_000003.bin: tail_sha256 " in failing(elsewhere, out, formats="bin")
    shutil.rmtree(elsewhere)
    elsewhere.mkdir()
    assert converted(elsewhere, out, formats="bin") == 0  # they need not be there any more
    assert "already complete" in capsys.readouterr().out


@pytest.fixture
def server(elsewhere):
    """Address of a loopback server of `elsewhere`, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            """Notes what is asked for."""
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            """Silence."""

    handler = functools.partial(Handler, directory=str(elsewhere))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_remote_shards_by_preset_killed_and_continued(elsewhere, server, tmp_path, monkeypatch, capsys, failing):
    url, asked = server
    monkeypatch.setitem(bare_shards.PRESETS, "mine", f"{url}/*.bin")
    out, options = tmp_path / "out", {"num_shards": 2, "shard_tokens": 3, "formats": "bin"}
    download, num_calls = inputs.download, 0

    def killed(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise KeyboardInterrupt
        return download(*args)

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "download_file", killed)
        assert converted("mine", out, **options) == 130
    assert len(list((out / ".work" / "downloads").glob("*.bin"))) == 1
    other = options | {"num_shards": 3}
    assert "num_shards: 2 there, 3 asked for" in failing("mine", out, **other)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "save", killed)
        num_calls = 1
        assert converted("mine", out, **options) == 130
    with monkeypatch.context() as patch:
        patch.delattr(inputs, "download")  # everything is there already
        assert converted("mine", out, **options) == 0
    assert not (out / ".work").exists()
    local = tmp_path / "local"
    assert converted(elsewhere, local, **options) == 0
    ours, theirs = ({p.name: p.read_bytes() for p in where.glob("*.bin")} for where in (out, local))
    assert ours == theirs
    assert documents(out, "train")[0] == (0, 2, 0, f"{url}/x_train_000001.bin")
    spec = manifest.load(out).spec
    assert spec.source == "mine" and len(spec.inputs) == 3
    asked.clear()
    assert converted("mine", out, **options) == 0 and not asked
    assert "num_shards: 2 there, 3 asked for" in failing("mine", out, **other)


def test_a_remote_directory_is_the_shards_in_it_and_downloads_run_side_by_side(elsewhere, server, tmp_path):
    url, _ = server
    assert convert.main([f"--input={url}", str(tmp_path / "out"), "--num_workers=2"]) == 0
    assert manifest.load(tmp_path / "out").splits["train"].num_tokens == 15


def test_a_download_that_is_not_what_was_listed_is_refused(elsewhere, server, tmp_path, monkeypatch, failing):
    url, _ = server
    (elsewhere / "x_train_000001.bin").write_bytes(b"no such thing" * 100)
    message = failing(f"{url}/*.bin", tmp_path / "out")
    assert f"{url}/x_train_000001.bin: starts with " in message
    assert "run the same command again" in message
    llmc_file(elsewhere / "x_train_000001.bin", TRAIN[0])
    (tmp_path / "out" / ".work" / "spec.json").unlink()
    monkeypatch.setattr(downloads, "download_file", lambda path, target, received: target.write_bytes(b""))
    message = failing(f"{url}/*.bin", tmp_path / "out")
    assert f"{url}/x_train_000001.bin: 0 bytes arrived, expected 1040" in message


def test_a_server_that_falls_silent_is_given_up_and_a_slow_one_is_not(elsewhere, server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setattr(inputs, "SILENCE_SECS", 0.5)
    file_system, _ = inputs.file_system_of(url)
    assert file_system.client_kwargs["timeout"].total is None
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes a connection, and no more
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.bin"
        with pytest.raises(inputs.InputError, match=r"a\.bin: cannot be downloaded: .*[Tt]imeout"):
            start = time.monotonic()
            inputs.download(silent_url, tmp_path / "a.bin", lambda num_bytes: None)
        assert time.monotonic() - start < 5


def test_presets_and_no_network(tmp_path, monkeypatch, failing):
    hub = "hf://datasets/kjj0/fineweb100B-gpt2"
    assert bare_shards.PRESETS["fineweb100B-gpt2"] == f"{hub}/*.bin"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = failing("fineweb100B-gpt2", tmp_path / "out", num_shards=2)
    assert "no network" in message and "hf download kjj0/fineweb100B-gpt2 " in message
    assert "--include='*'" in message and "--input='fineweb/*.bin'" in message

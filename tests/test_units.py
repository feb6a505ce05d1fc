"""Reading documents: each kind of file, each place, each way to be damaged."""

import functools
import gzip
import http.server
import json
import re
import threading
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.inputs import units
from data_prep.inputs.paths import expand, find_preset
from data_prep.inputs.units import inspect, make_batch, read_unit
from data_prep.store import locations as inputs
from data_prep.store.documents import PROVENANCE
from data_prep.store.locations import InputError

TEXTS = ["one", None, "", "two\n<|endoftext|>", "漢字 👩‍👩‍👧"]
ROWS = [
    {"text": text, "id": f"<{i}>", "url": f"https://example.org/{i}", "dump": None, "language": "x"}
    for i, text in enumerate(TEXTS)
]


def read_all(path: str, text_column: str = "text") -> list[tuple]:
    """(text, id, url, dump, language, row) of every document of a file, through its units."""
    found = inspect(path, 0, text_column)
    assert not found.error, found.error
    return [
        row
        for unit in found.units
        for batch in read_unit(unit, text_column)
        for row in zip(
            batch.texts.to_pylist(),
            *(batch.provenance[name].to_pylist() for name in PROVENANCE),
            batch.rows.tolist(),
            strict=True,
        )
    ]


EXPECTED = [(row["text"], row["id"], row["url"], None, "x", i) for i, row in enumerate(ROWS)]


def jsonl(rows=ROWS) -> bytes:
    """JSON, one object a line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path, kind: str, rows=ROWS) -> str:
    """Writes rows in the format that the kind of file has."""
    if kind == "parquet":
        schema = pa.schema([(name, pa.string()) for name in ("text", *PROVENANCE)])
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(rows[:2])) + gzip.compress(jsonl(rows[2:])))
    elif kind == "jsonl.zst":
        squeeze = zstandard.ZstdCompressor().compress
        path.write_bytes(squeeze(jsonl(rows[:2])) + squeeze(jsonl(rows[2:])))
    else:
        path.write_bytes(jsonl(rows))
    return str(path)


KINDS = ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, kind):
    assert read_all(write(tmp_path / f"a.{kind}", kind)) == EXPECTED


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_all(str(tmp_path / "a.txt")) == [("one\n\ntwo\n", None, None, None, None, 0)]


def test_blank_lines_are_no_documents_but_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}')
    assert [(row[0], row[5]) for row in read_all(str(tmp_path / "a.jsonl"))] == [("x", 1), ("y", 3)]


def test_units_cut_a_file_at_row_groups_and_keep_row_numbers(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", "parquet")
    assert len(inspect(path, 0, "text").units) == 1
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    found = inspect(path, 0, "text").units
    assert [(u.first_group, u.num_groups, u.first_row) for u in found] == [
        (0, 1, 0),
        (1, 1, 2),
        (2, 1, 4),
    ]
    assert read_all(path) == EXPECTED


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_bounded_and_account_for_all_the_work(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(units, "BATCH_ROWS", 2)
    path = write(tmp_path / f"a.{kind}", kind)
    (unit,) = inspect(path, 0, "text").units
    batches = list(read_unit(unit, "text"))
    assert max(len(batch.texts) for batch in batches) == 2
    assert sum(batch.num_bytes for batch in batches) == unit.num_bytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_an_error_and_never_fewer_documents(tmp_path, kind):
    rows = [{"text": f"{i} " * 50} for i in range(2000)]
    path = tmp_path / f"a.{kind}"
    write(path, kind, rows)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    found = inspect(str(path), 0, "text")
    if kind == "parquet":
        assert re.match(rf"{path}: not parquet, or cut short", str(found.error)) and not found.units
        return
    with pytest.raises(InputError, match=rf"^{path}: (line \d+: not JSON|cannot be read to the end)"):
        list(read_unit(found.units[0], "text"))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_cut_between_two_lines_is_an_error_too(tmp_path, kind):
    if kind == "jsonl.gz":
        squeeze = zlib.compressobj(wbits=31)
        head = squeeze.compress(jsonl()) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    else:
        squeeze = zstandard.ZstdCompressor().compressobj()
        head = squeeze.compress(jsonl()) + squeeze.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(head)
    with pytest.raises(InputError, match=rf"^{path}: cannot be read to the end"):
        read_all(str(path))
    path.write_bytes(head + squeeze.compress(jsonl()) + squeeze.flush())
    assert [row[0] for row in read_all(str(path))] == TEXTS * 2


def test_damage_inside_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, "parquet", [{"text": "some text " * 99, "id": str(i)} for i in range(500)])
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path}: cannot be read to the end"):
        read_all(str(path))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "x"', "line 2: not JSON"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
        (b'["x"]', "line 2: expected an object, found list"),
        (b'{"text": 5}', "line 2: 'text' holds int, not text"),
        (b'{"body": "x", "id": 1}', "line 2: no column 'text'; the columns are body, id"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"^{path}: {re.escape(message)}"):
        read_all(str(path))


def test_a_text_column_that_is_not_there_or_not_text_lists_the_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(InputError, match=r"no column 'text'; the columns are body, n"):
        inspect(str(path), 0, "text")
    with pytest.raises(InputError, match=r"'n' holds int64, not text; .*body \(string\)"):
        inspect(str(path), 0, "n")
    assert [row[0] for row in read_all(str(path), "body")] == ["x"]


def test_text_in_parquet_that_is_not_utf8_is_an_error_and_never_other_text(tmp_path):
    # Parquet calls it a string and nobody looks.
    text = pa.StringArray.from_buffers(2, *pa.array([b"fine", b"\xff\xfe"]).buffers()[1:])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"^{tmp_path}/a\.parquet: .*[Ii]nvalid UTF-?8"):
        read_all(str(tmp_path / "a.parquet"))


def test_provenance_of_any_type_is_kept_as_text(tmp_path):
    table = pa.table({"text": ["x", "y"], "id": [7, None], "url": [["a"], []], "dump": [b"z", b""]})
    pq.write_table(table, tmp_path / "a.parquet")
    row = {"text": "x", "id": 7, "url": ["a"], "dump": {"k": 1}, "language": "\ud800"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read_all(str(tmp_path / "a.parquet")) == [
        ("x", "7", "['a']", "z", None, 0),
        ("y", None, "[]", "", None, 1),
    ]
    expected = ("x", "7", "['a']", "{'k': 1}", "?", 0)
    assert read_all(str(tmp_path / "a.jsonl")) == [expected]
    # What is the text is not provenance too.
    assert read_all(str(tmp_path / "a.jsonl"), "language") == [("\ufffd", *expected[1:4], None, 0)]


def test_lone_surrogates_become_what_tiktoken_makes_of_them():
    batch = make_batch(["a\ud800b", None, "\ud83d\ude00"], {}, [0, 1, 2], 9)
    assert batch.texts.to_pylist() == ["a\ufffdb", None, "😀"]
    assert batch.provenance.keys() == set(PROVENANCE)
    assert all(column.null_count == 3 for column in batch.provenance.values())


def test_patterns_give_files_in_a_fixed_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c[1].jsonl"):
        (tmp_path / name).write_text("x")
    assert expand("c[1].jsonl,*.txt") == ["c[1].jsonl", "a.txt", "b.txt"]
    for patterns, message in [
        ("a.txt,*.txt", "a.txt: named more than once"),
        ("a.txt,", "empty name"),
        ("nothing.txt", r"nothing\.txt: no such file"),
        ("*.parquet", r"no file matches"),
        ("sample-10bt", "presets are sample, sample-10BT"),
    ]:
        with pytest.raises(InputError, match=message):
            expand(patterns)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"a\.csv: unknown kind of file"):
        expand("a.csv")


def test_presets():
    hub = "hf://datasets/HuggingFaceFW"
    for name, patterns, output_dir in [
        ("sample", "embedded://sample.parquet", "data/sample"),
        ("sample-10BT", f"{hub}/fineweb/sample/10BT/*.parquet", "data/fineweb-10BT"),
        (
            "CC-MAIN-2024-10",
            f"{hub}/fineweb/data/CC-MAIN-2024-10/*.parquet",
            "data/fineweb-CC-MAIN-2024-10",
        ),
        ("edu-sample-350BT", f"{hub}/fineweb-edu/sample/350BT/*.parquet", "data/fineweb-edu-350BT"),
    ]:
        preset = find_preset(name)
        assert preset and (preset.patterns, preset.output_dir) == (patterns, output_dir)
    assert find_preset("texts/*.parquet") is None
    with pytest.raises(InputError, match="sample-10BT, sample-100BT, sample-350BT"):
        find_preset("sample-20BT")


def test_no_network_for_the_hub_is_said_soon_with_the_way_around(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"no network .*hf download HuggingFaceFW/fineweb ") as error:
        expand("hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet")
    assert "--include='sample/10BT/*'" in str(error.value)


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A static server that knows ranges, as real ones do (Python's own does not)."""

    def do_GET(self):
        """Answers one range, or everything."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not match:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        start, stop = int(match[1]), min(int(match[2]) + 1, len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])

    def log_message(self, *args):
        """Silence."""


class WholeFileHandler(http.server.SimpleHTTPRequestHandler):
    """A server that only sends whole files."""

    def log_message(self, *args):
        """Silence."""


@pytest.fixture(params=[RangeHandler, WholeFileHandler], ids=["ranges", "whole files"])
def server(request, tmp_path):
    """Address of a loopback server of tmp_path."""
    handler = functools.partial(request.param, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_files_are_read_over_http(tmp_path, server, kind):
    # Larger than what is asked for at once, so that ranges matter.
    rows = [{**ROWS[0], "text": "x" * 500 + str(i)} for i in range(1000)]
    write(tmp_path / f"a.{kind}", kind, rows)
    url = f"{server}/a.{kind}?download=true"
    assert expand(url) == [url]
    assert [row[0] for row in read_all(url)] == [row["text"] for row in rows]
    assert inspect(url, 0, "text").identity["size"] == (tmp_path / f"a.{kind}").stat().st_size


def test_a_missing_file_is_named_over_http(server):
    with pytest.raises(InputError, match=r"nothing\.parquet: no such file"):
        inspect(f"{server}/nothing.parquet", 0, "text")


def test_identity_changes_with_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl", "jsonl")
    before = inspect(path, 0, "text").identity
    assert before == inspect(path, 0, "text").identity
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(content.replace(b"one", b"eno"))
    assert before != inspect(path, 0, "text").identity


def test_other_file_systems_are_reached_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/folder/b.jsonl", jsonl())
    memory.pipe("/folder/a.jsonl", jsonl())
    paths = expand("memory://folder/*.jsonl")
    assert [path.rpartition("/")[2] for path in paths] == ["a.jsonl", "b.jsonl"]
    assert inputs.is_remote(paths[0])
    assert read_all(paths[0]) == EXPECTED

"""What people's files are like: columns, encodings, compressions, and files that are not what their names say."""

import bz2
import gzip
import json
import lzma
import shlex
import subprocess
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import fineweb
from data_prep.inputs import units
from data_prep.inputs.unpacking import unpacked
from data_prep.store.locations import InputError

TEXTS = ["one", None, "漢字"]
BYTES = [text and text.encode() for text in TEXTS]


def texts_of(path, text_column="text") -> list[str | None]:
    """Every text of a file, through its units."""
    found = units.inspect(str(path), 0, text_column)
    assert not found.error, found.error
    batches = (batch for unit in found.units for batch in units.read_unit(unit, text_column))
    return [text for batch in batches for text in batch.texts.to_pylist()]


def problem_with(path, text_column="text") -> str:
    """Why a file cannot be read; one line that starts with its path."""
    with pytest.raises(InputError) as error:
        found = units.inspect(str(path), 0, text_column)
        if found.error:
            raise found.error
        for unit in found.units:
            list(units.read_unit(unit, text_column))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("keeps_types", [True, False])
@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
        pa.array(BYTES, pa.binary()),
        pa.array(BYTES, pa.large_binary()),
        pa.array(BYTES, pa.binary_view()),
        pa.array(BYTES).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_text_in_any_form_of_arrow(tmp_path, column, keeps_types):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", store_schema=keeps_types)
    assert texts_of(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize(
    "column, expected",
    [
        (pa.array([b"abc", None, "é1".encode()], pa.binary(3)), ["abc", None, "é1"]),
        (pa.array(['{"a": 1}', None], pa.json_()), ['{"a": 1}', None]),
        (pa.array([uuid.UUID(int=1).bytes, None], pa.uuid()), [str(uuid.UUID(int=1)), None]),
        (pa.nulls(2), [None, None]),
    ],
    ids=lambda each: str(getattr(each, "type", "")),
)
def test_other_types_that_hold_text(tmp_path, column, expected):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == expected


def test_fields_of_structs_by_dotted_names_and_a_column_of_that_name_first(tmp_path):
    inner = pa.StructArray.from_arrays(
        [pa.array(["x", "y", None]), pa.array(["p", "q", "p"]).dictionary_encode()],
        names=["b", "c.d"],
        mask=pa.array([False, True, False]),
    )
    table = pa.table({"a": inner, "deep": pa.StructArray.from_arrays([inner], names=["a"])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", "a.b") == ["x", None, None]
    assert texts_of(tmp_path / "a.parquet", "a.c.d") == ["p", None, "p"]
    assert texts_of(tmp_path / "a.parquet", "deep.a.b") == ["x", None, None]
    assert problem_with(tmp_path / "a.parquet", "a").endswith("Name a field of it: a.b, a.c.d")
    assert "no column 'a.x'" in problem_with(tmp_path / "a.parquet", "a.x")
    pq.write_table(table.append_column("a.b", pa.array(["1", "2", "3"])), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", "a.b") == ["1", "2", "3"]


def test_fields_of_json_by_dotted_names(tmp_path):
    rows = [{"m": {"t": "x"}}, {"m": None}, {"m.t": "first", "m": {"t": "y"}}, {"m": {"t": None}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts_of(tmp_path / "a.jsonl", "m.t") == ["x", None, "first", None]
    assert "Name a field of it: m.t" in problem_with(tmp_path / "a.jsonl", "m")
    assert "line 1: no column 'm.u'; the columns are m" in problem_with(tmp_path / "a.jsonl", "m.u")


def test_columns_that_are_no_text_or_not_clear(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [["a"]], "n": [1]}), path)
    assert "'text' holds list" in problem_with(path)
    assert "'n' holds int64, not text" in problem_with(path, "n")
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert "2 columns have the name 'text'" in problem_with(path)
    pq.write_table(pa.table([pa.array([each]) for each in "abc"], names=["text", "id", "id"]), path)
    assert texts_of(path) == ["a"]
    pq.write_table(pa.table({"text": [b"fine", b"xyz\xe9"]}), path)
    assert "row 1: column 'text' holds bytes that are invalid UTF-8 (0xe9 at byte 3)" in problem_with(path)


def test_files_of_one_input_may_differ_in_their_schemas(tmp_path):
    pq.write_table(pa.table({"text": ["1"], "id": ["x"], "url": ["u"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [0], "id": [7], "text": pa.array(["2"], pa.large_string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([b"3"])}), tmp_path / "c.PARQUET")
    options = ["--tokenizer=byte", "--val_tokens=0", "--num_workers=1"]
    assert fineweb.main([f"--input={tmp_path}", f"--output_dir={tmp_path}/out", *options]) == 0
    ids = pq.read_table(tmp_path / "out" / "documents_train_000000.parquet")["id"].to_pylist()
    assert ids == ["x", "7", None]


PACKED = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),
    ".zst": lambda content: (
        zstandard.compress(content[:9]) + b"\x50\x2a\x4d\x18\4\0\0\0skip" + zstandard.compress(content[9:])
    ),
    ".zstd": lambda content: long_window(content),
    ".bz2": lambda content: bz2.compress(content[:9]) + bz2.compress(content[9:]),
    ".xz": lambda content: lzma.compress(content[:9]) + lzma.compress(content[9:]),
}


def long_window(content: bytes) -> bytes:
    """As `zstd --long=31` packs what is piped into it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    squeeze = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return squeeze.compress(content) + squeeze.flush()


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.NDJSON", "a.JsonL", "a.jsonlines", "a.txt"])
def test_every_usual_name_packed_in_every_usual_way(tmp_path, name, packing):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKED[packing](b'{"text": "one"}\n{"text": "two"}\n'))
    expected = ['{"text": "one"}\n{"text": "two"}\n'] if name == "a.txt" else ["one", "two"]
    assert texts_of(path) == expected
    path.write_bytes(PACKED[packing](b""))
    assert units.inspect(str(path), 0, "text").is_empty


@pytest.mark.parametrize("packing", [".gz", ".zst", ".zstd", ".bz2", ".xz"])
def test_what_is_packed_and_cut_short_is_an_error(tmp_path, packing):
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(9999))
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKED[packing](content)[:-20])
    assert "cannot be read to the end" in problem_with(path)


def test_the_content_says_how_a_file_is_packed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    assert texts_of(tmp_path / "a.jsonl") == texts_of(tmp_path / "b.jsonl.gz") == ["x"]


def test_a_frame_that_unpacks_to_much_is_read_in_pieces(tmp_path):
    (tmp_path / "a").write_bytes(zstandard.compress(b"a line\n" * 1_000_000) * 2)
    with open(tmp_path / "a", "rb") as file:
        assert sum(len(line) for line in unpacked(file)) == 14_000_000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("é\n漢字 😀\n".encode(encoding))
    assert texts_of(tmp_path / "a.txt") == ["é\n漢字 😀\n"]
    rows = [{"text": "é\n"}, {"text": "上 😀"}]  # U+4E0A has a byte that is a line's end
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(content.encode(encoding))
    assert texts_of(tmp_path / "a.jsonl") == ["é\n", "上 😀"]
    if encoding == "utf-8-sig":  # files that were joined
        (tmp_path / "a.jsonl").write_bytes(content.encode(encoding) * 2)
        assert len(texts_of(tmp_path / "a.jsonl")) == 4


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt", "a.jsonl.gz"])
def test_pointers_of_git_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(LFS)
    assert "is a pointer of Git LFS" in problem_with(tmp_path / name)
    (tmp_path / name).write_bytes(b"/annex/objects/SHA256E-s1--ab.parquet\n")
    assert "is a pointer of git-annex" in problem_with(tmp_path / name)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.parquet", HTML, "is a page of HTML or XML"),
        ("a.jsonl.zst", HTML, "is a page of HTML or XML"),
        ("a.json", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a page of HTML or XML"),
        ("a.parquet", b"", "is empty (0 bytes)"),
        ("a.parquet", b'{"text": "x"}\n', "looks like JSON. Rename it"),
        ("a.parquet", gzip.compress(b"PAR1"), "compressed by gzip"),
        ("a.parquet", b"PK\x03\x04" + bytes(99), "is a zip archive. Unpack it"),
        ("a.jsonl", b"PAR1" + bytes(99), "is a parquet file, not JSON lines. Rename it to end in .parquet"),
        ("a.txt", b"\x93NUMPY\1\0", "is a NumPy array"),
        ("a.txt", "wide".encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("a.json", b'[{"text": "x"}]', "is one JSON array"),
        ("a.json", b'\xef\xbb\xbf[\n {"text": "x"}\n]', "is one JSON array"),
        ("a.json.gz", gzip.compress(b"[]"), "is one JSON array"),
        ("a.json", b'{\n "text": "x"\n}\n', "of several lines"),
        ("a.txt", b"one\ntwo xyz\xe9\n", "line 2: not UTF-8: invalid continuation byte 0xe9"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "xyz\xe9 au lait"}\n',
            "line 2: not UTF-8: invalid continuation byte 0xe9",
        ),
    ],
    ids=lambda each: each[:12] if isinstance(each, str) else "",
)
def test_what_a_file_really_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    found = problem_with(tmp_path / name)
    assert message in found


@pytest.mark.parametrize(
    "name, content, program",
    [
        ("a b.txt", "one\ncafé\n".encode("latin-1"), "iconv"),
        ("a b.jsonl.gz", gzip.compress('{"text": "café au lait"}\n'.encode("latin-1")), "iconv"),
        ("a b.json", b'[{"text": "one"},\n {"text": "two"}]', "jq"),
        ("a b.json.xz", lzma.compress(b'{\n"text": "one"\n}\n'), "jq"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_command_in_the_advice_makes_a_file_that_can_be_read(tmp_path, monkeypatch, name, content, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    command = problem_with(name).partition("`")[2].partition("`")[0]
    assert program in command
    if subprocess.run(["which", program], capture_output=True).returncode:
        pytest.skip(f"no {program} here")
    subprocess.run(command, shell=True, check=True)
    assert texts_of(shlex.split(command)[-1])


def test_a_file_without_permission_and_a_broken_link(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(units, "open_file", refuse)
    assert "permission denied. Let this user read it" in problem_with(path)


def prepare(tmp_path, *options) -> int:
    options = ["--tokenizer=byte", "--val_tokens=0", "--num_workers=1", *options]
    return fineweb.main([f"--output_dir={tmp_path}/out", *options])


def test_advice_is_to_replace_a_damaged_file_and_only_that(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    assert prepare(tmp_path, f"--input={tmp_path}/a.jsonl") == 1
    found = capsys.readouterr().err
    assert "no column 'text'" in found and "Replace the damaged" not in found
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert prepare(tmp_path, f"--input={tmp_path}/a.jsonl", "--text_column=body") == 0  # in the same directory
    (tmp_path / "out2").mkdir()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:-9])
    assert prepare(tmp_path / "out2", f"--input={tmp_path}/b.jsonl.gz") == 1
    assert "Replace the damaged input by a good copy" in capsys.readouterr().err


def test_an_empty_file_is_named_and_nothing_but_empty_ones_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert prepare(tmp_path, f"--input={tmp_path}/a.jsonl") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a.jsonl: is empty")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    assert prepare(tmp_path, f"--input={tmp_path}/a.jsonl,{tmp_path}/b.jsonl") == 0
    assert f"warning: {tmp_path}/a.jsonl: is empty" in capsys.readouterr().err


def test_a_copy_of_a_file_is_named(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    assert prepare(tmp_path, f"--input={tmp_path}/*.jsonl") == 0
    assert f"warning: {tmp_path}/b.jsonl: has the size and the end of {tmp_path}/a.jsonl" in capsys.readouterr().err

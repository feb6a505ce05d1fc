"""TFDS datasets as input: the same stream as from files, and no download, ever."""

import json
import socket
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import fineweb
from data_prep.inputs import units
from data_prep.inputs.paths import expand
from data_prep.inputs.units import inspect, read_unit
from data_prep.store import manifest
from data_prep.store.locations import InputError

TEXTS = [f"{i} " + "día 漢字 " * (i % 40) for i in range(300)]
TEXTS[7] = ""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever opens a connection fails, and not with an error that is caught on the way."""

    def connect(self, address):
        raise AssertionError(f"tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty TFDS_DATA_DIR."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def make_dataset(directory, examples: list[dict], splits=(("train", 2),), **features):
    """What TFDS would prepare in `directory`: `examples` in each split of (name, files)."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore

    features = tfds.features.FeaturesDict(features or {"text": tfds.features.Text()})
    directory.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(data_dir=directory, dataset_name="mine", filetype_suffix="array_record")
    infos = []
    for split, num_files in splits:
        lengths, num_bytes = [], 0
        for i, part in enumerate(np.array_split(np.arange(len(examples)), num_files)):
            name = f"mine-{split}.array_record-{i:05d}-of-{num_files:05d}"
            writer = ArrayRecordWriter(str(directory / name), "group_size:1")
            for place in part:
                record = features.serialize_example(examples[place])
                num_bytes += len(record)
                writer.write(record)
            writer.close()
            lengths.append(len(part))
        infos.append(tfds.core.SplitInfo(split, lengths, num_bytes, template))
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=infos, check_data=False)
    return directory


def text_dataset(directory, texts=TEXTS, **kwargs):
    return make_dataset(directory, [{"text": text} for text in texts], **kwargs)


def read_all(path: str, text_column: str = "text") -> list[tuple]:
    """(text, id, url, dump, language, row) of every example, through the units."""
    return [
        row
        for unit in inspect(path, 0, text_column).units
        for batch in read_unit(unit, text_column)
        for row in zip(
            batch.texts.to_pylist(),
            *(batch.provenance[name].to_pylist() for name in units.PROVENANCE),
            batch.rows.tolist(),
            strict=True,
        )
    ]


def prepare(source: str, output, *options: str) -> manifest.Manifest:
    fixed = ["--tokenizer=byte", "--val_tokens=500", "--record_tokens=64", "--num_workers=1"]
    assert fineweb.main([f"--input={source}", f"--output_dir={output}", *fixed, *options]) == 0
    return manifest.load(output)


def test_a_split_is_the_stream_that_the_same_texts_make_from_parquet(data_dir, tmp_path, monkeypatch):
    text_dataset(data_dir / "mine" / "1.0.0")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "mine.parquet")
    expected = prepare(f"{tmp_path}/mine.parquet", tmp_path / "parquet").fingerprint
    assert prepare("tfds:mine", tmp_path / "one").fingerprint == expected
    two = prepare("tfds:mine", tmp_path / "two", "--num_workers=2")
    assert two.fingerprint == expected
    assert two.spec.inputs[0]["path"] == "tfds:mine:1.0.0@train"  # whatever the machine
    table = pq.read_table(tmp_path / "two" / two.shards_of("train", "documents")[-1].name)
    assert table["source_file"][-1].as_py() == "tfds:mine:1.0.0@train"
    assert table["row"][-1].as_py() == len(TEXTS) - 1
    assert "tensorflow" not in sys.modules


def test_units_are_ranges_of_examples_that_account_for_all(data_dir, monkeypatch):
    text_dataset(data_dir / "mine" / "1.0.0")
    monkeypatch.setattr(units, "UNIT_BYTES", 7000)
    monkeypatch.setattr(units, "BATCH_BYTES", 2000)
    found = inspect("tfds:mine", 3, "text")
    assert 5 <= len(found.units) <= 10 and len({u.name for u in found.units}) == len(found.units)
    assert sum(u.num_rows for u in found.units) == len(TEXTS)
    for unit in found.units:
        batches = list(read_unit(unit, "text"))
        assert sum(batch.num_bytes for batch in batches) == unit.num_bytes > 0
        assert len(batches) > 1
    assert [(row[0], row[5]) for row in read_all("tfds:mine")] == list(zip(TEXTS, range(len(TEXTS)), strict=True))


def test_every_spelling_means_the_dataset_that_tfds_would_take(data_dir, tmp_path, monkeypatch):
    text_dataset(data_dir / "mine" / "1.0.0", ["old"])
    text_dataset(data_dir / "mine" / "1.2.0", ["a", "b", "c", "d"], splits=[("train", 1), ("t", 3)])
    text_dataset(data_dir / "multi" / "20230601.en" / "1.0.0", ["en"])
    text_dataset(tmp_path / "a@b" / "1.0.0", ["at"])
    monkeypatch.chdir(tmp_path)
    for spelling, path, texts in [
        ("mine", "mine:1.2.0@train", "abcd"),
        ("mine:1.0.0", "mine:1.0.0@train", ["old"]),
        ("mine:1.*.*@t", "mine:1.2.0@t", "abcd"),
        ("mine@train[1:3]", "mine:1.2.0@train[1:3]", "bc"),
        ("mine@t[-1:]+train[:25%]", "mine:1.2.0@t[-1:]+train[:25%]", "da"),
        ("multi/20230601.en", "multi/20230601.en:1.0.0@train", ["en"]),
        (f"{data_dir}/mine/1.0.0", f"{data_dir}/mine/1.0.0@train", ["old"]),
        ("./a@b/1.0.0", "./a@b/1.0.0@train", ["at"]),
        ("./tfds/mine/1.2.0@t", "./tfds/mine/1.2.0@t", "abcd"),
    ]:
        assert [row[0] for row in read_all(f"tfds:{spelling}")] == list(texts)
        (unit,) = inspect(f"tfds:{spelling}", 0, "text").units
        assert unit.path == f"tfds:{path}"
        assert [row[0] for row in read_all(unit.path)] == list(texts)  # as a worker opens it


def test_provenance_is_taken_from_features_of_those_names(data_dir):
    import tensorflow_datasets as tfds

    string = tfds.features.Tensor(shape=(), dtype=np.str_)
    examples = [{"body": "x", "id": 5, "url": "http://é", "language": [b"de"], "title": "t"}]
    examples[0]["image"] = np.zeros((2, 2, 3), np.uint8)
    make_dataset(
        data_dir / "mine" / "1.0.0",
        examples,
        splits=[("train", 1)],
        **{"body": string, "id": np.int64, "url": tfds.features.Text(), "title": string},
        language=tfds.features.Tensor(shape=(1,), dtype=np.str_),
        image=tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8, encoding="bytes"),
    )
    assert read_all("tfds:mine", "body") == [("x", "5", "http://é", None, "de", 0)]
    assert read_all("tfds:mine", "url") == [("http://é", "5", None, None, "de", 0)]
    for column, message in [
        ("text", r"no feature 'text'; the features are body \(string\), id \(int64\), "),
        ("id", r"feature 'id' is not text; .*language \(string\[1\]\).*--text_column"),
        ("image", r"feature 'image' is not text; .*image \(uint8\[2, 2, 3\]\)"),
    ]:
        with pytest.raises(InputError, match=rf"^tfds:mine:1\.0\.0@train: {message}"):
            inspect("tfds:mine", 0, column)


def test_a_text_that_is_not_utf8_is_named_by_its_example(data_dir):
    text_dataset(data_dir / "mine" / "1.0.0", [b"fine", b"", b"\xff\xfe"])
    with pytest.raises(InputError, match=r"^tfds:mine:1\.0\.0@train: example 2: 'text' is not UTF-8: .*0xff"):
        read_all("tfds:mine")


def test_a_dataset_that_is_not_prepared_is_refused_with_the_command_and_what_is_there(data_dir, tmp_path, capsys):
    command = "`tfds build lm1b --file_format=array_record`"
    status = fineweb.main(["--input=tfds:lm1b", f"--output_dir={tmp_path}/out"])
    error = capsys.readouterr().err
    assert status == 1 and "lm1b: not prepared" in error and command in error
    assert f"{data_dir} holds nothing" in error and not (tmp_path / "out").exists()
    text_dataset(data_dir / "mine" / "de" / "1.0.0", ["x"])
    (data_dir / "mine" / "de" / "1.1.0.incompleteABC").mkdir()
    for spelling, message in [
        ("mine:2.0.0", r"mine holds de\b"),
        ("mine/en", r"mine holds de\b"),
        ("mine/de:2.0.0", r"mine/de holds 1\.0\.0, 1\.1\.0\.incompleteABC\b"),
        ("mine/de@test", r"Unknown split 'test'. Should be one of \['train'\]"),
        ("mine/de@train[", r"Error parsing split"),
        ("mine+train", r"expected tfds:NAME\[/CONFIG\]\[:VERSION\]\[@SPLIT\]"),
        (f"{data_dir}/mine/de", r"holds no dataset_info.json; expected the directory of one ver"),
    ]:
        with pytest.raises(InputError, match=message):
            inspect(f"tfds:{spelling}", 0, "text")


def test_a_dataset_stored_as_tfrecord_is_refused_until_it_is_converted(data_dir):
    directory = text_dataset(data_dir / "mine" / "1.0.0")
    info = json.loads((directory / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (directory / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"mine/1\.0\.0 is stored as tfrecord, expected array_record, .*convert"):
        inspect("tfds:mine", 0, "text")
    info["alternativeFileFormats"] = ["array_record"]  # what `tfds convert_format` leaves
    (directory / "dataset_info.json").write_text(json.dumps(info))
    assert [row[0] for row in read_all("tfds:mine")] == TEXTS


def test_files_that_are_missing_or_damaged_are_errors_and_never_fewer_texts(data_dir):
    rng = np.random.default_rng(0)  # does not compress
    texts = [rng.bytes(500).hex() for _ in range(300)]
    directory = text_dataset(data_dir / "mine" / "1.0.0", texts)
    path = directory / "mine-train.array_record-00001-of-00002"
    content = path.read_bytes()
    (unit,) = inspect("tfds:mine", 0, "text").units
    flipped = bytearray(content)
    flipped[70_000] ^= 1
    # ArrayRecord opens the first 64 KB of a file as one without records.
    for damaged in (content[: len(content) // 2], content[: 1 << 16], content[:-1], flipped):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^tfds:mine:1\.0\.0@train: .*cut short"):
            list(read_unit(unit, "text"))
    path.unlink()
    with pytest.raises(InputError, match=r"00001-of-00002.*not whole. Prepare or copy it again"):
        inspect("tfds:mine", 0, "text")


def test_identity_changes_with_the_dataset(data_dir, tmp_path):
    def identity(directory):
        found = inspect(f"tfds:{directory}", 0, "text").identity
        return {key: value for key, value in found.items() if key != "path"}

    base = identity(text_dataset(tmp_path / "a" / "1.0.0"))
    assert base == identity(text_dataset(tmp_path / "b" / "1.0.0"))
    others = {
        "version": text_dataset(tmp_path / "a" / "1.0.1"),
        "size": text_dataset(tmp_path / "c" / "1.0.0", [*TEXTS[:-1], "x"]),
        "num_examples": text_dataset(tmp_path / "d" / "1.0.0", [*TEXTS, ""]),
        "info_digest": text_dataset(tmp_path / "e" / "1.0.0", splits=[("train", 3)]),
    }
    for key, directory in others.items():
        assert identity(directory)[key] != base[key]


def test_datasets_and_files_mix_in_the_order_given(data_dir, tmp_path):
    text_dataset(data_dir / "mine" / "1.0.0", ["b", "c"], splits=[("train", 1), ("test", 1)])
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    source = f"tfds:mine@test,{tmp_path}/a.jsonl,tfds:mine"
    assert expand(source) == source.split(",")
    prepare(source, tmp_path / "out", "--val_tokens=0", "--formats=bin")
    ids = np.fromfile(next((tmp_path / "out").glob("*.bin")), "<u2")[6:]
    assert bytes(ids[1::2].astype(np.uint8)) == b"bcabc"
    with pytest.raises(InputError, match="more than once"):
        expand("tfds:mine,tfds:mine")

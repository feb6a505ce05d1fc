"""Which document is where, without a scan."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import byte_options, run, words, write_parquet

from data_prep import documents
from data_prep.store import manifest
from data_prep.store.document_index import find_rows, index_table, write_index
from data_prep.store.documents import DocumentTables


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """800 documents of 31 tokens and one of 12,001 that spans three shards."""
    folder = tmp_path_factory.mktemp("documents")
    write_parquet(folder / "a.parquet", [*words(400), "y" * 12_000, *words(400)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.store.documents.GROUP_ROWS", 16)  # several row groups a table
        assert run(*byte_options(folder, folder / "out")) == 0
    return folder / "out"


@pytest.fixture
def tables(dataset, monkeypatch):
    monkeypatch.setattr("data_prep.store.documents.GROUP_ROWS", 16)
    return DocumentTables(dataset)


def rows(dataset, split="train"):
    """The split's table by plain reading."""
    shards = manifest.load(dataset).shards_of(split, "documents")
    return [row for shard in shards for row in pq.read_table(dataset / shard.name).to_pylist()]


def test_every_token_leads_to_its_document(dataset, tables):
    for row in rows(dataset):
        for token in (row["start"], row["start"] + row["length"] - 1):
            found = vars(tables.at(token))
            assert found.pop("split") == "train" and found == row


def test_a_document_that_spans_shards_is_found_from_its_last_token(dataset, tables):
    (long,) = (row for row in rows(dataset) if row["length"] == 12_001)
    assert long["start"] // 5000 + 2 <= (long["start"] + 12_000) // 5000
    assert tables.at(long["start"] + 12_000).row == long["row"] == 400


def test_between_gives_each_document_once(dataset, tables):
    some = rows(dataset)[10:500]
    start, stop = some[0]["start"] + 3, some[-1]["start"] + 1
    assert [d.start for d in tables.between(start, stop)] == [row["start"] for row in some]
    assert list(tables.between(stop, stop)) == []


def test_ids_and_urls_are_found_by_the_index(dataset, tables):
    for row in rows(dataset)[::7]:
        assert [d.start for d in tables.find("id", row["id"])] == [row["start"]]
        assert row["start"] in [d.start for d in tables.find("url", row["url"])]
    assert tables.find("id", "https://example.org/3") == []  # a url is no id
    assert tables.find("url", "<a:3>") == []


def test_values_that_crowd_the_index_are_all_found(tmp_path):
    """9,000 rows of one url stand far from where an even spread would have them."""
    urls = [f"https://example.org/{i}" for i in range(1000)] + ["https://example.org/"] * 9000
    table = pa.table({"id": pa.array([None] * 10_000, pa.string()), "url": urls})
    write_index(tmp_path / "a.index", index_table(table))
    assert find_rows(tmp_path / "a.index", "https://example.org/") == list(range(1000, 10_000))
    for row in range(1000):
        assert row in find_rows(tmp_path / "a.index", urls[row])
    assert find_rows(tmp_path / "a.index", "nobody") == []


def test_a_look_up_reads_one_row_group(dataset, tables, monkeypatch):
    groups = []
    original = DocumentTables._group
    monkeypatch.setattr(DocumentTables, "_group", lambda self, *which: groups.append(which) or original(self, *which))
    tables.at(9000)
    tables.find("id", "<a:700>")
    assert len(groups) == 2


def test_the_command_prints_json_and_text(dataset, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.store.documents.GROUP_ROWS", 16)
    assert documents.main([str(dataset), "--token", "40", "--text"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["start"] == 31 and found["text"] == words(400)[found["row"]]
    assert documents.main([str(dataset), "--id", "<a:0>", "<a:500>"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["split"], line["row"]) for line in lines] == [("val", 0), ("train", 500)]
    assert documents.main([str(dataset), "--url", "https://example.org/400"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 12_001


@pytest.mark.parametrize(
    "options, message",
    [
        (["--token", "99999999"], "token 99999999: split train has tokens 0 to "),
        (["--token", "-1"], "token -1: split train"),
        (["--id", "nobody"], "no document has the id nobody"),
        (["--token", "0", "--split", "test"], "no split 'test'; the splits are "),
    ],
)
def test_what_is_not_there_is_said(dataset, options, message, capsys):
    assert documents.main([str(dataset), *options]) == 1
    assert message in capsys.readouterr().err

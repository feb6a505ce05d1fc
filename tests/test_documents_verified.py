"""Tables and indexes are compared with their digests before the first answer, and lying ones are told from true ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import edit_manifest, flip

from data_prep import check, documents
from data_prep.store import files
from data_prep.store.documents import DOCUMENT_COLUMNS, DocumentTables
from data_prep.store.files import digest_of
from gpt_pretrain.data.config import DataConfig


def test_each_file_is_read_once_a_process_and_again_when_it_was_changed(words_copy, monkeypatch):
    read = []
    monkeypatch.setattr(files, "digest_of", lambda path: read.append(Path(path).name) or digest_of(path))
    for _ in range(3):
        DocumentTables(words_copy).at(40)
        DocumentTables(words_copy).at(6000)
    assert read == ["documents_train_000000.parquet", "documents_train_000001.parquet"]
    flip(words_copy / "documents_train_000000.parquet")
    with pytest.raises(ValueError, match=r"documents_train_000000\.parquet: digest is .*data_prep\.check .* --repair"):
        DocumentTables(words_copy).at(40)
    assert DocumentTables(words_copy).at(6000).start <= 6000


@pytest.mark.parametrize("name", ["documents_train_000001.parquet", "documents_train_000002.index"])
def test_a_flipped_bit_never_excludes_other_windows(words_copy, name):
    def stage():
        config = DataConfig(dir=str(words_copy), exclude=["<a:200>"], seq_len=32)
        return config.stage(config.open(), ((0, 8),))

    assert stage().streams[0].excluded
    flip(words_copy / name)
    with pytest.raises(ValueError, match=name):
        stage()


def bless(words_copy: Path, name: str) -> None:
    """The manifest takes the file as it is now: a stranger's dataset."""
    path = words_copy / name

    def edit(fields):
        (shard,) = (shard for shard in fields["shards"] if shard["name"] == name)
        shard |= {"num_bytes": path.stat().st_size, "digest": digest_of(path)}

    edit_manifest(words_copy, edit)


def put(column: str, row: int, value):
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        index = table.column_names.index(column)
        return table.set_column(
            index, DOCUMENT_COLUMNS.field(column), pa.array(values, DOCUMENT_COLUMNS.field(column).type)
        )

    return change


LIES = {
    "a length of nothing": put("length", 3, 0),
    "a negative length": put("length", 3, -31),
    "a length beyond the stream": put("length", 3, 2**40),
    "a shorter document": put("length", 3, 2),
    "a start before the stream": put("start", 0, -5),
    "a later start": put("start", 0, 50),
    "no start": put("start", 4, None),
    "no length": put("length", 4, None),
    "no column": lambda table: table.drop_columns(["length"]),
    "another type": lambda table: table.set_column(1, "length", table["length"].cast(pa.string())),
    "backwards": lambda table: table.take(np.arange(len(table))[::-1]),
    "no rows": lambda table: table.slice(0, 0),
}


@pytest.mark.parametrize("lie", [*LIES, "no parquet"])
def test_a_table_that_lies_is_refused_in_words_and_nothing_runs_for_ever(words_copy, lie, capsys):
    name = "documents_train_000001.parquet"
    if lie == "no parquet":
        (words_copy / name).write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    else:
        pq.write_table(LIES[lie](pq.read_table(words_copy / name)), words_copy / name, row_group_size=16)
    bless(words_copy, name)
    with pytest.raises(ValueError, match=r"documents_train_00000\d\.parquet: .*data_prep\.check"):
        for count, found in enumerate(DocumentTables(words_copy).between(0, 11000)):
            assert count < 1000 and found.length > 0
    for token in (4990, 5040, 5100):
        status = documents.main([str(words_copy), "--token", str(token)])
        out, err = capsys.readouterr()
        assert (status, "parquet: " in err) in ((0, False), (1, True)) and bool(out) == (status == 0)
    assert check.main([str(words_copy), "--num_workers=1"]) == 1
    assert f"{words_copy / name}: " in capsys.readouterr().out


def test_a_table_without_statistics_is_refused(words_copy):
    path = words_copy / "documents_train_000001.parquet"
    pq.write_table(pq.read_table(path), path, write_statistics=False)
    bless(words_copy, path.name)
    with pytest.raises(ValueError, match=r"000001\.parquet: row group 0 does not say where its documents start"):
        DocumentTables(words_copy).at(6000)

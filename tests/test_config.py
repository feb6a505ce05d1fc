"""What a user says of the data: mixtures, exclusions, limits."""

import numpy as np
import pytest
from support.prepared import byte_options, words, write_parquet
from support.shared import made_once

from data_prep import fineweb
from data_prep.store.documents import DocumentTables
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import windows_overlapping


@pytest.fixture(scope="session")
def numbers(tmp_path_factory) -> str:
    """300 documents of 31 byte-tokens with ids."""

    def make(folder):
        write_parquet(folder / "a.parquet", words(300))
        assert fineweb.main(byte_options(folder, folder / "out")) == 0

    return str(made_once(tmp_path_factory, "numbers", make) / "out")


@pytest.mark.parametrize("seq_len", [1, 5, 16])
def test_windows_overlapping_a_span_are_those_that_hold_one_of_its_tokens(seq_len):
    num_tokens = 100
    num_windows = (num_tokens - 1) // seq_len
    for start in range(0, num_tokens - 7, 3):
        for length in (1, 2, 7):
            tokens = set(range(start, start + length))
            held = [w for w in range(num_windows) if tokens & set(range(w * seq_len, w * seq_len + seq_len + 1))]
            assert list(windows_overlapping(start, length, seq_len, num_windows)) == held


def test_no_window_of_an_excluded_document_is_ever_seen(numbers, tmp_path):
    ids = ["<a:100>", "<a:200>"]
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    for exclude in (ids, str(tmp_path / "ids.txt")):
        config = DataConfig(dir=numbers, seq_len=16, exclude=exclude)
        datasets = config.open()
        stage = config.stage(datasets, ((0, 8),))
        documents = [DocumentTables(numbers).find("id", each)[0] for each in ids]
        seen = np.concatenate([Plan((stage,)).batch(step).windows for step in range(200)])
        assert len(stage.streams[0].excluded) == 6
        for document in documents:
            tokens = seen[:, None] * 16 + np.arange(17)
            assert not ((tokens >= document.start) & (tokens < document.start + document.length)).any()
    with pytest.raises(ValueError, match="no document with the id <a:999>"):
        DataConfig(dir=numbers, exclude=("<a:999>",)).stage(datasets, ((0, 8),))
    with pytest.raises(ValueError, match=r"data\.exclude: nowhere\.txt: no such file"):
        DataConfig(dir=numbers, exclude="nowhere.txt").stage(datasets, ((0, 8),))


def test_a_stream_is_seen_no_more_often_than_allowed(numbers, tiny_dataset):
    mixture = {"few": (numbers, 1, 1.5), "many": (tiny_dataset, 1)}
    config = DataConfig(mixture=mixture, seq_len=16, mixture_block=10)
    plan = Plan((config.stage(config.open(), ((0, 8),)),))
    per_epoch = plan.stages[0].num_windows(0)
    enough = int(1.5 * per_epoch * 2 / 8)
    config.check_epochs(plan, enough - 2)
    with pytest.raises(ValueError, match=r"few: would be seen 1\.\d+ times .* expected at most 1\.5"):
        config.check_epochs(plan, enough + 3)
    alone = DataConfig(dir=numbers, seq_len=16, max_epochs=1)
    plan = Plan((alone.stage(alone.open(), ((0, 8),)),))
    with pytest.raises(ValueError, match=r"would be seen 2\.\d+ times"):
        alone.check_epochs(plan, 2 * per_epoch // 8 + 2)


def test_a_mixture_may_be_written_in_any_order(numbers, tiny_dataset):
    """gin sorts its dictionaries: the config.gin of a run must begin the same run."""
    mixture = {"web": (numbers, 1), "code": (tiny_dataset, 3)}
    one, other = (
        DataConfig(mixture=dict(each), mixture_block=10) for each in (mixture.items(), [*mixture.items()][::-1])
    )
    assert list(one.mixture) == ["code", "web"]
    assert one.stage(one.open(), ((0, 8),)) == other.stage(other.open(), ((0, 8),))


def test_mixtures_that_cannot_be_are_refused(numbers, tmp_path):
    for mixture in (
        {1: (numbers, 1)},
        {"a": numbers},
        {"a": (numbers,)},
        {"a/b": (numbers, 1)},
        {"a": (numbers, 1, 2, 3)},
    ):
        with pytest.raises(ValueError, match=r"data\.mixture: found"):
            DataConfig(mixture=mixture)
    write_parquet(tmp_path / "a.parquet", words(300))
    options = byte_options(tmp_path, tmp_path / "gpt2", tokenizer="gpt2", val_tokens=10)
    assert fineweb.main(options) == 0
    with pytest.raises(ValueError, match="different tokenizers"):
        DataConfig(mixture={"a": (numbers, 1), "b": (str(tmp_path / "gpt2"), 1)}).open()
    with pytest.raises(ValueError, match="less than 1 in 10"):
        config = DataConfig(mixture={"a": (numbers, 1), "b": (numbers, 1000)}, mixture_block=10, seq_len=16)
        config.stage(config.open(), ((0, 8),))

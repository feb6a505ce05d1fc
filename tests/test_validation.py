"""Validation on other datasets, bits per byte, and tasks while a run goes on."""

import json

import numpy as np
import pytest
from support.prepared import byte_options, flip, words, write_parquet
from support.prepared import run as prepare
from support.runs import build_anew, run_config
from support.texts import random_texts
from support.training_runs import finish, flags, start, start_two
from test_actions import ScalarWriter
from test_tasks import LINES, write_lines

from data_prep.store.documents import DocumentTables
from data_prep.store.tokenizers import user_tokenizer
from gpt_pretrain.train import train as train_lib
from gpt_pretrain.train.actions.action import Now
from gpt_pretrain.train.actions.evaluation import Evaluate
from gpt_pretrain.train.actions.tasks import AskTasks
from gpt_pretrain.train.opened_data import OpenedData, open_data
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.validation import byte_lengths_of, num_bytes_of


def evaluated(config) -> dict[str, float]:
    built, _ = build_anew(config)
    data = built.data
    evaluate = Evaluate(built, data.sources("val"), ScalarWriter(), StopSignal(), named=data.validation)
    return evaluate.means(built.fresh_state().params)


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_byte_lengths_are_those_of_the_text(name):
    tokenizer = user_tokenizer(name)
    lengths_V = byte_lengths_of(tokenizer)
    assert len(lengths_V) == tokenizer.vocab_size and lengths_V[tokenizer.end_of_text] == 0
    for text in ["", "a b\n", "é漢字🙂 русский", *random_texts(50, seed=1)]:
        assert lengths_V[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize(
    "normalizer, has_lengths", [(None, True), ({"type": "Lowercase"}, False)], ids=["byte-level", "changes the text"]
)
def test_a_tokenizer_json_has_byte_lengths_where_it_leaves_the_text_alone(tmp_path, normalizer, has_lengths):
    fields = user_tokenizer("gpt2").to_tokenizer_json() | {"normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = user_tokenizer(str(tmp_path / "tokenizer.json"))
    lengths_V = byte_lengths_of(tokenizer)
    assert (lengths_V is not None) == has_lengths
    if has_lengths:
        assert np.array_equal(lengths_V, byte_lengths_of(user_tokenizer("gpt2")))


def test_bits_per_byte_count_the_bytes_of_exactly_the_targets(words_dataset):
    config = run_config(words_dataset, eval_tokens=200)
    data = open_data(config)
    source = data.sources("val")[""]
    lengths_V = byte_lengths_of(data.tokenizer)
    num_targets = 200 // 8 * 8
    documents = [d for d in DocumentTables(words_dataset, "val").between(0, num_targets + 1)]
    whole = [d for d in documents if d.start + d.length <= num_targets + 1]
    last = documents[-1]
    assert 0 < len(whole) < len(documents) and last.text_bytes == last.length - 1  # of bytes, one token each
    in_table = sum(d.text_bytes for d in whole) + num_targets + 1 - last.start - 1
    assert num_bytes_of(source, num_targets, lengths_V) == in_table
    found = evaluated(config)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * num_targets / np.log(2) / in_table)


def test_without_byte_lengths_the_metric_is_left_out_and_that_is_logged_once(tiny_dataset, monkeypatch, caplog):
    tokenizer = open_data(run_config(tiny_dataset)).tokenizer
    monkeypatch.setattr(type(tokenizer), "byte_lengths", lambda self: None)
    assert evaluated(run_config(tiny_dataset)).keys() == {"loss", "accuracy"}
    monkeypatch.setattr(OpenedData, "tokenizer", property(lambda self: user_tokenizer("nobody:Knows")))
    assert evaluated(run_config(tiny_dataset)).keys() == {"loss", "accuracy"}
    lines = [record.message for record in caplog.records if "bits per byte" in record.message]
    assert len(lines) == 2 and "does not say how many bytes" in lines[0] and "cannot be loaded" in lines[1]


def test_other_datasets_are_validated_on_by_name_and_are_no_part_of_the_mean(tiny_dataset, words_dataset):
    plain = evaluated(run_config(tiny_dataset))
    others = {"words": str(words_dataset), "same": tiny_dataset, "front": (tiny_dataset, "train")}
    found = evaluated(run_config(tiny_dataset, validation=others))
    metrics = ("loss", "accuracy", "bits_per_byte")
    assert found.keys() == {*metrics, *(f"{name}/{metric}" for name in others for metric in metrics)}
    for metric in metrics:
        assert found[metric] == found[f"same/{metric}"] == plain[metric]
    assert len({found[f"{name}/loss"] for name in others}) == 3
    alone = evaluated(run_config(words_dataset))
    assert found["words/loss"] == alone["loss"]


@pytest.mark.parametrize(
    "given, problem",
    [
        ("data/books", 'expected {"name": "directory", ...}, or None'),
        ({"a/b": "data"}, "expected a name without '/'"),
        ({"a": ("data", "test")}, "expected a name without '/'"),
        ({"loss": "data"}, "'loss' is the name of a metric"),
        ({"web": "data"}, "'web' is the name of a stream of data.mixture"),
    ],
)
def test_other_datasets_that_cannot_be_are_refused_by_the_configuration(tiny_dataset, given, problem):
    with pytest.raises(ValueError, match=f"train.validation: .*{problem}"):
        run_config(tiny_dataset, validation=given, data={"mixture": {"web": (tiny_dataset, 1), "b": (tiny_dataset, 1)}})


def test_other_datasets_are_checked_before_work_starts(tiny_dataset, tmp_path):
    write_parquet(tmp_path / "a.parquet", words(40))
    for name, changes in {"gpt2": {"tokenizer": "gpt2", "val_tokens": 20}, "no val": {"val_tokens": 0}}.items():
        assert prepare(*byte_options(tmp_path, tmp_path / name, **changes)) == 0
    for name, problem in {
        "gpt2": "has ids of tokenizer 'gpt2' .* the run those of 'byte'",
        "no val": "has no split 'val', only train. Name one:",
        "nowhere": "nowhere",
    }.items():
        with pytest.raises(ValueError, match=problem):
            open_data(run_config(tiny_dataset, validation={"x": str(tmp_path / name)}))
    with pytest.raises(ValueError, match=r"train.validation 'x': .*: data.seq_len=4000 needs 4001 tokens"):
        open_data(run_config(tiny_dataset, validation={"x": tiny_dataset}, data={"seq_len": 4000}, num_tokens=32000))


def test_a_damaged_shard_of_another_dataset_is_found_before_it_is_used(tiny_dataset, words_copy, monkeypatch):
    monkeypatch.setattr("data_prep.store.datasets._ALWAYS_VERIFY_BYTES", 0)  # as if it were large
    config = run_config(tiny_dataset, validation={"words": str(words_copy)})
    assert list(open_data(config).validation) == ["words"]
    flip(words_copy / "fineweb_val_000000.bin")
    with pytest.raises(ValueError, match=r"fineweb_val_000000.bin: .*digest"):
        open_data(config)


@pytest.mark.slow
def test_tasks_are_asked_while_a_run_goes_on(tiny_dataset, tmp_path, monkeypatch):
    path, written = write_lines(tmp_path / "hs.jsonl"), ScalarWriter()
    monkeypatch.setattr(train_lib, "writer_of", lambda *args: written)
    settings = {"eval_tasks": (str(path),), "eval_tasks_interval": 2, "mesh": (2, 2), "per_device_batch_size": 1}
    config = run_config(tiny_dataset, tmp_path / "run", num_steps=3, data={"seq_len": 16}, **settings)
    assert train_lib.train(config) == 0
    assert written.steps_of("evaluation/hs/acc") == [2, 3]
    (last,) = [scalars for step, scalars in written.written if step == 3 and "evaluation/hs/acc" in scalars]
    kept = {
        int(each.name.split("-")[0]): json.loads(each.read_text()) for each in (tmp_path / "run/evaluations").iterdir()
    }
    assert kept.keys() == {2, 3} and kept[3]["results"]["hs"]["acc"] == last["evaluation/hs/acc"]
    # The same command makes up for what is missing of the last step, and for nothing else.
    for each in (tmp_path / "run/evaluations").iterdir():
        each.unlink()
    assert train_lib.train(config) == 0
    (again,) = (tmp_path / "run/evaluations").iterdir()
    assert json.loads(again.read_text()) == kept[3]


def test_a_signal_leaves_tasks_half_way(tiny_dataset, tmp_path):
    path = write_lines(tmp_path / "hs.jsonl")
    built, _ = build_anew(run_config(tiny_dataset, tmp_path / "run", eval_tasks=(str(path),), data={"seq_len": 16}))
    stop, writer = StopSignal(), ScalarWriter()
    stop.received = 15
    action = AskTasks(built, built.data.suite, writer, stop)
    action.run(Now(built.total_steps, built.fresh_state(), True))
    action.at_end(Now(built.total_steps, built.fresh_state(), True))
    assert not writer.written and not action.is_complete and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "tasks, problem",
    [
        (("nowhere.jsonl",), "nowhere.jsonl: cannot be read"),
        (("hellaswag_val.bin",), "hellaswag_val.bin: cannot be read"),
    ],
)
def test_tasks_that_are_not_there_end_a_run_before_it_starts(tiny_dataset, tmp_path, tasks, problem):
    with pytest.raises(ValueError, match=problem):
        train_lib.train(run_config(tiny_dataset, tmp_path / "run", eval_tasks=tasks))
    assert not (tmp_path / "run").exists()


def test_the_settings_of_tasks_are_checked(tiny_dataset):
    with pytest.raises(ValueError, match=r"train.eval_tasks: found 'arc_easy', expected names"):
        run_config(tiny_dataset, eval_tasks="arc_easy")
    with pytest.raises(ValueError, match=r"train.eval_tasks_limit: found 0"):
        run_config(tiny_dataset, eval_tasks_limit=0)


@pytest.mark.slow
def test_two_processes_ask_and_validate_as_one(tiny_dataset, tmp_path):
    path = write_lines(tmp_path / "hs.jsonl", LINES * 20)
    settings = {
        "train.eval_tasks": (str(path),),
        "train.validation": {"front": (tiny_dataset, "train")},
        "train.per_device_batch_size": 2,
    }
    together = start_two(flags(tiny_dataset, tmp_path / "two", num_steps=5, **settings), tmp_path)
    for process in together:
        finish(process)
    finish(start(flags(tiny_dataset, tmp_path / "one", num_steps=5, **settings), num_devices=4))
    (two,), (one,) = ([*(tmp_path / name / "evaluations").iterdir()] for name in ("two", "one"))
    assert json.loads(two.read_text()) == json.loads(one.read_text())
    two, one = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("two", "one"))
    assert two.keys() == one.keys() and "front/bits_per_byte" in one
    assert all(two[name] == pytest.approx(one[name], rel=1e-4) for name in one)

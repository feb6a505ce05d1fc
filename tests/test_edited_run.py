"""Runs whose data is edited in place: on resume, in the middle, and what the commands say of them."""

import json
import shutil

import numpy as np
import pytest
from support.prepared import byte_options, run, words, write_parquet
from support.training_runs import assert_bitwise_equal, final_state, finish, flags, start, start_two, train_here

from data_prep.store.documents import DocumentTables
from gpt_pretrain import inspect, replay, settings
from gpt_pretrain.data.asked_edits import StepRange, Steps, TokenSpan, WindowList, Windows
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.order_api import open_order

NUM_STEPS, CHANGED = 10, 4


@pytest.fixture(scope="module")
def canaries(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("canaries")
    write_parquet(folder / "b.parquet", words(80))
    assert run(*byte_options(folder, folder / "canaries")) == 0
    return str(folder / "canaries")


@pytest.fixture(scope="module")
def control(words_dataset, tmp_path_factory):
    """`begun`, a run of four steps; and `run`, which has consumed what it would have after ten."""
    folder = tmp_path_factory.mktemp("control")
    settings = {"data.format": repr("bin"), "train.save_interval": 5}
    train_here(flags(words_dataset, folder / "begun", num_steps=CHANGED, **settings))
    order = open_order(folder / "begun", num_steps=NUM_STEPS)
    record = order.record(folder / "run")
    for batch in order.read():
        record.add(batch)
    record.save()
    return folder


def documents_seen_late(dataset, save_dir, count):
    """Ids of documents that the run sees after the change, of which no two share a window."""
    opened, tables, found, taken = OpenedRun(str(save_dir)), DocumentTables(dataset), [], set()
    for step in range(CHANGED, NUM_STEPS):
        for window in opened.plan.batch(step).windows.tolist():
            near = {window - 2, window - 1, window, window + 1, window + 2}
            if not near & taken:
                document = tables.at(window * 32 + 16)
                taken |= near
                found.append(document.id)
    return found[:count]


def steps_that_hold(save_dir, document, only_targets=False) -> set[int]:
    """By the command, from 1."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert inspect.main([str(save_dir), "--document", document, "--jsonl"]) == 0
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    lines = [line for line in lines if "substituted_by_window" not in line]
    if only_targets:  # of a span that begins a row, the first token is no target
        lines = [line for line in lines if line["tokens_of_window"] != [0, 1]]
    return {line["update"] for line in lines}


def test_a_run_that_is_edited_on_the_way_differs_from_its_control_at_these_rows_alone(
    words_dataset, control, canaries, tmp_path, capsys
):
    gone, masked = documents_seen_late(words_dataset, control / "run", 2)
    save_dir = tmp_path / "run"
    shutil.copytree(control / "begun", save_dir)
    changes = {
        "data.format": repr("array_record"),
        "train.save_interval": 5,
        "data.substitute": [gone],
        "data.mask": [masked],
        "data.insert": [(canaries, "<b:60>", [(7, 3), (9, 0)])],
    }
    output = train_here(flags(words_dataset, save_dir, num_steps=NUM_STEPS, **changes))
    assert "windows substituted from here on" in output and "tokens masked" in output
    ledgers = [Ledger.read(path).digests for path in (control / "run", save_dir)]
    late = set(range(CHANGED + 1, NUM_STEPS + 1))
    expected = (steps_that_hold(control / "run", gone) & late) | {7, 9}
    expected |= steps_that_hold(control / "run", masked, only_targets=True) & late
    assert {int(i) + 1 for i in np.flatnonzero(ledgers[0] != ledgers[1])} == expected
    assert not steps_that_hold(save_dir, gone) & late
    assert steps_that_hold(save_dir, "<b:60>") >= {7, 9}

    # The order of other trainers, changed in the same way, is the same.
    how = {"seq_len": 32, "batch_size": 8, "num_steps": NUM_STEPS}
    edits = {"substitute": [gone], "mask": [masked], "insert": [(canaries, "<b:60>", [(7, 3), (9, 0)])]}
    order = open_order(words_dataset, **how)
    order = order.continued(CHANGED, open_order(words_dataset, **how, **edits))
    assert order.plan == OpenedRun(str(save_dir)).plan
    assert [each.digest for each in order.read()] == ledgers[1].tolist()

    # From the checkpoint in the middle it is the same run again.
    whole = final_state(save_dir)[1]
    shutil.rmtree(save_dir / "checkpoints" / str(NUM_STEPS))
    output = train_here(flags(words_dataset, save_dir, num_steps=NUM_STEPS, **changes))
    assert "Data plan: after step" not in output
    assert np.array_equal(Ledger.read(save_dir).digests, ledgers[1])
    assert_bitwise_equal(final_state(save_dir)[1], whole)
    assert len(OpenedRun(str(save_dir)).plan.stages) == 2

    assert replay.main([str(save_dir), "--verify"]) == 0
    assert replay.main([str(control / "run"), "--against", str(save_dir)]) == 1
    out = capsys.readouterr().out
    assert f"part at update {min(expected)}" in out
    assert "substituted windows: 0," in out and "rows with inserted documents: 0, 2" in out
    assert inspect.main([str(save_dir), "--document", gone]) == 0
    assert "Substituted in" in capsys.readouterr().out
    assert inspect.main([str(save_dir), "--document", masked]) == 0
    assert "targets masked" in capsys.readouterr().out
    assert inspect.main([str(save_dir), "--step", "7", "--rows", "3", "--html", str(tmp_path / "page.html")]) == 0
    assert "inserted from canaries" in (tmp_path / "page.html").read_text()
    assert inspect.main([str(save_dir), "--step", "7", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert "inserted from canaries" in out and "<b:60>" in out
    assert inspect.main([str(save_dir), "--step", str(min(steps_that_hold(control / "run", gone) & late))]) == 0
    assert "substituted for window" in capsys.readouterr().out

    # Other trainers get the same batches of it, on any number of ranks.
    order = open_order(save_dir)
    for step in range(NUM_STEPS):
        halves = [order.batches(rank, 2)[step] for rank in (0, 1)]
        assert sum(half.digest for half in halves) % 2**64 == int(ledgers[1][step])
        assert len({half.keep is None for half in halves}) == 1
    example = next(each for each in order.examples(with_documents=True) if (each.step_index, each.row) == (6, 3))
    assert example.documents[0].id == "<b:60>" and example.keep.shape == (32,)
    tables = DocumentTables(canaries)
    (document,) = tables.find("id", "<b:60>")
    assert document.length < 33 and example.tokens[0] == order.end_of_text == example.tokens[document.length]


def test_what_cannot_be_edited_is_refused_before_work_starts(words_dataset, control, canaries, tmp_path, tiny_dataset):
    (gone,) = documents_seen_late(words_dataset, control / "run", 1)
    for changes, num_steps, message in (
        ({"data.substitute": [gone]}, 120, "are to be substituted, and no window of it is left"),
        ({"data.substitute": ["<nobody>"]}, 10, "data.substitute: no document with the id <nobody>"),
        ({"data.mask": "'nowhere.txt'"}, 10, "data.mask: nowhere.txt: no such file"),
        ({"data.insert": [(canaries, "<b:60>", [(2, 0)])]}, 10, "is inserted at step 2, which is past"),
        ({"data.insert": [(canaries, "<b:60>", [(11, 0)])]}, 10, "is inserted at step 11, the run has 10"),
        ({"data.insert": [(canaries, "<b:60>", [(6, 8)])]}, 10, "row 8; the batch has the rows 0 to 7"),
        ({"data.insert": [(canaries, "<nobody>", [(6, 1)])]}, 10, "data.insert: no document with the id <nobody>"),
    ):
        shutil.copytree(control / "begun", tmp_path / "run", dirs_exist_ok=True)
        output = train_here(flags(words_dataset, tmp_path / "run", num_steps=num_steps, **changes), expect=1)
        assert message in output and len(output.strip().splitlines()) <= 3, output


def test_windows_and_steps_are_named_in_the_configuration(words_dataset):
    settings.parse(
        [],
        [
            f"data.dir = '{words_dataset}'",
            "data.seq_len = 32",
            "data.substitute = [@steps(), @some/windows()]",
            "data.mask = [@some/windows()]",
            "some/windows.numbers = [7, 12]",
            "steps.first = 5",
            "steps.last = 6",
        ],
    )
    config = settings.train_config().data
    datasets = config.open()
    stream, *_ = Plan((config.stage(datasets, ((0, 8),)),)).stages[0].streams
    edits = config.edits(datasets, config.open_inserted(datasets))
    assert edits.substitute == (StepRange(4, 6), WindowList(stream.fingerprint, (7, 12)))
    assert edits.mask == tuple(TokenSpan(stream.fingerprint, 32 * w + 1, 32 * w + 33) for w in (7, 12))
    for wrong, message in (
        (Windows([10_000]), "data.mask: window 10000, the stream has the windows 0 to 354"),
        (Windows([1], stream="web"), "data.mask: no stream 'web', expected one of ''"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(dir=str(words_dataset), seq_len=32, mask=[wrong]).edits(datasets, {})
    with pytest.raises(ValueError, match=r"steps\.last: found 4"):
        Steps(5, 4)


@pytest.mark.slow
def test_two_processes_run_an_edited_run_as_one(words_dataset, control, canaries, tmp_path):
    gone, masked = documents_seen_late(words_dataset, control / "run", 2)
    changes = {
        "data.substitute": [gone],
        "data.mask": [masked, "<a:301>"],
        "data.insert": [(canaries, "<b:60>", [(7, 3), (9, 0)])],
        "train.per_device_batch_size": 1,
    }
    for name in ("one", "two"):
        shutil.copytree(control / "begun", tmp_path / name)
    finish(start(flags(words_dataset, tmp_path / "one", num_steps=NUM_STEPS, **changes), num_devices=4))
    for process in start_two(flags(words_dataset, tmp_path / "two", num_steps=NUM_STEPS, **changes), tmp_path):
        finish(process)
    one, two = (Ledger.read(tmp_path / name).digests for name in ("one", "two"))
    assert np.array_equal(one, two)
    order = open_order(tmp_path / "two")
    # A step is masked on both, also where one of them has no masked target.
    halves = [[order.batches(rank, 2)[step].keep for rank in (0, 1)] for step in range(NUM_STEPS)]
    assert any(keep is not None and keep.all() for pair in halves for keep in pair)
    a, b = (final_state(tmp_path / name)[1] for name in ("one", "two"))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=2e-4, err_msg=name)

"""A checkpoint is of its run, step and plan, or it is not trusted; the files beside it are of one run."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest
from support.runs import make_metadata

from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.run import LedgerMark, RunData, open_run
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.seals import problem_of

STATE = {"step": jnp.int32(3), "params": {"layers": {0: jnp.arange(6.0).reshape(2, 3)}}}


def save(directory, *steps, run_id="a run"):
    manager = Checkpoints(directory)
    for step in steps:
        manager.save(STATE, make_metadata(step, run_id=run_id))
    manager.wait()
    manager.close()
    return directory / "checkpoints"


def test_a_renamed_checkpoint_is_found_out_and_the_one_before_is_used(tmp_path, caplog):
    kept = save(tmp_path, 10, 20)
    (kept / "20").rename(kept / "40")
    found = checkpoints.choose(tmp_path)
    assert found is not None and found.step == 10
    assert "it is of step 20, but its directory says 40" in caplog.text
    assert (tmp_path / "damaged_checkpoints" / "40").is_dir()


def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(tmp_path, caplog):
    mine, theirs = save(tmp_path / "mine", 10), save(tmp_path / "theirs", 20, run_id="another run")
    shutil.copytree(theirs / "20", mine / "20")
    found = checkpoints.choose(tmp_path / "mine", run_id="a run")
    assert found is not None and (found.step, found.run_id) == (10, "a run")
    assert "it is of the run another run, but this run is a run" in caplog.text
    with pytest.raises(ValueError, match="the only checkpoint is damaged, or not of this run"):
        checkpoints.choose(tmp_path / "theirs", run_id="a run")
    assert checkpoints.choose(tmp_path / "theirs") is not None  # nobody said which run it should be


@pytest.mark.parametrize("name", ["run/metadata", "digests.json"])
def test_a_file_of_another_checkpoint_does_not_fit(tmp_path, name):
    kept = save(tmp_path, 10, 20)
    shutil.copy(kept / "10" / name, kept / "20" / name)
    assert problem_of(kept / "20")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"version": 1}', '{"version": 2, "step": 20}', '{"version": 1, "files": 3}']
)
def test_digests_of_a_wrong_shape_are_named(tmp_path, content):
    kept = save(tmp_path, 10, 20)
    (kept / "20" / "digests.json").write_text(content)
    assert "digests.json cannot be read" in str(problem_of(kept / "20"))
    found = checkpoints.choose(tmp_path)
    assert found is not None and found.step == 10


def test_junk_among_the_checkpoints_is_passed_over(tmp_path):
    kept = save(tmp_path, 10)
    (kept / "99").write_text("a file")
    (kept / "041").mkdir()
    (kept / "0").mkdir()
    (kept / "1e3").mkdir()
    (kept / "notes.txt").write_text("")
    found = checkpoints.choose(tmp_path)
    assert found is not None and found.step == 10
    assert checkpoints.locate(tmp_path).name == "10"
    manager = Checkpoints(tmp_path)
    manager.save(STATE, make_metadata(20))
    manager.wait()
    manager.close()
    assert checkpoints.locate(tmp_path).name == "20"


def test_a_ledger_that_goes_on_is_this_runs_and_another_is_not(tmp_path):
    ledger = Ledger(range(100, 110))
    data = RunData(str(tmp_path), make_metadata(1).plan, {}, 40, "a run", LedgerMark.of(ledger))
    data.write()
    Ledger(range(100, 115)).write(tmp_path)
    assert len(OpenedRun(str(tmp_path)).ledger) == 15
    for other in (range(100, 109), [*range(100, 109), 7], ()):
        Ledger(other).write(tmp_path)
        with pytest.raises(ValueError, match=r"its ledger is not the one of data\.json, which knows 10 steps"):
            _ = OpenedRun(str(tmp_path)).ledger


def test_every_flipped_byte_of_data_json_is_noticed_or_changes_nothing(tmp_path):
    mark = LedgerMark.of(Ledger(range(3)))
    data = RunData(str(tmp_path), make_metadata(1).plan, {"": "/data/é"}, 40, "a run", mark)
    data.write()
    path = tmp_path / "data.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = open_run(tmp_path)
        except ValueError as error:
            assert "data.json" in str(error)
        else:
            assert found == data, place


def test_metadata_that_contradicts_itself_is_refused():
    metadata = make_metadata(3)
    for changes in ({"step": 4}, {"seq_len": 0}, {"step": 0, "ledger": Ledger()}, {"seed": "1"}, {"config": None}):
        fields = json.loads(json.dumps(dataclasses.replace(metadata, **changes).to_json() | {}))
        with pytest.raises(ValueError, match="checkpoint metadata"):
            type(metadata).from_json(fields)

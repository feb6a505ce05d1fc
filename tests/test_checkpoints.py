import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import make_metadata
from support.training_runs import assert_bitwise_equal, final_state, flags, train_here

from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.exclusive import exclusive
from gpt_pretrain.train.seals import problem_of

STATE = {"step": jnp.int32(3), "params": {"layers": {0: jnp.arange(6.0).reshape(2, 3)}}}
ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)


@pytest.fixture
def saved(tmp_path):
    """A save_dir with checkpoints of steps 10 and 20."""
    manager = Checkpoints(tmp_path)
    for step in (5, 10, 20):
        manager.save(jax.tree.map(lambda leaf, step=step: leaf + step, STATE), make_metadata(step))
    manager.wait()
    manager.close()
    return tmp_path


def same_metadata(a, b):
    return a.to_json() == b.to_json()


def data_files(checkpoint):
    return sorted(
        (path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_are_kept_and_come_back_as_they_were(saved):
    assert sorted(os.listdir(saved / "checkpoints")) == ["10", "20"]
    assert same_metadata(checkpoints.choose(saved), make_metadata(20))
    manager = Checkpoints(saved)
    restored = manager.restore(20, ABSTRACT)
    manager.close()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 20), restored, STATE)
    params = checkpoints.restore_params(saved / "checkpoints" / "10", ABSTRACT["params"])
    np.testing.assert_array_equal(params["layers"][0], STATE["params"]["layers"][0] + 10)


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "file missing", "no digests", "metadata"])
def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_is_used(saved, damage, caplog):
    newest = saved / "checkpoints" / "20"
    for path in data_files(newest)[-1:]:
        if damage == "flipped byte":
            flip_byte(path)
        elif damage == "truncated":
            os.truncate(path, path.stat().st_size - 1)
        elif damage == "file missing":
            path.unlink()
    if damage == "no digests":
        (newest / "digests.json").unlink()
    if damage == "metadata":
        (newest / "run" / "metadata").write_text(json.dumps({"step": 21}))
    assert same_metadata(checkpoints.choose(saved), make_metadata(10))
    assert "cannot be trusted" in caplog.text and str(newest) in caplog.text
    assert (saved / "damaged_checkpoints" / "20" / "state").is_dir()  # nothing is lost
    manager = Checkpoints(saved)
    manager.save(STATE, make_metadata(20))  # the way is free for it to be saved again
    manager.wait()
    manager.close()
    assert checkpoints.choose(saved).step == 20


def test_if_no_checkpoint_is_good_nothing_is_moved_and_the_run_does_not_start_anew(saved):
    for step in ("10", "20"):
        flip_byte(data_files(saved / "checkpoints" / step)[-1])
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        checkpoints.choose(saved)
    assert sorted(os.listdir(saved / "checkpoints")) == ["10", "20"]


def test_a_second_run_in_the_same_save_dir_is_refused(tmp_path):
    refused = pytest.raises(ValueError, match="another run is using it")
    with exclusive(tmp_path), refused, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_every_file_that_matters_is_covered_by_a_digest(saved):
    checkpoint = saved / "checkpoints" / "20"
    for path in data_files(checkpoint):
        if path.name in ("commit_success.txt",):
            continue
        copy = saved / "copy"
        shutil.copytree(checkpoint, copy)
        flip_byte(copy / path.relative_to(checkpoint))
        assert problem_of(copy), path
        shutil.rmtree(copy)
    assert problem_of(checkpoint) is None


def test_locate_finds_a_run_or_one_of_its_checkpoints_and_changes_nothing(saved):
    assert checkpoints.locate(saved).name == "20"
    assert checkpoints.locate(saved / "checkpoints" / "10").name == "10"
    flip_byte(data_files(saved / "checkpoints" / "20")[-1])
    assert checkpoints.locate(saved).name == "10"
    assert (saved / "checkpoints" / "20").is_dir()
    with pytest.raises(ValueError, match="cannot be trusted"):
        checkpoints.locate(saved / "checkpoints" / "20")
    with pytest.raises(ValueError, match="no good checkpoint"):
        checkpoints.locate(saved / "nothing")


def test_saving_a_step_that_is_there_already_is_an_error_not_silence(saved):
    manager = Checkpoints(saved)
    with pytest.raises(Exception, match="20"):
        manager.save(STATE, make_metadata(20))
    manager.close()


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_end(tiny_dataset, tmp_path):
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=8, **{"train.save_interval": 5})
    train_here(arguments)
    step, expected = final_state(tmp_path / "run")
    flip_byte(data_files(tmp_path / "run" / "checkpoints" / "8")[-1])
    output = train_here(arguments)
    assert "cannot be trusted" in output and "from step 5 of 8" in output
    assert step == 8 == final_state(tmp_path / "run")[0]
    assert_bitwise_equal(final_state(tmp_path / "run")[1], expected)

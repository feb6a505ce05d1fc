"""A run that is killed anywhere ends bit for bit as if it had not been."""

import random
import threading
import time

import pytest
from support.shared import made_once
from support.training_runs import assert_bitwise_equal, consumed_batches, final_state, flags, start, train_here

NUM_STEPS = 40


@pytest.fixture(scope="session")
def uninterrupted(tiny_dataset, tmp_path_factory):
    """(consumed batches, final arrays) of a run over the .bin shards that nobody disturbed."""

    def make(directory):
        bindings = {"data.format": "'bin'", "train.save_interval": 0}
        arguments = flags(tiny_dataset, directory / "run", num_steps=NUM_STEPS, **bindings)
        train_here(arguments, consumed=directory / "consumed")

    directory = made_once(tmp_path_factory, "uninterrupted", make)
    step, arrays = final_state(directory / "run")
    assert step == NUM_STEPS
    return consumed_batches(directory / "consumed"), arrays


def kill(process, checkpoints, rng, when):
    """SIGKILL `when`: "after a save", at a random moment after it; "anywhere", after some random step; "during a save",
    as soon as files of a checkpoint are being written."""
    seen = threading.Semaphore(0)

    def read():  # keeps the pipe empty, and tells of each step
        for line in process.stdout:
            if line.startswith("step"):
                seen.release()

    threading.Thread(target=read, daemon=True).start()
    pattern = {"after a save": "[0-9]", "during a save": "*.orbax-checkpoint-tmp*"}.get(when)
    if pattern:
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob(pattern)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
    else:
        for _ in range(rng.randint(1, 9)):
            assert seen.acquire(timeout=120)
    if when != "during a save":
        time.sleep(rng.random() * 0.2)
    process.kill()
    process.wait()


OFTEN = ("during a save", "after a save", "anywhere", "during a save", "anywhere")


@pytest.mark.parametrize(
    "data_format, kills",
    [
        ("bin", ("during a save", "anywhere")),
        pytest.param("bin", OFTEN, marks=pytest.mark.slow),
        pytest.param("array_record", OFTEN, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    uninterrupted, tiny_dataset, tmp_path, data_format, kills
):
    rng = random.Random(data_format)
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=NUM_STEPS, **{"data.format": repr(data_format)})
    arguments += ["--per_device_batch_size=1"]
    num_torn_saves = 0
    for when in kills:
        process = start(arguments, consumed=tmp_path / "consumed", secs_per_step=0.05, num_devices=4)
        kill(process, tmp_path / "run" / "checkpoints", rng, when)
        assert process.returncode == -9, "the run ended before it was killed"
        num_torn_saves += bool(list((tmp_path / "run" / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
    assert num_torn_saves >= 1
    output = train_here(arguments, consumed=tmp_path / "consumed")
    assert f"Done at step {NUM_STEPS} of {NUM_STEPS}" in output
    assert "Continuing" in output or len(kills) < 3

    step, arrays = final_state(tmp_path / "run")
    assert step == NUM_STEPS
    consumed, expected = uninterrupted
    assert consumed_batches(tmp_path / "consumed") == consumed
    assert list(consumed) == list(range(0, 8 * NUM_STEPS, 8))
    assert_bitwise_equal(arrays, expected)

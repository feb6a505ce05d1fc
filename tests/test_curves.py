"""Curves are read back from event files as TensorBoard reads them, whatever a kill or a bad disk left of these."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_pretrain.history import curves
from gpt_pretrain.history.curves import Curve, read_curves
from gpt_pretrain.history.spikes import spikes_of
from gpt_pretrain.train.writers.tensorboard import TensorBoardWriter


def write(logdir, steps, *, purge_step=None, offset=0.0, texts=False) -> None:
    """A session that logs two scalars at each step."""
    writer = TensorBoardWriter(logdir, purge_step=purge_step)
    for step in steps:
        writer.write_scalars(step, {"train/loss": offset + 1 / (1 + step), "train/grad_norm": offset + step})
        if texts:
            writer.write_texts(step, {"samples/1": f"text of {step} </script> é"})
    writer.close()


def the_file(logdir) -> Path:
    (path,) = Path(logdir).iterdir()
    return path


@pytest.fixture
def killed_twice(tmp_path):
    """A run that begins anew once, and is killed at step 9, after its checkpoint of step 5, and again at 8."""
    logdir = tmp_path / "tensorboard"
    write(logdir, range(1, 3), purge_step=0, offset=900.0)
    write(logdir, range(1, 10), purge_step=0)
    write(logdir, range(6, 9), purge_step=6, offset=100.0)
    write(logdir, range(6, 13, 2), purge_step=6, offset=200.0)  # with another train.log_interval
    return logdir


def test_a_run_that_was_killed_and_resumed_has_each_step_once(killed_twice):
    found = read_curves(killed_twice)
    norm = found.scalars["train/grad_norm"]
    assert norm.steps.tolist() == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    assert norm.values.tolist() == [1, 2, 3, 4, 5, 206, 208, 210, 212]
    assert [each.first_step for each in found.sessions] == [0, 0, 6, 6]
    assert [each.last_step for each in found.sessions] == [2, 9, 8, 12]
    assert not found.problems


def test_tensorboard_reads_the_same(killed_twice):
    theirs = EventAccumulator(str(killed_twice), purge_orphaned_data=True).Reload()
    ours = read_curves(killed_twice).scalars
    assert set(ours) == set(theirs.Tags()["scalars"])
    for tag, curve in ours.items():
        events = theirs.Scalars(tag)
        assert [(each.step, each.value, each.wall_time) for each in events] == list(
            zip(curve.steps.tolist(), curve.values.tolist(), curve.wall_times.tolist(), strict=True)
        )


def test_files_are_read_in_the_order_in_which_they_were_begun(tmp_path):
    for seconds, host, offset in ((99, "z", 1.0), (100, "a", 2.0)):
        write(tmp_path / str(seconds), range(1, 4), purge_step=0, offset=offset)
        name = f"events.out.tfevents.{seconds}.{host}.{seconds}000000000"
        shutil.move(the_file(tmp_path / str(seconds)), tmp_path / name)
    found = read_curves(tmp_path)
    assert found.scalars["train/grad_norm"].values.tolist() == [3, 4, 5]


def test_texts_are_there_and_a_step_that_is_written_again_is_what_was_written_last(tmp_path):
    write(tmp_path, [1, 2, 2], texts=True)
    write(tmp_path, [2, 3], offset=7.0, texts=True)
    found = read_curves(tmp_path)
    assert found.scalars["train/grad_norm"].values.tolist() == [1, 9, 10]
    assert [each.step for each in found.texts["samples/1"]] == [1, 2, 3]
    assert found.texts["samples/1"][0].text == "text of 1 </script> é"


def test_a_record_that_a_kill_cut_short_ends_the_file_quietly(tmp_path):
    write(tmp_path / "whole", range(1, 21), purge_step=0)
    whole = the_file(tmp_path / "whole").read_bytes()
    (tmp_path / "cut").mkdir()
    steps = []
    for length in range(0, len(whole), 7):
        (tmp_path / "cut" / "events.out.tfevents.1.h.1").write_bytes(whole[:length])
        found = read_curves(tmp_path / "cut")
        assert not found.problems, length
        steps.append(len(found.scalars.get("train/loss", ())))
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] >= 19


@pytest.mark.parametrize("num_steps", [10, 100])  # few and many records are checked in different ways
def test_a_damaged_record_is_left_out_and_said(tmp_path, num_steps):
    write(tmp_path, range(1, num_steps + 1), purge_step=0)
    path = the_file(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"train/loss")  # of the last step but for the record after it
    data[at + 12] ^= 64
    path.write_bytes(data)
    found = read_curves(tmp_path)
    assert len(found.scalars["train/loss"]) == num_steps - 1
    assert len(found.scalars["train/grad_norm"]) == num_steps
    assert found.problems == (f"{path}: 1 record is damaged, and not shown",)


def test_where_a_length_is_damaged_the_rest_of_the_file_is_not_shown_but_that_of_others_is(tmp_path):
    write(tmp_path, range(1, 11), purge_step=0)
    path = the_file(tmp_path)
    data = bytearray(path.read_bytes())
    starts, _, _, _ = curves._framed(bytes(data), 0)
    data[starts[11] - 12] ^= 1
    path.write_bytes(data)
    write(tmp_path, range(8, 11))
    found = read_curves(tmp_path)
    assert found.scalars["train/loss"].steps.tolist() == [1, 2, 3, 4, 5, 8, 9, 10]
    assert found.problems == (f"{path}: damaged at byte {starts[11] - 12:,}; what comes after it is not shown",)


def test_a_file_of_something_else_is_a_problem_and_no_error(tmp_path):
    (tmp_path / "events.out.tfevents.1.h.1").write_bytes(b"something else, longer than a header")
    found = read_curves(tmp_path)
    assert not found.scalars and "damaged at byte 0" in found.problems[0]
    content = b"\xff\xff\xff"  # with a right digest
    header = struct.pack("<Q", len(content))
    framed = [header, content]
    crcs = [struct.pack("<I", int(curves._masked(curves._crcs([each]))[0])) for each in framed]
    (tmp_path / "events.out.tfevents.1.h.1").write_bytes(header + crcs[0] + content + crcs[1])
    assert "is no event" in read_curves(tmp_path).problems[0]


def test_no_directory_and_no_files_are_no_curves(tmp_path):
    for found in (read_curves(tmp_path / "nothing"), read_curves(tmp_path)):
        assert not found.scalars and not found.texts and not found.sessions and not found.problems


@pytest.mark.parametrize("number", [1, 100])
def test_crc_of_the_standard_and_of_a_file_in_pieces(number, tmp_path, monkeypatch):
    assert set(curves._crcs([b"123456789"] * number).tolist()) == {0xE3069283}  # RFC 3720's polynomial
    write(tmp_path, range(1, 31), purge_step=0)
    whole = read_curves(tmp_path)
    monkeypatch.setattr(curves, "_AT_ONCE", number)
    assert read_curves(tmp_path).scalars["train/loss"].values.tolist() == whole.scalars["train/loss"].values.tolist()


def curve_of(values) -> Curve:
    steps = np.arange(1, len(values) + 1)
    return Curve(steps, steps.astype(float), np.asarray(values, float))


def test_spikes_are_found_where_they_are_and_neighbours_are_one():
    values = 3 + 0.05 * np.random.default_rng(0).normal(size=2000)
    assert spikes_of(curve_of(values), least_ratio=1.1, most=20) == []
    values[[499, 500, 505, 1400]] = 5, 6, 5, 4
    found = spikes_of(curve_of(values), least_ratio=1.1, most=20)
    assert [(each.step, each.value) for each in found] == [(501, 6.0), (1401, 4.0)]
    assert all(abs(each.usual - 3) < 0.1 for each in found)
    assert [each.step for each in spikes_of(curve_of(values), least_ratio=1.1, most=1)] == [501]
    assert [each.step for each in spikes_of(curve_of(values), least_ratio=1.9, most=20)] == [501]


@pytest.mark.parametrize("values", [[], [1.0], [5.0] * 10 + [50.0], [0.0] * 40, [float("nan")] * 40])
def test_a_short_or_flat_curve_has_no_spikes(values):
    assert spikes_of(curve_of(values), least_ratio=2.0, most=20) == []


def test_a_curve_that_falls_steeply_has_no_spikes():
    assert spikes_of(curve_of(np.exp(-np.arange(500) / 20)), least_ratio=1.1, most=20) == []

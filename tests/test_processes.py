"""Several real processes over loopback are the same run as one."""

import re

import numpy as np
import pytest
from support.shared import made_once
from support.training_runs import consumed_batches, final_state, finish, flags, start, start_two, train_here

MICROBATCH = {"train.per_device_batch_size": 1}  # 4 devices x 1 = 4 rows, twice


def finish_two(processes, expect=0):
    return [finish(process, expect=expect) for process in processes]


def windows_of(path):
    return {position: line.split()[:-1] for position, line in consumed_batches(path).items()}


def merge(first, second):
    """Rows of two processes -> rows of the batch: each microbatch has the first one's, then the second one's."""
    assert first.keys() == second.keys()
    parts = {p: [np.array(rows).reshape(2, 2) for rows in (first[p], second[p])] for p in first}
    return {p: np.concatenate(rows, axis=1).reshape(-1).tolist() for p, rows in parts.items()}


def losses_of(output):
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+)/\d+ \| loss +([\d.]+)", output)}


def arguments_of(dataset, save_dir, **changes):
    bindings = {"mesh.fsdp": 2, "train.save_interval": 0} | MICROBATCH | changes
    return flags(dataset, save_dir, num_steps=12, **bindings)


@pytest.fixture(scope="session")
def one_process(tiny_dataset, tmp_path_factory):
    """(losses, windows, final arrays) of one process with four devices."""

    def make(directory):
        output = train_here(arguments_of(tiny_dataset, directory / "run"), consumed=directory / "consumed")
        (directory / "output").write_text(output)

    directory = made_once(tmp_path_factory, "one_process", make)
    output = (directory / "output").read_text()
    return losses_of(output), windows_of(directory / "consumed"), final_state(directory / "run")[1]


def test_two_processes_consume_the_rows_of_one_and_reach_its_losses(one_process, tiny_dataset, tmp_path):
    outputs = finish_two(start_two(arguments_of(tiny_dataset, tmp_path / "run"), tmp_path))
    losses, windows, arrays = one_process
    assert "data=2 x fsdp=2, 2 process(es)" in outputs[0]
    assert not losses_of(outputs[1])  # only the first one speaks
    found = losses_of(outputs[0])
    assert found.keys() == losses.keys() and len(found) == 12
    np.testing.assert_allclose(list(found.values()), list(losses.values()), atol=2e-4)
    assert merge(*(windows_of(tmp_path / f"consumed{i}") for i in range(2))) == windows
    for name, array in final_state(tmp_path / "run")[1].items():
        np.testing.assert_allclose(array, arrays[name], rtol=2e-3, atol=2e-4, err_msg=name)


def step_4_of(process):
    """Its lines until it has made four steps."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step  4/"):
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_a_run_started_by_one_process_is_continued_by_two(one_process, tiny_dataset, tmp_path):
    # The schedule depends on the length of the run, so the run is stopped rather than made shorter.
    arguments = arguments_of(tiny_dataset, tmp_path / "run")
    process = start(arguments, consumed=tmp_path / "consumed_alone", secs_per_step=0.3, num_devices=4)
    begun = step_4_of(process)
    process.terminate()
    finish(process, expect=143)
    step, _ = final_state(tmp_path / "run")
    outputs = finish_two(start_two(arguments, tmp_path))
    assert f"from step {step} of 12" in outputs[0]
    losses, windows, _ = one_process
    for number, loss in (losses_of(begun) | losses_of(outputs[0])).items():
        assert abs(loss - losses[number]) < 2e-4
    alone = windows_of(tmp_path / "consumed_alone")
    both = merge(*(windows_of(tmp_path / f"consumed{i}") for i in range(2)))
    assert list(alone)[:step] == list(windows)[:step] and list(both) == list(windows)[step:]
    assert {p: rows for p, rows in alone.items() if p < 8 * step} | both == windows


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step_and_one_alone_goes_on(
    one_process, tiny_dataset, tmp_path
):
    arguments = arguments_of(tiny_dataset, tmp_path / "run")
    processes = start_two(arguments, tmp_path, secs_per_step=0.2)
    begun = step_4_of(processes[0])
    processes[1].terminate()
    outputs = [processes[0].communicate(timeout=120)[0], finish(processes[1], expect=143)]
    assert processes[0].returncode == 143
    stopped = int(re.search(r"Stopped and saved at step (\d+) of 12", outputs[0])[1])
    assert 4 <= stopped < 12 and final_state(tmp_path / "run")[0] == stopped
    output = train_here(arguments, consumed=tmp_path / "consumed_alone")
    assert f"from step {stopped} of 12" in output
    losses, windows, _ = one_process
    found = losses_of(begun) | losses_of(outputs[0]) | losses_of(output)
    assert found.keys() == losses.keys()
    np.testing.assert_allclose([found[step] for step in losses], list(losses.values()), atol=2e-4)
    alone = windows_of(tmp_path / "consumed_alone")
    assert list(alone) == list(windows)[stopped:] and windows | alone == windows

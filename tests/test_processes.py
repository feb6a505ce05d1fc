"""Several real processes over loopback are the same run as one."""

import re
import socket

import numpy as np
import pytest
from support.training_runs import consumed_batches, final_state, finish, flags, start

MICROBATCH = {"train.per_device_batch_size": 1}  # 4 devices x 1 = 4 rows, twice


def start_two(arguments, directory, **kwargs):
    """Two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = [*arguments, f"--coordinator_address={address}", "--num_processes=2"]
    return [
        start([*together, f"--process_id={i}"], consumed=directory / f"consumed{i}", num_devices=2, **kwargs)
        for i in range(2)
    ]


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


@pytest.fixture(scope="module")
def one_process(tiny_dataset, tmp_path_factory):
    """(losses, windows, final arrays) of one process with four devices."""
    directory = tmp_path_factory.mktemp("one")
    arguments = flags(tiny_dataset, directory / "run", num_steps=12, **MICROBATCH, **{"mesh.fsdp": 2})
    output = finish(start(arguments, consumed=directory / "consumed", num_devices=4))
    return losses_of(output), windows_of(directory / "consumed"), final_state(directory / "run")[1]


def test_two_processes_consume_the_rows_of_one_and_reach_its_losses(one_process, tiny_dataset, tmp_path):
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=12, **MICROBATCH, **{"mesh.fsdp": 2})
    outputs = finish_two(start_two(arguments, tmp_path))
    losses, windows, arrays = one_process
    assert "data=2 x fsdp=2, 2 process(es)" in outputs[0]
    assert not losses_of(outputs[1])  # only the first one speaks
    found = losses_of(outputs[0])
    assert found.keys() == losses.keys() and len(found) == 12
    np.testing.assert_allclose(list(found.values()), list(losses.values()), atol=2e-4)
    assert merge(*(windows_of(tmp_path / f"consumed{i}") for i in range(2))) == windows
    for name, array in final_state(tmp_path / "run")[1].items():
        np.testing.assert_allclose(array, arrays[name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_run_started_by_one_process_is_continued_by_two_and_by_one_again(one_process, tiny_dataset, tmp_path):
    def arguments(num_steps):
        # The schedule depends on the length of the run, so the run is stopped rather than made shorter.
        return flags(
            tiny_dataset,
            tmp_path / "run",
            num_steps=num_steps,
            **MICROBATCH,
            **{"mesh.fsdp": 2, "train.save_interval": 1},
        )

    process = start(arguments(12), consumed=tmp_path / "consumed_alone", secs_per_step=0.3, num_devices=4)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step  4/"):
            break
    process.terminate()
    finish(process, expect=143)
    step, _ = final_state(tmp_path / "run")
    outputs = finish_two(start_two(arguments(12), tmp_path))
    assert f"from step {step} of 12" in outputs[0]
    losses, windows, _ = one_process
    found = losses_of("".join(lines)) | losses_of(outputs[0])
    for number, loss in found.items():
        assert abs(loss - losses[number]) < 2e-4
    alone = windows_of(tmp_path / "consumed_alone")
    both = merge(*(windows_of(tmp_path / f"consumed{i}") for i in range(2)))
    assert list(alone)[:step] == list(windows)[:step] and list(both) == list(windows)[step:]
    assert {p: rows for p, rows in alone.items() if p < 8 * step} | both == windows


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tiny_dataset, tmp_path):
    arguments = flags(tiny_dataset, tmp_path / "run", num_steps=40, **MICROBATCH, **{"train.save_interval": 0})
    processes = start_two(arguments, tmp_path, secs_per_step=0.2)
    for line in processes[0].stdout:
        if line.startswith("step  4/"):
            break
    processes[1].terminate()
    outputs = [processes[0].communicate(timeout=120)[0], finish(processes[1], expect=143)]
    assert processes[0].returncode == 143
    stopped = int(re.search(r"Stopped and saved at step (\d+) of 40", outputs[0])[1])
    assert 4 <= stopped < 12 and final_state(tmp_path / "run")[0] == stopped

"""A process that is gone is noticed by the others, in whatever phase."""

import re
import signal
import subprocess
import sys
import time

import pytest
from support.training_runs import REPO, finish, flags, start, start_two

ALONE = """
import sys, time
from gpt_pretrain.peers import Peers
number = int(sys.argv[1])
peers = Peers(number, 3, "Start all again.")
if number == 0:
    print(peers.listen(), flush=True)
else:
    peers.connect("127.0.0.1", int(sys.argv[2]))
for line in sys.stdin:
    getattr(peers, line.strip())()
    print("said", flush=True)
    if "failed" in line:
        break
"""


@pytest.fixture
def three():
    """Three processes that do nothing but watch each other; lines on stdin are what they say."""

    def begin(*arguments):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, "-c", ALONE, *arguments], text=True, cwd=REPO, **pipes)

    processes = [begin("0")]
    port = processes[0].stdout.readline().strip()
    processes += [begin(str(number), port) for number in (1, 2)]
    time.sleep(0.5)
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_others_leave_at_once_with_a_line_when_one_is_killed(three, victim):
    three[victim].kill()
    began = time.monotonic()
    for number, process in enumerate(three):
        if number != victim:
            assert process.wait(10) == -signal.SIGKILL
            assert re.fullmatch(rf"error: process {victim} of 3 is gone: .* Start all again\.\n", process.stderr.read())
    assert time.monotonic() - began < 5


def say(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "said\n"


@pytest.mark.slow
def test_who_is_done_may_go_and_who_failed_takes_the_others_along(three):
    say(three[1], "say_done")
    three[1].stdin.close()
    assert three[1].wait(10) == 0
    time.sleep(0.5)
    assert three[0].poll() is None and three[2].poll() is None
    say(three[2], "say_failed")
    assert three[0].wait(15) == -signal.SIGKILL and "process 2 of 3 ended with an error" in three[0].stderr.read()


def test_a_process_whose_others_do_not_come_says_so(tiny_dataset, tmp_path):
    alone = ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=1", "--start_timeout_secs=1"]
    output = finish(start([*flags(tiny_dataset, tmp_path / "run"), *alone]), expect=1)
    (line,) = [each for each in output.splitlines() if each.startswith("error:")]
    assert "Process 1 of 2 has waited 1 s for the others at 127.0.0.1:1" in line and "Traceback" not in output


def test_a_training_process_that_is_killed_takes_the_other_along_within_seconds(tiny_dataset, tmp_path):
    processes = start_two(
        flags(tiny_dataset, tmp_path / "run", **{"train.per_device_batch_size": 1}), tmp_path, secs_per_step=0.1
    )
    for line in processes[0].stdout:
        if line.startswith("step  3/"):
            break
    processes[1].kill()
    began = time.monotonic()
    output = finish(processes[0], expect=-signal.SIGKILL, timeout_secs=30)
    assert time.monotonic() - began < 10
    assert "error: process 1 of 2 is gone" in output and "--process_id=0" in output and "Traceback" not in output
    processes[1].communicate()

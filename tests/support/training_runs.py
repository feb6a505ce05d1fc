"""Starting, stopping and comparing training runs: as processes of their own, or in this one."""

import contextlib
import io
import logging
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt_pretrain import main
from gpt_pretrain.train import checkpoints
from support.environment import NUM_DEVICES, xla_flags
from support.models import TINY_MODEL
from support.recorded_run import recording

REPO = pathlib.Path(__file__).parent.parent.parent
SEQ_LEN, BATCH_SIZE = 32, 8


def flags(dataset, save_dir, *, num_steps=40, **changes) -> list[str]:
    bindings = {
        "data.dir": repr(str(dataset)),
        "data.seq_len": SEQ_LEN,
        "train.save_dir": repr(str(save_dir)),
        "train.batch_size": BATCH_SIZE,
        "train.per_device_batch_size": 4,
        "train.log_interval": 1,
        "train.num_tokens": num_steps * BATCH_SIZE * SEQ_LEN,
        "train.save_interval": 5,
        "train.eval_interval": 0,
        "train.eval_tokens": 512,
        "train.writers": ("console",),
        "optimizer.warmup_steps": 3,
        "optimizer.lr": 0.01,
        **{f"model.{name}": value for name, value in TINY_MODEL.items()},
        **changes,
    }
    return [f"--gin_param={name} = {value}" for name, value in bindings.items()]


def environment(num_devices=1) -> dict[str, str]:
    """Of a process of its own; compiled programs are shared with all others."""
    path = os.pathsep.join(filter(None, [str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH")]))
    changes = {"XLA_FLAGS": xla_flags(num_devices), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    return os.environ | changes


def train_here(arguments, *, consumed=None, expect=0) -> str:
    """A run in this process, on its four devices: seconds faster than a process of its own. What it prints and logs.

    Bit by bit the run that a process of its own with four devices and one row for each at once would be.
    """
    with recording(consumed) if consumed else contextlib.nullcontext():
        return _train_here(arguments, expect)


def _train_here(arguments, expect: int) -> str:
    output = io.StringIO()
    handler, logger = logging.StreamHandler(output), logging.getLogger("gpt_pretrain")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main.main([f"--per_device_batch_size={4 // NUM_DEVICES}", *arguments])
    finally:
        logger.removeHandler(handler)
    assert status == expect, output.getvalue()
    return output.getvalue()


def start(arguments, *, consumed=None, secs_per_step=0.0, num_devices=1) -> subprocess.Popen:
    """A run as a process of its own, recorded to the file `consumed` if given; stdout and stderr as one pipe."""
    program = ["-m", "gpt_pretrain.main"]
    if consumed:
        program = ["-m", "support.recorded_run", str(consumed), str(secs_per_step)]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=environment(num_devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=REPO,
    )


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


def finish(process, *, expect=0, timeout_secs=240) -> str:
    """Waits for the process; its output. The exit status must be as expected."""
    try:
        output, _ = process.communicate(timeout=timeout_secs)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == expect, output
    return output


def consumed_batches(path) -> dict[int, str]:
    """position -> (windows, digest) line; what was consumed again after a restart must have been the same."""
    batches: dict[int, str] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        position, rest = line.split(" ", 1)
        assert batches.setdefault(int(position), rest) == rest, f"position {position} changed after a restart"
    return batches


def final_state(save_dir) -> tuple[int, dict[str, np.ndarray]]:
    """Step and every array (parameters and optimizer state) of the newest checkpoint, by name."""
    newest = checkpoints.locate(save_dir)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(newest / "state").item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        tree = checkpointer.restore(newest / "state", args=ocp.args.PyTreeRestore(restore_args=args))
    arrays, _ = jax.tree.flatten_with_path(tree)
    return int(newest.name), {jax.tree_util.keystr(path): np.asarray(array) for path, array in arrays}


def assert_bitwise_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and len(a) > 60
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name

"""The order as datasets of PyTorch, and nanoGPT's loop on it. `pytest -m exchange`."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from support.other_trainers import program
from support.training_runs import REPO

from gpt_pretrain import inspect, replay
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.order_api import open_order

pytestmark = pytest.mark.exchange


@pytest.fixture(autouse=True)
def needs_torch():  # here, as the default suite would list the whole file as skipped
    pytest.importorskip("torch")


# What nanoGPT's train.py has when it comes to its loop, and a model with the interface of its GPT.
BEFORE = """
import os, sys, time
import torch
import torch.distributed as dist
from torch.nn import functional as F

data_dir, out_dir, secs_per_step = sys.argv[1], sys.argv[2], float(sys.argv[3])
device, block_size, batch_size, gradient_accumulation_steps, max_iters, eval_interval = "cpu", 32, 4, 2, 30, 5
ddp = "RANK" in os.environ
if ddp:
    dist.init_process_group("gloo")
    gradient_accumulation_steps //= dist.get_world_size()
ddp_world_size = dist.get_world_size() if ddp else 1
master_process = not ddp or dist.get_rank() == 0

class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(257, 16)
        self.head = torch.nn.Linear(16, 257)

    def forward(self, idx, targets):
        logits = self.head(self.embedding(idx))
        time.sleep(secs_per_step)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
path, iter_num = os.path.join(out_dir, "ckpt.pt"), 0
os.makedirs(out_dir, exist_ok=True)
if os.path.exists(path):
    checkpoint = torch.load(path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    iter_num = checkpoint["iter_num"]
print("begins at", iter_num, flush=True)

def save_checkpoint(step):
    print("saves", step, flush=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": step}
    torch.save(state, path + ".partial")
    os.replace(path + ".partial", path)

if ddp:
    model = torch.nn.parallel.DistributedDataParallel(model)
"""
AFTER = """
print("modules", sorted({"jax", "flax", "grain", "gin"} & set(sys.modules)))
"""


def start(dataset, out_dir, secs_per_step=0.0, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BEFORE + program("nanoGPT") + AFTER, dataset, str(out_dir), str(secs_per_step)],
        env=os.environ | {"PYTHONPATH": str(REPO)} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def test_nanogpts_loop_on_the_page_is_killed_resumed_and_checked_without_jax(tiny_dataset, tmp_path, capsys):
    import torch

    quiet = finish(start(tiny_dataset, tmp_path / "quiet"))
    assert "begins at 0" in quiet and quiet.splitlines()[-1] == "modules []"
    process = start(tiny_dataset, tmp_path / "killed", secs_per_step=0.02)
    for line in process.stdout:
        if line == "saves 10\n":
            break
    time.sleep(0.05)  # in the middle of a later step
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    process.stdout.close()
    begins = re.search(r"begins at (\d+)", finish(start(tiny_dataset, tmp_path / "killed")))
    assert 5 <= int(begins[1]) < 30  # it may have been killed before the checkpoint had its name
    states = [torch.load(tmp_path / name / "ckpt.pt")["model"] for name in ("quiet", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    ours = open_order(tiny_dataset, seq_len=32, batch_size=8, num_steps=30)  # as gpt_pretrain.main has it
    expected = [batch.digest for batch in ours.read()]
    for name in ("quiet", "killed"):
        assert Ledger.read(tmp_path / name / "order").digests.tolist() == expected
    capsys.readouterr()
    assert replay.main([str(tmp_path / "killed" / "order"), "--verify"]) == 0
    assert "updates 1 to 30 are as the ledger says" in capsys.readouterr().out
    assert inspect.main([str(tmp_path / "killed" / "order"), "--step", "17"]) == 0


def test_two_ranks_leave_the_record_of_one(tiny_dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [start(tiny_dataset, tmp_path / "out", RANK=str(rank), **together) for rank in range(2)]
    for each in ranks:
        finish(each)
    order = open_order(tiny_dataset, seq_len=32, batch_size=8, num_steps=30)
    assert Ledger.read(tmp_path / "out" / "order").digests.tolist() == [batch.digest for batch in order.read()]


@pytest.fixture(scope="module")
def order(tiny_dataset):
    return open_order(tiny_dataset, seq_len=32, batch_size=8, num_steps=10)


def assert_same(batch, expected):
    import torch

    assert batch.tokens.dtype == torch.uint16 and batch.step_index == expected.step_index
    assert np.array_equal(batch.tokens.numpy(), expected.tokens) and batch.digest == expected.digest
    assert batch.windows.tolist() == expected.windows.tolist() and batch.rows.tolist() == expected.rows.tolist()


def test_the_state_is_the_number_of_updates_whose_batches_were_given(order):
    from torch.utils.data import DataLoader

    from gpt_pretrain.torch_data import OrderedBatches

    expected = list(order.read(rank=1, world_size=2))
    batches = OrderedBatches(order, rank=1, world_size=2)
    seen = []
    for batch in batches:
        seen.append(batch)
        if len(seen) == 4:
            break
    state = batches.state_dict()
    assert state == {"step": 4}
    again = OrderedBatches(order, rank=1, world_size=2)
    again.load_state_dict(state)
    for batch, other in zip([*seen, *DataLoader(again, batch_size=None)], expected, strict=True):
        assert_same(batch, other)
    assert again.state_dict() == {"step": 10} and list(again) == []
    for bad in ({"step": 11}, {}, {"step": "4"}):
        with pytest.raises(ValueError, match=r"step \(updates made\): found .*expected a whole number"):
            again.load_state_dict(bad)


def test_random_access_works_with_samplers_and_workers_and_refuses_what_is_not_there(order):
    from torch.utils.data import DataLoader, default_collate

    from gpt_pretrain.torch_data import OrderedBatches, RandomAccess

    batches = RandomAccess(order.batches())
    loader = DataLoader(batches, batch_size=None, sampler=range(3, 10), num_workers=2)
    for batch, expected in zip(loader, order.read(3), strict=True):
        assert_same(batch, expected)
    assert_same(pickle.loads(pickle.dumps(batches))[5], next(order.read(5)))
    with pytest.raises(IndexError):
        batches[10]
    (inputs,) = RandomAccess(order.batches().map(lambda batch: (batch.tokens[:, :-1],)))[2]
    assert inputs.shape == (8, 32)
    examples = RandomAccess(order.examples())
    together = default_collate([examples[i] for i in range(8)])
    assert np.array_equal(together.tokens.numpy(), next(order.read()).tokens)
    with pytest.raises(ValueError, match="expected num_workers=0, it reads ahead itself"):
        list(DataLoader(OrderedBatches(order), batch_size=None, num_workers=1))

"""Four CPU devices for every test, and a tiny prepared dataset."""

import os

FAST_COMPILATION = "--xla_backend_optimization_level=0"  # halves the time of the suite
os.environ["XLA_FLAGS"] = f"{FAST_COMPILATION} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["WANDB_MODE"] = "offline"

# Before the model is imported: in tests, its functions check the axes that their annotations name.
from support import annotations

annotations.check_those_of("gpt_pretrain.model")

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.model.spec import GPTConfig, ModelSpec

TINY_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 264}


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> str:
    """About 36,000 byte-tokens in several shards of both formats, made by the command that users run."""
    from data_prep import fineweb

    directory = tmp_path_factory.mktemp("tiny")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "purred"], 9000)
    lines = [" ".join(words[i : i + 30]) for i in range(0, len(words), 30)]
    text = directory / "text.jsonl"
    text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    out = directory / "prepared"
    status = fineweb.main(
        [
            f"--input={text}",
            f"--output_dir={out}",
            "--tokenizer=byte",
            "--shard_tokens=10000",
            "--val_tokens=3000",
            "--record_tokens=64",
            "--num_workers=1",
        ]
    )
    assert not status
    return str(out)


def make_spec(seq_len=8, *, platform="cpu", document_mask=False, vocab_size=257, **changes) -> ModelSpec:
    """The spec of a tiny model for byte tokens, or of a model with other settings."""
    config = GPTConfig(**(TINY_MODEL | changes))
    return config.settle(platform, seq_len=seq_len, vocab_size=vocab_size, end_of_text=256, document_mask=document_mask)


@pytest.fixture
def tiny_spec() -> ModelSpec:
    """A tiny model with 24 positions."""
    return make_spec(24)


def make_test_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh over the first data * fsdp of the four devices."""
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


class ArraySource:
    """A token source over an array."""

    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, np.uint16)
        self.num_tokens, self.dtype = len(tokens), self.tokens.dtype

    def read(self, starts, length):
        return self.tokens[np.asarray(starts)[:, None] + np.arange(length)]


def make_plan(source, *, batch_size=8, seq_len=8, **changes) -> Plan:
    """One stream, one stage."""
    stream = Stream("", "fingerprint", source.num_tokens)
    return Plan((Stage(seed=0, seq_len=seq_len, batch_sizes=((0, batch_size),), streams=(stream,), **changes),))


def make_batches(source, *, batch_size=8, seq_len=8, **changes) -> Batches:
    """Batches of that plan."""
    settings = {"vocab_size": 2**16, "num_steps": 10}
    return Batches({"": source}, make_plan(source, batch_size=batch_size, seq_len=seq_len), **(settings | changes))

"""Tiny models and meshes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt_pretrain.model.spec import GPTConfig, ModelSpec

TINY_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 264}
VOCAB_SIZE, END_OF_TEXT = 257, 256  # of the byte tokenizer


def make_spec(seq_len=8, *, platform="cpu", document_mask=False, vocab_size=VOCAB_SIZE, **changes) -> ModelSpec:
    """The spec of a tiny model for byte tokens, or of a model with other settings."""
    config = GPTConfig(**(TINY_MODEL | changes))
    return config.settle(
        platform, seq_len=seq_len, vocab_size=vocab_size, end_of_text=END_OF_TEXT, document_mask=document_mask
    )


def make_test_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh over the first data * fsdp of the four devices."""
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

"""Attention kernels against attention written out in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_pretrain.model.attention import causal_attention, splash_attention, triton_attention

NUM_TIME = 256  # the kernel of XLA cuts this into four pieces
SEGMENT_IDS = np.cumsum(np.arange(NUM_TIME)[None] % np.array([[97], [60]]) == 50, axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def inputs():
    """(q, k, v, upstream gradient) of 2 rows of 2 heads."""
    return [jax.random.normal(jax.random.key(i), (2, NUM_TIME, 2, 64), jnp.float32) for i in range(4)]


def written_out(q_BTHK, k_BTHK, v_BTHK, segment_ids_BT):
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / np.sqrt(q_BTHK.shape[-1])
    may = np.tril(np.ones((NUM_TIME, NUM_TIME), bool))
    if segment_ids_BT is not None:
        may = may & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(may, scores_BHTS, -jnp.inf)), v_BTHK)


KERNELS = {
    "xla": lambda ids: causal_attention("xla", ids),
    "splash": lambda ids: splash_attention(ids, interpret=True),
    "triton": lambda ids: triton_attention(ids, interpret=True),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["whole", "documents"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_outputs_and_gradients_of_attention_written_out(
    inputs, kernel, segment_ids, dtype, tolerance
):
    *qkv, upstream = inputs
    attend = KERNELS[kernel](None if segment_ids is None else jnp.asarray(segment_ids))
    outputs, vjp = jax.vjp(lambda *qkv: written_out(*qkv, segment_ids), *qkv)

    @jax.jit
    def found(*qkv):
        outputs, vjp = jax.vjp(lambda *qkv: attend(0, *qkv), *qkv)
        return outputs, vjp(upstream.astype(dtype))

    found_outputs, found_grads = found(*(x.astype(dtype) for x in qkv))
    for each, expected in zip((found_outputs, *found_grads), (outputs, *vjp(upstream)), strict=True):
        assert each.dtype == dtype
        error = np.linalg.norm(np.asarray(each, np.float32) - expected) / np.linalg.norm(expected)
        assert error < tolerance, error

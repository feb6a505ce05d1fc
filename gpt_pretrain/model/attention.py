"""Self-attention: the projections, and the kernels that go between them."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gpt_pretrain.model.document_mask import is_same_document
from gpt_pretrain.model.sites import Hook
from gpt_pretrain.model.spec import AttentionKernel


class Attend(Protocol):
    """What happens between the projections: queries, keys, values of one layer -> outputs."""

    def __call__(self, layer: int, q_BTHK, k_BTHK, v_BTHK) -> jax.Array: ...


def causal_attention(kernel: AttentionKernel, segment_ids_BT: Int[Array, "B T"] | None = None) -> Attend:
    """Causal self-attention; with `segment_ids_BT`, within each document only.

    Every kernel gives the same numbers. "xla" runs everywhere. "cudnn" is the fused one of NVIDIA GPUs by
    `jax.nn.dot_product_attention`: bfloat16 or float16, head dimension a multiple of 8, no `segment_ids_BT`. "triton"
    is JAX's own for these, which takes them; "splash" is the one for TPUs. JAX raises where a kernel cannot run, there
    is no fall-back.
    """
    if kernel == "splash":
        return splash_attention(segment_ids_BT)
    if kernel == "triton":
        return triton_attention(segment_ids_BT)
    if kernel == "xla":
        return xla_attention(segment_ids_BT)
    assert segment_ids_BT is None, "GPTConfig.settle refuses cudnn with a document mask"

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        del layer
        return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")

    return attend


def xla_attention(segment_ids_BT: Int[Array, "B T"] | None = None) -> Attend:
    """Causal self-attention by matrix products and a float32 softmax.

    The queries are cut into pieces, and each meets only the keys up to its end: of the T x T scores, what lies above
    the diagonal is for the most part never computed.
    """

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        del layer
        num_time, head_dim = q_BTHK.shape[1], q_BTHK.shape[3]
        pieces = range(_num_pieces(num_time))
        size = num_time // len(pieces)
        q_BHTK, k_BHTK, v_BHTK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))

        def outputs(piece):
            first, end = piece * size, (piece + 1) * size
            q, k, v = q_BHTK[:, :, first:end], k_BHTK[:, :, :end], v_BHTK[:, :, :end]
            scores_BHTS = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
            may_attend = jnp.arange(end) <= jnp.arange(first, end)[:, None]
            if segment_ids_BT is not None:
                # Made anew in every layer: XLA shares or fuses it, and remat keeps only the ids.
                may_attend = may_attend & is_same_document(segment_ids_BT[:, first:end], segment_ids_BT[:, :end])
            probs_BHTS = jax.nn.softmax(jnp.where(may_attend, scores_BHTS, -jnp.inf), axis=-1)
            return jnp.einsum("bhts,bhsk->bhtk", probs_BHTS.astype(v.dtype), v)

        return jnp.concatenate([outputs(piece) for piece in pieces], axis=2).swapaxes(1, 2)

    return attend


def _num_pieces(num_time: int) -> int:
    """At most 4, of at least 64 tokens: on CPUs 1.7 times as fast as the whole square at 256 tokens, 1.8 at 1,024."""
    return max(n for n in (1, 2, 3, 4) if num_time % n == 0 and (n == 1 or num_time // n >= 64))


def splash_attention(segment_ids_BT: Int[Array, "B T"] | None = None, *, interpret: bool = False) -> Attend:
    """Causal self-attention by JAX's Pallas kernel for TPUs, which never holds a T x T matrix and skips what lies
    above the diagonal. It works on the rows of one device: call it inside `jax.shard_map` where there are several.

    Args:
      segment_ids_BT: documents, which cost nothing: the kernel compares ids where it masks anyway.
      interpret: run it on a CPU, slowly.

    The number of tokens is a multiple of `SPLASH_BLOCKS[-1]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        del layer
        num_time, num_heads, head_dim = q_BTHK.shape[1:]
        block = next(block for block in SPLASH_BLOCKS if num_time % block == 0)
        sizes = dict.fromkeys(_SPLASH_SIZES, min(block, num_time))
        mask = splash.MultiHeadMask([splash.CausalMask((num_time, num_time))] * num_heads)
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=splash.BlockSizes(**sizes), interpret=interpret)
        scaled_BTHK = (q_BTHK.astype(jnp.float32) * head_dim**-0.5).astype(q_BTHK.dtype)
        rows_BHTK = [x.swapaxes(1, 2) for x in (scaled_BTHK, k_BTHK, v_BTHK)]
        documents = () if segment_ids_BT is None else (splash.SegmentIds(segment_ids_BT, segment_ids_BT),)
        return jnp.swapaxes(jax.vmap(kernel)(*rows_BHTK, *documents), 1, 2)  # pyright: ignore[reportArgumentType]

    return attend


def triton_attention(segment_ids_BT: Int[Array, "B T"] | None = None, *, interpret: bool = False) -> Attend:
    """Causal self-attention by JAX's Pallas kernel for NVIDIA GPUs, which never holds a T x T matrix.

    Arguments as for `splash_attention`; the number of tokens is a multiple of 128, or less.
    """
    from jax.experimental.pallas.ops.gpu import attention as triton

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        del layer
        sizes = triton.BlockSizes(
            block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
        )
        scale = q_BTHK.shape[-1] ** -0.5
        return triton.mha(
            q_BTHK, k_BTHK, v_BTHK, segment_ids_BT, scale, causal=True, block_sizes=sizes, interpret=interpret
        )

    return attend  # pyright: ignore[reportReturnType]


SPLASH_BLOCKS = (512, 256, 128)  # tokens of a tile, the largest first that divides the sequence
_SPLASH_SIZES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)


def causal_attention_with_dropout(
    rate: float, rng: jax.Array, segment_ids_BT: Int[Array, "B T"] | None = None
) -> Attend:
    """`causal_attention` with dropout on its probabilities, written out: no fused kernel has it."""

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        num_time, head_dim = q_BTHK.shape[1], q_BTHK.shape[-1]
        scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32)
        scores_BHTS = scores_BHTS / jnp.sqrt(head_dim)
        may_attend = jnp.tril(jnp.ones((num_time, num_time), bool))
        if segment_ids_BT is not None:
            may_attend = may_attend & is_same_document(segment_ids_BT, segment_ids_BT)
        probs_BHTS = jax.nn.softmax(jnp.where(may_attend, scores_BHTS, -jnp.inf), axis=-1)
        probs_BHTS = dropout(probs_BHTS, rate, jax.random.fold_in(rng, layer))
        return jnp.einsum("bhts,bshk->bthk", probs_BHTS.astype(v_BTHK.dtype), v_BTHK)

    return attend


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Inverted dropout; no operation at all without `rng` or with rate 0."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention: one projection to q, k, v, one back."""

    def __init__(self, n_embd: int, n_head: int, *, make_linear: Callable, residual_std: float):
        self.n_head = n_head
        self.qkv = make_linear("attention", "qkv", n_embd, 3 * n_embd)
        self.out = make_linear("attention", "out", n_embd, n_embd, std=residual_std)

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: int, attend: Attend, hook: Hook) -> Float[Array, "B T D"]:
        def split_heads(y_BTD):
            return y_BTD.reshape(*y_BTD.shape[:2], self.n_head, -1)

        q_BTHK, k_BTHK, v_BTHK = map(split_heads, self.qkv.parts(x_BTD, 3))
        y_BTHK = attend(layer, q_BTHK, k_BTHK, v_BTHK)
        return self.out(hook("attn_heads", layer, y_BTHK.reshape(x_BTD.shape)))

"""The transformer block of GPT-2: attention, MLP, and the hook sites around them."""

from collections.abc import Callable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gpt_pretrain.model.document_mask import is_same_document
from gpt_pretrain.model.perturbations import Hook

AttentionKernel = Literal["xla", "cudnn"]


class Attend(Protocol):
    """What happens between the projections: queries, keys, values of one layer -> outputs."""

    def __call__(self, layer: int, q_BTHK, k_BTHK, v_BTHK) -> jax.Array: ...


def causal_attention(kernel: AttentionKernel, segment_ids_BT: jax.Array | None = None) -> Attend:
    """Causal self-attention by `jax.nn.dot_product_attention`; with `segment_ids_BT`, within each document only.

    `kernel="cudnn"` is the fused one of NVIDIA GPUs: bfloat16 or float16, head dimension a multiple of 8, no
    `segment_ids_BT`; JAX raises where it cannot run, there is no fall-back.
    """
    assert kernel != "cudnn" or segment_ids_BT is None, "GPTConfig.resolve(document_mask=True) refuses cudnn"

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        del layer
        # The (B, 1, T, T) mask is made anew in every layer: XLA shares or fuses it, and remat keeps only the ids.
        mask_BHTS = None if segment_ids_BT is None else is_same_document(segment_ids_BT)
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTHK, v_BTHK, mask=mask_BHTS, is_causal=True, implementation=kernel
        )

    return attend


def causal_attention_with_dropout(rate: float, rng: jax.Array, segment_ids_BT: jax.Array | None = None) -> Attend:
    """`causal_attention` with dropout on its probabilities, written out: no fused kernel has it."""

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        num_time, head_dim = q_BTHK.shape[1], q_BTHK.shape[-1]
        scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32) / jnp.sqrt(
            head_dim
        )
        may_attend = jnp.tril(jnp.ones((num_time, num_time), bool))
        if segment_ids_BT is not None:
            may_attend = may_attend & is_same_document(segment_ids_BT)
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
        self.qkv = make_linear(n_embd, 3 * n_embd)
        self.out = make_linear(n_embd, n_embd, std=residual_std)

    def __call__(self, x_BTD, layer: int, attend: Attend):
        def split_heads(y_BTD):
            return y_BTD.reshape(*y_BTD.shape[:2], self.n_head, -1)

        q_BTHK, k_BTHK, v_BTHK = map(split_heads, jnp.split(self.qkv(x_BTD), 3, axis=-1))
        y_BTHK = attend(layer, q_BTHK, k_BTHK, v_BTHK)
        return self.out(y_BTHK.reshape(x_BTD.shape))


class MLP(nnx.Module):
    """Two linear layers, four times as wide inside, with GPT-2's tanh form of GELU."""

    def __init__(self, n_embd: int, *, make_linear: Callable, residual_std: float):
        self.up = make_linear(n_embd, 4 * n_embd)
        self.down = make_linear(4 * n_embd, n_embd, std=residual_std)

    def __call__(self, x_BTD):
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=True))


class Block(nnx.Module):
    """Pre-LayerNorm residual block. Its three `hook` calls are the hook sites, and the only ones."""

    def __init__(self, n_embd, n_head, rate, *, make_norm: Callable, make_linear: Callable, residual_std):
        self.rate = rate
        self.ln_1 = make_norm(n_embd)
        self.attention = Attention(n_embd, n_head, make_linear=make_linear, residual_std=residual_std)
        self.ln_2 = make_norm(n_embd)
        self.mlp = MLP(n_embd, make_linear=make_linear, residual_std=residual_std)

    def __call__(self, x_BTD, layer: int, *, attend: Attend, hook: Hook, rng: jax.Array | None):
        rngs = (None, None) if rng is None else jax.random.split(jax.random.fold_in(rng, layer))
        x_BTD = hook("block_in", layer, x_BTD)
        attn_BTD = hook("attn_out", layer, self.attention(self.ln_1(x_BTD), layer, attend))
        x_BTD = x_BTD + dropout(attn_BTD, self.rate, rngs[0])
        mlp_BTD = hook("mlp_out", layer, self.mlp(self.ln_2(x_BTD)))
        return x_BTD + dropout(mlp_BTD, self.rate, rngs[1])

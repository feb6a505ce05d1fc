"""The transformer layer of GPT-2: attention, MLP, and the hook sites around them."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from gpt_pretrain.model.attention import Attend, Attention, dropout
from gpt_pretrain.model.linear import gelu_of_sum
from gpt_pretrain.model.sites import Hook


class MLP(nnx.Module):
    """Two linear layers, four times as wide inside, with GPT-2's tanh form of GELU."""

    def __init__(self, n_embd: int, *, make_linear: Callable, residual_std: float):
        self.up = make_linear("mlp", "up", n_embd, 4 * n_embd)
        self.down = make_linear("mlp", "down", 4 * n_embd, n_embd, std=residual_std)

    def __call__(self, x_BTD: Float[Array, "B T D"], layer: int, hook: Hook) -> Float[Array, "B T D"]:
        (h_BTF,) = self.up.products(x_BTD, 1)
        return self.down(hook("mlp_hidden", layer, gelu_of_sum(h_BTF, self.up.bias[...])))


class Layer(nnx.Module):
    """Pre-LayerNorm residual layer, with the hook sites of `sites.py`."""

    def __init__(self, n_embd, n_head, rate, *, make_norm: Callable, make_linear: Callable, residual_std):
        self.rate = rate
        self.ln_1 = make_norm(n_embd)
        self.attention = Attention(n_embd, n_head, make_linear=make_linear, residual_std=residual_std)
        self.ln_2 = make_norm(n_embd)
        self.mlp = MLP(n_embd, make_linear=make_linear, residual_std=residual_std)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], layer: int, *, attend: Attend, hook: Hook, rng: jax.Array | None
    ) -> Float[Array, "B T D"]:
        rngs = (None, None) if rng is None else jax.random.split(jax.random.fold_in(rng, layer))
        x_BTD = hook("block_in", layer, x_BTD)
        attn_BTD = hook("attn_out", layer, self.attention(self.ln_1(x_BTD), layer, attend, hook))
        x_BTD = hook("stream_mid", layer, x_BTD + dropout(attn_BTD, self.rate, rngs[0]))
        mlp_BTD = hook("mlp_out", layer, self.mlp(self.ln_2(x_BTD), layer, hook))
        return hook("stream_out", layer, x_BTD + dropout(mlp_BTD, self.rate, rngs[1]))

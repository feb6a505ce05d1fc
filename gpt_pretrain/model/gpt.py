"""GPT: embeddings, layers, and a head tied to the token embedding; and what others need to know of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gpt_pretrain.model.attention import Attend, causal_attention, causal_attention_with_dropout, dropout
from gpt_pretrain.model.document_mask import Documents
from gpt_pretrain.model.layers import Layer
from gpt_pretrain.model.linear import PRODUCT, Linear, Multiply, multiply
from gpt_pretrain.model.sites import Hook, no_hook
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.axes import EMBD, HEADS, MLP, POSITIONS, VOCAB

# The axes of the parameters with more than one, by the end of their path. `parallel/partition.py` splits them.
_AXES = {
    ("token_embedding", "embedding"): (VOCAB, EMBD),
    ("position_embedding", "embedding"): (POSITIONS, EMBD),
    ("attention", "qkv", "kernel"): (EMBD, HEADS),
    ("attention", "out", "kernel"): (HEADS, EMBD),
    ("mlp", "up", "kernel"): (EMBD, MLP),
    ("mlp", "down", "kernel"): (MLP, EMBD),
}


REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda run: run,
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT)),
    "full": jax.checkpoint,
}


class GPT(nnx.Module):
    """GPT-2: pre-LayerNorm, learned positions, biases everywhere, tanh-GELU, tied head.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. Weights are normal with
    standard deviation 0.02, those that write into the residual stream 0.02 / sqrt(2 n_layer).
    """

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs, multiply: Multiply = multiply):
        self.spec = spec
        dtype = jnp.dtype(spec.dtype)

        def make_linear(*path_and_sizes, std=0.02):
            *path, n_in, n_out = path_and_sizes
            return Linear(tuple(path), n_in, n_out, std=std, multiply=multiply, rngs=rngs)

        def make_embed(num, std):
            return nnx.Embed(num, spec.n_embd, embedding_init=nnx.initializers.normal(std), rngs=rngs)

        make_norm = functools.partial(nnx.LayerNorm, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.token_embedding = make_embed(spec.padded_vocab_size, 0.02)
        self.position_embedding = make_embed(spec.num_positions, 0.02)
        self.layers = nnx.List(
            [
                Layer(
                    spec.n_embd,
                    spec.n_head,
                    spec.dropout,
                    make_norm=make_norm,
                    make_linear=make_linear,
                    residual_std=0.02 * (2 * spec.n_layer) ** -0.5,
                )
                for _ in range(spec.n_layer)
            ]
        )
        self.ln_f = make_norm(spec.n_embd)

    @property
    def head_VD(self) -> jax.Array:
        """The output embedding: the token embedding, once more."""
        return self.token_embedding.embedding[...]

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        start: Any = 0,
        documents: Documents | None = None,
        attend: Attend | None = None,
        hook: Hook = no_hook,
        around: Callable[[Attend, Any], Attend] | None = None,
        rng: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Token ids -> final hidden states in the compute dtype (the head is the loss's business).

        Args:
          tokens_BT: integer ids.
          start: position of the first token; not 0 when generating with a cache.
          documents: attention stays within each, positions count from its first token; without, the tokens
            are one sequence.
          attend: stands in for causal attention over `tokens_BT` (a key-value cache does), and knows the documents
            itself: of `documents` only the positions are used.
          hook: called at every hook site.
          around: (attend, segment ids or None) -> what stands in for it: somebody who watches.
          rng: key for dropout; None means no dropout.
        """
        num_time, num_positions = tokens_BT.shape[1], self.position_embedding.num_embeddings
        assert num_time <= num_positions, f"{num_time} tokens, {num_positions} positions"
        segment_ids_BT = None if documents is None else documents.segment_ids_BT
        rate = self.spec.dropout
        rng_embed = rng_layers = None
        if rng is not None and rate:
            rng_embed, rng_attend, rng_layers = jax.random.split(rng, 3)
            attend = attend or causal_attention_with_dropout(rate, rng_attend, segment_ids_BT)
        attend = attend or causal_attention(self.spec.attention, segment_ids_BT)
        attend = around(attend, segment_ids_BT) if around else attend

        positions = start + jnp.arange(num_time) if documents is None else documents.positions_BT
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions)
        x_BTD = hook("embeddings", None, dropout(x_BTD.astype(self.spec.dtype), rate, rng_embed))
        for index, layer in enumerate(self.layers):
            run = functools.partial(layer, layer=index, attend=attend, hook=hook, rng=rng_layers)
            x_BTD = REMAT[self.spec.remat](run)(x_BTD)
        return hook("final_norm", None, self.ln_f(x_BTD))

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states, padded columns included."""
        return jnp.einsum("btd,vd->btv", x_BTD, self.head_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)


def init_params(spec: ModelSpec, rng: jax.Array) -> dict:
    """Fresh parameters as a pure nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(spec, rngs=nnx.Rngs(params=rng)), nnx.Param))


def model_of(spec: ModelSpec, multiply: Multiply = multiply) -> Callable[[dict], GPT]:
    """`params -> model`, for use under `jax.jit` and `jax.grad`. `multiply` stands in for the linear layers' own."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: GPT(spec, rngs=nnx.Rngs(0), multiply=multiply)))
    return functools.partial(nnx.merge, graph)


def num_params(spec: ModelSpec) -> int:
    """Elements of all parameters, padded vocabulary included."""
    shapes = jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs of forward and backward for one token: 6 (N - position embedding) + 12 L d T.

    The convention of PaLM's appendix B, as nanoGPT and llm.c count: attention as if it were not causal,
    recomputation not counted.
    """
    num_multiplied = num_params(spec) - spec.num_positions * spec.n_embd
    return 6.0 * num_multiplied + 12.0 * spec.n_layer * spec.n_embd * seq_len


def cache_shape(spec: ModelSpec, batch: int, length: int) -> tuple[int, int, int, int]:
    """Of one layer's keys, and of its values, for generation: (batch, length, heads, head dimension)."""
    return batch, length, spec.n_head, spec.n_embd // spec.n_head


def logical_axes(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Axes of a parameter of several axes, by the names on its path, also below the optimizer's; None if unknown.

    >>> logical_axes(("layers", "3", "mlp", "up", "kernel"))
    ('embd', 'mlp')
    """
    return next((axes for end, axes in _AXES.items() if path[-len(end) :] == end), None)


def parts_of(tree: dict) -> dict[str, Any]:
    """A tree like the parameters, cut into what is looked at apart: each layer ("layers/3"), each other part."""
    parts = {f"layers/{layer}": part for layer, part in tree["layers"].items()}
    return parts | {name: part for name, part in tree.items() if name != "layers"}

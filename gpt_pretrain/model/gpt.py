"""GPT: embeddings, blocks, and a head tied to the token embedding."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gpt_pretrain.model.document_mask import Documents
from gpt_pretrain.model.layers import (
    Attend,
    Block,
    causal_attention,
    causal_attention_with_dropout,
    dropout,
)
from gpt_pretrain.model.perturbations import Hook, Perturbation, no_hook


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of the model and how it computes.

    Attributes:
      n_layer, n_head, n_embd: GPT-2's letters for depth, heads and width; n_head divides n_embd.
      vocab_size: columns of the embedding. Those beyond the tokenizer's vocabulary are padding for
        speed (50,257 -> 50,304) and never predicted.
      block_size: positions the model has; None for as many as the training sequences are long. A run whose
        sequences are to become longer later sets it to the longest; shorter ones use the front of the table.
      dropout: rate after embedding, attention probabilities, and both sublayers.
      dtype: of the computation; "auto" is bfloat16 on accelerators and float32 on CPU. Parameters and
        optimizer state are float32 always.
      attention: "cudnn", "xla", or "auto": cuDNN's on NVIDIA GPUs in bfloat16 without dropout or document
        mask, else XLA's.
      remat: recompute each block in the backward pass, for memory.
      perturbations: what happens at the hook sites; see `perturbations.py`.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50304
    block_size: int | None = None
    dropout: float = 0.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: bool = False
    perturbations: Sequence[Perturbation] = ()

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: found {getattr(self, name)}, expected at least 1")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"model.block_size: found {self.block_size}, expected None or at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}: "
                f"{self.n_embd} / {self.n_head} = {self.n_embd / self.n_head:.2f}. Change one of them."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout: found {self.dropout}, expected a rate in [0, 1)")
        for name, known in (("dtype", ("auto", "bfloat16", "float32")), ("attention", ("auto", "xla", "cudnn"))):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name}: found {getattr(self, name)!r}, expected one of {known}")
        for perturbation in self.perturbations:
            perturbation.check_layers(self.n_layer)

    @property
    def shape(self) -> dict[str, int]:
        """What a checkpoint's parameters depend on, together with `num_positions`."""
        return {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}

    def num_positions(self, seq_len: int) -> int:
        """Rows of the position table of a model that is trained on sequences of `seq_len` tokens.

        Raises:
          ValueError: they are longer than `block_size`.
        """
        if self.block_size is None:
            return seq_len
        if seq_len > self.block_size:
            raise ValueError(
                f"data.seq_len={seq_len} is longer than model.block_size={self.block_size}, the positions the model "
                "has. Use a shorter data.seq_len or a larger model.block_size (which makes another model)."
            )
        return self.block_size

    def resolve(self, platform: str, *, document_mask: bool = False) -> "GPTConfig":
        """Settles every "auto" for a platform (see `sharding.platform_of`); raises if the request cannot run.

        `document_mask`: attention will be kept within documents, which cuDNN's cannot do.
        """
        dtype = self.dtype if self.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
        attention = self.attention
        if attention == "auto":
            fused = platform == "gpu" and dtype == "bfloat16" and self.dropout == 0.0 and not document_mask
            attention = "cudnn" if fused else "xla"
        elif attention == "cudnn" and (dtype != "bfloat16" or self.dropout or platform != "gpu"):
            raise ValueError(
                f"model.attention='cudnn' needs an NVIDIA GPU (Ampere or newer), bfloat16 and no dropout; found "
                f"platform {platform!r}, dtype {dtype!r}, dropout {self.dropout}. Use model.attention='xla'."
            )
        elif attention == "cudnn" and document_mask:
            # JAX passes cuDNN no segment ids. `mask=` becomes a dense (B, 1, T, T) bias, whose gradient JAX 0.10 asks
            # for too (jax-ml/jax issue 30593: it has that for one sequence at a time) and 0.12 does not. The packed
            # layout (0.10, 0.12) and score_mod (0.12) are private to JAX. None of these was run on a GPU.
            raise ValueError(
                "model.attention='cudnn' cannot keep attention within documents: JAX's interface to it has no "
                "segment ids. Use model.attention='xla' (or 'auto'), or train without the document mask."
            )
        return dataclasses.replace(self, dtype=dtype, attention=attention)


class GPT(nnx.Module):
    """GPT-2: pre-LayerNorm, learned positions, biases everywhere, tanh-GELU, tied head.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. Weights are normal with
    standard deviation 0.02, those that write into the residual stream 0.02 / sqrt(2 n_layer).
    """

    def __init__(self, config: GPTConfig, seq_len: int, *, rngs: nnx.Rngs):
        """`config` must be resolved (no "auto" left); the table has `config.num_positions(seq_len)` positions."""
        self.config = config
        dtype = jnp.dtype(config.dtype)

        def make_linear(n_in, n_out, std=0.02):
            init = nnx.initializers.normal(std)
            return nnx.Linear(n_in, n_out, kernel_init=init, dtype=dtype, rngs=rngs)

        def make_embed(num, std):
            return nnx.Embed(num, config.n_embd, embedding_init=nnx.initializers.normal(std), rngs=rngs)

        make_norm = functools.partial(nnx.LayerNorm, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.token_embedding = make_embed(config.vocab_size, 0.02)
        self.position_embedding = make_embed(config.num_positions(seq_len), 0.02)
        self.blocks = nnx.List(
            [
                Block(
                    config.n_embd,
                    config.n_head,
                    config.dropout,
                    make_norm=make_norm,
                    make_linear=make_linear,
                    residual_std=0.02 * (2 * config.n_layer) ** -0.5,
                )
                for _ in range(config.n_layer)
            ]
        )
        self.ln_f = make_norm(config.n_embd)

    @property
    def head_VD(self) -> jax.Array:
        """The output embedding: the token embedding, once more."""
        return self.token_embedding.embedding[...]

    def __call__(
        self,
        tokens_BT,
        *,
        start=0,
        documents: Documents | None = None,
        attend: Attend | None = None,
        hook: Hook = no_hook,
        rng: Any = None,
    ) -> jax.Array:
        """Token ids -> final hidden states x_BTD in the compute dtype (the head is the loss's business).

        Args:
          tokens_BT: integer ids.
          start: position of the first token; not 0 when generating with a cache.
          documents: attention stays within each, positions count from its first token; without, the tokens
            are one sequence.
          attend: stands in for causal attention over `tokens_BT` (a key-value cache does).
          hook: called at every hook site.
          rng: key for dropout; None means no dropout.
        """
        num_time, num_positions = tokens_BT.shape[1], self.position_embedding.num_embeddings
        assert num_time <= num_positions, f"{num_time} tokens, {num_positions} positions"
        assert documents is None or attend is None, "`attend` would have to know the documents itself"
        segment_ids_BT = None if documents is None else documents.segment_ids_BT
        rate = self.config.dropout
        rng_embed = rng_blocks = None
        if rng is not None and rate:
            rng_embed, rng_attend, rng_blocks = jax.random.split(rng, 3)
            attend = attend or causal_attention_with_dropout(rate, rng_attend, segment_ids_BT)
        kernel = self.config.attention
        attend = attend or causal_attention(kernel, segment_ids_BT)  # pyright: ignore[reportArgumentType]

        positions = start + jnp.arange(num_time) if documents is None else documents.positions_BT
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions)
        x_BTD = dropout(x_BTD.astype(self.config.dtype), rate, rng_embed)
        for layer, block in enumerate(self.blocks):
            run = functools.partial(block, layer=layer, attend=attend, hook=hook, rng=rng_blocks)
            x_BTD = (jax.checkpoint(run) if self.config.remat else run)(x_BTD)
        return self.ln_f(x_BTD)

    def logits(self, x_BTD) -> jax.Array:
        """Float32 logits of hidden states, padded columns included."""
        return jnp.einsum("btd,vd->btv", x_BTD, self.head_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)


def init_params(config: GPTConfig, seq_len: int, rng: jax.Array) -> dict:
    """Fresh parameters as a pure nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, seq_len, rngs=nnx.Rngs(params=rng)), nnx.Param))


def graph_of(config: GPTConfig, seq_len: int) -> nnx.GraphDef:
    """The model without its parameters: `nnx.merge(graph, params)` puts them together. No memory is used."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, seq_len, rngs=nnx.Rngs(0))))[0]

"""Norms of parameters and gradients a layer, and statistics of the activations at the hook sites."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gpt_pretrain.model.gpt import parts_of


def describe_activation(x_BTD: Float[Array, "B T D"]) -> dict[str, jax.Array]:
    """Mean, standard deviation, RMS and largest magnitude over all elements, in float32."""
    x = x_BTD.astype(jnp.float32)
    mean, mean_square = x.mean(), (x * x).mean()
    std = jnp.sqrt(jnp.maximum(mean_square - mean * mean, 0.0))
    return {"mean": mean, "std": std, "rms": jnp.sqrt(mean_square), "max_abs": jnp.abs(x).max()}


def recording(hook: Callable, into: dict) -> Callable:
    """A hook that also writes the statistics of what `hook` returns to `into["activations/3/attn_out/rms"]`."""

    def record(site, layer, x_BTD):
        x_BTD = hook(site, layer, x_BTD)
        for name, value in describe_activation(x_BTD).items():
            into[f"activations/{layer}/{site}/{name}"] = value
        return x_BTD

    return record


def norms_per_part(tree: dict, prefix: str) -> dict[str, jax.Array]:
    """Global norm of each layer and of each other part of a tree like the parameters."""
    return {f"{prefix}/{name}": optax.global_norm(part) for name, part in parts_of(tree).items()}

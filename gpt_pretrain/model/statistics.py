"""Norms of parameters and gradients a layer, and statistics of the activations at the hook sites."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gpt_pretrain.model.gpt import parts_of


class Moments(NamedTuple):
    """Of all elements of an activation, float32 scalars. Those of several devices can be put together."""

    mean: jax.Array
    mean_square: jax.Array
    max_abs: jax.Array

    @classmethod
    def of(cls, x_BTD: Float[Array, "B T D"]) -> "Moments":
        x = x_BTD.astype(jnp.float32)
        return cls(x.mean(), (x * x).mean(), jnp.abs(x).max())

    def described(self) -> dict[str, jax.Array]:
        """Mean, standard deviation, RMS and largest magnitude."""
        std = jnp.sqrt(jnp.maximum(self.mean_square - self.mean * self.mean, 0.0))
        return {"mean": self.mean, "std": std, "rms": jnp.sqrt(self.mean_square), "max_abs": self.max_abs}


def of_all_devices(moments: Moments, axes: Sequence[str]) -> Moments:
    """Inside `jax.shard_map`: of activations whose rows lie on all devices along these axes, as many on each."""
    return Moments(
        jax.lax.pmean(moments.mean, axes), jax.lax.pmean(moments.mean_square, axes), jax.lax.pmax(moments.max_abs, axes)
    )


def recording(hook: Callable, into: dict[str, Moments]) -> Callable:
    """A hook that also writes the moments of what `hook` returns to `into["activations/3/attn_out"]`."""

    def record(site, layer, x_BTD):
        x_BTD = hook(site, layer, x_BTD)
        into[f"activations/{layer}/{site}"] = Moments.of(x_BTD)
        return x_BTD

    return record


def described(record: dict[str, Moments]) -> dict[str, jax.Array]:
    """{"activations/3/attn_out/rms": ..., ...}"""
    return {f"{site}/{name}": value for site, each in record.items() for name, value in each.described().items()}


def norms_per_part(tree: dict, prefix: str) -> dict[str, jax.Array]:
    """Global norm of each layer and of each other part of a tree like the parameters."""
    return {f"{prefix}/{name}": optax.global_norm(part) for name, part in parts_of(tree).items()}

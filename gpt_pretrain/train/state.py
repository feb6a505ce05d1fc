"""Everything a step changes, created in sharded form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt_pretrain.model.gpt import GPTConfig, init_params
from gpt_pretrain.parallel.mesh import param_shardings


class TrainState(NamedTuple):
    """Parameters and optimizer state as pure trees of arrays, and the number of updates made (int32 scalar)."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def state_shardings(config: GPTConfig, seq_len: int, transform, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state; computes shapes only."""
    return param_shardings(jax.eval_shape(_init(config, seq_len, transform), jax.random.key(0)), mesh)


def create(config: GPTConfig, seq_len: int, transform, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state. No device ever holds more than its own part of it."""
    shardings = state_shardings(config, seq_len, transform, mesh)
    return jax.jit(_init(config, seq_len, transform), out_shardings=shardings)(jax.random.key(seed))


def abstract(config: GPTConfig, seq_len: int, transform, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings: what a checkpoint is restored into."""
    shapes = jax.eval_shape(_init(config, seq_len, transform), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )


def _init(config: GPTConfig, seq_len: int, transform: optax.GradientTransformation):
    def init(rng) -> TrainState:
        params = init_params(config, seq_len, rng)
        return TrainState(jnp.int32(0), params, transform.init(params))

    return init

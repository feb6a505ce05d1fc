"""Everything a step changes, created in sharded form."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt_pretrain.model.gpt import init_params, logical_axes
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import param_shardings


class TrainState(NamedTuple):
    """Parameters and optimizer state as pure trees of arrays, and the number of updates made (int32 scalar)."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def abstract_state(spec: ModelSpec, transform: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into. Uses no memory."""
    shapes = jax.eval_shape(_init(spec, transform), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh, logical_axes),
    )


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every array of a state, or of an abstract one."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def fresh_state(spec: ModelSpec, transform: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first update. No device ever holds more than its own part of it."""
    shardings = shardings_of(abstract_state(spec, transform, mesh))
    return jax.jit(_init(spec, transform), out_shardings=shardings)(jax.random.key(seed))


def _init(spec: ModelSpec, transform: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    def init(rng) -> TrainState:
        params = init_params(spec, rng)
        return TrainState(jnp.int32(0), params, transform.init(params))

    return init

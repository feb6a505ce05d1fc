"""Interventions done: the hook that changes activations or gradients as `interventions.py` says.

Their strengths, and the vectors that they add, are inputs of the compiled function: one program serves every dose.
Random numbers follow from (seed, step, intervention, site, layer, row of the global batch), so they do not depend on
how a batch is cut into microbatches and over devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.sites import SITES, Hook, no_hook

_STREAM = 0x696E7476  # keeps these random numbers apart from those of dropout


class Doses(NamedTuple):
    """What a compiled function is told of the interventions of one step; I of them.

    Attributes:
      step: of the update, from 1; int32.
      strengths_I: float32.
      vectors: of each, its vector in float32, or None.
    """

    step: jax.Array | np.ndarray
    strengths_I: jax.Array | np.ndarray
    vectors: tuple[jax.Array | np.ndarray | None, ...]


def doses_at(step: int, interventions: Sequence[Intervention]) -> tuple[Doses, ...]:
    """Of the update `step`, counted from 1: what a compiled step takes beside its batch, if anything."""
    if not interventions:
        return ()
    strengths_I = np.array([each.strength_at(step) for each in interventions], np.float32)
    return (Doses(np.int32(step), strengths_I, tuple(map(_vector, interventions))),)  # pyright: ignore


def _vector(intervention: Intervention) -> np.ndarray | None:
    assert not isinstance(intervention.vector, str), "files are read before"
    return None if intervention.vector is None else np.array(intervention.vector, np.float32)


class Rows(NamedTuple):
    """Rows of a batch that one device holds.

    Attributes:
      tokens_BT: the model's inputs.
      numbers_B: which rows of the global batch these are, from 0; int32.
      start: position of the first token; a traced number, or one a row, where tokens come one after the other.
      seed: of the run; see `checks.key_seed`.
      positions_BT: of the tokens in their windows, where they do not follow `start`.
    """

    tokens_BT: jax.Array
    numbers_B: jax.Array
    start: jax.Array | int
    seed: int
    positions_BT: jax.Array | None = None


class _Traced(NamedTuple):
    """The arrays among what a function is told: see `Context`."""

    step: jax.Array
    strength: jax.Array
    vector: jax.Array | None
    keys_B: jax.Array
    choosing_keys_B: jax.Array
    tokens_BT: jax.Array
    rows_B: jax.Array
    start: jax.Array | int
    positions_BT: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a function of the user's is told of the place and the time.

    Attributes:
      site, layer: where; None is of no layer.
      step: of the update, from 1; a traced int32.
      strength: of this step; a traced float32. Where it is 0, the function's result is not used.
      rng_B: a key for each row, which follows from the seed, the step and the row's number in the global batch; and
        from the position, where tokens come one after the other.
      tokens_BT: the model's inputs.
      rows_B: which rows of the global batch these are, from 0.
      vector: the intervention's, if it has one.
      axes: of the mesh, over which the rows of a batch lie; none where they are all here.
    """

    site: str
    layer: int | None
    step: jax.Array
    strength: jax.Array
    rng_B: jax.Array
    tokens_BT: jax.Array
    rows_B: jax.Array
    vector: jax.Array | None
    axes: tuple[str, ...] = ()

    def draw(self, sampler: Callable, shape: Sequence[int]) -> jax.Array:
        """`sampler(key, shape)`, such as `jax.random.normal`, row by row, each by its own key."""
        return jax.vmap(lambda key: sampler(key, tuple(shape[1:])))(self.rng_B)


def make_hook(
    interventions: Sequence[Intervention],
    n_layer: int,
    n_head: int,
    doses: Doses | None,
    rows: Rows | None,
    *,
    axes: tuple[str, ...] = (),
    in_evaluation: bool = False,
) -> Hook:
    """A hook that does the interventions in their order.

    Args:
      doses, rows: None only where there are none.
      axes: inside `jax.shard_map`, those over which the rows of a batch lie.
      in_evaluation: only those that are meant for it.
    """
    active = [(i, each) for i, each in enumerate(interventions) if each.in_evaluation or not in_evaluation]
    if not active:
        return no_hook
    assert doses is not None and rows is not None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(rows.seed), _STREAM), doses.step)

    def keys_of(key):
        return jax.vmap(functools.partial(jax.random.fold_in, key))(rows.numbers_B)

    def drawing_keys_of(key):
        keys_B = keys_of(key)
        if isinstance(rows.start, int):
            return keys_B
        # Each token is drawn for as the first one of its call: without its place all would get the same noise.
        return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(rows.start, rows.numbers_B.shape))

    def hook(site: str, layer: int | None, x_BTD) -> jax.Array:
        for index, each in active:
            if not each.applies(site, layer, n_layer):
                continue
            own_key = jax.random.fold_in(key, index)
            place = (0 if layer is None else layer) * len(SITES) + SITES.index(site)
            traced = _Traced(
                step=jnp.asarray(doses.step),
                strength=jnp.asarray(doses.strengths_I)[index],
                vector=doses.vectors[index],  # pyright: ignore
                keys_B=drawing_keys_of(jax.random.fold_in(own_key, place + 1)),
                choosing_keys_B=keys_of(own_key),  # of the rows: the same ones at every place
                tokens_BT=rows.tokens_BT,
                rows_B=rows.numbers_B,
                start=rows.start,
                positions_BT=rows.positions_BT,
            )
            where = _Where(each, site, layer, n_head, axes)
            change = _with_gradient_changed if each.on_gradients else _changed
            x_BTD = jnp.asarray(change(where, x_BTD, traced))  # pyright: ignore[reportArgumentType]
        return x_BTD

    return hook


class _Where(NamedTuple):
    """What is known of one intervention at one place before anything is traced."""

    intervention: Intervention
    site: str
    layer: int | None
    n_head: int
    axes: tuple[str, ...]


def _changed(where: _Where, x_BTD: Float[Array, "B T D"], traced: _Traced) -> Float[Array, "B T D"]:
    """The activation, or its gradient, with the intervention done: itself, bit by bit, where the strength is 0."""
    each = where.intervention
    ctx = Context(
        site=where.site,
        layer=where.layer,
        step=traced.step,
        strength=traced.strength,
        rng_B=traced.keys_B,
        tokens_BT=traced.tokens_BT,
        rows_B=traced.rows_B,
        vector=traced.vector,
        axes=where.axes,
    )
    y_BTD = each.function(x_BTD, ctx) if each.function else _DO[each.kind](x_BTD, ctx, each)  # pyright: ignore
    if y_BTD.shape != x_BTD.shape:
        raise ValueError(
            f"intervention {each.kind} at {where.site} of layer {where.layer} returned the shape {y_BTD.shape}, "
            f"expected {x_BTD.shape}"
        )
    return jnp.where((traced.strength != 0) & _chosen(where, x_BTD, traced), y_BTD.astype(x_BTD.dtype), x_BTD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient_changed(where: _Where, x_BTD, traced: _Traced) -> jax.Array:
    """The activation as it is; in the backward pass its gradient is changed."""
    del where, traced
    return x_BTD


_with_gradient_changed.defvjp(
    lambda where, x_BTD, traced: (x_BTD, traced),
    lambda where, traced, dx_BTD: (_changed(where, dx_BTD, traced), None),
)


def _chosen(where: _Where, x_BTD, traced: _Traced) -> Bool[Array, "b t d"]:
    """Which elements are meant; the axes along which that is the same for all have length 1."""
    each, channels = where.intervention, where.intervention.channels
    num_time, width = x_BTD.shape[1:]
    chosen = jnp.ones((1, 1, 1), bool)
    if each.heads is not None:
        channels = np.arange(width).reshape(where.n_head, -1)[list(each.heads)].ravel()
    if channels is not None:
        chosen = jnp.asarray(np.isin(np.arange(width), channels))[None, None]
    if each.positions is not None:
        positions = traced.positions_BT
        if positions is None:
            positions = jnp.atleast_2d(jnp.asarray(traced.start)[..., None] + jnp.arange(num_time))
        chosen = chosen & ((positions >= each.positions[0]) & (positions < each.positions[1]))[..., None]
    if each.token_ids is not None:
        chosen = chosen & jnp.isin(traced.tokens_BT, jnp.array(each.token_ids))[..., None]
    if isinstance(fraction := each.rows, float):
        is_drawn_B = jax.vmap(lambda key: jax.random.bernoulli(key, fraction))(traced.choosing_keys_B)
        chosen = chosen & is_drawn_B[:, None, None]
    elif each.rows is not None:
        chosen = chosen & jnp.isin(traced.rows_B, jnp.array(each.rows))[:, None, None]
    return chosen


def _noise(x, ctx: Context, each: Intervention):
    return x + (ctx.strength * ctx.draw(jax.random.normal, x.shape)).astype(x.dtype)


def _relative_noise(x, ctx: Context, each: Intervention):
    rms_BT1 = jnp.sqrt(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32)).mean(-1, keepdims=True))
    return x + (ctx.strength * rms_BT1 * ctx.draw(jax.random.normal, x.shape)).astype(x.dtype)


def _scale(x, ctx: Context, each: Intervention):
    return x * (1 + ctx.strength).astype(x.dtype)


def _zero(x, ctx: Context, each: Intervention):
    return _blend(x, jnp.zeros_like(x), ctx.strength)


def _mean(x, ctx: Context, each: Intervention):
    if ctx.vector is None:
        mean_D = jax.lax.stop_gradient(x).astype(jnp.float32).mean((0, 1))
        mean_D = jax.lax.pmean(mean_D, ctx.axes) if ctx.axes else mean_D
    else:
        mean_D = ctx.vector
    return _blend(x, mean_D, ctx.strength)


def _add(x, ctx: Context, each: Intervention):
    assert ctx.vector is not None
    return x + (ctx.strength * ctx.vector).astype(x.dtype)


def _clip(x, ctx: Context, each: Intervention):
    return _blend(x, jnp.clip(x, -each.limit, each.limit), ctx.strength)  # pyright: ignore


def _round(x, ctx: Context, each: Intervention):
    whole = jax.lax.stop_gradient(x).astype(jnp.float32)
    num_steps = 2 ** (each.bits - 1) - 1  # pyright: ignore  # on each side of 0
    size_BT1 = jnp.maximum(jnp.abs(whole).max(-1, keepdims=True) / num_steps, jnp.finfo(jnp.float32).tiny)
    rounded = _blend(whole, jnp.round(whole / size_BT1) * size_BT1, ctx.strength)
    return rounded.astype(x.dtype) + (x - jax.lax.stop_gradient(x))


def _dropout(x, ctx: Context, each: Intervention):
    keep = ctx.draw(lambda key, shape: jax.random.bernoulli(key, 1 - ctx.strength, shape), x.shape)
    return jnp.where(keep, x / (1 - ctx.strength).astype(x.dtype), 0)


def _blend(x, other, strength: Float[Array, ""]):
    """Strength 0 is x, 1 is the other, exactly."""
    return (1 - strength).astype(x.dtype) * x + (strength * other).astype(x.dtype)


_DO: dict[str, Callable] = {
    "noise": _noise,
    "relative_noise": _relative_noise,
    "scale": _scale,
    "zero": _zero,
    "mean": _mean,
    "add": _add,
    "clip": _clip,
    "round": _round,
    "dropout": _dropout,
}


def numbers_of_rows(index: Int[Array, ""] | int, num_rows: int, axes: tuple[str, ...] = ()) -> Int[Array, " B"]:
    """Which rows of the global batch a device's rows of microbatch `index` are: rows lie in order over the devices
    along `axes`, inside `jax.shard_map`."""
    first = jnp.asarray(index, jnp.int32)
    if axes:
        first = first * jax.lax.axis_size(axes) + jax.lax.axis_index(axes)
    return first * num_rows + jnp.arange(num_rows, dtype=jnp.int32)

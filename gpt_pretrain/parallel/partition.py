"""Which axis of which array is split over which axis of the mesh: one table, by the names of logical axes."""

from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_pretrain.parallel import axes

# The axes of the mesh that may split a logical axis. An axis that is not listed stays whole.
RULES: dict[str, tuple[str, ...]] = {
    axes.BATCH: ("data", "fsdp"),
    axes.SEQ: (),
    axes.VOCAB: ("fsdp",),
    axes.POSITIONS: ("fsdp",),
    axes.EMBD: ("fsdp",),
    axes.HEADS: ("fsdp",),
    axes.MLP: ("fsdp",),
}

Axes = tuple[str | None, ...]
AxesOf = Callable[[tuple[str, ...]], Axes | None]
"""Names on the path to an array -> its logical axes; None where the model does not know it."""


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For (num_microbatches, microbatch, ...) arrays: rows over all devices."""
    return NamedSharding(mesh, P(None, RULES[axes.BATCH]))


def param_spec(shape: tuple[int, ...], logical_axes: Axes | None, mesh: Mesh) -> P:
    """How one parameter, or an array of the optimizer's state that looks like it, is split.

    Each axis of the mesh splits the longest of the axes that its rule allows and that it divides. Vectors are small
    and stay whole on every device, and so does what the model does not know.
    """
    if logical_axes is None or len(logical_axes) != len(shape) or len(shape) < 2:
        return P()
    parts: list[str | None] = [None] * len(shape)
    for mesh_axis in mesh.axis_names:
        size = mesh.shape[mesh_axis]
        allowed = [
            axis
            for axis, name in enumerate(logical_axes)
            if parts[axis] is None and mesh_axis in RULES.get(name or "", ()) and shape[axis] % size == 0
        ]
        if size > 1 and allowed:
            parts[max(allowed, key=lambda axis: shape[axis])] = mesh_axis
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def param_shardings(tree: Any, mesh: Mesh, axes_of: AxesOf) -> Any:
    """Shardings for a tree of parameters, or of optimizer state that holds trees like it (anything with shapes)."""

    def sharding(path, leaf) -> NamedSharding:
        return NamedSharding(mesh, param_spec(leaf.shape, axes_of(names_of(path)), mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gathered(params: Any, mesh: Mesh | None, axes_of: AxesOf, with_axes: Collection[str]) -> Any:
    """Makes parameters that have one of `with_axes` whole on every device for a forward pass, as FSDP does with each
    weight.

    For tables that are looked up: left to itself, XLA keeps a split one where it is and moves the activations of the
    whole batch instead.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params

    def gather(path, leaf):
        is_wanted = set(axes_of(names_of(path)) or ()) & set(with_axes)
        return jax.lax.with_sharding_constraint(leaf, replicated(mesh)) if is_wanted else leaf

    return jax.tree_util.tree_map_with_path(gather, params)


def sum_over_devices(loss: Callable, mesh: Mesh) -> Callable:
    """`loss(x_BTD, head_VD, targets_BT) -> sums`, computed by each device on its own rows, then added up.

    Inside, nothing is communicated: the head's gradient is reduced once, not once a chunk.
    """
    rows, whole = P(RULES[axes.BATCH]), P()

    def local(x_BTD, head_VD, targets_BT):
        return jax.tree.map(lambda total: total[None], loss(x_BTD, head_VD, targets_BT))

    each = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows, check_vma=False)
    return lambda *args: jax.tree.map(lambda totals: totals.sum(), each(*args))


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A path of JAX's through a tree as the names on it."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

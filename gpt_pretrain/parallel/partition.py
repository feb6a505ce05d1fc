"""Which axis of which array is split over which axis of the mesh: one table, by the names of logical axes."""

from collections.abc import Callable
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

BATCH_AXES = RULES[axes.BATCH]

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


def param_specs(tree: Any, mesh: Mesh, axes_of: AxesOf) -> Any:
    """How a tree of parameters is split, or of optimizer state that holds trees like it (anything with shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: param_spec(leaf.shape, axes_of(names_of(path)), mesh), tree
    )


def param_shardings(tree: Any, mesh: Mesh, axes_of: AxesOf) -> Any:
    """`param_specs` on the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), param_specs(tree, mesh, axes_of), is_leaf=lambda x: isinstance(x, P)
    )


def split_axes(spec: P) -> list[tuple[int, str]]:
    """The dimensions of an array that are split, each with the axis of the mesh.

    >>> split_axes(P(None, "fsdp"))
    [(1, 'fsdp')]
    """
    return [(dimension, axis) for dimension, axis in enumerate(spec) if axis is not None]


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A path of JAX's through a tree as the names on it."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

"""Weights that are split over devices, while a step uses them.

Between steps, each device holds its part of every matrix along `fsdp`, in float32. A step makes matrices whole in the
compute dtype, in one of two ways:

"per_step"  all of them once, before the first microbatch. Gradients stay on each device until the last microbatch,
            and cross the network once. This takes 2 bytes a parameter for the weights in bfloat16 and 4 for the
            gradients, on every device.
"per_use"   each one where it multiplies, in the forward and again in the backward pass, and is dropped after it. Its
            gradient is summed and split at once, in every microbatch. No device holds more than a few whole matrices.

Over `data`, gradients cross the network once a step in both. What is here runs inside `jax.shard_map`: arrays are this
device's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data_prep.pages.numbers import size_text
from gpt_pretrain.model.gpt import init_params, logical_axes, num_params
from gpt_pretrain.model.linear import Multiply, multiply
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import BATCH_AXES, names_of, param_specs, split_axes


class Wire(NamedTuple):
    """In which dtype what crosses the network.

    Attributes:
      gather: weights.
      reduce: gradients. They are added up in it, and stored in float32.
      most_at_once: so many devices add up and split together, more of them in stages.
    """

    gather: str
    reduce: str
    most_at_once: int | None = None


def check_that_all_are_split(spec: ModelSpec, mesh: Mesh) -> None:
    """ValueError where a matrix would stay whole on every device, as `mesh.fsdp` divides none of its axes."""
    fsdp, shapes = mesh.shape["fsdp"], _shapes(spec)
    whole = _whole_matrices(shapes, mesh)
    if not whole:
        return
    others = [size for size in range(fsdp - 1, 0, -1) if fsdp % size == 0]
    fitting = next(size for size in others if all(any(n % size == 0 for n in shape) for shape in whole.values()))
    name, shape = max(whole.items(), key=lambda each: math.prod(each[1]))
    quotients = ", ".join(f"{n} / {fsdp} = {n / fsdp:.2f}" for n in shape)
    num_whole, num_all = sum(map(math.prod, whole.values())), num_params(spec)
    raise ValueError(
        f"mesh.fsdp={fsdp} divides no axis of {len(whole)} matrices, such as {name} of {' x '.join(map(str, shape))} "
        f"({quotients}): {num_whole / num_all:.0%} of the {num_all:,} parameters would stay whole on every device, "
        f"which takes {size_text(12 * num_whole)} with AdamW's state instead of {size_text(12 * num_whole // fsdp)}. "
        f"Use mesh.fsdp={fitting}, the largest divisor of {fsdp} that splits all of them, and leave mesh.data = -1."
    )


def _whole_matrices(shapes: Any, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    if mesh.shape["fsdp"] == 1:
        return {}
    specs = param_specs(shapes, mesh, logical_axes)
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    split = [bool(split_axes(spec)) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)]
    return {
        ".".join(names_of(path)): leaf.shape
        for (path, leaf), is_split in zip(leaves, split, strict=True)
        if len(leaf.shape) >= 2 and not is_split
    }


def _shapes(spec: ModelSpec) -> Any:
    return jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0))


class SplitWeights:
    """How one model's parameters are split over a mesh, and made whole.

    Attributes:
      specs: a tree like the parameters.
      num_parts: into so many they are split.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, wire: Wire):
        self.specs = param_specs(_shapes(spec), mesh, logical_axes)
        self.num_parts = mesh.shape["fsdp"]
        self._wire = wire
        paths, _ = jax.tree_util.tree_flatten_with_path(self.specs, is_leaf=_is_spec)
        # Those of all layers are alike, so the end of a path says it.
        self._by_end = {names_of(path)[-3:]: each for path, each in paths}

    def whole(self, params: Any) -> Any:
        """All parameters, matrices in the dtype in which they travel. Not to be differentiated."""

        def whole(shard, spec: P):
            return _gathered(shard.astype(self._wire.gather), spec) if shard.ndim >= 2 else shard

        return jax.tree.map(whole, params, self.specs)

    def reduced(self, grads: Any, *, are_split: bool) -> Any:
        """Sums over all devices of gradients, each split like its parameter.

        Args:
          are_split: they come from `multiply` and `with_whole_tables`, which have summed and split those that are
            split. Else they are like what `whole` gives.
        """

        def reduced(grad, spec: P):
            split = {axis for _, axis in split_axes(spec)}
            if split and not are_split:
                grad = _summed_and_split(grad, spec, self._wire)
            return _summed(grad, [axis for axis in BATCH_AXES if axis not in split], self._wire.reduce)

        return jax.tree.map(reduced, grads, self.specs)

    @property
    def multiply(self) -> Multiply:
        """Stands in for the linear layers' own: takes this device's part of a weight, and holds it whole only while it
        multiplies."""

        def with_whole(x_BTI, kernel, path, num_parts=1):
            spec = self._by_end[path]
            if not split_axes(spec):
                return multiply(x_BTI, kernel, path, num_parts)

            # Under jax.checkpoint the backward pass gathers the weight again.
            @jax.checkpoint
            def product(x_BTI, shard):
                return multiply(x_BTI, self._gathered_with_gradient(shard, spec), path, num_parts)

            return product(x_BTI, kernel)

        return with_whole

    def with_whole_tables(self, params: dict) -> dict:
        """The embeddings made whole, for one microbatch. The two parts of a tied table's gradient are added first."""
        tables = {name: part for name, part in params.items() if "embedding" in part}
        whole = jax.tree.map(self._gathered_with_gradient, tables, {name: self.specs[name] for name in tables})
        return params | whole

    def _gathered_with_gradient(self, shard, spec: P):
        """Whole and in float32, with the values that the travelling dtype has."""
        wire = self._wire

        @jax.custom_vjp
        def gather(shard):
            return _gathered(shard.astype(wire.gather), spec).astype(shard.dtype)

        def gradient(_, grad):
            # Without the barrier XLA for TPUs moves the sums of all microbatches behind their loop, where whole
            # gradients wait for them.
            return (jax.lax.optimization_barrier(_summed_and_split(grad, spec, wire)),)

        gather.defvjp(lambda shard: (gather(shard), None), gradient)
        return gather(shard) if split_axes(spec) else shard


def on_each_device(function: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map`; `function` itself where there is one device."""
    if mesh is None or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gathered(shard, spec: P):
    for dimension, axis in split_axes(spec):
        shard = jax.lax.all_gather(shard, axis, axis=dimension, tiled=True)
    return shard


def _summed_and_split(grad, spec: P, wire: Wire):
    part = grad.astype(wire.reduce)
    for dimension, axis in split_axes(spec):
        for groups in reduction_stages(jax.lax.axis_size(axis), wire.most_at_once):
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)
    return part.astype(grad.dtype)


def reduction_stages(num_devices: int, most_at_once: int | None) -> list[list[list[int]] | None]:
    """In which groups devices add up and split, one stage after the other; None is all of them.

    Each stage leaves a device with the part that its group shares, so that at the end each has the part of its number:
    the digits of a number, the highest first. As many bytes cross the network as in one stage.

    >>> reduction_stages(4, 2)
    [[[0, 2], [1, 3]], [[0, 1], [2, 3]]]
    """
    sizes = _factors(num_devices, most_at_once or num_devices)
    if len(sizes) == 1:
        return [None]
    numbers = np.arange(num_devices).reshape(sizes)
    return [np.moveaxis(numbers, axis, -1).reshape(-1, size).tolist() for axis, size in enumerate(sizes)]


def _factors(number: int, most: int) -> list[int]:
    """Factors of at most `most` where there are such: as few as there can be, and near one another."""
    fitting = [factor for factor in range(2, most + 1) if number % factor == 0]
    if number <= most or not fitting:
        return [number]
    num_factors = math.ceil(math.log(number, most) - 1e-9)
    factor = min(fitting, key=lambda each: abs(each - number ** (1 / num_factors)))
    return [factor, *_factors(number // factor, most)]


def _summed(grad, axes: list[str], dtype: str):
    return jax.lax.psum(grad.astype(dtype), axes).astype(grad.dtype) if axes else grad


def _is_spec(each: Any) -> bool:
    return isinstance(each, P)

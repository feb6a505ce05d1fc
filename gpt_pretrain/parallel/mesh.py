"""The device mesh, and which axis of which array is split over it.

Two mesh axes: `data` holds copies of the parameters, `fsdp` splits them and the optimizer's state; each weight is made
whole on every device while it is used (XLA decides for how long). Every batch is split over both.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh over all devices of all processes; -1 for one of them means "the rest"."""
    num_devices = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh: found data={data}, fsdp={fsdp}; expected counts, at most one of them -1")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if rest:
        sizes[rest[0]] = num_devices // known
    if sizes["data"] * sizes["fsdp"] != num_devices:
        raise ValueError(
            f"mesh: data={data} x fsdp={fsdp} does not make the {num_devices} devices that are there. "
            f"Leave mesh.data = -1 and choose mesh.fsdp among the divisors of {num_devices}."
        )
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((sizes["data"], sizes["fsdp"]), BATCH_AXES, axis_types=auto)


def platform_of(device) -> str:
    """ "cpu", "tpu", "gpu" for NVIDIA's from Ampere on, "other gpu" for the rest."""
    if device.platform != "gpu":
        return device.platform
    is_recent = "cuda" in device.client.platform_version.lower() and float(device.compute_capability) >= 8.0
    return "gpu" if is_recent else "other gpu"


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For (num_microbatches, microbatch, ...) arrays: rows over all devices."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def param_shardings(tree, mesh: Mesh):
    """Shardings for a tree of parameters or optimizer state (anything with shapes).

    The rule: the longest axis that the `fsdp` size divides is split, in matrices only; vectors are
    small and stay whole on every device.
    """
    fsdp = mesh.shape["fsdp"]

    def spec(leaf) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or len(leaf.shape) < 2 or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))

    return jax.tree.map(spec, tree)


def gather_embeddings(params: dict, mesh: Mesh | None) -> dict:
    """Makes the embedding tables whole on every device for a forward pass, as FSDP does with each weight.

    Left to itself, XLA keeps a split table where it is and moves the activations of the whole batch instead.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params
    tables = {name: params[name] for name in ("token_embedding", "position_embedding")}
    return params | jax.lax.with_sharding_constraint(tables, replicated(mesh))


def sum_over_devices(loss: Callable, mesh: Mesh) -> Callable:
    """`loss(x_BTD, head_VD, targets_BT) -> sums`, computed by each device on its own rows, then added up.

    Inside, nothing is communicated: the head's gradient is reduced once, not once a chunk.
    """
    rows, whole = P(BATCH_AXES), P()

    def local(x_BTD, head_VD, targets_BT):
        return jax.tree.map(lambda total: total[None], loss(x_BTD, head_VD, targets_BT))

    each = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows, check_vma=False)
    return lambda *args: jax.tree.map(lambda totals: totals.sum(), each(*args))


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How a global batch lies on the devices: `num_microbatches` parts of `microbatch` rows each."""

    num_microbatches: int
    microbatch: int
    num_devices: int

    @property
    def batch_size(self) -> int:
        return self.num_microbatches * self.microbatch

    @property
    def per_device(self) -> int:
        return self.microbatch // self.num_devices


def batch_layout(batch_size: int, per_device_batch_size: int, num_devices: int) -> BatchLayout:
    """Accumulates gradients when the batch does not fit the devices at once: 512, 16, 8 -> 4 x 128."""
    if min(batch_size, per_device_batch_size) < 1:
        raise ValueError(
            f"train.batch_size={batch_size} and train.per_device_batch_size={per_device_batch_size} must be at least 1"
        )
    at_once = per_device_batch_size * num_devices
    if batch_size <= at_once:
        if batch_size % num_devices:
            raise ValueError(
                f"train.batch_size={batch_size} cannot be split over {num_devices} devices: {batch_size} / "
                f"{num_devices} = {batch_size / num_devices:.2f} rows each. Use a multiple of {num_devices}."
            )
        return BatchLayout(1, batch_size, num_devices)
    if batch_size % at_once:
        raise ValueError(
            f"train.batch_size={batch_size} is not a whole number of microbatches: train.per_device_batch_size="
            f"{per_device_batch_size} x {num_devices} devices = {at_once} rows at once, {batch_size} / {at_once} = "
            f"{batch_size / at_once:.2f}. Use a batch_size that is a multiple of {at_once}, or change "
            "per_device_batch_size."
        )
    return BatchLayout(batch_size // at_once, at_once, num_devices)

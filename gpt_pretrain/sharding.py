"""The device mesh, and which axis of which array is split over it.

Two mesh axes: `data` holds copies of the parameters, `fsdp` splits them (ZeRO-3). Every batch is split
over both.
"""

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

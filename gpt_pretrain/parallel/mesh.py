"""The device mesh.

Two axes: `data` holds copies of the parameters, `fsdp` splits them and the optimizer's state; each weight is made
whole on every device while it is used (XLA decides for how long). Every batch is split over both.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt_pretrain import checks
from gpt_pretrain.parallel.devices import Device

MESH_AXES = ("data", "fsdp")


def make_mesh(devices: Sequence[Device], *, data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh over these devices; -1 for one of them means "the rest"."""
    sizes = {}
    for name, size in (("data", data), ("fsdp", fsdp)):
        is_rest = size == -1 and not isinstance(size, bool)
        sizes[name] = -1 if is_rest else checks.whole_number(f"mesh.{name}", size, least=1, most=checks.MOST_ROWS)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError("mesh: found mesh.data=-1 and mesh.fsdp=-1, expected at most one of them -1")
    num_devices = len(devices)
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if rest:
        sizes[rest[0]] = num_devices // known
    if sizes["data"] * sizes["fsdp"] != num_devices:
        raise ValueError(
            f"mesh: data={data} x fsdp={fsdp} does not make the {num_devices} devices that are there. "
            f"Leave mesh.data = -1 and choose mesh.fsdp among the divisors of {num_devices}."
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((sizes["data"], sizes["fsdp"]), MESH_AXES, axis_types=auto, devices=devices)

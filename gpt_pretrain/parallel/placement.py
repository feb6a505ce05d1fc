"""Where the rows of a batch lie: on which device, in which microbatch."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import NamedSharding


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
    """Accumulates gradients when the batch does not fit the devices at once.

    >>> batch_layout(512, 16, 8)
    BatchLayout(num_microbatches=4, microbatch=128, num_devices=8)
    """
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


def fitting_per_device(batch_sizes: Sequence[int], num_devices: int, most: int = 16) -> int:
    """The most rows that a device may hold at once, so that batches of these sizes can be cut into microbatches.

    >>> fitting_per_device([512], 8), fitting_per_device([24], 1), fitting_per_device([4], 1)
    (16, 12, 16)
    """

    def fits(size: int, per_device: int) -> bool:
        return size % num_devices == 0 and (size <= per_device * num_devices or size % (per_device * num_devices) == 0)

    fitting = [each for each in range(1, most + 1) if all(fits(size, each) for size in batch_sizes)]
    return max(fitting, default=most)


class Placement:
    """Which rows of a batch lie where, for batches of any size.

    Args:
      sharding: of (num_microbatches, microbatch, ...) arrays.
      per_device_batch_size: rows that a device holds at once; a larger batch is cut into microbatches.
    """

    def __init__(self, sharding: NamedSharding, per_device_batch_size: int):
        self.sharding = sharding
        self._per_device_batch_size = per_device_batch_size

    @lru_cache(maxsize=64)  # noqa: B019 - there is one for the whole run
    def layout(self, batch_size: int) -> BatchLayout:
        """How a batch is cut. ValueError where it cannot be split over the devices."""
        return batch_layout(batch_size, self._per_device_batch_size, self.sharding.mesh.size)

    @lru_cache(maxsize=64)  # noqa: B019
    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of the global batch that this process's devices hold: int64 (num_microbatches, local rows)."""
        layout = self.layout(batch_size)
        return np.arange(layout.num_microbatches)[:, None] * layout.microbatch + self._local(batch_size)

    @lru_cache(maxsize=64)  # noqa: B019
    def _local(self, batch_size: int) -> np.ndarray:
        """Rows of a microbatch that this process's devices hold, ascending."""
        layout = self.layout(batch_size)
        shape = (layout.num_microbatches, layout.microbatch)
        held = self.sharding.addressable_devices_indices_map(shape).values()
        return np.unique(np.concatenate([np.arange(layout.microbatch)[index[1]] for index in held if index]))

    def to_devices(self, local: np.ndarray, batch_size: int) -> jax.Array:
        """This process's rows -> the global array (num_microbatches, microbatch, ...), each row in its place."""
        layout, rows = self.layout(batch_size), self._local(batch_size)
        assert local.shape[:2] == (layout.num_microbatches, len(rows)), (local.shape, layout)

        def shard(index):
            wanted = np.arange(layout.microbatch)[index[1]]
            return local[:, np.searchsorted(rows, wanted)]

        shape = (local.shape[0], layout.microbatch, *local.shape[2:])
        return jax.make_array_from_callback(shape, self.sharding, shard)

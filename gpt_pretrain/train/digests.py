"""Digests of the parts of a batch that several processes hold, put together."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def add_up_digests(partial: np.ndarray) -> np.ndarray:
    """Digests of this process's rows -> digests of the whole batches: uint64 (n,), the same on every process."""
    if jax.process_count() == 1 or not len(partial):
        return partial
    halves = partial.view(np.uint32).reshape(-1, 2)  # JAX has no 64-bit integers unless asked
    everybody = np.asarray(multihost_utils.process_allgather(halves))
    return np.ascontiguousarray(everybody).view(np.uint64)[..., 0].sum(axis=0, dtype=np.uint64)

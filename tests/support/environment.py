"""What JAX is told before it is imported: by conftest for the tests, by `training_runs` for processes of their own."""

import os
import tempfile

FAST_COMPILATION = "--xla_backend_optimization_level=0"  # halves the time of the suite
NUM_DEVICES = 4

_cache: tempfile.TemporaryDirectory | None = None  # of compiled programs; removed at the end of the session


def set_up() -> None:
    """Four CPU devices; compiled programs are shared by all workers of the session and the processes they start."""
    global _cache
    os.environ["XLA_FLAGS"] = xla_flags(NUM_DEVICES)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["WANDB_MODE"] = "offline"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that starts them
        _cache = tempfile.TemporaryDirectory(prefix="jax-cache-", ignore_cleanup_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def xla_flags(num_devices: int) -> str:
    return f"{FAST_COMPILATION} --xla_force_host_platform_device_count={num_devices}"

"""What has to be settled before JAX starts: logging, memory, the other processes."""

import ctypes
import glob
import importlib.util
import logging
import os
import sys
import threading
import traceback

from data_prep.pages.terminal import print_anything

_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def configure() -> None:
    """Call before JAX is imported."""
    print_anything()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("gpt_pretrain").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and CLU narrate every step at INFO
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _keep_freed_pages()


def _keep_freed_pages() -> None:
    """Where JAX will run on the CPU, tells glibc to keep memory that was freed.

    XLA allocates its temporary buffer anew at every step; mapping and clearing those pages costs up to a third of the
    time.
    """
    has_accelerator = any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
    if not sys.platform.startswith("linux") or (has_accelerator and os.environ.get("JAX_PLATFORMS") != "cpu"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**28), (m_arena_max, 1)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):  # another libc: only speed is lost
        return


def connect(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the run, if there are any."""
    import jax

    if coordinator_address is None and not _in_a_cluster():
        return
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def leave(*, show_traceback: bool, patience_secs: float = 10.0) -> None:
    """Call after an error. Where this process alone had it, the others wait for us in a computation, and JAX at our
    exit for them: both for minutes. Ended at once, the first process takes the others with it.
    """
    import jax

    if not jax.distributed.is_initialized():
        return
    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # ends where all had the error
    together.start()
    together.join(patience_secs)
    if together.is_alive():
        if show_traceback:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _in_a_cluster() -> bool:
    """Whether a launcher whose variables JAX knows started several of us."""
    env = os.environ
    return (
        int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # set by srun, not in an allocation's shell
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1  # GKE
        or bool(importlib.util.find_spec("libtpu") and glob.glob("/dev/accel*"))  # TPU VMs: JAX asks their metadata
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "JAX_COORDINATOR_ADDRESS" in env
    )

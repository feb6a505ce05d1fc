"""What has to be settled before JAX starts: logging, memory, the other processes."""

import atexit
import contextlib
import ctypes
import errno
import faulthandler
import glob
import importlib.util
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any

from data_prep.pages.terminal import print_anything
from data_prep.store.open_files import no_file_left, raise_max_open_files
from gpt_pretrain import peers

_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def configure() -> None:
    """Call before JAX is imported."""
    print_anything()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("gpt_pretrain").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and CLU narrate every step at INFO
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    sys.excepthook = _say_errors_of_the_main_thread
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _keep_freed_pages()
    _keep_compiled_programs()
    raise_max_open_files()
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a signal that kills, such as SIGBUS, leaves a trace of where we were
        signal.signal(signal.SIGABRT, signal.SIG_DFL)  # C++ says itself why it ends us
    atexit.register(_end)  # called after JAX's own, which is registered later: JAX waits there for the others


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """What fails in a save is raised by the next call, too, and said there in a line; here it would be pages."""
    return "orbax" not in record.pathname


def _say_errors_of_the_main_thread(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Python calls this in other threads only for callbacks of C++: those of a save that failed come by the hundred,
    too late for anybody to hear them."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)


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


def _keep_compiled_programs() -> None:
    """Tells JAX to keep what it compiles in the user's cache folder, so that a resumed run need not wait for it.

    JAX_COMPILATION_CACHE_DIR names another folder; empty, it turns this off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(root, "gpt_pretrain", "compiled", _processor())
    with contextlib.suppress(OSError):  # without it, only time is lost
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


def _processor() -> str:
    """Names this machine's instruction set: programs for a CPU must not reach another one by a shared home."""
    features = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def connect(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout_secs: float,
    command: str,
) -> None:
    """Joins the other processes of the run, if there are any.

    Args:
      timeout_secs: how long to wait for the others to start; then this process says so and ends.
      command: what the user typed.
    """
    if coordinator_address is None and not _in_a_cluster():
        return
    import jax

    who = "This process" if process_id is None else f"Process {process_id} of {num_processes}"
    where = f" at {coordinator_address}" if coordinator_address else ""
    message = (
        f"error: {who} has waited {timeout_secs:.0f} s for the others{where}, and not all came: one was not started, "
        "has failed, or cannot be reached. Look at what they print and start all again; where they need longer, raise "
        "--start_timeout_secs."
    )
    with peers.limited(timeout_secs, message):
        # Longer than ours: JAX ends the process itself, with a trace of its C++.
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, initialization_timeout=int(timeout_secs) + 60
        )
        _watch_peers(f"Start all of them again, with the same commands: the run resumes. Here: {command}")


_watch: peers.Peers | None = None


def _watch_peers(advice: str) -> None:
    """Meets the others through JAX's coordination service."""
    global _watch
    from jax._src import distributed  # the service's store of keys is not public

    state = distributed.global_state
    if state.num_processes < 2 or state.client is None or state.coordinator_address is None:
        return
    watch = peers.Peers(state.process_id, state.num_processes, advice)
    key = "gpt_pretrain/peers_port"
    try:
        if state.process_id == 0:
            state.client.key_value_set(key, str(watch.listen()))
        else:
            port = int(state.client.blocking_key_value_get(key, 20_000))
            watch.connect(state.coordinator_address.rsplit(":", 1)[0].strip("[]"), port)
    except (OSError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors
        logging.getLogger(__name__).warning(
            "The other processes cannot be watched (%s): that one is lost is noticed after minutes.", error
        )
        return
    _watch = watch


_last_calls: list[Callable[[], object]] = []
_status: int | None = None


def at_the_end(call: Callable[[], object]) -> None:
    """Calls it when all else that was registered for the end of the process is done."""
    _last_calls.append(call)


def end_with(status: int) -> None:
    """Call when nothing is left to do but to return: at its end, this process will not take its objects down one by
    one, which takes Python up to half a second and is for nobody."""
    global _status
    _status = status


def _end() -> None:
    if _watch:
        _watch.say_done()
    for call in _last_calls:
        call()
    if _status is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


def process_began() -> float:
    """When this process began, by `time.monotonic()`: the interpreter and its imports are part of a run.

    Where the system does not say it, so long ago at least as this thread has computed.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), since the system's boot
        age_secs = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # other systems than Linux
        age_secs = time.thread_time()
    return time.monotonic() - age_secs


def leave(*, show_traceback: bool, patience_secs: float = 6.0) -> None:
    """Call after an error: this process ends within 10 s of the end of its main thread, whatever its threads do.

    Where this process alone had it, the others wait for us in a computation, and JAX at our exit for them: both for
    minutes. Ended at once, it takes the others with it.
    """
    end_soon()
    import jax

    if not jax.distributed.is_initialized():
        return
    time.sleep(1.0)  # where it comes from another process that is gone, our watch says so and ends us
    if _watch:
        _watch.say_failed()
    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # ends where all had the error
    together.start()
    together.join(patience_secs)
    if together.is_alive():
        if show_traceback:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def in_words(error: Exception) -> str | None:
    """What an error of the operating system means, where its own words leave one alone."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.filename or 'a file'}: {no_file_left(error)}"
    return None


def end_soon(patience_secs: float = 8.0) -> None:
    """Once the main thread has ended, gives all else so long; then the process ends with status 1."""

    def watch() -> None:
        threading.main_thread().join()
        if hasattr(signal, "alarm"):  # for what hangs so late that no Python runs any more
            signal.alarm(int(patience_secs) + 1)
        time.sleep(patience_secs)
        sys.stdout.flush()
        os._exit(1)

    if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True, name="end-soon").start()


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

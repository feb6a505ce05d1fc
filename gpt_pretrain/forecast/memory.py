"""The memory of one device: what a compiled step needs, and what there is."""

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np

from gpt_pretrain.forecast.topologies import memory_fraction_of_gpus
from gpt_pretrain.parallel.devices import Device, chip_of

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = (  # libtpu's words; "temporaries" of the first count the arguments too
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
)


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes of one device during a step.

    Attributes:
      state: parameters and the optimizer's state, which are there all the time.
      temporary: activations, gradients and whatever else XLA keeps meanwhile, without reusing the state's memory.
      program: the code, where it lies in the same memory.
      peak: at the step's worst moment.
    """

    state: int
    temporary: int | None
    program: int | None
    peak: int


@dataclasses.dataclass(frozen=True)
class There:
    """Bytes of one device.

    Attributes:
      total: it has.
      usable: a program can have.
      note: why that is less, in words.
    """

    total: int
    usable: int
    note: str = ""


def needed_by_message(message: str) -> int | None:
    """Bytes that a program needs by the words with which libtpu's compiler refuses it; None where they do not say it.

    >>> needed_by_message("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ...") / 2**30
    20.5
    """
    found = next((match for pattern in _NEEDED if (match := pattern.search(message))), None)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def needed(compiled: jax.stages.Compiled, state_bytes: int, platform: str) -> Needed:
    """As XLA's buffer assignment has it.

    Arguments and results that share memory (the donated state) count once. On CPUs XLA reports a peak without the
    temporary buffer, which its runtime allocates as a whole: there, and where no peak is reported, it is the sum.
    """
    stats: Any = compiled.memory_analysis()
    program = stats.generated_code_size_in_bytes
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    at_once = stats.argument_size_in_bytes + results + stats.temp_size_in_bytes
    reported = getattr(stats, "peak_memory_in_bytes", 0)
    peak = at_once if platform == "cpu" or not reported else reported
    return Needed(state_bytes, stats.temp_size_in_bytes, program, peak + program)


def there(device: Device) -> There | None:
    """None where it is not known. A device that is here says it itself."""
    if device.platform == "cpu":
        total = _memory_of_this_machine() // max(1, jax.local_device_count())
        return There(total, total, "this machine's memory, shared by its devices")
    stats = _stats_of(device)
    if stats:
        return There(stats["bytes_limit"], stats["bytes_limit"], "as the device says")
    chip = chip_of(device)
    if chip is None or chip.memory_bytes is None:
        return None
    if device.platform == "tpu":
        return There(chip.memory_bytes, chip.memory_bytes)
    fraction = memory_fraction_of_gpus()
    note = f"JAX takes {fraction:.0%} of it; XLA_CLIENT_MEM_FRACTION=0.92 takes more" if fraction < 0.9 else ""
    return There(chip.memory_bytes, int(fraction * chip.memory_bytes), note)


def bytes_a_device(abstract: Any) -> int:
    """Of a tree of arrays with shardings, on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def _stats_of(device: Device) -> dict[str, int] | None:
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):  # it is not here
        return None
    return stats if stats and "bytes_limit" in stats else None


def _memory_of_this_machine() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # "max": no limit
            continue
    return total

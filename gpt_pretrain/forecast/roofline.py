"""How long a step takes at least, by a device's datasheet."""

import dataclasses
from collections.abc import Sequence

from gpt_pretrain.forecast.kernels import Kernel
from gpt_pretrain.parallel.devices import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one device and one step.

    Attributes:
      flops: of all products.
      num_bytes: of main memory, read and written.
      num_kernels: that run.
      opaque: names of kernels whose FLOPs are not known.
      compute_secs: `flops` at the peak.
      memory_secs: `num_bytes` at the memory's rate.
      kernel_secs: each kernel takes the longer of its own two, one after the other; copies run beside them.
    """

    flops: float
    num_bytes: int
    num_kernels: int
    opaque: tuple[str, ...]
    compute_secs: float | None
    memory_secs: float | None
    kernel_secs: float | None


def roofline_of(kernels: Sequence[Kernel], chip: Chip | None, peak_flops: float | None) -> Roofline:
    """Without a datasheet, what is counted, and no seconds but those at `peak_flops`."""
    flops = sum(each.times * each.flops for each in kernels)
    num_bytes = sum(each.times * each.num_bytes for each in kernels)
    rate = chip.memory_rate if chip else None
    compute_secs = flops / peak_flops if peak_flops else None
    memory_secs = num_bytes / rate if rate else None
    kernel_secs = None
    if peak_flops and rate and memory_secs is not None:
        each_alone = (
            max(each.num_bytes / rate, each.flops / peak_flops) * each.times for each in kernels if not each.is_copy
        )
        kernel_secs = max(memory_secs, sum(each_alone))
    return Roofline(
        flops=flops,
        num_bytes=num_bytes,
        num_kernels=sum(each.times for each in kernels),
        opaque=tuple(sorted({each.name for each in kernels if each.is_opaque})),
        compute_secs=compute_secs,
        memory_secs=memory_secs,
        kernel_secs=kernel_secs,
    )

"""What kind of device this is, and what its datasheet promises."""

import dataclasses
from typing import Any, TypeAlias

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable

_GB, _GIB, _TFLOPS = 10**9, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the vendor promises of one device, as JAX counts devices. All rates are of one device, a second.

    Attributes:
      kind: part of JAX's `device_kind`, in lower case.
      peak_flops: dense bfloat16 products, FLOP/s.
      memory_bytes: that a program can have: the datasheet's less what the system keeps.
      memory_rate: of that memory, bytes/s.
      link_rate: bytes/s that it sends: on GPUs over all NVLinks together; on TPUs over one of the links to its
        neighbours, of which it has two an axis of the torus.
      host_rate: bytes/s that it sends to other hosts, where that is another network.
      cores: devices that share the chip, and so its links.
      closes_rings_of: an axis of a slice is a ring, not a line, where its length is a multiple of this.

    None: not known here.
    """

    kind: str
    peak_flops: float
    memory_bytes: int | None = None
    memory_rate: float | None = None
    link_rate: float | None = None
    host_rate: float | None = None
    cores: int = 1
    closes_rings_of: int | None = None


# The first whose `kind` is in the device's wins. Sources:
#   NVIDIA: datasheets of the products. Links are half of NVLink's "total bandwidth", which counts both directions.
#     Other hosts: one 400 Gbit/s adapter a GPU as in DGX H100 (ConnectX-7), 200 Gbit/s as in DGX A100.
#   TPUs: docs.cloud.google.com/tpu/docs, a page a generation. Links are half of the "bidirectional ICI bandwidth" by
#     their number, 4 in two dimensions and 6 in three; v2, v3 and v4 by Jouppi et al., "TPU v4", ISCA 2023, and "A
#     domain-specific supercomputer", CACM 2020. Memory is what libtpu's compiler gives a program (0.0.42).
#     A v2, v3 or 7x chip is two devices.
_CHIPS = (
    Chip("h100 pcie", 756 * _TFLOPS, 80 * _GB, 2000 * _GB, 64 * _GB, 50 * _GB),
    Chip("h100 nvl", 835 * _TFLOPS, 94 * _GB, 3900 * _GB, 300 * _GB, 50 * _GB),
    Chip("h200", 989 * _TFLOPS, 150_754_820_096, 4800 * _GB, 450 * _GB, 50 * _GB),
    Chip("gh200", 989 * _TFLOPS, 96 * _GB, 4000 * _GB, 450 * _GB, 50 * _GB),
    Chip("h100", 989 * _TFLOPS, 84_942_979_072, 3350 * _GB, 450 * _GB, 50 * _GB),
    Chip("b200", 2250 * _TFLOPS, 180 * _GB, 8000 * _GB, 900 * _GB, 50 * _GB),
    Chip("a100", 312 * _TFLOPS, 84_987_740_160, 2039 * _GB, 300 * _GB, 25 * _GB),
    Chip("l40s", 362 * _TFLOPS, 48 * _GB, 864 * _GB, 32 * _GB, 25 * _GB),
    Chip("4090", 165 * _TFLOPS, 24 * _GB, 1008 * _GB, 32 * _GB),
    Chip("tpu7", 2307 / 2 * _TFLOPS, int(94.75 * _GIB), 7380 / 2 * _GB, 100 * _GB, cores=2, closes_rings_of=4),
    Chip("tpu v6", 918 * _TFLOPS, int(31.25 * _GIB), 1640 * _GB, 100 * _GB, closes_rings_of=16),
    Chip("tpu v5p", 459 * _TFLOPS, int(95.74 * _GIB), 2765 * _GB, 100 * _GB, closes_rings_of=4),
    Chip("tpu v5 lite", 197 * _TFLOPS, int(15.75 * _GIB), 819 * _GB, 50 * _GB, closes_rings_of=16),
    Chip("tpu v5e", 197 * _TFLOPS, int(15.75 * _GIB), 819 * _GB, 50 * _GB, closes_rings_of=16),
    Chip("tpu v5", 459 * _TFLOPS, int(95.74 * _GIB), 2765 * _GB, 100 * _GB, closes_rings_of=4),
    Chip("tpu v4", 275 * _TFLOPS, int(30.75 * _GIB), 1200 * _GB, 50 * _GB, closes_rings_of=4),
    Chip("tpu v3", 123 / 2 * _TFLOPS, int(15.48 * _GIB), 900 / 2 * _GB, 70 * _GB, cores=2, closes_rings_of=32),
    Chip("tpu v2", 46 / 2 * _TFLOPS, int(7.48 * _GIB), 700 / 2 * _GB, 62 * _GB, cores=2, closes_rings_of=16),
)


def platform_of(device: Device) -> str:
    """ "cpu", "tpu", "gpu" for NVIDIA's from Ampere on, "other gpu" for the rest."""
    if device.platform != "gpu":
        return device.platform
    # Of a device that is compiled for and not here, the platform's version does not name CUDA.
    is_nvidias = "cuda" in device.client.platform_version.lower() or "nvidia" in device.device_kind.lower()
    is_recent = is_nvidias and float(device.compute_capability) >= 8.0
    return "gpu" if is_recent else "other gpu"


def chip_of(device: Device) -> Chip | None:
    """The device's datasheet, or None where we know of none (CPUs)."""
    kind = device.device_kind.lower()
    return next((chip for chip in _CHIPS if chip.kind in kind), None)


def peak_flops(device: Device) -> float | None:
    """The device's datasheet peak in FLOP/s (dense bfloat16), or None where we know of none (CPUs)."""
    chip = chip_of(device)
    return None if chip is None else chip.peak_flops

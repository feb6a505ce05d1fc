"""What kind of device this is, and what its datasheet promises."""

from typing import Any, TypeAlias

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable

# Dense bfloat16 peak per chip by the vendors' datasheets, FLOP/s; first match of the device kind wins.
_PEAK_FLOPS = {
    "h100 pcie": 756e12,
    "h100 nvl": 835e12,
    "h200": 989e12,
    "h100": 989e12,
    "gh200": 989e12,
    "b200": 2250e12,
    "a100": 312e12,
    "l40s": 362e12,
    "4090": 165e12,
    "tpu v6": 918e12,
    "tpu v5p": 459e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v4": 275e12,
    "tpu v3": 123e12,
}


def platform_of(device: Device) -> str:
    """ "cpu", "tpu", "gpu" for NVIDIA's from Ampere on, "other gpu" for the rest."""
    if device.platform != "gpu":
        return device.platform
    # Of a device that is compiled for and not here, the platform's version does not name CUDA.
    is_nvidias = "cuda" in device.client.platform_version.lower() or "nvidia" in device.device_kind.lower()
    is_recent = is_nvidias and float(device.compute_capability) >= 8.0
    return "gpu" if is_recent else "other gpu"


def peak_flops(device: Device) -> float | None:
    """The device's datasheet peak in FLOP/s (dense bfloat16), or None where we know of none (CPUs)."""
    kind = device.device_kind.lower()
    return next((flops for name, flops in _PEAK_FLOPS.items() if name in kind), None)


# Bytes of memory that a device offers, by the vendors' datasheets less what the runtime takes.
_MEMORY_GIB = {
    "h200": 140.0,
    "h100": 79.0,
    "a100": 79.0,
    "tpu v6": 31.25,
    "tpu v5 lite": 15.75,
    "tpu v5": 95.0,
    "tpu v4": 31.25,
    "tpu v3": 15.75,
}


def memory_bytes(device: Device) -> int | None:
    """Of a device, for everything on it; None where we do not know."""
    kind = device.device_kind.lower()
    return next((int(gib * 2**30) for name, gib in _MEMORY_GIB.items() if name in kind), None)

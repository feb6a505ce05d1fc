"""Devices that are not here, as XLA's compilers describe them: names such as "v5e:4x4", "h100:8", "h100:8x8"."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

from gpt_pretrain.parallel.devices import Device


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """One generation: the axes of its torus, and the shape of what is meant without one."""

    num_axes: int
    default: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_TPUS = {
    "v2": _Tpu(2, "2x2"),
    "v3": _Tpu(2, "2x2"),
    "v4": _Tpu(3, "2x2x1", {"chip_config_name": "megacore"}),  # else each of its two cores is a device
    "v5e": _Tpu(2, "2x2"),
    "v5p": _Tpu(3, "2x2x1"),
    "v6e": _Tpu(2, "2x2"),
    "tpu7x": _Tpu(3, "2x2x1"),
}
_GPUS_A_HOST = 8
# What XLA's compiler asks of a GPU, by NVIDIA's datasheets and the tables of compute capabilities in the CUDA C++
# Programming Guide; the same facts as in XLA's own specifications of these devices.
_GPUS: dict[str, dict[str, Any]] = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": (8, 0),
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "memory_bandwidth": 2_039_000_000_000,
        "device_memory_size": 84_987_740_160,
        "l2_cache_size": 41_943_040,
        "shared_memory_per_core": 167_936,
        "shared_memory_per_block_optin": 166_912,
    },
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": (9, 0),
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 3_352_320_000_000,
        "device_memory_size": 84_942_979_072,
        "l2_cache_size": 52_428_800,
        "shared_memory_per_core": 233_472,
        "shared_memory_per_block_optin": 232_448,
    },
    "h200": {
        "name": "NVIDIA H200",
        "capability": (9, 0),
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 4_800_000_000_000,
        "device_memory_size": 150_754_820_096,
        "l2_cache_size": 62_914_560,
        "shared_memory_per_core": 233_472,
        "shared_memory_per_block_optin": 232_448,
    },
}
_EXAMPLES = (
    "v5e:4x4, v5e:1x1, v6e:2x4, v5p:4x4x4, v4:2x2x2, v3:2x2, v2:2x2, tpu7x:2x2x1, h100:8, h100:1, h100:8x8 (8 GPUs on "
    "each of 8 hosts), h200:8 or a100:8"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind that are connected.

    Attributes:
      name: as the user wrote it.
      kind: "v5e", "h100", ...
      shape: of a TPU slice its chips along each axis; of GPUs (hosts, GPUs a host).
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """ValueError for what no compiler knows.

        >>> Topology.parse("h100:8").shape, Topology.parse("v5p:2x2").shape, Topology.parse("v3").shape
        ((1, 8), (2, 2, 1), (2, 2))
        """
        kind, _, shape_text = name.strip().lower().partition(":")
        if kind not in _TPUS and kind not in _GPUS:
            raise _refused(name)
        tpu = _TPUS.get(kind)
        shape_text = shape_text or (tpu.default if tpu else str(_GPUS_A_HOST))
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape_text):
            raise _refused(name)
        shape = tuple(map(int, shape_text.split("x")))
        if tpu is None:
            shape = (1, *shape) if len(shape) == 1 else shape
            if len(shape) != 2:
                raise _refused(name)
            if shape[1] > _GPUS_A_HOST:
                raise ValueError(
                    f"--topology={name}: a host has at most {_GPUS_A_HOST} GPUs; write hosts x GPUs, as {kind}:2x8"
                )
            return cls(name, kind, shape)
        if len(shape) == tpu.num_axes - 1:
            shape = (*shape, 1)
        if len(shape) != tpu.num_axes:
            raise _refused(name)
        return cls(name, kind, shape)

    @property
    def is_tpu(self) -> bool:
        return self.kind in _TPUS

    def environment(self, *, exact: bool) -> dict[str, str]:
        """Variables to set before JAX is imported. JAX itself runs on the CPU.

        Args:
          exact: XLA optimises for TPUs as much as in a run; else it tries less, four to ten times as fast: memory is
            the same within a few per cent, but kernels and collectives may be put together in another way.
        """
        variables = {"JAX_PLATFORMS": "cpu"}
        if self.is_tpu:
            variables |= {
                "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
                "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts at libtpu's lock file
                "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any, or libtpu warns; the topology's name decides
            }
            if not exact:
                variables["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "-1.0"
        return variables

    def require_compiler(self) -> None:
        """ValueError where the wheel that compiles for these devices is not installed."""
        plugins = ("libtpu",) if self.is_tpu else ("jax_cuda12_plugin", "jax_cuda13_plugin")
        if any(importlib.util.find_spec(name) for name in plugins):
            return
        if self.is_tpu:
            kinds, command = "TPUs", "`pip install -e '.[aot-tpu]' -c constraints.txt`"
        else:
            kinds, command = "NVIDIA GPUs", "`pip install -e '.[aot-cuda]' -c constraints.txt` (5 GB)"
        raise ValueError(
            f"--topology={self.name} needs a compiler for {kinds}, and {' or '.join(plugins)} is not installed: "
            f"{command}, best in an environment of its own. No device is needed."
        )

    def devices(self) -> list[Device]:
        """Imports JAX. ValueError for a shape that the compiler refuses."""
        import jax
        from jax.experimental.topologies import get_topology_desc

        try:
            if self.is_tpu:
                return list(get_topology_desc(platform="tpu", topology_name=self._libtpu_name, **self._options).devices)
            hosts, gpus = self.shape
            description = _target_config(self.kind)
            shape = f"1x{hosts}x{gpus}" if hosts == 1 else f"{hosts}x1x{gpus}"
            topology = get_topology_desc(platform="cuda", topology_name="", topology=shape, target_config=description)
            return list(topology.devices)
        except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--topology={self.name}: the compiler refuses it: {reason[:300]}") from None

    @property
    def _libtpu_name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def _options(self) -> dict[str, Any]:
        options = dict(_TPUS[self.kind].options)
        if min(self.shape[:2]) < 2:  # a part of a host, whose chips are 2 x 2
            options["chips_per_host_bounds"] = (min(2, self.shape[0]), min(2, self.shape[1]), 1)
        return options


def memory_fraction_of_gpus() -> float:
    """The part of a GPU's memory that JAX takes: 0.75, or what the user set by a variable."""
    text = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise ValueError(f"XLA_CLIENT_MEM_FRACTION: found {text!r}, expected a number above 0 and at most 1")
    return fraction


def _refused(name: str) -> ValueError:
    return ValueError(
        f"--topology={name}: not known; expected one as {_EXAMPLES}, or none for the devices that are here"
    )


def _target_config(kind: str) -> str:
    """The description that XLA's GPU compiler takes in the place of a device, as a text of Protocol Buffers."""
    facts = dict(_GPUS[kind])
    name, (major, minor) = facts.pop("name"), facts.pop("capability")
    cudnn = _cudnn_version()
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
        "ecc_enabled": "true",
        **facts,
    }
    texts = {
        "name": name,
        "driver_version": "13.0.0",
        "runtime_version": "12.9.0",
        "compile_time_toolkit_version": "12.9.0",
        "dnn_version": ".".join(map(str, cudnn)),
        "device_vendor": "NVIDIA Corporation",
        "platform_version": f"Compute Capability {major}.{minor}{'a' if features else ''}",
    }
    lines = [f"  {key}: {value}" for key, value in fields.items()]
    lines += [f"  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}"]
    lines += [f'  {key}: "{value}"' for key, value in texts.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}",
            "runtime_version { major: 12 minor: 9 patch: 0 }",
            f'device_description_str: "{name}"',
        ]
    )


def _cudnn_version() -> tuple[int, int, int]:
    """Of the cuDNN that is installed, whose kernels are chosen."""
    for package in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            major, minor, patch = importlib.metadata.version(package).split(".")[:3]
            return int(major), int(minor), int(patch)
        except importlib.metadata.PackageNotFoundError:
            continue
    return 9, 8, 0

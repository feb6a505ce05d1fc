"""Norms, activation statistics, FLOPs and MFU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gpt_pretrain.model.gpt import GPTConfig

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


def flops_per_token(config: GPTConfig, num_params: int, seq_len: int) -> float:
    """FLOPs of forward and backward for one token: 6 (N - position embedding) + 12 L d T.

    The convention of PaLM's appendix B, as nanoGPT and llm.c count: attention as if it were not causal,
    recomputation not counted.
    """
    num_matmul_params = num_params - config.num_positions(seq_len) * config.n_embd
    return 6.0 * num_matmul_params + 12.0 * config.n_layer * config.n_embd * seq_len


def peak_flops(device: jax.Device) -> float | None:  # pyright: ignore[reportInvalidTypeForm]
    """The device's datasheet peak in FLOP/s (dense bfloat16), or None where we know of none (CPUs)."""
    kind = device.device_kind.lower()
    return next((flops for name, flops in _PEAK_FLOPS.items() if name in kind), None)


def describe_activation(x_BTD) -> dict[str, jax.Array]:
    """Mean, standard deviation, RMS and largest magnitude over all elements, in float32."""
    x = x_BTD.astype(jnp.float32)
    mean, mean_square = x.mean(), (x * x).mean()
    std = jnp.sqrt(jnp.maximum(mean_square - mean * mean, 0.0))
    return {"mean": mean, "std": std, "rms": jnp.sqrt(mean_square), "max_abs": jnp.abs(x).max()}


def recording(hook: Callable, into: dict) -> Callable:
    """A hook that also writes the statistics of what `hook` returns to `into["activations/3/attn_out/rms"]`."""

    def record(site, layer, x_BTD):
        x_BTD = hook(site, layer, x_BTD)
        for name, value in describe_activation(x_BTD).items():
            into[f"activations/{layer}/{site}/{name}"] = value
        return x_BTD

    return record


def norms_per_layer(tree: dict, prefix: str) -> dict[str, jax.Array]:
    """Global norm of each block ("blocks/3") and of each part outside of the blocks."""
    parts = {f"blocks/{layer}": part for layer, part in tree["blocks"].items()}
    parts |= {name: part for name, part in tree.items() if name != "blocks"}
    return {f"{prefix}/{name}": optax.global_norm(part) for name, part in parts.items()}

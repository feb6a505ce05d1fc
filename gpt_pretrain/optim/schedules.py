"""Schedules of the learning rate and of weight decay: step -> value."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]

SHAPES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    # progress in [0, 1] after the warm-up, fraction of the run spent decaying -> 1 at the start, 0 at the end
    "cosine": lambda progress, _: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress, _: 1 - progress,
    "wsd": lambda progress, fraction: jnp.minimum(1.0, (1 - progress) / fraction),
    "constant": lambda progress, _: jnp.ones_like(progress),
}


def warmup_then(
    shape: str, peak: float, total_steps: int, warmup_steps: int, final_ratio: float, decay_fraction: float
) -> Schedule:
    """Linear warm-up to `peak`, then `shape` down to `peak * final_ratio` at `total_steps`."""

    def value(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        progress = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        height = SHAPES[shape](progress, decay_fraction * total_steps / max(1, total_steps - warmup_steps))
        return peak * warmup * (final_ratio + (1 - final_ratio) * height)

    return value

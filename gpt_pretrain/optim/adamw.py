"""Learning-rate schedules and optax chains."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


class Optimizer(NamedTuple):
    """What `train` wants of an optimizer: the transformation, and the rate that it will use (for the logs)."""

    transform: optax.GradientTransformation
    learning_rate: Schedule


def adamw(
    total_steps: int,
    *,
    lr: float = 6e-4,
    weight_decay: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    clip_norm: float | None = 1.0,
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine",
    warmup_steps: int = 700,
    final_lr_ratio: float = 0.1,
    decay_fraction: float = 0.2,
    weight_decay_schedule: Literal["constant", "lr", "cosine", "linear", "wsd"] = "constant",
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) with decay on matrices only.

    Args:
      total_steps: of the run; the schedules end there.
      lr: peak learning rate.
      weight_decay: decoupled, times the learning rate; for parameters with two or more axes.
      clip_norm: gradients are scaled down to this global norm; None for no clipping.
      schedule: what follows the linear warm-up. "wsd" (warm-up, stable, decay) stays at the peak until
        the last `decay_fraction` of the run, then falls linearly.
      warmup_steps: the rate is lr * (step + 1) / warmup_steps until then.
      final_lr_ratio: where the schedule ends, as a fraction of `lr`.
      weight_decay_schedule: "constant", or the shape after which the decay falls from `weight_decay`;
        "lr" follows the learning rate's.
    """
    if warmup_steps < 0 or warmup_steps >= total_steps > 1:
        raise ValueError(
            f"optimizer.warmup_steps: found {warmup_steps}, expected fewer than the {total_steps} steps of this "
            f"run. Lower it, or raise train.num_tokens."
        )
    if schedule not in _SHAPES:
        raise ValueError(f"optimizer.schedule: found {schedule!r}, expected one of {sorted(_SHAPES)}")
    if weight_decay_schedule not in ("lr", *_SHAPES):
        raise ValueError(
            f"optimizer.weight_decay_schedule: found {weight_decay_schedule!r}, expected one of "
            f"{sorted(('lr', *_SHAPES))}"
        )
    shape_args = (total_steps, warmup_steps, final_lr_ratio, decay_fraction)
    learning_rate = warmup_then(schedule, lr, *shape_args)
    decay: float | Schedule = weight_decay
    if weight_decay_schedule == "lr":
        decay = warmup_then(schedule, weight_decay, *shape_args)
    elif weight_decay_schedule != "constant":
        decay = warmup_then(weight_decay_schedule, weight_decay, total_steps, 0, 0.0, decay_fraction)
    transform = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(decay, mask=is_matrix),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate),  # pyright: ignore[reportArgumentType]
    )
    return Optimizer(transform, learning_rate)


def is_matrix(params):
    """The decay mask: embeddings and kernels yes, biases and norms no."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


_SHAPES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
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
        height = _SHAPES[shape](progress, decay_fraction * total_steps / max(1, total_steps - warmup_steps))
        return peak * warmup * (final_ratio + (1 - final_ratio) * height)

    return value

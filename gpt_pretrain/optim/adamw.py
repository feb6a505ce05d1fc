"""AdamW with decay on matrices only."""

from typing import Literal

import optax

from gpt_pretrain.optim.optimizer import Optimizer, is_matrix
from gpt_pretrain.optim.schedules import SHAPES, Schedule, warmup_then


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
    if schedule not in SHAPES:
        raise ValueError(f"optimizer.schedule: found {schedule!r}, expected one of {sorted(SHAPES)}")
    if weight_decay_schedule not in ("lr", *SHAPES):
        raise ValueError(
            f"optimizer.weight_decay_schedule: found {weight_decay_schedule!r}, expected one of "
            f"{sorted(('lr', *SHAPES))}"
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

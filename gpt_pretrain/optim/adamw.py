"""AdamW with decay on matrices only."""

import logging
import math
from typing import Literal

import optax

from gpt_pretrain.optim.optimizer import Optimizer, is_matrix
from gpt_pretrain.optim.schedules import SHAPES, Schedule, warmup_then

log = logging.getLogger(__name__)

LONG_WARMUP_STEPS = 700  # of GPT-2 124M's 19,073 steps in llm.c


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
    warmup_steps: int | None = None,
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
      warmup_steps: step number n has the rate lr * n / warmup_steps until then; None is 700, or a tenth of a run of
        fewer than 7,000 steps.
      final_lr_ratio: where the schedule ends, as a fraction of `lr`.
      weight_decay_schedule: "constant", or the shape after which the decay falls from `weight_decay`;
        "lr" follows the learning rate's.
    """
    warmup_steps = _warmup(warmup_steps, total_steps)
    for name, value, least in (("lr", lr, 0.0), ("weight_decay", weight_decay, 0.0), ("epsilon", epsilon, 0.0)):
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"optimizer.{name}: found {value}, expected a finite number, at least {least:g}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"optimizer.{name}: found {value}, expected a number in [0, 1)")
    if not 0.0 <= final_lr_ratio <= 1.0:
        raise ValueError(f"optimizer.final_lr_ratio: found {final_lr_ratio}, expected a fraction in [0, 1]")
    if not 0.0 < decay_fraction <= 1.0:
        raise ValueError(f"optimizer.decay_fraction: found {decay_fraction}, expected a fraction in (0, 1]")
    if clip_norm is not None and not clip_norm >= 0.0:
        raise ValueError(f"optimizer.clip_norm: found {clip_norm}, expected a number above 0, or None for no clipping")
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


def _warmup(asked: int | None, total_steps: int) -> int:
    """What was asked for, or what fits the run. ValueError for what does not fit."""
    if asked is None:
        fitting = min(LONG_WARMUP_STEPS, total_steps // 10)
        if fitting < LONG_WARMUP_STEPS:
            log.info("Warm-up: %d steps, a tenth of this short run (optimizer.warmup_steps)", fitting)
        return fitting
    if not isinstance(asked, int) or asked < 0 or asked >= total_steps > 1:
        raise ValueError(
            f"optimizer.warmup_steps: found {asked}, expected a whole number below the {total_steps} steps of this "
            "run. Lower it, or raise train.num_tokens."
        )
    return asked

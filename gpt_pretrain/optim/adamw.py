"""AdamW with decay on matrices only."""

import logging
from typing import Literal

import optax

from gpt_pretrain import checks
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
    for name, value, most in (("lr", lr, 1000), ("weight_decay", weight_decay, 1000), ("epsilon", epsilon, 1)):
        checks.number(f"optimizer.{name}", value, least=0, most=most)
    checks.fraction("optimizer.beta1", beta1, with_one=False)
    checks.fraction("optimizer.beta2", beta2, with_one=False)
    checks.fraction("optimizer.final_lr_ratio", final_lr_ratio)
    checks.fraction("optimizer.decay_fraction", decay_fraction, with_zero=False)
    if clip_norm is not None:  # 0, as in other trainers, is no clipping too
        checks.number("optimizer.clip_norm", clip_norm, least=0, most=1e9)
    checks.choice("optimizer.schedule", schedule, sorted(SHAPES))
    checks.choice("optimizer.weight_decay_schedule", weight_decay_schedule, sorted(("lr", *SHAPES)))
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
    asked = checks.whole_number("optimizer.warmup_steps", asked, least=0)
    if asked >= total_steps > 1:
        raise ValueError(
            f"optimizer.warmup_steps: found {asked}, expected fewer than the {total_steps} steps of this "
            "run. Lower it, or raise train.num_tokens."
        )
    return asked

"""What a run wants of an optimizer."""

from typing import NamedTuple

import jax
import optax

from gpt_pretrain.optim.schedules import Schedule


class Optimizer(NamedTuple):
    """The transformation of gradients into updates, and the learning rate that it will use (for the logs)."""

    transform: optax.GradientTransformation
    learning_rate: Schedule


def is_matrix(params):
    """The decay mask: embeddings and kernels yes, biases and norms no."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

"""Microbatches -> gradients -> update -> metrics: pure functions on pytrees.

`batch` is uint16 or uint32 (num_microbatches, microbatch, seq_len + 1): the token windows of one global batch, rows
in their global order. Inputs are all but the last token of a window, targets all but the first.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt_pretrain.model import statistics
from gpt_pretrain.model.document_mask import Documents, documents_of
from gpt_pretrain.model.gpt import TABLE_AXES, logical_axes, model_of
from gpt_pretrain.model.losses import nll_per_row, summed_nll
from gpt_pretrain.model.perturbations import make_hook
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.parallel.partition import (
    batch_sharding,
    gathered,
    param_shardings,
    replicated,
    sum_over_devices,
)
from gpt_pretrain.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What all functions of one run have in common.

    Attributes:
      spec: the model.
      num_chunks: pieces of the time axis in which the loss is computed.
      seed: of dropout and perturbations.
      mesh: of several devices, over which the work is split; None for one.
    """

    spec: ModelSpec
    num_chunks: int = 1
    seed: int = 0
    mesh: Mesh | None = None


def split_tokens(window_BT):
    """[5, 6, 7] -> inputs [5, 6], targets [6, 7]; int32."""
    window_BT = jnp.asarray(window_BT, jnp.int32)
    return window_BT[:, :-1], window_BT[:, 1:]


def make_loss_fn(options: StepOptions) -> Callable:
    """`(params, window_BT, rng, record=None) -> (summed nll, num_correct)` of one microbatch.

    `record`, a dict, receives the activation statistics if given.
    """
    spec, mesh = options.spec, options.mesh
    to_model = model_of(spec)

    def loss_of(x_BTD, head_VD, targets_BT):
        return summed_nll(x_BTD, head_VD, targets_BT, spec.vocab_size, options.num_chunks)

    if mesh is not None and mesh.size > 1:
        loss_of = sum_over_devices(loss_of, mesh)

    def loss_fn(params, window_BT, rng, record=None):
        model = to_model(gathered(params, mesh, logical_axes, TABLE_AXES))
        inputs_BT, targets_BT = split_tokens(window_BT)
        rng_hook, rng_dropout = (None, None) if rng is None else jax.random.split(rng)
        hook = make_hook(spec.perturbations, spec.n_layer, rng_hook)
        if record is not None:
            hook = statistics.recording(hook, record)
        x_BTD = model(inputs_BT, documents=_documents(spec, inputs_BT), hook=hook, rng=rng_dropout)
        return loss_of(x_BTD, model.head_VD, targets_BT)

    return loss_fn


def _documents(spec: ModelSpec, inputs_BT) -> Documents | None:
    return None if spec.document_end is None else documents_of(inputs_BT, spec.document_end)


def accumulate_gradients(loss_fn: Callable, params, batch_MBT, rng, mesh: Mesh | None = None):
    """Gradient of the mean loss over ALL tokens of the batch, one microbatch at a time.

    Sums are divided once, by the number of target tokens of the whole batch, so that the result does not
    depend on how it is cut into microbatches. With a `mesh`, the sums are split like the parameters.

    Returns:
      gradients like `params` in float32, mean loss in nats, accuracy.
    """
    num_microbatches, microbatch, window = batch_MBT.shape
    num_tokens = num_microbatches * microbatch * (window - 1)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def one(window_BT, index):
        sums, grads = grad_fn(params, window_BT, None if rng is None else jax.random.fold_in(rng, index))
        if mesh is not None and mesh.shape["fsdp"] > 1:
            grads = jax.lax.with_sharding_constraint(grads, param_shardings(grads, mesh, logical_axes))
        return sums, grads

    def body(carry, inputs):
        return jax.tree.map(jnp.add, carry, one(*inputs)), None

    if num_microbatches == 1:
        (nll, correct), grads = one(batch_MBT[0], 0)
    else:
        shapes = jax.eval_shape(one, batch_MBT[0], 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        indices = jnp.arange(num_microbatches)
        ((nll, correct), grads), _ = jax.lax.scan(body, zeros, (batch_MBT, indices))
    grads = jax.tree.map(lambda grad: grad / num_tokens, grads)
    return grads, nll / num_tokens, correct / num_tokens


def make_train_step(options: StepOptions, optimizer: Optimizer) -> Callable:
    """`(state, batch) -> (state, metrics)`, not yet jitted; see `compile_train_step`."""
    loss_fn = make_loss_fn(options)

    def train_step(state: TrainState, batch_MBT):
        rng = _rng(options, state)
        grads, loss, accuracy = accumulate_gradients(loss_fn, state.params, batch_MBT, rng, options.mesh)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": optimizer.learning_rate(state.step),
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            "update_norm": optax.global_norm(updates),
        }
        return TrainState(state.step + 1, params, opt_state), metrics  # pyright: ignore[reportArgumentType]

    return train_step


def _rng(options: StepOptions, state: TrainState) -> jax.Array | None:
    """The random numbers of the next step, a function of the step; None where it needs none."""
    return jax.random.fold_in(jax.random.key(options.seed), state.step) if options.spec.needs_rng else None


def make_eval_step(options: StepOptions) -> Callable:
    """`(params, batch, weights_MB, index) -> (nll, num_correct)` summed over the rows of weight 1."""
    spec = options.spec
    to_model = model_of(spec)
    perturbations = [each for each in spec.perturbations if each.in_evaluation]

    def eval_step(params, batch_MBT, weights_MB, index):
        model = to_model(gathered(params, options.mesh, logical_axes, TABLE_AXES))
        rng = jax.random.fold_in(jax.random.key(options.seed), index) if perturbations else None
        hook = make_hook(perturbations, spec.n_layer, rng)
        inputs_BT, targets_BT = split_tokens(batch_MBT[0])
        x_BTD = model(inputs_BT, documents=_documents(spec, inputs_BT), hook=hook)
        nll_B, correct_B = nll_per_row(x_BTD, model.head_VD, targets_BT, spec.vocab_size, options.num_chunks)
        return (nll_B * weights_MB[0]).sum(), (correct_B * weights_MB[0]).sum()

    return eval_step


def make_statistics(options: StepOptions) -> Callable:
    """`(state, batch) -> {name: scalar}`: a function of its own, so that ordinary steps pay nothing.

    Activations are those of the first microbatch, at every site of every layer; gradient norms are of the
    whole batch's gradient, before clipping; all with the random numbers that the step itself uses.
    """
    loss_fn = make_loss_fn(options)
    # Values recorded inside remat can't leave it.
    forward = make_loss_fn(dataclasses.replace(options, spec=dataclasses.replace(options.spec, remat=False)))

    def statistics_of(state: TrainState, batch_MBT):
        rng = _rng(options, state)
        record: dict[str, jax.Array] = {}
        forward(state.params, batch_MBT[0], None if rng is None else jax.random.fold_in(rng, 0), record)
        grads, _, _ = accumulate_gradients(loss_fn, state.params, batch_MBT, rng, options.mesh)
        record |= statistics.norms_per_part(grads, "gradients")
        return record | statistics.norms_per_part(state.params, "parameters")

    return statistics_of


def compile_train_step(train_step: Callable, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Jits with explicit shardings; the old state's memory is reused for the new one."""
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def compile_eval_step(eval_step: Callable, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Jits `make_eval_step`'s function with explicit shardings."""
    rows = batch_sharding(mesh)
    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, rows, rows, replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def compile_statistics(statistics_of: Callable, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Jits `make_statistics`'s function with explicit shardings."""
    return jax.jit(statistics_of, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))

"""Microbatches -> gradients -> update -> metrics: pure functions on pytrees.

`batch` is uint16 or uint32 (num_microbatches, microbatch, seq_len + 1): the token windows of one global batch, rows
in their global order. Inputs are all but the last token of a window, targets all but the first.

`document_end` everywhere: the id of the end-of-text token, to keep attention within documents and count positions from
the start of each (`document_mask.py`); None for windows that are one sequence, as GPT-2's.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gpt_pretrain.model import statistics as metrics_lib
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import GPTConfig, graph_of
from gpt_pretrain.model.losses import nll_per_row, summed_nll
from gpt_pretrain.model.perturbations import make_hook
from gpt_pretrain.optim.adamw import Optimizer
from gpt_pretrain.parallel.mesh import batch_sharding, gather_embeddings, param_shardings, replicated, sum_over_devices
from gpt_pretrain.train.state import TrainState


def split_tokens(window_BT):
    """[5, 6, 7] -> inputs [5, 6], targets [6, 7]; int32."""
    window_BT = window_BT.astype(jnp.int32)
    return window_BT[:, :-1], window_BT[:, 1:]


def make_loss_fn(
    config: GPTConfig,
    *,
    seq_len: int,
    num_valid: int,
    num_chunks: int,
    mesh: Mesh | None = None,
    document_end: int | None = None,
) -> Callable:
    """`(params, window_BT, rng, record=None) -> (summed nll, num_correct)` of one microbatch.

    `record`, a dict, receives the activation statistics if given. A `mesh` of several devices splits the work.
    """
    graph = graph_of(config, seq_len)

    def loss_of(x_BTD, head_VD, targets_BT):
        return summed_nll(x_BTD, head_VD, targets_BT, num_valid, num_chunks)

    if mesh is not None and mesh.size > 1:
        loss_of = sum_over_devices(loss_of, mesh)

    def loss_fn(params, window_BT, rng, record=None):
        params = gather_embeddings(params, mesh)
        model = nnx.merge(graph, params)
        inputs_BT, targets_BT = split_tokens(window_BT)
        rng_hook, rng_dropout = (None, None) if rng is None else jax.random.split(rng)
        hook = make_hook(config.perturbations, config.n_layer, rng_hook)
        if record is not None:
            hook = metrics_lib.recording(hook, record)
        documents = None if document_end is None else documents_of(inputs_BT, document_end)
        x_BTD = model(inputs_BT, documents=documents, hook=hook, rng=rng_dropout)
        return loss_of(x_BTD, model.head_VD, targets_BT)

    return loss_fn


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
            grads = jax.lax.with_sharding_constraint(grads, param_shardings(grads, mesh))
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


def make_train_step(
    config: GPTConfig,
    optimizer: Optimizer,
    *,
    seq_len: int,
    num_valid: int,
    num_chunks: int,
    seed: int,
    mesh: Mesh | None = None,
    document_end: int | None = None,
) -> Callable:
    """`(state, batch) -> (state, metrics)`, not yet jitted; see `compile_train_step`."""
    loss_fn = make_loss_fn(
        config, seq_len=seq_len, num_valid=num_valid, num_chunks=num_chunks, mesh=mesh, document_end=document_end
    )
    needs_rng = bool(config.dropout or config.perturbations)

    def train_step(state: TrainState, batch_MBT):
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if needs_rng else None
        grads, loss, accuracy = accumulate_gradients(loss_fn, state.params, batch_MBT, rng, mesh)
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


def make_eval_step(
    config: GPTConfig,
    *,
    seq_len: int,
    num_valid: int,
    num_chunks: int,
    seed: int,
    mesh: Mesh | None = None,
    document_end: int | None = None,
) -> Callable:
    """`(params, batch, weights_MB, index) -> (nll, num_correct)` summed over the rows of weight 1."""
    graph = graph_of(config, seq_len)
    perturbations = [each for each in config.perturbations if each.in_evaluation]

    def eval_step(params, batch_MBT, weights_MB, index):
        model = nnx.merge(graph, gather_embeddings(params, mesh))
        rng = jax.random.fold_in(jax.random.key(seed), index) if perturbations else None
        hook = make_hook(perturbations, config.n_layer, rng)
        inputs_BT, targets_BT = split_tokens(batch_MBT[0])
        documents = None if document_end is None else documents_of(inputs_BT, document_end)
        x_BTD = model(inputs_BT, documents=documents, hook=hook)
        nll_B, correct_B = nll_per_row(x_BTD, model.head_VD, targets_BT, num_valid, num_chunks)
        return (nll_B * weights_MB[0]).sum(), (correct_B * weights_MB[0]).sum()

    return eval_step


def make_statistics(
    config: GPTConfig,
    *,
    seq_len: int,
    num_valid: int,
    num_chunks: int,
    seed: int,
    mesh: Mesh | None = None,
    document_end: int | None = None,
) -> Callable:
    """`(state, batch) -> {name: scalar}`: a function of its own, so that ordinary steps pay nothing.

    Activations are those of the first microbatch, at every site of every layer; gradient norms are of the
    whole batch's gradient, before clipping; all with the random numbers that the step itself uses.
    """
    how = {
        "seq_len": seq_len,
        "num_valid": num_valid,
        "num_chunks": num_chunks,
        "mesh": mesh,
        "document_end": document_end,
    }
    loss_fn = make_loss_fn(config, **how)
    forward = make_loss_fn(
        dataclasses.replace(config, remat=False), **how
    )  # values recorded inside remat can't leave it
    needs_rng = bool(config.dropout or config.perturbations)

    def statistics(state: TrainState, batch_MBT):
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if needs_rng else None
        record: dict[str, jax.Array] = {}
        forward(state.params, batch_MBT[0], None if rng is None else jax.random.fold_in(rng, 0), record)
        grads, _, _ = accumulate_gradients(loss_fn, state.params, batch_MBT, rng, mesh)
        record |= metrics_lib.norms_per_layer(grads, "gradients")
        return record | metrics_lib.norms_per_layer(state.params, "parameters")

    return statistics


def compile_train_step(train_step: Callable, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Jits with explicit shardings; the old state's memory is reused for the new one."""
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def compile_eval_step(eval_step: Callable, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    rows = batch_sharding(mesh)
    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, rows, rows, replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def compile_statistics(statistics: Callable, shardings: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(statistics, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))

"""Microbatches -> gradients -> update -> metrics: pure functions on pytrees.

`batch` is uint16 or uint32 (num_microbatches, microbatch, seq_len + 1): the token windows of one global batch, rows
in their global order. Inputs are all but the last token of a window, targets all but the first. Where some targets do
not count it is `Masked`: such steps have a function of their own, so that the others have no operation for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt_pretrain.model import statistics
from gpt_pretrain.model.document_mask import Documents, documents_of
from gpt_pretrain.model.gpt import model_of
from gpt_pretrain.model.intervening import Doses, Rows, make_hook, numbers_of_rows
from gpt_pretrain.model.linear import Multiply, multiply
from gpt_pretrain.model.losses import nll_per_row, summed_kept_nll, summed_nll
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.parallel.partition import BATCH_AXES, batch_sharding, replicated
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.weights import SplitWeights, Wire, on_each_device

Gather = Literal["per_step", "per_use"]


# libtpu's compiler (0.0.42) has a reduce-scatter of up to 8 devices; of one of 16 it makes an all-reduce of whole
# matrices, of which each device then drops most: twice the bytes.
_MOST_TPUS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What all functions of one run have in common.

    Attributes:
      spec: the model.
      num_chunks: pieces of the time axis in which the loss is computed.
      seed: of dropout and interventions.
      mesh: of several devices, over which the work is split; None for one.
      gather: when split weights are made whole, "per_step" or "per_use"; see `weights.py`.
      reduce_dtype: in which gradients are added up over devices.
    """

    spec: ModelSpec
    num_chunks: int = 1
    seed: int = 0
    mesh: Mesh | None = None
    gather: Gather = "per_use"
    reduce_dtype: str = "float32"

    @property
    def axes(self) -> tuple[str, ...]:
        """Those over which the rows of a batch lie; none on one device."""
        return BATCH_AXES if self.mesh is not None and self.mesh.size > 1 else ()

    @property
    def num_doses(self) -> int:
        """Arguments that each function takes for the interventions: one, or none without them."""
        return int(bool(self.spec.interventions))

    @property
    def weights(self) -> SplitWeights:
        """How the weights of the model are split over the mesh."""
        assert self.mesh is not None
        is_tpu = self.mesh.devices.flat[0].platform == "tpu"
        most_at_once = _MOST_TPUS_AT_ONCE if is_tpu else None
        return SplitWeights(self.spec, self.mesh, Wire(self.spec.dtype, self.reduce_dtype, most_at_once))


class Masked(NamedTuple):
    """A batch, or a part of it, of whose targets some do not count: they give no gradient.

    Attributes:
      tokens: as of other batches.
      keep: bool, the same without the last axis's first token: whether each target counts.
    """

    tokens: jax.Array
    keep: jax.Array


def split_tokens(window_BT):
    """[5, 6, 7] -> inputs [5, 6], targets [6, 7]; int32."""
    window_BT = jnp.asarray(window_BT, jnp.int32)
    return window_BT[:, :-1], window_BT[:, 1:]


def make_loss_fn(options: StepOptions, multiply: Multiply = multiply) -> Callable:
    """`(params, window_BT, rng, dosed=None, record=None) -> (summed nll, num_correct)` of rows that one device holds.

    `rng` is for dropout. `dosed` is the doses of the interventions, where there are some, and the index of the
    microbatch. `record`, a dict, receives the moments of the activations if given. `multiply` is what linear layers
    use. Of `Masked` rows, both sums are of the targets that count.
    """
    spec = options.spec
    to_model = model_of(spec, multiply)

    def loss_fn(params, window_BT, rng, dosed=None, record=None):
        model = to_model(params)
        window_BT, keep_BT = window_BT if isinstance(window_BT, Masked) else (window_BT, None)
        inputs_BT, targets_BT = split_tokens(window_BT)
        hook, around = _hook(options, inputs_BT, dosed), None
        if record is not None:
            hook, around = statistics.recording(hook, record), statistics.recording_entropy(record)
        x_BTD = model(inputs_BT, documents=_documents(spec, inputs_BT), hook=hook, around=around, rng=_for_dropout(rng))
        how = spec.vocab_size, options.num_chunks, spec.logits_dtype
        if keep_BT is not None:
            return summed_kept_nll(x_BTD, model.head_VD, targets_BT, keep_BT, *how)
        return summed_nll(x_BTD, model.head_VD, targets_BT, *how)

    return loss_fn


def _hook(options: StepOptions, inputs_BT, dosed: tuple[Doses, jax.Array | int] | None, *, in_evaluation: bool = False):
    """What the interventions do to the rows of a device, of a microbatch with this index."""
    spec, doses, rows = options.spec, None, None
    if dosed is not None:
        doses, index = dosed
        numbers_B = numbers_of_rows(index, inputs_BT.shape[0], options.axes)
        rows = Rows(inputs_BT, numbers_B, 0, options.seed)
    return make_hook(
        spec.interventions, spec.n_layer, spec.n_head, doses, rows, axes=options.axes, in_evaluation=in_evaluation
    )


def _for_dropout(rng: jax.Array | None) -> jax.Array | None:
    return None if rng is None else jax.random.split(rng)[1]


def _documents(spec: ModelSpec, inputs_BT) -> Documents | None:
    return None if spec.document_end is None else documents_of(inputs_BT, spec.document_end)


def accumulate_gradients(loss_fn: Callable, params, batch_MBT, rng, *doses: Doses, with_squares: bool = False):
    """Sums over all rows of a batch that one device holds, one microbatch after the other.

    Args:
      with_squares: also the squared norms of the microbatches' gradients.

    Returns:
      gradients like `params` in float32, whatever dtype the parameters are held in; summed nll; number of correct
      predictions; with squares, their sum.
    """

    def one(window_BT, index):
        in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)  # costs nothing: see `linear.py`
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        dosed = (doses[0], index) if doses else None
        rng_of_one = None if rng is None else jax.random.fold_in(rng, index)
        (nll, correct), grads = grad_fn(in_float32, window_BT, rng_of_one, dosed)
        return (grads, nll, correct, optax.tree.norm(grads, squared=True)) if with_squares else (grads, nll, correct)

    def body(carry, inputs):
        return jax.tree.map(jnp.add, carry, one(*inputs)), None

    num_microbatches = jax.tree.leaves(batch_MBT)[0].shape[0]
    first = jax.tree.map(lambda rows: rows[0], batch_MBT)
    if num_microbatches == 1:
        return one(first, 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first, 0))
    return jax.lax.scan(body, zeros, (batch_MBT, jnp.arange(num_microbatches)))[0]


def make_gradients(options: StepOptions, *, with_squares: bool = False) -> Callable:
    """`(params, batch, rng, *doses) -> (gradients, mean loss in nats, accuracy)`.

    The loss is the mean over ALL tokens of the batch. Sums are divided once, by the number of target tokens of the
    whole batch, so that the result does not depend on how it is cut into microbatches and over devices. Gradients are
    float32, split like the parameters. Of a `Masked` batch gradients are divided by ALL its targets, so that each that
    counts weighs what it always weighs; loss and accuracy are means over those that count.

    Args:
      with_squares: also the mean over all pieces of the batch, each a device's rows of a microbatch, of the squared
        norm of the gradient of the piece's mean loss. Only where `has_whole_pieces`.
    """
    assert has_whole_pieces(options) or not with_squares

    def on_one(params, batch_MBT, rng, *doses):
        held = jax.tree.map(lambda leaf: leaf.astype(options.spec.dtype) if leaf.ndim >= 2 else leaf, params)
        return accumulate_gradients(make_loss_fn(options), held, batch_MBT, rng, *doses, with_squares=with_squares)

    def on_each(params, batch_MBT, rng, *doses):
        weights = options.weights
        if options.gather == "per_step":
            loss_fn, held = make_loss_fn(options), weights.whole(params)
        else:
            of_whole, held = make_loss_fn(options, weights.multiply), params

            def loss_fn(params, *args):
                return of_whole(weights.with_whole_tables(params), *args)

        grads, *sums = accumulate_gradients(
            loss_fn, held, batch_MBT, _of_device(rng), *doses, with_squares=with_squares
        )
        grads = weights.reduced(grads, are_split=options.gather == "per_use")
        return grads, *(jax.lax.psum(each, BATCH_AXES) for each in sums)

    def gradients(params, batch_MBT, rng, *doses):
        tokens_MBT = batch_MBT.tokens if isinstance(batch_MBT, Masked) else batch_MBT
        num_microbatches, microbatch, window = tokens_MBT.shape
        num_tokens = num_microbatches * microbatch * (window - 1)
        if options.axes:
            specs, whole = options.weights.specs, [P()] * (1 + len(doses))
            out = specs, *[P()] * (2 + with_squares)
            sums_of = on_each_device(on_each, options.mesh, (specs, P(None, BATCH_AXES), *whole), out)
        else:
            sums_of = on_one
        grads, nll, correct, *squares = sums_of(params, batch_MBT, rng, *doses)
        num_pieces = num_microbatches * (options.mesh.size if options.axes and options.mesh else 1)
        means = [square / num_pieces / (num_tokens / num_pieces) ** 2 for square in squares]
        grads = jax.tree.map(lambda grad: grad / num_tokens, grads)
        if isinstance(batch_MBT, Masked):
            num_tokens = jnp.maximum(batch_MBT.keep.sum(), 1)
        return grads, nll / num_tokens, correct / num_tokens, *means

    return gradients


def has_whole_pieces(options: StepOptions) -> bool:
    """Whether a device has the whole gradient of its rows of a microbatch, before it is added to those of others."""
    return not options.axes or options.gather == "per_step" or options.weights.num_parts == 1


def _of_device(rng: jax.Array | None) -> jax.Array | None:
    """Random numbers of this device's own."""
    return None if rng is None else jax.random.fold_in(rng, jax.lax.axis_index(BATCH_AXES))


def make_train_step(options: StepOptions, optimizer: Optimizer) -> Callable:
    """`(state, batch, *doses) -> (state, metrics)`, not yet jitted; see `compile_train_step`.

    There are doses, one argument, where the model has interventions.
    """
    gradients = make_gradients(options)

    def train_step(state: TrainState, batch_MBT, *doses: Doses):
        grads, loss, accuracy = gradients(state.params, batch_MBT, rng_of(options, state), *doses)
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


def rng_of(options: StepOptions, state: TrainState) -> jax.Array | None:
    """The random numbers of the next step, a function of the step; None where it needs none."""
    return jax.random.fold_in(jax.random.key(options.seed), state.step) if options.spec.dropout else None


def make_eval_step(options: StepOptions) -> Callable:
    """`(params, batch, weights_MB, index, *doses) -> (nll, num_correct)` summed over the rows of weight 1."""
    spec, mesh = options.spec, options.mesh
    is_split = bool(options.axes)
    to_model = model_of(spec, options.weights.multiply if is_split else multiply)

    def on_each(params, batch_MBT, weights_MB, index, *doses):
        if is_split:
            params = options.weights.with_whole_tables(params)
        model = to_model(params)
        inputs_BT, targets_BT = split_tokens(batch_MBT[0])
        hook = _hook(options, inputs_BT, (doses[0], index) if doses else None, in_evaluation=True)
        x_BTD = model(inputs_BT, documents=_documents(spec, inputs_BT), hook=hook)
        nll_B, correct_B = nll_per_row(
            x_BTD, model.head_VD, targets_BT, spec.vocab_size, options.num_chunks, spec.logits_dtype
        )
        sums = (nll_B * weights_MB[0]).sum(), (correct_B * weights_MB[0]).sum()
        return jax.lax.psum(sums, BATCH_AXES) if is_split else sums

    rows = P(None, BATCH_AXES)
    specs = options.weights.specs if is_split else None
    whole = [P()] * (1 + options.num_doses)
    return on_each_device(on_each, mesh, (specs, rows, rows, *whole), P())


def make_statistics(options: StepOptions, optimizer: Optimizer) -> Callable:
    """`(state, batch, *doses) -> {name: scalar}`: a function of its own, so that ordinary steps pay nothing.

    Activations and attention are those of the first microbatch, at every site of every layer; gradient norms are of the
    whole batch's gradient, before clipping; updates are those that the step will make; all with the random numbers that
    the step itself uses. The noise of gradients is there for batches of several pieces; see `has_whole_pieces`.
    """
    mesh, is_split = options.mesh, bool(options.axes)
    with_squares = has_whole_pieces(options)
    gradients = make_gradients(options, with_squares=with_squares)
    # Values recorded inside remat can't leave it.
    plain = dataclasses.replace(options, spec=dataclasses.replace(options.spec, remat="none"))
    forward = make_loss_fn(plain, options.weights.multiply if is_split else multiply)

    def moments_of(params, window_BT, rng, *doses):
        record: statistics.Record = {}
        if is_split:
            params, rng = options.weights.with_whole_tables(params), _of_device(rng)
        dosed = (doses[0], 0) if doses else None
        forward(params, window_BT, None if rng is None else jax.random.fold_in(rng, 0), dosed, record)
        if not is_split:
            return record
        return statistics.of_all_devices(record, BATCH_AXES)

    specs = options.weights.specs if is_split else None
    whole = [P()] * (1 + options.num_doses)
    moments_of_all = on_each_device(moments_of, mesh, (specs, P(BATCH_AXES), *whole), P())

    def statistics_of(state: TrainState, batch_MBT, *doses: Doses):
        rng = rng_of(options, state)
        record = statistics.described(moments_of_all(state.params, batch_MBT[0], rng, *doses))
        grads, _, _, *squares = gradients(state.params, batch_MBT, rng, *doses)
        updates, _ = optimizer.transform.update(grads, state.opt_state, state.params)
        record |= statistics.norms_per_part(grads, "gradients")
        record |= statistics.norms_per_part(state.params, "parameters")
        record |= statistics.update_to_weight(updates, state.params)
        num_rows = batch_MBT.shape[0] * batch_MBT.shape[1]
        rows_of_piece = batch_MBT.shape[1] // (mesh.size if mesh else 1)
        if squares and rows_of_piece < num_rows:
            of_batch = optax.tree.norm(grads, squared=True)
            record |= statistics.NoiseScale.of(squares[0], of_batch, rows_of_piece, num_rows).described()
        return record

    return statistics_of


def compile_train_step(
    train_step: Callable, shardings: TrainState, mesh: Mesh, num_doses: int = 0
) -> jax.stages.Wrapped:
    """Jits with explicit shardings; the old state's memory is reused for the new one."""
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), *[replicated(mesh)] * num_doses),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def compile_masked_train_step(
    train_step: Callable, shardings: TrainState, mesh: Mesh, num_doses: int = 0
) -> jax.stages.Wrapped:
    """`(state, tokens_MBT, keep_MBT, *doses) -> (state, metrics)`: the step of a batch that has masked targets."""

    def masked_train_step(state: TrainState, tokens_MBT, keep_MBT, *doses: Doses):
        return train_step(state, Masked(tokens_MBT, keep_MBT), *doses)

    rows = batch_sharding(mesh)
    return jax.jit(
        masked_train_step,
        in_shardings=(shardings, rows, rows, *[replicated(mesh)] * num_doses),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def compile_eval_step(eval_step: Callable, shardings: TrainState, mesh: Mesh, num_doses: int = 0) -> jax.stages.Wrapped:
    """Jits `make_eval_step`'s function with explicit shardings."""
    rows = batch_sharding(mesh)
    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, rows, rows, *[replicated(mesh)] * (1 + num_doses)),
        out_shardings=replicated(mesh),
    )


def compile_statistics(
    statistics_of: Callable, shardings: TrainState, mesh: Mesh, num_doses: int = 0
) -> jax.stages.Wrapped:
    """Jits `make_statistics`'s function with explicit shardings."""
    return jax.jit(
        statistics_of,
        in_shardings=(shardings, batch_sharding(mesh), *[replicated(mesh)] * num_doses),
        out_shardings=replicated(mesh),
    )

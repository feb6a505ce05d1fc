"""What a run computes with, from its configuration alone: nothing here allocates memory on a device."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_pretrain import checks
from gpt_pretrain.model.gpt import flops_per_token, num_params
from gpt_pretrain.model.intervening import Doses, doses_at
from gpt_pretrain.model.losses import num_loss_chunks
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.parallel.devices import Device, chip_of, peak_flops, platform_of
from gpt_pretrain.parallel.partition import batch_sharding
from gpt_pretrain.parallel.placement import BatchLayout, Placement, fitting_per_device
from gpt_pretrain.train import state as state_lib
from gpt_pretrain.train import step as step_lib
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.opened_data import OpenedData
from gpt_pretrain.train.start import Start, model_spec
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.weights import check_that_all_are_split


@dataclasses.dataclass(frozen=True)
class Built:
    """A run that is ready to start.

    Attributes:
      spec: the model, settled for this platform and this data.
      options: what its compiled functions have in common.
      total_steps: of the whole run.
      placement: where the rows of a batch lie.
      layouts: of the batch sizes from here on.
      abstract_state: shapes, dtypes and shardings of the state.
      train_step: (state, batch, *doses) -> (state, metrics), jitted; compiled at its first call. See `step.py` for all
        four, and `doses` for what they take at the end.
      masked_train_step: (state, batch, keep, *doses) -> (state, metrics), of a batch that has masked targets.
      eval_step: (params, batch, weights, index, *doses) -> sums.
      statistics: (state, batch, *doses) -> {name: scalar}.
    """

    config: TrainConfig
    data: OpenedData
    mesh: Mesh
    spec: ModelSpec
    options: step_lib.StepOptions
    optimizer: Optimizer
    total_steps: int
    placement: Placement
    layouts: tuple[BatchLayout, ...]
    abstract_state: TrainState
    train_step: jax.stages.Wrapped
    masked_train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped
    statistics: jax.stages.Wrapped

    def fresh_state(self) -> TrainState:
        """The state of a run that begins."""
        return state_lib.fresh_state(self.spec, self.optimizer.transform, self.mesh, self.config.key_seed)

    def doses(self, step: int) -> tuple[Doses, ...]:
        """Of the interventions, at a step counted from 1: what the compiled functions take at the end, if anything."""
        return doses_at(step, self.spec.interventions)

    @property
    def num_params(self) -> int:
        return num_params(self.spec)

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward, by the convention in `model.gpt.flops_per_token`."""
        return flops_per_token(self.spec, self.config.data.seq_len)

    @property
    def peak_flops(self) -> float | None:
        """Of all devices together, FLOP/s; None where the datasheet is not known here."""
        peak = self.config.peak_flops_per_device or peak_flops(self.mesh.devices.flat[0])
        return None if peak is None else peak * self.mesh.size


def build(config: TrainConfig, data: OpenedData, start: Start, devices: Sequence[Device] | None = None) -> Built:
    """Settles everything that the configuration leaves open.

    Args:
      devices: to run on, or to compile for; all that are here if None.

    Raises ValueError: the batch does not fit the devices, the run is too long for its data, settings that the
    optimizer refuses.
    """
    mesh = config.mesh(jax.devices() if devices is None else devices)
    spec = model_spec(config, data, mesh.devices.flat[0])
    # Sizes that are past need not fit the devices that there are now.
    batch_sizes = start.plan.stages[-1].batch_sizes_from(start.step)
    per_device = config.per_device_batch_size or fitting_per_device(batch_sizes, mesh.size)
    placement = Placement(batch_sharding(mesh), per_device)
    layouts = tuple(placement.layout(size) for size in batch_sizes)
    total_steps = max(start.step, start.plan.num_steps(config.num_tokens))
    if total_steps > checks.MOST_ROWS:
        raise ValueError(
            f"train.num_tokens: found {config.num_tokens}, which makes {total_steps} steps; expected at most "
            f"{checks.MOST_ROWS}. Lower it, or raise train.batch_size."
        )
    config.data.check_epochs(start.plan, total_steps)
    optimizer = config.optimizer(total_steps)
    check_that_all_are_split(spec, mesh)
    abstract_state = state_lib.abstract_state(spec, optimizer.transform, mesh)
    shardings = state_lib.shardings_of(abstract_state)
    rows_at_once = max(layout.per_device for layout in layouts)
    platform = platform_of(mesh.devices.flat[0])
    options = step_lib.StepOptions(
        spec=spec,
        num_chunks=num_loss_chunks(rows_at_once, config.data.seq_len, spec.padded_vocab_size, platform),
        seed=config.key_seed,
        mesh=mesh,
        gather=_gather(config, spec, mesh),
        reduce_dtype=config.reduce_dtype,
    )
    train_step = step_lib.make_train_step(options, optimizer)
    compiled_for = shardings, mesh, options.num_doses
    return Built(
        config=config,
        data=data,
        mesh=mesh,
        spec=spec,
        options=options,
        optimizer=optimizer,
        total_steps=total_steps,
        placement=placement,
        layouts=layouts,
        abstract_state=abstract_state,
        train_step=step_lib.compile_train_step(train_step, *compiled_for),
        masked_train_step=step_lib.compile_masked_train_step(train_step, *compiled_for),
        eval_step=step_lib.compile_eval_step(step_lib.make_eval_step(options), *compiled_for),
        statistics=step_lib.compile_statistics(step_lib.make_statistics(options, optimizer), *compiled_for),
    )


def bytes_of_whole(spec: ModelSpec) -> int:
    """What `gather_weights="per_step"` holds on every device: the weights in the compute dtype, float32 gradients."""
    return num_params(spec) * (jnp.dtype(spec.dtype).itemsize + 4)


def _gather(config: TrainConfig, spec: ModelSpec, mesh: Mesh) -> step_lib.Gather:
    if config.gather_weights != "auto":
        return config.gather_weights
    chip = chip_of(mesh.devices.flat[0])
    fits = chip is not None and chip.memory_bytes is not None and bytes_of_whole(spec) <= chip.memory_bytes / 4
    return "per_step" if fits else "per_use"

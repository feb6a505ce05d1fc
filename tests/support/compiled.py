"""The text of the compiled functions of a step: what they lower to, and what their devices send one another."""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_pretrain.model.intervening import doses_at
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.partition import batch_sharding, replicated
from gpt_pretrain.train import step as step_lib
from gpt_pretrain.train.state import abstract_state, shardings_of
from gpt_pretrain.train.step import StepOptions

FUNCTIONS = ("train", "eval", "statistics")
Shape = tuple[int, ...]


def lower(
    function: str, spec: ModelSpec, mesh: Mesh, *, batch: tuple[int, int] = (2, 4), num_chunks: int = 1
) -> jax.stages.Lowered:
    """One of `FUNCTIONS` lowered for batches of (microbatches, rows) of the model's longest sequences."""
    options = StepOptions(spec=spec, num_chunks=num_chunks, mesh=mesh)
    optimizer = adamw(100, warmup_steps=2)
    state = abstract_state(spec, optimizer.transform, mesh)
    shardings = shardings_of(state)
    rows = batch_sharding(mesh)
    compiled_for, doses = (shardings, mesh, options.num_doses), doses_at(1, spec.interventions)

    def tokens(num_microbatches: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_microbatches, batch[1], spec.num_positions + 1), jnp.uint16, sharding=rows)

    if function == "train":
        step = step_lib.compile_train_step(step_lib.make_train_step(options, optimizer), *compiled_for)
        return step.lower(state, tokens(batch[0]), *doses)
    if function == "statistics":
        statistics = step_lib.compile_statistics(step_lib.make_statistics(options, optimizer), *compiled_for)
        return statistics.lower(state, tokens(batch[0]), *doses)
    assert function == "eval", function
    evaluate = step_lib.compile_eval_step(step_lib.make_eval_step(options), *compiled_for)
    weights = jax.ShapeDtypeStruct((1, batch[1]), jnp.float32, sharding=rows)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return evaluate.lower(state.params, tokens(1), weights, index, *doses)


def lowered_texts(spec: ModelSpec, mesh: Mesh, functions: Iterable[str] = FUNCTIONS) -> dict[str, str]:
    """What each function lowers to, by its name."""
    return {function: lower(function, spec, mesh).as_text() for function in functions}


def communicated_shapes(lowered: jax.stages.Lowered) -> set[Shape]:
    """Shapes of all arrays that the compiled function's devices send one another."""
    compiled = lowered.compile().as_text()
    results = re.findall(r"= (.+?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", compiled)
    return {tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)}

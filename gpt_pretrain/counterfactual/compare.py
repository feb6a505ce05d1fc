"""How far two arms are apart: parameters, activations, and the gradient of the first batch that differs."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_pretrain.counterfactual.probes import Notes, Probes, whole
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import model_of, parts_of
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoints import restore_params
from gpt_pretrain.train.step import Masked, make_gradients, rng_of
from gpt_pretrain.train.time_ledger import Category

_ROWS = 8  # of probes, whose activations are compared


class CompareWithCheckpoints(Action):
    """Compares the arm with another run at each of its checkpoints: `distance.json` in the arm's directory.

    Args:
      checkpoints: directories of this machine, by the step of each.
    """

    counts_as = Category.EVALUATION
    FILE_NAME = "distance.json"

    def __init__(self, checkpoints: Mapping[int, str], probes: Probes, built: Built, *, begin: int):
        self._checkpoints, self._built = checkpoints, built
        self._windows, self._end_of_text = probes.tokens_NT[-_ROWS:], probes.end_of_text
        self._notes = Notes(built.config.save_dir, self.FILE_NAME, begin=begin)
        self._distances = jax.jit(_distances)

    def due(self, step: int) -> bool:
        return step in self._checkpoints

    def run(self, now: Now) -> None:
        theirs = restore_params(Path(self._checkpoints[now.step]), self._built.abstract_state.params)
        equal, parts = jax.device_get(self._distances(now.state.params, theirs))
        record: dict[str, Any] = {"step": now.step, "bitwise_equal": bool(equal)}
        record["parameters"] = {name: float(value) for name, value in parts.items()}
        both = () if equal else (whole(now.state.params), whole(theirs))
        if jax.process_index() != 0:
            return
        if both:
            spec = self._built.spec.plain()
            record["activations"] = _activations_apart(*both, spec, self._windows, self._end_of_text)
        self._notes.add(record)


def _distances(ours: dict, theirs: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether all are equal bit by bit, and of each part the norm of the difference, over the norm of theirs."""
    equal = jax.tree.map(lambda a, b: (_bits(a) == _bits(b)).all(), ours, theirs)
    apart = parts_of(jax.tree.map(jnp.subtract, ours, theirs))
    size = parts_of(theirs)
    parts = {name: optax.global_norm(apart[name]) / (optax.global_norm(size[name]) + 1e-30) for name in apart}
    parts["all"] = optax.global_norm(apart) / (optax.global_norm(size) + 1e-30)
    return functools.reduce(jnp.logical_and, jax.tree.leaves(equal)), parts


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _activations_apart(
    ours: dict, theirs: dict, spec: ModelSpec, windows_NT: np.ndarray, end_of_text: int
) -> dict[str, list[float]]:
    """Of the residual stream after each layer, over all tokens of the windows: the norm of the difference over the norm
    of theirs, and the cosine of the two."""
    compute = _streams(spec, end_of_text)
    a, b = (np.asarray(compute(params, windows_NT), np.float64) for params in (ours, theirs))
    a, b = (each.reshape(len(each), -1) for each in (a, b))
    norms_a, norms_b = (np.maximum(np.linalg.norm(each, axis=1), 1e-30) for each in (a, b))
    return {
        "relative_distance": (np.linalg.norm(a - b, axis=1) / norms_b).tolist(),
        "cosine": ((a * b).sum(1) / (norms_a * norms_b)).tolist(),
    }


@functools.lru_cache(maxsize=2)
def _streams(spec: ModelSpec, end_of_text: int) -> Callable:
    """(params, windows) -> the residual stream after each layer: (layers, B, T, D)."""
    to_model = model_of(spec)

    @jax.jit
    def compute(params, windows_BT):
        found: dict[int, jax.Array] = {}

        def hook(site: str, layer: int | None, x_BTD):
            if site == "stream_out" and layer is not None:
                found[layer] = x_BTD
            return x_BTD

        inputs_BT = jnp.asarray(windows_BT, jnp.int32)[:, :-1]
        documents = documents_of(inputs_BT, end_of_text) if spec.document_mask else None
        to_model(params)(inputs_BT, documents=documents, hook=hook)
        return jnp.stack([found[layer] for layer in range(spec.n_layer)]).astype(jnp.float32)

    return compute


class CompareGradients(Action):
    """Of the first batch that differs: the cosine of its gradient with that of the original's batch, at the same
    parameters, part by part. `gradients.json` in the arm's directory."""

    is_before_step = True
    counts_as = Category.EVALUATION
    FILE_NAME = "gradients.json"

    def __init__(self, step: int, ours: Plan, original: Plan, built: Built, *, begin: int):
        self._step, self._plans, self._built = step, (ours, original), built
        self._notes = Notes(built.config.save_dir, self.FILE_NAME, begin=begin)

    def due(self, step: int) -> bool:
        return step == self._step

    def run(self, now: Now) -> None:
        gradients = make_gradients(self._built.options)

        @jax.jit
        def compare(params, ours, theirs, rng, *doses):
            a, b = (parts_of(gradients(params, batch, rng, *doses)[0]) for batch in (ours, theirs))
            return {name: _cosine(a[name], b[name]) for name in a} | {"all": _cosine(a, b)}

        ours, theirs = (self._batch(plan) for plan in self._plans)
        rng = rng_of(self._built.options, now.state)
        found = jax.device_get(compare(now.state.params, ours, theirs, rng, *self._built.doses(self._step)))
        if jax.process_index() == 0:
            self._notes.add({"step": self._step, "cosine": {name: float(value) for name, value in found.items()}})

    def _batch(self, plan: Plan) -> Any:
        placement = self._built.placement
        sources = self._built.data.read_sources()
        batch = Batches(
            sources,
            plan,
            vocab_size=self._built.spec.vocab_size,
            first_index=self._step - 1,
            num_steps=1,
            rows_of=placement.rows,
        )[0]
        tokens_MBT = placement.to_devices(batch.tokens, batch.batch_size)
        if batch.keep is None:
            return tokens_MBT
        return Masked(tokens_MBT, placement.to_devices(batch.keep, batch.batch_size))


def _cosine(a, b) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)
    product = functools.reduce(jnp.add, jax.tree.leaves(products))
    return product / (optax.global_norm(a) * optax.global_norm(b) + 1e-30)

"""The activations of chosen rows of a batch of a run, by a checkpoint, with where they come from."""

import dataclasses
import json
from collections.abc import Sequence

import jax
import numpy as np

from gpt_pretrain import checks
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.rows import read_rows
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import model_of
from gpt_pretrain.model.sites import LAYER_SITES, SITES
from gpt_pretrain.train import pretrained
from gpt_pretrain.train.checkpoint_copies import checkpoint_at

VERSION = 1  # of the metadata in a file
_TOKENS_AT_ONCE = 1 << 13


@dataclasses.dataclass(frozen=True)
class Captured:
    """Activations, and what they are of.

    Attributes:
      arrays: float32 (rows, seq_len, channels) as "layers.3.attn_out", or "embeddings" of a site in no layer; and
        "tokens", (rows, seq_len + 1) ids.
      metadata: run id, step, rows and their positions in the global order, checkpoint, streams with fingerprints, and
        the model: texts, as a .safetensors file has them.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def capture(
    run: OpenedRun,
    step_index: int,
    chosen: slice,
    *,
    checkpoint: str,
    sites: Sequence[str],
    layers: Sequence[int] | None = None,
) -> Captured:
    """Runs the model of a checkpoint, without its dropout and interventions, over rows of a batch of the run.

    Args:
      step_index: of the batch, as the plan counts, from 0.
      checkpoint: a run's save_dir, or one checkpoint in it.
      sites: some of `SITES`.
      layers: from 0, negative ones count from the end; None for all.

    Raises ValueError: no good checkpoint, sites or layers that there are not, ids or windows that are too much for it.
    """
    for site in sites:
        checks.choice("--sites", site, SITES)
    place = checkpoint_at(checkpoint)
    params, metadata = pretrained.load(place.directory)
    spec = metadata.model
    if wrong := [each for each in layers or () if not -spec.n_layer <= each < spec.n_layer]:
        raise ValueError(f"--layers: no layer {wrong}; the model has {spec.n_layer} (0 to {spec.n_layer - 1})")
    numbers = {each % spec.n_layer for each in (range(spec.n_layer) if layers is None else layers)}
    rows = read_rows(run, step_index, chosen)
    tokens_NT = np.stack([row.tokens for row in rows])
    seq_len = tokens_NT.shape[1] - 1
    if seq_len > spec.num_positions:
        raise ValueError(f"{place.name}: has {spec.num_positions} positions, the windows have {seq_len} inputs")
    if tokens_NT.max() >= spec.vocab_size:
        raise ValueError(f"{place.name}: knows the ids below {spec.vocab_size}, found {tokens_NT.max()} in the windows")
    to_model = model_of(spec)

    @jax.jit
    def activations(params, inputs_BT):
        found = {}

        def hook(site, layer, x_BTD):
            if site in sites and (site not in LAYER_SITES or layer in numbers):
                found[site if layer is None else f"layers.{layer}.{site}"] = x_BTD
            return x_BTD

        documents = documents_of(inputs_BT, spec.end_of_text) if spec.document_mask else None
        to_model(params)(inputs_BT, documents=documents, hook=hook)
        return found

    num_at_once = max(1, min(len(rows), _TOKENS_AT_ONCE // seq_len))
    padded_BT = np.zeros((num_at_once, seq_len), np.int32)  # one shape: compiled once
    pieces = []
    for first in range(0, len(rows), num_at_once):
        inputs = tokens_NT[first : first + num_at_once, :-1]
        padded_BT[: len(inputs)] = inputs
        found = jax.device_get(activations(params, padded_BT))
        pieces.append({name: np.asarray(each[: len(inputs)], np.float32) for name, each in found.items()})
    arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    stage = run.plan.stage_at(step_index)
    facts = {
        "version": VERSION,
        "run_id": run.data.run_id,
        "step": step_index + 1,
        "rows": [row.row for row in rows],
        "positions": [row.position for row in rows],
        "windows": [[row.stream, row.window] for row in rows],
        "streams": {stream.name: stream.fingerprint for stream in stage.streams},
        "seq_len": seq_len,
        "checkpoint": {"run_id": metadata.run_id, "step": metadata.step, "model": spec.to_json()},
    }
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in facts.items()}
    return Captured(arrays | {"tokens": tokens_NT.astype(np.float32)}, texts)

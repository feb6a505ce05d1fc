"""The weights of a checkpoint, or of somebody else's file, without the run that made them."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_prep.store.buckets import is_bucket
from gpt_pretrain.mirrors import Place
from gpt_pretrain.model.gpt import init_params
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import replicated
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.checkpoint_copies import checkpoint_at
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.start import different_models
from gpt_pretrain.train.weight_files import opened
from gpt_pretrain.train.weight_files.names import TOKENS

log = logging.getLogger(__name__)


def load(
    directory: str, platform: str | None = None, *, mesh: Mesh | None = None, with_interventions: bool = False
) -> tuple[dict, CheckpointMetadata]:
    """The parameters of a run's newest good checkpoint, or of one checkpoint, and its metadata.

    They are on the default device, or whole on each of `mesh`. The model in the metadata is made plain: without what
    only training needs, but for its interventions if asked for.
    """
    checkpoint = Path(checkpoint_at(directory).directory)
    metadata = checkpoints.read_metadata(checkpoint)
    is_cpu = (platform or jax.default_backend()) == "cpu"
    spec = metadata.model.plain(dtype="float32" if is_cpu else None)
    shapes = jax.eval_shape(partial(init_params, spec), jax.random.key(0))
    where = replicated(mesh) if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)
    if with_interventions:
        spec = dataclasses.replace(spec, interventions=metadata.model.interventions)
    return checkpoints.restore_params(checkpoint, abstract), metadata.with_model(spec)


def weights_of(directory: str, spec: ModelSpec, abstract_params: Any, tokenizer_digest: str | None = None) -> Any:
    """The parameters of another run, or in another format, as `train.from_pretrained` takes them.

    Args:
      directory: a save_dir or checkpoint; a folder of transformers, hf://ID, a .safetensors file, llm.c's model file.
      tokenizer_digest: of the data; None where nobody recorded it.

    Raises ValueError if its model or its tokenizer is another.
    """
    try:
        weights = None if is_bucket(directory) else opened.open_weights(directory)
        if weights is not None:
            weights.check(spec)
            _check_tokenizer(directory, "a tokenizer", weights.tokenizer_digest, tokenizer_digest)
    except ValueError as error:
        raise ValueError(f"from_pretrained={error}") from None
    if weights is not None:
        log.info(
            "Weights from %s: %d tensors, %d rows of the token embedding. Its tokenizer is %s. Optimizer state, step "
            "and data position start fresh.",
            directory,
            len(weights.files),
            weights.tensor(TOKENS).shape[0],
            "that of the data" if weights.tokenizer_digest else "not recorded, and taken to be that of the data",
        )
        return opened.load(weights, abstract_params)
    place = _the_same_everywhere(directory)
    source = Path(place.directory)
    metadata = checkpoints.read_metadata(source)
    _check_tokenizer(
        f"from_pretrained={directory}",
        f"tokenizer {metadata.tokenizer!r:.200}",
        metadata.tokenizer_digest,
        tokenizer_digest,
    )
    if changed := different_models(spec, metadata.model, but=("document_mask",)):
        raise ValueError(f"from_pretrained={directory}: the model's shape differs:\n" + "\n".join(changed))
    log.info("Weights from %s; optimizer state, step and data position start fresh.", place.name)
    return checkpoints.restore_params(source, abstract_params)


def _the_same_everywhere(directory: str) -> Place:
    """The checkpoint that the first process finds, in all of them: a run in a bucket may go on meanwhile."""
    if jax.process_count() == 1 or not is_bucket(directory):
        return checkpoint_at(directory)
    found = checkpoint_at(directory) if jax.process_index() == 0 else None
    name = b"" if found is None else found.name.encode()
    content = np.zeros(1024, np.uint8)  # no name in a bucket is longer
    content[: len(name)] = np.frombuffer(name, np.uint8)
    name = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes().rstrip(b"\0").decode()
    return found or checkpoint_at(name)


def _check_tokenizer(where: str, name: str, theirs: str | None, ours: str | None) -> None:
    if None not in (theirs, ours) and theirs != ours:
        raise ValueError(
            f"{where}: was trained on ids of {name} (digest {theirs}), the data has ids of the digest {ours}. Prepare "
            "it with that."
        )

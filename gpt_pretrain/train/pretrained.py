"""The weights of a checkpoint, without the run that made them."""

import logging
from functools import partial
from typing import Any

import jax

from gpt_pretrain.model.gpt import init_params
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.start import different_models

log = logging.getLogger(__name__)


def load(directory: str, platform: str | None = None) -> tuple[dict, CheckpointMetadata]:
    """The parameters of a run's newest good checkpoint, or of one checkpoint, on the default device, and its metadata.

    The model in the metadata is made plain: without what only training needs.
    """
    checkpoint = checkpoints.locate(directory)
    metadata = checkpoints.read_metadata(checkpoint)
    is_cpu = (platform or jax.default_backend()) == "cpu"
    spec = metadata.model.plain(dtype="float32" if is_cpu else None)
    shapes = jax.eval_shape(partial(init_params, spec), jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    return checkpoints.restore_params(checkpoint, abstract), metadata.with_model(spec)


def weights_of(directory: str, spec: ModelSpec, abstract_params: Any, tokenizer_digest: str | None = None) -> Any:
    """The parameters of another run, as `train.from_pretrained` takes them.

    Args:
      tokenizer_digest: of the data; None where nobody recorded it.

    Raises ValueError if its model or its tokenizer is another.
    """
    source = checkpoints.locate(directory)
    metadata = checkpoints.read_metadata(source)
    known = None not in (tokenizer_digest, metadata.tokenizer_digest)
    if known and tokenizer_digest != metadata.tokenizer_digest:
        raise ValueError(
            f"from_pretrained={directory}: was trained on ids of tokenizer {metadata.tokenizer!r:.200} (digest "
            f"{metadata.tokenizer_digest}), the data has ids of the digest {tokenizer_digest}. Prepare it with that."
        )
    if changed := different_models(spec, metadata.model, but=("document_mask",)):
        raise ValueError(f"from_pretrained={directory}: the model's shape differs:\n" + "\n".join(changed))
    log.info("Weights from %s; optimizer state, step and data position start fresh.", source)
    return checkpoints.restore_params(source, abstract_params)

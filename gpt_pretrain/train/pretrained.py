"""The weights of a checkpoint, without the run that made them."""

from functools import partial

import jax

from gpt_pretrain.model.gpt import GPTConfig, init_params
from gpt_pretrain.model.sampling import plain
from gpt_pretrain.train import checkpoints


def load(directory: str, platform: str | None = None) -> tuple[dict, GPTConfig, dict]:
    """A checkpoint's (params, resolved config, metadata), on the default device."""
    checkpoint = checkpoints.locate(directory)
    metadata = checkpoints.read_metadata(checkpoint)
    config = plain(GPTConfig(**metadata["model"])).resolve(platform or jax.default_backend())
    shapes = jax.eval_shape(partial(init_params, config, metadata["seq_len"]), jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    return checkpoints.restore_params(checkpoint, abstract), config, metadata

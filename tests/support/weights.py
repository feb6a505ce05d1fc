"""Models with weights that a few lines make, the same ones everywhere, and what transformers computes with them."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_pretrain.model.gpt import init_params, model_of
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import names_of
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.weight_files.names import name_of
from support.models import VOCAB_SIZE, make_spec
from support.runs import make_metadata

RECORDED = Path(__file__).parent.parent / "transformers_vectors.json"  # by support/record_transformers.py
NUM_TIME = 16
SHAPES = {
    "shallow": make_spec(NUM_TIME, n_layer=1, n_head=1, n_embd=16),
    "many heads": make_spec(2 * NUM_TIME, n_layer=2, n_head=8, n_embd=32),
    "deep": make_spec(NUM_TIME, n_layer=5, n_head=3, n_embd=48),
}
PROMPT = [256, 84, 104, 101, 32, 99]
COLUMNS = slice(0, VOCAB_SIZE, 16)  # of the logits, that are recorded


def params_of(spec: ModelSpec) -> dict:
    """Weights that no library's random numbers have a part in, far from what LayerNorm and GELU leave alone."""
    shapes = jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))

    def make(path, leaf):
        name = name_of(names_of(path))
        noise = _noise(name, leaf.shape)
        return jnp.asarray(1 + noise if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.5 * noise)

    return jax.tree_util.tree_map_with_path(make, shapes)


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Even numbers in [-0.5, 0.5), by splitmix64's mixing of a counter."""
    with np.errstate(over="ignore"):
        x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(40)).astype(np.float32) / 2**24 - 0.5).reshape(shape)


def ids() -> np.ndarray:
    """Token ids (2, NUM_TIME)."""
    return (np.arange(2 * NUM_TIME, dtype=np.int64) * 7919 % VOCAB_SIZE).reshape(2, NUM_TIME)


def our_logits(spec: ModelSpec, params: dict) -> np.ndarray:
    """Of `ids()`, without the padding."""

    @jax.jit
    def logits(params, tokens_BT):
        model = model_of(spec)(params)
        return model.logits(model(tokens_BT))

    return np.asarray(logits(params, jnp.asarray(ids())))[..., : spec.vocab_size]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def recorded() -> dict:
    return json.loads(RECORDED.read_text())["shapes"]


def save_checkpoint(save_dir, spec: ModelSpec, params: dict, *, step=3, **metadata) -> Path:
    """A run's directory with one checkpoint."""
    checkpoints = Checkpoints(save_dir)
    state = TrainState(jnp.int32(step), params, optax.adamw(1e-3).init(params))
    checkpoints.save(state, make_metadata(step, spec=spec, seq_len=spec.num_positions, **metadata))
    checkpoints.wait()
    checkpoints.close()
    return Path(save_dir)


def abstract_of(params: dict, sharding=None) -> dict:
    """Shapes for the first device, or as `sharding`, a tree or nothing, says."""
    sharding = sharding or jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, sharding)


def assert_same_params(found: dict, expected: dict, *, num_rows: int | None = None) -> None:
    """Bit for bit; of the token embedding, the first `num_rows` rows, and zeros after them."""

    def compare(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        if names_of(path)[0] == "token_embedding" and num_rows:
            assert not a[num_rows:].any() and len(a) == len(b)
            a, b = a[:num_rows], b[:num_rows]
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path

    jax.tree_util.tree_map_with_path(compare, found, expected)

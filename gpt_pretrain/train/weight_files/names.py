"""GPT-2's names for the parameters, as OpenAI's checkpoint and transformers have them.

Both projects store linear kernels as (inputs, outputs), and queries, keys and values side by side in this order, so
that only the names differ.
"""

import functools
import re

import jax

from gpt_pretrain.model.gpt import init_params
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import names_of

TOKENS = "wte.weight"  # (vocabulary, embd): the only one whose rows may be padded
POSITIONS = "wpe.weight"
HEAD = "lm_head.weight"  # tied to the token embedding

_OF_MODEL = {
    "token_embedding.embedding": TOKENS,
    "position_embedding.embedding": POSITIONS,
    "ln_f.scale": "ln_f.weight",
    "ln_f.bias": "ln_f.bias",
}
OF_LAYER = {
    "ln_1.scale": "ln_1.weight",
    "ln_1.bias": "ln_1.bias",
    "attention.qkv.kernel": "attn.c_attn.weight",
    "attention.qkv.bias": "attn.c_attn.bias",
    "attention.out.kernel": "attn.c_proj.weight",
    "attention.out.bias": "attn.c_proj.bias",
    "ln_2.scale": "ln_2.weight",
    "ln_2.bias": "ln_2.bias",
    "mlp.up.kernel": "mlp.c_fc.weight",
    "mlp.up.bias": "mlp.c_fc.bias",
    "mlp.down.kernel": "mlp.c_proj.weight",
    "mlp.down.bias": "mlp.c_proj.bias",
}
# Of some of transformers' files: the causal mask, which is no weight.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def name_of(path: tuple[str, ...]) -> str:
    """The names on the path to a parameter -> GPT-2's name.

    >>> name_of(("layers", "3", "mlp", "up", "kernel"))
    'h.3.mlp.c_fc.weight'
    """
    if path[0] == "layers":
        return f"h.{path[1]}.{OF_LAYER['.'.join(path[2:])]}"
    return _OF_MODEL[".".join(path)]


def plain_name(name: str) -> str | None:
    """A name in somebody's file -> GPT-2's; None for what is no weight.

    >>> plain_name("transformer.h.0.ln_1.weight"), plain_name("h.0.attn.bias")
    ('h.0.ln_1.weight', None)
    """
    name = name.removeprefix("transformer.")
    return None if _MASKS.fullmatch(name) else name


@functools.lru_cache
def paths_of(spec: ModelSpec) -> dict[str, tuple]:
    """By GPT-2's name, the path of each parameter as a tree's keys."""
    leaves = jax.tree_util.tree_flatten_with_path(_abstract(spec))[0]
    return {name_of(names_of(path)): tuple(getattr(key, "key", key) for key in path) for path, _ in leaves}


@functools.lru_cache
def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """By GPT-2's name, the shape of each parameter; the token embedding has its padded rows."""
    leaves = jax.tree_util.tree_flatten_with_path(_abstract(spec))[0]
    return {name_of(names_of(path)): leaf.shape for path, leaf in leaves}


def _abstract(spec: ModelSpec) -> dict:
    return jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0))

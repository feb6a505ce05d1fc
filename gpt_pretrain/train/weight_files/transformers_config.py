"""config.json of transformers, for GPT-2: written for a model of ours, and read of somebody's."""

from collections.abc import Mapping
from typing import Any

from gpt_pretrain.model.spec import ModelSpec

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_FIXED: dict[str, tuple[Any, str]] = {  # what our model has no choice of
    "model_type": ("gpt2", "the architecture"),
    "layer_norm_epsilon": (1e-5, "what LayerNorm adds to the variance"),
    "scale_attn_weights": (True, "scores divided by the root of the head dimension"),
    "scale_attn_by_inverse_layer_idx": (False, "scores divided by the number of the layer"),
    "tie_word_embeddings": (True, "output embedding"),
    "add_cross_attention": (False, "cross attention"),
}
_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "num_positions"}


def config_of(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """JSON values."""
    dropout = {f"{where}_pdrop": spec.dropout for where in ("attn", "embd", "resid")}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": _TANH_GELUS[0],
        **{name: value for name, (value, _) in _FIXED.items()},
        **{name: getattr(spec, field) for name, field in _SIZES.items()},
        "n_ctx": spec.num_positions,
        "n_inner": None,
        "vocab_size": spec.vocab_size,
        "bos_token_id": spec.end_of_text,
        "eos_token_id": spec.end_of_text,
        "initializer_range": 0.02,
        **dropout,
        "dtype": dtype,
        "torch_dtype": dtype,  # as it was called before transformers 4.56
        "use_cache": True,
    }


def sizes_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Architecture` that a config names; the number of heads always, as no shape tells it."""
    named = {field: config[name] for name, field in _SIZES.items() if name in config}
    return {"n_head": 12} | named  # GPT2Config's default


def problems_with(config: Mapping[str, Any]) -> list[str]:
    """A line for each choice that our model does not have."""
    problems = [
        f"  config.json: {name} ({what}) is {config[name]!r:.80}, expected {expected!r}"
        for name, (expected, what) in _FIXED.items()
        if name in config and config[name] != expected
    ]
    activation = config.get("activation_function", _TANH_GELUS[0])
    if activation not in _TANH_GELUS:
        problems.append(f"  config.json: activation_function is {activation!r:.80}, expected {_TANH_GELUS[0]!r}")
    inner, width = config.get("n_inner"), config.get("n_embd", 768)
    if inner is not None and not (isinstance(width, int) and inner == 4 * width):
        problems.append(f"  config.json: n_inner is {inner!r:.80}, expected 4 * n_embd, which is {width!r:.80}")
    return problems

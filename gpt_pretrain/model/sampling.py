"""Sampling from a model, with a key-value cache."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from gpt_pretrain.checks import key_seed
from gpt_pretrain.model.gpt import GPT, cache_shape, model_of
from gpt_pretrain.model.intervening import Rows, doses_at, make_hook
from gpt_pretrain.model.interventions import Intervention, check_use
from gpt_pretrain.model.spec import ModelSpec

_TOKENS_AT_ONCE = 1 << 14  # of keys and values, where many prompts are continued


class Cache:
    """Keys and values of the tokens so far, lists over layers of (batch, seq_len, heads, head dim) arrays.

    An `Attend` for the model: called by each layer, it puts the new keys and values at `start` and attends
    over everything up to there. `layers` holds the updated arrays afterwards.
    """

    def __init__(self, layers: list, start):
        self.layers = list(layers)
        self._start = start

    def __call__(self, layer, q_BTHK, k_BTHK, v_BTHK):
        at = (0, self._start, 0, 0)
        k_BSHK = jax.lax.dynamic_update_slice(self.layers[layer][0], k_BTHK, at)
        v_BSHK = jax.lax.dynamic_update_slice(self.layers[layer][1], v_BTHK, at)
        self.layers[layer] = (k_BSHK, v_BSHK)
        queries_T = self._start + jnp.arange(q_BTHK.shape[1])
        mask_TS = jnp.arange(k_BSHK.shape[1]) <= queries_T[:, None]
        return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=mask_TS[None, None])


def empty_cache(spec: ModelSpec, batch: int, seq_len: int) -> list:
    """Room for `seq_len` tokens in every layer."""
    zeros = jnp.zeros(cache_shape(spec, batch, seq_len), spec.dtype)
    return [(zeros, zeros) for _ in range(spec.n_layer)]


def choose_token(
    logits_BV: Float[Array, "B V"], rng: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> Int[Array, " B"]:
    """Next ids (batch,) int32.

    Args:
      temperature: 0 takes the most likely token.
      top_k: keep the k most likely; 0 keeps all.
      top_p: keep the smallest set of most likely tokens that holds this much probability (nucleus).
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        kth = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # the first token is always kept
        last = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < last, -jnp.inf, logits_BV)
    return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


@lru_cache
def make_sampler(spec: ModelSpec, seq_len: int, *, seed: int = 0, **how) -> tuple[Callable, Callable]:
    """`prefill(params, tokens_BT, length, rng, *doses)` and `decode(params, token_B, start, cache, rng, *doses)`, both
    jitted and returning (next token, cache). `how` goes to `choose_token`. Compiled once for equal arguments.

    Doses are of the interventions of `spec`, where it has some; `seed` is theirs.
    """
    to_model = model_of(spec)

    def hook_of(tokens_BT, start, doses):
        rows = Rows(tokens_BT, jnp.arange(tokens_BT.shape[0]), start, seed) if doses else None
        return make_hook(spec.interventions, spec.n_layer, spec.n_head, doses[0] if doses else None, rows)

    def next_token(model: GPT, x_BTD, at, rng):
        last_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, at, 1, axis=1)
        return choose_token(model.logits(last_B1D)[:, 0, : spec.vocab_size], rng, **how)

    @jax.jit
    def prefill(params, tokens_BT, length, rng, *doses):
        model = to_model(params)
        cache = Cache(empty_cache(spec, tokens_BT.shape[0], seq_len), 0)
        x_BTD = model(tokens_BT, attend=cache, hook=hook_of(tokens_BT, 0, doses))
        return next_token(model, x_BTD, length - 1, rng), cache.layers

    @partial(jax.jit, donate_argnums=3)
    def decode(params, token_B, start, layers, rng, *doses):
        model = to_model(params)
        cache = Cache(layers, start)
        token_B1 = token_B[:, None]
        x_BTD = model(token_B1, start=start, attend=cache, hook=hook_of(token_B1, start, doses))
        return next_token(model, x_BTD, 0, rng), cache.layers

    return prefill, decode


def sample(
    params: dict,
    spec: ModelSpec,
    prompt: Integer[np.ndarray, " prompt"],
    *,
    seq_len: int,
    num_tokens: int,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    stop: int | None = None,
    interventions: Sequence[Intervention] = (),
    step: int = 1,
) -> Int[np.ndarray, " new"]:
    """Continues `prompt` (ids, at least one) by up to `num_tokens` ids, or until `stop`; returns the new ids.

    Args:
      seq_len: tokens the model was trained to see at once; generation ends there. A longer position table
        (`spec.num_positions`) makes no difference: training has not reached its other rows.
      interventions: done to every token, as strong as at `step`, counted from 1. Those of `spec` are not.

    Raises ValueError for a prompt that is too long, and for interventions that only training can do.

    A model that was trained with the document mask sees nothing before the last end-of-text token in the prompt and
    counts positions from there, so the prompt is cut to its last document; generation ends with the document.
    """
    document_end = spec.document_end
    if document_end is not None and len(ends := np.flatnonzero(prompt == document_end)):
        prompt = prompt[ends[-1] :]
    if not 0 < len(prompt) <= seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model has room for 1 to {seq_len}")
    check_use(interventions, n_layer=spec.n_layer, n_head=spec.n_head, n_embd=spec.n_embd)
    plain = dataclasses.replace(spec.plain(), interventions=tuple(interventions))
    doses, how = doses_at(step, interventions), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    prefill, decode = make_sampler(plain, seq_len, **how, **({"seed": key_seed(seed)} if doses else {}))
    rng = jax.random.key(key_seed(seed))
    padded = np.zeros((1, seq_len), np.int32)  # one shape for every prompt: compiled once
    padded[0, : len(prompt)] = prompt
    token, cache = prefill(params, padded, len(prompt), jax.random.fold_in(rng, 0), *doses)
    new = [int(token[0])]
    while len(new) < num_tokens and new[-1] not in (stop, document_end) and len(prompt) + len(new) <= seq_len:
        start = len(prompt) + len(new) - 1
        token, cache = decode(params, token, start, cache, jax.random.fold_in(rng, len(new)), *doses)
        new.append(int(token[0]))
    return np.array(new[:-1] if new[-1] in (stop, document_end) else new, np.int32)


def continue_greedily(
    params: dict, spec: ModelSpec, prompts_NT: Integer[np.ndarray, "N prompt"], *, seq_len: int, num_tokens: int
) -> Int[np.ndarray, "N new"]:
    """The most likely `num_tokens` ids after each prompt, all of one length, many at a time.

    An end-of-text token does not end it. Prompt and continuation have at most `seq_len` ids together.
    """
    num_rows, length = prompts_NT.shape
    if not 0 < length <= length + num_tokens - 1 <= seq_len:
        raise ValueError(f"{length} + {num_tokens} tokens; the model has room for {seq_len}")
    prefill, decode = make_sampler(spec.plain(), seq_len, temperature=0.0, top_k=0, top_p=1.0)
    rng = jax.random.key(0)  # nothing is drawn
    new = np.empty((num_rows, num_tokens), np.int32)
    num_at_once = min(num_rows, max(1, _TOKENS_AT_ONCE // seq_len))
    padded = np.zeros((num_at_once, seq_len), np.int32)
    for first in range(0, num_rows, num_at_once):
        rows = slice(first, min(first + num_at_once, num_rows))
        padded[: rows.stop - first, :length] = prompts_NT[rows]
        token_B, cache = prefill(params, padded, length, rng)
        tokens = [token_B]
        for start in range(length, length + num_tokens - 1):
            token_B, cache = decode(params, token_B, start, cache, rng)
            tokens.append(token_B)
        new[rows] = np.stack([np.asarray(each) for each in tokens], 1)[: rows.stop - first]
    return new

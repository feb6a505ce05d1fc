"""Many prompts continued at once, on all devices of a mesh: `model/sampling.py` for rows of different lengths."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_pretrain.model.document_mask import Documents
from gpt_pretrain.model.gpt import model_of
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.sampling import choose_token, empty_cache
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import BATCH_AXES, replicated
from gpt_pretrain.tasks.intervened import Intervened, numbers_of
from gpt_pretrain.tasks.packing import padded
from gpt_pretrain.tasks.scoring import TOKENS_AT_ONCE, TOKENS_AT_ONCE_ELSEWHERE

_LOOK_EVERY = 8  # tokens between looks whether a text has ended: decoding takes longer than a step of a small model


class Generator:
    """Continues prompts by the plain model; arguments as for `Scorer`."""

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        *,
        dtype: str | None = None,
        tokens_at_once: int | None = None,
        interventions: Sequence[Intervention] = (),
        seed: int = 0,
    ):
        self.spec, self.mesh = spec.plain(dtype), mesh
        self._intervened = Intervened(self.spec, tuple(interventions), seed)
        platform = mesh.devices.flat[0].platform
        self._tokens_at_once = tokens_at_once or TOKENS_AT_ONCE.get(platform, TOKENS_AT_ONCE_ELSEWHERE)
        self._rows = NamedSharding(mesh, P(BATCH_AXES))
        # Each device makes its own part.
        self._empty_cache = jax.jit(
            functools.partial(empty_cache, self.spec), static_argnums=(0, 1), out_shardings=self._rows
        )
        self._step = jax.jit(
            functools.partial(_step, self.spec, self._intervened),
            static_argnames=("temperature", "top_k", "top_p"),
            donate_argnames="layers",
            out_shardings=(replicated(mesh), self._rows),
        )

    def __call__(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        *,
        num_tokens: int,
        step: int = 1,
        has_ended: Callable[[list[int]], bool] = lambda new: False,
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        between: Callable[[int], None] = lambda num_done: None,
    ) -> list[list[int]]:
        """The new ids of each prompt, in order: up to `num_tokens`, without the end-of-text that ended them.

        A prompt loses tokens on the left so that the new ones have room. With the document mask it is cut to its last
        document, as the model sees no other.

        Args:
          step: from 1; interventions are as strong as at this one.
          has_ended: of the new ids so far, asked now and then: whether more of them are wanted.
          temperature, top_k, top_p: see `choose_token`.

        Raises ValueError for an empty prompt, or `num_tokens` that leave no room for one.
        """
        room = self.spec.num_positions - num_tokens
        if room < 1 or num_tokens < 1 or not all(prompts):
            raise ValueError(
                f"found {num_tokens} new tokens for a model of {self.spec.num_positions} positions; expected at least "
                "1, fewer than its positions, and no empty prompt"
            )
        prompts = [self._last_document(prompt)[-room:] for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        out: list[list[int]] = [[] for _ in prompts]
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        doses = self._intervened.doses(step)
        start, size = 0, self.mesh.size
        while start < len(order):
            length = padded(len(prompts[order[start]]) + num_tokens, self.spec.num_positions)
            left = -(-(len(order) - start) // size)
            num_rows = size * min(max(1, self._tokens_at_once // length), 1 << (left - 1).bit_length())
            batch = order[start : start + num_rows]
            new = self._batch(
                params, [prompts[i] for i in batch], num_rows, length, num_tokens, has_ended, seed + start, how, doses
            )
            for number, ids in zip(batch, new, strict=True):
                out[number] = ids
            start += len(batch)
            between(start)
        return out

    def _last_document(self, prompt: Sequence[int]) -> Sequence[int]:
        if self.spec.document_end is None:
            return prompt
        ends = np.flatnonzero(np.asarray(prompt) == self.spec.document_end)
        return prompt[ends[-1] :] if len(ends) else prompt

    def _batch(self, params, prompts, num_rows, length, num_tokens, has_ended, seed, how, doses) -> list[list[int]]:
        lengths_B = np.ones(num_rows, np.int32)
        lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        tokens_BT = np.zeros((num_rows, padded(int(lengths_B.max()), length)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        numbers_B = self._to_devices(numbers_of(prompts, num_rows)) if doses else None
        cache = self._empty_cache(num_rows, length)
        rng = jax.random.key(seed % 2**32)
        new: list[list[int]] = [[] for _ in prompts]
        is_done = [False] * len(prompts)
        start_B = np.zeros(num_rows, np.int32)
        for index in range(num_tokens):
            found_B, cache = self._step(
                params,
                self._to_devices(tokens_BT),
                self._to_devices(start_B),
                self._to_devices(lengths_B - start_B),
                numbers_B,
                *doses,
                layers=cache,
                rng=jax.random.fold_in(rng, index),
                **how,
            )
            token_B = np.asarray(found_B)
            tokens_BT = token_B[:, None]
            start_B, lengths_B = lengths_B, lengths_B + 1
            for row, ids in enumerate(new):
                if is_done[row]:
                    continue
                if token_B[row] == self.spec.end_of_text:
                    is_done[row] = True
                    continue
                ids.append(int(token_B[row]))
                is_done[row] = index % _LOOK_EVERY == _LOOK_EVERY - 1 and has_ended(ids)
            if all(is_done):
                break
        return new

    def _to_devices(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda index: array[index])


class _RowsCache:
    """`sampling.Cache` for rows that begin at different places; `start_B` is where the new tokens go."""

    def __init__(self, layers: list, start_B):
        self.layers = list(layers)
        self._start_B = start_B

    def __call__(self, layer, q_BTHK, k_BTHK, v_BTHK):
        def put(old_SHK, new_THK, start):
            return jax.lax.dynamic_update_slice(old_SHK, new_THK, (start, 0, 0))

        k_BSHK, v_BSHK = (
            jax.vmap(put)(old, new, self._start_B)
            for old, new in zip(self.layers[layer], (k_BTHK, v_BTHK), strict=True)
        )
        self.layers[layer] = (k_BSHK, v_BSHK)
        # What lies beyond a row's own tokens is seen by none of them: later tokens take its place.
        queries_BT = self._start_B[:, None] + jnp.arange(q_BTHK.shape[1])
        mask_BTS = jnp.arange(k_BSHK.shape[1]) <= queries_BT[..., None]
        return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=mask_BTS[:, None])


def _step(
    spec: ModelSpec, intervened: Intervened, params, tokens_BT, start_B, length_B, numbers_B, *doses, layers, rng, **how
):
    """Takes in tokens from `start_B` on, of which `length_B` are real; (the ids that come next, the cache)."""
    model = model_of(spec)(params)
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
    cache = _RowsCache(layers, start_B)
    positions_BT = jnp.minimum(positions_BT, spec.num_positions - 1)
    hook = intervened.hook(tokens_BT, numbers_B, doses, start=start_B)
    documents = Documents(jnp.zeros_like(tokens_BT), positions_BT)
    x_BTD = model(tokens_BT, documents=documents, attend=cache, hook=hook)
    last_B1D = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)
    logits_BV = model.logits(last_B1D)[:, 0, : spec.vocab_size]
    return choose_token(logits_BV, rng, **how), cache.layers

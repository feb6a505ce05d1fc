"""Log-likelihoods of continuations by a model, on all devices of a mesh."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_pretrain.model.attention import Attend
from gpt_pretrain.model.document_mask import Documents
from gpt_pretrain.model.gpt import GPT, model_of
from gpt_pretrain.model.intervening import Doses
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.losses import num_loss_chunks, token_nll
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.partition import BATCH_AXES, replicated
from gpt_pretrain.tasks.intervened import Intervened, numbers_of
from gpt_pretrain.tasks.packing import Arrays, Request, Row, arrays_of, batches_of, rows_of

# Of a batch, on one device. CPUs gain nothing by more; accelerators need many to be busy.
TOKENS_AT_ONCE = {"cpu": 1 << 11}
TOKENS_AT_ONCE_ELSEWHERE = 1 << 15
# JAX on several CPU devices can deadlock with more than 32 computations under way.
MAX_IN_FLIGHT = 8


class Score(NamedTuple):
    """Of a continuation: log-likelihood in nats, whether each token was the most likely one, number of tokens."""

    loglikelihood: float
    is_greedy: bool
    num_tokens: int


class Scorer:
    """Scores by the plain model: without dropout, remat and its own interventions, with XLA's attention.

    Rows are split over all devices, whatever splits the parameters. With several processes each calls it with the same
    requests, and has all scores.

    Args:
      spec: the model; attention is kept within documents where it was in training.
      mesh: the devices.
      dtype: of the computation; None for the spec's.
      tokens_at_once: of a batch, on one device.
      interventions, seed: see `Intervened`. A token's position is that in its own sequence, as if it were alone; with
        the document mask, in its document.
    """

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
        self._score = jax.jit(
            functools.partial(_score, self.spec, self._intervened, platform, mesh.size), out_shardings=replicated(mesh)
        )

    @property
    def max_length(self) -> int:
        """Tokens that the model can see at once."""
        return self.spec.num_positions

    def __call__(
        self,
        params: dict,
        requests: Sequence[Request],
        *,
        step: int = 1,
        between: Callable[[int], None] = lambda num_done: None,
    ) -> list[Score]:
        """The score of each request, in order.

        A context and its continuation that are too long together lose tokens on the left.

        Args:
          params: on the mesh.
          step: from 1; interventions are as strong as at this one.
          between: called between batches with the number of requests done; may raise.

        Raises ValueError for a request without context, or a continuation that is too long alone.
        """
        rows = rows_of(requests, self.max_length, may_share=self._intervened.may_share)
        doses = self._intervened.doses(step)
        scores = [Score(0.0, True, 0)] * len(requests)  # of empty continuations, which have no row
        under_way: collections.deque[tuple[Sequence[Row], tuple[jax.Array, jax.Array]]] = collections.deque()
        num_done = 0

        def take_oldest() -> None:
            nonlocal num_done
            batch, results = under_way.popleft()
            nll_BN, correct_BN = jax.device_get(results)
            for row, nll_N, correct_N in zip(batch, nll_BN, correct_BN):  # noqa: B905 - the last rows are empty
                start = 0
                for number, continuation in zip(row.requests, row.continuations, strict=True):
                    end = start + len(continuation)
                    loglikelihood = -float(nll_N[start:end].sum(dtype=np.float64))
                    scores[number] = Score(loglikelihood, bool(correct_N[start:end].all()), len(continuation))
                    start = end
                num_done += len(row.requests)

        at_once = self._tokens_at_once * self.mesh.size
        for batch, shape in batches_of(
            rows, max_length=self.max_length, tokens_at_once=at_once, multiple_of=self.mesh.size
        ):
            between(num_done)
            arrays = arrays_of(batch, shape, self.spec.document_end)
            numbers_B = numbers_of([row.context for row in batch], len(arrays.tokens_BT)) if doses else None
            on_devices = jax.tree.map(self._to_devices, (arrays, numbers_B))
            under_way.append((batch, self._score(params, *on_devices, *doses)))
            if len(under_way) >= MAX_IN_FLIGHT:
                take_oldest()
        while under_way:
            take_oldest()
        between(num_done)
        return scores

    def _to_devices(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda index: array[index])


def _score(
    spec: ModelSpec,
    intervened: Intervened,
    platform: str,
    num_devices: int,
    params: dict,
    rows: Arrays,
    numbers_B: jax.Array | None,
    *doses: Doses,
):
    """(negative log-likelihoods in nats, whether each target was the most likely token), (rows, targets) each."""
    model = model_of(spec)(params)
    documents = Documents(rows.segments_BT, rows.positions_BT)  # pyright: ignore[reportArgumentType]
    hook = intervened.hook(rows.tokens_BT, numbers_B, doses, positions_BT=rows.positions_BT)
    attend = _attention_in_branches(rows)
    x_BTD = model(rows.tokens_BT, documents=documents, attend=attend, hook=hook)  # pyright: ignore[reportArgumentType]
    x_BND = jnp.take_along_axis(x_BTD, rows.sources_BN[..., None], axis=1)
    num_rows, num_targets = rows.targets_BN.shape
    num_chunks = num_loss_chunks(num_rows // num_devices, num_targets, spec.padded_vocab_size, platform)
    chunks = jax.tree.map(lambda x: _split(x, num_chunks), (x_BND, rows.targets_BN))
    found = jax.lax.map(functools.partial(_of_chunk, model, spec.vocab_size), chunks)
    return jax.tree.map(lambda x_CBN: jnp.moveaxis(x_CBN, 0, 1).reshape(num_rows, num_targets), found)


def _split(x, num_chunks: int):
    """(B, N, ...) -> (num_chunks, B, N / num_chunks, ...): the logits of all of it would be large."""
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0)


def _of_chunk(model: GPT, vocab_size: int, chunk):
    x_BND, targets_BN = chunk
    return token_nll(x_BND, model.head_VD, targets_BN, vocab_size=vocab_size)


def _attention_in_branches(rows: Arrays) -> Attend:
    """A token sees those before it of the context and of its own branch, within its document."""
    num_tokens = rows.tokens_BT.shape[1]
    branches_BT, segments_BT = rows.branches_BT, rows.segments_BT
    is_seen_BTS = jnp.tril(jnp.ones((num_tokens, num_tokens), bool)) & (
        (branches_BT[:, None, :] == 0) | (branches_BT[:, None, :] == branches_BT[:, :, None])
    )
    mask_B1TS = (is_seen_BTS & (segments_BT[:, None, :] == segments_BT[:, :, None]))[:, None]

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        del layer
        return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=mask_B1TS)

    return attend

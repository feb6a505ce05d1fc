"""Loss and rank of every token of given windows, by a checkpoint."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.rows import Row
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import model_of
from gpt_pretrain.model.losses import num_loss_chunks, token_nll
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.train import pretrained
from gpt_pretrain.train.checkpoint_copies import checkpoint_at
from gpt_pretrain.train.step import split_tokens

_TOKENS_AT_ONCE = 1 << 13


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """How well each target was predicted; the first token of a window is no target.

    Attributes:
      checkpoint: the directory it was read from.
      updates: that the checkpoint has made.
      document_mask: attention was kept within documents, as in the checkpoint's training.
      nll: in nats, float32 (rows, seq_len).
      rank: int32 (rows, seq_len); 1 where the target was the most likely token.
      interventions: of the checkpoint's training, each in words. The losses are without them.
    """

    checkpoint: str
    updates: int
    document_mask: bool
    nll: np.ndarray
    rank: np.ndarray
    interventions: tuple[str, ...] = ()

    def mean(self, row: int) -> float:
        """Of one row, in nats."""
        return float(self.nll[row].mean())


def losses_of_rows(run: OpenedRun, step_index: int, rows: Sequence[Row], checkpoint: str) -> TokenLosses:
    """`losses_of` rows of a batch."""
    manifest = run.manifest(run.plan.stage_at(step_index).streams[0])
    digest = None if manifest is None else manifest.spec.tokenizer_digest
    tokens_NT = np.stack([row.tokens for row in rows])
    return losses_of(checkpoint, tokens_NT, end_of_text=rows[0].tokenizer.end_of_text, tokenizer_digest=digest)


def losses_of(
    checkpoint: str, tokens_NT: np.ndarray, *, end_of_text: int, tokenizer_digest: str | None = None
) -> TokenLosses:
    """Losses of windows (rows, seq_len + 1) without dropout and interventions.

    Args:
      checkpoint: a run's save_dir, or one checkpoint in it; its document mask, if it has one, is kept.
      end_of_text: the id that begins each document.
      tokenizer_digest: of the one that made the ids, if known.

    Raises ValueError: no good checkpoint, windows too long for it, or ids of another vocabulary.
    """
    place = checkpoint_at(checkpoint)
    directory = place.name
    params, metadata = pretrained.load(place.directory, with_interventions=True)
    spec, trained_with = metadata.model.plain(), metadata.model.interventions
    seq_len = tokens_NT.shape[1] - 1
    if seq_len > spec.num_positions:
        raise ValueError(f"{directory}: has {spec.num_positions} positions, the windows have {seq_len} inputs")
    theirs = metadata.tokenizer_digest
    if tokenizer_digest and theirs and tokenizer_digest != theirs:
        raise ValueError(
            f"{directory}: trained on ids of tokenizer {metadata.tokenizer!r:.200} (digest {theirs}), these are of the "
            f"digest {tokenizer_digest}"
        )
    if tokens_NT.max(initial=0) >= spec.vocab_size:
        raise ValueError(f"{directory}: knows the ids below {spec.vocab_size}, found {tokens_NT.max()} in the windows")
    nll, rank = nll_and_rank(params, spec, tokens_NT, end_of_text=end_of_text)
    in_words = tuple(each.described() for each in trained_with)
    return TokenLosses(directory, metadata.step, spec.document_mask, nll, rank, in_words)


def nll_of(params: dict, spec: ModelSpec, tokens_NT: np.ndarray, *, end_of_text: int) -> np.ndarray:
    """Loss in nats of each target of windows (rows, seq_len + 1): float32 (rows, seq_len)."""
    return _computed(params, spec, tokens_NT, end_of_text, with_rank=False)[0]


def nll_and_rank(
    params: dict, spec: ModelSpec, tokens_NT: np.ndarray, *, end_of_text: int
) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nats, float32, and rank, int32, of each target of windows (rows, seq_len + 1): (rows, seq_len) each."""
    nll, rank = _computed(params, spec, tokens_NT, end_of_text, with_rank=True)
    return nll, rank


def _computed(
    params: dict, spec: ModelSpec, tokens_NT: np.ndarray, end_of_text: int, *, with_rank: bool
) -> list[np.ndarray]:
    num_rows, seq_len = tokens_NT.shape[0], tokens_NT.shape[1] - 1
    num_at_once = max(1, min(num_rows, _TOKENS_AT_ONCE // seq_len))
    num_chunks = num_loss_chunks(num_at_once, seq_len, spec.padded_vocab_size, jax.default_backend())
    compute = _compiled(spec, end_of_text, num_chunks, with_rank)
    wholes = [np.empty((num_rows, seq_len), dtype) for dtype in ([np.float32, np.int32] if with_rank else [np.float32])]
    padded = np.zeros((num_at_once, seq_len + 1), tokens_NT.dtype)  # one shape: compiled once
    for first in range(0, num_rows, num_at_once):
        rows = slice(first, min(first + num_at_once, num_rows))
        padded[: rows.stop - first] = tokens_NT[rows]
        for whole, found_CBT in zip(wholes, compute(params, padded), strict=True):
            found_BT = np.moveaxis(np.asarray(found_CBT), 0, 1).reshape(num_at_once, seq_len)
            whole[rows] = found_BT[: rows.stop - first]
    return wholes


@lru_cache(maxsize=8)  # once for all checkpoints of a run
def _compiled(spec: ModelSpec, end_of_text: int, num_chunks: int, with_rank: bool):
    to_model = model_of(spec)

    @jax.jit
    def compute(params, window_BT):
        model = to_model(params)
        inputs_BT, targets_BT = split_tokens(window_BT)
        x_BTD = model(inputs_BT, documents=documents_of(inputs_BT, end_of_text) if spec.document_mask else None)
        of_chunk = partial(_of_chunk, model, spec.vocab_size, with_rank)
        return jax.lax.map(of_chunk, _chunks((x_BTD, targets_BT), num_chunks))

    return compute


def _of_chunk(model, vocab_size: int, with_rank: bool, inputs):
    """(nll_BT in nats, and rank_BT from 1 if wanted) of a piece of the time axis: the logits of all would be large."""
    x_BTD, targets_BT = inputs
    nll_BT, _ = token_nll(x_BTD, model.head_VD, targets_BT, vocab_size=vocab_size)
    if not with_rank:
        return (nll_BT,)
    logits_BTV = model.logits(x_BTD)[..., :vocab_size]
    target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    return nll_BT, 1 + (logits_BTV > target_BT1).sum(-1)


def _chunks(arrays, num_chunks: int):
    """(B, T, ...) -> (num_chunks, B, T / num_chunks, ...)"""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0), arrays)

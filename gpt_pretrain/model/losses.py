"""Next-token cross-entropy and accuracy, without ever holding the logits of a whole batch.

A GPT-2 vocabulary makes the logits the largest array of the step: 64 x 1024 tokens in float32 are
13 GB. `summed_nll` therefore walks over the time axis in chunks, and since the loss is the last thing the
model does, it computes the gradients of hidden states and head right there in the forward pass,
while the logits of the chunk are still at hand: nothing is stored and nothing is computed twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Logits of one chunk on one device. On CPU small chunks stay clear of the allocator: the same speed as 2**27 in a
# quarter of the memory. Accelerators need large ones, since each chunk reads and writes the head's whole gradient.
_MAX_CHUNK_LOGITS = {"cpu": 2**25}
_MAX_CHUNK_LOGITS_ELSEWHERE = 2**28


def num_loss_chunks(batch_per_device: int, seq_len: int, padded_vocab_size: int, platform: str) -> int:
    """The smallest divisor of `seq_len` that keeps a chunk's logits small: 1 GiB, on CPU 128 MiB, a device."""
    most = _MAX_CHUNK_LOGITS.get(platform, _MAX_CHUNK_LOGITS_ELSEWHERE)
    wanted = min(seq_len, -(-batch_per_device * seq_len * padded_vocab_size // most))
    return next(n for n in range(wanted, seq_len + 1) if seq_len % n == 0)


def token_nll(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], *, vocab_size: int
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Negative log-likelihood of each target, and whether it was the most likely token.

    Args:
      x_BTD: final hidden states, in the compute dtype.
      head_VD: output embedding (tied to the input's), float32.
      targets_BT: integer token ids in [0, vocab_size).
      vocab_size: columns from here on are padding of the vocabulary and take no part in the softmax.

    Returns:
      nll_BT in nats, float32; correct_BT, bool.
    """
    return _nll_of_logits(_logits(x_BTD, head_VD.astype(x_BTD.dtype), vocab_size, "float32"), targets_BT)[:2]


def nll_per_row(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    vocab_size: int,
    num_chunks: int,
    logits_dtype: str = "float32",
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Sums over time: (negative log-likelihood in nats, number of correct predictions), each (B,).

    Arguments as for `token_nll`; `num_chunks` divides the time axis.
    """
    weight_VD = head_VD.astype(x_BTD.dtype)

    def chunk(carry, inputs):
        nll_BT, correct_BT, _ = _nll_of_logits(_logits(inputs[0], weight_VD, vocab_size, logits_dtype), inputs[1])
        return (carry[0] + nll_BT.sum(-1), carry[1] + correct_BT.sum(-1)), None

    num_rows = targets_BT.shape[0]
    zero = (jnp.zeros(num_rows, jnp.float32), jnp.zeros(num_rows, jnp.int32))
    return _scan(chunk, zero, (x_BTD, targets_BT), num_chunks)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def summed_nll(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    vocab_size: int,
    num_chunks: int,
    logits_dtype: str = "float32",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`nll_per_row` summed over the rows too, and with gradients; the head's is in the head's dtype."""
    nll_B, correct_B = nll_per_row(x_BTD, head_VD, targets_BT, vocab_size, num_chunks, logits_dtype)
    return nll_B.sum(), correct_B.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def summed_kept_nll(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    keep_BT: Bool[Array, "B T"],
    vocab_size: int,
    num_chunks: int,
    logits_dtype: str = "float32",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`summed_nll` of those targets that `keep_BT` has."""
    return _summed_kept_nll_fwd(x_BTD, head_VD, targets_BT, keep_BT, vocab_size, num_chunks, logits_dtype)[0]


def _summed_nll_fwd(x_BTD, head_VD, targets_BT, vocab_size, num_chunks, logits_dtype):
    weight_VD = head_VD.astype(x_BTD.dtype)  # once, not in every chunk

    def chunk(carry, inputs):
        nll, correct, dhead_VD = carry
        x_BTD, targets_BT = inputs
        logits_BTV = _logits(x_BTD, weight_VD, vocab_size, logits_dtype)
        nll_BT, correct_BT, lse_BT = _nll_of_logits(logits_BTV, targets_BT)
        is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
        dlogits_BTV = (jnp.exp(logits_BTV - lse_BT[..., None]) - is_target_BTV).astype(x_BTD.dtype)
        dx_BTD = jnp.einsum("btv,vd->btd", dlogits_BTV, weight_VD)
        dhead_VD += jnp.einsum("btv,btd->vd", dlogits_BTV, x_BTD, preferred_element_type=jnp.float32)
        return (nll + nll_BT.sum(), correct + correct_BT.sum(), dhead_VD), dx_BTD

    zero = (jnp.float32(0), jnp.int32(0), jnp.zeros(head_VD.shape, jnp.float32))
    (nll, correct, dhead_VD), dx_BTD = _scan(chunk, zero, (x_BTD, targets_BT), num_chunks)
    return (nll, correct), (dx_BTD, dhead_VD.astype(head_VD.dtype))


def _summed_nll_bwd(vocab_size, num_chunks, logits_dtype, residuals, cotangents):
    del vocab_size, num_chunks, logits_dtype
    dx_BTD, dhead_VD = residuals
    scale = cotangents[0]
    return dx_BTD * scale.astype(dx_BTD.dtype), dhead_VD * scale, None


summed_nll.defvjp(_summed_nll_fwd, _summed_nll_bwd)


def _summed_kept_nll_fwd(x_BTD, head_VD, targets_BT, keep_BT, vocab_size, num_chunks, logits_dtype):
    """As `_summed_nll_fwd`, apart from it so that no step without masked targets has an operation for them."""
    weight_VD = head_VD.astype(x_BTD.dtype)

    def chunk(carry, inputs):
        nll, correct, dhead_VD = carry
        x_BTD, targets_BT, keep_BT = inputs
        logits_BTV = _logits(x_BTD, weight_VD, vocab_size, logits_dtype)
        nll_BT, correct_BT, lse_BT = _nll_of_logits(logits_BTV, targets_BT)
        is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
        dlogits_BTV = jnp.exp(logits_BTV - lse_BT[..., None]) - is_target_BTV
        dlogits_BTV = jnp.where(keep_BT[..., None], dlogits_BTV, 0).astype(x_BTD.dtype)
        dx_BTD = jnp.einsum("btv,vd->btd", dlogits_BTV, weight_VD)
        dhead_VD += jnp.einsum("btv,btd->vd", dlogits_BTV, x_BTD, preferred_element_type=jnp.float32)
        nll_BT = jnp.where(keep_BT, nll_BT, 0)
        return (nll + nll_BT.sum(), correct + (correct_BT & keep_BT).sum(), dhead_VD), dx_BTD

    zero = (jnp.float32(0), jnp.int32(0), jnp.zeros(head_VD.shape, jnp.float32))
    (nll, correct, dhead_VD), dx_BTD = _scan(chunk, zero, (x_BTD, targets_BT, keep_BT), num_chunks)
    return (nll, correct), (dx_BTD, dhead_VD.astype(head_VD.dtype))


def _summed_kept_nll_bwd(vocab_size, num_chunks, logits_dtype, residuals, cotangents):
    return *_summed_nll_bwd(vocab_size, num_chunks, logits_dtype, residuals, cotangents), None


summed_kept_nll.defvjp(_summed_kept_nll_fwd, _summed_kept_nll_bwd)


def _logits(x_BTD, weight_VD, vocab_size, dtype):
    """Float32 logits of a product in `dtype`; padded columns are -inf, so that exp() makes them exactly nothing."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, weight_VD, preferred_element_type=jnp.dtype(dtype))
    logits_BTV = logits_BTV.astype(jnp.float32)
    num_columns = weight_VD.shape[0]
    if vocab_size == num_columns:
        return logits_BTV
    return jnp.where(jnp.arange(num_columns) < vocab_size, logits_BTV, -jnp.inf)


def _nll_of_logits(logits_BTV, targets_BT):
    max_BT, sum_BT = jax.lax.platform_dependent(logits_BTV, cuda=_softmax_in_one_pass, default=_softmax_in_two_passes)
    lse_BT = max_BT + jnp.log(sum_BT)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return lse_BT - target_BT, target_BT >= max_BT, lse_BT


def _softmax_in_two_passes(logits_BTV):
    """The largest logit of each token, and the sum of exponentials of all, less the largest."""
    max_BT = logits_BTV.max(-1)
    return max_BT, jnp.exp(logits_BTV - max_BT[..., None]).sum(-1)


def _softmax_in_one_pass(logits_BTV):
    """The same, reading the logits once and taking two exponentials of each: memory is what GPUs wait for."""

    def joined(a, b):
        max_BT = jnp.maximum(a[0], b[0])
        return max_BT, a[1] * jnp.exp(a[0] - max_BT) + b[1] * jnp.exp(b[0] - max_BT)

    lowest = jnp.finfo(jnp.float32).min  # not -inf: the difference of two would be NaN
    first = jnp.maximum(logits_BTV, lowest), jnp.where(logits_BTV == -jnp.inf, 0.0, 1.0)
    return jax.lax.reduce(first, (lowest, jnp.float32(0)), joined, (logits_BTV.ndim - 1,))


def _scan(chunk, carry, inputs, num_chunks):
    """`lax.scan` over the time axis (axis 1) in `num_chunks` pieces; the batch axis keeps its sharding."""
    if num_chunks == 1:
        return chunk(carry, inputs)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0)

    carry, outputs = jax.lax.scan(chunk, carry, jax.tree.map(split, inputs))
    joined = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:]), outputs)
    return carry, joined

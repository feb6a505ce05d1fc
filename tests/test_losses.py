import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_pretrain.model import losses
from gpt_pretrain.model.losses import num_loss_chunks, summed_nll, token_nll

B, T, D, V, VOCAB_SIZE = 3, 8, 5, 16, 13


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (B, T, D)),
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, T), 0, VOCAB_SIZE),
    )


def reference(x_BTD, head_VD, targets_BT):
    logits_BTV = x_BTD @ head_VD[:VOCAB_SIZE].T
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return nll_BT.sum(), (logits_BTV.argmax(-1) == targets_BT).sum()


@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_loss_and_gradients_equal_the_plain_softmax_without_the_padded_columns(inputs, num_chunks):
    x, head, targets = inputs

    def ours(x, head):
        nll, correct = summed_nll(x, head, targets, VOCAB_SIZE, num_chunks)
        return nll * 0.25, correct

    def theirs(x, head):
        nll, correct = reference(x, head, targets)
        return nll * 0.25, correct

    found, found_grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(x, head)
    expected, expected_grads = jax.value_and_grad(theirs, (0, 1), has_aux=True)(x, head)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found_grads, expected_grads)
    assert not np.any(found_grads[1][VOCAB_SIZE:])
    np.testing.assert_allclose(ours(x, head), expected, rtol=1e-5)  # without differentiation


def test_token_nll_gives_each_token_its_own(inputs):
    x, head, targets = inputs
    nll_BT, correct_BT = token_nll(x, head, targets, vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose((nll_BT.sum(), correct_BT.sum()), reference(x, head, targets), rtol=1e-5)
    probs = jax.nn.softmax(x @ head[:VOCAB_SIZE].T)
    np.testing.assert_allclose(nll_BT[1, 2], -jnp.log(probs[1, 2, targets[1, 2]]), rtol=1e-4)


def test_bfloat16_activations_get_bfloat16_gradients_and_the_head_float32_ones(inputs):
    x, head, targets = inputs
    grads = jax.grad(lambda x, h: summed_nll(x, h, targets, VOCAB_SIZE, 2)[0], (0, 1))(x.astype(jnp.bfloat16), head)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32]


def test_chunks_divide_the_time_axis_and_fit():
    assert num_loss_chunks(1, 128, 264, "cpu") == 1
    for platform, most in (("cpu", 2**25), ("gpu", 2**28)):
        for batch, seq_len in ((16, 1024), (7, 1000), (64, 1024)):
            chunks = num_loss_chunks(batch, seq_len, 50304, platform)
            assert seq_len % chunks == 0 and batch * seq_len * 50304 / chunks <= most


def test_both_forms_of_the_softmax_give_the_largest_logit_and_the_sum_of_exponentials_also_with_padded_columns(inputs):
    logits = np.random.default_rng(0).normal(0, 30, (2, 5, 300)).astype(np.float32)
    logits[..., 290:] = -np.inf
    for form in (losses._softmax_in_one_pass, losses._softmax_in_two_passes):
        largest, total = jax.jit(form)(jnp.asarray(logits))
        np.testing.assert_array_equal(largest, logits.max(-1))
        np.testing.assert_allclose(total, np.exp(logits - logits.max(-1, keepdims=True)).sum(-1), rtol=1e-5)


def test_logits_in_bfloat16_give_about_the_same_loss_and_gradients(inputs):
    def both(dtype):
        def loss(x, head):
            return losses.summed_nll(x, head, inputs[2], VOCAB_SIZE, 2, dtype)[0]

        x, head = inputs[0].astype(jnp.bfloat16), inputs[1]
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, head)

    (loss, grads), (rounded, rounded_grads) = both("float32"), both("bfloat16")
    assert loss != rounded and abs(loss - rounded) < 1e-2 * loss
    for a, b in zip(grads, rounded_grads, strict=True):
        assert a.dtype == b.dtype
        assert np.linalg.norm(np.asarray(a - b, np.float32)) < 2e-2 * np.linalg.norm(np.asarray(a, np.float32))

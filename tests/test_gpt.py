import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.models import make_spec

from gpt_pretrain.model.gpt import GPT, cache_shape, flops_per_token, init_params, model_of, num_params
from gpt_pretrain.model.spec import GPTConfig

SEQ_LEN = 12


@pytest.fixture(scope="module")
def spec():
    return make_spec(SEQ_LEN)


def test_attention_is_causal(spec):
    params = init_params(spec, jax.random.key(0))

    @jax.jit
    def logits_of(tokens_BT):
        model = model_of(spec)(params)
        return model.logits(model(tokens_BT))

    tokens = jax.random.randint(jax.random.key(1), (2, SEQ_LEN), 0, 257)
    before = logits_of(tokens)
    for t in (0, 5, SEQ_LEN - 1):
        after = logits_of(tokens.at[:, t].set((tokens[:, t] + 1) % 257))
        assert np.array_equal(before[:, :t], after[:, :t])
        assert not np.allclose(before[:, t:], after[:, t:])


def test_logits_of_known_tiny_weights_equal_those_computed_by_hand():
    spec = GPTConfig(n_layer=1, n_head=2, n_embd=4, vocab_size=6).settle("cpu", seq_len=3, vocab_size=6, end_of_text=0)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))
    p = jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape).astype(np.float32), shapes)
    tokens = np.array([[5, 0, 3]])
    model = model_of(spec)(jax.tree.map(jnp.asarray, p))
    found = model.logits(model(jnp.asarray(tokens)))

    def norm(x, ln):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * ln["scale"] + ln["bias"]

    def linear(x, w):
        return x @ w["kernel"] + w["bias"]

    layer = p["layers"][0]
    table = p["token_embedding"]["embedding"]
    x = table[tokens[0]] + p["position_embedding"]["embedding"]
    q, k, v = np.split(linear(norm(x, layer["ln_1"]), layer["attention"]["qkv"]), 3, axis=-1)
    y = np.zeros_like(x)
    for head in (slice(0, 2), slice(2, 4)):
        for t in range(3):
            weights = np.exp(q[t, head] @ k[: t + 1, head].T / math.sqrt(2))
            y[t, head] = weights / weights.sum() @ v[: t + 1, head]
    x = x + linear(y, layer["attention"]["out"])
    h = linear(norm(x, layer["ln_2"]), layer["mlp"]["up"])
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    x = x + linear(h, layer["mlp"]["down"])
    expected = norm(x, p["ln_f"]) @ table.T
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-5)


def test_gpt2_has_its_published_number_of_parameters():
    config = GPTConfig(vocab_size=50257)
    assert num_params(config.settle("cpu", seq_len=1024, vocab_size=50257, end_of_text=50256)) == 124_439_808


def test_flops_follow_from_parameters_and_attention_and_do_not_count_the_position_table_however_long():
    short, long = (make_spec(SEQ_LEN, block_size=size) for size in (None, 40 * SEQ_LEN))
    assert num_params(long) == num_params(short) + 39 * SEQ_LEN * short.n_embd
    expected = 6 * (num_params(short) - SEQ_LEN * 32) + 12 * 2 * 32 * SEQ_LEN
    assert flops_per_token(short, SEQ_LEN) == flops_per_token(long, SEQ_LEN) == expected


def test_the_cache_has_a_place_for_each_head_of_each_token(spec):
    assert cache_shape(spec, 3, 7) == (3, 7, 2, 16)


def test_initial_weights_are_normal_and_smaller_into_the_residual_stream():
    params = init_params(make_spec(64, n_layer=8, n_embd=128), jax.random.key(0))
    layer = params["layers"][3]
    np.testing.assert_allclose(layer["attention"]["qkv"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(layer["attention"]["out"]["kernel"].std(), 0.02 / 4, rtol=0.05)
    np.testing.assert_allclose(layer["mlp"]["down"]["kernel"].std(), 0.02 / 4, rtol=0.05)
    np.testing.assert_allclose(params["token_embedding"]["embedding"].std(), 0.02, rtol=0.05)
    assert not np.any(layer["mlp"]["up"]["bias"])


def test_dropout_needs_a_key_and_does_something(spec):
    params = init_params(spec, jax.random.key(0))
    tokens = jnp.zeros((1, SEQ_LEN), jnp.int32)
    run = jax.jit(lambda rng: model_of(dataclasses.replace(spec, dropout=0.3))(params)(tokens, rng=rng))
    off, one, same, other = (run(rng) for rng in (None, *map(jax.random.key, (0, 0, 1))))
    assert np.array_equal(one, same)
    assert not np.allclose(off, one) and not np.allclose(one, other)


def test_remat_changes_nothing_but_memory(spec):
    tokens = jnp.arange(SEQ_LEN)[None]
    params = init_params(spec, jax.random.key(0))
    grads = []
    for remat in ("none", "dots", "full"):
        to_model = model_of(dataclasses.replace(spec, remat=remat))
        grads.append(jax.jit(jax.grad(lambda p, to_model=to_model: to_model(p)(tokens).sum()))(params))
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads[0], other)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(spec):
    model = GPT(dataclasses.replace(spec, dtype="bfloat16"), rngs=nnx.Rngs(0))
    assert model(jnp.zeros((1, SEQ_LEN), jnp.int32)).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_embd": 100}, r"n_embd=100 is not divisible by model.n_head=12"),
        ({"n_layer": 0}, "n_layer: found 0"),
        ({"dropout": 1.0}, "dropout: found 1.0"),
        ({"dtype": "float16"}, "dtype: found 'float16'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


def test_auto_is_settled_by_platform_and_requests_are_not_ignored():
    def settled(platform, **changes):
        spec = make_spec(platform=platform, **changes)
        return spec.dtype, spec.attention

    assert settled("cpu") == ("float32", "xla")
    assert settled("tpu", seq_len=1024) == ("bfloat16", "splash")
    assert settled("tpu", seq_len=1000) == settled("tpu", seq_len=1024, dropout=0.1) == ("bfloat16", "xla")
    assert settled("gpu") == ("bfloat16", "cudnn")
    assert settled("gpu", dtype="float32") == ("float32", "xla")
    assert settled("gpu", dropout=0.1) == ("bfloat16", "xla")
    for platform, changes in (("cpu", {}), ("gpu", {"dtype": "float32"}), ("gpu", {"dropout": 0.1})):
        with pytest.raises(ValueError, match="cudnn"):
            settled(platform, attention="cudnn", **changes)

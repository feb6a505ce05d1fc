import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt_pretrain.model.gpt import GPT, GPTConfig, graph_of, init_params

SEQ_LEN = 12


@pytest.fixture
def model(tiny_config):
    return GPT(tiny_config, SEQ_LEN, rngs=nnx.Rngs(0))


def test_attention_is_causal(model):
    tokens = jax.random.randint(jax.random.key(1), (2, SEQ_LEN), 0, 257)
    before = model.logits(model(tokens))
    for t in (0, 5, SEQ_LEN - 1):
        after = model.logits(model(tokens.at[:, t].set((tokens[:, t] + 1) % 257)))
        assert np.array_equal(before[:, :t], after[:, :t])
        assert not np.allclose(before[:, t:], after[:, t:])


def test_logits_of_known_tiny_weights_equal_those_computed_by_hand():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=4, vocab_size=6).resolve("cpu")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, 3, jax.random.key(0)))
    p = jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape).astype(np.float32), shapes)
    tokens = np.array([[5, 0, 3]])
    found = nnx.merge(graph_of(config, 3), jax.tree.map(jnp.asarray, p))
    found = found.logits(found(tokens))

    def norm(x, ln):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * ln["scale"] + ln["bias"]

    def linear(x, w):
        return x @ w["kernel"] + w["bias"]

    block = p["blocks"][0]
    table = p["token_embedding"]["embedding"]
    x = table[tokens[0]] + p["position_embedding"]["embedding"]
    q, k, v = np.split(linear(norm(x, block["ln_1"]), block["attention"]["qkv"]), 3, axis=-1)
    y = np.zeros_like(x)
    for head in (slice(0, 2), slice(2, 4)):
        for t in range(3):
            weights = np.exp(q[t, head] @ k[: t + 1, head].T / math.sqrt(2))
            y[t, head] = weights / weights.sum() @ v[: t + 1, head]
    x = x + linear(y, block["attention"]["out"])
    h = linear(norm(x, block["ln_2"]), block["mlp"]["up"])
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    x = x + linear(h, block["mlp"]["down"])
    expected = norm(x, p["ln_f"]) @ table.T
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-5)


def test_gpt2_has_its_published_number_of_parameters():
    shapes = jax.eval_shape(lambda: init_params(GPTConfig(vocab_size=50257).resolve("cpu"), 1024, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


def test_initial_weights_are_normal_and_smaller_into_the_residual_stream():
    params = init_params(
        GPTConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=512).resolve("cpu"), 64, jax.random.key(0)
    )
    block = params["blocks"][3]
    np.testing.assert_allclose(block["attention"]["qkv"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(block["attention"]["out"]["kernel"].std(), 0.02 / 4, rtol=0.05)
    np.testing.assert_allclose(block["mlp"]["down"]["kernel"].std(), 0.02 / 4, rtol=0.05)
    np.testing.assert_allclose(params["token_embedding"]["embedding"].std(), 0.02, rtol=0.05)
    assert not np.any(block["mlp"]["up"]["bias"])


def test_dropout_needs_a_key_and_does_something(tiny_config):
    model = GPT(dataclasses.replace(tiny_config, dropout=0.3), SEQ_LEN, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, SEQ_LEN), jnp.int32)
    off, one, same, other = (model(tokens, rng=rng) for rng in (None, *map(jax.random.key, (0, 0, 1))))
    assert np.array_equal(one, same)
    assert not np.allclose(off, one) and not np.allclose(one, other)


def test_remat_changes_nothing_but_memory(tiny_config):
    tokens = jnp.arange(SEQ_LEN)[None]
    params = init_params(tiny_config, SEQ_LEN, jax.random.key(0))
    grads = []
    for remat in (False, True):
        graph = graph_of(dataclasses.replace(tiny_config, remat=remat), SEQ_LEN)
        grads.append(jax.grad(lambda p, graph=graph: nnx.merge(graph, p)(tokens).sum())(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(tiny_config):
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    model = GPT(config, SEQ_LEN, rngs=nnx.Rngs(0))
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
        config = GPTConfig(**changes).resolve(platform)
        return config.dtype, config.attention

    assert settled("cpu") == ("float32", "xla")
    assert settled("tpu") == ("bfloat16", "xla")
    assert settled("gpu") == ("bfloat16", "cudnn")
    assert settled("gpu", dtype="float32") == ("float32", "xla")
    assert settled("gpu", dropout=0.1) == ("bfloat16", "xla")
    for platform, changes in (("cpu", {}), ("gpu", {"dtype": "float32"}), ("gpu", {"dropout": 0.1})):
        with pytest.raises(ValueError, match="cudnn"):
            settled(platform, attention="cudnn", **changes)

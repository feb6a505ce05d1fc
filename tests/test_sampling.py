import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import VOCAB_SIZE

from gpt_pretrain.model.gpt import init_params, model_of
from gpt_pretrain.model.sampling import choose_token, sample

SEQ_LEN = 24


@pytest.fixture
def params(tiny_spec):
    fresh = init_params(tiny_spec, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 8, fresh)  # far from uniform, so that mistakes show


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_the_cache_equals_generation_without(tiny_spec, params, temperature):
    prompt = np.array([256, 5, 6, 7])
    how = {"temperature": temperature, "top_k": 20, "top_p": 0.9}
    found = sample(params, tiny_spec, prompt, seq_len=SEQ_LEN, num_tokens=100, seed=3, **how)

    @jax.jit
    def all_logits(tokens_BT):  # padded to one length; attention is causal, so the padding does not matter
        model = model_of(tiny_spec)(params)
        return model.logits(model(tokens_BT))

    tokens, rng = list(prompt), jax.random.key(3)
    while len(tokens) <= SEQ_LEN:
        padded = np.pad(tokens, (0, SEQ_LEN - len(tokens)))[None]
        logits_V = all_logits(padded)[:, len(tokens) - 1, :VOCAB_SIZE]
        tokens.append(int(choose_token(logits_V, jax.random.fold_in(rng, len(tokens) - len(prompt)), **how)[0]))
    assert found.tolist() == tokens[len(prompt) :]
    assert len(set(found.tolist())) > 3


def test_temperature_top_k_and_top_p_choose_as_they_say():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def chosen(**how):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
        keys = jax.random.split(jax.random.key(0), 2000)
        tokens = jax.vmap(lambda key: choose_token(logits, key, **settings)[0])(keys)
        return np.bincount(tokens, minlength=4) / 2000

    np.testing.assert_allclose(chosen(), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(chosen(top_k=2), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(chosen(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(chosen(top_p=0.4), [1, 0, 0, 0])
    np.testing.assert_allclose(chosen(temperature=0.0), [1, 0, 0, 0])
    assert chosen(temperature=0.3)[0] > 0.8


def test_padded_columns_are_never_sampled(tiny_spec, params):
    params["token_embedding"]["embedding"] = params["token_embedding"]["embedding"].at[VOCAB_SIZE:].set(50.0)
    found = sample(params, tiny_spec, np.array([1]), seq_len=SEQ_LEN, num_tokens=20, temperature=2.0)
    assert found.max() < VOCAB_SIZE


def test_a_prompt_that_does_not_fit_is_refused(tiny_spec, params):
    for prompt in (np.zeros(SEQ_LEN + 1, int), np.zeros(0, int)):
        with pytest.raises(ValueError, match=f"room for 1 to {SEQ_LEN}"):
            sample(params, tiny_spec, prompt, seq_len=SEQ_LEN, num_tokens=5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_pretrain.model import perturbations
from gpt_pretrain.model.gpt import GPT
from gpt_pretrain.model.perturbations import Perturbation, make_hook

X = jnp.ones((2, 3, 4))


def shift(x_BTD, layer, rng):
    return x_BTD + 10 * layer


def test_a_hook_acts_at_its_layers_and_sites_only():
    hook = make_hook([Perturbation(shift, layers=[1, -1], sites=["mlp_out", "attn_out"])], 4, None)
    touched = {
        (site, layer)
        for site in perturbations.SITES
        for layer in range(4)
        if not np.array_equal(hook(site, layer, X), X)
    }
    assert touched == {("mlp_out", 1), ("attn_out", 1), ("mlp_out", 3), ("attn_out", 3)}
    everywhere = make_hook([Perturbation(perturbations.zeroing)], 4, None)
    assert not everywhere("block_in", 2, X).any()


def test_the_built_in_ones_do_what_they_say():
    rng = jax.random.key(0)
    noisy = perturbations.gaussian_noise(jnp.zeros((100, 10, 10)), 0, rng, stddev=0.5)
    assert abs(noisy.std() - 0.5) < 0.02 and abs(noisy.mean()) < 0.02
    assert np.array_equal(perturbations.scaling(X, 0, rng, factor=3.0), 3 * X)
    assert not perturbations.zeroing(X, 0, rng).any()
    assert np.array_equal(perturbations.added_vector(X, 0, rng, vector=[0, 1, 2, 3], scale=2)[1, 2], [1, 3, 5, 7])


def test_an_added_vector_may_come_from_a_file(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(4))
    assert np.array_equal(perturbations.added_vector(X, 0, None, vector=str(tmp_path / "v.npy"))[0, 0], [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"found shape \(3,\), expected \(4,\)"):
        perturbations.added_vector(X, 0, None, vector=[1, 2, 3])


def test_each_place_gets_its_own_random_numbers():
    hook = make_hook([Perturbation(perturbations.gaussian_noise, sites=["block_in", "mlp_out"])], 2, jax.random.key(0))
    results = [hook(site, layer, X) for site in ("block_in", "mlp_out") for layer in range(2)]
    assert len({np.asarray(result).tobytes() for result in results}) == 4


def test_zeroing_both_sublayers_makes_a_layer_the_identity(tiny_spec):
    from flax import nnx

    model = GPT(tiny_spec, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    seen = {}

    def hook(site, layer, x_BTD):
        if site == "block_in":
            seen[layer] = x_BTD
        return x_BTD if site == "block_in" else jnp.zeros_like(x_BTD)

    model(tokens, hook=hook)
    assert np.array_equal(seen[0], seen[1])


def test_a_function_of_ones_own_is_found_by_name_and_misuse_is_refused_early():
    assert Perturbation("test_perturbations:shift").function is shift
    for wrong, message in (
        ({"function": shift, "sites": ["mlp"]}, "expected some of"),
        ({"function": shift, "sites": "mlp_out"}, "expected some of"),
        ({"function": "nowhere:f"}, "cannot load"),
        ({"function": "shift"}, "module:function"),
        ({"function": lambda x: x}, r"cannot be called as \(x_BTD, layer, rng\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Perturbation(**wrong)
    with pytest.raises(ValueError, match=r"no layer \[4\]; the model has 4"):
        Perturbation(shift, layers=[4]).check_layers(4)
    with pytest.raises(ValueError, match="returned shape"):
        make_hook([Perturbation(lambda x, layer, rng: x[:1])], 2, None)("block_in", 0, X)

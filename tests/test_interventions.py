"""Interventions: what each kind does, where, when and to whom; and that strength 0 is nothing."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.models import make_spec

from gpt_pretrain.model import intervening, interventions, sites
from gpt_pretrain.model.gpt import GPT
from gpt_pretrain.model.intervening import Rows, doses_at, make_hook
from gpt_pretrain.model.interventions import KINDS, Intervention
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.train.interventions import chosen_interventions, with_vectors
from gpt_pretrain.train.weight_files import safetensors_file

B, T, D, LAYERS, HEADS = 4, 6, 8, 4, 2
X = jax.random.normal(jax.random.key(5), (B, T, D))
TOKENS = jnp.arange(B * T).reshape(B, T) % 7
VECTOR = tuple(range(D))
OPTIONS = {"add": {"vector": VECTOR}, "clip": {"limit": 0.5}, "round": {"bits": 3}}
ONE_OF_EACH = [Intervention(kind, strength=0.5, **OPTIONS.get(kind, {})) for kind in KINDS]


def shift(x_BTD, ctx):
    return x_BTD + 10 * (1 + ctx.layer)


def done(*given, x=X, step=1, site="block_in", layer=0, numbers=None, tokens=TOKENS, start=0, seed=0):
    """What a hook with these interventions makes of `x`."""
    numbers = jnp.arange(len(x)) if numbers is None else jnp.asarray(numbers)
    (doses,) = doses_at(step, given)
    hook = make_hook(given, LAYERS, HEADS, doses, Rows(tokens, numbers, start, seed))
    return np.asarray(jax.jit(functools.partial(hook, site, layer))(x))


def touched(*given, **how):
    """Which elements are other than before."""
    return done(*given, **how) != np.asarray(how.get("x", X))


def test_a_hook_acts_at_its_layers_and_sites_only():
    each = Intervention("zero", layers=[1, -1], sites=["mlp_out", "attn_heads"])
    places = [(site, layer) for site in sites.LAYER_SITES for layer in range(LAYERS)]
    found = {place for place in places if touched(each, site=place[0], layer=place[1]).any()}
    assert found == {("mlp_out", 1), ("attn_heads", 1), ("mlp_out", 3), ("attn_heads", 3)}
    assert all(touched(Intervention("zero"), layer=layer).all() for layer in range(LAYERS))
    assert touched(Intervention("zero", sites=["embeddings"]), site="embeddings", layer=None).all()


def test_each_kind_does_what_it_says():
    x, half = np.asarray(X), 0.5
    assert set(intervening._DO) == set(KINDS)
    expected = {
        "scale": x * 1.5,
        "zero": x * half,
        "mean": half * x + half * x.mean((0, 1)),
        "add": x + half * np.arange(D),
        "clip": half * x + half * np.clip(x, -0.5, 0.5),
    }
    size = np.abs(x).max(-1, keepdims=True) / 3
    expected["round"] = half * x + half * np.round(x / size) * size
    for kind, value in expected.items():
        each = next(each for each in ONE_OF_EACH if each.kind == kind)
        np.testing.assert_allclose(done(each), value, rtol=1e-5, atol=1e-6, err_msg=kind)
    for kind, value in (("zero", 0 * x), ("clip", np.clip(x, -0.5, 0.5))):
        assert np.array_equal(done(Intervention(kind, **OPTIONS.get(kind, {}))), value), "strength 1 is exact"
    given = Intervention("mean", vector=VECTOR)
    assert np.array_equal(done(given), np.broadcast_to(np.arange(D, dtype=np.float32), X.shape))


def test_the_random_kinds_have_the_size_they_say():
    x = jnp.full((40, 50, 16), 3.0)
    tokens = jnp.zeros(x.shape[:2], jnp.int32)
    noise = done(Intervention("noise", strength=0.5), x=x, tokens=tokens) - 3
    assert abs(noise.std() - 0.5) < 0.01 and abs(noise.mean()) < 0.01
    relative = done(Intervention("relative_noise", strength=0.5), x=x, tokens=tokens) - 3
    assert abs(relative.std() - 1.5) < 0.02
    dropped = done(Intervention("dropout", strength=0.25), x=x, tokens=tokens)
    assert set(np.unique(dropped)) == {0.0, 4.0} and abs((dropped == 0).mean() - 0.25) < 0.01


@pytest.mark.parametrize("on_gradients", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strength_zero_is_the_identity_bit_by_bit(dtype, on_gradients):
    x = X.astype(dtype).at[0, 0, 0].set(-0.0)
    for each in [*ONE_OF_EACH, Intervention(shift), Intervention(lambda x, ctx: x * jnp.nan)]:
        none = dataclasses.replace(each, strength=0.0, on_gradients=on_gradients)
        (doses,) = doses_at(1, [none])
        hook = make_hook([none], LAYERS, HEADS, doses, Rows(TOKENS, jnp.arange(B), 0, 0))
        out, vjp = jax.vjp(functools.partial(hook, "block_in", 2), x)
        assert np.asarray(out).tobytes() == np.asarray(x).tobytes(), each
        if on_gradients or each.kind in KINDS:
            assert np.array_equal(np.asarray(vjp(x)[0], np.float32), np.asarray(x, np.float32)), each


def test_on_gradients_the_activation_stays_and_its_gradient_is_changed():
    for each in (*ONE_OF_EACH, Intervention(shift, strength=1.0)):
        given = dataclasses.replace(each, on_gradients=True)
        (doses,) = doses_at(1, [given])
        rows = Rows(TOKENS, jnp.arange(B), 0, 0)
        hook = make_hook([given], LAYERS, HEADS, doses, rows)

        @jax.jit
        def both(x, g, hook=hook):
            out, vjp = jax.vjp(jax.checkpoint(functools.partial(hook, "block_in", 0)), x)
            return out, vjp(g)[0]

        out, gradient = both(X, X[::-1])
        assert np.array_equal(out, X), each
        np.testing.assert_allclose(gradient, done(each, x=X[::-1]), rtol=1e-6, atol=1e-6)


def test_only_the_chosen_rows_tokens_positions_channels_and_heads_are_touched():
    def where(**how):
        site = "attn_heads" if "heads" in how else "block_in"
        return touched(
            Intervention("add", vector=[1.0] * D, sites=[site], **how), numbers=[6, 7, 8, 9], site=site, start=3
        )

    every = np.ones((B, T, D), bool)
    channels = np.isin(np.arange(D), [1, 5])
    assert np.array_equal(where(channels=[1, 5]), every & channels)
    assert np.array_equal(where(heads=[1]), every & (np.arange(D) >= D // 2))
    assert np.array_equal(where(positions=(4, 6)), every & np.isin(np.arange(T), [1, 2])[:, None])
    assert np.array_equal(where(token_ids=[2, 3]), every & np.isin(TOKENS, [2, 3])[..., None])
    assert np.array_equal(where(rows=[7, 9, 0]), every & np.array([False, True, False, True])[:, None, None])
    both = where(rows=[7], channels=[1])
    assert both.sum() == T and both[1, :, 1].all()


def test_a_fraction_of_the_rows_is_drawn_anew_at_each_step_and_is_the_same_at_every_place():
    each = Intervention("zero", rows=0.25, sites=["block_in", "mlp_out"])
    x, tokens = jnp.ones((400, 1, D)), jnp.zeros((400, 1), jnp.int32)

    def rows(**how):
        return touched(each, x=x, tokens=tokens, **how).any((1, 2))

    assert 0.18 < rows().mean() < 0.32
    assert np.array_equal(rows(), rows(site="mlp_out", layer=3))
    assert not np.array_equal(rows(), rows(step=2)) and not np.array_equal(rows(), rows(seed=1))


def test_random_numbers_are_of_the_row_the_place_and_the_step_and_of_nothing_else():
    noise = Intervention("noise", sites=["block_in", "mlp_out"])
    whole = done(noise)
    for first in (0, 2):  # the same rows in two microbatches, or on two devices
        part = done(noise, x=X[first : first + 2], numbers=[first, first + 1], tokens=TOKENS[:2])
        assert np.array_equal(part, whole[first : first + 2])
    others = [done(noise, **how) for how in ({"step": 2}, {"layer": 1}, {"site": "mlp_out"}, {"seed": 1})]
    again = done(Intervention("scale", strength=0.0), noise)  # the second of two
    assert len({each.tobytes() for each in (whole, *others, again)}) == 6


def test_where_tokens_come_one_after_the_other_each_has_noise_and_a_position_of_its_own():
    x, tokens = jnp.ones((B, 1, D)), TOKENS[:, :1]

    def at(start, each):
        return done(each, x=x, tokens=tokens, start=jnp.asarray(start))

    noise, some_rows = Intervention("noise"), Intervention("zero", rows=0.5)
    assert not (at(1, noise) == at(2, noise)).any()
    assert np.array_equal(at([1, 2, 1, 2], noise)[1::2], at(2, noise)[1::2])
    assert np.array_equal(at(1, some_rows), at(2, some_rows))
    added = at([3, 4, 5, 6], Intervention("add", vector=[1.0] * D, positions=(4, 6)))
    assert (added != 1).all((1, 2)).tolist() == [False, True, True, False]


def test_a_schedule_says_how_strong_each_step_is():
    def strengths(steps, **how):
        return [round(Intervention("noise", strength=2.0, **how).strength_at(step), 6) for step in steps]

    assert strengths((1, 2, 3, 4), first_step=2, last_step=3) == [0, 2, 2, 0]
    assert strengths((1, 3, 4, 9, 10), schedule=[(3, 0.5), (10, 1.5)]) == [1, 1, 1, 1, 3]
    assert strengths((1, 3, 5, 7, 20), schedule=[(3, 0.0), (7, 1.0)], ramp=True) == [0, 0, 1, 2, 2]
    (doses,) = doses_at(5, [Intervention("noise", strength=2.0, schedule=[(3, 0.0), (7, 1.0)], ramp=True)])
    assert doses.step == 5 and doses.strengths_I.dtype == np.float32 and doses.strengths_I.tolist() == [1.0]
    assert doses_at(5, []) == ()


def test_a_function_of_ones_own_is_told_where_and_when_it_is():
    told = []

    def own(x_BTD, ctx):
        told.append((ctx.site, ctx.layer, ctx.tokens_BT.shape))
        return x_BTD * ctx.strength + ctx.draw(jax.random.normal, x_BTD.shape) + ctx.step

    assert touched(Intervention(own, strength=0.5, sites=["mlp_out"]), site="mlp_out", layer=2).all()
    assert told[0] == ("mlp_out", 2, (B, T))
    found = Intervention("test_interventions:shift")
    assert found.function is shift and found == Intervention(shift, strength=1.0)
    with pytest.raises(ValueError, match="returned the shape"):
        done(Intervention(lambda x_BTD, ctx: x_BTD[:1]))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sites": ["mlp"]}, r"intervention\.sites: found 'mlp', expected one of 'block_in'"),
        ({"sites": "mlp_out"}, "expected a list"),
        ({"sites": []}, "found none"),
        ({"kind": "nowhere:f"}, "cannot load"),
        ({"kind": "shift"}, "expected one of 'noise', .*or 'module:f'"),
        ({"kind": 3}, "expected one of"),
        ({"kind": lambda x: x}, r"cannot be called as \(x_BTD, ctx\)"),
        ({"strength": "much"}, r"intervention\.strength: found 'much'"),
        ({"strength": float("nan")}, r"intervention\.strength"),
        ({"kind": "dropout"}, r"\[0, 1\)"),
        ({"kind": "dropout", "strength": 0.5, "schedule": [(1, 3)]}, r"\[0, 1\)"),
        ({"schedule": [(3, 1), (3, 2)]}, "ascending"),
        ({"schedule": [3, 1]}, r"expected \(step, factor\)"),
        ({"schedule": [(0, 1)]}, "at least 1"),
        ({"first_step": 3, "last_step": 2}, "expected at least first_step, 3"),
        ({"heads": [0]}, "the site 'attn_heads' alone"),
        ({"positions": [3, 3]}, "start below stop"),
        ({"rows": 1.5}, r"intervention\.rows: found 1\.5"),
        ({"rows": [-1]}, r"intervention\.rows"),
        ({"layers": [1], "sites": ["embeddings"]}, "belong to no layer"),
        ({"kind": "add"}, r"intervention\.vector: found none"),
        ({"vector": [1.0]}, r"intervention\.vector: found one for the kind 'zero'"),
        ({"kind": "clip"}, r"intervention\.limit: found none"),
        ({"kind": "round", "bits": 1}, "at least 2"),
        ({"in_evaluation": 1}, "expected True or False"),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong, message):
    with pytest.raises(ValueError, match=message):
        Intervention(**{"kind": "zero", **wrong})


def test_what_the_model_has_not_is_refused():
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": D}
    for wrong, message in (
        ({"layers": [4]}, r"no layer \[4\]; the model has 4"),
        ({"heads": [2], "sites": ["attn_heads"]}, "heads: found .2., expected numbers from 0 to 1"),
        ({"channels": [8]}, "numbers from 0 to 7"),
        ({"kind": "add", "vector": [1, 2, 3]}, "found 3 numbers, expected 8, the channels at block_in"),
        ({"kind": "add", "vector": VECTOR, "sites": ["block_in", "mlp_hidden"]}, "expected 32 or 8|expected 8 or 32"),
    ):
        with pytest.raises(ValueError, match=message):
            Intervention(**{"kind": "zero", **wrong}).check(**shape)
    Intervention("zero", sites=["mlp_hidden"], channels=[31], layers=[-4]).check(**shape)


def test_an_intervention_survives_json_and_a_function_in_a_file_is_only_a_name(tmp_path):
    full = Intervention(
        "add",
        sites=["block_in", "final_norm"],
        strength=0.25,
        schedule=[(1, 0.0), (9, 1.0)],
        ramp=True,
        last_step=20,
        positions=(1, 3),
        token_ids=[4],
        rows=0.5,
        on_gradients=True,
        in_evaluation=False,
        vector=VECTOR,
    )
    for each in (*ONE_OF_EACH, full):
        assert Intervention.from_json(json.loads(json.dumps(each.to_json()))) == each
    fields = json.loads(json.dumps(Intervention(shift).to_json()))
    assert fields == {"version": 1, "kind": "test_interventions:shift"}
    named = Intervention.from_json(fields | {"kind": "os:abort"})
    assert named.kind == "os:abort" and named.function is interventions.named_in_a_file
    with pytest.raises(ValueError, match="never imported from there"):
        done(named)
    for wrong in ({"function": "os:abort"}, {"vector": "x.safetensors"}, {"depth": 3}, {"version": 2}, {"kind": []}):
        with pytest.raises(ValueError, match="intervention"):
            Intervention.from_json(fields | wrong)


def test_a_vector_comes_from_a_safetensors_file(tmp_path):
    path = tmp_path / "directions.safetensors"
    arrays = {"a": np.arange(D, dtype=np.float32), "m": np.zeros((2, 2), np.float32)}
    safetensors_file.write(path, arrays, {})
    (found,) = with_vectors([Intervention("add", vector=f"{path}:a")])
    assert found.vector == VECTOR
    for name, message in ((path, "has a, m; expected"), (f"{path}:b", "expected"), (f"{path}:m", "expected a vector")):
        with pytest.raises(ValueError, match=message):
            with_vectors([Intervention("add", vector=str(name))])
    with pytest.raises(ValueError, match=r"intervention\.vector=.*nothing\.safetensors"):
        with_vectors([Intervention("add", vector=str(tmp_path / "nothing.safetensors"))])


def test_a_user_of_a_checkpoint_chooses_its_interventions_or_others(tmp_path):
    recorded = [Intervention("zero"), Intervention("noise", in_evaluation=False)]

    def chosen(text, recorded=recorded):
        return chosen_interventions(text, recorded, "--interventions")

    assert chosen("none") == () and chosen("checkpoint") == (Intervention("zero"),)
    assert chosen('{"kind": "noise", "strength": 0.5}') == (Intervention("noise", strength=0.5),)
    assert chosen('[{"kind": "test_interventions:shift"}]') == (Intervention(shift),)
    path = tmp_path / "some.json"
    path.write_text('[{"kind": "zero", "sites": ["mlp_out"]}]')
    assert chosen(str(path)) == (Intervention("zero", sites=["mlp_out"]),)
    path.write_text('{"kind": "test_interventions:shift"}')
    for text, message in (
        (str(path), "is a function that is named in a file"),
        ("{", "no JSON"),
        ("[3]", "expected an intervention such as"),
        ('{"sites": ["mlp_out"]}', "expected a kind"),
        ('{"kind": "zero", "depth": 1}', "found depth, expected some of"),
        ('{"kind": "zero", "sites": ["mlp"]}', "--interventions: intervention.sites"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(text)
    with pytest.raises(ValueError, match="is a function that is named in a file"):
        chosen("checkpoint", [Intervention(shift)])


def test_zeroing_both_sublayers_makes_a_layer_the_identity(tiny_spec):
    model = GPT(tiny_spec, rngs=nnx.Rngs(0))
    both = [Intervention("zero", sites=["attn_out", "mlp_out"])]
    tokens = jnp.arange(8)[None]
    (doses,) = doses_at(1, both)
    changing = make_hook(both, tiny_spec.n_layer, tiny_spec.n_head, doses, Rows(tokens, jnp.arange(1), 0, 0))
    seen = {}

    def hook(site, layer, x_BTD):
        seen[site, layer] = changing(site, layer, x_BTD)
        return seen[site, layer]

    model(tokens, hook=hook)
    assert np.array_equal(seen["block_in", 0], seen["stream_out", 1])
    assert {site for site, _ in seen} == set(sites.SITES)
    assert all(x.shape[-1] == sites.width_of(site, tiny_spec.n_embd) for (site, _), x in seen.items())


def test_samples_are_made_under_interventions_and_those_that_need_a_batch_are_refused():
    spec = make_spec(12)
    from gpt_pretrain.model.gpt import init_params

    params = init_params(spec, jax.random.key(0))

    def text(*given, **how):
        how = {"seq_len": 12, "num_tokens": 8, "temperature": 1.0} | how
        return sample(params, spec, np.array([1, 2]), interventions=given, **how).tolist()

    plain = text()
    assert text(Intervention("scale", strength=0.0, sites=["final_norm"])) == plain
    shifted = Intervention("scale", strength=-2.0, sites=["final_norm"], last_step=5)
    assert text(shifted, step=5) != plain == text(shifted, step=6)
    with pytest.raises(ValueError, match="no batch to take a mean of"):
        text(Intervention("mean"))
    with pytest.raises(ValueError, match="no layer"):
        text(Intervention("zero", layers=[2]))

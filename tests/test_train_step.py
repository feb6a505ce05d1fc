"""The training step: gradients, meshes, what is off, randomness, evaluation, statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compiled import communicated_shapes, lower, lowered_texts
from support.models import VOCAB_SIZE, make_spec, make_test_mesh
from support.streams import ArraySource, make_batches

from gpt_pretrain.data.loader import load
from gpt_pretrain.model import gpt, layers
from gpt_pretrain.model.gpt import init_params, model_of
from gpt_pretrain.model.intervening import doses_at
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.linear import gelu_of_sum
from gpt_pretrain.model.sites import LAYER_SITES, OTHER_SITES
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.partition import batch_sharding
from gpt_pretrain.parallel.placement import Placement
from gpt_pretrain.train import step as step_lib
from gpt_pretrain.train.feed import prefetch_to_devices
from gpt_pretrain.train.state import fresh_state, shardings_of
from gpt_pretrain.train.step import Masked, StepOptions

SEQ_LEN = 8


@pytest.fixture(scope="module")
def spec():
    return make_spec(SEQ_LEN)


def make_step(spec, mesh, lr=1e-2):
    optimizer = adamw(100, lr=lr, warmup_steps=2)
    state = fresh_state(spec, optimizer.transform, mesh, seed=0)
    options = StepOptions(spec, num_chunks=2, mesh=mesh)
    step = step_lib.make_train_step(options, optimizer)
    return state, step_lib.compile_train_step(step, shardings_of(state), mesh, options.num_doses)


def run(spec, mesh, num_microbatches, microbatch, num_steps=5):
    """Losses of the first steps over the same global batches, however they are laid out."""
    source = ArraySource(np.random.default_rng(0).integers(0, 20, 4000))
    placement = Placement(batch_sharding(mesh), microbatch // mesh.size)
    batch_size = num_microbatches * microbatch
    batches = make_batches(source, batch_size=batch_size, num_steps=num_steps, rows_of=placement.rows)
    state, step = make_step(spec, mesh)
    losses = []
    for number, (_, batch) in enumerate(prefetch_to_devices(load(batches), placement), 1):
        state, metrics = step(state, batch, *doses_at(number, spec.interventions))
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "update_norm")])
    return np.array(losses), state


@pytest.fixture(scope="module")
def whole_batch(spec):
    """(params, rows, gradients and sums of the rows as one microbatch)."""
    params = init_params(spec, jax.random.key(0))
    rows = jax.random.randint(jax.random.key(1), (8, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    return params, rows, accumulated(spec, params, rows[None])


def accumulated(spec, params, batch):
    gradients = step_lib.make_gradients(StepOptions(spec))
    return jax.jit(lambda params, batch: gradients(params, batch, None))(params, batch)


def test_the_gradient_is_that_of_the_mean_loss(spec, whole_batch):
    params, rows, found = whole_batch
    loss_fn = step_lib.make_loss_fn(StepOptions(spec))
    expected = jax.jit(jax.grad(lambda params: loss_fn(params, rows, None)[0] / (8 * SEQ_LEN)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], expected)


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(spec, whole_batch, num_microbatches):
    params, rows, expected = whole_batch
    found = accumulated(spec, params, rows.reshape(num_microbatches, -1, SEQ_LEN + 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, found)


@pytest.fixture(scope="module")
def one_device(spec):
    """Losses of one device that takes each batch at once."""
    losses, _ = run(dataclasses.replace(spec, n_layer=1), make_test_mesh(1, 1), 1, 8)
    assert losses[-1, 0] < losses[0, 0]
    return losses


@pytest.mark.parametrize("mesh, layout", [((4, 1), (1, 8)), ((2, 2), (1, 8)), ((2, 2), (2, 4)), ((1, 1), (4, 2))])
def test_four_devices_in_any_mesh_give_the_losses_of_one(spec, one_device, mesh, layout):
    found, _ = run(dataclasses.replace(spec, n_layer=1), make_test_mesh(*mesh), *layout)
    np.testing.assert_allclose(found, one_device, rtol=2e-5)


def test_fsdp_splits_parameters_and_optimizer_state(spec):
    _, state = run(dataclasses.replace(spec, n_layer=1), make_test_mesh(1, 4), 1, 8, num_steps=1)
    for leaf in jax.tree.leaves(state):
        if leaf.ndim >= 2:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    embedding = state.params["token_embedding"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (66, 32)


def test_loss_falls_when_one_batch_is_learnt_by_heart(spec):
    mesh = make_test_mesh(1, 1)
    state, step = make_step(spec, mesh)
    batch = jax.random.randint(jax.random.key(0), (1, 4, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    for _ in range(60):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.2 and float(metrics["accuracy"]) > 0.99


def lowered_step(spec):
    return lowered_texts(spec, make_test_mesh(1, 1), ["train"])["train"]


def layer_without_hooks(self, x_BTD, layer, *, attend, hook, rng):
    x_BTD = x_BTD + self.attention(self.ln_1(x_BTD), layer, attend, None)
    return x_BTD + self.mlp(self.ln_2(x_BTD), layer, None)


def attention_without_hooks(self, x_BTD, layer, attend, hook):
    heads = [y.reshape(*y.shape[:2], self.n_head, -1) for y in self.qkv.parts(x_BTD, 3)]
    return self.out(attend(layer, *heads).reshape(x_BTD.shape))


def mlp_without_hooks(self, x_BTD, layer, hook):
    (h_BTF,) = self.up.products(x_BTD, 1)
    return self.down(gelu_of_sum(h_BTF, self.up.bias[...]))


def test_hooks_that_are_off_leave_no_trace_in_the_lowered_step(spec, monkeypatch):
    with_sites = lowered_step(spec)
    changed = lowered_step(dataclasses.replace(spec, interventions=(Intervention("zero", sites=["mlp_out"]),)))
    monkeypatch.setattr(layers.Layer, "__call__", layer_without_hooks)
    monkeypatch.setattr(layers.MLP, "__call__", mlp_without_hooks)
    monkeypatch.setattr(layers.Attention, "__call__", attention_without_hooks)
    monkeypatch.setattr(gpt.GPT, "__call__", functools.partialmethod(gpt.GPT.__call__, hook=hook_of_others))
    assert lowered_step(spec) == with_sites
    assert changed != with_sites


def hook_of_others(site, layer, x_BTD):
    assert site in OTHER_SITES, "the layers have no hooks here"
    return x_BTD


def test_dropout_that_is_off_needs_no_random_numbers(spec):
    off = lowered_step(spec)
    assert "threefry" not in off and "rng" not in off
    assert "threefry" in lowered_step(dataclasses.replace(spec, dropout=0.1))


def test_randomness_is_a_function_of_the_step_and_differs_between_steps_and_microbatches(spec):
    spec = dataclasses.replace(spec, n_layer=1, interventions=(Intervention("noise"),), dropout=0.2)
    mesh = make_test_mesh(1, 1)
    batch = jnp.zeros((2, 4, SEQ_LEN + 1), jnp.uint16)

    state, step = make_step(spec, mesh)

    def loss_at(step_number):
        copy = jax.tree.map(jnp.copy, state._replace(step=jnp.int32(step_number)))  # the step donates its argument
        return float(step(copy, batch, *doses_at(step_number + 1, spec.interventions))[1]["loss"])

    assert loss_at(3) == loss_at(3) != loss_at(4)


ALL_KINDS = (
    Intervention("noise", sites=["attn_out"], strength=0.3),
    Intervention("relative_noise", sites=["stream_mid"], strength=0.3, rows=0.5),
    Intervention("dropout", sites=["mlp_hidden"], strength=0.3, on_gradients=True),
    Intervention("zero", sites=["attn_heads"], heads=[1], strength=0.7, rows=[1, 2, 5]),
    Intervention("round", sites=["final_norm"], bits=4),
    Intervention("add", sites=["embeddings"], vector=[0.1] * 32, token_ids=[3, 4, 5]),
)


def with_strength(strength):
    return tuple(dataclasses.replace(each, strength=strength) for each in ALL_KINDS)


@pytest.fixture(scope="module")
def changed_spec(spec):
    return dataclasses.replace(spec, n_layer=1, interventions=ALL_KINDS)


@pytest.fixture(scope="module")
def changed_on_one_device(changed_spec, one_device):
    losses, _ = run(changed_spec, make_test_mesh(1, 1), 1, 8)
    assert not np.allclose(losses, one_device, rtol=1e-3)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, layout, remat", [((2, 2), (2, 4), "none"), ((1, 1), (4, 2), "full"), ((4, 1), (1, 8), "dots")]
)
def test_interventions_do_the_same_however_a_batch_is_cut(changed_spec, changed_on_one_device, mesh, layout, remat):
    found, _ = run(dataclasses.replace(changed_spec, remat=remat), make_test_mesh(*mesh), *layout)
    np.testing.assert_allclose(found, changed_on_one_device, rtol=1e-4)


def test_one_compiled_step_serves_every_dose_and_strength_zero_is_the_run_without(spec, changed_spec):
    mesh = make_test_mesh(1, 1)
    batch = jax.random.randint(jax.random.key(0), (2, 4, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    _, step = make_step(changed_spec, mesh)
    _, plain = make_step(dataclasses.replace(changed_spec, interventions=()), mesh)

    def after_three(step, *doses):
        state, _ = make_step(changed_spec, mesh)
        for number in (1, 2, 3):
            state, _ = step(state, batch, *(doses[0](number) if doses else ()))
        return jax.device_get(state.params)

    control, again, dosed = (
        after_three(step, lambda number, s=s: doses_at(number, with_strength(s))) for s in (0.0, 0.0, 0.5)
    )
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    without = after_three(plain)
    jax.tree.map(np.testing.assert_array_equal, control, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), control, without)
    assert not np.allclose(control["ln_f"]["scale"], dosed["ln_f"]["scale"], atol=1e-4)


@pytest.mark.slow
def test_evaluation_does_only_the_interventions_that_are_meant_for_it(spec):
    mesh = make_test_mesh(2, 1)
    rows = jax.random.randint(jax.random.key(1), (1, 4, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    losses = {}
    for in_evaluation in (None, False, True):
        given = () if in_evaluation is None else (Intervention("noise", strength=3.0, in_evaluation=in_evaluation),)
        options = StepOptions(dataclasses.replace(spec, interventions=given), num_chunks=2, mesh=mesh)
        state = fresh_state(spec, adamw(9, warmup_steps=0).transform, mesh, seed=0)
        evaluate = step_lib.compile_eval_step(
            step_lib.make_eval_step(options), shardings_of(state), mesh, options.num_doses
        )
        weights = np.ones((1, 4), np.float32)
        losses[in_evaluation] = [
            float(evaluate(state.params, rows, weights, np.int32(index), *doses_at(1, given))[0]) for index in (0, 1)
        ]
    assert losses[None] == losses[False] != losses[True]
    assert losses[True][0] != losses[True][1], "other rows of the validation stream, other noise"


def test_evaluation_counts_only_the_rows_of_weight_one(spec):
    mesh = make_test_mesh(2, 1)
    state = fresh_state(spec, adamw(9, warmup_steps=0).transform, mesh, seed=0)
    eval_step = step_lib.make_eval_step(StepOptions(spec, num_chunks=2, mesh=mesh))
    evaluate = step_lib.compile_eval_step(eval_step, shardings_of(state), mesh)
    rows = jax.random.randint(jax.random.key(1), (1, 4, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    loss_fn = jax.jit(step_lib.make_loss_fn(StepOptions(spec)))
    params = jax.device_get(state.params)
    for weights in ([1, 1, 1, 1], [1, 1, 0, 0]):
        found = evaluate(state.params, rows, np.array([weights], np.float32), np.int32(0))
        expected = loss_fn(params, rows[0, : sum(weights)], None)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_statistics_describe_every_site_of_every_layer(spec):
    mesh = make_test_mesh(1, 1)
    optimizer = adamw(9, warmup_steps=0)
    state = fresh_state(spec, optimizer.transform, mesh, seed=0)
    first, second = state.params["layers"][0], state.params["layers"][1]
    first["attention"]["qkv"]["kernel"] *= jnp.arange(96) >= 32  # attends to all that is past alike
    second["mlp"]["up"]["bias"] += jnp.where(jnp.arange(128) < 32, -100, 100)
    batch = jax.random.randint(jax.random.key(0), (2, 4, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    statistics = step_lib.make_statistics(StepOptions(spec, num_chunks=2, mesh=mesh), optimizer)
    found = step_lib.compile_statistics(statistics, shardings_of(state), mesh)(state, batch)

    @jax.jit
    def activations(params):
        seen = {}
        hook = lambda site, layer, x: (seen.setdefault((site, layer), x), x)[1]  # noqa: E731
        model_of(spec)(params)(step_lib.split_tokens(batch[0])[0], hook=hook)
        return seen["attn_out", 0], seen["attn_out", 1]

    for layer, outputs in enumerate(activations(state.params)):
        x = np.asarray(outputs, np.float64)
        expected = {"mean": x.mean(), "std": x.std(), "rms": np.sqrt((x**2).mean()), "max_abs": np.abs(x).max()}
        expected["kurtosis"] = ((x - x.mean()) ** 4).mean() / x.var() ** 2
        for name, value in expected.items():
            np.testing.assert_allclose(found[f"activations/{layer}/attn_out/{name}"], value, rtol=1e-3, atol=1e-7)
    for layer in (0, 1):
        sites = {name.split("/")[2] for name in found if name.startswith(f"activations/{layer}/")}
        assert sites == {*LAYER_SITES, "attention"}
    assert all(f"activations/{site}/rms" in found for site in OTHER_SITES)
    uniform = np.log(np.arange(1, SEQ_LEN + 1)).mean()
    np.testing.assert_allclose(found["activations/0/attention/entropy"], uniform, rtol=1e-5)
    assert 0.5 * uniform < found["activations/1/attention/entropy"] < uniform
    assert found["activations/1/mlp_hidden/dead"] == 0.25 and found["activations/0/mlp_hidden/dead"] < 0.1

    def total(prefix):
        return np.sqrt(sum(float(v) ** 2 for k, v in found.items() if k.startswith(prefix)))

    grads, _, _ = accumulated(spec, state.params, batch)
    np.testing.assert_allclose(total("gradients/"), optax.global_norm(grads), rtol=1e-4)
    np.testing.assert_allclose(total("parameters/"), optax.global_norm(state.params), rtol=1e-4)
    assert f"gradients/layers/{spec.n_layer - 1}" in found
    updates, _ = optimizer.transform.update(grads, state.opt_state, state.params)
    for part in ("layers/1", "ln_f"):
        tree = updates["layers"][1] if part == "layers/1" else updates["ln_f"]
        ratio = optax.global_norm(tree) / found[f"parameters/{part}"]
        np.testing.assert_allclose(found[f"update_to_weight/{part}"], ratio, rtol=1e-3)
    pieces = [accumulated(spec, state.params, batch[index : index + 1])[0] for index in (0, 1)]
    expect_noise(found, pieces, grads, rows_of_piece=4)


def expect_noise(found, pieces, grads, rows_of_piece):
    """The estimates solve: E |g of b rows|^2 = |true g|^2 + trace / b, for pieces and for the whole."""
    rows = rows_of_piece * len(pieces)
    of_pieces = np.mean([float(optax.tree.norm(piece, squared=True)) for piece in pieces])
    trace, square = float(found["gradient_noise/trace"]), float(found["gradient_noise/square"])
    assert square + trace / rows_of_piece == pytest.approx(of_pieces, rel=1e-3)
    assert square + trace / rows == pytest.approx(float(optax.tree.norm(grads, squared=True)), rel=1e-3)
    assert float(found["gradient_noise/scale"]) == pytest.approx(trace / square, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, gather", [((2, 1), "per_use"), ((1, 2), "per_step"), ((1, 2), "per_use")])
def test_statistics_of_several_devices_are_those_of_one(spec, mesh, gather):
    spec = dataclasses.replace(spec, n_layer=1)
    mesh, optimizer = make_test_mesh(*mesh), adamw(9, warmup_steps=0)
    state = fresh_state(spec, optimizer.transform, mesh, seed=0)
    rows = jax.random.randint(jax.random.key(0), (1, 4, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    statistics = step_lib.make_statistics(StepOptions(spec, mesh=mesh, gather=gather), optimizer)
    found = step_lib.compile_statistics(statistics, shardings_of(state), mesh)(state, rows)
    one = jax.jit(step_lib.make_statistics(StepOptions(spec), optimizer))(jax.device_get(state), rows)
    for name, value in one.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=1e-6, err_msg=name)
    if gather == "per_use" and mesh.shape["fsdp"] > 1:
        assert found.keys() == one.keys(), "no device has the whole gradient of its rows"
        return
    params = jax.device_get(state.params)
    pieces = [accumulated(spec, params, rows[:, first : first + 2])[0] for first in (0, 2)]
    expect_noise(found, pieces, accumulated(spec, params, rows)[0], rows_of_piece=2)


def test_fsdp_moves_weights_and_never_the_activations_of_the_batch():
    spec = make_spec(128, n_layer=1, n_embd=256)  # activations are larger than weights, as in a real run
    spec = dataclasses.replace(spec, padded_vocab_size=2048)
    lowered = lower("train", spec, make_test_mesh(1, 4), batch=(2, 8), num_chunks=2)
    shapes = communicated_shapes(lowered)
    weights = {leaf.shape for leaf in jax.tree.leaves(lowered.in_avals[0][0].params)}
    assert weights & shapes and not [shape for shape in shapes if len(shape) > 2], shapes - weights


def masks(num_microbatches):
    """Which targets of `whole_batch` count: some, of one row none, of another all."""
    keep = np.random.default_rng(0).random((8, SEQ_LEN)) < 0.7
    keep[3], keep[5] = False, True
    return jnp.asarray(keep.reshape(num_microbatches, -1, SEQ_LEN))


def test_masked_targets_give_no_gradient_and_all_others_weigh_what_they_weighed(spec, whole_batch):
    params, rows, plain = whole_batch
    keep = masks(1)[0]
    model, (inputs, targets) = model_of(spec), step_lib.split_tokens(rows)

    def kept_sum(params):
        here = model(params)
        logits = here.logits(here(inputs))[..., : spec.vocab_size]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        correct = logits.argmax(-1) == targets
        return (nll * keep).sum() / keep.size, ((nll * keep).sum() / keep.sum(), (correct & keep).sum() / keep.sum())

    expected, (loss, accuracy) = jax.jit(jax.grad(kept_sum, has_aux=True))(params)
    gradients = step_lib.make_gradients(StepOptions(spec))
    compiled = jax.jit(lambda params, batch: gradients(params, batch, None))
    for num_microbatches in (1, 2):
        batch = Masked(rows.reshape(num_microbatches, -1, SEQ_LEN + 1), masks(num_microbatches))
        found = compiled(params, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], expected)
        np.testing.assert_allclose(found[1:], (loss, accuracy), rtol=1e-5)
    everything = compiled(params, Masked(rows[None], jnp.ones_like(masks(1))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), everything, plain)
    grads, loss, _ = compiled(params, Masked(rows[None], jnp.zeros_like(masks(1))))
    assert loss == 0 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_a_masked_step_on_four_devices_is_that_of_one(spec, whole_batch):
    spec, (_, rows, _) = dataclasses.replace(spec, n_layer=1), whole_batch
    found = []
    for devices, parts in ((make_test_mesh(1, 1), 1), (make_test_mesh(2, 2), 2)):
        optimizer = adamw(100, lr=1e-2, warmup_steps=2)
        state = fresh_state(spec, optimizer.transform, devices, seed=0)
        step = step_lib.make_train_step(StepOptions(spec, num_chunks=2, mesh=devices), optimizer)
        step = step_lib.compile_masked_train_step(step, shardings_of(state), devices)
        sharding = batch_sharding(devices)
        for _ in range(2):
            tokens = jax.device_put(rows.reshape(parts, -1, SEQ_LEN + 1), sharding)
            state, metrics = step(state, tokens, jax.device_put(masks(parts), sharding))
        found.append([float(metrics[name]) for name in ("loss", "accuracy", "grad_norm", "param_norm", "update_norm")])
    np.testing.assert_allclose(*found, rtol=2e-5)

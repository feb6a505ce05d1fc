import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ArraySource, make_batches, make_test_mesh

from gpt_pretrain.data import loader
from gpt_pretrain.model.gpt import GPTConfig
from gpt_pretrain.model.perturbations import Perturbation, gaussian_noise, zeroing
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.mesh import batch_sharding
from gpt_pretrain.train import state as train_state
from gpt_pretrain.train import step as train_step

SEQ_LEN, NUM_VALID = 8, 257
HOW = {"seq_len": SEQ_LEN, "num_valid": NUM_VALID, "num_chunks": 2, "seed": 0}
LOSS = {"seq_len": SEQ_LEN, "num_valid": NUM_VALID, "num_chunks": 1}


def make_step(config, mesh, lr=1e-2):
    optimizer = adamw(100, lr=lr, warmup_steps=2)
    args = (config, SEQ_LEN, optimizer.transform, mesh)
    shardings = train_state.state_shardings(*args)
    step = train_step.compile_train_step(
        train_step.make_train_step(config, optimizer, mesh=mesh, **HOW), shardings, mesh
    )
    return train_state.create(*args, 0), step


def run(config, mesh, num_microbatches, microbatch, num_steps=5):
    """Losses of the first steps over the same global batches, however they are laid out."""
    source = ArraySource(np.random.default_rng(0).integers(0, 20, 4000))
    placement = loader.Placement(batch_sharding(mesh), microbatch // mesh.size)
    batch_size = num_microbatches * microbatch
    batches = make_batches(source, batch_size=batch_size, num_steps=num_steps, rows_of=placement.rows)
    state, step = make_step(config, mesh)
    losses = []
    for _, batch in loader.prefetch_to_devices(loader.load(batches), placement):
        state, metrics = step(state, batch)
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "update_norm")])
    return np.array(losses), state


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_config, num_microbatches):
    loss_fn = train_step.make_loss_fn(tiny_config, **LOSS)
    params = train_state.init_params(tiny_config, SEQ_LEN, jax.random.key(0))
    rows = jax.random.randint(jax.random.key(1), (8, SEQ_LEN + 1), 0, NUM_VALID).astype(jnp.uint16)
    whole = train_step.accumulate_gradients(loss_fn, params, rows[None], None)
    parts = train_step.accumulate_gradients(loss_fn, params, rows.reshape(num_microbatches, -1, SEQ_LEN + 1), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)

    def mean_loss(params):
        return loss_fn(params, rows, None)[0] / (8 * SEQ_LEN)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole[0], jax.grad(mean_loss)(params)
    )


def test_four_devices_in_any_mesh_give_the_losses_of_one(tiny_config):
    config = dataclasses.replace(tiny_config, n_layer=1)
    expected, _ = run(config, make_test_mesh(1, 1), 1, 8)
    assert expected[-1, 0] < expected[0, 0]
    for mesh, layout in (((4, 1), (1, 8)), ((2, 2), (1, 8)), ((2, 2), (2, 4)), ((1, 1), (4, 2))):
        found, _ = run(config, make_test_mesh(*mesh), *layout)
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=f"mesh {mesh}, layout {layout}")


def test_fsdp_splits_parameters_and_optimizer_state(tiny_config):
    _, state = run(tiny_config, make_test_mesh(1, 4), 1, 8, num_steps=1)
    for leaf in jax.tree.leaves(state):
        if leaf.ndim >= 2:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    embedding = state.params["token_embedding"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (66, 32)


def test_loss_falls_when_one_batch_is_learnt_by_heart(tiny_config):
    mesh = make_test_mesh(1, 1)
    state, step = make_step(tiny_config, mesh)
    batch = jax.random.randint(jax.random.key(0), (1, 4, SEQ_LEN + 1), 0, NUM_VALID).astype(jnp.uint16)
    for _ in range(60):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.2 and float(metrics["accuracy"]) > 0.99


def lowered(config, mesh=None):
    mesh = mesh or make_test_mesh(1, 1)
    state, step = make_step(config, mesh)
    batch = jax.ShapeDtypeStruct((2, 4, SEQ_LEN + 1), jnp.uint16)
    return step.lower(state, batch).as_text()


def test_hooks_that_are_off_leave_no_trace_in_the_lowered_step(tiny_config, monkeypatch):
    from gpt_pretrain.model import layers as transformer

    def block_without_hooks(self, x_BTD, layer, *, attend, hook, rng):
        x_BTD = x_BTD + self.attention(self.ln_1(x_BTD), layer, attend)
        return x_BTD + self.mlp(self.ln_2(x_BTD))

    with_sites = lowered(tiny_config)
    perturbed = lowered(dataclasses.replace(tiny_config, perturbations=(Perturbation(zeroing, sites=["mlp_out"]),)))
    monkeypatch.setattr(transformer.Block, "__call__", block_without_hooks)
    assert lowered(tiny_config) == with_sites
    assert perturbed != with_sites


def test_dropout_that_is_off_needs_no_random_numbers(tiny_config):
    assert "threefry" not in lowered(tiny_config) and "rng" not in lowered(tiny_config)
    assert "threefry" in lowered(dataclasses.replace(tiny_config, dropout=0.1))


def test_randomness_is_a_function_of_the_step_and_differs_between_steps_and_microbatches(tiny_config):
    config = dataclasses.replace(tiny_config, perturbations=(Perturbation(gaussian_noise),), dropout=0.2)
    mesh = make_test_mesh(1, 1)
    batch = jnp.zeros((2, 4, SEQ_LEN + 1), jnp.uint16)

    state, step = make_step(config, mesh)

    def loss_at(step_number):
        copy = jax.tree.map(jnp.copy, state._replace(step=jnp.int32(step_number)))  # the step donates its argument
        return float(step(copy, batch)[1]["loss"])

    assert loss_at(3) == loss_at(3) != loss_at(4)


def test_evaluation_counts_only_the_rows_of_weight_one(tiny_config):
    mesh = make_test_mesh(2, 1)
    state, _ = make_step(tiny_config, mesh)
    shardings = train_state.state_shardings(tiny_config, SEQ_LEN, adamw(9, warmup_steps=0).transform, mesh)
    evaluate = train_step.compile_eval_step(train_step.make_eval_step(tiny_config, mesh=mesh, **HOW), shardings, mesh)
    rows = jax.random.randint(jax.random.key(1), (1, 4, SEQ_LEN + 1), 0, NUM_VALID).astype(jnp.uint16)
    loss_fn = train_step.make_loss_fn(tiny_config, **LOSS)
    for weights in ([1, 1, 1, 1], [1, 1, 0, 0]):
        found = evaluate(state.params, rows, np.array([weights], np.float32), np.int32(0))
        expected = loss_fn(state.params, rows[0, : sum(weights)], None)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_statistics_describe_every_site_of_every_layer_and_change_no_step(tiny_config):
    mesh = make_test_mesh(1, 1)
    state, _ = make_step(tiny_config, mesh)
    shardings = train_state.state_shardings(tiny_config, SEQ_LEN, adamw(9, warmup_steps=0).transform, mesh)
    batch = jax.random.randint(jax.random.key(0), (2, 4, SEQ_LEN + 1), 0, NUM_VALID).astype(jnp.uint16)
    found = train_step.compile_statistics(train_step.make_statistics(tiny_config, mesh=mesh, **HOW), shardings, mesh)(
        state, batch
    )

    seen = {}
    loss_fn = train_step.make_loss_fn(
        dataclasses.replace(
            tiny_config,
            perturbations=(Perturbation(lambda x, layer, rng: (seen.setdefault(layer, x), x)[1], sites=["attn_out"]),),
        ),
        **LOSS,
    )
    loss_fn(state.params, batch[0], None)
    for layer in (0, 1):
        x = np.asarray(seen[layer], np.float64)
        expected = {"mean": x.mean(), "std": x.std(), "rms": np.sqrt((x**2).mean()), "max_abs": np.abs(x).max()}
        for name, value in expected.items():
            np.testing.assert_allclose(found[f"activations/{layer}/attn_out/{name}"], value, rtol=1e-3, atol=1e-7)
    sites = {name.split("/")[2] for name in found if name.startswith("activations")}
    assert sites == {"block_in", "attn_out", "mlp_out"}

    def total(prefix):
        return np.sqrt(sum(float(v) ** 2 for k, v in found.items() if k.startswith(prefix)))

    grads, _, _ = train_step.accumulate_gradients(loss_fn, state.params, batch, None)
    np.testing.assert_allclose(total("gradients/"), train_step.optax.global_norm(grads), rtol=1e-4)
    np.testing.assert_allclose(total("parameters/"), train_step.optax.global_norm(state.params), rtol=1e-4)
    assert f"gradients/blocks/{tiny_config.n_layer - 1}" in found


def test_fsdp_moves_weights_and_never_the_activations_of_the_batch():
    mesh, seq_len = make_test_mesh(1, 4), 128  # activations are larger than weights, as in a real run
    config = GPTConfig(n_layer=1, n_head=2, n_embd=256, vocab_size=2048).resolve("cpu")
    optimizer = adamw(9, warmup_steps=0)
    abstract = train_state.abstract(config, seq_len, optimizer.transform, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = train_step.make_train_step(config, optimizer, mesh=mesh, **(HOW | {"seq_len": seq_len}))
    batch = jax.ShapeDtypeStruct((2, 8, seq_len + 1), jnp.uint16, sharding=batch_sharding(mesh))
    compiled = train_step.compile_train_step(step, shardings, mesh).lower(abstract, batch).compile().as_text()
    results = re.findall(r"= (.+?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", compiled)
    shapes = {tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)}
    weights = {leaf.shape for leaf in jax.tree.leaves(abstract.params)}
    assert weights & shapes and not [shape for shape in shapes if len(shape) > 2], shapes - weights

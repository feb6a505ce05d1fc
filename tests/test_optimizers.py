import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_pretrain.optim.adamw import adamw


def rates(total_steps=100, **settings):
    optimizer = adamw(total_steps, lr=1.0, **{"warmup_steps": 10, **settings})
    return np.array([float(optimizer.learning_rate(step)) for step in range(total_steps + 1)])


def test_warmup_is_linear_and_reaches_the_peak():
    for schedule in ("cosine", "linear", "wsd", "constant"):
        np.testing.assert_allclose(rates(schedule=schedule)[:10], np.arange(1, 11) / 10, rtol=1e-5)


def test_schedules_have_their_shapes():
    cosine, linear, wsd, constant = (rates(schedule=name) for name in ("cosine", "linear", "wsd", "constant"))
    np.testing.assert_allclose([cosine[55], linear[55]], 0.55, rtol=1e-3)
    np.testing.assert_allclose([cosine[100], linear[100], wsd[100]], 0.1, rtol=1e-5)
    assert cosine[32] > linear[32] and cosine[78] < linear[78]
    np.testing.assert_allclose(wsd[10:81], 1.0, rtol=1e-5)  # the last fifth of the run decays
    np.testing.assert_allclose(wsd[90], 0.55, rtol=1e-3)
    np.testing.assert_allclose(constant[10:], 1.0)


def test_only_matrices_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = adamw(100, lr=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0)
    updates, _ = optimizer.transform.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.transform.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_allclose(updates["bias"], 0.0)


def test_weight_decay_may_follow_a_schedule():
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = adamw(4, lr=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0, weight_decay_schedule="linear")
    state = optimizer.transform.init(params)
    found = []
    for _ in range(4):
        updates, state = optimizer.transform.update(jax.tree.map(jnp.zeros_like, params), state, params)
        found.append(float(updates["kernel"][0, 0]))
    np.testing.assert_allclose(found, [-0.05, -0.0375, -0.025, -0.0125], rtol=1e-5)


def test_gradients_are_clipped_to_the_global_norm():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(5)}
    grads = jax.tree.map(lambda leaf: 100.0 * jnp.ones_like(leaf), params)
    clipped, raw = (adamw(9, clip_norm=norm, warmup_steps=0).transform.init(params) for norm in (1.0, None))
    del raw
    _, state = adamw(9, clip_norm=1.0, warmup_steps=0).transform.update(grads, clipped, params)
    first_moment = next(part for part in state if hasattr(part, "mu")).mu
    np.testing.assert_allclose(optax.global_norm(first_moment), 0.1, rtol=1e-4)  # (1 - beta1) * 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warmup_steps": 100}, "warmup_steps: found 100, expected fewer than the 100 steps"),
        ({"schedule": "cosin"}, "schedule: found 'cosin'"),
        ({"weight_decay_schedule": "x"}, "weight_decay_schedule: found 'x'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        adamw(100, **{"warmup_steps": 10, **settings})

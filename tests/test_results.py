"""What a finished step measured."""

import math

import jax.numpy as jnp
import pytest

from gpt_pretrain.train.results import Diverged, MetricsReader


def test_metrics_are_handed_out_one_step_late():
    reader = MetricsReader()
    device_metrics = [
        {"loss": jnp.float32(i), "grad_norm": jnp.float32(1), "param_norm": jnp.float32(1)} for i in range(3)
    ]
    assert reader.push(1, 0, device_metrics[0]) is None
    late = reader.push(2, 8, device_metrics[1])
    assert late is not None and (late.step, late.position, late.metrics["loss"]) == (1, 0, 0.0)
    last = reader.flush()
    assert last is not None and last.step == 2
    assert reader.flush() is None


BROKEN = [("loss", math.nan), ("loss", math.inf), ("grad_norm", math.nan), ("param_norm", math.inf)]


@pytest.mark.parametrize("name, value", BROKEN)
def test_what_is_not_finite_names_its_step_and_position(name, value):
    reader = MetricsReader()
    metrics = {each: jnp.float32(1.0) for each in ("loss", "grad_norm", "param_norm")}
    reader.push(7, 48, metrics | {name: jnp.float32(value)})
    with pytest.raises(Diverged, match=f"step 7: .*{name} is {value}.*position 48") as caught:
        reader.flush()
    assert caught.value.step == 7

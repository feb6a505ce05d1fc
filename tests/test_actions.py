import math
import time

import jax.numpy as jnp
import pytest

from gpt_pretrain.actions import Diverged, MetricsReader, Throughput


def test_metrics_are_handed_out_one_step_late():
    reader = MetricsReader()
    device_metrics = [{"loss": jnp.float32(i), "grad_norm": jnp.float32(1)} for i in range(3)]
    assert reader.push(1, 0, device_metrics[0]) is None
    late = reader.push(2, 8, device_metrics[1])
    assert late is not None and (late.step, late.position, late.metrics["loss"]) == (1, 0, 0.0)
    last = reader.flush()
    assert last is not None and last.step == 2
    assert reader.flush() is None


@pytest.mark.parametrize("loss, grad_norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_names_its_step_and_position(loss, grad_norm):
    reader = MetricsReader()
    reader.push(7, 48, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)})
    with pytest.raises(Diverged, match=r"step 7: .*position 48"):
        reader.flush()


def test_throughput_counts_neither_the_first_step_nor_pauses():
    throughput = Throughput()
    with throughput.paused():
        time.sleep(0.2)  # before the first step: must not be taken off later
    throughput.step_done(1000)
    assert throughput.lap() is None
    time.sleep(0.1)
    with throughput.paused():
        time.sleep(0.3)
    throughput.step_done(1000)
    rate = throughput.lap()
    assert rate is not None and 1000 / 0.25 < rate <= 1000 / 0.1
    assert throughput.lap() == rate  # nothing new

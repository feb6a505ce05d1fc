"""What a finished step measured, and how fast a run trains."""

import math
import time

import jax.numpy as jnp
import pytest

from gpt_pretrain.train.clock import Clock
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


class Time:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_the_clock_counts_neither_the_first_step_nor_pauses(monkeypatch):
    time, clock = Time(monkeypatch), Clock()
    with clock.paused():
        time.now += 7  # before the first step: must not be taken off later
    clock.step_done(1000)
    assert clock.lap() is None
    time.now += 2
    with clock.paused():
        time.now += 50
    clock.step_done(1000)
    assert clock.lap() == 500
    assert clock.lap() == 500  # nothing new
    time.now += 1
    clock.step_done(300)
    assert clock.lap() == 300

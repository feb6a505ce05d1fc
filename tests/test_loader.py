import itertools

import jax
import numpy as np
import pytest
from conftest import ArraySource, make_batches, make_plan, make_test_mesh

from gpt_pretrain.data import loader
from gpt_pretrain.data.loader import Placement
from gpt_pretrain.parallel.mesh import batch_sharding


def placement(mesh=(1, 1), per_device_batch_size=4) -> Placement:
    return Placement(batch_sharding(make_test_mesh(*mesh)), per_device_batch_size)


def test_window_i_is_inputs_and_targets_from_token_i_times_seq_len():
    source = ArraySource(np.arange(1000))
    element = make_batches(source, rows_of=placement().rows)[3]
    assert (element.step_index, element.position, element.batch_size) == (3, 24, 8)
    assert element.tokens.shape == (2, 4, 9)
    expected = make_plan(source).batch(3).windows
    assert np.array_equal(element.windows.reshape(-1), expected)
    assert np.array_equal(element.tokens.reshape(8, 9), expected[:, None] * 8 + np.arange(9))


def test_starting_at_a_step_continues_the_same_sequence():
    source = ArraySource(np.arange(1000))
    whole = [each.windows for each in loader.load(make_batches(source, num_steps=40))]
    assert len(whole) == 40  # 320 examples of 124 windows: the third epoch
    rest = [each.windows for each in loader.load(make_batches(source, first_index=17, num_steps=23))]
    assert np.array_equal(whole[17:], rest)


@pytest.mark.parametrize("mesh, per_device", [((1, 1), 4), ((1, 1), 8), ((2, 1), 4), ((2, 2), 1), ((4, 1), 2)])
def test_rows_arrive_on_the_devices_in_global_order_however_they_are_laid_out(mesh, per_device):
    source = ArraySource(np.arange(1000))
    place = placement(mesh, per_device)
    assert place.rows(8).reshape(-1).tolist() == list(range(8))
    pairs = list(loader.prefetch_to_devices(loader.load(make_batches(source, rows_of=place.rows)), place))
    assert len(pairs) == 10
    for step, (element, batch) in enumerate(pairs):
        layout = place.layout(8)
        assert batch.shape == (layout.num_microbatches, layout.microbatch, 9) and layout.batch_size == 8
        assert batch.sharding == place.sharding and batch.dtype == np.uint16
        assert np.array_equal(jax.device_get(batch), element.tokens)
        assert np.array_equal(jax.device_get(batch).reshape(8, 9)[:, 0] // 8, make_plan(source).batch(step).windows)


def test_the_prefetch_reads_no_more_than_two_batches_ahead():
    taken = []
    tokens = np.zeros((1, 4, 9), np.uint16)
    elements = ({"tokens": tokens, "batch_size": 4, "n": taken.append(i)} for i in itertools.count())
    batches = loader.prefetch_to_devices(elements, placement())
    for step in range(1, 6):
        next(batches)
        assert len(taken) <= step + 2


def test_a_token_id_outside_the_vocabulary_is_an_error_that_names_the_window():
    tokens = np.zeros(1000)
    tokens[500] = 300
    with pytest.raises(ValueError, match=r"window 62 .*token id 300, expected ids below 257"):
        list(loader.load(make_batches(ArraySource(tokens), vocab_size=257, num_steps=16)))

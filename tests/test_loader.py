import itertools

import jax
import numpy as np
import pytest
from support.models import make_test_mesh
from support.streams import ArraySource, make_batches, make_plan

from gpt_pretrain.data.batches import HostBatch
from gpt_pretrain.data.loader import load
from gpt_pretrain.parallel.partition import batch_sharding
from gpt_pretrain.parallel.placement import Placement
from gpt_pretrain.train.feed import prefetch_to_devices


def placement(mesh=(1, 1), per_device_batch_size=4) -> Placement:
    return Placement(batch_sharding(make_test_mesh(*mesh)), per_device_batch_size)


def test_window_i_is_inputs_and_targets_from_token_i_times_seq_len():
    source = ArraySource(np.arange(1000))
    batch = make_batches(source, rows_of=placement().rows)[3]
    assert (batch.step_index, batch.position, batch.batch_size) == (3, 24, 8)
    assert batch.tokens.shape == (2, 4, 9)
    expected = make_plan(source).batch(3).windows
    assert np.array_equal(batch.windows.reshape(-1), expected)
    assert np.array_equal(batch.tokens.reshape(8, 9), expected[:, None] * 8 + np.arange(9))


def test_starting_at_a_step_continues_the_same_sequence():
    source = ArraySource(np.arange(1000))
    whole = [each.windows for each in load(make_batches(source, num_steps=40))]
    assert len(whole) == 40  # 320 examples of 124 windows: the third epoch
    rest = [each.windows for each in load(make_batches(source, first_index=17, num_steps=23))]
    assert np.array_equal(whole[17:], rest)


@pytest.mark.parametrize("mesh, per_device", [((1, 1), 4), ((1, 1), 8), ((2, 1), 4), ((2, 2), 1), ((4, 1), 2)])
def test_rows_arrive_on_the_devices_in_global_order_however_they_are_laid_out(mesh, per_device):
    source = ArraySource(np.arange(1000))
    place = placement(mesh, per_device)
    assert place.rows(8).reshape(-1).tolist() == list(range(8))
    pairs = list(prefetch_to_devices(load(make_batches(source, rows_of=place.rows)), place))
    assert len(pairs) == 10
    for step, (host_batch, batch) in enumerate(pairs):
        layout = place.layout(8)
        assert batch.shape == (layout.num_microbatches, layout.microbatch, 9) and layout.batch_size == 8
        assert batch.sharding == place.sharding and batch.dtype == np.uint16
        assert np.array_equal(jax.device_get(batch), host_batch.tokens)
        assert np.array_equal(jax.device_get(batch).reshape(8, 9)[:, 0] // 8, make_plan(source).batch(step).windows)


def test_the_prefetch_reads_no_more_than_two_batches_ahead():
    taken = []
    tokens, places = np.zeros((1, 4, 9), np.uint16), np.zeros((1, 4), np.int64)

    def batches():
        for step_index in itertools.count():
            taken.append(step_index)
            yield HostBatch(step_index, 4 * step_index, 4, tokens, places, places, digest=0)

    fed = prefetch_to_devices(batches(), placement())
    for step in range(1, 6):
        next(fed)
        assert len(taken) <= step + 2


def test_a_token_id_outside_the_vocabulary_is_an_error_that_names_the_window():
    tokens = np.zeros(1000)
    tokens[500] = 300
    with pytest.raises(ValueError, match=r"window 62 .*token id 300, expected ids below 257"):
        list(load(make_batches(ArraySource(tokens), vocab_size=257, num_steps=16)))

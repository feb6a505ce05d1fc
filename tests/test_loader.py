import itertools

import jax
import numpy as np
import pytest
from conftest import ArraySource, make_batches, make_test_mesh

from gpt_pretrain.data import loader, order
from gpt_pretrain.sharding import batch_sharding


def test_window_i_is_inputs_and_targets_from_token_i_times_seq_len():
    source = ArraySource(np.arange(1000))
    element = make_batches(source)[3]
    assert element["position"] == 24
    assert element["tokens"].shape == (2, 4, 9)
    expected = order.window_at(np.arange(24, 32), num_windows=999 // 8, seed=0)
    assert np.array_equal(element["windows"].reshape(-1), expected)
    assert np.array_equal(element["tokens"].reshape(8, 9), expected[:, None] * 8 + np.arange(9))


def test_starting_at_a_position_continues_the_same_sequence():
    source = ArraySource(np.arange(1000))
    whole = [each["windows"] for each in loader.load(make_batches(source, num_batches=40))]
    assert len(whole) == 40  # 320 examples of 124 windows: the third epoch
    rest = [each["windows"] for each in loader.load(make_batches(source, start=8 * 17, num_batches=23))]
    assert np.array_equal(whole[17:], rest)


def test_rows_keep_their_place_in_the_global_batch_for_every_number_of_processes():
    source = ArraySource(np.arange(1000))
    whole = make_batches(source)[2]["tokens"]
    for num_processes in (2, 4):
        parts = np.split(np.arange(4), num_processes)
        found = [make_batches(source, rows=rows)[2]["tokens"] for rows in parts]
        assert np.array_equal(np.concatenate(found, axis=1), whole)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (2, 2)])
def test_rows_arrive_on_the_devices_in_global_order(mesh):
    source = ArraySource(np.arange(1000))
    sharding = batch_sharding(make_test_mesh(*mesh))
    rows = loader.local_rows(sharding, 2, 4)
    assert rows.tolist() == [0, 1, 2, 3]
    pairs = list(loader.prefetch_to_devices(loader.load(make_batches(source)), sharding, 4, rows))
    assert len(pairs) == 10
    for element, batch in pairs:
        assert batch.sharding == sharding and batch.dtype == np.uint16
        assert np.array_equal(jax.device_get(batch), element["tokens"])


def test_the_prefetch_reads_no_more_than_two_batches_ahead():
    taken = []
    elements = ({"tokens": np.zeros((1, 4, 9), np.uint16), "n": taken.append(i)} for i in itertools.count())
    batches = loader.prefetch_to_devices(elements, batch_sharding(make_test_mesh(1, 1)), 4, np.arange(4))
    for step in range(1, 6):
        next(batches)
        assert len(taken) <= step + 2


def test_a_token_id_outside_the_vocabulary_is_an_error_that_names_the_window():
    tokens = np.zeros(1000)
    tokens[500] = 300
    with pytest.raises(ValueError, match=r"window 62 .*token id 300, expected ids below 257"):
        list(loader.load(make_batches(ArraySource(tokens), vocab_size=257, num_batches=16)))


def test_a_stream_shorter_than_a_window_is_an_error():
    with pytest.raises(ValueError, match="holds 8"):
        make_batches(ArraySource(np.arange(8)))

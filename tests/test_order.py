import numpy as np
import pytest

from gpt_pretrain.data import order

SIZES = [1, 2, 3] + [2**k + d for k in range(2, 21) for d in (-1, 0, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_the_order_is_a_bijection_with_a_right_inverse(size):
    everything = np.arange(size)
    round_keys = order.key(seed=3, epoch=1)
    permuted = order.permute(everything, size, round_keys)
    assert np.array_equal(np.bincount(permuted, minlength=size), np.ones(size))
    assert np.array_equal(order.unpermute(permuted, size, round_keys), everything)


def test_position_of_inverts_window_at_in_every_epoch():
    num_windows = 1000
    positions = np.arange(3 * num_windows)
    windows = order.window_at(positions, num_windows=num_windows, seed=5)
    for epoch in range(3):
        part = slice(epoch * num_windows, (epoch + 1) * num_windows)
        found = order.position_of(windows[part], epoch, num_windows=num_windows, seed=5)
        assert np.array_equal(found, positions[part])


def test_each_epoch_meets_every_window_once():
    windows = order.window_at(np.arange(2 * 1025), num_windows=1025, seed=0).reshape(2, -1)
    assert np.array_equal(np.sort(windows, axis=1), np.tile(np.arange(1025), (2, 1)))


def test_window_at_does_not_depend_on_how_positions_are_grouped():
    positions = np.arange(990, 1010)
    whole = order.window_at(positions, num_windows=1000, seed=2)
    single = [int(order.window_at(p, num_windows=1000, seed=2)) for p in positions]
    assert whole.tolist() == single


@pytest.mark.parametrize("size", [1000, 4097, 65537])
def test_the_order_looks_random_against_sorted_order_and_between_epochs_and_seeds(size):
    def rank(seed, epoch):
        return order.permute(np.arange(size), size, order.key(seed, epoch))

    # Orders that must look unrelated, the pairs on which Grain's own shuffle collides among them.
    ranks = [np.arange(size), *(rank(seed, epoch) for seed in range(4) for epoch in range(4))]
    # The correlation of two independent permutations has standard deviation 1 / sqrt(size - 1).
    z_scores = np.corrcoef(ranks)[np.triu_indices(len(ranks), 1)] * np.sqrt(size - 1)
    assert np.abs(z_scores).max() < 4.5
    assert 0.75 < z_scores.std() < 1.25
    # So have neighbours: their distance is that of two independent draws, (size**2 - 1) / (3 size) on average.
    for each in ranks[1:]:
        assert abs(np.abs(np.diff(each)).mean() / (size / 3) - 1) < 5 / np.sqrt(size)
        assert (each == np.arange(size)).sum() < 8  # fixed points are Poisson(1)


def test_seeds_of_any_size_are_welcome_and_negative_positions_are_not():
    a, b = (order.window_at(np.arange(50), num_windows=50, seed=seed) for seed in (2**70, 2**70 + 1))
    assert not np.array_equal(a, b)
    with pytest.raises(ValueError, match="negative"):
        order.window_at(-1, num_windows=50, seed=0)
    with pytest.raises(ValueError, match=r"expected \[0, 50\)"):
        order.permute([50], 50, order.key(0, 0))

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


def sizes_around(*numbers):
    return [number + d for number in numbers for d in (-1, 0, 1)]


# Blocks of 8 windows in groups of 4: a short stream, whole blocks, whole groups, and what is left after them.
BLOCK = {"block_windows": 8, "group_blocks": 4}
STREAM_SIZES = [1, 2, 3, 5, *sizes_around(8, 16, 32, 64, 96, 128, 1024), 50, 100, 1000]


@pytest.mark.parametrize("shuffle", order.SHUFFLES)
@pytest.mark.parametrize("num_windows", STREAM_SIZES)
def test_every_epoch_meets_every_window_once_and_indices_of_inverts_windows_at(num_windows, shuffle):
    for seed, stream in ((5, ""), (6, "a/stream")):
        each = order.WindowOrder(num_windows, seed, stream, shuffle, **BLOCK)
        windows = each.windows_at(np.arange(3 * num_windows))
        for epoch in range(3):
            part = np.arange(num_windows) + epoch * num_windows
            assert np.array_equal(np.sort(windows[part]), np.arange(num_windows))
            assert np.array_equal(each.indices_of(windows[part], epoch), part)


@pytest.mark.parametrize(("block_windows", "group_blocks"), [(1, 1), (1, 7), (7, 1), (3, 5), (200, 3), (1000, 1000)])
@pytest.mark.parametrize("num_windows", [997, 1000, 1050])
def test_blocks_and_groups_of_any_size_give_a_bijection(num_windows, block_windows, group_blocks):
    each = order.WindowOrder(num_windows, 1, "", "block", block_windows, group_blocks)
    indices = np.arange(num_windows, 2 * num_windows)
    windows = each.windows_at(indices)
    assert np.array_equal(np.sort(windows), np.arange(num_windows))
    assert np.array_equal(each.indices_of(windows, 1), indices)


def test_block_shuffle_reads_within_the_blocks_of_a_group_for_a_while():
    num_windows, size = 10 * 64 * 8 + 100, 64 * 8
    each = order.WindowOrder(num_windows, 3, "", "block", 64, 8)
    windows = each.windows_at(np.arange(num_windows))
    blocks = windows // 64
    for group in range(9):
        assert len(np.unique(blocks[group * size : (group + 1) * size])) == 8
    assert len(np.unique(blocks[9 * size :])) == 8 + 2  # the last one takes what is left: a block and a short one
    assert windows[:size].tolist() != sorted(windows[:size])
    assert np.ptp(np.unique(blocks[:size])) > 8  # the blocks of a group are from all over the stream


def test_shuffle_none_is_the_order_of_the_stream():
    windows = order.WindowOrder(50, 3, "s", "none").windows_at(np.arange(120))
    assert np.array_equal(windows, np.arange(120) % 50)


@pytest.mark.parametrize("shuffle", order.SHUFFLES)
def test_windows_do_not_depend_on_how_indices_are_grouped(shuffle):
    each = order.WindowOrder(1000, 2, "", shuffle, **BLOCK)
    indices = np.random.default_rng(0).integers(0, 5000, (4, 50))
    whole = each.windows_at(indices)
    assert whole.shape == indices.shape and whole.dtype == np.int64
    assert whole.reshape(-1).tolist() == [int(each.windows_at(i)) for i in indices.reshape(-1)]


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


def z_scores_of(sequences):
    """The correlation of two independent permutations has standard deviation 1 / sqrt(size - 1)."""
    return np.corrcoef(sequences)[np.triu_indices(len(sequences), 1)] * np.sqrt(len(sequences[0]) - 1)


def test_block_shuffle_looks_random_inside_a_group_between_groups_and_between_epochs():
    num_groups, size = 6, 64 * 16
    blocks, places = [], []
    for seed in range(3):
        each = order.WindowOrder(num_groups * size, seed, "", "block", 64, 16)
        windows = each.windows_at(np.arange(4 * num_groups * size)).reshape(4, num_groups, size)
        places += [*(windows % 64).reshape(-1, size)]
        # In which order blocks come up, by their mean place in the epoch.
        indices = [each.indices_of(np.arange(num_groups * size), epoch) for epoch in range(4)]
        blocks += [each.reshape(-1, 64).mean(1) for each in indices]
    for sequences in (places, blocks):
        z_scores = z_scores_of(sequences)
        assert np.abs(z_scores).max() < 4.5
        assert 0.75 < z_scores.std() < 1.25
    # Inside a group too, neighbours are as far apart as independent draws of places and blocks.
    distances = np.abs(np.diff(places, axis=1)).mean()
    assert abs(distances / (64 / 3) - 1) < 0.02
    first_group = each.windows_at(np.arange(size)) // 64
    assert abs((np.diff(first_group) == 0).mean() - 1 / 16) < 0.03


def test_streams_of_one_length_are_shuffled_apart():
    size = 4096
    for shuffle in ("global", "block"):
        names = ["", "a", "b", "blocks", "group0", "a/blocks"]
        windows = [order.WindowOrder(size, 0, name, shuffle, 64, 8).windows_at(np.arange(size)) for name in names]
        if shuffle == "global":
            assert np.abs(z_scores_of(windows)).max() < 4.5
        assert (np.array(windows)[:, None] == np.array(windows)).mean(-1)[np.triu_indices(6, 1)].max() < 0.01


def test_no_two_keys_are_made_of_one_text():
    named = [
        ("", ""),
        ("blocks", ""),
        ("", "blocks"),
        ("group0", ""),
        ("group0", "a"),
        ("", "group0/a"),
        ("mixture", ""),
    ]
    keys = {order.key(0, 1, part, stream).tobytes() for part, stream in named}
    assert len(keys | {order.key(1, 0).tobytes(), order.key(0, 11).tobytes(), order.key(0, 1, "1").tobytes()}) == 10


def test_seeds_of_any_size_are_welcome_and_negative_indices_are_not():
    a, b = (order.WindowOrder(50, seed).windows_at(np.arange(50)) for seed in (2**70, 2**70 + 1))
    assert not np.array_equal(a, b)
    with pytest.raises(ValueError, match="negative"):
        order.WindowOrder(50).windows_at(-1)
    with pytest.raises(ValueError, match=r"window out of range: found \[3, 50\], expected \[0, 50\)"):
        order.WindowOrder(50).indices_of([3, 50], 0)
    with pytest.raises(ValueError, match=r"expected \[0, 50\)"):
        order.permute([50], 50, order.key(0, 0))


def test_indices_far_out_cost_no_more_and_are_inverted_too():
    each = order.WindowOrder(9_765_624, 0)
    indices = 10**15 + np.arange(1000)
    windows = each.windows_at(indices)
    epoch = 10**15 // each.num_windows
    assert np.array_equal(each.indices_of(windows, epoch), indices)

import numpy as np
import pytest

from gpt_pretrain.data.mixture import Mixture, counts_of

MIXTURES = [Mixture((5, 3, 2)), Mixture((1, 1), 7), Mixture((90, 7, 2, 1), 3, "400"), Mixture((33, 34, 33), 2**70)]


@pytest.mark.parametrize(
    ("weights", "block", "expected"),
    [
        ([0.5, 0.3, 0.2], 1000, (500, 300, 200)),
        ([5, 3, 2], 1000, (500, 300, 200)),
        ([0.1, 0.2, 0.7], 10, (1, 2, 7)),
        ([1, 1, 1], 100, (34, 33, 33)),  # the hundredth goes to the first of equals
        ([2, 1, 1], 7, (3, 2, 2)),  # 3.5, 1.75, 1.75: the largest remainders, not the largest shares
        ([0.15, 0.25, 0.6], 10, (2, 2, 6)),  # 1.5, 2.5: a tie in decimals, though not in binary
        ([1e-3, 0.999], 1000, (1, 999)),
        ([0.7], 3, (3,)),
    ],
)
def test_counts_follow_the_weights_by_largest_remainder(weights, block, expected):
    assert counts_of(weights, block) == expected


def test_counts_are_off_by_less_than_one_and_fill_the_block():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights, block = rng.uniform(0.1, 1, rng.integers(1, 8)), int(rng.integers(100, 2000))
        counts = counts_of(weights.tolist(), block)
        assert sum(counts) == block
        assert np.abs(np.array(counts) - weights / weights.sum() * block).max() < 1


def test_a_stream_that_would_never_be_met_is_an_error():
    with pytest.raises(ValueError, match=r"less than 1 in 1000.*Raise data\.mixture_block"):
        counts_of([0.9999, 0.0001], 1000)
    assert counts_of([0.9999, 0.0001], 10_000) == (9999, 1)


@pytest.mark.parametrize("weights", [[], [0.5, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_must_be_above_zero(weights):
    with pytest.raises(ValueError, match="expected numbers above 0"):
        counts_of(weights, 10)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_block_has_the_exact_proportions_in_an_order_of_its_own(mixture):
    streams, _ = mixture.at(np.arange(50 * mixture.block))
    blocks = streams.reshape(50, mixture.block)
    for stream, count in enumerate(mixture.counts):
        assert ((blocks == stream).sum(1) == count).all()
    assert len({block.tobytes() for block in blocks}) > (1 if mixture.block == 2 else 40)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_each_stream_is_drawn_in_its_own_order_without_gap_and_offsets_of_is_the_inverse(mixture):
    offsets = np.arange(7 * mixture.block + 3)
    streams, draws = mixture.at(offsets)
    for stream in range(len(mixture.counts)):
        mine = draws[streams == stream]
        assert np.array_equal(mine, np.arange(len(mine)))
        assert np.array_equal(mixture.offsets_of(stream, mine), offsets[streams == stream])


@pytest.mark.parametrize("mixture", [*MIXTURES, Mixture((1,)), Mixture((10,))])
def test_draws_before_counts_what_at_gives(mixture):
    streams, _ = mixture.at(np.arange(4 * mixture.block + 5))
    for offset in range(len(streams)):
        expected = [(streams[:offset] == stream).sum() for stream in range(len(mixture.counts))]
        assert list(mixture.draws_before(offset)) == expected


def test_one_stream_alone_is_every_example():
    streams, draws = Mixture((3,)).at(np.arange(100))
    assert not streams.any() and np.array_equal(draws, np.arange(100))
    assert np.array_equal(Mixture((3,)).offsets_of(0, np.arange(100)), np.arange(100))


def test_the_mixture_does_not_depend_on_how_offsets_are_grouped():
    mixture = Mixture((7, 2, 1), 4)
    offsets = np.random.default_rng(0).integers(0, 10**12, (3, 20))
    streams, draws = mixture.at(offsets)
    assert streams.shape == draws.shape == offsets.shape
    for index in np.ndindex(offsets.shape):
        stream, draw = mixture.at(offsets[index])
        assert (stream, draw) == (streams[index], draws[index])


def test_seeds_and_salts_lay_out_blocks_apart():
    layouts = [
        mixture.at(np.arange(1000))[0].tobytes()
        for mixture in (Mixture((500, 500)), Mixture((500, 500), 1), Mixture((500, 500), 0, "1"))
    ]
    assert len(set(layouts)) == 3

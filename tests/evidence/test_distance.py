"""The distance of two sets of images: against other libraries' sums, against copies laid out, and in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance

from ssl_seg.evidence.distance import Images, between_halves, interval_of, measure, of_altered, reach
from ssl_seg.evidence.statistics import image_blocks


def normal(blocks: int, size: int, seed: int, shift: float = 0.0, alike: float = 0.0) -> Images:
    """`blocks` of `size` images; `alike` is what share of the variance an image shares with its block."""
    random = np.random.default_rng(seed)
    shared, own = random.normal(size=(blocks, 1, 6)), random.normal(size=(blocks, size, 6))
    features = (shared * alike**0.5 + own * (1 - alike) ** 0.5).reshape(-1, 6)
    features[:, 0] += shift
    return Images(features, np.repeat(np.arange(blocks), size))


def laid_out(images: Images, often: np.ndarray) -> Images:
    """Blocks as often as drawn; the copies of a block are one block."""
    places = np.concatenate(
        [np.flatnonzero(images.blocks == block) for block in np.repeat(np.arange(len(often)), often)]
    )
    return Images(images.features[places], images.blocks[places])


def plainly(one: Images, other: Images) -> float:
    """The distance, pair by pair."""
    inside = []
    for images in (one, other):
        apart = cdist(images.features, images.features)
        inside.append(apart[images.blocks[:, None] != images.blocks].mean())
    between = cdist(one.features, other.features).mean()
    return 1 - sum(inside) / 2 / between


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 1000))
def test_in_one_dimension_it_is_scipys_energy_distance_without_its_bias(n: int, m: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.normal(size=n), random.normal(0.5, 2, size=m)
    between = np.abs(one[:, None] - other).mean()
    inside = [np.abs(values[:, None] - values).mean() for values in (one, other)]
    biased = energy_distance(one, other) ** 2 / 2 / between
    correction = sum(own / (len(values) - 1) for own, values in zip(inside, (one, other), strict=True)) / 2 / between
    sets = [Images(values[:, None], np.arange(len(values))) for values in (one, other)]
    assert measure(sets[0], sets[1:], resamples=1)[0].value == pytest.approx(biased - correction, abs=1e-9)


def test_pairs_within_a_block_do_not_count_and_resamples_are_copies_laid_out() -> None:
    target, pool = normal(6, 3, 0, alike=0.7), normal(7, 2, 1, shift=1, alike=0.7)
    (found,) = measure(target, [pool], resamples=40, seed=3)
    assert found.value == pytest.approx(plainly(target, pool))
    often = np.random.default_rng([3, 0]).multinomial(6, np.full(6, 1 / 6), 40)
    pool_often = np.random.default_rng([3, 1]).multinomial(7, np.full(7, 1 / 7), 40)
    drawn = [plainly(laid_out(target, a), laid_out(pool, b)) for a, b in zip(often, pool_often, strict=True)]
    assert found.draws == pytest.approx(np.array(drawn))


def test_a_pool_alone_gets_the_interval_that_it_gets_beside_another() -> None:
    target, near, far = normal(20, 2, 0), normal(20, 2, 1, shift=0.5), normal(30, 2, 2, shift=2)
    alone, beside = measure(target, [near]), measure(target, [near, far])
    assert alone[0].interval == beside[0].interval
    assert beside[1].value > beside[0].value
    behind = interval_of(beside[1].draws - beside[0].draws, target, near, far)
    assert 0 < behind.low < beside[1].value - beside[0].value < behind.high


def test_below_five_blocks_there_is_no_interval() -> None:
    few, many = normal(4, 5, 0), normal(20, 5, 1)
    assert measure(few, [many])[0].interval is None
    assert measure(many, [few])[0].interval is None
    assert measure(many, [normal(5, 1, 2)])[0].interval is not None


def test_images_that_are_all_one_lie_nowhere_apart() -> None:
    same = Images(np.ones((6, 3)), np.arange(6))
    (found,) = measure(same, [same])
    assert found.value == 0
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == (0, 0)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_halves_of_one_set_are_nought_apart(alike: float) -> None:
    means = [between_halves(normal(20, 5, seed, alike=alike)).mean() for seed in range(10)]
    assert np.mean(means) == pytest.approx(0, abs=0.005)


def test_two_videos_of_one_kind_are_nought_apart_though_by_single_frames_they_are_not() -> None:
    videos = [normal(10, 5, seed, alike=0.9) for seed in range(40)]
    pairs = [*zip(videos[::2], videos[1::2], strict=True)]
    by_blocks = [measure(one, [other], resamples=1)[0].value for one, other in pairs]
    frames = [tuple(Images(own.features, np.arange(len(own))) for own in pair) for pair in pairs]
    by_frames = [measure(one, [other], resamples=1)[0].value for one, other in frames]
    assert np.mean(by_blocks) == pytest.approx(0, abs=0.02)
    assert np.mean(by_frames) > 0.05


def test_small_sets_have_no_bias_and_the_distance_grows_with_the_shift() -> None:
    means = []
    for shift in (0.0, 0.5, 1.0, 2.0):
        pairs = [(normal(20, 1, 2 * seed), normal(40, 1, 2 * seed + 1, shift)) for seed in range(40)]
        values = [measure(one, [other], resamples=1)[0].value for one, other in pairs]
        large = measure(normal(500, 1, 900), [normal(500, 1, 901, shift)], resamples=1)[0].value
        assert np.mean(values) == pytest.approx(large, abs=3 * np.std(values) / 40**0.5 + 0.005)
        means.append(large)
    assert means == sorted(means)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("num_blocks", [6, 15])
def test_intervals_hold_the_truth_where_frames_are_alike(shift: float, num_blocks: int) -> None:
    truth = measure(normal(500, 1, 900), [normal(500, 1, 901, shift)], resamples=1)[0].value
    held = {"blocks": 0, "frames": 0}
    for seed in range(40):
        sets = normal(num_blocks, 5, 2 * seed, alike=0.9), normal(20, 5, 2 * seed + 1, shift, alike=0.9)
        singly = [Images(own.features, np.arange(len(own))) for own in sets]
        for kind, (target, pool) in (("blocks", sets), ("frames", singly)):
            interval = measure(target, [pool], resamples=200)[0].interval
            assert interval is not None
            held[kind] += interval.low <= truth <= interval.high
    assert held["blocks"] >= 36
    assert held["frames"] < held["blocks"]


def test_an_altered_copy_is_not_held_against_itself() -> None:
    target = normal(20, 2, 0, alike=0.9)
    assert of_altered(target, target) == pytest.approx(0, abs=1e-9)
    assert measure(target, [target])[0].value < -0.02  # where it is
    shifted = [Images(target.features + shift * np.eye(6)[0], target.blocks) for shift in (0.5, 1, 2)]
    values = [of_altered(target, other) for other in shifted]
    assert 0 < values[0] < values[1] < values[2]


def test_reach_is_the_third_other_block() -> None:
    places = np.array([0.0, 0.1, 1.0, 3.0, 3.1, 7.0])[:, None]
    images = Images(places, image_blocks(["a_1", "a_2", "b_1", "c_1", "c_2", "d_1"]))
    assert images.num_blocks == 4
    assert reach(images) == pytest.approx([7, 6.9, 6, 4, 3.9, 6.9])

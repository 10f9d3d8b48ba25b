"""Intervals and p against scipy's and against every resample counted; then against thousands of studies in which
nothing is to be found, where each has to be wrong as often as it says."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ssl_seg.config import UserError
from ssl_seg.evidence import statistics
from ssl_seg.evidence.pairs import independent, of_differences
from ssl_seg.evidence.statistics import (
    MIN_FLIPS,
    MIN_RESAMPLED,
    Interval,
    block_bootstrap,
    bootstrap_t_interval,
    detectable,
    holm,
    image_blocks,
    pairs_needed,
    sign_flip_p,
    t_interval,
    t_test_p,
)
from ssl_seg.scores import ImageConfusions

# Darwin's plants, crossed against self-fertilised: paired differences in eighths of an inch (Fisher 1935, section 17).
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
CLASSES = ("a", "b", "c", "d", "e")
Study = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


# ---- over seeds: against other libraries ----


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20).filter(lambda values: np.std(values) > 1e-6))
def test_the_t_interval_and_its_p_are_scipy_s(differences: list[float]) -> None:
    expected = stats.ttest_1samp(differences, 0)
    found = t_interval(differences, 0.9)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert (found.level, found.method) == (0.9, "t")
    assert t_test_p(differences) == pytest.approx(expected.pvalue)


def test_one_difference_has_no_interval() -> None:
    assert t_interval([0.01]) is t_interval([]) is t_test_p([0.01]) is None
    assert bootstrap_t_interval([0.01, 0.02, 0.03, 0.04]) is None


@pytest.mark.parametrize(("value", "p"), [(0.7, 0), (0, 1)])
def test_differences_that_are_all_the_same_leave_no_doubt(value: float, p: float) -> None:
    same = [value] * 6
    for found in (t_interval(same), bootstrap_t_interval(same)):
        assert (found.low, found.high) == (pytest.approx(value), pytest.approx(value))
    assert t_test_p(same) == p


def test_the_bootstrap_t_is_that_of_every_resample_counted() -> None:
    differences = np.array([0.1, 0.4, 0.5, 1.1, 3.0])
    ratios = []
    for resample in itertools.product(differences, repeat=5):
        drawn = np.array(resample)
        error = drawn.std(ddof=1) / math.sqrt(5)
        shift = drawn.mean() - differences.mean()
        ratios.append(shift / error if len(set(resample)) > 1 else math.copysign(math.inf, shift))
    low, high = np.quantile(ratios, [0.05, 0.95], method="inverted_cdf")
    error = differences.std(ddof=1) / math.sqrt(5)
    found = bootstrap_t_interval(differences, level=0.9, resamples=100_000)
    assert found.low == pytest.approx(differences.mean() - high * error, abs=0.02)
    assert found.high == pytest.approx(differences.mean() - low * error, abs=0.2)
    assert found.high - differences.mean() > 3 * (differences.mean() - found.low), "it leans as the differences do"


def test_a_bootstrap_that_could_have_no_end_is_none() -> None:
    assert bootstrap_t_interval([0.1, 0.4, 0.5, 1.1, 3.0], level=0.9999) is None, "1 in 3125 holds the lowest only"
    of_a_rare_class = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.03, 0.01]
    assert bootstrap_t_interval(of_a_rare_class) is None
    assert t_interval(of_a_rare_class).low < 0


def test_a_bootstrap_is_the_same_each_time_and_follows_unit_and_origin() -> None:
    differences = np.random.default_rng(0).normal(size=9)
    found = bootstrap_t_interval(differences)
    assert bootstrap_t_interval(differences) == found
    assert bootstrap_t_interval(differences, seed=1) != found
    moved = bootstrap_t_interval(100 * differences + 5)
    assert (moved.low, moved.high) == pytest.approx((100 * found.low + 5, 100 * found.high + 5))


@given(st.lists(st.integers(-40, 40), min_size=8, max_size=9))
def test_the_exact_p_is_scipy_s_permutation_test(differences: list[int]) -> None:
    expected = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    found = sign_flip_p(differences)
    assert found == pytest.approx(expected.pvalue)
    assert sign_flip_p([difference / 1000 for difference in differences]) == found, "ties survive rounding"


def test_the_exact_p_of_darwin_s_plants_is_fisher_s() -> None:
    assert sign_flip_p(DARWIN) == 2 * 863 / 2**15


@pytest.mark.parametrize("count", [8, 9, 20, 40])
def test_differences_of_one_sign_have_the_smallest_p(count: int) -> None:
    assert sign_flip_p(np.arange(1, count + 1)) == sign_flip_p(-np.arange(1, count + 1)) == 2 / 2**count


def test_there_is_no_exact_p_for_few_or_very_many_pairs() -> None:
    assert sign_flip_p([0.01] * 7) is None
    assert sign_flip_p([0.01] * 41) is None
    assert sign_flip_p([0.0] * 8) == 1


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_test_of_all_subsets(p_values: list[float]) -> None:
    places = range(len(p_values))
    subsets = [own for size in places for own in itertools.combinations(places, size + 1)]
    expected = [
        max(min(1.0, len(own) * min(p_values[other] for other in own)) for own in subsets if place in own)
        for place in places
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_keeps_the_order_of_the_comparisons() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


# ---- over seeds: how often they are wrong ----


def normal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.normal(size=shape)


def skewed(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A few seeds gain much, most a little less than nothing; the mean is 0."""
    return random.exponential(size=shape) - 1


def heavy_tailed(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.standard_t(3, size=shape)


def two_like_arms(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Both arms score alike: what a seed shares cancels, some seeds (choices of images) scatter more than others, and
    scores are skewed; only which arm is which is left to chance."""
    scatter = np.exp(random.normal(size=(*shape, 1)))
    one, other = np.moveaxis(random.normal(size=(*shape, 1)) + scatter * random.exponential(size=(*shape, 2)), -1, 0)
    return other - one


def one_pretraining_for_all(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Pretraining does nothing on average, but all pairs of a study start from the same one."""
    return random.normal(size=shape) + random.normal(size=(shape[0], 1))


def in_turn(pretrainings: int) -> Study:
    """Pretraining does nothing on average, and pretrainings differ as much as seeds do; pairs take them in turn."""

    def study(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        studies, pairs = shape
        effects = random.normal(size=(studies, pretrainings))
        return random.normal(size=shape) + effects[:, np.arange(pairs) % pretrainings]

    return study


def over_starts(pretrainings: int) -> Callable[[np.ndarray], Interval]:
    """Student's interval of the means of the pretrainings."""
    return lambda differences: t_interval(differences.reshape(-1, pretrainings).mean(axis=0))


def coverage(interval: Callable[[np.ndarray], Interval], study: Study, pairs: int, studies: int = 2000) -> float:
    """The share of null studies whose interval holds 0."""
    found = [interval(differences) for differences in study(np.random.default_rng(pairs), (studies, pairs))]
    return float(np.mean([own.low <= 0 <= own.high for own in found]))


def rejections(study: Study, pairs: int, alpha: float, studies: int = 2000) -> float:
    """The share of null studies that the exact p calls different."""
    drawn = study(np.random.default_rng(pairs), (studies, pairs))
    return float(np.mean([sign_flip_p(differences) <= alpha for differences in drawn]))


def attainable(pairs: int, alpha: float) -> float:
    """The largest share up to `alpha` that an exact p of distinct differences can reject; it has steps of 2 / 2**n."""
    return math.floor(alpha * 2**pairs / 2) * 2 / 2**pairs


def short_bootstrap_t(differences: np.ndarray) -> Interval:
    return bootstrap_t_interval(differences, resamples=999)


@pytest.mark.parametrize("pairs", [3, 5, 8, 16])
def test_t_intervals_of_2000_null_studies_hold_the_truth(pairs: int) -> None:
    assert 0.935 <= coverage(t_interval, normal, pairs) <= 0.965
    assert 0.93 <= coverage(t_interval, heavy_tailed, pairs) <= 0.98
    assert 0.93 <= coverage(t_interval, two_like_arms, pairs) <= 0.99


def test_what_intervals_do_not_cover_is_as_the_page_says() -> None:
    assert coverage(t_interval, skewed, 8) == pytest.approx(0.89, abs=0.02)
    assert coverage(t_interval, one_pretraining_for_all, 8) < 0.6
    assert rejections(one_pretraining_for_all, 8, 0.05) > 0.4


def test_pairs_that_share_pretrainings_are_not_independent_and_the_means_of_these_are() -> None:
    assert coverage(t_interval, in_turn(2), 8) == pytest.approx(1 - 0.24, abs=0.02)
    assert coverage(t_interval, in_turn(4), 8) < 0.92
    assert rejections(in_turn(2), 8, 0.05) > 0.15
    assert 0.935 <= coverage(t_interval, in_turn(8), 8) <= 0.965, "a pretraining of its own for every pair"
    for pretrainings, pairs in ((3, 9), (4, 8), (4, 16)):
        assert 0.935 <= coverage(over_starts(pretrainings), in_turn(pretrainings), pairs) <= 0.965


def test_pretrainings_under_every_seed_are_told_by_chance_as_rarely_as_the_rules_say() -> None:
    """A gain of each pretraining under each seed, where both differ alike. Of 2 a gain is said to be of these alone."""
    random = np.random.default_rng(0)
    for starts, seeds, least, most in ((2, 8, 0.24, 0.32), (3, 3, 0.01, 0.05), (4, 8, 0.03, 0.075), (8, 8, 0.05, 0.1)):
        told = []
        for _ in range(1000):
            gains = random.normal(size=(seeds, 1)) + random.normal(size=starts) + random.normal(0, 0.5, (seeds, starts))
            cells = ((seed, str(start), gains[seed, start]) for seed in range(seeds) for start in range(starts))
            told.append(t_test_p(independent(of_differences(cells))) <= 0.05)
        assert least <= np.mean(told) <= most


def test_a_study_that_grows_until_it_tells_something_is_wrong_far_more_often_than_5_times_in_100() -> None:
    drawn_gains = normal(np.random.default_rng(0), (2000, 24))
    looks = (3, 5, 8, 12, 16, 24)
    told = [any(t_test_p(gains[:pairs]) <= 0.05 for pairs in looks) for gains in drawn_gains]
    assert np.mean(told) == pytest.approx(0.18, abs=0.025)


@pytest.mark.parametrize("pairs", [2, 3, 5, 8, 16, 40])
def test_what_can_be_detected_is_the_noncentral_t_s(pairs: int) -> None:
    differences = normal(np.random.default_rng(pairs), (1, pairs))[0]
    for level, power in ((0.95, 0.8), (0.9, 0.5)):
        reached = detectable(differences, level, power) / stats.sem(differences)
        limit = stats.t.ppf((1 + level) / 2, pairs - 1)
        assert stats.nct.sf(limit, pairs - 1, reached) == pytest.approx(power, abs=1e-5)
    assert detectable(differences[:1]) is None


def test_a_detectable_gain_is_told_8_times_in_10() -> None:
    shift = detectable([-1.0, 0.0, 1.0, 2.0, -2.0]) / math.sqrt(2.5)  # in standard deviations
    drawn_gains = normal(np.random.default_rng(1), (2000, 5)) + shift
    assert np.mean([t_interval(gains).low > 0 for gains in drawn_gains]) == pytest.approx(0.8, abs=0.03)


# As G*Power has it for a paired t test, two-sided, alpha 0.05, power 0.8 (Faul et al. 2007, version 3.1).
@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_pairs_that_a_gain_needs_are_those_of_tables(effect: float, pairs: int) -> None:
    assert pairs_needed(1.0, effect) == pairs == pairs_needed(3.0, -3 * effect)
    assert pairs_needed(1.0, 0.01) is None


@pytest.mark.parametrize("pairs", [8, 16])
def test_bootstrap_t_intervals_hold_the_truth_where_student_s_do_not(pairs: int) -> None:
    assert 0.935 <= coverage(short_bootstrap_t, normal, pairs, 1000) <= 0.965
    of_skewed = coverage(short_bootstrap_t, skewed, pairs, 1000)
    assert of_skewed >= 0.925
    assert of_skewed >= coverage(t_interval, skewed, pairs, 1000) + 0.01


@pytest.mark.parametrize("pairs", [8, 10, 12])
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_like_arms_are_called_different_as_often_as_stated(pairs: int, alpha: float) -> None:
    expected = attainable(pairs, alpha)
    error = math.sqrt(expected * (1 - expected) / 2000)
    assert expected <= alpha
    assert rejections(two_like_arms, pairs, alpha) == pytest.approx(expected, abs=3 * error)


def test_of_several_like_comparisons_holm_tells_any_on_few_pages() -> None:
    random = np.random.default_rng(0)
    pages = 1000
    alone, corrected = 0, 0
    for _ in range(pages):
        scratch = random.normal(size=8)
        p_values = [t_test_p(random.normal(size=8) - scratch) for _ in range(4)]
        alone += min(p_values) <= 0.05
        corrected += min(holm(p_values)) <= 0.05
    assert alone / pages > 0.1
    assert 0.02 < corrected / pages < 0.065


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [3, 5, 8, 16])
def test_coverage_and_rates_of_20000_null_studies(pairs: int) -> None:
    assert 0.945 <= coverage(t_interval, normal, pairs, 20_000) <= 0.955
    if pairs >= MIN_RESAMPLED:
        assert 0.935 <= coverage(short_bootstrap_t, normal, pairs, 20_000) <= 0.96
    if pairs >= MIN_FLIPS:
        expected = attainable(pairs, 0.05)
        error = math.sqrt(expected * (1 - expected) / 20_000)
        assert rejections(two_like_arms, pairs, 0.05, 20_000) == pytest.approx(expected, abs=3 * error)


# ---- over images ----


def of_matrices(matrices: np.ndarray, first: int = 0) -> ImageConfusions:
    """From `(N, K, K)` pixels."""
    count, num_classes, _ = matrices.shape
    cells = matrices.reshape(count, num_classes**2)
    image, cell = np.nonzero(cells)
    return ImageConfusions(
        class_names=CLASSES[:num_classes],
        names=tuple(f"drive_{first + index:05d}.png" for index in range(count)),
        image=image.astype(np.int32),
        cell=cell.astype(np.int32),
        count=cells[image, cell].astype(np.int32),
        band=np.zeros(len(cell), dtype=np.int32),
        digest="",
    )


def drawn(count: int, seed: int, num_classes: int = 3, right: int = 60) -> ImageConfusions:
    random = np.random.default_rng(seed)
    matrices = random.integers(0, 30, (count, num_classes, num_classes)) * (
        random.random((count, 1, num_classes)) < 0.7
    )
    return of_matrices(matrices + right * np.eye(num_classes, dtype=int))


def miou_difference(a: ImageConfusions, b: ImageConfusions, blocks: np.ndarray, chosen: np.ndarray) -> float:
    indices = np.concatenate([np.flatnonzero(blocks == block) for block in chosen])
    return b.scores(indices).miou - a.scores(indices).miou


def test_the_block_bootstrap_is_that_of_every_resample_counted_at_student_s_width() -> None:
    random = np.random.default_rng(0)
    sides = random.integers(1, 30, (2, 60, 3, 3)) + np.array([40, 60]).reshape(2, 1, 1, 1) * np.eye(3, dtype=int)
    sides[:, 10:, 2] = sides[:, 10:, :, 2] = 0  # a class that one block shows, so that resamples average 2 or 3
    a, b = of_matrices(sides[0]), of_matrices(sides[1])
    blocks = image_blocks(a.names)
    resamples = [np.array(own) for own in itertools.combinations_with_replacement(range(6), 6)]
    differences = np.array([miou_difference(a, b, blocks, own) for own in resamples])
    ways = np.array([1 / math.prod(map(math.factorial, np.bincount(own))) for own in resamples])
    order = np.argsort(differences)
    below = np.cumsum(ways[order]) / ways.sum()
    # Hesterberg's level for 6 blocks, from Student's and the normal distribution.
    tail = stats.norm.cdf(math.sqrt(6 / 5) * stats.t.ppf(0.05, 5))
    low, high = differences[order][np.searchsorted(below, [tail, 1 - tail])]
    found = block_bootstrap(a, b, blocks, level=0.9, resamples=100_000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02 * (high - low))
    assert (found.level, found.method) == (0.9, "block bootstrap")


def test_sides_may_be_several_runs_and_change_places() -> None:
    runs = [drawn(80, seed=seed, right=50 + 10 * seed) for seed in range(4)]
    found = block_bootstrap(runs[:2], runs[2:])
    turned = block_bootstrap(runs[2:], runs[:2])
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))
    alone = block_bootstrap(runs[0], runs[2])
    assert block_bootstrap([runs[0]] * 2, [runs[2]] * 2) == alone == block_bootstrap([runs[0]], runs[2])
    assert min(alone.low, block_bootstrap(runs[1], runs[3]).low) < found.low
    itself = block_bootstrap(runs, runs)
    assert (itself.low, itself.high) == (0, 0)


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn(80, seed=0), drawn(80, seed=1)
    at_once = block_bootstrap(a, b, resamples=1000)
    monkeypatch.setattr(statistics, "AT_ONCE", 7 * 16)
    assert block_bootstrap(a, b, resamples=1000) == at_once
    assert block_bootstrap(a, b, resamples=1000, seed=1) != at_once


def test_classes_that_a_resample_does_not_show_are_left_out_of_its_mean() -> None:
    matrices = np.zeros((5, 3, 3), dtype=int)
    matrices[:, 0, 0] = 10
    matrices[0, 1, 1] = 10  # in one image only, and right
    found = block_bootstrap(of_matrices(matrices), of_matrices(matrices), np.arange(5))
    assert (found.low, found.high) == (0, 0)
    matrices[:, 0, 0] = 0
    worse = np.roll(matrices, 1, axis=2)
    assert block_bootstrap(of_matrices(matrices), of_matrices(worse), np.arange(5)) is None, "one block counts pixels"


def test_few_blocks_have_no_interval() -> None:
    a, b = drawn(40, seed=0), drawn(40, seed=1)
    assert block_bootstrap(a, b, np.arange(40) // 10) is None
    assert block_bootstrap(a, b, np.arange(40) // 8) is not None
    empty = of_matrices(np.zeros((0, 3, 3), dtype=int))
    assert block_bootstrap(empty, empty) is None


def test_runs_of_other_images_or_classes_are_refused() -> None:
    a = drawn(60, seed=0)
    others = (of_matrices(np.ones((60, 3, 3), dtype=int), first=1), drawn(59, seed=0))
    for other in others:
        with pytest.raises(UserError, match="different images"):
            block_bootstrap(a, other)
    with pytest.raises(UserError, match="different images"):
        block_bootstrap([a, replace(a, digest="1")], replace(a, digest="2"))
    with pytest.raises(UserError, match="different classes"):
        block_bootstrap(a, replace(a, class_names=("x", "y", "z")))
    with pytest.raises(UserError, match="different classes"):
        block_bootstrap(a, drawn(60, seed=0, num_classes=4))


# ---- blocks ----


def blocks_of(*names: str, size: int = 2) -> list[int]:
    return image_blocks(names, size).tolist()


def test_neighbours_are_those_of_one_sequence_by_their_number() -> None:
    assert blocks_of("a_10", "a_2", "b_1", "a_1", "b_2", "a_3") == [1, 0, 2, 0, 2, 1]
    assert blocks_of("b/1.png", "b/2.png", "a/1.png", "a/2.png") == [0, 0, 1, 1]
    assert blocks_of("0006R0_f00930.png", "0006R0_f00960.png", "0016E5_f00001.png") == [0, 0, 1]


@pytest.mark.parametrize(("images", "sizes"), [(1, [1]), (14, [14]), (16, [8, 8]), (101, [11, *[10] * 9]), (0, [])])
def test_a_sequence_is_cut_into_blocks_of_about_equal_size(images: int, sizes: list[int]) -> None:
    found = image_blocks([f"f{number}" for number in range(images)])
    assert sorted(np.bincount(found).tolist(), reverse=True) == sizes
    assert (np.diff(found) >= 0).all()


def test_what_all_names_end_with_is_no_number_of_theirs() -> None:
    names = [f"aachen_{number:06d}_000019_leftImg8bit.png" for number in range(4)]
    assert blocks_of(*names) == [0, 0, 1, 1]
    assert blocks_of("p1_5.png", "p1_15.png", "p1_25.png", "p1_35.png") == [0, 0, 1, 1]


def test_snippets_of_a_drive_are_neighbours_by_the_number_before() -> None:
    """Cityscapes' validation images: of one city all have one snippet's number, of others each has one of its own."""
    lindau = [f"lindau_{number:06d}_000019_leftImg8bit.png" for number in range(59)]
    frankfurt = [f"frankfurt_{number // 20:06d}_{500 * number:06d}_leftImg8bit.png" for number in range(60)]
    assert len(set(image_blocks([*lindau, *frankfurt]))) == 6 + 6
    assert len(set(image_blocks(lindau))) == 6


def test_images_without_numbers_stand_alone() -> None:
    assert blocks_of("anna.png", "berta.png", "clara.png") == [0, 1, 2]


@given(st.lists(st.text(alphabet="ab/_.019", max_size=8), max_size=40, unique=True), st.integers(1, 12))
def test_every_image_is_in_one_block_whatever_the_order(names: list[str], size: int) -> None:
    blocks = image_blocks(names, size=size)
    assert sorted(set(blocks.tolist())) == list(range(len(set(blocks.tolist()))))
    assert max(np.bincount(blocks), default=0) <= max(1, 1.5 * size)
    turned = image_blocks(names[::-1], size=size)[::-1]
    together = {frozenset(np.flatnonzero(blocks == block).tolist()) for block in blocks}
    assert {frozenset(np.flatnonzero(turned == block).tolist()) for block in turned} == together


# ---- over images: how often they are wrong ----


def waves(random: np.random.Generator, shape: tuple[int, ...], alike: float) -> np.ndarray:
    """Standard normal numbers whose neighbours along the last axis correlate by `alike`."""
    found = random.normal(size=shape)
    for place in range(1, shape[-1]):
        found[..., place] = alike * found[..., place - 1] + math.sqrt(1 - alike**2) * found[..., place]
    return found


def like_runs(random: np.random.Generator, frames: int, alike: float) -> list[ImageConfusions]:
    """Two runs that are equally good on a drive: what is seen, how hard it is and what each mistakes change slowly."""
    num_classes = len(CLASSES)
    seen = np.exp(waves(random, (num_classes, frames), alike))
    truth = np.round(4800 * seen / seen.sum(axis=0))
    hard = 0.7 * waves(random, (num_classes, frames), alike) - 1
    runs = []
    for _ in range(2):
        missed = 1 / (1 + np.exp(-hard - 0.6 * waves(random, (num_classes, frames), alike)))
        wrong = np.round(truth * missed).astype(int)
        matrices = np.zeros((frames, num_classes, num_classes), dtype=int)
        for own in range(num_classes):
            matrices[:, own, own] = truth[own] - wrong[own]
            matrices[:, own, (own + 1) % num_classes] = wrong[own]
        runs.append(of_matrices(matrices))
    return runs


def block_coverage(sizes: tuple[int, ...], drives: int, frames: int, alike: float) -> list[float]:
    """For each size of block the share of drives on which the interval of two like runs holds 0."""
    random = np.random.default_rng(frames)
    held = np.zeros(len(sizes))
    for _ in range(drives):
        a, b = like_runs(random, frames, alike)
        found = [block_bootstrap(a, b, image_blocks(a.names, size=size), resamples=999) for size in sizes]
        held += [own.low <= 0 <= own.high for own in found]
    return (held / drives).tolist()


def test_blocks_of_neighbours_hold_the_truth_where_single_frames_do_not() -> None:
    # 0.5: what was measured on frames of CamVid a second apart.
    single, ten = block_coverage((1, 10), drives=250, frames=120, alike=0.5)
    assert single < 0.82
    assert ten > 0.9


def test_independent_images_lose_nothing_by_blocks() -> None:
    single, five = block_coverage((1, 5), drives=300, frames=50, alike=0)
    assert 0.92 <= single <= 0.975
    assert 0.92 <= five <= 0.975


@pytest.mark.slow
def test_coverage_on_2000_drives() -> None:
    single, ten, twenty = block_coverage((1, 10, 20), drives=2000, frames=200, alike=0.5)
    assert single < 0.8
    assert 0.91 <= ten <= 0.95
    assert 0.92 <= twenty <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [5, 8])
def test_coverage_with_few_blocks(blocks: int) -> None:
    assert 0.915 <= block_coverage((1,), drives=2000, frames=blocks, alike=0)[0] <= 0.975


def test_it_needs_neither_torch_nor_scipy_stats() -> None:
    script = (
        "import sys\n"
        "from ssl_seg.evidence.statistics import t_interval\n"
        "assert t_interval([1.0, 2.0]) is not None\n"
        "assert not {'torch', 'scipy.stats'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

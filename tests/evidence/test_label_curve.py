"""What labelled images are worth: intervals against true curves of seven kinds, and against a study that was made."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssl_seg.evidence import label_curve, results
from ssl_seg.evidence.label_curve import REACH, Labels, equivalent, needed, predicted
from tests import ROOT
from tests.reports.test_study import change, write_study

LEVEL = 0.9
LEAST = 0.85  # of hidden truths that these intervals must hold
GRIDS = ((5, 10, 20), (5, 10, 40), (5, 10, 20, 40), (10, 15, 20, 30), (5, 10, 20, 40, 80), (4, 8, 16, 32, 64, 128))
SEEDS = (3, 5, 8)
Curve = Callable[[Sequence[float] | np.ndarray | float], np.ndarray]


# ---- worlds ----


def power_law(random: np.random.Generator) -> Curve:
    top, rise, exponent = random.uniform(0.35, 0.9), random.uniform(0.1, 0.35), random.uniform(0.2, 1.2)
    return lambda n: top - rise * (np.asarray(n) / 5) ** -exponent


def logarithm(random: np.random.Generator) -> Curve:
    start, rise = random.uniform(0.2, 0.4), random.uniform(0.005, 0.05)
    return lambda n: start + rise * np.log2(np.asarray(n) / 5)


def saturating(random: np.random.Generator) -> Curve:
    top, rise, width = random.uniform(0.4, 0.9), random.uniform(0.1, 0.3), random.uniform(10, 60)
    return lambda n: top - rise * np.exp((5 - np.asarray(n)) / width)


def s_shaped(random: np.random.Generator) -> Curve:
    start, rise = random.uniform(0.15, 0.3), random.uniform(0.1, 0.4)
    middle, width = np.log2(random.uniform(8, 40)), random.uniform(0.5, 1.2)
    return lambda n: start + rise / (1 + np.exp((middle - np.log2(n)) / width))


def broken(random: np.random.Generator) -> Curve:
    """Two slopes over the logarithm, and a soft corner."""
    start, before, after = random.uniform(0.25, 0.4), random.uniform(0.005, 0.03), random.uniform(0, 0.06)
    corner = np.log2(random.uniform(10, 40))
    return lambda n: (
        start + before * np.log2(np.asarray(n) / 5) + (after - before) * np.logaddexp(0, 4 * (np.log2(n) - corner)) / 4
    )


def flat(random: np.random.Generator) -> Curve:
    height = random.uniform(0.2, 0.9)
    return lambda n: height + 0 * np.asarray(n)


def falling(random: np.random.Generator) -> Curve:
    start, fall = random.uniform(0.4, 0.7), random.uniform(0.005, 0.02)
    return lambda n: start - fall * np.log2(np.asarray(n) / 5)


WORLDS = (power_law, logarithm, saturating, s_shaped, broken, flat, falling)


def spread(random: np.random.Generator, counts: Sequence[int], pairs: int) -> np.ndarray:
    """What seeds add `(pairs, counts)`: as in experiments/camvid_study 1.2 to 3.5 points with 5 labels, and 0.8 of it
    alike between n and 2 n labels, for these are nested."""
    logs = np.log2(counts)
    alike = 0.8 ** np.abs(logs[:, None] - logs)
    sd = random.uniform(0.012, 0.035) * (np.asarray(counts) / 5) ** -random.uniform(0, 0.3)
    return random.multivariate_normal(np.zeros(len(counts)), alike * np.outer(sd, sd), pairs)


def pairs_of(
    random: np.random.Generator, base: Curve, own: Curve, counts: Sequence[int], pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a baseline and an arm: what both seeds share is most of their spread."""
    shared = spread(random, counts, pairs)
    return base(counts) + shared, own(counts) + shared + 0.5 * spread(random, counts, pairs)


def share_of_next_scores_held(
    random: np.random.Generator, world: Callable[[np.random.Generator], Curve], pairs: int, times: int, worlds: int
) -> float:
    held = 0
    for _ in range(worlds):
        curve, counts = world(random), GRIDS[random.integers(len(GRIDS))]
        low, _, high = predicted(counts, curve(counts) + spread(random, counts, pairs), [times * counts[-1]], LEVEL)
        held += low[0] <= curve(times * counts[-1]) <= high[0]
    return held / worlds


def share_of_equivalents_held(
    random: np.random.Generator, world: Callable[[np.random.Generator], Curve], pairs: int, most: float, worlds: int
) -> float:
    """An arm is worth up to `most` times its labels, in truth; beyond what was measured an open end is right."""
    held = 0
    for _ in range(worlds):
        curve, counts = world(random), GRIDS[random.integers(len(GRIDS))]
        at = counts[(len(counts) - 1) // 2]
        truth = int(random.integers(most * at + 1))
        sides = pairs_of(random, curve, lambda n, f=1 + truth / at, of=curve: of(f * np.asarray(n)), counts, pairs)
        found = equivalent(counts, *sides, at, LEVEL)
        held += found.high == math.inf if at + truth > counts[-1] else found.low <= truth <= found.high
    return held / worlds


# ---- what intervals hold ----


def test_intervals_hold_hidden_scores_of_power_laws() -> None:
    assert share_of_next_scores_held(np.random.default_rng(0), power_law, 5, 2, 60) >= LEAST


def test_an_interval_of_labels_holds_none_where_arms_are_alike() -> None:
    assert share_of_equivalents_held(np.random.default_rng(1), power_law, 5, 0.0, 200) >= LEAST


def test_intervals_hold_what_an_arm_is_worth() -> None:
    assert share_of_equivalents_held(np.random.default_rng(2), power_law, 5, 1.5, 100) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("pairs", SEEDS)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_coverage(world: Callable[[np.random.Generator], Curve], pairs: int) -> None:
    """The figures of docs/study.md."""
    random = np.random.default_rng([pairs, WORLDS.index(world)])
    shares = {
        "next score, twice the labels": share_of_next_scores_held(random, world, pairs, 2, 400),
        "next score, four times": share_of_next_scores_held(random, world, pairs, REACH, 400),
        # Where labels do harm an arm with more of them is worse, and no equivalent is told with that sign.
        "equivalent": 1.0 if world is falling else share_of_equivalents_held(random, world, pairs, 1.5, 400),
        "equivalent of nothing": share_of_equivalents_held(random, world, pairs, 0.0, 1000),
    }
    print(world.__name__, pairs, shares)
    null = shares.pop("equivalent of nothing")
    assert null >= LEVEL - 0.025, "2.6 standard errors of 1,000 worlds"
    assert min(shares.values()) >= LEAST, shares


def scores_of_camvid(arm: str) -> tuple[tuple[int, ...], np.ndarray]:
    """`(seeds, counts)` of the study that is in the repository."""
    with (ROOT / "experiments" / "camvid_study" / "cells.csv").open() as file:
        cells = [row for row in csv.DictReader(file) if row["arm"] == arm]
    scores = {(int(cell["seed"]), int(cell["labels.count"])): float(cell["val/miou"]) for cell in cells}
    counts = tuple(sorted({count for _, count in scores}))
    return counts, np.array([[scores[seed, count] for count in counts] for seed in range(6)])


@pytest.mark.parametrize("arm", ["scratch", "encoder", "encoder+decoder"])
def test_the_largest_number_of_labels_of_a_real_study_lies_where_the_others_say(arm: str) -> None:
    counts, values = scores_of_camvid(arm)
    low, middle, high = predicted(counts[:-1], values[:, :-1], counts[-1:], LEVEL)
    print(arm, low, middle, high, values[:, -1].mean())
    assert low[0] <= values[:, -1].mean() <= high[0]
    assert high[0] - low[0] < 0.12


# ---- equivalents ----


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(GRIDS), st.integers(3, 8), st.sampled_from([0.9, 0.95]))
def test_no_label_is_possible_exactly_where_no_gain_can_be_told(
    seed: int, counts: tuple[int, ...], pairs: int, level: float
) -> None:
    random = np.random.default_rng(seed)
    curve = WORLDS[seed % len(WORLDS)](random)
    base, own = pairs_of(random, curve, lambda n: curve(n) + random.normal(0, 0.02), counts, pairs)
    for place, at in enumerate(counts):
        found = equivalent(counts, base, own, at, level)
        gain = stats.ttest_1samp(own[:, place] - base[:, place], 0).confidence_interval(level)
        if gain.low <= 0 <= gain.high:
            assert found.low <= 0 <= found.high
        elif gain.low > 0:
            assert found.low > 0 or (at == counts[-1] and found.high == math.inf)
        else:
            assert found.high < 0 or (at == counts[0] and found.low == -math.inf)
        assert found.low <= found.high
        assert math.isinf(found.middle) or found.low <= found.middle <= found.high


def almost(counts: Sequence[int], curve: Curve, shift: float = 0.0) -> np.ndarray:
    """Three seeds that differ by nearly nothing, and not all alike."""
    apart = 1e-5 * np.array([[1.0], [-1.0], [0.5]]) * np.cos(np.arange(len(counts)) + np.arange(3)[:, None])
    return curve(counts) + shift + apart


def rising(n: Sequence[float] | np.ndarray | float) -> np.ndarray:
    return 0.3 + 0.05 * np.log2(np.asarray(n) / 5)


def test_an_arm_that_has_twice_the_labels_is_worth_as_many_again() -> None:
    counts = (5, 10, 20, 40)
    found = equivalent(counts, almost(counts, rising), almost(counts, rising, 0.05), 10)
    assert found.middle == pytest.approx(10, abs=1)
    assert 0 < found.low <= 10 <= found.high <= 15
    dear = equivalent(counts, almost(counts, rising), almost(counts, rising, -0.05), 20)
    assert dear.middle == pytest.approx(-10, abs=1)
    assert -15 <= dear.low <= -10 <= dear.high < 0


def test_beyond_what_was_measured_there_is_a_lower_bound_alone() -> None:
    counts = (5, 10, 20)
    base = almost(counts, rising)
    assert equivalent(counts, base, base + 0.3, 10) == Labels(math.inf, 10, math.inf)
    assert equivalent(counts, base, base - 0.3, 10) == Labels(-math.inf, -math.inf, -5)
    assert equivalent(counts, base, almost(counts, rising, 0.05), 20).high == math.inf


def test_two_numbers_of_labels_are_enough_for_an_equivalent_between_them() -> None:
    counts = (10, 40)
    found = equivalent(counts, almost(counts, rising), almost(counts, rising, 0.05), 10)
    assert found.middle == pytest.approx(10, abs=1)
    assert found.low < 10 < found.high, "what lies between two points is not known"


def test_a_flat_baseline_tells_nothing() -> None:
    counts, random = (5, 10, 20), np.random.default_rng(3)
    base, own = pairs_of(random, flat(random), lambda n: 0.5 + 0 * np.asarray(n), counts, 3)
    own += (base - own).mean(axis=0)
    found = equivalent(counts, base, own, 10)
    assert (found.low, found.high) == (-math.inf, math.inf)


# ---- the next score ----


def test_a_score_that_lies_ahead_takes_what_the_curve_says() -> None:
    counts = (5, 10, 20, 40)
    found = needed(counts, almost(counts, rising), float(rising(80)))
    assert found.middle == pytest.approx(40, rel=0.05)
    assert 0 < found.low < 40 < found.high


def test_no_curve_is_followed_far() -> None:
    counts = (5, 10, 20, 40)
    found = needed(counts, almost(counts, rising), 0.99)
    assert found == Labels(math.inf, math.inf, math.inf)
    falls = needed(counts, almost(counts, lambda n: 0.9 - rising(n)), 0.6)
    assert (falls.middle, falls.high) == (math.inf, math.inf)


def test_no_score_is_above_one() -> None:
    counts = (5, 10, 20)
    assert predicted(counts, almost(counts, rising, 0.6), [80], LEVEL).max() <= 1.0


def test_seeds_that_differ_in_nothing_are_no_error() -> None:
    counts = (5, 10, 20)
    base = np.tile(rising(counts), (3, 1))
    assert equivalent(counts, base, base, 10).middle == 0
    assert np.isfinite(predicted(counts, base, [40])).all()


# ---- of a study ----

COUNTS = [5, 10, 20, 40]  # of which each scores ten points more than the one before, in `write_study`
ALIKE = (0.03, -0.03, 0.02, -0.02)
BETTER = (0.05, 0.051, 0.049, 0.05)


def sentence_of(folder: Path, gains: Any, **more: Any) -> str:
    return label_curve.sentence(results.read(write_study(folder, gains, **more)))


def over(counts: Sequence[int]) -> dict[str, Any]:
    return {"axes": {"labels.count": list(counts)}}


def test_the_sentence_tells_what_an_arm_is_worth_and_the_next_score(tmp_path: Path) -> None:
    told = sentence_of(tmp_path, {"four": [BETTER] * 4}, **over(COUNTS))
    assert told.startswith("With 10 labelled images pretraining (four) is worth 5 more (95 % interval ")
    assert "; 65 % mIoU needs about " in told
    assert " more than 40 (95 % interval " in told


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        (ALIKE, "What pretraining (four) is worth with 10 labelled images cannot be told (95 % interval "),
        ([0.5 + own for own in BETTER], "is worth at least 30 more (95 % bound; no further was measured)"),
        ([-0.1 + own for own in BETTER], "With 10 labelled images pretraining (four) costs 3 (95 % interval "),
        ([-0.5 + own for own in BETTER], "pretraining (four) costs at least 5 (95 % bound"),
    ],
)
def test_a_null_result_a_loss_and_what_lies_beyond_are_told_as_such(
    tmp_path: Path, gains: Sequence[float], words: str
) -> None:
    assert words in sentence_of(tmp_path, {"four": [gains] * 4}, **over(COUNTS))


def test_what_no_curve_can_say_is_not_said(tmp_path: Path) -> None:
    two = sentence_of(tmp_path / "two", {"four": [BETTER] * 2}, **over((5, 10)))
    assert "With 5 labelled images pretraining (four) is worth " in two
    assert "mIoU" not in two, "two numbers of labels have no shape"
    loss = sentence_of(tmp_path / "loss", {"four": [[-own for own in BETTER]] * 2}, **over((5, 10)))
    assert loss == "What pretraining (four) costs with 5 labelled images cannot be told (fewer were not measured)."
    few = sentence_of(tmp_path / "few", {"four": [BETTER[:2]] * 4}, **over(COUNTS))
    assert few == "What labelled images are worth cannot be told: no two numbers of labels have 3 pairs each."
    assert sentence_of(tmp_path / "one", {"four": [BETTER]}, **over((5,))) == ""
    assert sentence_of(tmp_path / "steps", {"four": [BETTER] * 2}, axes={"train.steps": [5, 10]}) == ""


def test_of_several_arms_none_is_picked_out(tmp_path: Path) -> None:
    gains = {"good": [BETTER] * 4, "same": [ALIKE] * 4, "bad": [[-own for own in BETTER]] * 4}
    told = sentence_of(tmp_path / "three", gains, **over(COUNTS))
    assert told == (
        "In labelled images, of 3 comparisons with scratch an arm is worth some in 1, costs some in 1 and in 1 this "
        "cannot be told."
    )
    axes = {"labels.count": COUNTS, "train.steps": [400, 1400]}
    told = sentence_of(tmp_path / "steps", {"four": [BETTER] * 4}, axes=axes)
    assert "images under train.steps=400 pretraining (four) is worth 5 more" in told
    assert "images under train.steps=1400 pretraining (four) is worth 5 more" in told


def test_seeds_and_numbers_of_labels_that_miss_runs_are_left_out(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [(*BETTER, 0.3)] * 4}, **over(COUNTS))
    for name, place in (("four-1-0-4", 1), *((f"scratch-3-0-{seed}", 3) for seed in range(3))):
        change(tmp_path, name, status="failed")
        assert place < len(COUNTS)
    (worth,) = label_curve.worths(results.read(tmp_path))
    assert worth.counts == (5, 10, 20), "with 40 labels two pairs are left"
    assert worth.own - worth.base == pytest.approx(np.array([BETTER] * 3).T), "one seed is not complete"


def test_runs_of_one_pretraining_count_by_their_mean(tmp_path: Path) -> None:
    gains = (0.04, 0.06, 0.05, 0.08, 0.02, 0.05)
    write_study(tmp_path, {"four": [gains] * 4}, pretrainings=3, **over(COUNTS))
    found = results.read(tmp_path)
    (worth,) = label_curve.worths(found)
    for count, gain in zip(COUNTS, found.gains, strict=True):
        own = (worth.own - worth.base)[:, worth.counts.index(count)]
        assert own == pytest.approx(gain.independent)
        assert len(own) == 3


def test_the_table_has_what_was_measured_and_what_lies_ahead(tmp_path: Path) -> None:
    found = results.read(write_study(tmp_path, {"four": [BETTER] * 4}, **over(COUNTS)))
    results.write_tables(found)
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert [(row["arm"], int(row["labels.count"]), int(row["predicted"])) for row in rows] == [
        (arm, count, int(count > 40)) for arm in ("scratch", "four") for count in (*COUNTS, 80, 160)
    ]
    own = rows[7]
    worth = label_curve.worths(found)[0].at(10)
    assert [float(own[name]) for name in ("worth", "worth_low", "worth_high")] == [worth.middle, worth.low, worth.high]
    assert float(own["score"]) == pytest.approx(0.35 + 0.015 + np.mean(BETTER))
    assert rows[1]["worth"] == "", "the baseline itself"
    assert float(rows[9]["worth"]) == math.inf
    assert float(rows[9]["next_score"]) == pytest.approx(0.65)
    results.write_tables(results.read(write_study(tmp_path / "none", {"four": [BETTER]}, **over((5,)))))
    assert not (tmp_path / "none" / "labels.csv").exists()

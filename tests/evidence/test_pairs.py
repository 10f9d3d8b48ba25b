"""Pairs of runs, against figures made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_seg.evidence.pairs import (
    Changed,
    Pairs,
    Shared,
    Spread,
    independent,
    of_differences,
    of_starts,
    over_starts,
    software_in_words,
)
from ssl_seg.evidence.statistics import block_bootstrap
from ssl_seg.reports.changed import pictures_of
from ssl_seg.runs.folder import RunFolder
from ssl_seg.scores import IMAGES_FILE, ImageConfusions, image_confusion_bytes
from tests.test_scores import drawn, of_matrices

MIOU = "val/miou"


@dataclass(frozen=True)
class Run:
    scores: Mapping[str, float]
    folder: Path | None = None
    software: Mapping[str, str] = field(default_factory=dict)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_spread_is_that_of_the_standard_library(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert spread.mean == mean(values)
    assert spread.n == len(values)
    assert spread.sd == (stdev(values) if len(values) > 1 else None)


def test_spread_in_words() -> None:
    assert Spread((0.25,)).text() == "0.2500"
    assert Spread((0.2, 0.4)).text(2) == "0.30 ± 0.14"
    assert Spread((0.2, 0.4)).text(1, "+") == "+0.3 ± 0.1"


def test_pairs_with_a_pretraining_each_are_independent() -> None:
    gain = of_starts([0.1, 0.2, 0.4], ["a", "b", "c"])
    assert not isinstance(gain, Shared)
    assert over_starts(gain) is None
    assert independent(gain) == (0.1, 0.2, 0.4)


def test_of_shared_pretrainings_the_means_are_independent() -> None:
    gain = of_starts([1.0, 2.0, 4.0, 5.0, 7.0, 9.0], ["a", "b", "c", "a", "b", "c"])
    assert independent(gain) == over_starts(gain) == (3.0, 4.5, 6.5)
    of_two = of_starts([1.0, 2.0, 4.0], ["a", "b", "a"])
    assert over_starts(of_two) is None, "two means say nothing"
    assert independent(of_two) == (1.0, 2.0, 4.0)


def crossed(*rows: Sequence[float]) -> Spread:
    """A row a choice of seeds, a column a pretraining."""
    return of_differences(
        (seed, f"p{start}", value) for seed, row in enumerate(rows) for start, value in enumerate(row)
    )


def test_where_each_seed_has_several_pretrainings_the_wider_interval_counts() -> None:
    of_two = crossed((1.0, 2.0), (2.0, 4.0), (3.0, 9.0))
    assert isinstance(of_two, Shared)
    assert of_two.is_of_few, "about these two alone"
    assert independent(of_two) == (1.5, 3.0, 6.0)
    pretrainings_differ = crossed((1.0, 5.0, 9.0), (2.0, 6.0, 10.0), (1.0, 5.0, 9.0))
    assert (
        independent(pretrainings_differ) == over_starts(pretrainings_differ) == pytest.approx((4 / 3, 16 / 3, 28 / 3))
    )
    seeds_differ = crossed((1.0, 2.0, 1.0), (5.0, 6.0, 5.0), (9.0, 10.0, 9.0))
    assert over_starts(seeds_differ) is None
    assert independent(seeds_differ) == pytest.approx((4 / 3, 16 / 3, 28 / 3))
    assert crossed((1.0, 5.0, 9.0)).n == 1, "one choice of seeds is one pair"


def test_which_interval_is_the_wider_is_asked_at_the_level_of_the_comparison() -> None:
    seeds, starts = (2.6, -2.6) * 4, (1.0, 0.0, -1.0)  # their standard errors differ by a factor of 1.7
    assert Shared(seeds, starts, crossed=True, level=0.95).units == starts, "t of 2 to t of 7 degrees: 4.30 to 2.36"
    assert Shared(seeds, starts, crossed=True, level=0.9).units == seeds, "2.92 to 1.89"


def test_a_run_made_again_changes_no_rule() -> None:
    once = [("s0", "a", 1.0), ("s1", "b", 4.0), ("s2", "c", 6.0)]
    assert of_differences([*once, ("s0", "a", 1.0)]) == Spread((1.0, 4.0, 6.0))
    shared = [(seed, "a", value) for seed, _, value in once]
    assert of_differences([*shared, ("s0", "a", 1.0)]) == of_differences(shared)
    assert of_differences(shared).num_starts == 1


def test_several_runs_of_a_key_count_by_their_mean() -> None:
    base = {0: [Run({MIOU: 0.2})], 1: [Run({MIOU: 0.3})]}
    own = {0: [Run({MIOU: 0.4}), Run({MIOU: 0.6}), Run({})], 1: [Run({"val/accuracy": 1.0})]}
    assert Pairs(base, own).gain(MIOU).values == pytest.approx((0.3,))
    assert Pairs(base, {}).gain(MIOU) is None
    assert Pairs(base, own).over_images(MIOU) is None, "known from a server alone, without a folder"
    assert Pairs(base, own).changed(MIOU) == ()


def stored(folder: Path, seed: int, count: int = 60) -> tuple[Run, ImageConfusions]:
    images = of_matrices(drawn(count, seed))
    folder.mkdir()
    (folder / IMAGES_FILE).write_bytes(image_confusion_bytes({"val": images}))
    return Run({MIOU: images.scores().miou}, folder), images


def test_images_are_those_of_the_runs_of_the_gain(tmp_path: Path) -> None:
    runs, images = zip(*(stored(tmp_path / str(seed), seed) for seed in range(5)), strict=True)
    pairs = Pairs({0: [runs[0]], 1: [runs[1]]}, {0: runs[2:4], 1: [runs[4]]}, level=0.9)
    weights = ([1, 1], [0.5, 0.5, 1])
    expected = block_bootstrap(images[:2], images[2:], resamples=500, level=0.9, weights=weights)
    assert pairs.over_images(MIOU, 500) == expected
    one, two, *others = (own.per_image_miou() for own in images)
    differences = np.stack([others[0] - one, others[1] - one, others[2] - two])
    wanted = np.average(differences, axis=0, weights=(1, 1, 2))
    changed = pairs.changed(MIOU)
    assert [own.difference for own in changed] == pytest.approx([wanted[own.index] for own in changed])
    assert [abs(own.difference) for own in changed] == sorted((abs(own.difference) for own in changed), reverse=True)
    assert pairs.changed(MIOU, most=3) == changed[:3]
    # The pair to look at is the most usual one.
    possible = [(runs[0], runs[2]), (runs[0], runs[3]), (runs[1], runs[4])]
    for own in changed:
        away = np.abs(differences[:, own.index] - own.difference)
        assert own.pair == possible[int(np.argmin(away))]


def test_images_count_as_their_runs_do_in_the_gain(tmp_path: Path) -> None:
    """Three pairs of one pretraining, and one of each of two others: the mean is over pretrainings."""
    runs, images = zip(*(stored(tmp_path / str(seed), seed) for seed in range(10)), strict=True)
    starts = dict(zip((run.folder for run in runs[5:]), "aaabc", strict=True))
    sides = ({key: [run] for key, run in enumerate(side)} for side in (runs[:5], runs[5:]))
    pairs = Pairs(*sides, lambda _, own: starts[own.folder])
    weights = [1 / 3, 1 / 3, 1 / 3, 1, 1]
    differences = [own.scores[MIOU] - base.scores[MIOU] for base, own in zip(runs[:5], runs[5:], strict=True)]
    assert pairs.gain(MIOU).mean == pytest.approx(np.average(differences, weights=weights))
    expected = block_bootstrap(images[:5], images[5:], resamples=500, weights=(weights, weights))
    found = pairs.over_images(MIOU, resamples=500)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_images_of_several_pairs_are_drawn_by_their_own_models_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"stage": "finetune", "config": {}}))
    runs = {name: Run({}, tmp_path / name) for name in "abcd"}
    first, second = (runs["a"], runs["b"]), (runs["c"], runs["d"])
    changed = [Changed(4, "four", 0.3, first), Changed(1, "one", -0.2, second), Changed(2, "two", 0.1, first)]
    drawn = []

    def draw(base: RunFolder, own: RunFolder, part: str, names: Sequence[str]) -> Iterator[str]:
        drawn.append((base.name, own.name, part, tuple(names)))
        yield from (f"{base.name}{own.name} {name}" for name in names)

    monkeypatch.setattr("ssl_seg.stages.panels.changed_pictures", draw)
    assert pictures_of(changed, "val") == ["ab four", "cd one", "ab two"]
    assert drawn == [("a", "b", "val", ("four", "two")), ("c", "d", "val", ("one",))]


def test_the_images_of_most_runs_count(tmp_path: Path) -> None:
    odd = [stored(tmp_path / f"odd{side}", side, count=61)[0] for side in (0, 1)]
    usual = [[stored(tmp_path / f"{side}{seed}", 10 * seed + side)[0] for side in (0, 1)] for seed in (1, 2)]
    base, own = zip(odd, *usual, strict=True)
    pairs = Pairs(*({seed: [run] for seed, run in enumerate(side)} for side in (base, own)))
    assert pairs.changed(MIOU)
    assert all([*image.pair] in usual for image in pairs.changed(MIOU))
    assert pairs.over_images(MIOU) is None, "one pair of the gain is missing"


def test_runs_of_other_images_are_left_out(tmp_path: Path) -> None:
    base, _ = stored(tmp_path / "base", 0)
    own, _ = stored(tmp_path / "own", 1, count=61)
    pairs = Pairs({0: [base]}, {0: [own]})
    assert pairs.gain(MIOU).n == 1
    assert pairs.over_images(MIOU) is None
    assert pairs.changed(MIOU) == ()


def test_other_software_of_a_pair_is_found_and_other_software_of_pairs_is_not() -> None:
    def run(torch: str, device: str) -> Run:
        return Run({MIOU: 0.5}, None, {"torch": torch, "device": device})

    pairs = Pairs(
        {0: [run("2.10", "cpu")], 1: [run("2.14", "cpu")], 2: [Run({MIOU: 0.5})]},
        {0: [run("2.10", "cpu"), run("2.10", "cuda")], 1: [run("2.14", "cpu")], 2: [run("2.13", "cpu")]},
    )
    assert pairs.other_software(MIOU) == {"device": ("cpu", "cuda")}
    assert software_in_words([pairs.other_software(MIOU), {"torch": ("2.13", "2.14")}]) == (
        "device cpu, cuda; torch 2.13, 2.14"
    )
    assert software_in_words([{}, {}]) == ""

"""Which images to label: the greedy choice against its definition, and what it is for."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_seg.data.selection import Coverage, choose, nearest, of_images, of_regions


def kinds(counts: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of several kinds far apart, `(N, 4)`, and the kind of each."""
    random = np.random.default_rng(seed)
    centres = 10 * np.eye(4)[: len(counts)]
    kind = np.repeat(np.arange(len(counts)), counts)
    return (centres[kind] + random.normal(0, 0.3, (len(kind), 4))).astype(np.float32), kind


def covered_by(parts: list[Coverage], indices: tuple[int, ...]) -> float:
    """The definition: what is covered by the best of the chosen, each part alike."""
    shares = [part.weight @ part.likeness[list(indices)].max(axis=0, initial=0.0) for part in parts]
    return float(np.mean(shares))


def test_every_kind_is_among_the_first_however_rare() -> None:
    features, kind = kinds((85, 10, 3, 2))
    choice = choose([of_images(features)], 4, (), ())
    assert sorted(kind[list(choice.indices)]) == [0, 1, 2, 3]


@given(seed=st.integers(0, 1000), count=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_gains_fall_add_up_and_are_within_a_factor_of_the_best_set(seed: int, count: int) -> None:
    """The bound of the greedy choice, 1 - 1/e of the best, is of Nemhauser, Wolsey and Fisher."""
    random = np.random.default_rng(seed)
    part = of_regions(random.normal(size=(8, 3, 4)).astype(np.float32))
    choice = choose([part], count, (), ())
    assert list(choice.gains) == sorted(choice.gains, reverse=True)
    assert sum(choice.gains) == pytest.approx(covered_by([part], choice.indices), abs=1e-6)
    best = max(covered_by([part], indices) for indices in combinations(range(8), count))
    assert (1 - 1 / np.e) * best <= sum(choice.gains) + 1e-6 <= best + 2e-6


def test_fewer_are_the_first_of_more() -> None:
    features, _ = kinds((20, 10, 5))
    parts = [of_images(features)]
    assert choose(parts, 9, (), ()).indices[:4] == choose(parts, 4, (), ()).indices


def test_what_is_labelled_is_covered_and_what_is_left_out_is_never_chosen() -> None:
    features, kind = kinds((20, 20, 2))
    parts = [of_images(features)]
    labelled = np.flatnonzero(kind < 2)[::4].tolist()
    choice = choose(parts, 2, labelled, ())
    assert kind[choice.indices[0]] == 2
    assert choice.covered == pytest.approx(covered_by(parts, tuple(labelled)))
    assert 41 not in choose(parts, 41, (), [41]).indices
    assert len(choose(parts, 100, labelled, [41]).indices) == len(features) - len(labelled) - 1


def test_a_copy_adds_nothing() -> None:
    features, _ = kinds((6, 6))
    features[3] = features[2]
    choice = choose([of_images(features)], 12, (), ())
    order = list(choice.indices)
    assert choice.gains[max(order.index(2), order.index(3))] == pytest.approx(0, abs=1e-7)


def test_a_pool_of_one_image_and_one_of_copies() -> None:
    one = np.ones((1, 3), dtype=np.float32)
    assert choose([of_images(one), of_regions(one[:, None])], 5, (), ()).indices == (0,)
    alike = np.ones((4, 3), dtype=np.float32)
    assert len(choose([of_images(alike), of_regions(alike[:, None])], 3, (), ()).indices) == 3


def test_many_images_are_summed_up_by_their_appearances() -> None:
    features, kind = kinds((900, 400, 9))
    part = of_images(features)
    assert part.likeness.shape[1] <= 1000 < len(features)
    assert part.weight.sum() == pytest.approx(1)
    assert set(kind[list(choose([part], 3, (), ()).indices)]) == {0, 1, 2}


def test_nearest_is_the_most_alike() -> None:
    features, kind = kinds((5, 5))
    assert nearest(features, features[[0, 9]]).tolist() == kind.tolist()

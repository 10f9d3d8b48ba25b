"""Folds of labelled images: a cut of all of them, groups whole, classes and sizes even, by names and seed alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from ssl_seg.config import load
from ssl_seg.data.splits import Labels, cut_into_folds, names_of, spread_groups
from ssl_seg.datasets import Dataset, Example
from tests.faults import message_of


class Listed(Dataset):
    """Images by their names, each with the sequence and the classes that it is given."""

    listed: tuple[str, ...]
    sequences: tuple[str, ...] = ()
    shown: tuple[tuple[int, ...], ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.listed)

    def read(self, index: int) -> Example:
        ids = self.shown[index] if self.shown else (0,)
        label = np.array([ids], dtype=np.uint8)
        return Example(np.zeros((*label.shape, 3), dtype=np.uint8), label, self.name(index))

    def name(self, index: int) -> str:
        return self.listed[index]

    def sequence(self, index: int) -> str:
        return self.sequences[index] if self.sequences else ""


def words(count: int) -> tuple[str, ...]:
    """Names without a number."""
    return tuple(
        "abcdefghijklmnopqrstuvwxyz"[index // 26] + "abcdefghijklmnopqrstuvwxyz"[index % 26] for index in range(count)
    )


def singles(number: int) -> list[list[int]]:
    return [[index] for index in range(number)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=14),
    st.integers(2, 6),
    st.integers(-3, 9),
    st.randoms(use_true_random=False),
)
def test_a_cut_holds_each_image_once_and_groups_whole(sizes: list[int], count: int, seed: int, random: Any) -> None:
    count = min(count, len(sizes))
    ends = np.cumsum(sizes).tolist()
    groups = [[*range(end - size, end)] for end, size in zip(ends, sizes, strict=True)]
    shown = [{random.randrange(3) for _ in range(random.randrange(4))} for _ in range(ends[-1])]
    cut = spread_groups(groups, shown, count, seed)
    assert len(cut) == count
    assert all(cut)
    assert sorted(index for own in cut for index in own) == [*range(ends[-1])]
    assert all(sum(bool({*own} & {*group}) for own in cut) == 1 for group in groups)
    assert cut == spread_groups(groups, shown, count, seed)
    blind = spread_groups(groups, [set()] * ends[-1], count, seed)
    named = np.repeat(np.arange(len(sizes)), sizes)
    theirs = [len(held) for _, held in GroupKFold(count).split(named, groups=named)]
    assert max(map(len, blind)) <= max(theirs) + 1, "scikit-learn's, whose folds have no quota of a whole image"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=60), st.integers(2, 5), st.integers(0, 9))
def test_single_images_of_one_class_each_are_stratified_as_by_scikit_learn(
    classes: list[int], count: int, seed: int
) -> None:
    cut = spread_groups(singles(len(classes)), [{own} for own in classes], count, seed)
    sizes = [len(own) for own in cut]
    assert max(sizes) - min(sizes) <= 1
    usual = np.array(classes)
    if min(Counter(classes).values()) < count:
        return  # it warns, and promises nothing
    theirs = [np.bincount(usual[held], minlength=3) for _, held in StratifiedKFold(count).split(usual, usual)]
    ours = [np.bincount(usual[[*own]], minlength=3) for own in cut]
    spread = np.ptp(theirs, axis=0)
    assert (np.ptp(ours, axis=0) <= np.maximum(spread, 1) + 1).all()


def test_groups_of_classes_are_spread_about_as_well_as_by_scikit_learn() -> None:
    random = np.random.default_rng(5)
    ours, theirs = [], []
    for seed in range(20):
        sizes = random.integers(1, 6, 40)
        owners = np.repeat(np.arange(40), sizes)
        classes = random.choice(3, len(owners), p=[0.5, 0.3, 0.2])
        groups = [np.flatnonzero(owners == group).tolist() for group in range(40)]
        cut = spread_groups(groups, [{own} for own in classes.tolist()], 5, seed)
        other = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(owners, classes, owners)
        for found, held in ((ours, cut), (theirs, [own for _, own in other])):
            counts = np.array([np.bincount(classes[[*own]], minlength=3) for own in held])
            found.append(counts.std(axis=0).sum() + counts.sum(axis=1).std())
    assert np.mean(ours) <= 1.25 * np.mean(theirs)


def test_sequences_stay_whole_and_numbered_frames_in_one_stretch() -> None:
    drives = Listed(listed=tuple(f"{drive}/{name}" for drive in "abcd" for name in "xyz"), sequences=(*"aaabbbcccddd",))
    for own in cut_into_folds(drives, 4, seed=1):
        assert len({drives.sequence(index) for index in own}) == 1
    frames = Listed(listed=tuple(f"clip_{number:03d}" for number in range(11)))
    cut = cut_into_folds(frames, 3, seed=1)
    assert sorted(map(len, cut)) == [3, 4, 4]
    assert all(own == tuple(range(own[0], own[-1] + 1)) for own in cut)


def test_a_cut_is_one_of_names_and_seed() -> None:
    names = words(40)
    one, turned = Listed(listed=names), Listed(listed=names[::-1])
    of_names = [{one.name(index) for index in own} for own in cut_into_folds(one, 5, seed=2)]
    assert of_names == [{turned.name(index) for index in own} for own in cut_into_folds(turned, 5, seed=2)]
    assert of_names != [{one.name(index) for index in own} for own in cut_into_folds(one, 5, seed=3)]


def test_classes_are_spread_where_masks_may_be_read() -> None:
    rare = Listed(listed=words(20), shown=tuple((0, 2) if index < 5 else (0,) for index in range(20)))
    for seed in range(5):
        cut = cut_into_folds(rare, 5, seed)
        assert [sum(index < 5 for index in own) for own in cut] == [1] * 5
    blind = [Labels(folds=5, blind=True, seed=seed).cut(rare) for seed in range(5)]
    assert any(sum(index < 5 for index in own) != 1 for cut in blind for own in cut)


def test_each_fold_is_held_out_once_and_the_rest_is_learnt_from() -> None:
    images = Listed(listed=words(12))
    held = []
    for fold in range(4):
        rest, own = Labels(folds=4, fold=fold, seed=3).divide(images)
        assert {*names_of(rest)} | {*names_of(own)} == {*images.listed}
        assert not {*names_of(rest)} & {*names_of(own)}
        held += names_of(own)
    assert sorted(held) == sorted(images.listed)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"folds": 1}, "folds: 1 would leave nothing to learn from; give 2 or more"),
        ({"folds": 5, "fold": 5}, "fold: 5 is none of the 5 folds; write 0 to 4"),
        ({"fold": 0}, "fold: 0 of how many? Give folds too, or drop it"),
        ({"folds": 2, "fold": 0, "names": ["a"]}, "names and folds are both given; keep one of them"),
    ],
)
def test_what_is_no_cut_is_refused(values: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: load(Labels, values))


def test_more_folds_than_groups_and_no_fold_at_all_are_refused() -> None:
    drives = Listed(listed=("a/x", "a/y", "b/x", "c/x"), sequences=(*"aabc",))
    assert message_of(lambda: cut_into_folds(drives, 4, 0)) == (
        "labels.folds: 4 is more than the 3 groups of labelled images, each of which stays whole; write 3 or less"
    )
    assert "5 is more than the 3 labelled images; write 3 or less" in message_of(
        lambda: cut_into_folds(Listed(listed=words(3)), 5, 0)
    )
    assert "labels.fold does not say which of them is held out; write 0 to 2" in message_of(
        lambda: Labels(folds=3).divide(drives)
    )
    assert message_of(lambda: Labels(folds=2, fold=0, count=9).number(3, 1)).endswith(
        "write 3 or less, or cut more labels.folds"
    )

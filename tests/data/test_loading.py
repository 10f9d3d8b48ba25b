"""Draws, crops and label subsets are pure functions of the config, the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ssl_seg import rng
from ssl_seg.config import UserError, load
from ssl_seg.data.augment import Augment, Augmentation, Pair, region
from ssl_seg.data.loading import CenterCrops, Draws, Kept, Samples, Whole, check_batch_size, loader
from ssl_seg.data.splits import (
    Examples,
    Labels,
    Subset,
    covering_order,
    has_labelled_pixels,
    hold_out,
    manifest,
    pixel_counts,
    untrained_classes,
)
from ssl_seg.data.workers import Workers
from ssl_seg.datasets import Dataset, Example
from tests.faults import message_of
from tests.small import Textured


class Striped(Dataset):
    """Images whose pixels tell their index and place; image i shows classes 0 and 1 + i % 5, in sequences of four."""

    count: int = 12
    size: tuple[int, int] = (40, 60)
    broken: int | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("ground", "a", "b", "c", "d", "e")

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Example:
        if index == self.broken:
            raise UserError(f"{self.name(index)}: cannot be read; delete it")
        height, width = self.size
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([np.full(self.size, index), rows, columns], axis=-1).astype(np.uint8)
        label = np.zeros(self.size, dtype=np.uint8)
        label[:, width // 2 :] = 1 + index % 5
        return Example(image, label, self.name(index))

    def name(self, index: int) -> str:
        return f"striped_{index}"

    def sequence(self, index: int) -> str:
        return f"clip {index // 4}"


WORLDS = st.integers(1, 4)


@given(world=WORLDS, deal=st.integers(1, 3), accumulate=st.integers(1, 3), rounds=st.integers(1, 2))
def test_the_processes_share_each_step_without_overlap(world: int, deal: int, accumulate: int, rounds: int) -> None:
    size = world * deal * accumulate * rounds
    ranks = [list(Draws(size, 2, 5, rank, world, deal, accumulate)) for rank in range(world)]
    for step in range(3):
        micro = [batch for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]]
        assert sorted(draw for batch in micro for draw in batch) == list(range((step + 2) * size, (step + 3) * size))


@given(world=WORLDS, deal=st.integers(1, 3))
def test_a_task_sees_the_same_images_on_any_number_of_processes(world: int, deal: int) -> None:
    size = world * deal * 2

    def of_task(task: int, processes: int) -> list[int]:
        batches = [next(iter(Draws(size, 0, 1, rank, processes, deal))) for rank in range(processes)]
        return sorted(draw for batch in batches for draw in batch[task::deal])

    assert all(of_task(task, world) == of_task(task, 1) for task in range(deal))


@given(world=WORLDS, deal=st.integers(1, 3), accumulate=st.integers(1, 3), rounds=st.integers(1, 2))
def test_partners_stay_together_in_all_that_a_batch_is_dealt_to(
    world: int, deal: int, accumulate: int, rounds: int
) -> None:
    size = 2 * world * deal * accumulate * rounds
    ranks = [list(Draws(size, 1, 3, rank, world, deal, accumulate, at_once=2)) for rank in range(world)]
    assert sorted(draw for rank in ranks for batch in rank for draw in batch) == list(range(size, 3 * size))

    def of_task(task: int, batches: list[list[int]]) -> list[int]:
        return [draw for batch in batches for place, draw in enumerate(batch) if place // 2 % deal == task]

    alone = list(Draws(size, 1, 3, 0, 1, deal, accumulate, at_once=2))
    for task in range(deal):
        shares = [of_task(task, rank) for rank in ranks]
        for share in shares:
            assert [draw ^ 1 for draw in share[::2]] == share[1::2]
        assert sorted(draw for share in shares for draw in share) == sorted(of_task(task, alone))


def test_resuming_draws_gives_the_rest() -> None:
    assert list(Draws(6, 3, 7)) == list(Draws(6, 0, 7))[3:]


@pytest.mark.parametrize(
    ("size", "world", "deal", "accumulate", "nearest"),
    [(10, 4, 1, 1, "use 8 or 12"), (3, 2, 2, 1, "use 4"), (7, 1, 1, 2, "use 6 or 8"), (13, 2, 3, 1, "use 12 or 18")],
)
def test_a_batch_that_cannot_be_shared_names_the_nearest(
    size: int, world: int, deal: int, accumulate: int, nearest: str
) -> None:
    with pytest.raises(UserError, match=nearest):
        check_batch_size(size, world, deal, accumulate)


def test_a_pair_is_not_parted() -> None:
    check_batch_size(12, 3, 2, 1, at_once=2)
    with pytest.raises(UserError, match=r"6 cannot be divided by 2 processes x 2 images that are mixed; use 4 or 8$"):
        check_batch_size(6, 2, 1, 1, at_once=2)


def test_every_epoch_visits_every_image_once() -> None:
    samples = Samples(Striped(), Augment(crop=(16, 16)), seed=3)
    names = [samples[draw].name for draw in range(36)]
    for epoch in range(3):
        assert len(set(names[epoch * 12 : (epoch + 1) * 12])) == 12
    assert names[:12] != names[12:24]


def test_a_data_set_smaller_than_a_batch_is_repeated() -> None:
    samples = Samples(Striped(count=1), Augment(crop=(16, 16)), seed=3)
    assert {samples[draw].name for draw in range(5)} == {"striped_0"}


def test_samples_differ_between_draws_and_repeat_for_a_draw() -> None:
    samples = Samples(Striped(count=1), Augment(crop=(16, 16)), seed=3, with_labels=True)
    first, again, other = samples[0], samples[0], samples[1]
    np.testing.assert_array_equal(first.image, again.image)
    assert first.key == again.key != other.key
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize(("room", "kept_ones"), [(0, 0), (11, 0), (12, 12), (20, 12)])
def test_examples_are_kept_where_all_fit_and_change_no_sample(room: int, kept_ones: int) -> None:
    striped = Striped()
    reads = []

    class Counted(Subset):
        def read(self, index: int) -> Example:
            reads.append(index)
            return super().read(index)

    counted = Counted(striped, tuple(range(12)))
    # An image of 20 x 30 is 1,800 bytes, its mask 600.
    kept = Kept(most=2400 * room)
    options = {"augment": Augment(crop=(16, 16), jitter=0.2), "seed": 3, "resize": (20, 30), "with_labels": True}
    samples = Samples(counted, kept=kept, **options)
    for draw in range(36):
        fresh = Samples(striped, **options)[draw]
        np.testing.assert_array_equal(samples[draw].image, fresh.image)
        np.testing.assert_array_equal(samples[draw].label, fresh.label)
    reads.clear()
    for draw in range(36, 48):
        samples[draw]
    assert len(reads) == 12 - kept_ones
    assert kept.size == 2400 * kept_ones


class Grain(Augmentation):
    """A toy: one number is added to every pixel, and noted."""

    word = "grain"
    count = 3

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        assert len(drawn) == 3
        return image + np.uint8(1 + 9 * drawn[0]), label


class Grainy(Augment):
    """Today's augmentations with another one at `place` among them."""

    place: int = 0

    def augmentations(self) -> list[Augmentation]:
        chosen = super().augmentations()
        return [*chosen[: self.place], Grain(), *chosen[self.place :]]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_more_augmentation_changes_no_draw_of_the_others(place: int) -> None:
    """Wherever it stands: before the jitter, which rounds, and after what only moves pixels."""
    example, known = Striped().read(2), {"crop": (24, 24), "zoom": (0.5, 1.5)}
    added = set()
    for key in rng.fold_in(rng.as_key(5), torch.arange(8)):
        plain, label = Augment(**known).apply(example.image, example.label, key)
        grainy, same_label = Grainy(**known, place=place).apply(example.image, example.label, key)
        grain = int(1 + 9 * rng.uniform(rng.fold_in(key, "grain"), (3,))[0])
        np.testing.assert_array_equal(grainy[..., 0], plain[..., 0] + grain)  # the colour that is the same everywhere
        np.testing.assert_array_equal(same_label, label)
        added.add(grain)
    assert len(added) > 2


def test_the_augmentations_of_version_0_1_keep_their_six_numbers() -> None:
    """A single pixel a cell and no zoom: the crop's corner, the flip and the factors can be read off the pixels."""
    example, key = Striped().read(2), rng.as_key(11)
    _, up, left, flip, bright, contrast = rng.uniform(rng.fold_in(key, "augment"), (6,)).tolist()
    image, _ = Augment(crop=(8, 8), zoom=(1.0, 1.0)).apply(example.image, None, key)
    top, start = int(up * (40 - 8 + 1)), int(left * (60 - 8 + 1))
    window = example.image[top : top + 8, start : start + 8]
    expected = window[:, ::-1] if flip < 0.5 else window
    np.testing.assert_array_equal(image, expected)
    jittered, _ = Augment(crop=(8, 8), zoom=(1.0, 1.0), jitter=0.2).apply(example.image, None, key)
    factors = [1 + 0.2 * (2 * number - 1) for number in (bright, contrast)]
    exact = ((expected.astype(float) - expected.mean()) * factors[1] + expected.mean()) * factors[0]
    np.testing.assert_allclose(jittered, exact.clip(0, 255), atol=0.51)


@given(seed=st.integers(0, 10_000), low=st.floats(0.3, 1.0), high=st.floats(1.0, 3.0))
def test_image_and_mask_are_cropped_alike(seed: int, low: float, high: float) -> None:
    example = Striped().read(2)
    augment = Augment(crop=(24, 24), zoom=(low, high))
    image, label = augment.apply(example.image, example.label, rng.as_key(seed))
    assert image.shape == (24, 24, 3)
    assert label.shape == (24, 24)
    assert set(np.unique(label)) <= {0, 3}  # a mask is never interpolated
    # The blue channel is the column: right of the middle, and only there, the mask says 3. The two are resampled
    # differently, so the pixels at the border itself may disagree by one.
    columns = image[..., 2].astype(int)
    assert (label[columns > 32] == 3).all()
    assert (label[columns < 27] == 0).all()


def test_flips_are_even_and_can_be_switched_off() -> None:
    example = Striped().read(0)
    augment = Augment(crop=(40, 60), zoom=(1.0, 1.0))
    flipped = [augment.apply(example.image, None, rng.as_key(seed))[0][0, 0, 2] == 59 for seed in range(200)]
    assert 70 < sum(flipped) < 130
    never = augment.model_copy(update={"flip": False})
    assert all(never.apply(example.image, None, rng.as_key(seed))[0][0, 0, 2] == 0 for seed in range(20))


def test_a_crop_of_one_column_can_be_turned() -> None:
    """numpy calls it contiguous whatever its stride, and torch refuses a negative one."""
    example = Striped().read(0)
    augment = Augment(crop=(4, 1), zoom=(1.0, 1.0))
    for seed in range(20):
        torch.from_numpy(np.ascontiguousarray(augment.apply(example.image, None, rng.as_key(seed))[0]))


@pytest.mark.parametrize(
    ("zoom", "size", "said"),
    [
        ((0.5, 1.0), (100, 100), None),
        ((0.5, 1.0), (40, 40), "below 0.8 it is 0.8 for an image of 40 x 40"),
        ((0.1, 0.2), (40, 100), "all of [0.1, 0.2] is 0.8 for an image of 40 x 100"),
        ((1.0, 2.0), (32, 32), None),
    ],
)
def test_a_zoom_that_an_image_has_no_room_for_is_told(
    zoom: tuple[float, float], size: tuple[int, int], said: str | None
) -> None:
    augment = Augment(crop=(32, 32), zoom=zoom)
    told = augment.clamped(size)
    assert (told is None) == (said is None)
    assert said is None or said in str(told)
    assert region(size, augment.crop, zoom[0]) == region(size, augment.crop, max(zoom[0], 32 / min(size)))


@pytest.mark.parametrize("values", [{"crop": (10**6, 10**6)}, {"crop": (64, 64), "zoom": (1.0, 1e10)}])
def test_a_crop_that_no_image_has_is_refused(values: dict[str, tuple[float, float]]) -> None:
    assert "\n" not in message_of(lambda: load(Augment, values))


def test_jitter_makes_images_neither_brighter_nor_darker() -> None:
    image = np.arange(60, 180, dtype=np.uint8).reshape(10, 12, 1).repeat(3, axis=2)
    augment = Augment(crop=(10, 12), zoom=(1.0, 1.0), flip=False, jitter=0.1)
    drawn = [augment.apply(image, None, rng.as_key(seed))[0].astype(np.float64) for seed in range(3000)]
    # A change of brightness by up to a tenth has a mean with a standard error of 120 * 0.058 / 3000 ** 0.5 = 0.13.
    assert np.mean(drawn) == pytest.approx(image.mean(), abs=0.3)


def test_jitter_changes_colours_within_its_bounds() -> None:
    grey = np.full((20, 20, 3), 100, dtype=np.uint8)
    augment = Augment(crop=(20, 20), zoom=(1.0, 1.0), jitter=0.4)
    values = [int(augment.apply(grey, None, rng.as_key(seed))[0][0, 0, 0]) for seed in range(100)]
    assert 60 <= min(values) < 75
    assert 125 < max(values) <= 140


@given(height=st.integers(4, 300), width=st.integers(4, 300), crop=st.integers(4, 200), zoom=st.floats(0.1, 4.0))
def test_a_region_fits_its_image_and_keeps_the_crop_s_shape(height: int, width: int, crop: int, zoom: float) -> None:
    rows, columns = region((height, width), (crop, crop), zoom)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert abs(rows - columns) <= 1


def test_a_loader_gives_the_same_batches_with_and_without_workers() -> None:
    samples = Samples(Striped(), Augment(crop=(16, 16)), seed=3, with_labels=True)
    alone = list(loader(samples, Draws(4, 1, 4), Workers()))
    helped = list(loader(samples, Draws(4, 1, 4), Workers(2)))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.key, b.key)
        assert torch.equal(a.label, b.label)
        assert a.names == b.names
    assert alone[0].image.dtype == torch.uint8
    batch = alone[0].to(torch.device("cpu"))
    assert batch.image.dtype == torch.float32
    assert batch.image.max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_one_line_also_from_a_worker(workers: int) -> None:
    samples = Samples(Striped(broken=5), Augment(crop=(16, 16)), seed=3)
    with pytest.raises(UserError, match=r"\Astriped_5: cannot be read; delete it\Z"):
        list(loader(samples, Draws(4, 0, 3), Workers(workers)))


def test_whole_images_keep_the_mask_s_own_size() -> None:
    sample = Whole(Striped(), resize=(20, 30))[1]
    assert sample.image.shape == (20, 30, 3)
    assert sample.label.shape == (40, 60)


def test_validation_views_are_centre_crops_with_fixed_keys() -> None:
    views = CenterCrops(Striped(), Augment(crop=(16, 16)))
    np.testing.assert_array_equal(views[3].image, Striped().read(3).image[12:28, 22:38])
    assert views[3].key == views[3].key != views[4].key


def test_label_subsets_are_nested_and_cover_the_classes_early() -> None:
    names = [
        {subset.name(index) for index in range(len(subset))}
        for subset in (Labels(count=count, seed=5).choose(Striped()) for count in (1, 3, 5, 9, 12))
    ]
    assert [len(part) for part in names] == [1, 3, 5, 9, 12]
    assert all(small < large for small, large in pairwise(names))
    five = Labels(count=5, seed=5).choose(Striped())
    assert set().union(*(np.unique(five.read(index).label) for index in range(5))) == set(range(6))


def test_label_subsets_follow_their_seed() -> None:
    chosen = {Labels(count=3, seed=seed).choose(Striped()).indices for seed in range(8)}
    assert len(chosen) > 3
    assert Labels(fraction=0.25).choose(Striped()).indices == Labels(count=3).choose(Striped()).indices


def test_blind_labels_are_nested_drawn_by_the_seed_and_look_at_no_mask() -> None:
    names = [Labels(count=count, seed=3, blind=True).choose(Unmasked()).indices for count in (2, 5, 9)]
    assert [len(part) for part in names] == [2, 5, 9]
    assert names[2][:5] == names[1]
    assert names[1][:2] == names[0]
    assert len({Labels(count=3, seed=seed, blind=True).choose(Unmasked()).indices for seed in range(8)}) > 3


def test_of_named_labels_the_first_are_taken() -> None:
    names = ("striped_7", "striped_2", "striped_11")
    assert Labels(names=names).choose(Striped()).indices == (7, 2, 11)
    assert Labels(names=names, count=2).choose(Striped()).indices == (7, 2)
    with pytest.raises(UserError, match=r"^labels.count: 4 is more than the 3 labels.names; name more$"):
        Labels(names=names, count=4).choose(Striped())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"count": 2, "fraction": 0.5}, "count and fraction are both given"),
        ({"fraction": 0.5, "names": ("a",)}, "fraction and names are both given"),
        ({"names": ("a",), "blind": True}, "names and blind are both given"),
    ],
)
def test_labels_are_asked_for_in_one_way(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Labels(**keys)


class Unmasked(Striped):
    """One whose masks are missing, though it names classes."""

    def read(self, index: int) -> Example:
        return self.image(index)

    def image(self, index: int) -> Example:
        return replace(super().read(index), label=None)


@pytest.mark.parametrize("use", [Labels(count=3).choose, pixel_counts])
def test_a_missing_mask_is_one_line_with_the_image_s_name(use: Callable[[Examples], object]) -> None:
    with pytest.raises(UserError, match=r"^striped_0: has no mask.*$"):
        use(Unmasked())


def test_more_labels_than_there_are_is_one_line() -> None:
    with pytest.raises(UserError, match=r"labels.count: 13 is more than the 12"):
        Labels(count=13).choose(Striped())


@given(classes=st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_a_covering_order_is_an_order_and_greedy(classes: list[set[int]], seed: int) -> None:
    order = covering_order(classes, seed)
    assert sorted(order) == list(range(len(classes)))
    unseen = set().union(*classes)
    for place, index in enumerate(order):
        if not unseen:
            break
        assert len(classes[index] & unseen) == max(len(classes[other] & unseen) for other in order[place:])
        unseen -= classes[index]


def test_hold_out_keeps_sequences_whole() -> None:
    kept, held = hold_out(Striped(count=20))
    kept_clips = {kept.sequence(index) for index in range(len(kept))}
    held_clips = {held.sequence(index) for index in range(len(held))}
    assert not kept_clips & held_clips
    assert (len(kept), len(held)) == (16, 4)


def test_hold_out_of_a_single_sequence_takes_a_fifth() -> None:
    kept, held = hold_out(Striped(count=4))  # one clip
    assert (len(kept), len(held)) == (3, 1)
    assert set(kept.indices).isdisjoint(held.indices)


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ((90, 10), 10),
        ((10, 90), 10),
        ((30, 70), 30),
        ((50, 50), 20),
        ((100,), 20),
        ((1, 33, 33, 33), 34),
        ((2, 98), 20),
    ],
)
def test_hold_out_takes_about_a_fifth_of_uneven_sequences(sizes: tuple[int, ...], held: int) -> None:
    class Uneven(Striped):
        def sequence(self, index: int) -> str:
            return str(int(np.searchsorted(np.cumsum(sizes), index, side="right")))

    kept, val = hold_out(Uneven(count=100))
    assert (len(kept), len(val)) == (100 - held, held)


def called(name: Callable[[int], str]) -> type[Striped]:
    """The images under other names; those of one folder are a sequence."""

    class Called(Striped):
        def name(self, index: int) -> str:
            return name(index)

        def sequence(self, index: int) -> str:
            return name(index).rpartition("/")[0]

    return Called


def names_of(examples: Examples) -> list[str]:
    return sorted(examples.name(index) for index in range(len(examples)))


def test_hold_out_of_one_video_takes_its_end() -> None:
    kept, held = hold_out(called(lambda index: f"frame_{(7 * index) % 50:03d}")(count=50))
    assert names_of(held) == [f"frame_{number:03d}" for number in range(40, 50)]
    assert len(kept) == 40


@pytest.mark.parametrize("stray", [False, True])
@pytest.mark.parametrize("clips", [1, 2])
def test_hold_out_cuts_each_video_at_its_end(clips: int, stray: bool) -> None:
    videos = called(lambda index: "cover" if stray and index == 13 else f"clip{index % clips}/{index:03d}")
    kept, held = ([name for name in names_of(part) if name != "cover"] for part in hold_out(videos(count=40 + stray)))
    assert len(held) in (7, 8)
    for clip in range(clips):
        before, after = ([name for name in part if name.startswith(f"clip{clip}")] for part in (kept, held))
        assert before[-1] < after[0], "no frame that is trained on lies among those held out"


def test_hold_out_of_numbered_kinds_takes_some_of_each() -> None:
    _, held = hold_out(called(lambda index: f"{'ABCDEFGHIJ'[index // 10]}_{index % 10}")(count=100))
    assert names_of(held) == [f"{own}_{n}" for own in "ABCDEFGHIJ" for n in (8, 9)]


def test_crops_reach_the_borders_as_often_as_any_place() -> None:
    image = np.arange(12, dtype=np.uint8)[None, :, None].repeat(10, axis=0).repeat(3, axis=2)
    augment = Augment(crop=(10, 10), zoom=(1.0, 1.0), flip=False)
    starts = [int(augment.apply(image, None, rng.as_key(seed))[0][0, 0, 0]) for seed in range(1500)]
    counts = np.bincount(starts, minlength=3)
    assert len(counts) == 3
    assert abs(counts - 500).max() < 5 * np.sqrt(500)


def test_the_streams_of_one_seed_are_cropped_independently() -> None:
    pool, labelled = (Samples(Striped(count=1), Augment(crop=(16, 16)), 3, with_labels=flag) for flag in (False, True))
    assert pool[0].key != labelled[0].key
    assert pool[0].label is None


def test_a_manifest_tells_another_order_and_another_name() -> None:
    whole = manifest(Striped())
    assert whole == manifest(Striped())
    assert whole["images"] == 12
    assert manifest(Subset(Striped(), tuple(reversed(range(12))))) != whole
    assert manifest(Striped(count=11)) != whole


def test_pixels_are_counted_by_class_and_by_the_images_that_show_it() -> None:
    pixels, beside = pixel_counts(Subset(Striped(), (0, 1)))
    assert pixels.tolist() == [2 * 40 * 30, 40 * 30, 40 * 30, 0, 0, 0]
    assert beside.tolist() == [2 * 40 * 60, 40 * 60, 40 * 60, 0, 0, 0]


def test_classes_that_are_validated_but_not_trained_are_named() -> None:
    dataset = Striped()  # image i shows the ground and class 1 + i % 5
    trained, scored = Subset(dataset, (0, 1, 5)), Subset(dataset, (3, 6, 9))
    assert untrained_classes(trained, scored) == ("d", "e")
    assert untrained_classes(dataset, scored) == ()
    assert untrained_classes(trained, scored, count=1) == ("d",)  # of many, some are looked at


class Wrong(Striped):
    """With an id that is no class, which is told by whoever reads every mask that is scored."""

    def read(self, index: int) -> Example:
        example = super().read(index)
        example.label[0, 0] = 77
        return example


def test_ids_that_are_no_classes_are_not_taken_for_untrained_ones() -> None:
    assert untrained_classes(Striped(), Wrong()) == ()


class Ignored(Striped):
    """Of these only the last has a pixel that counts."""

    def read(self, index: int) -> Example:
        example = super().read(index)
        example.label[0 if index < self.count - 1 else 1 :] = 255
        return example


def test_one_labelled_pixel_is_enough_and_none_is_not() -> None:
    assert has_labelled_pixels(Ignored())
    assert not has_labelled_pixels(Subset(Ignored(), (0, 1, 2)))
    with pytest.raises(UserError, match="striped_0: has no mask"):
        has_labelled_pixels(Unmasked())


@pytest.mark.parametrize("share", [0.5, 0.25, 1 / 3, 0.9])
def test_draws_of_two_sets_have_their_shares_and_each_is_visited_as_it_were_alone(share: float) -> None:
    own, other = Textured(count=5), Textured(count=7, seed=1)
    both = Samples(own, Augment(), 3, beside=other, share=share)
    names = [both.name(draw) for draw in range(80)]
    drawn = [name.startswith("textured_1_") for name in names]
    for start in range(0, 60):
        for count in (4, 20):
            assert abs(sum(drawn[start : start + count]) - count * share) < 1
    alone = {True: Samples(other, Augment(), 3), False: Samples(own, Augment(), 3)}
    for is_beside, samples in alone.items():
        met = [name for name, of in zip(names, drawn, strict=True) if of == is_beside]
        assert met == [samples.name(turn) for turn in range(len(met))]
    if share == 0.5:
        assert drawn[:4] == [False, True, False, True], "partners are one of each"
    assert both[1].name == names[1]

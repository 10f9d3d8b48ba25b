"""Each augmentation moves mask and image alike, is a function of the key alone, and does what other libraries do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as oracle

from ssl_seg import rng
from ssl_seg.config import load
from ssl_seg.data.augment import (
    Augment,
    Augmentation,
    Blur,
    Crop,
    Hue,
    Noise,
    QuarterTurn,
    RareCrop,
    Rotate,
    Saturation,
    VerticalFlip,
    rare_pixel,
)
from ssl_seg.stages.pretrain import PretrainConfig
from tests.faults import message_of
from tests.small import pretraining

ALL = {
    "pad": True,
    "rare": 0.5,
    "rotate": 30.0,
    "vertical": True,
    "turns": True,
    "saturation": 0.5,
    "hue": 0.1,
    "blur": 1.5,
    "noise": 0.1,
}
MOVING = ("pad", "rare", "rotate", "vertical", "turns")


def colourful(height: int = 24, width: int = 24, seed: int = 0) -> np.ndarray:
    """Smooth colours, as oracles that round at other places agree on them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def told_apart(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Two halves, in which pixels and ids say the same: 40 and 200, 1 and 3."""
    label = np.ones((height, width), dtype=np.uint8)
    label[height // 3 :, width // 2 :] = 3
    return np.where(label == 3, 200, 40).astype(np.uint8)[..., None].repeat(3, axis=2), label


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def keys(count: int) -> torch.Tensor:
    return rng.fold_in(rng.as_key(3), torch.arange(count))


@pytest.mark.parametrize("number", [0.0, 0.2, 0.5, 0.9])
def test_hue_and_saturation_are_those_of_torchvision(number: float) -> None:
    image = colourful()
    found, _ = Hue(0.3).apply(image, None, [number])
    expected = oracle.adjust_hue(as_tensor(image), 0.3 * (2 * number - 1)).numpy().transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected).max() <= 2
    found, _ = Saturation(0.8).apply(image, None, [number])
    expected = oracle.adjust_saturation(as_tensor(image), 1 + 0.8 * (2 * number - 1)).numpy().transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_hue_and_saturation_leave_greys_and_saturation_0_makes_them() -> None:
    image, _ = told_apart()
    for augmentation in (Hue(0.5), Saturation(1.0)):
        np.testing.assert_array_equal(augmentation.apply(image, None, [0.9])[0], image)
    grey, _ = Saturation(1.0).apply(colourful(), None, [0.0])
    assert np.ptp(grey, axis=2).max() == 0


@pytest.mark.parametrize("number", [0.3, 0.7])
def test_blur_is_torchvision_s(number: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 40, 3)).astype(np.uint8)
    sigma = 2.0 * number
    found, _ = Blur(2.0).apply(image, None, [number])
    side = 2 * round(4 * sigma) + 1  # wide enough that what is beyond counts for nothing
    expected = oracle.gaussian_blur(as_tensor(image), [side, side], [sigma, sigma]).numpy().transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("number", [0.0, 0.5, 0.9])
def test_noise_has_the_deviation_that_is_drawn_and_no_pattern(number: float) -> None:
    image = np.full((200, 200, 3), 128, dtype=np.uint8)
    found, _ = Noise(0.1).apply(image, None, [number, 0.3])
    noise = found.astype(float) - 128
    rounding = 1 / 12 if number else 0
    assert noise.std() == pytest.approx(np.sqrt((25.5 * number) ** 2 + rounding), rel=0.01)
    assert abs(noise.mean()) < 0.2
    if number:
        correlation = np.corrcoef(noise.reshape(-1, 3), rowvar=False) - np.eye(3)
        assert np.abs(correlation).max() < 0.02
        other, _ = Noise(0.1).apply(image, None, [number, 0.4])
        assert abs(np.corrcoef(noise.ravel(), other.astype(float).ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("augmentation", [Hue(0.0), Saturation(0.0), Blur(0.0), Noise(0.0), Rotate(0.0)])
@given(number=st.floats(0, 1, exclude_max=True))
def test_strength_0_changes_nothing(augmentation: Augmentation, number: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (24, 30, 3)).astype(np.uint8)
    label = image[..., 0] % 5
    found, mask = augmentation.apply(image, label, [number] * augmentation.count)
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(mask, label)


def test_turns_are_numpy_s() -> None:
    image, label = colourful(), colourful(seed=1)[..., 0]
    for turns in range(4):
        found, mask = QuarterTurn().apply(image, label, [turns / 4])
        np.testing.assert_array_equal(found, np.rot90(image, turns))
        np.testing.assert_array_equal(mask, np.rot90(label, turns))
    found, mask = VerticalFlip().apply(image, label, [0.4])
    np.testing.assert_array_equal(found, np.flipud(image))
    np.testing.assert_array_equal(mask, np.flipud(label))
    assert VerticalFlip().apply(image, label, [0.6])[0] is image
    # A rotation by degrees goes the same way round.
    found, mask = Rotate(90.0).apply(image, label, [1.0])
    np.testing.assert_array_equal(found, np.rot90(image))
    np.testing.assert_array_equal(mask, np.rot90(label))


def test_all_eight_ways_to_lay_a_square_are_had_alike_often() -> None:
    image = colourful(4, 4)
    augment = Augment(crop=(4, 4), zoom=(1.0, 1.0), turns=True)
    seen = [augment.apply(image, None, key)[0].tobytes() for key in keys(800)]
    counts = [seen.count(way) for way in set(seen)]
    assert len(counts) == 8
    assert min(counts) > 60


def test_what_a_rotation_brings_in_from_beyond_is_a_reflection_and_does_not_count() -> None:
    image, label = told_apart()
    turned, mask = Rotate(30.0).apply(image, label, [1.0])
    assert set(np.unique(mask)) == {1, 3, 255}
    assert 0.1 < (mask == 255).mean() < 0.4
    assert turned[mask == 255].min() >= 40, "no black that no image has"
    image[...] = 77
    assert (Rotate(30.0).apply(image, None, [1.0])[0] == 77).all()


def test_an_image_too_long_to_be_turned_is_refused_in_one_line() -> None:
    long = np.zeros((1, 40_000, 3), dtype=np.uint8)
    assert "augment.rotate: an image of 1 x 40000" in message_of(lambda: Rotate(5.0).apply(long, None, [0.3]))


@given(
    seed=st.integers(0, 10_000),
    chosen=st.sets(st.sampled_from(MOVING)),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    low=st.floats(0.1, 2.0),
)
def test_mask_and_image_move_alike_and_no_new_id_appears(
    seed: int, chosen: set[str], height: int, width: int, low: float
) -> None:
    image, label = told_apart(height, width)
    augment = Augment(crop=(24, 24), zoom=(low, 2.0), **{name: ALL[name] for name in chosen})
    found, mask = augment.apply(image, label, rng.as_key(seed))
    assert mask is not None
    assert found.shape == (24, 24, 3)
    assert mask.shape == (24, 24)
    torch.from_numpy(np.ascontiguousarray(found))
    torch.from_numpy(np.ascontiguousarray(mask))
    assert set(np.unique(mask)) <= {*np.unique(label), 255}
    assert np.ptp(found, axis=2).max() == 0
    grey = found[..., 0]
    assert grey.min() >= 40
    assert grey.max() <= 200
    # Away from edges, where the two are resampled differently, a pixel says what its id says.
    inside = cv2.erode((mask != 255).astype(np.uint8), np.ones((3, 3)), borderValue=0) > 0
    flat = cv2.dilate(grey, np.ones((9, 9))) == cv2.erode(grey, np.ones((9, 9)))
    agree = grey == np.where(mask == 3, 200, 40)
    assert agree[inside & flat].all()


@pytest.mark.parametrize("name", ["hue", "saturation", "blur", "noise"])
def test_colours_change_and_masks_do_not(name: str) -> None:
    image, (_, label) = colourful(40, 60), told_apart()
    plain, same = Augment(crop=(24, 24)).apply(image, label, rng.as_key(1))
    found, mask = Augment(crop=(24, 24), **{name: ALL[name]}).apply(image, label, rng.as_key(1))
    np.testing.assert_array_equal(mask, same)
    assert not np.array_equal(found, plain)


def test_a_key_says_it_all_and_what_is_given_stays_as_it_is() -> None:
    image, (_, label) = colourful(40, 60), told_apart()
    before = image.copy(), label.copy()
    augment = Augment(crop=(32, 32), zoom=(0.3, 1.5), jitter=0.2, **ALL)
    again = Augment(crop=(32, 32), zoom=(0.3, 1.5), jitter=0.2, **ALL)
    different = set()
    for key in keys(20):
        found, mask = augment.apply(image, label, key)
        repeated, repeated_mask = again.apply(image, label, key)
        np.testing.assert_array_equal(found, repeated)
        np.testing.assert_array_equal(mask, repeated_mask)
        different.add(found.tobytes())
    assert len(different) == 20
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])


class Noting(Augment):
    """Notes what each augmentation draws."""

    def drawn(self, key: torch.Tensor) -> dict[str, Sequence[float]]:
        def draw(word: str, count: int) -> list[float]:
            return rng.uniform(rng.fold_in(key, word), (count,)).tolist()

        return {type(one).__name__: one.numbers(draw) for one in self.augmentations()}


@pytest.mark.parametrize("name", sorted(ALL))
def test_one_more_changes_no_draw_of_the_others(name: str) -> None:
    key = rng.as_key(8)
    everything = Noting(crop=(24, 24), jitter=0.2, **ALL).drawn(key)
    rest = Noting(crop=(24, 24), jitter=0.2, **{own: value for own, value in ALL.items() if own != name}).drawn(key)
    for own, numbers in rest.items():
        expected = everything["RareCrop"][:3] if own == "Crop" else everything[own]
        assert list(numbers) == list(expected)


def test_each_draws_under_a_word_of_its_own() -> None:
    words = [one.word for one in Augment(jitter=0.2, **ALL).augmentations()]
    assert words.count("augment") == 3, "the crop, the flip and the jitter of version 0.1"
    own = {word for word in words if word != "augment"}
    assert len(own) == len(words) - 3
    assert "rare" not in own


def test_none_is_on_by_default_or_told_where_it_is_off() -> None:
    plain = Augment()
    assert not any(getattr(plain, name) for name in ALL)
    assert set(plain.model_dump()) == {"crop", "zoom", "flip", "jitter"}
    assert set(Augment(**ALL).model_dump()) == {"crop", "zoom", "flip", "jitter", *ALL}
    assert load(Augment, Augment(hue=0.1).model_dump()) == Augment(hue=0.1)


# ---- padding ----


def test_padding_zooms_out_as_far_as_is_asked() -> None:
    image, label = told_apart(40, 60)
    clamped, _ = Augment(crop=(40, 40), zoom=(0.5, 0.5), flip=False).apply(image, label, rng.as_key(0))
    assert clamped.shape == (40, 40, 3)
    augment = Augment(crop=(40, 40), zoom=(0.5, 0.5), flip=False, pad=True)
    corners = set()
    for key in keys(30):
        found, mask = augment.apply(image, label, key)
        assert mask is not None
        rows, columns = np.nonzero(mask != 255)
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 30), "the whole image at half its size"
        corners.add((rows.min(), columns.min()))
        expected = cv2.copyMakeBorder(
            found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1],
            *(rows.min(), 39 - rows.max(), columns.min(), 39 - columns.max()),
            cv2.BORDER_REFLECT_101,
        )
        np.testing.assert_array_equal(found, expected)
    assert len(corners) > 15
    assert augment.clamped((40, 60)) is None
    assert "augment.pad=true" in str(Augment(crop=(40, 40), zoom=(0.5, 0.5)).clamped((40, 60)))


@given(seed=st.integers(0, 1000))
def test_padding_changes_no_crop_that_fits(seed: int) -> None:
    image, label = told_apart()
    for padded, plain in zip(
        Augment(crop=(16, 16), zoom=(0.4, 2.0), pad=True).apply(image, label, rng.as_key(seed)),
        Augment(crop=(16, 16), zoom=(0.4, 2.0)).apply(image, label, rng.as_key(seed)),
        strict=True,
    ):
        np.testing.assert_array_equal(padded, plain)


def test_a_region_far_larger_than_its_image_takes_no_more_memory() -> None:
    image, label = told_apart()
    found, mask = Crop((16, 16), (1e-6, 1e-6), pad=True).apply(image, label, [0.0, 0.5, 0.5])
    assert mask is not None
    assert found.shape == (16, 16, 3)
    assert (mask != 255).sum() == 1


def test_the_middle_of_a_small_image_is_padded_alike() -> None:
    image = colourful(20, 20)
    np.testing.assert_array_equal(Augment(crop=(40, 40), pad=True).center(image)[10:30, 10:30], image)
    assert np.abs(Augment(crop=(40, 40)).center(image)[10:30, 10:30].astype(int) - image).max() > 20


# ---- rare classes ----


def test_a_rare_pixel_is_drawn_by_the_root_of_how_many_there_are() -> None:
    label = np.zeros((30, 40), dtype=np.uint8)
    label[4, 5:9] = 7
    label[20:, :] = 255
    numbers = np.random.default_rng(0).random((4000, 2))
    pixels = [rare_pixel(label, *pair) for pair in numbers.tolist()]
    found = [int(label[pixel]) for pixel in pixels if pixel is not None]
    assert set(found) == {0, 7}
    expected = (1 / 4**0.5) / (1 / 4**0.5 + 1 / (800 - 4) ** 0.5)
    assert found.count(7) / 4000 == pytest.approx(expected, abs=0.02)
    assert {pixel for pixel in pixels if pixel is not None and label[pixel] == 7} == {(4, 5), (4, 6), (4, 7), (4, 8)}
    assert rare_pixel(np.full((3, 3), 255, dtype=np.uint8), 0.5, 0.5) is None


@pytest.mark.parametrize(("row", "column"), [(50, 70), (0, 0), (99, 149)])
def test_a_share_of_the_crops_holds_the_rare_class(row: int, column: int) -> None:
    image, label = told_apart(100, 150)
    label[:] = 0
    label[row, column] = 7
    options: dict[str, Any] = {"crop": (16, 16), "zoom": (1.0, 1.0)}
    plain, rare = Augment(**options), Augment(**options, rare=0.33)
    hits, others = 0, 0
    for key in keys(400):
        _, mask = rare.apply(image, label, key)
        usual = plain.apply(image, label, key)[1]
        assert mask is not None
        hits += bool((mask == 7).any())
        others += np.array_equal(mask, usual)
    assert 90 < hits < 180
    assert others > 400 * 0.6, "the rest is as without it"


def test_the_pixel_is_the_middle_of_the_crop_where_the_image_reaches() -> None:
    image, label = told_apart(100, 150)
    label[:] = 0
    label[50, 70] = 7
    crop = RareCrop((17, 17), (1.0, 1.0), share=1.0)
    _, mask = crop.apply(image, label, [0.0, 0.1, 0.1, 0.5, 0.99, 0.5])
    assert mask is not None
    assert np.argwhere(mask == 7).tolist() == [[8, 8]]


def test_rare_crops_need_a_mask() -> None:
    image, _ = told_apart()
    for key in keys(5):
        expected, _ = Augment(crop=(16, 16)).apply(image, None, key)
        np.testing.assert_array_equal(Augment(crop=(16, 16), rare=1.0).apply(image, None, key)[0], expected)
    values = {**pretraining(), "augment": {"crop": [64, 64], "rare": 0.33}}
    assert "augment: rare: looks for rare classes in masks" in message_of(lambda: load(PretrainConfig, values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"crop": (16, 32), "turns": True}, "turns: a quarter turn of a crop of [16, 32] has another shape"),
        ({"crop": (16, 16), "blur": 17.0}, "blur: 17 pixels leave nothing"),
        ({"hue": 0.6}, "hue: "),
        ({"rotate": -1.0}, "rotate: "),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: load(Augment, values))

"""How an image is varied before a batch takes it: place and zoom, flips and turns, colours, blur; one class for each.

Ours, because every draw is a function of the sample's key, so that a resumed run and any number of processes see the
same crops. torchvision's transforms draw from one generator in the order of calls. OpenCV does the pixels.

What lies beyond an image is its reflection, and 255 in the mask, so it is never learnt as a class. mmsegmentation and
DeepLab fill it with the mean colour. Here pretext tasks, which have no mask, look at it too, and a flat area with a
straight edge would be content of its own to them.

Another augmentation is another class here, with a word of its own, and a key of `Augment`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor

from ssl_seg import images, rng
from ssl_seg.config import Config, UserError, known_to_0_1
from ssl_seg.datasets.masks import IGNORE
from ssl_seg.images import Size, SizeField

Pair = tuple[np.ndarray, np.ndarray | None]  # an image (H, W, C) uint8 and its mask (H, W) uint8
Draw = Callable[[str, int], list[float]]  # so many numbers in [0, 1) under a word
# Keys that version 0.1 did not know.
SINCE_0_1 = ("pad", "rare", "rotate", "vertical", "turns", "saturation", "hue", "blur", "noise")
RGB = 3  # channels
BEYOND = cv2.BORDER_REFLECT_101  # what an image is continued by: itself, mirrored about its last pixel
MAX_TURNED = 32_766  # pixels of a side: OpenCV turns no longer ones


class Augmentation(ABC):
    """One way to vary an image, and its mask alike, by numbers in [0, 1) that are drawn from the sample's key.

    They are drawn under `word`, which belongs to one augmentation alone: so another one beside it, or none, changes no
    number. A word is part of what a seed means; it is never changed.
    """

    word: ClassVar[str]
    count: ClassVar[int] = 1  # of the numbers drawn under it
    taken: ClassVar[slice] = slice(None)  # those of them that `apply` gets

    def numbers(self, draw: Draw) -> Sequence[float]:
        """What `apply` gets."""
        return draw(self.word, self.count)[self.taken]

    @abstractmethod
    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        """Another image and mask in place of these, which are left as they are."""


class _SharedDraws(Augmentation):
    """Those of version 0.1 share a word and its six numbers."""

    word = "augment"
    count = 6


@dataclass(frozen=True)
class Crop(_SharedDraws):
    """A region of random size and place, brought to `size` (H, W).

    A region that does not fit the image is made smaller, or, with `pad`, holds what lies beyond it.
    """

    size: Size
    zoom: tuple[float, float]
    pad: bool = False
    taken = slice(0, 3)

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        zoom, up, left = drawn
        height, width = self.region(image, zoom)
        top = _place(up, image.shape[0] - height)
        start = _place(left, image.shape[1] - width)
        return cut(image, label, (top, start), (height, width), self.size)

    def region(self, image: np.ndarray, zoom: float) -> Size:
        """The size of the region, by a number in [0, 1)."""
        low, high = self.zoom
        return region(image.shape[:2], self.size, low * (high / low) ** zoom, self.pad)


@dataclass(frozen=True)
class RareCrop(Crop):
    """A crop of which a `share` is centred, as far as the image reaches, on a pixel of a class rare in its mask.

    A class is drawn with 1 / sqrt(its pixels), then one of these. The other crops are as without it, as are all those
    of images without a mask.
    """

    share: float = 0.0

    def numbers(self, draw: Draw) -> Sequence[float]:
        return [*super().numbers(draw), *draw("rare", 3)]

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        zoom, _, _, chosen, rarity, place = drawn
        middle = rare_pixel(label, rarity, place) if label is not None and chosen < self.share else None
        if middle is None:
            return super().apply(image, label, drawn[:3])
        height, width = self.region(image, zoom)
        top = _nearest(middle[0] - height // 2, image.shape[0] - height)
        start = _nearest(middle[1] - width // 2, image.shape[1] - width)
        return cut(image, label, (top, start), (height, width), self.size)


@dataclass(frozen=True)
class Rotate(Augmentation):
    """A turn about the middle by up to `degrees` either way, of the whole image: a crop of it shows what is around."""

    degrees: float
    word = "rotate"

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        height, width = image.shape[:2]
        if max(height, width) > MAX_TURNED:
            raise UserError(
                f"augment.rotate: an image of {height} x {width} is too long to be turned; give data.resize, or images "
                f"of at most {MAX_TURNED} pixels a side"
            )
        middle = ((width - 1) / 2, (height - 1) / 2)
        turn = cv2.getRotationMatrix2D(middle, self.degrees * (2 * drawn[0] - 1), 1.0)
        turned = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=BEYOND)
        if label is not None:
            label = cv2.warpAffine(label, turn, (width, height), flags=cv2.INTER_NEAREST, borderValue=[IGNORE])
        return images.with_channels(turned, image), label


class Flip(_SharedDraws):
    """Left and right change places, of every other image."""

    taken = slice(3, 4)

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        if drawn[0] >= 0.5 or image.shape[1] == 1:  # one column turned is itself, but with a stride that torch refuses
            return image, label
        return image[:, ::-1], None if label is None else label[:, ::-1]


class VerticalFlip(Augmentation):
    """Above and below change places, of every other image."""

    word = "vertical"

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        if drawn[0] >= 0.5 or image.shape[0] == 1:  # as for one column
            return image, label
        return image[::-1], None if label is None else label[::-1]


class QuarterTurn(Augmentation):
    """None to three quarter turns, all four alike often; for square crops."""

    word = "turns"

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        turns = int(4 * drawn[0])
        if image.shape[0] == 1:  # as for one column
            return image, label
        return np.rot90(image, turns), None if label is None else np.rot90(label, turns)


@dataclass(frozen=True)
class Jitter(_SharedDraws):
    """Brightness and contrast times factors in 1 -+ `strength`; contrast about the image's own mean."""

    strength: float
    taken = slice(4, 6)

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        brightness, contrast = (1 + self.strength * (2 * number - 1) for number in drawn)
        mean = float(image.mean())
        changed = ((image.astype(np.float32) - mean) * contrast + mean) * brightness
        return _pixels(changed), label


@dataclass(frozen=True)
class Saturation(Augmentation):
    """Distances of colours from their grey times a factor in 1 -+ `strength`."""

    strength: float
    word = "saturation"

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        factor = 1 + self.strength * (2 * drawn[0] - 1)
        exact = image.astype(np.float32)
        grey = cv2.cvtColor(exact, cv2.COLOR_RGB2GRAY)[..., None]
        return _pixels((exact - grey) * factor + grey), label


@dataclass(frozen=True)
class Hue(Augmentation):
    """Hues moved by up to `strength` of the circle either way; saturation and value of HSV stay."""

    strength: float
    word = "hue"

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        # As float32: from OpenCV's HSV of 8 bits hardly a colour comes back as it was.
        colours = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
        colours[..., 0] = (colours[..., 0] + 360 * self.strength * (2 * drawn[0] - 1)) % 360
        return _pixels(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)), label


@dataclass(frozen=True)
class Blur(Augmentation):
    """A Gaussian blur whose sigma is drawn from 0 to `sigma` pixels of the crop."""

    sigma: float
    word = "blur"

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        sigma = self.sigma * drawn[0]
        if sigma < 0.1:  # the nearest neighbour's share is below 2e-22; OpenCV takes 0 for a request to choose
            return image, label
        blurred = cv2.GaussianBlur(image, (0, 0), sigma, borderType=BEYOND)
        return images.with_channels(blurred, image), label


@dataclass(frozen=True)
class Noise(Augmentation):
    """Gaussian noise, of each pixel and channel by itself, whose deviation is drawn from 0 to `sigma` of the range."""

    sigma: float
    word = "noise"
    count = 2

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        strength, seed = drawn
        random = np.random.default_rng(int(seed * 2**32))
        noise = random.standard_normal(image.shape, dtype=np.float32)
        return _pixels(image + 255 * self.sigma * strength * noise), label


class Augment(Config):
    """Random crops of the training images; the same for image and mask."""

    crop: SizeField = (128, 128)  # (H, W) that the network sees
    # The range of the factor by which an image is scaled before the crop, drawn log-uniformly: 0.5 shows a region of
    # twice the crop's side. A region that does not fit is made smaller, so a small image is scaled up, never padded.
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    flip: bool = True  # left-right; scenes keep their sky above
    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)  # brightness and contrast factors in 1 -+ jitter
    # Those below are off, as in version 0.1: what helps depends on what must not matter in the images at hand.

    pad: bool = False  # a region that does not fit is filled up by reflection, 255 in the mask
    # The share of the crops that are centred on a pixel of a rare class; 0.33 is nnU-Net's. Of labelled images.
    rare: float = Field(default=0.0, ge=0.0, le=1.0)
    rotate: float = Field(default=0.0, ge=0.0, le=180.0)  # degrees, either way; beyond the image as for `pad`
    vertical: bool = False  # above and below change places, of every other image
    turns: bool = False  # quarter turns; with `flip` all eight ways to lay a square, as for what is seen from above
    saturation: float = Field(default=0.0, ge=0.0, le=1.0)  # factor in 1 -+ saturation
    hue: float = Field(default=0.0, ge=0.0, le=0.5)  # of the colour circle, either way
    blur: NonNegativeFloat = 0.0  # largest sigma, in pixels of the crop
    noise: float = Field(default=0.0, ge=0.0, le=1.0)  # largest sigma, as a share of black to white

    @model_validator(mode="after")
    def _in_order(self) -> Augment:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom: {list(self.zoom)} is empty; write the smaller factor first")
        if self.zoom[1] > max(self.crop):
            raise ValueError(f"zoom: {self.zoom[1]:g} shows less than a pixel in a crop of {list(self.crop)}; lower it")
        if self.turns and self.crop[0] != self.crop[1]:
            raise ValueError(
                f"turns: a quarter turn of a crop of {list(self.crop)} has another shape; give a square one"
            )
        if self.blur > max(self.crop):
            raise ValueError(f"blur: {self.blur:g} pixels leave nothing of a crop of {list(self.crop)}; lower it")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=SINCE_0_1)

    def augmentations(self) -> list[Augmentation]:
        """Those that are asked for, in the order in which they are applied."""
        known: list[tuple[object, Augmentation]] = [
            (self.rotate, Rotate(self.rotate)),
            (not self.rare, Crop(self.crop, self.zoom, self.pad)),
            (self.rare, RareCrop(self.crop, self.zoom, self.pad, self.rare)),
            (self.flip, Flip()),
            (self.vertical, VerticalFlip()),
            (self.turns, QuarterTurn()),
            (self.jitter, Jitter(self.jitter)),
            (self.saturation, Saturation(self.saturation)),
            (self.hue, Hue(self.hue)),
            (self.blur, Blur(self.blur)),
            (self.noise, Noise(self.noise)),
        ]
        return [augmentation for wanted, augmentation in known if wanted]

    def check_channels(self, count: int) -> None:
        """Raise UserError for what is about colours, where images of so many channels have none."""
        asked = next((key for key in ("saturation", "hue") if getattr(self, key)), None)
        if count != RGB and asked:
            raise UserError(
                f"augment.{asked}: is about the colours of RGB, and model.channels is {count}; drop it (jitter, blur "
                "and noise go with any channels)"
            )

    def clamped(self, size: Size) -> str | None:
        """What to know of the zoom where an image of `size` (H, W) has no region as large as it asks for."""
        least = max(self.crop[0] / size[0], self.crop[1] / size[1])
        if self.pad or self.zoom[0] >= least:
            return None
        whole = f"all of {list(self.zoom)} is" if self.zoom[1] <= least else f"below {least:.3g} it is"
        return (
            f"augment.zoom: {whole} {least:.3g} for an image of {size[0]} x {size[1]}, such as the first: with a crop "
            f"of {list(self.crop)} it has no larger region; augment.pad=true fills it up"
        )

    def apply(self, image: np.ndarray, label: np.ndarray | None, key: Tensor) -> Pair:
        """A crop of an image `(H, W, C)` and its mask `(H, W)`; a pure function of the key."""
        drawn: dict[str, list[float]] = {}  # once a word: a draw takes longer than many an augmentation

        def draw(word: str, count: int) -> list[float]:
            if word not in drawn:
                drawn[word] = rng.uniform(rng.fold_in(key, word), (count,)).tolist()
            return drawn[word]

        for augmentation in self.augmentations():
            image, label = augmentation.apply(image, label, augmentation.numbers(draw))
        return image, label

    def center(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image at zoom 1, `(crop_h, crop_w, C)`: what validation of the pretext tasks looks at."""
        height, width = region(image.shape[:2], self.crop, 1.0, self.pad)
        corner = ((image.shape[0] - height) // 2, (image.shape[1] - width) // 2)
        return cut(image, None, corner, (height, width), self.crop)[0]


def region(size: Size, crop: Size, zoom: float, pad: bool = False) -> Size:
    """The height and width that become `crop` when scaled by `zoom`, made smaller together until they fit `size`.

    With `pad` they need not fit.
    """
    fitting = zoom if pad else max(zoom, crop[0] / size[0], crop[1] / size[1])
    return max(1, round(crop[0] / fitting)), max(1, round(crop[1] / fitting))


def cut(image: np.ndarray, label: np.ndarray | None, corner: tuple[int, int], extent: Size, size: Size) -> Pair:
    """The region of `extent` (H, W) with its upper left pixel at `corner`, brought to `size` (H, W).

    What of it lies beyond the image is made after scaling, so it takes no more memory however large the region is.
    """
    sides = [_side(*along) for along in zip(corner, extent, image.shape, size, strict=False)]
    window = tuple(side.window for side in sides)
    inner = (sides[0].length, sides[1].length)
    top, bottom, left, right = (edge for side in sides for edge in (side.before, side.after))
    image = images.resize_image(image[window], inner)
    label = None if label is None else images.resize_mask(label[window], inner)
    if top or bottom or left or right:
        image = images.with_channels(cv2.copyMakeBorder(image, top, bottom, left, right, BEYOND), image)
        if label is not None:
            label = cv2.copyMakeBorder(label, top, bottom, left, right, cv2.BORDER_CONSTANT, value=[IGNORE])
    return image, label


def rare_pixel(label: np.ndarray, rarity: float, place: float) -> tuple[int, int] | None:
    """Row and column of a pixel of a mask `(H, W)` uint8, by two numbers in [0, 1); None where no pixel counts.

    The square root, because a class of three pixels would else be had nearly always.
    """
    pixels = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()[:IGNORE]
    kinds = np.flatnonzero(pixels)
    if not len(kinds):
        return None
    reached = np.cumsum(1 / np.sqrt(pixels[kinds].astype(np.float64)))
    kind = kinds[np.searchsorted(reached, rarity * reached[-1], side="right")]
    of_it = np.flatnonzero(label == kind)
    row, column = divmod(int(of_it[int(place * len(of_it))]), label.shape[1])
    return row, column


@dataclass(frozen=True)
class _Side:
    """Where one side of a region lies: in the image, and in the crop."""

    window: slice
    before: int
    length: int
    after: int


def _side(start: int, extent: int, available: int, size: int) -> _Side:
    first, last = max(start, 0), min(start + extent, available)
    length = min(size, max(1, round((last - first) * size / extent)))
    before = min(size - length, round((first - start) * size / extent))
    return _Side(slice(first, last), before, length, size - length - before)


def _place(number: float, room: int) -> int:
    """A start from 0 to `room`, by a number in [0, 1); where a region is longer than its image, from `room` to 0."""
    return int(number * (room + 1)) if room >= 0 else -int(number * (1 - room))


def _nearest(start: int, room: int) -> int:
    return min(max(start, min(0, room)), max(0, room))


def _pixels(exact: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(exact), 0, 255).astype(np.uint8)

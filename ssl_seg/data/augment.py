"""How an image is varied before a batch takes it: crop and zoom, flip, colour jitter; one class for each.

Ours, because every draw is a function of the sample's key, so that a resumed run and any number of processes see the
same crops. torchvision's transforms draw from one generator in the order of calls.

Another augmentation is another class here, with a word of its own, and a key of `Augment`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from ssl_seg import images, rng
from ssl_seg.config import Config
from ssl_seg.images import Size, SizeField

Pair = tuple[np.ndarray, np.ndarray | None]  # an image (H, W, 3) uint8 and its mask (H, W) uint8


class Augmentation(ABC):
    """One way to vary an image, and its mask alike, by numbers in [0, 1) that are drawn from the sample's key.

    They are drawn under `word`, which belongs to one augmentation alone: so another one beside it, or none, changes no
    number. A word is part of what a seed means; it is never changed.
    """

    word: ClassVar[str]
    count: ClassVar[int] = 1  # of the numbers drawn under it
    taken: ClassVar[slice] = slice(None)  # those of them that `apply` gets

    @abstractmethod
    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        """Another image and mask in place of these, which are left as they are."""


class _SharedDraws(Augmentation):
    """Those of version 0.1 share a word and its six numbers."""

    word = "augment"
    count = 6


@dataclass(frozen=True)
class Crop(_SharedDraws):
    """A region of random size and place, brought to `size` (H, W)."""

    size: Size
    zoom: tuple[float, float]
    taken = slice(0, 3)

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        zoom, up, left = drawn
        low, high = self.zoom
        height, width = region(image.shape[:2], self.size, low * (high / low) ** zoom)
        top = int(up * (image.shape[0] - height + 1))
        start = int(left * (image.shape[1] - width + 1))
        window = np.s_[top : top + height, start : start + width]
        image = images.resize_image(image[window], self.size)
        return image, None if label is None else images.resize_mask(label[window], self.size)


class Flip(_SharedDraws):
    """Left and right change places, of every other image."""

    taken = slice(3, 4)

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        if drawn[0] >= 0.5 or image.shape[1] == 1:  # one column turned is itself, but with a stride that torch refuses
            return image, label
        return image[:, ::-1], None if label is None else label[:, ::-1]


@dataclass(frozen=True)
class Jitter(_SharedDraws):
    """Brightness and contrast times factors in 1 -+ `strength`; contrast about the image's own mean."""

    strength: float
    taken = slice(4, 6)

    def apply(self, image: np.ndarray, label: np.ndarray | None, drawn: Sequence[float]) -> Pair:
        brightness, contrast = (1 + self.strength * (2 * number - 1) for number in drawn)
        mean = float(image.mean())
        changed = ((image.astype(np.float32) - mean) * contrast + mean) * brightness
        return np.clip(np.rint(changed), 0, 255).astype(np.uint8), label


class Augment(Config):
    """Random crops of the training images; the same for image and mask."""

    crop: SizeField = (128, 128)  # (H, W) that the network sees
    # The range of the factor by which an image is scaled before the crop, drawn log-uniformly: 0.5 shows a region of
    # twice the crop's side. A region that does not fit is made smaller, so a small image is scaled up, never padded.
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    flip: bool = True  # left-right; scenes keep their sky above
    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)  # brightness and contrast factors in 1 -+ jitter

    @model_validator(mode="after")
    def _in_order(self) -> Augment:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom: {list(self.zoom)} is empty; write the smaller factor first")
        if self.zoom[1] > max(self.crop):
            raise ValueError(f"zoom: {self.zoom[1]:g} shows less than a pixel in a crop of {list(self.crop)}; lower it")
        return self

    def augmentations(self) -> list[Augmentation]:
        """Those that are asked for, in the order in which they are applied."""
        chosen: list[Augmentation] = [Crop(self.crop, self.zoom)]
        if self.flip:
            chosen.append(Flip())
        if self.jitter:
            chosen.append(Jitter(self.jitter))
        return chosen

    def clamped(self, size: Size) -> str | None:
        """What to know of the zoom where an image of `size` (H, W) has no region as large as it asks for."""
        least = max(self.crop[0] / size[0], self.crop[1] / size[1])
        if self.zoom[0] >= least:
            return None
        whole = f"all of {list(self.zoom)} is" if self.zoom[1] <= least else f"below {least:.3g} it is"
        return (
            f"augment.zoom: {whole} {least:.3g} for an image of {size[0]} x {size[1]}, such as the first: with a crop "
            f"of {list(self.crop)} it has no larger region"
        )

    def apply(self, image: np.ndarray, label: np.ndarray | None, key: Tensor) -> Pair:
        """A crop of an image `(H, W, 3)` and its mask `(H, W)`; a pure function of the key."""
        drawn: dict[str, list[float]] = {}  # once a word: a draw takes longer than many an augmentation
        for augmentation in self.augmentations():
            word = augmentation.word
            if word not in drawn:
                drawn[word] = rng.uniform(rng.fold_in(key, word), (augmentation.count,)).tolist()
            image, label = augmentation.apply(image, label, drawn[word][augmentation.taken])
        return image, label

    def center(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image at zoom 1, `(crop_h, crop_w, 3)`: what validation of the pretext tasks looks at."""
        height, width = region(image.shape[:2], self.crop, 1.0)
        top = (image.shape[0] - height) // 2
        left = (image.shape[1] - width) // 2
        window = np.s_[top : top + height, left : left + width]
        return images.resize_image(image[window], self.crop)


def region(size: tuple[int, int], crop: tuple[int, int], zoom: float) -> tuple[int, int]:
    """The height and width that become `crop` when scaled by `zoom`, made smaller together until they fit `size`."""
    fitting = max(zoom, crop[0] / size[0], crop[1] / size[1])
    return max(1, round(crop[0] / fitting)), max(1, round(crop[1] / fitting))

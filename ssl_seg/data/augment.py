"""How an image is varied before a batch takes it: crop, zoom, flip and colour jitter.

Ours, because every draw is a function of the sample's key, so that a resumed run and any number of processes see the
same crops. torchvision's transforms draw from one generator in the order of calls.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ssl_seg import images, rng
from ssl_seg.config import Config


class Augment(Config):
    """Random crops of the training images; the same for image and mask."""

    crop: tuple[PositiveInt, PositiveInt] = (128, 128)  # (H, W) that the network sees
    # The range of the factor by which an image is scaled before the crop, drawn log-uniformly: 0.5 shows a region of
    # twice the crop's side. A region that does not fit is made smaller, so a small image is scaled up, never padded.
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    flip: bool = True  # left-right; scenes keep their sky above
    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)  # brightness and contrast factors in 1 -+ jitter

    @model_validator(mode="after")
    def _in_order(self) -> Augment:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom: {list(self.zoom)} is empty; write the smaller factor first")
        return self

    def apply(self, image: np.ndarray, label: np.ndarray | None, key: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """A crop of an image `(H, W, 3)` and its mask `(H, W)`; a pure function of the key."""
        zoom, up, left, flip, bright, contrast = rng.uniform(rng.fold_in(key, "augment"), (6,)).tolist()
        low, high = self.zoom
        height, width = region(image.shape[:2], self.crop, low * (high / low) ** zoom)
        top = int(up * (image.shape[0] - height + 1))
        start = int(left * (image.shape[1] - width + 1))
        window = np.s_[top : top + height, start : start + width]
        image = images.resize_image(image[window], self.crop)
        if label is not None:
            label = images.resize_mask(label[window], self.crop)
        if self.flip and flip < 0.5:
            image = image[:, ::-1]
            label = None if label is None else label[:, ::-1]
        if self.jitter:
            image = _jitter(image, 1 + self.jitter * (2 * bright - 1), 1 + self.jitter * (2 * contrast - 1))
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


def _jitter(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    mean = float(image.mean())
    changed = ((image.astype(np.float32) - mean) * contrast + mean) * brightness
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)

"""Images and masks at another size."""

from __future__ import annotations

import cv2
import numpy as np


def resize_image(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(H, W)` or `(H, W, C)` uint8 at another `size` (H, W): averaged where it shrinks, linear where it grows."""
    height, width = size
    small_height = min(height, array.shape[0])
    small_width = min(width, array.shape[1])
    small = cv2.resize(array, (small_width, small_height), interpolation=cv2.INTER_AREA)
    return with_channels(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), array)


def with_channels(made: np.ndarray, of: np.ndarray) -> np.ndarray:
    """What OpenCV has made of an image, with its axis of channels: OpenCV drops that of a single one."""
    return made[..., None] if made.ndim < of.ndim else made


def resize_mask(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(H, W)` ids at another `size` (H, W) by the nearest pixel; no new id appears."""
    height, width = size
    # Not INTER_NEAREST: that one takes corners for centres and shifts the mask against its image by half a pixel.
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)

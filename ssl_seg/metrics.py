"""Figures that a person reads: pixels counted by truth and prediction, and how close a picture came.

The matrix is ours, a few lines around `bincount` that refuse ids without a class; `scores` has what follows from it.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_seg.losses import IGNORE_INDEX, regression
from ssl_seg.scores import BAND_WIDTH, SegmentationScores

# 10 log10 of a squared error under 1e-10 (a hundredth of a thousandth of the range) says nothing more, and one
# infinite value would spoil the mean over a data set.
MAX_PSNR = 100.0
KINDS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
MOST_ROWS = 256  # of the table that is counted into: an ignored id beyond is left out beforehand


class ConfusionMatrix:
    """Pixel counts `(K, K)`, [truth, prediction], int64 on the CPU; those of several images add up."""

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, truth: Tensor | np.ndarray, prediction: Tensor | np.ndarray) -> None:
        """Count class ids of two equal shapes. Raises ValueError for ids outside [0, K) at pixels that count."""
        truth = _whole(torch.as_tensor(truth))
        prediction = _whole(torch.as_tensor(prediction)).to(truth.device)
        if truth.shape != prediction.shape:
            raise ValueError(f"truth is {tuple(truth.shape)} but prediction is {tuple(prediction.shape)}")
        if truth.numel() == 0:
            return
        has_row = self.ignore_index < MOST_ROWS
        rows = max(self.num_classes, self.ignore_index + 1) if has_row else self.num_classes
        if not (_within(truth, rows) and _within(prediction, self.num_classes)):
            truth, prediction = self._counted(truth, prediction)
        if rows <= MOST_ROWS:  # bytes take an eighth of the memory's time
            truth, prediction = truth.byte(), prediction.byte()
        # Ignored pixels are counted like any other and their row is dropped: to pick the others takes 20 times as long.
        pairs = truth.to(torch.int32, copy=True).mul_(self.num_classes).add_(prediction)
        counts = torch.bincount(pairs.flatten(), minlength=rows * self.num_classes).view(rows, self.num_classes).cpu()
        if 0 <= self.ignore_index < rows:
            counts[self.ignore_index] = 0
        if counts[self.num_classes :].any():
            raise self._no_class("truth", self.num_classes + int(counts[self.num_classes :].any(dim=1).nonzero()[0]))
        self.counts += counts[: self.num_classes]

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("two confusion matrices add up only with the same classes and the same ignore_index")
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.counts = self.counts + other.counts
        return total

    def scores(self) -> SegmentationScores:
        return SegmentationScores.from_confusion(self.counts)

    def _counted(self, truth: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels that count alone. Raises ValueError where they hold other ids than the classes'."""
        counted = truth != self.ignore_index
        truth, prediction = truth[counted], prediction[counted]
        for what, ids in (("truth", truth), ("prediction", prediction)):
            if not _within(ids, self.num_classes):
                least, most = (int(end) for end in ids.aminmax())
                raise self._no_class(what, least if least < 0 else most)
        return truth, prediction

    def _no_class(self, what: str, class_id: int) -> ValueError:
        return ValueError(f"{what} holds class id {class_id}, but there are {self.num_classes} classes")


def _whole(ids: Tensor) -> Tensor:
    """As integers of a kind that torch can compare: of unsigned ones it knows bytes alone."""
    return ids if ids.dtype in KINDS else ids.long()


def _within(ids: Tensor, count: int) -> bool:
    """Whether all ids are in [0, count)."""
    if ids.numel() == 0 or (ids.dtype == torch.uint8 and count > 255):
        return True
    least, most = ids.aminmax()
    return int(least) >= 0 and int(most) < count


def near_boundaries(label: np.ndarray) -> np.ndarray:
    """Where a class boundary is near: bool `(H, W)` of class ids `(H, W)` uint8.

    True for a pixel that counts (is not 255) with one of another class at most `BAND_WIDTH` of the diagonal away, at
    least 1 pixel, in rows or columns, whichever is more: the trimap of Kohli et al. (IJCV 2009), for any number of
    classes. Ignored pixels are no class, so where only they adjoin there is no boundary; but a thin ignored line
    between two classes, as Pascal VOC draws it, does not hide theirs. The border of the image is none either.
    """
    reach = max(1, round(BAND_WIDTH * float(np.hypot(*label.shape))))
    window = np.ones((2 * reach + 1, 2 * reach + 1), dtype=np.uint8)
    counted = label != IGNORE_INDEX
    # 255 is never a minimum and 0 never a maximum, so neither takes part where the pixel itself counts.
    least = cv2.erode(label, window)
    most = cv2.dilate(np.where(counted, label, 0).astype(np.uint8), window)
    return counted & ((least != label) | (most != label))


def psnr(prediction: Tensor, target: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio `(B,)` in dB of `(B, C, H, W)` with peak 1, at most 100; nan where no pixel counts.

    `loss_mask` `(B, 1, H, W)` weights the pixels.
    """
    error = regression("mse", prediction, target, loss_mask)
    decibel = -10.0 * torch.log10(error.clamp(min=10.0 ** (-MAX_PSNR / 10.0)))
    return _or_nan(decibel, loss_mask)


def mae(prediction: Tensor, target: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean absolute error `(B,)` of `(B, C, H, W)` in units of the range; nan where no pixel counts."""
    return _or_nan(regression("l1", prediction, target, loss_mask), loss_mask)


def _or_nan(values: Tensor, loss_mask: Tensor | None) -> Tensor:
    if loss_mask is None:
        return values
    return torch.where(loss_mask.flatten(1).any(dim=1), values, torch.nan)

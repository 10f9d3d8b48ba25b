"""Figures that a person reads: segmentation scores from one summed confusion matrix, and how close a picture came.

The matrix is ours, a few lines around `bincount`: torchmetrics scores an absent class 0 and smp scores it 1, and both
enter the mean; here it is nan and left out. Whole data sets are summed before anything is divided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ssl_seg.losses import IGNORE_INDEX, regression

# 10 log10 of a squared error under 1e-10 (a hundredth of a thousandth of the range) says nothing more, and one
# infinite value would spoil the mean over a data set.
MAX_PSNR = 100.0


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """Everything that follows from a confusion matrix; shares in [0, 1], nan where there is nothing to divide by."""

    confusion: np.ndarray  # (K, K) int64 pixels, [truth, prediction]
    iou: np.ndarray  # (K,) float64; nan for a class in neither truth nor prediction
    miou: float  # the mean over classes with union > 0: one that is predicted but absent counts 0
    accuracy: float  # share of the counted pixels that are right
    class_accuracy: np.ndarray  # (K,) float64, the recall; nan for a class that is absent in the truth
    dice: np.ndarray  # (K,) float64, also called F1; nan as for `iou`

    @classmethod
    def from_confusion(cls, counts: Tensor | np.ndarray) -> Self:
        confusion = np.asarray(torch.as_tensor(counts).cpu(), dtype=np.int64).copy()
        hits = confusion.diagonal()
        truth = confusion.sum(axis=1)
        predicted = confusion.sum(axis=0)
        union = truth + predicted - hits
        iou = _divide(hits, union)
        return cls(
            confusion=confusion,
            iou=iou,
            miou=float(_divide(np.nansum(iou), (union > 0).sum())),
            accuracy=float(_divide(hits.sum(), confusion.sum())),
            class_accuracy=_divide(hits, truth),
            dice=_divide(2 * hits, truth + predicted),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; nan is None, since JSON has none."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


class ConfusionMatrix:
    """Pixel counts `(K, K)`, [truth, prediction]. Processes sum their `counts`, int64 on the CPU, once at the end."""

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, truth: Tensor | np.ndarray, prediction: Tensor | np.ndarray) -> None:
        """Count class ids of two equal shapes. Raises ValueError for ids outside [0, K) at pixels that count."""
        truth = torch.as_tensor(truth).long()
        prediction = torch.as_tensor(prediction).to(truth.device).long()
        if truth.shape != prediction.shape:
            raise ValueError(f"truth is {tuple(truth.shape)} but prediction is {tuple(prediction.shape)}")
        counted = truth != self.ignore_index
        truth, prediction = truth[counted], prediction[counted]
        self._check_ids("truth", truth)
        self._check_ids("prediction", prediction)
        pairs = torch.bincount(truth * self.num_classes + prediction, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes).cpu()

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("two confusion matrices add up only with the same classes and the same ignore_index")
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.counts = self.counts + other.counts
        return total

    def scores(self) -> SegmentationScores:
        return SegmentationScores.from_confusion(self.counts)

    def _check_ids(self, what: str, ids: Tensor) -> None:
        wrong = ids[(ids < 0) | (ids >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"{what} holds class id {int(wrong[0])}, but there are {self.num_classes} classes")


def psnr(prediction: Tensor, target: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio `(B,)` in dB of `(B, C, H, W)` with peak 1, at most 100; nan where no pixel counts.

    `where` `(B, 1, H, W)` weights the pixels.
    """
    error = regression("mse", prediction, target, where)
    decibel = -10.0 * torch.log10(error.clamp(min=10.0 ** (-MAX_PSNR / 10.0)))
    return _or_nan(decibel, where)


def mae(prediction: Tensor, target: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean absolute error `(B,)` of `(B, C, H, W)` in units of the range; nan where no pixel counts."""
    return _or_nan(regression("l1", prediction, target, where), where)


def _or_nan(values: Tensor, where: Tensor | None) -> Tensor:
    if where is None:
        return values
    return torch.where(where.flatten(1).any(dim=1), values, torch.nan)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """float64; nan, without a warning, where the divisor is 0."""
    result = np.full(np.shape(below), np.nan)
    return np.divide(above, below, out=result, where=np.asarray(below) > 0)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value

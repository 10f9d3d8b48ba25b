"""Losses of one sample each: `(B,)`, the mean over the sample's counted pixels, 0 for a sample that has none.

Ours on top of torch's, because torch averages over the whole batch: then an image with few labelled pixels counts less
than its neighbour, cutting a batch over processes changes the result, and a batch with nothing to count gives NaN.
All are computed in float32 whatever the network ran in (float64 stays float64).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["mse", "l1", "charbonnier", "smooth_l1"]
IGNORE_INDEX = 255
# Lai et al., "Deep Laplacian pyramid networks", CVPR 2017, section 3.3: the penalty of Charbonnier et al. 1994 at 1e-3.
CHARBONNIER_EPSILON = 1e-3
# The tasks measure errors in the spread of what they predict; torch's 1.0 would make nearly all of them quadratic.
SMOOTH_L1_BETA = 0.1


def masked_mean(values: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """The mean of `(B, C, H, W)` per sample, `(B,)`, weighted by `loss_mask` `(B, 1, H, W)` >= 0; 0 if no pixel counts.

    What lies at a pixel of weight 0 has no influence, even if it is not finite.
    """
    values = _full_precision(values)
    if loss_mask is None:
        return values.flatten(1).mean(dim=1)
    loss_mask = loss_mask.to(values.dtype)
    counted = torch.where(loss_mask > 0, values, 0.0) * loss_mask
    total = loss_mask.flatten(1).sum(dim=1) * values.shape[1]
    return counted.flatten(1).sum(dim=1) / _or_one(total)


def regression(kind: Distance, prediction: Tensor, target: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """`(B,)`: how far `(B, C, H, W)` lies from its target, weighted by `loss_mask` `(B, 1, H, W)`.

    At a pixel of weight 0 neither has influence, on the loss or its gradient, even if it is not finite.
    """
    prediction = _full_precision(prediction)
    target = target.to(prediction.dtype)
    if loss_mask is not None:
        # Before the distance: behind it, the gradient of what is left out would be 0 times infinity.
        prediction = torch.where(loss_mask > 0, prediction, 0.0)
    if kind == "mse":
        distance = F.mse_loss(prediction, target, reduction="none")
    elif kind == "l1":
        distance = F.l1_loss(prediction, target, reduction="none")
    elif kind == "smooth_l1":
        distance = F.smooth_l1_loss(prediction, target, reduction="none", beta=SMOOTH_L1_BETA)
    elif kind == "charbonnier":
        distance = torch.sqrt((prediction - target) ** 2 + CHARBONNIER_EPSILON**2)
    else:
        raise ValueError(f"unknown distance {kind!r}")
    return masked_mean(distance, loss_mask)


def cross_entropy(
    logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX, weights: Tensor | None = None
) -> Tensor:
    """`(B,)` from logits `(B, K)`, `(B, K, N)` or `(B, K, H, W)` and int64 ids of the same shape without K.

    `weights` `(K,)` makes it the weighted mean over a sample's counted pixels, as torch's is over a batch's. A task
    with more than 255 classes passes another `ignore_index`. An id outside [0, K) makes its sample's loss NaN, on
    every device: a device-side assert would end the process without a word about the image, and the loop's guard
    against NaN names it.
    """
    logits = _full_precision(logits)
    counted, wrong = _counted(label, logits.shape[1], ignore_index)
    safe = torch.where(counted, label, 0)
    weights = None if weights is None else weights.to(logits)
    values = F.cross_entropy(logits, safe, weight=weights, reduction="none")
    share = counted.to(values.dtype)
    if weights is not None:
        share = share * weights[safe]
    # `values` carries the class weights already, so only the divisor needs them.
    total = torch.where(counted, values, 0.0).reshape(len(label), -1).sum(dim=1)
    loss = total / _or_one(share.reshape(len(label), -1).sum(dim=1))
    return torch.where(wrong, torch.nan, loss)


def dice(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Soft Dice loss `(B,)` in [0, 1] from logits `(B, K, ...)` and ids `(B, ...)`: the mean over the label's classes.

    Per class 1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) with softmax shares p and one-hot g: Milletari et al., "V-Net",
    3DV 2016, section 3. Absent classes are left out, for their score would be 0 whatever the network says. Ids outside
    [0, K) make the sample's loss NaN, as in `cross_entropy`.
    """
    logits = _full_precision(logits)
    num_classes = logits.shape[1]
    counted, wrong = _counted(label, num_classes, ignore_index)
    shares = logits.softmax(dim=1).flatten(2)  # (B, K, N)
    shares = shares * counted.flatten(1).unsqueeze(1)
    ids = torch.arange(num_classes, device=label.device).view(1, -1, 1)
    truth = (label.flatten(1).unsqueeze(1) == ids) & counted.flatten(1).unsqueeze(1)  # (B, K, N)
    overlap = (shares * truth).sum(dim=2)  # (B, K)
    area = (shares**2).sum(dim=2) + truth.sum(dim=2)
    present = truth.any(dim=2)
    per_class = torch.where(present, 1.0 - 2.0 * overlap / _or_one(area), 0.0)
    loss = per_class.sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return torch.where(wrong, torch.nan, loss)


def _counted(label: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which pixels count, and which samples `(B,)` hold an id that is neither a class nor ignored."""
    in_range = (label >= 0) & (label < num_classes)
    ignored = label == ignore_index
    wrong = ~(in_range | ignored)
    return in_range & ~ignored, wrong.reshape(len(label), -1).any(dim=1)


def _full_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _or_one(divisor: Tensor) -> Tensor:
    """The divisor, or 1 where it is 0: then the sum above it is 0 too."""
    return torch.where(divisor > 0, divisor, 1.0)

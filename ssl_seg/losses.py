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
    logits: Tensor,
    label: Tensor,
    ignore_index: int = IGNORE_INDEX,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    hardest: float = 1.0,
) -> Tensor:
    """`(B,)` from logits `(B, K)`, `(B, K, N)` or `(B, K, H, W)` and int64 ids of the same shape without K.

    `weights` `(K,)` makes it the weighted mean over a sample's counted pixels, as torch's is over a batch's.
    `smoothing` is the share of the answer that is spread over all classes (Szegedy et al. 2016, section 7). With
    `hardest` below 1 only that share of a sample's counted pixels counts, rounded and one at least: those whose own
    class is the least likely (online hard example mining, Shrivastava et al. 2016). A task with more than 255 classes
    passes another `ignore_index`. An id outside [0, K) makes its sample's loss NaN, on every device: a device-side
    assert would end the process without a word about the image, and the loop's guard against NaN names it.
    """
    logits = _full_precision(logits)
    counted, wrong = _counted(label, logits.shape[1], ignore_index)
    safe = torch.where(counted, label, 0)
    weights = None if weights is None else weights.to(logits)
    values = F.cross_entropy(logits, safe, weight=weights, reduction="none", label_smoothing=smoothing)
    if hardest < 1.0:
        counted = _hardest(F.cross_entropy(logits.detach(), safe, reduction="none"), counted, hardest)
    return torch.where(wrong, torch.nan, _weighted_mean(values, safe, counted, weights))


def focal(
    logits: Tensor,
    label: Tensor,
    ignore_index: int = IGNORE_INDEX,
    weights: Tensor | None = None,
    gamma: float = 2.0,
) -> Tensor:
    """`(B,)`, as `cross_entropy`, each pixel times (1 - p)^gamma of the softmax share p of its own class.

    Lin et al., "Focal loss for dense object detection", ICCV 2017, whose best gamma was 2, with softmax for their
    sigmoid; `weights` stands for their alpha. 0 is cross-entropy.
    """
    logits = _full_precision(logits)
    counted, wrong = _counted(label, logits.shape[1], ignore_index)
    safe = torch.where(counted, label, 0)
    weights = None if weights is None else weights.to(logits)
    entropy = F.cross_entropy(logits, safe, reduction="none")
    # 1 - p, exact for p near 1. At 0 a power below 1 has no slope; what is that sure has nothing to learn.
    missing = (-torch.expm1(-entropy)).clamp(min=torch.finfo(logits.dtype).eps)
    values = missing**gamma * entropy
    if weights is not None:
        values = values * weights[safe]
    return torch.where(wrong, torch.nan, _weighted_mean(values, safe, counted, weights))


def dice(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Soft Dice loss `(B,)` in [0, 1] from logits `(B, K, ...)` and ids `(B, ...)`: the mean over the label's classes.

    Per class 1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) with softmax shares p and one-hot g: Milletari et al., "V-Net",
    3DV 2016, section 3. Absent classes are left out, for their score would be 0 whatever the network says. Ids outside
    [0, K) make the sample's loss NaN, as in `cross_entropy`.
    """
    logits = _full_precision(logits)
    num_classes = logits.shape[1]
    counted, wrong = _counted(label, num_classes, ignore_index)
    shares, truth = _by_class(logits, label, counted)
    overlap = (shares * truth).sum(dim=2)  # (B, K)
    area = (shares**2).sum(dim=2) + truth.sum(dim=2)
    return torch.where(wrong, torch.nan, _mean_of_present(1.0 - 2.0 * overlap / _or_one(area), truth))


def tversky(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX, beta: float = 0.7) -> Tensor:
    """`(B,)` in [0, 1], as `dice`: per class 1 - TP / (TP + (1 - beta) FP + beta FN) of softmax shares.

    Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional deep networks", MLMI 2017:
    with `beta` above 0.5 a pixel that is missed costs more than one too many; 0.7 was their best. 0.5 is a Dice loss
    whose area is no sum of squares.
    """
    logits = _full_precision(logits)
    counted, wrong = _counted(label, logits.shape[1], ignore_index)
    shares, truth = _by_class(logits, label, counted)
    overlap = (shares * truth).sum(dim=2)  # (B, K)
    too_many = shares.sum(dim=2) - overlap
    missed = truth.sum(dim=2) - overlap
    area = overlap + (1.0 - beta) * too_many + beta * missed
    return torch.where(wrong, torch.nan, _mean_of_present(1.0 - overlap / _or_one(area), truth))


def lovasz(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Lovász-softmax `(B,)` in [0, 1] from logits `(B, K, ...)` and ids `(B, ...)`: the mean over the label's classes.

    The convex surrogate of 1 - IoU: Berman et al., "The Lovász-softmax loss", CVPR 2018, algorithm 1. Absent classes
    are left out, as theirs are. It sorts the pixels of every class.
    """
    logits = _full_precision(logits)
    counted, wrong = _counted(label, logits.shape[1], ignore_index)
    shares, truth = _by_class(logits, label, counted)
    errors = torch.where(truth, 1.0 - shares, shares)  # (B, K, N); 0 where a pixel does not count
    # Those that do not count come last, behind counted ones that are exactly right: they change no other's slope.
    counts = counted.flatten(1).unsqueeze(1).expand_as(errors)
    order = torch.where(counts, errors.detach(), -1.0).argsort(dim=2, descending=True)
    hit = truth.gather(2, order)
    miss = counts.gather(2, order) & ~hit
    area = truth.sum(dim=2, keepdim=True)
    union = (area + miss.cumsum(dim=2)).to(errors.dtype)
    distance = 1.0 - (area - hit.cumsum(dim=2)) / _or_one(union)  # of Jaccard, were all pixels up to here wrong
    slope = torch.diff(distance, dim=2, prepend=torch.zeros_like(distance[..., :1]))
    per_class = (errors.gather(2, order) * slope).sum(dim=2)
    return torch.where(wrong, torch.nan, _mean_of_present(per_class, truth))


def binary(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """`(B,)`, as `cross_entropy`: the mean over the classes of each one's own question, this class or the rest.

    Binary cross-entropy of the sigmoid of a class's logit. The classes do not compete for a share of 1, as they do in a
    softmax; the largest logit is the answer all the same.
    """
    outputs, truth, counted, wrong = _against_the_rest(logits, label, ignore_index)
    values = F.binary_cross_entropy_with_logits(outputs, truth, reduction="none").mean(dim=1)
    return torch.where(wrong, torch.nan, _weighted_mean(values, label, counted, None))


def smooth_l1(logits: Tensor, label: Tensor, ignore_index: int = IGNORE_INDEX, beta: float = 1.0) -> Tensor:
    """`(B,)`, as `binary`: the mean over the classes of how far the output itself lies from 1 (this class) or 0.

    Segmentation as a regression: Girshick, "Fast R-CNN", ICCV 2015, section 2.3, where `beta` is 1: below that the
    error is squared, above it counts by its size. Of the outputs as they are and not of softmax shares, since a share
    has no slope where the network is sure and wrong; and an output aims at 1, so the largest is still the answer.
    """
    outputs, truth, counted, wrong = _against_the_rest(logits, label, ignore_index)
    values = F.smooth_l1_loss(outputs, truth, reduction="none", beta=beta).mean(dim=1)
    return torch.where(wrong, torch.nan, _weighted_mean(values, label, counted, None))


def _counted(label: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which pixels count, and which samples `(B,)` hold an id that is neither a class nor ignored."""
    in_range = (label >= 0) & (label < num_classes)
    ignored = label == ignore_index
    wrong = ~(in_range | ignored)
    return in_range & ~ignored, wrong.reshape(len(label), -1).any(dim=1)


def _weighted_mean(values: Tensor, ids: Tensor, counted: Tensor, weights: Tensor | None) -> Tensor:
    """`(B,)`: the mean of what counts. `values` carry the class weights already, so only the divisor needs them."""
    share = counted.to(values.dtype)
    if weights is not None:
        share = share * weights[ids]
    total = torch.where(counted, values, 0.0).reshape(len(values), -1).sum(dim=1)
    return total / _or_one(share.reshape(len(values), -1).sum(dim=1))


def _hardest(values: Tensor, counted: Tensor, share: float) -> Tensor:
    """Which of the counted pixels are among the `share` of a sample's with the largest values, >= 0."""
    flat = counted.reshape(len(counted), -1)
    order = torch.where(flat, values.reshape(flat.shape), -1.0).argsort(dim=1, descending=True, stable=True)
    most = (flat.sum(dim=1, keepdim=True) * share).round().clamp(min=1)
    kept = torch.arange(flat.shape[1], device=flat.device) < most
    return torch.zeros_like(flat).scatter(1, order, kept).reshape(counted.shape) & counted


def _by_class(logits: Tensor, label: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax shares and one-hot truth `(B, K, N)`, both 0 at pixels that do not count."""
    counts = counted.flatten(1).unsqueeze(1)
    shares = logits.softmax(dim=1).flatten(2) * counts
    ids = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1)
    return shares, (label.flatten(1).unsqueeze(1) == ids) & counts


def _against_the_rest(logits: Tensor, label: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and one-hot truth `(B, K, ...)`, both 0 at pixels that do not count, and what `_counted` gives."""
    outputs = _full_precision(logits)
    num_classes = outputs.shape[1]
    counted, wrong = _counted(label, num_classes, ignore_index)
    counts = counted.unsqueeze(1)
    ids = torch.arange(num_classes, device=label.device).view(1, -1, *[1] * (label.ndim - 1))
    truth = (label.unsqueeze(1) == ids) & counts
    # Before the distance: behind it, the gradient of an output that is not finite would be 0 times infinity.
    return torch.where(counts, outputs, 0.0), truth.to(outputs.dtype), counted, wrong


def _mean_of_present(per_class: Tensor, truth: Tensor) -> Tensor:
    """`(B,)` from `(B, K)`: the mean over the classes that truth `(B, K, N)` shows, 0 for a sample without any."""
    present = truth.any(dim=2)
    return torch.where(present, per_class, 0.0).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def _full_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _or_one(divisor: Tensor) -> Tensor:
    """The divisor, or 1 where it is 0: then the sum above it is 0 too."""
    return torch.where(divisor > 0, divisor, 1.0)

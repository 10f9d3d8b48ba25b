"""Say of an image in other colours, cut together with another, what the network is sure of in the image as it is.

UniMatch: Yang, Qi, Feng, Zhang and Shi, "Revisiting weak-to-strong consistency in semi-supervised semantic
segmentation", CVPR 2023, with the values of its code. Two things differ there: the partner's pseudo-labels come from a
pass in evaluation mode, and the weak views share the pass of the labelled images, which here keep their bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from ssl_seg import losses, rng
from ssl_seg.losses import IGNORE_INDEX
from ssl_seg.mixing import cutmix_mask
from ssl_seg.models import ANY_CHANNELS, Features
from ssl_seg.semisupervised.strong import strong
from ssl_seg.tasks import Batch, Predict, Stream, TaskPlugin, View, partners

Share = Annotated[float, Field(ge=0.0, le=1.0)]
STRONG, PERTURBED = 0.25, 0.5  # of each strong view and of the perturbed features in the loss


class UniMatch(TaskPlugin):
    """Cross-entropy of two strong views, and of the weak view's features with channels left out, to pseudo-labels.

    The prediction holds four of each image, one after the other: weak, strong, strong, perturbed.
    """

    streams: ClassVar[tuple[Stream, ...]] = ("pool",)
    borrowed_head: ClassVar[str | None] = "segment"
    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    mixes: ClassVar[bool] = True
    confidence: Share = 0.95  # least softmax share of a pseudo-label that counts
    # Of a Dice loss beside the cross-entropy, as UniMatch's code has for medical images: by pixels alone a class of one
    # pixel in a hundred has no say.
    dice: NonNegativeFloat = 0.0
    cutmix: Share = 0.5  # how often a strong view has a box of its partner's
    drop: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5  # share of the channels left out

    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        image, key = batches["pool"].image, batches["pool"].key
        views, boxes = [image], []
        for turn in ("first", "second"):
            own = rng.fold_in(key, turn)
            mixed = rng.uniform(rng.fold_in(own, "mixed"), (1, 1, 1)) < self.cutmix
            box = cutmix_mask(rng.fold_in(own, "cutmix"), (image.shape[-2], image.shape[-1])) & mixed
            varied = strong(image, own)
            views.append(torch.where(box, partners(varied), varied))
            boxes.append(box)
        return View(torch.cat(views), torch.cat(boxes, dim=1).float(), key=key)  # (3 B, 3, H, W), (B, 2, H, W)

    def perturb(self, features: Features, view: View) -> Features:
        assert view.key is not None, "its own view has one"
        count, key = len(view.target), rng.fold_in(view.key, "drop")
        maps = []
        for number, level in enumerate(features):
            kept = rng.uniform(rng.fold_in(key, number), (level.shape[1], 1, 1)) >= self.drop
            maps.append(torch.cat([level, level[:count] * kept / (1 - self.drop)]))
        extras = {name: torch.cat([extra, extra[:count]]) for name, extra in features.extras.items()}
        return Features(maps, features.strides, extras)

    def watch(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """The share of an image's pixels that the network is sure of."""
        ids = self.pseudo_labels(prediction[: len(view.target)])
        return {"sure": (ids != IGNORE_INDEX).float().mean(dim=(1, 2))}

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        weak, *strongs, perturbed = prediction.split(len(view.target))
        ids = self.pseudo_labels(weak)
        total = PERTURBED * self.distance(perturbed, ids)
        for turn, own in enumerate(strongs):
            box = view.target[:, turn] > 0
            total = total + STRONG * self.distance(own, torch.where(box, partners(ids), ids))
        return total

    def distance(self, logits: Tensor, ids: Tensor) -> Tensor:
        """`(B,)`: cross-entropy over all pixels, so that few that have a label weigh little; and Dice over those."""
        labelled = (ids != IGNORE_INDEX).float().mean(dim=(1, 2))
        total = losses.cross_entropy(logits, ids) * labelled
        return total + self.dice * losses.dice(logits, ids) if self.dice else total

    def pseudo_labels(self, weak: Tensor) -> Tensor:
        """The class `(B, H, W)` of each pixel of which the logits `(B, K, H, W)` are sure, else 255."""
        share, ids = weak.detach().softmax(dim=1).max(dim=1)
        return ids.masked_fill(share < self.confidence, IGNORE_INDEX)

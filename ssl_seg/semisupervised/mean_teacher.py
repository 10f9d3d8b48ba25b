"""Say of a changed image what the average of the own weights says of the image as it is.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017; for segmentation with images that are cut
together, French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from ssl_seg import losses, rng
from ssl_seg.mixing import cutmix_mask
from ssl_seg.models import ANY_CHANNELS
from ssl_seg.tasks import Batch, Predict, Stream, TaskPlugin, View, partners

Share = Annotated[float, Field(ge=0.0, le=1.0)]
BOX = (0.5, 0.5)  # the share of a box: French et al.'s, whose student learns from two halves


class MeanTeacher(TaskPlugin):
    """The squared distance of softmax shares, summed over the classes, to those that the teacher gives."""

    streams: ClassVar[tuple[Stream, ...]] = ("pool",)
    borrowed_head: ClassVar[str | None] = "segment"
    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    asks_teacher: ClassVar[bool] = True
    mixes: ClassVar[bool] = True
    # Spread of what is added to each pixel: 2017's 0.15 of images whose spread is 1, which is 0.225 in photographs.
    noise: NonNegativeFloat = 0.034
    cutmix: Share = 1.0  # how often a box of half the image is the partner's; French et al.'s, and 0 is that of 2017
    # An image counts by the share of its pixels of which the teacher is so sure: French et al.'s; 0 is that of 2017.
    confidence: Share = 0.97

    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        assert teacher is not None, "check_tasks refuses the task without one"
        image, key = batches["pool"].image, batches["pool"].key
        shares = teacher(image).softmax(dim=1)  # (B, K, H, W)
        noisy = image + self.noise * rng.normal(rng.fold_in(key, "noise"), tuple(image.shape[1:]))
        noisy = noisy.clamp(0, 1)
        mixed = rng.uniform(rng.fold_in(key, "mixed"), (1, 1, 1)) < self.cutmix
        other = cutmix_mask(rng.fold_in(key, "cutmix"), (image.shape[-2], image.shape[-1]), BOX) & mixed
        return View(torch.where(other, partners(noisy), noisy), torch.where(other, partners(shares), shares))

    def watch(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """The share of an image's pixels of which the teacher is sure."""
        return {"sure": (view.target.amax(dim=1) >= self.confidence).float().mean(dim=(1, 2))}

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        sure = self.watch(prediction, view)["sure"]
        distance = losses.regression("mse", prediction.softmax(dim=1), view.target)
        return sure * distance * prediction.shape[1]

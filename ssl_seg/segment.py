"""Supervised segmentation as a task like any other, with its sum of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from ssl_seg import losses
from ssl_seg.models import EncoderSpec
from ssl_seg.tasks import Batch, Predict, Stream, Task, View


class Segment(Task):
    """Supervised segmentation: cross-entropy and Dice against class ids, 255 ignored."""

    streams: ClassVar[tuple[Stream, ...]] = ("labelled",)
    num_classes: int = Field(default=0, ge=0, le=255)  # 0: as many as the labelled data set has names
    cross_entropy: NonNegativeFloat = 1.0
    dice: NonNegativeFloat = 0.0
    # Weights per class, or "median" for median frequency balancing (Eigen and Fergus, ICCV 2015, section 6.3.2).
    class_weights: tuple[PositiveFloat, ...] | Literal["median"] | None = None

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not self.cross_entropy and not self.dice:
            raise ValueError("cross_entropy and dice are both 0, so nothing is learnt; give one of them a weight")
        given = self.class_weights
        if isinstance(given, tuple) and self.num_classes and len(given) != self.num_classes:
            raise ValueError(f"class_weights: {len(given)} numbers for {self.num_classes} classes; give one a class")
        return self

    def prepare(self, pixels: Tensor, pixels_beside: Tensor) -> Self:
        """A copy whose "median" class weights are numbers; classes that no image shows weigh 1.

        `pixels` `(K,)` counts each class's pixels, `pixels_beside` `(K,)` all those of the images that show it.
        """
        if self.class_weights != "median":
            return self
        present = pixels > 0
        if not present.any():
            return self.model_copy(update={"class_weights": None})
        frequency = pixels.double()[present] / pixels_beside[present]
        weights = torch.ones(len(pixels), dtype=torch.float64)
        weights[present] = frequency.quantile(0.5) / frequency
        return self.model_copy(update={"class_weights": tuple(weights.tolist())})

    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        batch = batches["labelled"]
        if batch.label is None:
            raise ValueError("Segment needs labels; give it batches of a labelled data set")
        return View(batch.image, batch.label)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return encoder.dense(self.num_classes)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=torch.float32, device=prediction.device)
        total = prediction.new_zeros(len(prediction), dtype=torch.float32)
        if self.cross_entropy:
            total = total + self.cross_entropy * losses.cross_entropy(prediction, view.target, weights=weights)
        if self.dice:
            total = total + self.dice * losses.dice(prediction, view.target)
        return total

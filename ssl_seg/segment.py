"""Supervised segmentation as a task like any other, with its sum of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from ssl_seg import losses, rng
from ssl_seg.config import known_to_0_1
from ssl_seg.mixing import cutmix_mask
from ssl_seg.models import EncoderSpec
from ssl_seg.tasks import Batch, Predict, Stream, Task, View, partners

SINCE_0_1 = ("mix", "mix_share")  # keys that version 0.1 did not know
IGNORED = 255


class Segment(Task):
    """Supervised segmentation: cross-entropy and Dice against class ids, 255 ignored."""

    streams: ClassVar[tuple[Stream, ...]] = ("labelled",)
    num_classes: int = Field(default=0, ge=0, le=255)  # 0: as many as the labelled data set has names
    cross_entropy: NonNegativeFloat = 1.0
    dice: NonNegativeFloat = 0.0
    # Weights per class, or "median" for median frequency balancing (Eigen and Fergus, ICCV 2015, section 6.3.2).
    class_weights: tuple[PositiveFloat, ...] | Literal["median"] | None = None
    # What is pasted from an image's partner, with its labels. cutmix: a box (Yun et al., ICCV 2019); classmix: all
    # pixels of half of the partner's classes, drawn at random (Olsson et al., WACV 2021).
    mix: Literal["cutmix", "classmix"] | None = None
    mix_share: float = Field(default=0.5, ge=0, le=1)  # of the images; a half, as CutMix on CIFAR: the rest stay whole

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not self.cross_entropy and not self.dice:
            raise ValueError("cross_entropy and dice are both 0, so nothing is learnt; give one of them a weight")
        if self.mix is None and "mix_share" in self.model_fields_set:
            raise ValueError("mix_share: nothing is mixed; give mix=cutmix or classmix, or drop it")
        given = self.class_weights
        if isinstance(given, tuple) and self.num_classes and len(given) != self.num_classes:
            raise ValueError(f"class_weights: {len(given)} numbers for {self.num_classes} classes; give one a class")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=SINCE_0_1)

    @property
    def mixes(self) -> bool:
        return self.mix is not None

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
        if self.mix is None:
            return View(batch.image, batch.label)
        return self._mixed(batch.image, batch.label, rng.fold_in(batch.key, "mix"))

    def _mixed(self, image: Tensor, label: Tensor, key: Tensor) -> View:
        beside = partners(label)
        if self.mix == "cutmix":
            pasted = cutmix_mask(key, (image.shape[-2], image.shape[-1]))  # (B, 1, H, W)
        else:
            pasted = classmix_mask(key, beside)
        pasted = pasted & (rng.uniform(rng.fold_in(key, "share"), (1, 1, 1)) < self.mix_share)
        return View(torch.where(pasted, partners(image), image), torch.where(pasted[:, 0], beside, label))

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


def classmix_mask(key: Tensor, label: Tensor) -> Tensor:
    """The pixels of half of the classes that each label `(B, H, W)` shows, rounded down: bool `(B, 1, H, W)`.

    Of a label that shows one class there is none. Ours, because the classes are drawn from each sample's key.
    """
    ids = label.flatten(1)
    shown = torch.zeros(len(ids), IGNORED + 1, dtype=torch.bool, device=label.device).scatter(1, ids, True)
    shown[:, IGNORED] = False
    drawn = rng.uniform(rng.fold_in(key, "classes"), (IGNORED + 1,)).where(shown, 1.0)  # those not shown come last
    place = drawn.argsort(dim=1, stable=True).argsort(dim=1)
    chosen = place < shown.sum(dim=1, keepdim=True) // 2
    return chosen.gather(1, ids).view_as(label).unsqueeze(1)

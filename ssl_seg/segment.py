"""Supervised segmentation as a task like any other, with its sum of losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from ssl_seg import losses, rng
from ssl_seg.config import Config, explain
from ssl_seg.mixing import classmix_mask, copy_paste_mask, cutmix_mask
from ssl_seg.models import ANY_CHANNELS, EncoderSpec
from ssl_seg.tasks import Batch, Predict, Stream, Task, View, partners


class Balance(Config):
    """Class weights from how often the labelled images show each class: (median frequency / frequency)^power."""

    balance: Literal["median"] = "median"  # median frequency balancing, the one kind there is
    # 1 is the word `median`; 0.5, the square root, is milder where one class would weigh a hundred times another.
    power: float = Field(default=1.0, gt=0, le=1)
    cap: float | None = Field(default=None, ge=1)  # no class weighs more than this; None: as rare as they are


def _balanced(value: Any) -> Any:
    """A mapping as the balance that it describes; in a union its mistakes would be told as those of a tuple."""
    try:
        return Balance.model_validate(value) if isinstance(value, Mapping) else value
    except ValidationError as error:
        raise ValueError(explain(error)) from error


ClassWeights = Annotated[
    tuple[PositiveFloat, ...] | Literal["median"] | Balance | None,
    BeforeValidator(_balanced),
]


class Segment(Task):
    """Supervised segmentation: a weighted sum of losses against class ids, 255 ignored."""

    streams: ClassVar[tuple[Stream, ...]] = ("labelled",)
    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    since_0_1: ClassVar[tuple[str, ...]] = (
        *Task.since_0_1,
        "focal",
        "focal_gamma",
        "tversky",
        "tversky_beta",
        "lovasz",
        "binary",
        "smooth_l1",
        "smooth_l1_beta",
        "label_smoothing",
        "hardest",
        "mix",
        "mix_share",
        "sees",
    )
    num_classes: int = Field(default=0, ge=0, le=255)  # 0: as many as the labelled data set has names
    cross_entropy: NonNegativeFloat = 1.0  # weight in the sum, as those below: of each pixel's class
    # Weight: of the overlap of each class, however small it is. Beside cross-entropy, which by pixels alone lets small
    # classes go: on none of five kinds of images was it worse on average, and without it wounds were not found
    # (experiments/recipes). 0 by default where cross_entropy is 0.
    dice: NonNegativeFloat = 1.0
    focal: NonNegativeFloat = 0.0  # weight: cross-entropy in which pixels that are right already count less
    focal_gamma: NonNegativeFloat = 2.0  # Lin et al.'s best
    tversky: NonNegativeFloat = 0.0  # weight: Dice in which a missed pixel costs more than one too many
    tversky_beta: float = Field(default=0.7, ge=0, le=1)  # what a missed pixel costs, one too many 1 - that; theirs
    lovasz: NonNegativeFloat = 0.0  # weight: a smooth form of the IoU itself
    binary: NonNegativeFloat = 0.0  # cross-entropy of each class's sigmoid against the rest
    smooth_l1: NonNegativeFloat = 0.0  # of the outputs themselves against 1 for the own class and 0 for the others
    smooth_l1_beta: PositiveFloat = 1.0  # below this error it is squared; Girshick's (2015), and torch's
    # Of cross-entropy and focal: weights per class, or "median" for median frequency balancing (Eigen and Fergus, ICCV
    # 2015, section 6.3.2), or a mapping that weakens it.
    class_weights: ClassWeights = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # of cross-entropy; 0.1 is usual
    hardest: float = Field(default=1.0, gt=0, le=1)  # of cross-entropy: the share of an image's pixels that count
    # What is pasted from an image's partner, with its labels. cutmix: a box (Yun et al., ICCV 2019); classmix: all
    # pixels of half of the partner's classes, drawn at random (Olsson et al., WACV 2021); copy_paste: the same without
    # the class that the partner shows most (Ghiasi et al., CVPR 2021).
    mix: Literal["cutmix", "classmix", "copy_paste"] | None = None
    mix_share: float = Field(default=0.5, ge=0, le=1)  # of the images; a half, as CutMix on CIFAR: the rest stay whole
    # The task of `tasks` whose view of the labelled images is segmented in place of the images as they are, by the same
    # pass of the encoder: its noise, its holes. As in Aspris 2021, where one noisy image is drawn clean and segmented.
    sees: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _dice_beside_cross_entropy(cls, values: Any) -> Any:
        """Who turns cross-entropy off names the losses that are wanted: none comes with them unasked."""
        if not isinstance(values, Mapping) or "dice" in values:
            return values
        try:
            off = float(values.get("cross_entropy", 1)) == 0
        except (TypeError, ValueError, OverflowError):
            return values  # no number: told of the key itself
        return {**values, "dice": 0.0} if off else values

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        named = ("cross_entropy", "dice", "focal", "tversky", "lovasz", "binary", "smooth_l1")
        if not any(getattr(self, name) for name in named):
            raise ValueError(
                f"the weights of {', '.join(named)} are all 0, so nothing is learnt; give one of them a weight"
            )
        for key in ("label_smoothing", "hardest"):
            if not self.cross_entropy and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: changes cross_entropy, whose weight is 0; give it a weight, or drop {key}")
        if self.mix is None and "mix_share" in self.model_fields_set:
            raise ValueError("mix_share: nothing is mixed; give mix=cutmix, classmix or copy_paste, or drop it")
        if self.mix is not None and self.sees is not None:
            raise ValueError(f"sees: what {self.sees} shows is not mixed; drop mix={self.mix}, or sees")
        given = self.class_weights
        if isinstance(given, tuple) and self.num_classes and len(given) != self.num_classes:
            raise ValueError(f"class_weights: {len(given)} numbers for {self.num_classes} classes; give one a class")
        return self

    def as_begun(self, former: Mapping[str, Any]) -> Self:
        """With the weight of Dice that a run was begun with, by its `segment`, unless one is given.

        Its default was 0 before version 0.2, and a run goes on as it began.
        """
        own = former.get("dice")
        if "dice" in self.model_fields_set or not isinstance(own, int | float):
            return self
        return self.model_copy(update={"dice": float(own)})

    @property
    def balances(self) -> bool:
        """Whether the class weights are still to be made from the labelled images, by `prepare`."""
        return self.class_weights == "median" or isinstance(self.class_weights, Balance)

    @property
    def mixes(self) -> bool:
        return self.mix is not None

    @property
    def borrowed_input(self) -> str | None:
        return self.sees

    def prepare(self, pixels: Tensor, pixels_beside: Tensor) -> Self:
        """A copy whose class weights are numbers where they follow from the images; what no image shows weighs 1.

        `pixels` `(K,)` counts each class's pixels, `pixels_beside` `(K,)` all those of the images that show it.
        """
        if not self.balances:
            return self
        present = pixels > 0
        if not present.any():
            return self.model_copy(update={"class_weights": None})
        frequency = pixels.double()[present] / pixels_beside[present]
        weights = torch.ones(len(pixels), dtype=torch.float64)
        weights[present] = frequency.quantile(0.5) / frequency
        if isinstance(self.class_weights, Balance):
            weights = weights**self.class_weights.power
            weights = weights if self.class_weights.cap is None else weights.clamp(max=self.class_weights.cap)
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
            mask = classmix_mask if self.mix == "classmix" else copy_paste_mask
            pasted = mask(key, beside)
        pasted = pasted & (rng.uniform(rng.fold_in(key, "share"), (1, 1, 1)) < self.mix_share)
        return View(torch.where(pasted, partners(image), image), torch.where(pasted[:, 0], beside, label))

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return encoder.dense(self.num_classes)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=torch.float32, device=prediction.device)
        total = prediction.new_zeros(len(prediction), dtype=torch.float32)
        label = view.target
        if self.cross_entropy:
            options = {"weights": weights, "smoothing": self.label_smoothing, "hardest": self.hardest}
            total = total + self.cross_entropy * losses.cross_entropy(prediction, label, **options)
        if self.dice:
            total = total + self.dice * losses.dice(prediction, label)
        if self.focal:
            total = total + self.focal * losses.focal(prediction, label, weights=weights, gamma=self.focal_gamma)
        if self.tversky:
            total = total + self.tversky * losses.tversky(prediction, label, beta=self.tversky_beta)
        if self.lovasz:
            total = total + self.lovasz * losses.lovasz(prediction, label)
        if self.binary:
            total = total + self.binary * losses.binary(prediction, label)
        if self.smooth_l1:
            total = total + self.smooth_l1 * losses.smooth_l1(prediction, label, beta=self.smooth_l1_beta)
        return total

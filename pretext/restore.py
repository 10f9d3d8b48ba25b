"""Restore: patches of the image change places, and the network puts them back.

Chen et al., "Self-supervised learning for medical image analysis using image context restoration", Medical Image
Analysis 2019. No pixel is invented: the picture keeps its colours and its texture, and only where things belong tells
what is wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from ssl_seg import losses, metrics, rng
from ssl_seg.models import ANY_CHANNELS
from ssl_seg.tasks import PictureTask, View

# The root mean square distance of a pixel that has moved from the one that belongs there, over 200 images of BSDS500
# under the defaults. Errors are measured in it: a squared error of 1 is that of handing the image back.
SCALE = 0.30
LARGEST = 1 / 3  # of a patch's side, as a share of the short side: beside any patch there is room for another


class Restore(PictureTask):
    """Predict the image from one in which pairs of patches have been swapped, one pair after the other.

    The two patches of a pair never overlap; a later pair may move what an earlier one has brought. Which pixels have
    moved is not told; the loss counts them most.
    """

    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    # The norm of its gradient on the encoder, while seven tasks are trained together on CamVid in batches of 4, is 0.89
    # and 0.46 after 50 and 150 steps; those of denoise, inpaint, colorize and jigsaw are 0.45 to 1.09 and 0.57 to 0.76.
    weight: NonNegativeFloat = 1.0
    # How often two patches change places; each takes time. With the default sizes a quarter of the pixels of a square
    # image show another place then, as many as inpaint erases.
    number: Annotated[int, Field(ge=1, le=1000)] = 10
    # Sides of the square patches, as shares of the image's short side: small, as the paper says.
    size: tuple[PositiveFloat, PositiveFloat] = (0.08, 0.16)
    # How much a pixel that has not moved counts, as in inpaint. In the paper all count alike (1); most of the loss then
    # is to copy what is there.
    outside: Annotated[float, Field(ge=0, le=1)] = 0.1
    distance: losses.Distance = "mse"  # the paper's

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        low, high = self.size
        if not low <= high <= LARGEST:
            raise ValueError(f"size is [low, high] with 0 < low <= high <= 1/3, not {[low, high]}")
        return self

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        height, width = image.shape[-2:]
        source = self.source(rng.fold_in(key, "swap"), height, width)
        swapped = (
            image.flatten(2).gather(2, source.flatten(1).unsqueeze(1).expand(-1, image.shape[1], -1)).view(image.shape)
        )
        moved = source != torch.arange(height * width, device=image.device).view(height, width)
        return View(swapped, image, torch.where(moved, 1.0, self.outside).unsqueeze(1))

    def source(self, key: Tensor, height: int, width: int) -> Tensor:
        """Which pixel, counted row by row, each pixel of the view shows: int64 `(B, H, W)`, a permutation."""
        row = torch.arange(height, device=key.device).view(-1, 1)
        column = torch.arange(width, device=key.device)
        place = row * width + column  # (H, W)
        source = place.expand(len(key), height, width)
        for number in range(self.number):
            side, *corners = self._pair(rng.fold_in(key, number), height, width)
            first, second = (
                (row >= top) & (row < top + side) & (column >= left) & (column < left + side) for top, left in corners
            )  # (B, H, W)
            (top, left), (other_top, other_left) = corners
            there = (other_top - top) * width + other_left - left  # from a pixel of the first to its like in the second
            seen = place + first * there - second * there
            source = source.flatten(1).gather(1, seen.flatten(1)).view_as(source)
        return source

    def _pair(
        self, key: Tensor, height: int, width: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The side of two patches that do not overlap, and the upper left corner of each; all `(B, 1, 1)`.

        Along one axis, drawn for each pair, the second has a place beside the first; along the other it lies anywhere.
        """
        shares = rng.uniform(rng.fold_in(key, "side"), (1, 1), *self.size)
        side = (shares * min(height, width)).round().long().clamp(min=1)
        beside = rng.randint(rng.fold_in(key, "axis"), (1, 1), 0, 2)
        firsts, seconds = [], []
        for axis, length in enumerate((height, width)):
            places = length - side + 1
            first = rng.randint(rng.fold_in(key, f"first {axis}"), (1, 1), 0, places)
            lowest = (first - side + 1).clamp(min=0)  # of the places that overlap with the first
            overlapping = torch.minimum(first + side, places) - lowest
            free = places - overlapping
            second = rng.randint(rng.fold_in(key, f"second {axis}"), (1, 1), 0, free.clamp(min=1))
            second = second + (second >= lowest) * overlapping
            anywhere = rng.randint(rng.fold_in(key, f"anywhere {axis}"), (1, 1), 0, places)
            firsts.append(first)
            # A side of one pixel has no place beside: there the two may be one.
            seconds.append(torch.where((beside == axis) & (free > 0), second, anywhere))
        return side, (firsts[0], firsts[1]), (seconds[0], seconds[1])

    def plain(self, view: View) -> Tensor:
        """The image as it is given."""
        return view.input

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        unit = SCALE * self.contrast(view.target)
        answer = self.answer(prediction, view)
        return losses.regression(self.distance, answer / unit, view.target / unit, view.loss_mask)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Where another pixel is shown than belongs there; and how near the image as it was given is there."""
        picture = self.answer(prediction, view).clamp(0.0, 1.0)
        wrong = (view.input != view.target).any(dim=1, keepdim=True).to(prediction.dtype)
        return {
            "psnr": metrics.psnr(picture, view.target, wrong),
            "mae": metrics.mae(picture, view.target, wrong),
            "psnr_of_input": metrics.psnr(view.input, view.target, wrong),
        }

    def render(self, prediction: Tensor, view: View) -> Tensor:
        return self.answer(prediction, view).clamp(0.0, 1.0)

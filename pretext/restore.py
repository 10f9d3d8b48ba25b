"""Restore: patches of the image change places, and the network puts them back.

Chen et al., "Self-supervised learning for medical image analysis using image context restoration", Medical Image
Analysis 2019. No pixel is invented: the picture keeps its colours and its texture, and only where things belong tells
what is wrong.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from ssl_seg import losses, metrics, rng
from ssl_seg.models import EncoderSpec
from ssl_seg.tasks import DenseTask, View

# The root mean square distance of a pixel that has moved from the one that belongs there, over 200 images of BSDS500
# under the defaults. Errors are measured in it: a squared error of 1 is that of handing the image back.
SCALE = 0.0
LARGEST = 1 / 3  # of a patch's side, as a share of the short side: beside any patch there is room for another


class Restore(DenseTask):
    """Predict the image from one in which pairs of patches have been swapped, one pair after the other.

    The two patches of a pair never overlap; a later pair may move what an earlier one has brought. Which pixels have
    moved is not told; the loss counts them most.
    """

    # How often two patches change places, the paper's 10; each takes time. With patches of the default sizes a fifth of a
    # square image has moved then.
    number: Annotated[int, Field(ge=1, le=1000)] = 10
    # Sides of the square patches, as shares of the image's short side. The paper leaves them open ("small").
    size: tuple[PositiveFloat, PositiveFloat] = (0.08, 0.16)
    # How much a pixel that has not moved counts, as in inpaint. The paper's loss is 1: all pixels alike; then most of it
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
        swapped = image.flatten(2).gather(2, source.flatten(1).unsqueeze(1).expand(-1, 3, -1)).view(image.shape)
        moved = source != torch.arange(height * width, device=image.device).view(height, width)
        return View(swapped, image, torch.where(moved, 1.0, self.outside).unsqueeze(1))

    def source(self, key: Tensor, height: int, width: int) -> Tensor:
        """Which pixel each pixel of the view shows, int64 `(B, H, W)`: a permutation of the image's, row by row."""
        place = torch.arange(height * width, device=key.device)
        row, column = place // width, place % width
        source = place.expand(len(key), -1)
        for number in range(self.number):
            side, corners = self._pair(rng.fold_in(key, number), height, width)
            (top, left), (other_top, other_left) = corners
            there = ((other_top - top) * width + other_left - left).unsqueeze(1)  # from one patch to the other
            first, second = (
                (row >= y) & (row < y + side) & (column >= x) & (column < x + side)
                for y, x in ((top.unsqueeze(1), left.unsqueeze(1)), (other_top.unsqueeze(1), other_left.unsqueeze(1)))
            )
            source = source.gather(1, place + first * there - second * there)
        return source.view(-1, height, width)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return self.dense(encoder, 3)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return losses.regression(self.distance, prediction / SCALE, view.target / SCALE, view.loss_mask)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Of the pixels that have moved, and how far the image as it was given is from the truth there."""
        return {}

    def render(self, prediction: Tensor, view: View) -> Tensor:
        return prediction.clamp(0.0, 1.0)

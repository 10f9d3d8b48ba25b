"""Inpaint: part of the image is erased, and the network paints it again from what is around.

Pathak et al., "Context encoders: feature learning by inpainting", CVPR 2016. Strokes after Yu et al., "Free-form image
inpainting with gated convolution", ICCV 2019; the block grid after Xie et al., "SimMIM", CVPR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from ssl_seg import losses, metrics, rng
from ssl_seg.models import ANY_CHANNELS
from ssl_seg.tasks import PictureTask, View

# The root mean square distance of a hole's pixels from the mean colour of what is left, over 200 images of BSDS500
# (0.21 for every shape). Errors are measured in it: a squared error of 1 is that of the mean colour.
SCALE = 0.21
SEGMENTS = 5  # of a stroke
LARGEST_TURN = math.pi / 2  # between two segments of a stroke
THINNEST = 0.75  # pixels, half a stroke's width: any point of the image is that near to the centre of a pixel


class Inpaint(PictureTask):
    """Predict the whole image from one with holes; the loss counts most inside the holes.

    Every sample has an erased pixel (under a grid: where no side is shorter than the grid). The default squares and
    strokes erase 0.22 of a square image on average; Pathak's random blocks erase up to a quarter.
    """

    in_place: ClassVar[bool] = True
    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    # The norm of the weighted loss's gradient on the encoder, while four tasks are trained together on CamVid
    # (experiments/camvid_tasks), is 0.42, 0.34 and 0.40 after 50, 150 and 400 steps: of one order with the others.
    weight: NonNegativeFloat = 0.5
    mask: Literal["squares", "strokes", "grid"] = "squares"  # the form of the holes
    number: Annotated[int, Field(ge=1, le=1000)] = 4  # squares or strokes; each takes time
    # Sides of squares, and lengths of a stroke's segments, as shares of the image's short side.
    size: tuple[PositiveFloat, PositiveFloat] = (0.15, 0.35)
    width: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.15)  # of strokes, as shares of the short side
    # SimMIM's defaults: cells of 32 pixels of a 224-pixel image, 0.6 of them erased.
    grid: Annotated[int, Field(ge=2, le=1000)] = 7
    share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    # The mean colour of what is left gives no edge brighter or darker than the image has; Pathak fill alike.
    fill: Literal["mean", "zero", "noise"] = "mean"
    # How much a pixel outside the holes counts: a little, so that the prediction is a picture and the decoder learns
    # to keep what it sees. Under 1, for a hole is where the weight is 1.
    outside: Annotated[float, Field(ge=0, le=0.99)] = 0.1
    distance: losses.Distance = "mse"  # as Pathak's reconstruction loss

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name, (low, high) in {"size": self.size, "width": self.width}.items():
            if not low <= high <= 1:
                raise ValueError(f"{name} is [low, high] with 0 < low <= high <= 1, not {[low, high]}")
        return self

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        hole = self.hole(rng.fold_in(key, "hole"), *image.shape[-2:])
        # Products with 0 and 1 are the same bits as `where`, in a third of its time on a CPU.
        inside = hole.to(image.dtype)
        left = image * (1.0 - inside)
        filling = self._filling(left, inside, rng.fold_in(key, "fill"))
        counted = torch.where(hole, 1.0, self.outside) if self.outside else inside
        return View(left.addcmul_(filling, inside), image, counted)

    def hole(self, key: Tensor, height: int, width: int) -> Tensor:
        """What to erase, bool `(B, 1, H, W)`."""
        shapes = {"squares": self._squares, "strokes": self._strokes, "grid": self._cells}
        return shapes[self.mask](key, height, width).unsqueeze(1)

    def plain(self, view: View) -> Tensor:
        """The mean colour of what is left."""
        hole = view.loss_mask == 1
        inside = hole.to(view.target.dtype)
        return torch.where(hole, _mean_of(view.target * (1.0 - inside), inside), view.input)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        unit = SCALE * self.contrast(view.target)
        answer = self.answer(prediction, view)
        return losses.regression(self.distance, answer / unit, view.target / unit, view.loss_mask)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Inside the holes only."""
        picture, hole = self.answer(prediction, view).clamp(0.0, 1.0), (view.loss_mask == 1).to(prediction.dtype)
        return {"psnr": metrics.psnr(picture, view.target, hole), "mae": metrics.mae(picture, view.target, hole)}

    def render(self, prediction: Tensor, view: View) -> Tensor:
        """The picture restored: the prediction in the holes, the image itself around them."""
        return torch.where(view.loss_mask == 1, self.answer(prediction, view).clamp(0.0, 1.0), view.input)

    def _filling(self, left: Tensor, inside: Tensor, key: Tensor) -> Tensor:
        """What comes into the holes, which are 1 in `inside`, of images of which `left` is left, 0 in the holes."""
        if self.fill == "noise":
            return rng.uniform(key, tuple(left.shape[1:]))
        if self.fill == "zero":
            return torch.zeros_like(left)
        return _mean_of(left, inside)

    def _squares(self, key: Tensor, height: int, width: int) -> Tensor:
        row, column = _pixels(height, width, key.device)
        short = min(height, width)
        shares = rng.uniform(rng.fold_in(key, "side"), (self.number, 1, 1), *self.size)
        side = (shares * short).round().long().clamp(1, short)  # (B, number, 1, 1)
        top = rng.randint(rng.fold_in(key, "top"), (self.number, 1, 1), 0, height - side + 1)
        left = rng.randint(rng.fold_in(key, "left"), (self.number, 1, 1), 0, width - side + 1)
        rows = ((row >= top) & (row < top + side)).squeeze(3).float()  # (B, number, H)
        columns = ((column >= left) & (column < left + side)).squeeze(2).float()  # (B, number, W)
        # How many squares lie over a pixel, a small number in any precision; a tenth of the time of `any` on a CPU.
        return rows.mT @ columns > 0

    def _strokes(self, key: Tensor, height: int, width: int) -> Tensor:
        """Brushes that walk `SEGMENTS` straight segments from a point of the image and may leave it."""
        row, column = _pixels(height, width, key.device)
        short = min(height, width)
        y = rng.uniform(rng.fold_in(key, "y"), (self.number, 1, 1), 0.0, height - 1.0)
        x = rng.uniform(rng.fold_in(key, "x"), (self.number, 1, 1), 0.0, width - 1.0)
        shares = rng.uniform(rng.fold_in(key, "width"), (self.number, 1, 1), *self.width)
        radius = (shares * short / 2).clamp(min=THINNEST)
        angle = rng.uniform(rng.fold_in(key, "angle"), (self.number, 1, 1), 0.0, 2.0 * math.pi)
        turns = rng.uniform(rng.fold_in(key, "turn"), (self.number, 1, 1, SEGMENTS), -LARGEST_TURN, LARGEST_TURN)
        lengths = rng.uniform(rng.fold_in(key, "length"), (self.number, 1, 1, SEGMENTS), *self.size) * short
        erased = torch.zeros(len(key), height, width, dtype=torch.bool, device=key.device)
        for segment in range(SEGMENTS):
            length, toward_y, toward_x = lengths[..., segment], torch.sin(angle), torch.cos(angle)
            along = (row - y) * toward_y + (column - x) * toward_x  # (B, number, H, W)
            along = torch.minimum(along.clamp(min=0.0), length)
            gap = (row - y - along * toward_y) ** 2 + (column - x - along * toward_x) ** 2
            erased |= (gap <= radius**2).any(dim=1)
            y, x = y + length * toward_y, x + length * toward_x
            angle = angle + turns[..., segment]
        return erased

    def _cells(self, key: Tensor, height: int, width: int) -> Tensor:
        """The same number of cells in every sample; cells differ by a pixel where `grid` does not divide the side."""
        cells = self.grid**2
        count = min(max(round(self.share * cells), 1), cells - 1)
        erased = (rng.permutation(key, cells) < count).view(-1, self.grid, self.grid)
        row, column = _pixels(height, width, key.device)
        return erased[:, row * self.grid // height, column * self.grid // width]


def _pixels(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers `(H, 1)` and column numbers `(1, W)`."""
    row = torch.arange(height, device=device).view(-1, 1)
    column = torch.arange(width, device=device).view(1, -1)
    return row, column


def _mean_of(left: Tensor, inside: Tensor) -> Tensor:
    """The mean colour `(B, 3, 1, 1)` of what is left of images: 0 in the holes, where `inside` `(B, 1, H, W)` is 1."""
    pixels = inside[0, 0].numel() - inside.sum(dim=(2, 3), keepdim=True)
    return left.sum(dim=(2, 3), keepdim=True) / pixels.clamp(min=1)

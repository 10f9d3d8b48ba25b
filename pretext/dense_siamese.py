"""Dense siamese: two crops of an image in other colours, and what lies at one place of it is to look alike in both.

The loss is VICReg's (Bardes, Ponce and LeCun, "VICReg: variance-invariance-covariance regularization for
self-supervised learning", ICLR 2022) on pairs of places, as the position-based half of VICRegL (the same, NeurIPS 2022)
and as DenseCL (Wang et al., CVPR 2021) do. No negatives, no queue, no teacher: also the example of a task that shows
the network two inputs a sample.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.models import ANY_CHANNELS, RGB, EncoderSpec, Features
from ssl_seg.tasks import PretextTask, View

STRIDE = 8  # of the map whose places are compared: what lies 8 pixels apart can be told apart
FINEST = 4  # the finest stride that has a say in it: at 2 there are edges and colours, which are to be forgotten
WIDTH = 128  # of the hidden layer of the projector
OVERLAP = 0.5  # the least that two crops share along each axis, of the smaller's side
GREY = 0.2  # of the crops lose their colours; VICReg's share
SPREAD = 1.0  # what each channel is to vary by, VICReg's gamma
EPSILON = 1e-4  # in the root of the variance, VICReg's


class DenseSiamese(PretextTask):
    """Tell the same of a place in two crops, and other things of other places.

    VICReg keeps its answers from becoming one and the same by asking that every channel varies, and apart from the
    others, over a *batch*. A sample's loss would then depend on who is in its batch, and a run on the number of
    processes. Here both are asked over the places of one sample. What that means: places of an image are told apart,
    and things that are the same all over an image are not asked for; two images may look alike to the network.
    """

    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    # The norm of its gradient on the encoder, while seven tasks are trained together on CamVid in batches of 4, is 1.32
    # and 0.75 after 50 and 150 steps; those of denoise, inpaint, colorize and jigsaw are 0.45 to 1.09 and 0.57 to 0.76.
    weight: NonNegativeFloat = 1.0
    # Sides of the crops, as shares of the image's: each is drawn by itself, and the two overlap by half of the smaller
    # one or more along both axes. VICReg's areas of 0.08 to 1 are sides of 0.28 to 1, which often have no place in
    # common.
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    # The strength of each crop's own change of brightness, contrast and each channel's gain; VICReg's of the first two.
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.4
    points: Annotated[int, Field(ge=2, le=64)] = 8  # a side, evenly over what the crops share
    # Of the answers: half the places, for there is no more variance than that to go round without covariance.
    channels: Annotated[int, Field(ge=1, le=4096)] = 32
    # Beside a weight of 1 of the squared distance: VICReg's 25, 25 and 1 divided by 25.
    variance: NonNegativeFloat = 1.0
    covariance: NonNegativeFloat = 0.04

    @model_validator(mode="after")
    def _check_zoom(self) -> Self:
        if not self.zoom[0] <= self.zoom[1] <= 1:
            raise ValueError(f"zoom is [low, high] with 0 < low <= high <= 1, not {list(self.zoom)}")
        return self

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        boxes = self._boxes(rng.fold_in(key, "boxes"))
        flips = rng.randint(rng.fold_in(key, "flips"), (2, 1, 1), 0, 2).bool()
        crops = [
            _recoloured(_cut(image, boxes[:, number], flips[:, number]), self.colour, rng.fold_in(key, number))
            for number in range(2)
        ]
        return View(torch.cat(crops), self._places(boxes, flips))

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return Projector(encoder, self.channels)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        first, second = self._answers(prediction, view)
        alike = ((first - second) ** 2).mean(dim=(1, 2))
        varied = torch.stack([(SPREAD - _spread(own)).clamp(min=0.0).mean(dim=1) for own in (first, second)]).mean(0)
        apart = _off_diagonal(first) + _off_diagonal(second)
        return alike + self.variance * varied + self.covariance * apart

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """`found`: the share of places whose nearest in the other crop is the right one. `spread`: 1 is asked for."""
        first, second = self._answers(prediction, view)
        own = torch.arange(first.shape[2], device=first.device)
        return {
            "found": (_nearest(first, second) == own).to(first.dtype).mean(dim=1),
            "spread": (_spread(first) + _spread(second)).mean(dim=1) / 2,
        }

    def render(self, prediction: Tensor, view: View) -> Tensor:
        """What the crops share, each place in the colour of that place of the second which is taken for it."""
        nearest = _nearest(*self._answers(prediction, view))  # (B, N)
        colours = self._seen(view).gather(2, nearest.unsqueeze(1).expand(-1, view.input.shape[1], -1))
        return self._mosaic(colours, view)

    def render_target(self, view: View) -> Tensor:
        return self._mosaic(self._seen(view), view)

    def _boxes(self, key: Tensor) -> Tensor:
        """Top, left and side of both crops as shares of the image, `(B, 2, 3)`."""
        sides = rng.uniform(rng.fold_in(key, "side"), (2,), *self.zoom)
        shared = OVERLAP * sides.amin(dim=1)
        corners = []
        for axis in ("top", "left"):
            drawn = rng.uniform(rng.fold_in(key, axis), (2,))
            first = drawn[:, 0] * (1.0 - sides[:, 0])
            low = (first + shared - sides[:, 1]).clamp(min=0.0)
            high = torch.minimum(first + sides[:, 0] - shared, 1.0 - sides[:, 1])
            corners.append(torch.stack([first, low + drawn[:, 1] * (high - low)], dim=1))
        return torch.stack([*corners, sides], dim=2)

    def _places(self, boxes: Tensor, flips: Tensor) -> Tensor:
        """The target: where in each crop the points lie that both show, `(B, 4, n, n)` in shares of its sides.

        y and x in the first, then y and x in the second.
        """
        corners, sides = boxes[:, :, :2], boxes[:, :, 2:]
        low, high = corners.amax(dim=1), (corners + sides).amin(dim=1)  # (B, 2): what the crops share
        steps = (torch.arange(self.points, device=boxes.device) + 0.5) / self.points
        points = low.unsqueeze(2) + (high - low).unsqueeze(2) * steps  # (B, 2, n)
        inside = (points.unsqueeze(1) - corners.unsqueeze(3)) / sides.unsqueeze(3)  # (B, 2 crops, 2 axes, n)
        rows, columns = inside.unbind(2)
        columns = torch.where(flips.squeeze(3), 1.0 - columns, columns)
        grid = [rows.unsqueeze(3).expand(-1, -1, -1, self.points), columns.unsqueeze(2).expand(-1, -1, self.points, -1)]
        return torch.stack(grid, dim=2).flatten(1, 2)

    def _answers(self, prediction: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """What the network says of the points in each crop, `(B, D, N)`, from maps `(2B, D, h, w)`."""
        size = view.input.shape[-2:]
        # A map covers whole cells, the last of which may reach beyond the image.
        covered = [side / (STRIDE * cells) for side, cells in zip(size, prediction.shape[-2:], strict=True)]
        first, second = (
            _at(level, view.target[:, 2 * number : 2 * number + 2], covered)
            for number, level in enumerate(prediction.chunk(2))
        )
        return first, second

    def _seen(self, view: View) -> Tensor:
        """The colours `(B, 3, N)` of the points in the second crop."""
        return _at(view.input.chunk(2)[1], view.target[:, 2:])

    def _mosaic(self, colours: Tensor, view: View) -> Tensor:
        small = colours.unflatten(2, (self.points, self.points))
        return F.interpolate(small, size=view.input.shape[-2:], mode="nearest")


class Projector(nn.Module):
    """A hidden layer on all maps from stride 4 on, laid on each other at stride 8, and a linear one: place by place.

    Norm layers are left out: theirs would be the batch's statistics.
    """

    def __init__(self, encoder: EncoderSpec, channels: int) -> None:
        super().__init__()
        given = list(zip(encoder.strides, encoder.channels, strict=True))
        self.levels = [level for level, (stride, width) in enumerate(given) if width and stride >= FINEST]
        self.first = nn.ModuleList(nn.Conv2d(encoder.channels[level], WIDTH, kernel_size=1) for level in self.levels)
        self.last = nn.Conv2d(WIDTH, channels, kernel_size=1, bias=False)  # the loss does not change with one

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """`(B, channels, ceil(H / 8), ceil(W / 8))` for images of `size` (H, W)."""
        padded = (-(-features.size[0] // STRIDE), -(-features.size[1] // STRIDE))
        laid = []
        for level, layer in zip(self.levels, self.first, strict=True):
            hidden = layer(features[level])
            if hidden.shape[-1] > padded[-1]:
                hidden = F.adaptive_avg_pool2d(hidden, padded)
            elif hidden.shape[-1] < padded[-1]:
                hidden = F.interpolate(hidden, size=padded, mode="bilinear", align_corners=False)
            laid.append(hidden)
        height, width = (-(-side // STRIDE) for side in size)
        return self.last(F.gelu(torch.stack(laid).sum(dim=0)))[..., :height, :width]


def _cut(image: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """Of each image its box `(B, 3)` of top, left and side, brought to the image's size; flipped where `(B, 1, 1)`."""
    height, width = image.shape[-2:]
    top, left, side = box.unsqueeze(2).unbind(1)  # (B, 1) each
    rows = (torch.arange(height, device=image.device) + 0.5) / height
    columns = (torch.arange(width, device=image.device) + 0.5) / width
    columns = torch.where(flip.squeeze(2), 1.0 - columns, columns)  # (B, W)
    y = (top + side * rows).unsqueeze(2).expand(-1, -1, width)
    x = (left + side * columns).unsqueeze(1).expand(-1, height, -1)
    return F.grid_sample(image, _grid(y, x), mode="bilinear", padding_mode="border", align_corners=False)


def _at(level: Tensor, places: Tensor, covered: tuple[float, ...] | list[float] = (1.0, 1.0)) -> Tensor:
    """A map `(B, C, h, w)` at `places` `(B, 2, n, n)`, `(B, C, n * n)`; the image is the share `covered` of the map."""
    y, x = (share * own for share, own in zip(covered, places.unbind(1), strict=True))
    return F.grid_sample(level, _grid(y, x), mode="bilinear", padding_mode="border", align_corners=False).flatten(2)


def _grid(y: Tensor, x: Tensor) -> Tensor:
    """Shares of the sides as `grid_sample` wants them."""
    return torch.stack([x, y], dim=-1) * 2.0 - 1.0


def _recoloured(image: Tensor, strength: float, key: Tensor) -> Tensor:
    low, high = 1.0 - strength, 1.0 + strength
    brightness = rng.uniform(rng.fold_in(key, "brightness"), (1, 1, 1), low, high)
    contrast = rng.uniform(rng.fold_in(key, "contrast"), (1, 1, 1), low, high)
    gain = rng.uniform(rng.fold_in(key, "gain"), (image.shape[1], 1, 1), low, high)
    # Bands have no colours to lose: their mean would be another kind of image.
    grey = rng.uniform(rng.fold_in(key, "grey"), (1, 1, 1)) < (GREY if strength and image.shape[1] == RGB else 0.0)
    image = torch.where(grey, image.mean(dim=1, keepdim=True), image * gain)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return ((image - mean) * contrast + mean * brightness).clamp(0.0, 1.0)


def _spread(answers: Tensor) -> Tensor:
    """How far each channel varies over the places, `(B, D)` of `(B, D, N)`."""
    return (answers.var(dim=2) + EPSILON).sqrt()


def _off_diagonal(answers: Tensor) -> Tensor:
    """The squared covariances of each channel with the others over the places, summed, `(B,)`; a mean over channels."""
    centred = answers - answers.mean(dim=2, keepdim=True)
    covariance = centred @ centred.transpose(1, 2) / (answers.shape[2] - 1)  # (B, D, D)
    squared = covariance**2
    return (squared.sum(dim=(1, 2)) - squared.diagonal(dim1=1, dim2=2).sum(dim=1)) / answers.shape[1]


def _nearest(first: Tensor, second: Tensor) -> Tensor:
    """For each place of the first the number of that of the second whose answer is nearest, `(B, N)`."""
    return torch.cdist(first.transpose(1, 2), second.transpose(1, 2)).argmin(dim=2)

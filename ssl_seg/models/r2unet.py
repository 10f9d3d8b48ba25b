"""R2U-Net: a U-Net of recurrent residual units, with the plain, recurrent and residual U-Nets that it is compared with.

Alom et al., "Recurrent residual convolutional neural network based on U-Net (R2U-Net) for medical image segmentation",
arXiv 1802.06955, 2018; Fischer and Malhotra 2021 use it with 34 classes. What the paper leaves open is as in the
re-implementation that most others copy (github.com/LeeJunHyun/Image_Segmentation): convolutions with bias, batch norm,
nearest upsampling with a convolution, and a 1 x 1 convolution to a unit's width. From 3 channels to 34 classes it has
39,093,538 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.models import (
    ANY_CHANNELS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RGB,
    Decoder,
    DecoderNet,
    Encoder,
    EncoderNet,
    Features,
    Stages,
    constants_of,
)

# The paper's four (figure 4). recurrent_residual: what gives R2U-Net its name. recurrent: without the sum around the
# unit (RU-Net). residual: without recurrence. plain: two convolutions, as a U-Net's.
Unit = Literal["plain", "recurrent", "residual", "recurrent_residual"]
HEAD_STRIDE = 4  # the coarsest at which heads answer: it divides the sides of what an encoder sees


class Convolution(nn.Sequential):
    """3 x 3, batch norm, ReLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, kernel_size=3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class Recurrence(nn.Module):
    """One convolution, used 1 + t times: first on the input, then on the sum of the input and its last output.

    Liang and Hu, "Recurrent convolutional neural network for object recognition", CVPR 2015, whose feed-forward and
    recurrent weights are one here. Batch norm is shared too, and sees 1 + t batches a pass.
    """

    def __init__(self, channels: int, t: int) -> None:
        super().__init__()
        self.step = Convolution(channels, channels)
        self.t = t

    def forward(self, image: Tensor) -> Tensor:
        state = self.step(image)
        for _ in range(self.t):
            state = self.step(image + state)
        return state


class UnitNet(nn.Module):
    """Two convolutions or recurrences; those that add something to their input first bring it to their width."""

    def __init__(self, channels: int, width: int, unit: Unit, t: int) -> None:
        super().__init__()
        self.residual = unit in ("residual", "recurrent_residual")
        self.enter: nn.Module = nn.Identity()
        if unit != "plain":
            self.enter = nn.Conv2d(channels, width, kernel_size=1)
            channels = width
        if unit in ("recurrent", "recurrent_residual"):
            self.body = nn.Sequential(Recurrence(width, t), Recurrence(width, t))
        else:
            self.body = nn.Sequential(Convolution(channels, width), Convolution(width, width))

    def forward(self, image: Tensor) -> Tensor:
        entered = self.enter(image)
        answer = self.body(entered)
        return entered + answer if self.residual else answer


class R2UnetMaps(Stages):
    """A unit for each map, with 2 x 2 max pooling between them."""

    def __init__(self, widths: Sequence[int], unit: Unit, t: int, image_channels: int) -> None:
        first = UnitNet(image_channels, widths[0], unit, t)
        others = [nn.Sequential(nn.MaxPool2d(2), UnitNet(fine, coarse, unit, t)) for fine, coarse in pairwise(widths)]
        super().__init__([first, *others])


class R2Unet(Encoder):
    """The contracting half: maps at strides 1, 2, 4 and so on."""

    channel_counts = ANY_CHANNELS
    widths: tuple[PositiveInt, ...] = Field(
        default=(64, 128, 256, 512, 1024), min_length=2, max_length=6
    )  # the paper's
    unit: Unit = "recurrent_residual"  # the paper's
    t: PositiveInt = 2  # recurrences of a recurrent unit; the paper's

    def build(self, output_stride: int = 32, channels: int = RGB) -> EncoderNet:
        strides = tuple(2**level for level in range(len(self.widths)))
        if strides[-1] > output_stride:
            raise UserError(
                f"encoder r2unet: has a map at stride {strides[-1]}, and the decoder wants {output_stride} at most; "
                "give fewer widths, or choose another decoder"
            )
        multiple = max(HEAD_STRIDE, strides[-1])
        maps = R2UnetMaps(self.widths, self.unit, self.t, channels)
        mean, std = (constants_of(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return EncoderNet(maps, self.widths, strides, mean, std, multiple)


class UpStep(nn.Module):
    """A map at twice the resolution, joined with the skip there, and a unit."""

    def __init__(self, coarse: int, fine: int, unit: Unit, t: int, merge: str) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), Convolution(coarse, fine))
        self.merge = merge
        self.unit = UnitNet(2 * fine if merge == "cat" else fine, fine, unit, t)

    def forward(self, level: Tensor, skip: Tensor) -> Tensor:
        level = self.up(level)
        return self.unit(torch.cat([skip, level], dim=1) if self.merge == "cat" else skip + level)


class R2UnetDecoderNet(DecoderNet):
    """Coarse to fine; as wide as the encoder's maps."""

    last_kernel: ClassVar[int] = 1  # the paper's

    def __init__(self, channels: Sequence[int], unit: Unit, t: int, merge: str) -> None:
        super().__init__()
        self.out_channels = channels[0]
        self.steps = nn.ModuleList(
            UpStep(coarse, fine, unit, t, merge) for coarse, fine in pairwise(tuple(reversed(channels)))
        )

    def forward(self, features: Features) -> Tensor:
        level, *skips = reversed(features.maps)
        for step, skip in zip(self.steps, skips, strict=True):
            level = step(level, skip)
        return level


class R2UnetDecoder(Decoder):
    """The expanding half. Output at the stride of the finest map, 1 on encoder r2unet; every map half the next."""

    unit: Unit = "recurrent_residual"  # as in R2Unet
    t: PositiveInt = 2  # as in R2Unet
    merge: Literal["cat", "add"] = "cat"  # the paper's, which names the sum as the other way

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if not all(channels) or any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise UserError(
                "model.decoder: r2unet: wants maps with channels, each at twice the stride of the one before, not "
                f"{tuple(channels)} channels at strides {tuple(strides)}; use unet or segformer"
            )
        return R2UnetDecoderNet(channels, self.unit, self.t, self.merge)

"""Two encoder-decoders in a row: the first draws the image anew, without its noise, and the second segments that.

The joint network of Aspris 2021, which trains both halves at once. Either half is a DenseNet-121 (Huang et al.,
"Densely connected convolutional networks", CVPR 2017) whose stem has group norm and CELU, under a U-Net-like decoder of
seven blocks. Here the whole first half and the dense layers of the second are the encoder, which gives the drawn image
as the extra `reconstruction`; the decoder of this file is the rest of the second half. `halves: 1` is the single
network that the paper compares with.

The dense blocks and transitions are torchvision's. They fix the reading of the description: with 3 channels in and 1
out the single network has 17,897,889 weights, and both halves have 35,795,844, as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torchvision.models import DenseNet

from ssl_seg.config import UserError
from ssl_seg.models import (
    ANY_CHANNELS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RECONSTRUCTION,
    RGB,
    Decoder,
    DecoderNet,
    Encoder,
    EncoderNet,
    Features,
    Stages,
    constants_of,
)

GROUPS = 16  # of every group norm here; the paper's
STRIDES = (2, 4, 8, 16, 32, 32)  # of the maps: the stem, its pool, three transitions and the last dense block
TAPS = STRIDES[1:]  # of those that the decoder reads
MULTIPLE = 64  # the centre halves the last map once more
Width = Annotated[int, Field(gt=0, multiple_of=GROUPS)]


class UpBlock(nn.Module):
    """Join the skip, double the resolution, and two convolutions: in this order, or the pooled block would not fit."""

    def __init__(self, channels: int, skip: int, width: int, upsampling: str, merge: str) -> None:
        super().__init__()
        self.lift: nn.Module = nn.Identity()
        if merge == "add" and skip not in (0, channels):
            self.lift = nn.Conv2d(skip, channels, kernel_size=1, bias=False)
        self.merge = merge
        joined = channels + skip if merge == "cat" else channels
        if upsampling == "nearest":
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
        else:
            self.up = nn.ConvTranspose2d(joined, width, kernel_size=4, stride=2, padding=1, bias=False)
            joined = width
        self.body = nn.Sequential(
            nn.Conv2d(joined, width, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.CELU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.CELU(),
        )

    def forward(self, level: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None and self.merge == "cat":
            level = torch.cat([level, skip], dim=1)
        elif skip is not None:
            level = level + self.lift(skip)
        return self.body(self.up(level))


class StackedDecoderNet(DecoderNet):
    """From the last map, pooled, to stride 1. `channels` are those of the five maps at the strides `TAPS`."""

    last_kernel: ClassVar[int] = 1  # the paper's

    def __init__(self, channels: Sequence[int], widths: Sequence[int], upsampling: str, merge: str) -> None:
        super().__init__()
        self.out_channels = widths[-1]
        self.norm = nn.GroupNorm(GROUPS, channels[-1])  # on the way to the centre alone: the skip goes without
        self.pool = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)
        entering = (channels[-1], *widths)
        skips = (0, *reversed(channels), 0)  # none for the centre, and none at stride 2
        self.blocks = nn.ModuleList(
            UpBlock(own, skip, width, upsampling, merge)
            for own, skip, width in zip(entering, skips, widths, strict=False)
        )

    def forward(self, features: Features) -> Tensor:
        taps = features.maps[-len(TAPS) :]
        level = self.pool(self.norm(taps[-1]))  # stride 64
        skips = (None, *reversed(taps), None)
        for number, (block, skip) in enumerate(zip(self.blocks, skips, strict=True)):
            level = block(level, skip)
            if number == 1:
                # Two maps have stride 32; behind the first of their blocks the other one is still to come.
                level = self.pool(level)
        return level


class StackedDecoder(Decoder):
    """The decoder of either half: seven blocks, of which five join a map. Output at stride 1."""

    # The centre's first; the paper's.
    widths: tuple[Width, Width, Width, Width, Width, Width, Width] = (256, 256, 256, 256, 64, 32, 32)
    # The paper has both. transposed: a 4 x 4 convolution from all joined channels to the block's width.
    upsampling: Literal["nearest", "transposed"] = "nearest"
    # The paper has both. add: where the numbers of channels differ, after a 1 x 1 convolution, which is ours.
    merge: Literal["cat", "add"] = "cat"

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if tuple(strides[-len(TAPS) :]) != TAPS:
            raise UserError(
                f"model.decoder: stacked: wants maps at strides {TAPS}, not {tuple(strides)}; use encoder stacked, or "
                "decoder unet or segformer"
            )
        taps = tuple(channels[-len(TAPS) :])
        if not all(taps) or taps[-1] % GROUPS:
            raise UserError(
                f"model.decoder: stacked: wants channels in every map, of the last a multiple of {GROUPS}, not {taps}; "
                "use decoder unet or segformer"
            )
        return StackedDecoderNet(taps, self.widths, self.upsampling, self.merge)


class DenseMaps(Stages):
    """DenseNet up to its last dense block: six maps, each part's output."""

    def __init__(self, growth_rate: int, blocks: tuple[int, int, int, int], width: int, image_channels: int) -> None:
        layers = DenseNet(growth_rate, blocks, num_init_features=width, num_classes=1).features
        parts = {name: part for name, part in layers.named_children() if name not in ("norm0", "relu0", "norm5")}
        if image_channels != RGB:  # torchvision's takes RGB alone
            parts["conv0"] = nn.Conv2d(image_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(parts["conv0"].weight)  # as torchvision's begins
        super().__init__(
            [
                nn.Sequential(parts["conv0"], nn.GroupNorm(GROUPS, width), nn.CELU()),
                parts["pool0"],
                *(nn.Sequential(parts[f"denseblock{n}"], parts[f"transition{n}"]) for n in (1, 2, 3)),
                parts["denseblock4"],
            ]
        )


class TwoHalves(nn.Module):
    """A whole network that draws the image, and the maps of a second one that looks at the drawing."""

    mean: Tensor  # (1, C, 1, 1), as is std
    std: Tensor

    def __init__(
        self,
        first: DenseMaps,
        decoder: DecoderNet,
        second: DenseMaps,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.first = first
        self.decoder = decoder
        # As torch starts it, not near zero as a head's: the second half has to see the image from the first step on.
        self.last = nn.Conv2d(decoder.out_channels, len(mean), decoder.last_kernel, padding=decoder.last_kernel // 2)
        self.second = second
        # The constants by which `EncoderNet` normalizes. Both halves see normalized images; what is given is not.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Features:
        drawn = self.last(self.decoder(Features(self.first(image), STRIDES)))
        return Features(self.second(drawn), STRIDES, {RECONSTRUCTION: drawn * self.std + self.mean})


class Stacked(Encoder):
    """All but the last decoder of one DenseNet-121 encoder-decoder or of two in a row."""

    channel_counts = ANY_CHANNELS
    halves: Literal[1, 2] = 2  # 2 draws the image first; 1 is the paper's baseline, which does not
    # DenseNet-121's, as is the paper's network.
    growth_rate: PositiveInt = 32
    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (6, 12, 24, 16)
    width: Width = 64
    decoder: StackedDecoder = StackedDecoder()  # of the first half; `model.decoder` is that of the second

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.halves == 1 and self.decoder != StackedDecoder():
            raise ValueError("decoder: is that of the first of two halves; give model.decoder, or halves: 2")
        last = self.channels[-1]
        if last % GROUPS:
            raise ValueError(
                f"the last map has {last} channels, no multiple of {GROUPS}; choose another growth_rate or blocks"
            )
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the maps."""
        found = [self.width, self.width]
        for number in self.blocks:
            found.append((found[-1] + number * self.growth_rate) // 2)
        found[-1] = found[-2] + self.blocks[-1] * self.growth_rate  # a transition halves each, but for the last
        return tuple(found)

    def build(self, output_stride: int = 32, channels: int = RGB) -> EncoderNet:
        if output_stride != 32:
            raise UserError("encoder stacked: has stride 32 only; choose another decoder")
        mean, std = (constants_of(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
        maps = DenseMaps(self.growth_rate, self.blocks, self.width, channels)
        if self.halves == 1:
            return EncoderNet(maps, self.channels, STRIDES, mean, std, MULTIPLE)
        second = DenseMaps(self.growth_rate, self.blocks, self.width, channels)
        backbone = TwoHalves(maps, self.decoder.build(self.channels, STRIDES), second, mean, std)
        return EncoderNet(backbone, self.channels, STRIDES, mean, std, MULTIPLE, extras=(RECONSTRUCTION,))

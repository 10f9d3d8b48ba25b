"""SegNet-basic: two stages of 7 x 7 convolutions, small enough to train from scratch on a CPU.

The smaller network of SegNet's paper (see `segnet`) has four stages of 64 channels; this is the form of two stages, of
which nothing is coarser than stride 4. As in the paper convolutions have no bias, batch norm follows each, and the
decoder has no ReLU. Its authors' code normalizes the image by local response norm, and classifies by a 1 x 1
convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.models import ANY_CHANNELS, RGB, Decoder, DecoderNet, Encoder, EncoderNet, Features
from ssl_seg.models.segnet import initialized, max_pool, max_unpool

WIDTH = 64  # the paper's, of every stage
KERNEL = 7  # the paper's: a wide context for so few layers
STRIDES = (1, 2, 4)
WIDTHS = (WIDTH, WIDTH, WIDTH)
POOLS = ("pool_1", "pool_2")


class SegNetBasic(Encoder):
    """Two stages of convolution, batch norm, ReLU and pooling, behind a local response norm of the image.

    The maps are each stage's before its pooling, and the last pooling's.
    """

    channel_counts = ANY_CHANNELS

    def build(self, output_stride: int = 32, channels: int = RGB) -> EncoderNet:
        # Local response norm has constants for values of 0 to 255: of smaller ones it would change nothing.
        mean, std = [0.0] * channels, [1 / 255] * channels
        return EncoderNet(BasicLayers(channels), WIDTHS, STRIDES, mean, std, STRIDES[-1], extras=POOLS)


class BasicLayers(nn.Module):
    def __init__(self, image_channels: int) -> None:
        super().__init__()
        # Over the three colours: the window is wider. Constants of Krizhevsky et al., NeurIPS 2012, as Caffe has them.
        self.norm = nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75)
        self.stages = nn.ModuleList(
            initialized(nn.Sequential(_convolution(before), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)))
            for before in (image_channels, WIDTH)
        )

    def forward(self, image: Tensor) -> Features:
        level = self.norm(image)
        maps: list[Tensor] = []
        extras: dict[str, Tensor] = {}
        for name, stage in zip(POOLS, self.stages, strict=True):
            maps.append(stage(level))
            level, extras[name] = max_pool(maps[-1])
        return Features([*maps, level], STRIDES, extras)


class SegNetBasicDecoder(Decoder):
    """Two stages of unpooling, convolution and batch norm. Output at stride 1, with a last layer of 1 x 1."""

    @property
    def required_extras(self) -> tuple[str, ...]:
        return POOLS

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if (channels[-1], strides[-1]) != (WIDTH, STRIDES[-1]):
            raise UserError(
                f"model.decoder: segnet_basic: wants {WIDTH} channels at stride {STRIDES[-1]} as the last map, not "
                f"{channels[-1]} at {strides[-1]}; choose encoder segnet_basic"
            )
        return BasicNet()


class BasicNet(DecoderNet):
    out_channels = WIDTH
    last_kernel: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            initialized(nn.Sequential(_convolution(WIDTH), nn.BatchNorm2d(WIDTH))) for _ in POOLS
        )

    def forward(self, features: Features) -> Tensor:
        level = features[-1]
        for name, stage in zip(reversed(POOLS), self.stages, strict=True):
            level = stage(max_unpool(level, features.extras[name]))
        return level


def _convolution(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, WIDTH, KERNEL, padding=KERNEL // 2, bias=False)

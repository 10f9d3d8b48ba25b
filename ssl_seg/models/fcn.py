"""FCN: the scores of a few maps, added. The simplest decoder there is, and the oldest.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import UserError
from ssl_seg.models import Decoder, DecoderNet, Features

STRIDES = (32, 16, 8)  # of the maps in the order in which they join


class FCN(Decoder):
    """FCN-32s, FCN-16s or FCN-8s by `stride`, at which its output is: a 1 x 1 convolution of each map, coarse to fine.

    The sum so far is upsampled bilinearly, as the paper's deconvolutions are when they start. There is no activation:
    with the head's last layer, of 1 x 1 too, each map gives scores of classes that are added, as in the paper. The
    layers of 4096 channels that VGG has behind its last map are not part of it.
    """

    stride: Literal[8, 16, 32] = 8  # the paper's best
    channels: PositiveInt = 256  # more than there are classes; with fewer they would share what scores them

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        wanted = [stride for stride in STRIDES if stride >= self.stride]
        if not set(wanted) <= set(strides) or strides[-1] != wanted[0]:
            raise UserError(
                f"model.decoder: fcn: wants maps at strides {tuple(reversed(wanted))}, the last of them at 32, not "
                f"{tuple(strides)}; use unet or segformer"
            )
        levels = [strides.index(stride) for stride in wanted]
        return FCNNet([channels[level] for level in levels], levels, self.channels)


class FCNNet(DecoderNet):
    last_kernel: ClassVar[int] = 1

    def __init__(self, channels: Sequence[int], levels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.levels = tuple(levels)  # of the maps that are used, coarse to fine
        self.scores = nn.ModuleList(nn.Conv2d(width, out_channels, kernel_size=1) for width in channels)

    def forward(self, features: Features) -> Tensor:
        coarsest, *finer = [score(features[level]) for score, level in zip(self.scores, self.levels, strict=True)]
        summed = coarsest
        for scored in finer:
            summed = scored + F.interpolate(summed, size=scored.shape[-2:], mode="bilinear")
        return summed

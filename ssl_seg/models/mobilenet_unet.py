"""MobileNetV2 with a U-Net of transposed convolutions: that of Goswami and Kumarasamy (2020).

It is the network of TensorFlow's tutorial "Image segmentation": a MobileNetV2 (Sandler et al., CVPR 2018), which they
freeze, tapped where its maps are widest, and the up-sampling blocks of pix2pix (Isola et al., CVPR 2017). For three
classes it has 6,504,227 parameters as Keras counts them, with the running statistics of batch norm.

What differs from theirs, and why:

- The weights are timm's, whose strided convolutions pad on both sides where Keras pads right and below. So do the
  transposed ones here: a pixel of a map is centred on the same pixel of the image on the way down and on the way up.
- The last layer starts near 0 (`near_zero`), as every last layer here; theirs starts as Glorot and Bengio (2010).
- Batch norm has torch's epsilon and momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.models import Decoder, DecoderNet, Features, near_zero
from ssl_seg.models.timm import Timm
from ssl_seg.models.timm_maps import Look, Maps, MapShape

FAMILY = "mobilenetv2_"
TAPPED = (1, 2, 3, 5)  # the stages whose first block widens the map and then halves it: Keras's blocks 1, 3, 6, 13
LAST = 6  # the stage whose projection is the coarsest map: Keras's block 16
HALVING = (2, 4, 8, 16, 32)
PIX2PIX_STD = 0.02  # of the weights at the start
Four = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class MobilenetUnet(Timm):
    """MobileNetV2 by its expanded maps: 96, 144, 192 and 576 channels at strides 2 to 16, and 320 at stride 32.

    An expanded map is what the first norm and activation of a block give, before its depthwise convolution halves it.
    The coarsest is the last projection, before its norm. What lies behind it (that norm, the 1280 channels of the
    classifier) is left out.
    """

    # Its width and depth by timm's names: mobilenetv2_035, _050, _075, _100 and _140 are multiples of the width, _110d
    # and _120d are deeper too. 1.0 is the paper's.
    name: str = "mobilenetv2_100"

    @field_validator("name")
    @classmethod
    def _is_mobilenet(cls, name: str) -> str:
        if not name.startswith(FAMILY):
            raise ValueError(f"'{name}' is no MobileNetV2; give {FAMILY}100 or another width, or encoder type timm")
        return name

    def backbone_of(self, network: nn.Module, look: Look, output_stride: int) -> ExpandedMaps:
        return ExpandedMaps(network, look, self.name, self.options)


class ExpandedMaps(Maps):
    """The maps of timm's MobileNetV2 from inside its blocks; its weights keep their names."""

    def __init__(self, network: nn.Module, look: Look, name: str, options: dict[str, Any]) -> None:
        blocks = cast("Any", network).blocks
        widest = [blocks[stage][0].conv_pw.out_channels for stage in TAPPED]
        blocks[LAST] = blocks[LAST][:1]
        last = blocks[LAST][0]
        last.bn3 = nn.Identity()
        tapped = zip([*widest, last.conv_pwl.out_channels], look.strides, strict=True)
        super().__init__(network, replace(look, shapes=tuple(MapShape(*shape) for shape in tapped)), name, options)

    def forward(self, image: Tensor) -> list[Tensor]:
        network = cast("Any", self.network)
        level = network.bn1(network.conv_stem(image))
        maps = []
        for number, stage in enumerate(network.blocks):
            if number not in TAPPED:
                level = stage(level)
                continue
            first, *others = stage
            maps.append(first.bn1(first.conv_pw(level)))
            level = _narrowed(first, maps[-1])
            for block in others:
                level = block(level)
        return [*maps, level]


def _narrowed(block: Any, expanded: Tensor) -> Tensor:
    """The rest of timm's block, from its expanded map on; one that halves the map has no skip."""
    level = block.bn2(block.conv_dw(expanded))
    level = block.se(block.aa(level))
    return block.bn3(block.conv_pwl(level))


class MobilenetUnetDecoder(Decoder):
    """Transposed convolutions of stride 2, each with the encoder's map beside it; so is the last layer. Output at 1."""

    channels: Four = (512, 256, 128, 64)  # the paper's, at strides 16 to 2

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if tuple(strides) != HALVING:
            raise UserError(
                f"model.decoder: {self.type}: wants maps at strides {HALVING}, not {tuple(strides)}; use unet or "
                "segformer"
            )
        return TransposedNet(channels, self.channels)


class TransposedNet(DecoderNet):
    """Its map has stride 2; `last_layer` makes the last step."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        *skips, inputs = channels
        self.ups = nn.ModuleList()
        for width, skip in zip(widths, reversed(skips), strict=True):
            self.ups.append(_up(inputs, width))
            inputs = width + skip
        self.out_channels = inputs

    def forward(self, features: Features) -> Tensor:
        *skips, level = features
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            level = torch.cat([up(level), skip], dim=1)
        return level

    def last_layer(self, out_channels: int) -> nn.Module:
        return near_zero(_doubling(self.out_channels, out_channels, bias=True))


def _up(inputs: int, width: int) -> nn.Module:
    """An up-sampling block of pix2pix."""
    doubling = _doubling(inputs, width, bias=False)
    nn.init.normal_(doubling.weight, std=PIX2PIX_STD)
    return nn.Sequential(doubling, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _doubling(inputs: int, width: int, bias: bool) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, width, kernel_size=3, stride=2, padding=1, output_padding=1, bias=bias)

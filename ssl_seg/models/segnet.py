"""SegNet: VGG16's convolutions, and a decoder that puts each value back where max pooling found it.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
IEEE TPAMI 39(12), 2017. What goes from the encoder to the decoder is the coarsest map and, of each pooling, where in
its 2 x 2 window the largest value was: two bits, kept in a byte, in place of the maps that a U-Net's skips carry.

Pooling and its inverse are ours: torch's keep the place as the index of a pixel in the image, eight bytes a value, and
its `max_unpool2d` is refused on a GPU where algorithms have to be deterministic. What they give is torch's to the bit.

Bayesian SegNet (Kendall, Badrinarayanan and Cipolla, BMVC 2017) is the same with dropout of 0.5 in the middle of the
network: `dropout: 0.5` of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field, PositiveInt, ValidationError, field_validator
from torch import Tensor, nn

from ssl_seg.config import PathText, UserError
from ssl_seg.models import ANY_CHANNELS, RGB, Decoder, DecoderNet, Encoder, EncoderNet, Features
from ssl_seg.models.smp import atrous_pyramid, require_two_images
from ssl_seg.models.timm import Timm

VGG = "vgg16_bn"  # timm's name
WIDTHS = (64, 128, 256, 512, 512)  # of VGG16's stages, between which it pools
DEPTHS = (2, 2, 3, 3, 3)  # their numbers of convolutions
STRIDES = (2, 4, 8, 16, 32)
POOLS = tuple(f"pool_{number}" for number in range(1, len(WIDTHS) + 1))
CENTRAL = 3  # stages of the encoder, and of the decoder, that Bayesian SegNet puts dropout behind


class SegNet(Encoder):
    """VGG16's 13 convolutions (Simonyan and Zisserman, ICLR 2015), each with batch norm, and five poolings.

    The maps are those of timm's vgg16_bn: the last layer's before each pooling, and the last pooling's. The first, of
    stride 1, is left out.
    """

    channel_counts = ANY_CHANNELS
    pretrained: bool | PathText = False  # the words of encoder timm, for its network vgg16_bn
    dropout: float = Field(default=0.0, ge=0, lt=1)  # SegNet's; Bayesian SegNet has 0.5

    @field_validator("pretrained")
    @classmethod
    def _names_weights(cls, pretrained: bool | str) -> bool | str:
        try:
            Timm(name=VGG, pretrained=pretrained)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return pretrained

    @property
    def weights_file(self) -> str | None:
        """The file that `pretrained` names, as it was written."""
        return self._vgg.weights_file

    def published_tensors(self) -> tuple[Path, Mapping[str, Tensor]] | None:
        return self._vgg.published_tensors()

    @property
    def _vgg(self) -> Timm:
        # Of VGG's 138 million weights 124 are in the classifier, which gives no map: it is made narrow, unless a file's
        # has to fit.
        options = {} if self.pretrained else {"mlp_ratio": 0.001}
        return Timm(name=VGG, pretrained=self.pretrained, options=cast("dict[str, Any]", options))

    def build(self, output_stride: int = 32, channels: int = RGB) -> EncoderNet:
        if output_stride != STRIDES[-1]:
            raise UserError(
                f"encoder segnet: pools down to stride 32, not {output_stride}; choose a decoder for stride 32 "
                "(segnet, unet, fpn; deeplabv3plus with encoder_stride: 32), or another encoder"
            )
        vgg = self._vgg.build(channels=channels)
        backbone = PoolingLayers(cast("nn.Module", vgg.backbone.network), self.dropout)
        mean, std = (values.flatten().tolist() for values in (vgg.mean, vgg.std))
        return EncoderNet(backbone, vgg.channels, STRIDES, mean, std, vgg.multiple, extras=POOLS)


class PoolingLayers(nn.Module):
    """The layers of a VGG, under the names that they have in files of VGG's weights (`features.0.weight`)."""

    def __init__(self, vgg: nn.Module, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(*vgg.children())
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Features:
        level = image
        maps: list[Tensor] = []
        extras: dict[str, Tensor] = {}
        for layer in self.features:
            if not isinstance(layer, nn.MaxPool2d):
                level = layer(level)
                continue
            name = POOLS[len(maps)]
            maps.append(level)
            level, extras[name] = max_pool(level)
            if name in POOLS[-CENTRAL:]:
                level = self.dropout(level)
        return Features([*maps[1:], level], STRIDES, extras)


class SegNetDecoder(Decoder):
    """The mirror image of encoder segnet: five unpoolings, each with as many convolutions as its stage has there.

    Each of the 13 has batch norm and ReLU. Of the maps it reads the coarsest alone. Output at stride 1.

    With `aspp` the pyramid of DeepLabV3 follows at full resolution (SegNet-ASPP, Fischer and Malhotra 2021).
    """

    dropout: float = Field(default=0.0, ge=0, lt=1)  # SegNet's; Bayesian SegNet has 0.5
    aspp: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None  # atrous rates; SegNet-ASPP's are 6, 12 and 18
    aspp_dropout: float = Field(default=0.5, ge=0, lt=1)  # as in DeepLabV3Plus; only where there is a pyramid

    @property
    def required_extras(self) -> tuple[str, ...]:
        return POOLS

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if (channels[-1], strides[-1]) != (WIDTHS[-1], STRIDES[-1]):
            raise UserError(
                f"model.decoder: segnet: wants {WIDTHS[-1]} channels at stride {STRIDES[-1]} as the last map, not "
                f"{channels[-1]} at {strides[-1]}; choose encoder segnet"
            )
        return UnpoolingNet(self)


class UnpoolingNet(DecoderNet):
    def __init__(self, config: SegNetDecoder) -> None:
        super().__init__()
        self.out_channels = WIDTHS[0]
        narrower = (WIDTHS[0], *WIDTHS[:-1])
        stages = [_stage(*shape) for shape in zip(WIDTHS, narrower, DEPTHS, strict=True)]
        self.stages = nn.ModuleList(reversed(stages))
        self.dropout = nn.Dropout(config.dropout)
        self.aspp = None if config.aspp is None else atrous_pyramid(WIDTHS[0], config.aspp, config.aspp_dropout)

    def forward(self, features: Features) -> Tensor:
        if self.aspp is not None:
            require_two_images(self.aspp, features)
        level = features[-1]
        for number, (name, stage) in enumerate(zip(reversed(POOLS), self.stages, strict=True)):
            level = stage(max_unpool(level, features.extras[name]))
            if number < CENTRAL:
                level = self.dropout(level)
        return level if self.aspp is None else self.aspp(level)


def _stage(channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """`depth` convolutions with batch norm and ReLU; the last one changes the width."""
    layers: list[nn.Module] = []
    for width in (*[channels] * (depth - 1), out_channels):
        layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return initialized(nn.Sequential(*layers))


def initialized(layers: nn.Sequential) -> nn.Sequential:
    """Convolutions as SegNet's begin: normal weights of He et al., ICCV 2015, and no bias."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return layers


# ---- pooling and its inverse ----


def max_pool(level: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each 2 x 2 window, and where in it the first such is: uint8, 0 to 3, row by row.

    Both (B, C, H / 2, W / 2), of even sides.
    """
    return _Pool.apply(level)


def max_unpool(level: Tensor, positions: Tensor) -> Tensor:
    """Each value at its place in a window of 2 x 2 pixels, zeros beside it: (B, C, H, W) to (B, C, 2 H, 2 W)."""
    return _Spread.apply(level, positions)


def _windows(level: Tensor) -> list[Tensor]:
    """The pixels of all 2 x 2 windows by their place in it, as views: (B, C, H / 2, W / 2) each."""
    return [level[..., row::2, column::2] for row in range(2) for column in range(2)]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, level: Tensor) -> tuple[Tensor, Tensor]:
        first, second, third, last = _windows(level)
        pooled = torch.maximum(torch.maximum(first, second), torch.maximum(third, last))
        # 0 where it is the first; else 1 where it is the second; else 2, or 3 where it is not the third either.
        positions = (third != pooled).to(torch.uint8).add_(1)
        positions.mul_(second != pooled).add_(1)
        positions.mul_(first != pooled)
        ctx.save_for_backward(positions)
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)
        return pooled, positions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (positions,) = ctx.saved_tensors
        return None if gradients[0] is None else _Spread.apply(gradients[0], positions)


class _Spread(torch.autograd.Function):
    """Its derivative is `_Gather`, and the other way round: both are linear, and can be derived any number of times."""

    @staticmethod
    def forward(ctx: Any, level: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        batch, channels, height, width = level.shape
        is_last = level.is_contiguous(memory_format=torch.channels_last) and not level.is_contiguous()
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        size = (batch, channels, 2 * height, 2 * width)
        spread = torch.empty(size, dtype=level.dtype, device=level.device, memory_format=memory_format)
        for place, pixels in enumerate(_windows(spread)):
            pixels.copy_(torch.where(positions == place, level, 0))
        return spread

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradients[0], *ctx.saved_tensors), None


class _Gather(torch.autograd.Function):
    """The values at the places that `_Spread` fills: (B, C, 2 H, 2 W) to (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, level: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        gathered, *others = _windows(level)
        for place, pixels in enumerate(others, start=1):
            gathered = torch.where(positions == place, pixels, gathered)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(gradients[0], *ctx.saved_tensors), None

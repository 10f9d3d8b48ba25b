"""Decoders from segmentation_models_pytorch (smp): unet, unetplusplus, fpn, deeplabv3plus, upernet and segformer.

The only user of smp, whose decoder classes are semi-public: what it may change is mended here. Its decoders want one
more map, of stride 1, in front (the image); they look at its size alone, so it is given without channels. Weights start
as smp starts them.

Which maps they need:

- unet: any number of maps, at any strides; its `channels` has a number for each of those coarser than stride 1.
- unetplusplus: five, at strides 2, 4, 8, 16 and 32.
- fpn: the last four at strides 4, 8, 16 and 32.
- deeplabv3plus: the second at stride 4, and the last at its `encoder_stride`.
- upernet: two or more, the first two at strides 2 and 4.
- segformer: any number of maps, at any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PositiveInt
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP, DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import Conv3x3GNReLU, FPNDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.models import Decoder, DecoderNet, Features
from ssl_seg.norm.convert import has_batch_norm

HALVING = (2, 4, 8, 16, 32)
IMAGE_CHANNELS = 3  # of the stride-1 map that smp's encoders put in front; its decoders never use them
SQUEEZE = 16  # smp's scse attention divides the channels by this
FPN_GROUPS = 32  # smp's FPN has group norm with this many groups
Five = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class SmpNet(DecoderNet):
    """A decoder of smp behind the contract."""

    def __init__(self, decoder: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.out_channels = out_channels

    def forward(self, features: Features) -> Tensor:
        last = features[-1]
        image = last.new_empty(last.shape[0], 0, *features.size)  # `len` would fix the batch in a traced program
        return self.decoder([image, *features])


class PoolingNet(SmpNet):
    """One that pools the whole image to a single value a channel."""

    def forward(self, features: Features) -> Tensor:
        require_two_images(self.decoder, features)
        return super().forward(features)


class Unet(Decoder):
    """U-Net (Ronneberger et al., MICCAI 2015): every map joins again, coarse to fine. Output at stride 1.

    `channels` goes along: a number for each step to a finer map, the last of which is the step to stride 1.
    """

    channels: tuple[PositiveInt, ...] = (256, 128, 64, 32, 16)  # smp's, at strides 16 to 1
    attention: Literal["scse"] | None = None  # squeeze and excitation, Roy et al., MICCAI 2018
    interpolation: Literal["nearest", "bilinear"] = "nearest"  # smp's
    # Two more convolutions at the coarsest map; smp adds them for VGG, whose last map is a bare pool.
    center: bool = False

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        steps = sum(stride > 1 for stride in strides)
        if len(self.channels) != steps:
            such = [16 * 2**level for level in reversed(range(steps))]
            raise UserError(
                f"model.decoder.channels: unet: wants {steps} numbers for maps at strides {tuple(strides)}, not "
                f"{len(self.channels)}; give {steps}, such as {such}"
            )
        _require_wide(self, self.channels, self.attention)
        decoder = UnetDecoder(
            encoder_channels=[IMAGE_CHANNELS, *channels],
            decoder_channels=self.channels,
            n_blocks=steps,
            attention_type=self.attention,
            interpolation_mode=self.interpolation,
            add_center_block=self.center,
        )
        if strides[0] > 1:
            decoder.blocks[-1].attention1 = nn.Identity()  # smp uses it on skips only, and this block has none
        initialize_decoder(decoder)
        return SmpNet(decoder, self.channels[-1])


class UnetPlusPlus(Decoder):
    """U-Net++ (Zhou et al., DLMIA 2018): U-Net with nested dense skips. Output at stride 1; every map half the next."""

    channels: Five = (256, 128, 64, 32, 16)  # smp's, at strides 16 to 1
    attention: Literal["scse"] | None = None  # as in Unet
    interpolation: Literal["nearest", "bilinear"] = "nearest"  # smp's

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        _require_strides(self, HALVING, strides, strides)
        _require_wide(self, [*channels, *self.channels], self.attention)
        decoder = UnetPlusPlusDecoder(
            encoder_channels=[IMAGE_CHANNELS, *channels],
            decoder_channels=self.channels,
            attention_type=self.attention,
            interpolation_mode=self.interpolation,
        )
        decoder.blocks[f"x_0_{decoder.depth}"].attention1 = nn.Identity()  # as in Unet
        initialize_decoder(decoder)
        return SmpNet(decoder, self.channels[-1])


class FPN(Decoder):
    """Feature pyramid (Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019). Output at stride 4.

    It has group norm throughout; stride 2 is not used.
    """

    pyramid_channels: PositiveInt = 256  # the paper's
    channels: PositiveInt = Field(default=128, multiple_of=FPN_GROUPS)  # the paper's
    merge: Literal["add", "cat"] = "add"  # the paper's
    dropout: float = Field(default=0.2, ge=0, lt=1)  # smp's, of whole channels
    interpolation: Literal["nearest", "bilinear"] = "nearest"  # smp's, top-down

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        _require_strides(self, HALVING[1:], strides, strides[-4:])
        decoder = FPNDecoder(
            encoder_channels=[IMAGE_CHANNELS, *channels],
            pyramid_channels=self.pyramid_channels,
            segmentation_channels=self.channels,
            merge_policy=self.merge,
            dropout=self.dropout,
            interpolation_mode=self.interpolation,
        )
        for layer in list(decoder.modules()):
            if isinstance(layer, Conv3x3GNReLU) and layer.upsample:
                # smp aligns corners here, which moves the coarse maps by an amount that depends on the image's size.
                layer.upsample = False
                layer.block.append(nn.Upsample(scale_factor=2, mode="bilinear"))
        initialize_decoder(decoder)
        return SmpNet(decoder, decoder.out_channels)


class DeepLabV3Plus(Decoder):
    """DeepLabV3+ (Chen et al., ECCV 2018): atrous pyramid on a dilated encoder, one skip. Output at stride 4.

    Only the map of stride 4 and the last are used.
    """

    encoder_stride: Literal[8, 16, 32] = 16  # the paper's; 32 is for encoders that cannot be dilated
    channels: PositiveInt = 256  # the paper's
    atrous_rates: tuple[PositiveInt, PositiveInt, PositiveInt] = (12, 24, 36)  # smp's; the paper has 6, 12, 18 at 16
    separable: bool = True  # the paper's
    dropout: float = Field(default=0.5, ge=0, lt=1)  # smp's

    @property
    def output_stride(self) -> int:
        return self.encoder_stride

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if (*strides[1:2], *strides[-1:]) != (4, self.encoder_stride):
            raise UserError(
                f"model.decoder: deeplabv3plus: wants strides 4 and {self.encoder_stride}, as the second map and the "
                f"last, not {tuple(strides)}; set encoder_stride, or use unet or segformer"
            )
        decoder = DeepLabV3PlusDecoder(
            encoder_channels=[IMAGE_CHANNELS, *channels],
            encoder_depth=len(channels),  # pyright: ignore[reportArgumentType]  # it takes any number from 3 on
            out_channels=self.channels,
            atrous_rates=self.atrous_rates,
            output_stride=16,
            aspp_separable=self.separable,
            aspp_dropout=self.dropout,
        )
        # smp aligns corners here, which moves the coarse map by an amount that depends on the image's size.
        decoder.up = nn.Upsample(scale_factor=self.encoder_stride // 4, mode="bilinear")
        return PoolingNet(decoder, self.channels)


class UPerNet(Decoder):
    """UPerNet (Xiao et al., ECCV 2018): pyramid pooling on a feature pyramid. Output at stride 4; stride 2 not used."""

    channels: PositiveInt = 256  # smp's; the paper has 512

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        _require_strides(self, HALVING[:2], strides, strides[:2])
        decoder = UPerNetDecoder(encoder_channels=[IMAGE_CHANNELS, *channels], decoder_channels=self.channels)
        initialize_decoder(decoder)
        return PoolingNet(decoder, self.channels)


class Segformer(Decoder):
    """SegFormer's head (Xie et al., NeurIPS 2021): one linear layer a map, fused. Output at stride 4."""

    channels: PositiveInt = 256  # the paper's for its small networks

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        decoder = SegformerDecoder(encoder_channels=[IMAGE_CHANNELS, *channels], segmentation_channels=self.channels)
        initialize_decoder(decoder)
        return SmpNet(decoder, self.channels)


def atrous_pyramid(channels: int, rates: tuple[int, int, int], dropout: float) -> nn.Module:
    """DeepLabV3's atrous spatial pyramid pooling (Chen et al., 2017), which keeps channels and size.

    A 1 x 1 convolution, three 3 x 3 ones with these rates and the mean of the whole image, concatenated and mixed by a
    1 x 1 convolution; batch norm and ReLU behind each, dropout of single values at the end.
    """
    return ASPP(channels, channels, rates, separable=False, dropout=dropout)


def require_two_images(pooling: nn.Module, features: Features) -> None:
    """Raise UserError where batch norm of one value a channel, the mean of a single image, would learn."""
    if pooling.training and len(features[-1]) == 1 and has_batch_norm(pooling):
        raise UserError(
            "this decoder's batch norm needs 2 images or more a process; raise train.batch_size or use norm: group"
        )


def _require_strides(config: Decoder, wanted: Sequence[int], strides: Sequence[int], used: Sequence[int]) -> None:
    """Raise UserError unless the maps that are `used` of all `strides` have the wanted ones."""
    if tuple(used) != tuple(wanted):
        raise UserError(
            f"model.decoder: {config.type}: wants maps at strides {wanted}, not {tuple(strides)}; use unet or segformer"
        )


def _require_wide(config: Decoder, channels: Sequence[int], attention: str | None) -> None:
    narrow = [width for width in channels if 0 < width < SQUEEZE]
    if attention and narrow:
        raise UserError(
            f"model.decoder: {config.type}: attention: {attention} needs {SQUEEZE} channels or more, not {narrow[0]}"
        )

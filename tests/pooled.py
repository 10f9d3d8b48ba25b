"""A network beyond five maps: an encoder with a stride-1 map and extras, a decoder and a task that read them.

A plug-in module: commands are given `--plugin tests/pooled.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretext.denoise import Denoise
from ssl_seg.config import UserError
from ssl_seg.models import Decoder, DecoderNet, Encoder, EncoderNet, EncoderSpec, Features

STRIDES = (1, 2, 4)
INDICES = ("pool_2", "pool_4")  # of the pixels that max pooling kept, on the way to strides 2 and 4
SKETCH = "sketch"  # the image as an earlier stage draws it


class Pooled(Encoder):
    """Three levels with max pooling between them, the first of which sees a sketch beside the image."""

    width: int = 4

    def build(self, output_stride: int = 32) -> EncoderNet:
        channels = (self.width, 2 * self.width, 4 * self.width)
        return EncoderNet(PooledNet(channels), channels, STRIDES, multiple=4, extras=(*INDICES, SKETCH))


class PooledNet(nn.Module):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.sketch = nn.Conv2d(3, 3, 3, padding=1)
        pairs = zip((6, *channels), channels, strict=False)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairs
        )

    def forward(self, image: Tensor) -> Features:
        extras = {SKETCH: self.sketch(image)}
        maps = [self.levels[0](torch.cat([image, extras[SKETCH]], dim=1))]
        for name, level in zip(INDICES, self.levels[1:], strict=True):
            pooled, extras[name] = F.max_pool2d(maps[-1], 2, return_indices=True)
            maps.append(level(pooled))
        return Features(maps, STRIDES, extras)


class Unpooled(Decoder):
    """Puts each value back where max pooling found it, as SegNet does, and adds the finer map."""

    @property
    def required_extras(self) -> tuple[str, ...]:
        return INDICES

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        if tuple(strides) != STRIDES:
            raise UserError(f"model.decoder: unpooled: wants maps at strides {STRIDES}; choose encoder pooled")
        return UnpooledNet(channels)


class UnpooledNet(DecoderNet):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = channels[0]
        fine, middle, coarse = channels
        self.to_2 = nn.Conv2d(coarse, middle, 3, padding=1)
        self.to_1 = nn.Conv2d(middle, fine, 3, padding=1)

    def forward(self, features: Features) -> Tensor:
        fine, middle, coarse = features
        pool_2, pool_4 = (features.extras[name] for name in INDICES)
        at_2 = F.gelu(middle + F.max_unpool2d(self.to_2(coarse), pool_4, 2))
        return F.gelu(fine + F.max_unpool2d(self.to_1(at_2), pool_2, 2))


class Redraw(Denoise):
    """Denoising by the sketch itself: the head has no weights."""

    def head(self, encoder: EncoderSpec) -> nn.Module:
        if SKETCH not in encoder.extras:
            raise UserError(f"tasks.redraw: reads {SKETCH}, which model.encoder does not give; choose encoder pooled")
        return Sketch()


class Sketch(nn.Module):
    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        height, width = size
        return features.extras[SKETCH][..., :height, :width]

"""Prediction tile by tile, for images that are too large to be looked at whole.

Neighbouring tiles overlap. What a tile says of the outer quarter of an overlap is left out, since there the network
saw an edge that the image does not have (Ronneberger, Fischer and Brox, "U-Net", MICCAI 2015); over the half in the
middle the answer passes from the one tile to the other, so that no seam is seen. Tiles lie within the image and begin
where the network's strides do: wherever the network sees no farther than that quarter, and at the image's own edges
too, the answer is that of the whole image. U-Net mirrors the image about its edges, where answers then are not those
that the network is scored by.

Ours, since sliding windows elsewhere (MONAI's) keep the shares of all classes for the whole image: 3 GB for 8192 x 8192
pixels and 11 classes. Here those of half overlaps are kept, of one row of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import Config, UserError
from ssl_seg.images import Size
from ssl_seg.norm.convert import OneByOne
from ssl_seg.norm.layers import SwitchNorm2d
from ssl_seg.terminal import say

Look = Callable[[Tensor], Tensor]  # a tile (1, 3, h, w) in [0, 1] to figures of its pixels (C, h, w)
# What takes statistics of the image that is looked at.
BY_IMAGE: dict[type[nn.Module], str] = {
    nn.GroupNorm: "group norm's statistics",
    nn.InstanceNorm2d: "instance norm's statistics",
    SwitchNorm2d: "switch norm's statistics",
    OneByOne: "batch norm's statistics (statistics: image)",
}


class Tiles(Config):
    """How a large image is cut."""

    size: int = Field(default=768, ge=64)  # pixels of a side: a resnet18 U-Net then takes some 0.25 GB
    # Pixels that neighbours have in common: more cost time, (size / (size - overlap))^2 of the whole's, and show the
    # network more around what it says. A quarter of it is left out at each side.
    overlap: int = Field(default=192, ge=0)

    @model_validator(mode="after")
    def _tiles_differ(self) -> Self:
        if 2 * self.overlap > self.size:
            raise ValueError(f"overlap: {self.overlap} is more than half of the size, {self.size}; lower it")
        return self

    def refuse_one_size(self, resize: Size | None) -> None:
        """Raise UserError for a model that looks at every image at the size `resize`."""
        if resize is not None:
            raise UserError(f"tiles: the model looks at every image at {resize[0]} x {resize[1]} pixels; drop the key")

    def tell_norms(self, model: nn.Module) -> None:
        """Say where the model has norms whose statistics are then those of a tile."""
        told = of_norms(model)
        if told:
            say(f"tiles: of {self.size} pixels{told}")


class Block(NamedTuple):
    """A part of the image that is done."""

    rows: slice
    columns: slice
    values: Tensor  # (C, h, w)


@dataclass(frozen=True)
class _Span:
    """One tile along one side of the image."""

    start: int
    stop: int
    first: int  # of the pixels that it answers for
    last: int  # one past them; the first `blend` and the last `blend` of them are shared with its neighbours

    @property
    def own(self) -> slice:
        """What it answers for, counted from its start."""
        return slice(self.first - self.start, self.last - self.start)


def in_tiles(image: np.ndarray, look: Look, tiles: Tiles, multiple: int, device: torch.device) -> Iterator[Block]:
    """What `look` says of an image `(H, W, 3)` uint8, block by block; together the blocks cover it, each pixel once.

    `multiple` is that of the network's strides.
    """
    blend = _blend(tiles)
    rising = ((torch.arange(blend, device=device) + 0.5) / max(1, blend)).view(1, 1, blend)
    rows = _spans(image.shape[0], tiles, multiple)
    columns = _spans(image.shape[1], tiles, multiple)
    above: list[Tensor] = []  # of the row of tiles before, what is shared with this one
    for row in rows:
        left: Tensor | None = None
        below: list[Tensor] = []
        for place, column in enumerate(columns):
            seen = torch.from_numpy(np.ascontiguousarray(image[row.start : row.stop, column.start : column.stop]))
            tile = seen.to(device).permute(2, 0, 1)[None].float() / 255
            values = look(tile)[:, row.own, column.own]
            if left is not None:
                values[..., :blend] = torch.lerp(left, values[..., :blend], rising)
            if column is not columns[-1]:
                left = values[..., values.shape[-1] - blend :].clone()
                values = values[..., : values.shape[-1] - blend]
            if above:
                values[:, :blend] = torch.lerp(above[place], values[:, :blend], rising.transpose(1, 2))
            if row is not rows[-1]:
                below.append(values[:, values.shape[1] - blend :].clone())
                values = values[:, : values.shape[1] - blend]
            height, width = values.shape[1:]
            yield Block(slice(row.first, row.first + height), slice(column.first, column.first + width), values)
        above = below


class InTiles(nn.Module):
    """A model that looks at images larger than a tile tile by tile, as `in_tiles` does.

    There it answers by the logarithm of the joined shares, which takes the memory of all classes' shares of the whole
    image, and of the network at one tile.
    """

    def __init__(self, model: nn.Module, tiles: Tiles, multiple: int) -> None:
        super().__init__()
        self.model = model
        self.tiles = tiles
        self.multiple = multiple  # of the network's strides

    def forward(self, image: Tensor) -> Tensor:
        if max(image.shape[-2:]) <= self.tiles.size:
            return self.model(image)
        return torch.cat([self._joined(one)[None] for one in image])

    def largest(self, size: Sequence[int]) -> tuple[int, int]:
        """The size (H, W) of what is looked at at once, of an image of `size`."""
        height, width = size
        return min(height, self.tiles.size), min(width, self.tiles.size)

    def _joined(self, image: Tensor) -> Tensor:
        """`(3, H, W)` to `(K, H, W)`."""
        pixels = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
        whole: Tensor | None = None
        for block in in_tiles(pixels, self._shares, self.tiles, self.multiple, image.device):
            if whole is None:
                whole = block.values.new_empty((len(block.values), *image.shape[-2:]))
            whole[:, block.rows, block.columns] = block.values
        assert whole is not None
        return whole.clamp_(min=torch.finfo(whole.dtype).tiny).log_()

    def _shares(self, tile: Tensor) -> Tensor:
        logits = self.model(tile)
        if logits.shape[-2:] != tile.shape[-2:]:
            logits = F.interpolate(logits, size=tile.shape[-2:], mode="bilinear", align_corners=False)
        return logits[0].float().softmax(dim=0)


def _blend(tiles: Tiles) -> int:
    """Pixels over which the answer passes from one tile to the next."""
    return tiles.overlap // 2


def _spans(length: int, tiles: Tiles, multiple: int) -> list[_Span]:
    """The tiles along a side: all but the last begin `size - overlap` after one another, on the network's strides.

    The last one ends with the image, and overlaps its neighbour by more where the image wants it.
    """
    if length <= tiles.size:
        return [_Span(0, length, 0, length)]
    step = (tiles.size - tiles.overlap) // multiple * multiple
    if step == 0:
        raise UserError(
            f"tiles: of a size of {tiles.size} with an overlap of {tiles.overlap} begin less than {multiple} pixels "
            "after one another, which is the network's stride; give a larger size"
        )
    last = -(-(length - tiles.size) // multiple) * multiple
    starts = [*range(0, last, step), last]
    stops = [*(start + tiles.size for start in starts[:-1]), length]
    half = _blend(tiles) // 2
    seams = [(stop + start) // 2 for stop, start in zip(stops[:-1], starts[1:], strict=True)]
    firsts = [0, *(seam - half for seam in seams)]
    lasts = [*(first + _blend(tiles) for first in firsts[1:]), length]
    return [_Span(*numbers) for numbers in zip(starts, stops, firsts, lasts, strict=True)]


def of_norms(model: nn.Module) -> str:
    """A word about norms whose statistics are those of a tile, where the whole image's are others; '' without any."""
    layers = tuple(model.modules())
    found = [words for kind, words in BY_IMAGE.items() if any(isinstance(layer, kind) for layer in layers)]
    if not found:
        return ""
    return f"; {' and '.join(found)} are of each tile by itself, so masks differ from those of a whole image"

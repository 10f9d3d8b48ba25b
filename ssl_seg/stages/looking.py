"""What fine-tuned models say of one image, pixel by pixel: whole where there is memory for it, else tile by tile.

`predict` and `portrait` write what is said here; how tiles are cut and joined is `tiles`', what samples with dropout
differ by is `uncertainty`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ssl_seg import images
from ssl_seg.config import UserError
from ssl_seg.images import Size
from ssl_seg.models import SegmentationModel, evaluating
from ssl_seg.stages.scoring import (
    PREDICTION,
    SMALLER_IMAGES,
    Statistics,
    check_memory,
    logits_at,
    looks_at,
    memory_at_risk,
)
from ssl_seg.stages.tiles import Block, Tiles, in_tiles, of_norms
from ssl_seg.stages.uncertainty import DropoutSampling, check_dropout, probabilities, sample
from ssl_seg.terminal import say
from ssl_seg.training.memory import enough_memory


@dataclass(frozen=True)
class Looker:
    """A model, and how it is asked."""

    model: SegmentationModel
    asked: nn.Module  # the same, with the statistics that are wanted
    resize: Size | None  # that it wants images in
    device: torch.device
    tiles: Tiles | None = None  # None: whole, and in tiles where the memory of a CPU may not do
    sampling: DropoutSampling | None = None

    @classmethod
    def of(
        cls,
        model: SegmentationModel,
        resize: Size | None,
        device: torch.device,
        statistics: Statistics = "running",
        tiles: Tiles | None = None,
        sampling: DropoutSampling | None = None,
    ) -> Self:
        """Raises UserError where the model cannot be asked so."""
        if sampling is not None:
            check_dropout(model)
        if tiles is not None and resize is not None:
            raise UserError(f"tiles: the model looks at every image at {resize[0]} x {resize[1]} pixels; drop the key")
        model = model.to(device)
        asked = looks_at(model, statistics).of(model)
        if tiles is not None and (told := of_norms(asked)):
            say(f"tiles: of {tiles.size} pixels{told}")
        return cls(model, asked, resize, device, tiles, sampling)

    def blocks(self, image: np.ndarray, name: str, shares: bool = True) -> Iterator[Block]:
        """Figures of an image `(H, W, 3)` uint8, block by block; together the blocks cover it, each pixel once.

        A block's values are `(K, h, w)`, the share of each class in [0, 1], and last how far samples differ, where they
        are asked for. Without `shares` they may be logits: the class is the largest of them all the same. Raises
        UserError for an image that is too large for the memory, or too small for the network.
        """
        size = image.shape[:2]
        with evaluating(self.asked):
            tiles = None if self.resize is not None else self._tiles(size, name)
            if tiles is not None:
                look = partial(self._figures, name=name)
                yield from in_tiles(image, look, tiles, self.model.encoder.multiple, self.device)
                return
            seen = image
            if self.resize is not None:
                check_memory(self.asked, self.resize, "predicting", size)
                seen = images.resize_image(image, self.resize)
            batch = torch.from_numpy(seen).permute(2, 0, 1)[None].to(self.device).float() / 255
            whole = slice(0, size[0]), slice(0, size[1])
            if shares or self.sampling is not None:
                yield Block(*whole, self._figures(batch, name, size))
                return
            height, width = batch.shape[-2:]
            with enough_memory(PREDICTION.format(height, width), SMALLER_IMAGES, self.device):
                yield Block(*whole, logits_at(self.asked, batch, size)[0])

    def _figures(self, batch: Tensor, name: str, size: Sequence[int] | None = None) -> Tensor:
        """Those of `blocks` for `(1, 3, H, W)` in [0, 1], at `size` or its own."""
        size = batch.shape[-2:] if size is None else size
        if self.sampling is None:
            return probabilities(self.asked, batch, size)[0]
        sampled = sample(self.asked, batch, size, self.sampling, [name])
        return torch.cat([sampled.mean[0], sampled.deviation])

    def _tiles(self, size: Sequence[int], name: str) -> Tiles | None:
        """How an image of `size` (H, W) is cut; None where it is looked at whole, for which there is memory."""
        if self.tiles is None and memory_at_risk(self.asked, size) is None:
            return None
        tiles = Tiles() if self.tiles is None else self.tiles
        if max(size) <= tiles.size:
            check_memory(self.asked, size, "predicting")
            return None
        if self.tiles is None:
            say(
                f"{images.show_path(name)}: {size[0]} x {size[1]} pixels may not fit into memory at once, and are "
                f"looked at in tiles of {tiles.size} (tiles.size, tiles.overlap){of_norms(self.asked)}"
            )
        return tiles

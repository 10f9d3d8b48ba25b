"""What fine-tuned models say of one image, pixel by pixel: whole where there is memory for it, else tile by tile.

`predict` and `portrait` write what is said here, and what `load_model` gives says it to other programs. How tiles are
cut and joined is `tiles`', what samples with dropout differ by is `uncertainty`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import images
from ssl_seg.config import Config, UserError
from ssl_seg.images import Range, Size
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
from ssl_seg.stages.uncertainty import DropoutSampling, Model, check_dropout, probabilities, sample
from ssl_seg.terminal import say
from ssl_seg.training.memory import enough_memory
from ssl_seg.weights.export import load_model as read_model
from ssl_seg.weights.export import range_of, read_model_info


class Views(Config):
    """In how many ways each image is looked at; the shares of all of them are averaged."""

    flips: bool = False  # mirrored too, as `flips` of `evaluate`: twice the time
    # Times the image's height and width. Small ones show more around a pixel, large ones small things; the time is that
    # of as many pixels.
    scales: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = Field(default=(1.0,), min_length=1)


ONE_VIEW = Views()


class Member(NamedTuple):
    """A model as it is asked."""

    asked: nn.Module
    resize: Size | None  # the size that it wants images in


@dataclass(frozen=True)
class Looker:
    """Models that are asked together: their mean shares are the answer."""

    members: tuple[Member, ...]
    multiple: int  # of all their strides
    device: torch.device
    tiles: Tiles | None  # None: whole, and in tiles where the memory of a CPU may not do
    scales: tuple[float, ...]
    sampling: DropoutSampling | None

    @classmethod
    def of(
        cls,
        models: Sequence[Model],
        device: torch.device,
        statistics: Statistics = "running",
        tiles: Tiles | None = None,
        views: Views = ONE_VIEW,
        sampling: DropoutSampling | None = None,
    ) -> Self:
        """Raises UserError where the models cannot be asked so."""
        if sampling is not None and (len(models) > 1 or views != ONE_VIEW):
            raise UserError("uncertainty: samples are of one model and one view; give entropy=true, or drop the others")
        members = []
        for model, resize in models:
            if sampling is not None:
                check_dropout(model)
            if tiles is not None:
                tiles.refuse_one_size(resize)
            model.to(device)
            members.append(Member(looks_at(model, statistics, views.flips).of(model), resize))
        if tiles is not None:
            tiles.tell_norms(members[0].asked)
        multiple = math.lcm(*(model.encoder.multiple for model, _ in models))
        return cls(tuple(members), multiple, device, tiles, views.scales, sampling)

    def blocks(self, image: np.ndarray, name: str, shares: bool = True) -> Iterator[Block]:
        """Figures of an image `(H, W, C)` uint8, block by block; together the blocks cover it, each pixel once.

        A block's values are `(K, h, w)`, the share of each class in [0, 1], and last how far samples differ, where they
        are asked for. Without `shares` they may be logits: the class is the largest of them all the same. Raises
        UserError for an image that is too large for the memory, or too small for the network.
        """
        size = image.shape[:2]
        tiles = None if any(member.resize for member in self.members) else self._tiles(size, name)
        if tiles is not None:
            look = partial(self._of_tile, name=name)
            yield from in_tiles(image, look, tiles, self.multiple, self.device)
            return
        whole = slice(0, size[0]), slice(0, size[1])
        figures = None
        for member in self.members:
            seen = image if member.resize is None else images.resize_image(image, member.resize)
            if member.resize is not None:
                check_memory(member.asked, self._largest(member.resize), "predicting", size)
            batch = torch.from_numpy(seen).permute(2, 0, 1)[None].to(self.device).float() / 255
            if not shares and self._is_plain:
                yield Block(*whole, self._logits(member, batch, size))
                return
            own = self._figures(member, batch, name, size)
            figures = own if figures is None else figures + own
        assert figures is not None
        yield Block(*whole, figures / len(self.members))

    def ids(self, image: np.ndarray, name: str) -> np.ndarray:
        """The class of each pixel of an image `(H, W, C)` uint8: `(H, W)` uint8. Raises as `blocks`."""
        found = np.empty(image.shape[:2], dtype=np.uint8)
        for block in self.blocks(image, name, shares=False):
            found[block.rows, block.columns] = block.values.argmax(dim=0).byte().cpu().numpy()
        return found

    @property
    def _is_plain(self) -> bool:
        """Whether one pass of one network is all."""
        return len(self.members) == 1 and self.scales == (1.0,) and self.sampling is None

    def _of_tile(self, tile: Tensor, name: str) -> Tensor:
        """Figures of `(1, 3, h, w)`, by all models."""
        all_of_them = [self._figures(member, tile, name, tile.shape[-2:]) for member in self.members]
        return torch.stack(all_of_them).mean(dim=0)

    def _logits(self, member: Member, batch: Tensor, size: Sequence[int]) -> Tensor:
        height, width = batch.shape[-2:]
        with evaluating(member.asked), enough_memory(PREDICTION.format(height, width), SMALLER_IMAGES, self.device):
            return logits_at(member.asked, batch, size)[0]

    def _figures(self, member: Member, batch: Tensor, name: str, size: Sequence[int]) -> Tensor:
        """Those of `blocks` by one model, at `size` (H, W), for `(1, 3, h, w)` in [0, 1]."""
        with evaluating(member.asked):
            if self.sampling is not None:
                sampled = sample(member.asked, batch, size, self.sampling, [name])
                return torch.cat([sampled.mean[0], sampled.deviation])
            by_scale = [probabilities(member.asked, _scaled(batch, scale), size)[0] for scale in self.scales]
            return by_scale[0] if len(by_scale) == 1 else torch.stack(by_scale).mean(dim=0)

    def _largest(self, size: Sequence[int]) -> tuple[int, int]:
        """The size (H, W) of the largest view of an image of `size`."""
        most = max(self.scales)
        return round(most * size[0]), round(most * size[1])

    def _tiles(self, size: Sequence[int], name: str) -> Tiles | None:
        """How an image of `size` (H, W) is cut; None where it is looked at whole, for which there is memory."""
        largest = self._largest(size)
        at_risk = [member.asked for member in self.members if memory_at_risk(member.asked, largest) is not None]
        if self.tiles is None and not at_risk:
            return None
        tiles = Tiles() if self.tiles is None else self.tiles
        if max(size) <= tiles.size:
            for asked in at_risk:
                check_memory(asked, largest, "predicting")
            return None
        if self.tiles is None:
            say(
                f"{images.show_path(name)}: {size[0]} x {size[1]} pixels may not fit into memory at once, and are "
                f"looked at in tiles of {tiles.size} (tiles.size, tiles.overlap){of_norms(at_risk[0])}"
            )
        return tiles


class TrainedModel(SegmentationModel):
    """A fine-tuned model, with what it wants images to be: RGB in [0, 1] to logits as any, and pictures to masks.

    It is a torch module: `model(image)` takes `(B, 3, H, W)` and gives logits, `model.to("cuda")` moves it. As in
    version 0.1 it can be taken apart too: `model, resize = load_model(run)`.
    """

    def __init__(self, network: SegmentationModel, resize: Size | None, value_range: Range | None) -> None:
        super().__init__(network.encoder, network.head, network.class_names)
        self.resize = resize  # the size (H, W) that images are brought to, by `predict` alone; None: their own
        self.range = value_range  # what is black and white in images of more than 8 bits, None: as the file has it
        self.train(network.training)

    def predict(self, image: object) -> np.ndarray:
        """Class ids `(H, W)` uint8, at the image's own size: the mask that `ssl-seg predict` writes, pixel for pixel.

        `image` is a path, a Pillow picture, an array `(H, W, 3)` of uint8 (or `(H, W)`, grey), or a tensor
        `(3, H, W)` in [0, 1]; of a model of another number of channels that many. Values are brought to 8 bits, as
        files have them; what is black and white in deeper ones is as the run had it, and so is the size that the
        network sees. It is computed where the model lies.

        Raises UserError for what is no image, and for one that is too large for the memory or too small for the
        network.

            model = load_model("runs/encoder")
            mask = model.predict("photo.jpg")
            leaf = mask == model.class_names.index("leaf")
        """
        pixels = _pixels_of(image, self.image_channels) if isinstance(image, Tensor) else image
        picture = images.picture_of(pixels, self.range, self.image_channels)
        name = str(image) if isinstance(image, str | Path) else "the image"
        return Looker.of([(self, self.resize)], self.encoder.mean.device).ids(picture, name)

    def __iter__(self) -> Iterator[Any]:
        """The pair that version 0.1 gave."""
        return iter((self, self.resize))

    def __getitem__(self, place: int) -> Any:
        return (self, self.resize)[place]


def load_model(path: str | Path) -> TrainedModel:
    """A fine-tuned model from a run folder, its `model/` or a folder for the hub, in evaluation mode.

    Raises UserError unless every weight is found and the network computes what the exported one did.
    """
    network, resize = read_model(path)
    return TrainedModel(network, resize, range_of(read_model_info(path)))


def _pixels_of(image: Tensor, channels: int) -> np.ndarray:
    """`(C, H, W)` in [0, 1], or uint8, as `(H, W, C)` uint8."""
    if image.ndim != 3 or len(image) != channels or not image.numel():
        raise UserError(f"a tensor of shape {tuple(image.shape)}: give one image, ({channels}, H, W)")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):
            raise UserError(f"a tensor of values from {low:.4g} to {high:.4g}: give RGB in [0, 1], not normalized")
        image = (255 * image.float()).round().byte()
    elif image.dtype != torch.uint8:
        raise UserError(f"a tensor of {image.dtype}: give RGB in [0, 1], or uint8")
    return image.detach().permute(1, 2, 0).cpu().numpy()


def check_known(key: str, names: Iterable[str], class_names: Sequence[str]) -> None:
    """Raise UserError for classes that a key names and the model does not know."""
    for name in names:
        if name not in class_names:
            raise UserError(f"{key}: the model knows no '{name}'; it tells {', '.join(class_names)} apart")


def _scaled(batch: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return batch
    size = [max(1, round(scale * side)) for side in batch.shape[-2:]]
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)

"""Jigsaw: the image is cut into tiles and shuffled, and the network says where each tile came from.

Noroozi and Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles", ECCV 2016. Their
network sees one tile at a time; here the tiles lie beside each other in one image of the old size, so that any encoder
takes the puzzle in a single pass, and the head pools its maps tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from itertools import permutations as all_permutations
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from ssl_seg import losses, rng
from ssl_seg.config import UserError
from ssl_seg.models import ANY_CHANNELS, EncoderSpec, Features
from ssl_seg.tasks import PretextTask, View

Pair = tuple[int, int]  # of rows and columns
SMALLEST_TILE = 4  # pixels a side: less shows nothing that has a place
FINEST_STRIDE = 8  # of the maps that are pooled, where there are some: a tile of 24 pixels has 3 x 3 features there
WIDTH = 256  # of a tile's features in the heads
ATTENTION_HEADS = 4
LISTED = 400_000  # orders that are searched one by one, all 362,880 of 9 tiles
SAMPLED = 100_000  # of the orders of more tiles


class Jigsaw(PretextTask):
    """Say of every tile of a shuffled image which cell of the grid it was cut from.

    Each cell gives one tile, and all tiles have one size; none is resized. They are laid in the middles of the cells in
    a random order, and around them is the mean colour of all tiles: nothing there tells a place. Rows and columns left
    over where `grid` does not divide a side are shared between both borders and never shown. Images too small for tiles
    of 4 pixels raise a UserError.
    """

    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    # The norm of the weighted loss's gradient on the encoder, while four tasks are trained together on CamVid
    # (experiments/camvid_tasks), is 0.42, 0.46 and 0.72 after 50, 150 and 400 steps; at a weight of 1 it would be ten
    # times those of the other tasks.
    weight: NonNegativeFloat = 0.1
    grid: Annotated[int, Field(ge=2, le=10)] = 3  # as in the paper
    # What keeps edges from going on in the next tile, as shares of a cell's side: the least distance between two tiles,
    # and the range of a tile's random place in its cell beyond that. The paper cuts tiles of 64 pixels from cells of
    # 75: 0 to 22 pixels apart, 11 on average. These are 4 to 22, 13 on average. The arrangement, of all, whose edges
    # fit best has 0.38 of the tiles right on CamVid crops of 96 pixels and 0.27 on BSDS500's; with all guards off 0.98
    # and 0.99. Gap 0.1, jitter 0.15 and colour 0.3 stop it further (0.27 and 0.18), but hinder the network too: on
    # CamVid it knew 0.34 of an unseen drive's tiles after 500 steps, with the defaults 0.38 after 400.
    gap: Annotated[float, Field(ge=0, le=0.5)] = 0.06
    jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.12
    # The strength of each tile's own change of colour: brightness, contrast and each channel's gain vary by this share.
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.2
    # A lens lays red and blue a little apart from green, the farther from the middle the more: so each tile's channels
    # are displaced, each by up to this many pixels. On CamVid frames at 160 x 120 a linear probe of this lag names the
    # place of 0.33 of single tiles of an unseen drive, under a displacement by 1 of 0.11, which is chance. The paper
    # displaces by up to 2 in images of 225 pixels.
    displace: Annotated[int, Field(ge=0, le=8)] = 1
    # places: a class per tile, its place. permutation: a class per image, which of the listed orders it has, as in the
    # paper. Places give N answers an image instead of one and need no list that leaves out nearly all orders.
    answer: Literal["places", "permutation"] = "places"
    permutations: Annotated[int, Field(ge=2, le=1000)] = 100  # up to the paper's largest list

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if self.gap + self.jitter > 0.75:
            raise ValueError(
                f"gap + jitter is {self.gap + self.jitter:g}, and little is left of a tile; stay under 0.75"
            )
        available = math.factorial(self.num_tiles)
        if self.answer == "permutation" and self.permutations > available:
            raise ValueError(
                f"permutations: {self.num_tiles} tiles have only {available} orders, not {self.permutations}"
            )
        return self

    @property
    def num_tiles(self) -> int:
        return self.grid**2

    def layout(self, height: int, width: int) -> Layout:
        """Where cells and tiles of an image lie. Raises UserError where tiles would be too small."""
        cell = (height // self.grid, width // self.grid)
        jitter = (round(self.jitter * cell[0]), round(self.jitter * cell[1]))
        gap = (round(self.gap * cell[0]), round(self.gap * cell[1]))
        rows, columns = (c - j - g - 2 * self.displace for c, j, g in zip(cell, jitter, gap, strict=True))
        if min(rows, columns) < SMALLEST_TILE:
            raise UserError(
                f"jigsaw: an image of {height} x {width} in a {self.grid} x {self.grid} grid leaves tiles of "
                f"{max(rows, 0)} x {max(columns, 0)} pixels, under {SMALLEST_TILE}; use a larger crop or another grid"
            )
        return Layout(self.grid, (height, width), cell, (rows, columns), jitter, gap)

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        layout = self.layout(*image.shape[-2:])
        place, target = self._shuffle(rng.fold_in(key, "shuffle"))
        tiles = self._cut(image, place, layout, rng.fold_in(key, "cut"))
        tiles = recolour(tiles, self.colour, rng.fold_in(key, "colour"))
        return View(layout.lay(tiles), target)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        if self.answer == "permutation":
            return PermutationHead(encoder, self.layout, self.num_tiles, self.permutations)
        return PlaceHead(encoder, self.layout, self.num_tiles)

    def guess(self, view: View) -> Tensor:
        """All answers alike."""
        answers = self.num_tiles if self.answer == "places" else self.permutations
        return view.input.new_zeros(len(view.target), answers, *view.target.shape[1:])

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return losses.cross_entropy(prediction, view.target, ignore_index=-1)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """`accuracy`: the share of tiles whose place is found. `solved`: whether the puzzle put together is right."""
        truth, found = self.places(view.target), self.solve(prediction)
        best = prediction.argmax(dim=1) if self.answer == "places" else found
        return {
            "accuracy": (best == truth).float().mean(dim=1),
            "solved": (found == truth).all(dim=1).float(),
        }

    def places(self, target: Tensor) -> Tensor:
        """Which cell each tile of the puzzle came from, `(B, N)`, from a view's target."""
        if self.answer == "places":
            return target
        return _permutations_on(target.device, self.num_tiles, self.permutations)[target]

    def solve(self, prediction: Tensor) -> Tensor:
        """A cell of its own for each tile, `(B, N)`, from the head's logits."""
        if self.answer == "places":
            return assign(prediction)
        return self.places(prediction.argmax(dim=1))

    def render(self, prediction: Tensor, view: View) -> Tensor:
        """The puzzle put together as the network thinks."""
        return self.layout(*view.input.shape[-2:]).put_together(view.input, self.solve(prediction))

    def render_target(self, view: View) -> Tensor:
        return self.layout(*view.input.shape[-2:]).put_together(view.input, self.places(view.target))

    def _shuffle(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The cell that each tile of the puzzle is cut from, `(B, N)`, and the target."""
        if self.answer == "places":
            place = rng.permutation(key, self.num_tiles)
            return place, place
        target = rng.randint(key, (), 0, self.permutations)
        return self.places(target), target

    def _cut(self, image: Tensor, place: Tensor, layout: Layout, key: Tensor) -> Tensor:
        """`(B, 3, N, h, w)`: the puzzle's tiles in order, each from somewhere inside the cell that `place` names."""
        displaced = rng.randint(
            rng.fold_in(key, "displace"), (2, image.shape[1], self.num_tiles), 0, 2 * self.displace + 1
        )
        cell = (place // self.grid, place % self.grid)
        firsts = []
        for axis, name in enumerate(("down", "right")):
            moved = rng.randint(rng.fold_in(key, name), (self.num_tiles,), 0, layout.jitter[axis] + 1)
            first = layout.border[axis] + cell[axis] * layout.cell[axis] + layout.gap[axis] // 2 + moved  # (B, N)
            firsts.append(first.unsqueeze(1) + displaced[:, axis])  # (B, 3, N)
        rows, columns = layout.tile
        windows = image.unfold(2, rows, 1).unfold(3, columns, 1)  # a view of all that could be cut
        number, channel = (torch.arange(count, device=image.device) for count in image.shape[:2])
        return windows[number.view(-1, 1, 1), channel.view(-1, 1), firsts[0], firsts[1]]


@dataclass(frozen=True)
class Layout:
    """Where cells and tiles of an image lie; pairs are (rows, columns) in pixels."""

    grid: int
    size: Pair  # of the image
    cell: Pair
    tile: Pair
    jitter: Pair  # how far a tile may lie from the first place it can be cut from
    gap: Pair  # the least distance between pixels of two tiles

    @property
    def border(self) -> Pair:
        """Before the first cell."""
        height, width = ((side - self.grid * cell) // 2 for side, cell in zip(self.size, self.cell, strict=True))
        return height, width

    @property
    def margin(self) -> Pair:
        """Between the corner of a cell and that of the tile laid into it."""
        height, width = ((cell - tile) // 2 for cell, tile in zip(self.cell, self.tile, strict=True))
        return height, width

    def lay(self, tiles: Tensor) -> Tensor:
        """The puzzle `(B, 3, H, W)` from tiles `(B, 3, N, h, w)`, one a cell, row by row."""
        mean = tiles.mean(dim=(3, 4)).mean(dim=2)[..., None, None]  # (B, 3, 1, 1)
        puzzle = mean.repeat(1, 1, *self.size)
        (top, left), (rows, columns) = self.margin, self.tile
        cells = self._cells(puzzle)
        cells[..., top : top + rows, left : left + columns] = tiles.unflatten(2, (self.grid, self.grid))
        return puzzle

    def put_together(self, image: Tensor, place: Tensor) -> Tensor:
        """The image with its i-th cell moved to cell `place[:, i]`; `place` `(B, N)` is a permutation."""
        order = place.argsort(dim=1)  # (B, N): the cell that comes to each place
        cells = self._cells(image).flatten(2, 3)  # (B, 3, N, ch, cw)
        moved = cells.gather(2, order[:, None, :, None, None].expand_as(cells))
        whole = image.clone()
        self._cells(whole).copy_(moved.unflatten(2, (self.grid, self.grid)))
        return whole

    def pool(self, level: Tensor, stride: int) -> Tensor:
        """`(B, N, C)`: the mean of a map `(B, C, h, w)` over the area of each tile, border features by their share."""
        rows = self._shares(0, level.shape[2], stride, level)  # (g, h)
        columns = self._shares(1, level.shape[3], stride, level)  # (g, w)
        pooled = rows @ level @ columns.transpose(0, 1)  # (B, C, g, g)
        return pooled.flatten(2).transpose(1, 2)

    def _cells(self, image: Tensor) -> Tensor:
        """All cells of an image, `(B, C, g, g, ch, cw)`, row by row: a view, into which may be written."""
        rows, columns = (
            slice(border, border + self.grid * cell) for border, cell in zip(self.border, self.cell, strict=True)
        )
        split = image[..., rows, columns].unflatten(3, (self.grid, -1)).unflatten(2, (self.grid, -1))
        return split.transpose(3, 4)

    def _shares(self, axis: int, count: int, stride: int, like: Tensor) -> Tensor:
        """`(g, count)`: how much of each tile's length lies over each of a map's features; rows add up to 1."""
        number = torch.arange(self.grid, device=like.device).unsqueeze(1)
        first = self.border[axis] + self.margin[axis] + number * self.cell[axis]  # (g, 1)
        last = first + self.tile[axis]
        start = torch.arange(count, device=like.device) * stride  # (count,)
        over = torch.minimum(last, start + stride) - torch.maximum(first, start)
        return (over.clamp(min=0) / self.tile[axis]).to(like.dtype)


class TileFeatures(nn.Module):
    """`(B, N, WIDTH)` from an encoder's maps: every map from stride 8 on (else the coarsest), averaged over each tile.

    The coarsest map alone would not do: at stride 32 two tiles of a small image share a feature.
    """

    def __init__(self, encoder: EncoderSpec, layout: Callable[[int, int], Layout]) -> None:
        super().__init__()
        finest = min(FINEST_STRIDE, encoder.strides[-1])
        strides = enumerate(encoder.strides)
        self.levels = [level for level, stride in strides if stride >= finest and encoder.channels[level]]
        self.strides = encoder.strides
        self.layout = layout
        # Maps of different depth differ in scale; norm over channels keeps the batch out of it.
        self.norms = nn.ModuleList(nn.LayerNorm(encoder.channels[level]) for level in self.levels)
        self.project = nn.Linear(sum(encoder.channels[level] for level in self.levels), WIDTH)

    def forward(self, features: Features, size: Pair) -> Tensor:
        layout = self.layout(*size)
        pooled = [layout.pool(features[level], self.strides[level]) for level in self.levels]
        normal = [norm(level) for norm, level in zip(self.norms, pooled, strict=True)]
        return self.project(torch.cat(normal, dim=2))


class PlaceHead(nn.Module):
    """Logits `(B, N places, N tiles)`. Tiles are compared with each other by attention, for a place is relative.

    Nothing tells the head which tile lies where in the puzzle, so a shuffle of the tiles shuffles its answers.
    """

    def __init__(self, encoder: EncoderSpec, layout: Callable[[int, int], Layout], num_tiles: int) -> None:
        super().__init__()
        self.tiles = TileFeatures(encoder, layout)
        self.compare = nn.TransformerEncoderLayer(
            WIDTH, ATTENTION_HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_tiles))

    def forward(self, features: Features, size: Pair) -> Tensor:
        compared = self.compare(self.tiles(features, size))
        return self.last(compared).transpose(1, 2)  # (B, N tiles, N places) -> (B, N places, N tiles)


class PermutationHead(nn.Module):
    """Logits `(B, P)` from all tiles' features in the order of the puzzle, as the paper's fc7 and fc8."""

    def __init__(
        self, encoder: EncoderSpec, layout: Callable[[int, int], Layout], num_tiles: int, num_permutations: int
    ) -> None:
        super().__init__()
        self.tiles = TileFeatures(encoder, layout)
        self.last = nn.Sequential(
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(num_tiles * WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Linear(2 * WIDTH, num_permutations),
        )

    def forward(self, features: Features, size: Pair) -> Tensor:
        return self.last(self.tiles(features, size))


def recolour(tiles: Tensor, strength: float, key: Tensor) -> Tensor:
    """Tiles `(B, 3, N, h, w)` with brightness, contrast and each channel's gain times their own 1 -+ `strength`."""
    count = tiles.shape[2]
    low, high = 1.0 - strength, 1.0 + strength
    brightness = rng.uniform(rng.fold_in(key, "brightness"), (1, count, 1, 1), low, high)
    contrast = rng.uniform(rng.fold_in(key, "contrast"), (1, count, 1, 1), low, high)
    gain = rng.uniform(rng.fold_in(key, "gain"), (tiles.shape[1], count, 1, 1), low, high)
    mean = tiles.mean(dim=(1, 3, 4), keepdim=True)  # (B, 1, N, 1, 1)
    # The tile times its contrast about a mean times its brightness; so written, a strength of 0 changes no bit.
    return (tiles * contrast).add_(mean * (brightness - contrast)).mul_(gain).clamp_(0.0, 1.0)


def assign(logits: Tensor) -> Tensor:
    """A place of its own for each tile, `(B, N)`, from `(B, N places, N tiles)`: the surest answer first.

    Greedy, because the best assignment (Kuhn 1955) needs scipy and the host.
    """
    count = logits.shape[1]
    score = logits.log_softmax(dim=1)
    places = torch.zeros(len(logits), count, dtype=torch.int64, device=logits.device)
    number = torch.arange(count, device=logits.device)
    for _ in range(count):
        surest = score.flatten(1).argmax(dim=1, keepdim=True)  # (B, 1)
        place, tile = surest // count, surest % count
        places = torch.where(number == tile, place, places)
        taken = (number.view(-1, 1) == place.unsqueeze(2)) | (number == tile.unsqueeze(2))  # (B, places, tiles)
        score = score.masked_fill(taken, -torch.inf)
    return places


@lru_cache(maxsize=8)
def distant_permutations(size: int, count: int) -> Tensor:
    """`count` orders of `range(size)` far apart in Hamming distance, int64 `(count, size)`; always the same ones.

    The paper's algorithm 1, greedy: after a random first one, always the order farthest from those chosen. Farthest is
    here by the least distance, then by the mean (theirs goes by the mean alone). 100 orders of 9 tiles differ in at
    least 6 tiles and on average in 8.08, random ones in 3 and 8.01; 100 of 16 tiles in 13 and 15.14, random ones in 10
    and 15.03. Orders of more than 9 tiles are too many to list: the best of a fixed random sample are taken.
    """
    key = rng.as_key("jigsaw permutations")
    total = math.factorial(size)
    if total <= LISTED:
        listed = np.fromiter(chain.from_iterable(all_permutations(range(size))), np.uint8, total * size)
        candidates = listed.reshape(total, size)[rng.permutation(key, total).numpy()]
    else:
        candidates = rng.permutation(rng.fold_in(key, torch.arange(SAMPLED)), size).numpy().astype(np.uint8)
    candidates = np.ascontiguousarray(candidates.T)  # (size, candidates): sums over a few long rows are fast
    chosen = [0]
    least = np.full(candidates.shape[1], size, dtype=np.int32)
    summed = np.zeros(candidates.shape[1], dtype=np.int32)
    for _ in range(count - 1):
        distance = (candidates != candidates[:, chosen[-1:]]).sum(axis=0, dtype=np.uint8)
        least = np.minimum(least, distance)
        summed += distance
        chosen.append(int(np.argmax(least * (size * count) + summed)))
    return torch.from_numpy(candidates[:, chosen].T.astype(np.int64))


@lru_cache(maxsize=8)
def _permutations_on(device: torch.device, size: int, count: int) -> Tensor:
    """Copied to a device once: a copy at every step would stop the host."""
    return distant_permutations(size, count).to(device)

"""Pictures drawn from a seed, with exact masks: nothing to download, and every pixel is known.

Drawn with integers only, so a seed gives the same pixels in every process and on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from ssl_seg import rng
from ssl_seg.datasets import Dataset, Example

Side = Annotated[int, Field(ge=2)]  # pixels; the smallest picture that has room for a box


class Synthetic(Dataset):
    """`count` pictures of a `kind`, each a function of `seed` and its number alone.

    squares: one flat box on a flat background. Its height and width are 90 to 100 px each where the short side has
    512, in proportion elsewhere (at least 2 px); the place is any inside the picture. In each of the three channels
    the two colours differ by at least 64 levels of 255.
    """

    kind: Literal["squares"] = "squares"
    count: PositiveInt = 500
    size: tuple[Side, Side] = (512, 512)  # (H, W)
    seed: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return KINDS[self.kind].class_names

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Example:
        key = rng.fold_in(rng.fold_in(rng.as_key(self.seed), self.kind), range(self.count)[index])
        image, label = KINDS[self.kind].draw(key, self.size)
        return Example(image, label, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.kind}_{range(self.count)[index]:06d}"


@dataclass(frozen=True)
class Kind:
    """A new kind is a function that draws it, a line in KINDS and a word in `Synthetic.kind`."""

    class_names: tuple[str, ...]
    # draw(scalar int64 key, (H, W)) -> RGB (H, W, 3) uint8 and class ids (H, W) uint8
    draw: Callable[[Tensor, tuple[int, int]], tuple[np.ndarray, np.ndarray]]


def draw_squares(key: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    height, width = size
    short = min(size)
    low = max(2, _scaled(90, short))
    high = max(low, _scaled(100, short))
    box_height, box_width = rng.randint(rng.fold_in(key, "sides"), (2,), low, high + 1).tolist()
    places = torch.tensor([height - box_height + 1, width - box_width + 1])
    top, left = rng.randint(rng.fold_in(key, "place"), (2,), 0, places).tolist()
    background = rng.randint(rng.fold_in(key, "background"), (3,), 0, 256)
    # A step of 64 to 192 around the circle of 256 levels leaves at least 64 between the two, wherever it starts.
    step = rng.randint(rng.fold_in(key, "step"), (3,), 64, 193)
    colour = (background + step) % 256
    box = (slice(top, top + box_height), slice(left, left + box_width))
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:] = background.numpy()
    image[box] = colour.numpy()
    label = np.zeros((height, width), dtype=np.uint8)
    label[box] = 1
    return image, label


def _scaled(side: int, short: int) -> int:
    """A length stated for a short side of 512 px, rounded."""
    return (side * short + 256) // 512


KINDS = {
    "squares": Kind(("background", "square"), draw_squares),
}

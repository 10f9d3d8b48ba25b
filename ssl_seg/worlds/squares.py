"""One flat box on a flat background: the smallest world, to see that everything works."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssl_seg import rng
from ssl_seg.worlds import Scene, World


class Squares(World):
    """One flat box on a flat background.

    Its height and width are 90 to 100 px each where the short side has 512, in proportion elsewhere (at least 2 px);
    the place is any inside the picture. In each of the three channels the two colours differ by at least 64 levels of
    255.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("background", "square")

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
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
        return Scene(image, label)


def _scaled(side: int, short: int) -> int:
    """A length stated for a short side of 512 px, rounded."""
    return (side * short + 256) // 512

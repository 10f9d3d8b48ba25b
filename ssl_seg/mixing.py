"""Which part of an image is taken from another one where two are mixed.

Ours, because each mask is drawn from its sample's key; torchvision's CutMix draws one box for a whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_seg import rng
from ssl_seg.losses import IGNORE_INDEX

# Boxes of UniMatch's own code (Yang et al., CVPR 2023), which has them from Cutout: shares of the image's area, and the
# width over the height, which are drawn uniformly.
AREA = (0.02, 0.4)
ASPECT = (0.3, 1 / 0.3)


def cutmix_mask(key: Tensor, size: tuple[int, int], area: tuple[float, float] = AREA) -> Tensor:
    """A box an image, bool `(B, 1, H, W)` for keys `(B,)`; `size` is (H, W), `area` the range of its share.

    Every place where the box fits is as likely as any other; one that is too long for the image is cut to its side.
    """
    height, width = size
    drawn = rng.uniform(rng.fold_in(key, "box"), (4,))  # (B, 4)
    share = area[0] + (area[1] - area[0]) * drawn[:, 0]
    aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * drawn[:, 1]
    tall = (share * height * width / aspect).sqrt().round().clamp(1, height)
    wide = (share * height * width * aspect).sqrt().round().clamp(1, width)
    rows = _within(height, tall, drawn[:, 2])
    columns = _within(width, wide, drawn[:, 3])
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def classmix_mask(key: Tensor, label: Tensor) -> Tensor:
    """The pixels of half of the classes that each label `(B, H, W)` shows, rounded down: bool `(B, 1, H, W)`.

    Of a label that shows one class there is none. ClassMix: Olsson et al., WACV 2021.
    """
    ids = label.flatten(1)
    shown = torch.zeros(len(ids), IGNORE_INDEX + 1, dtype=torch.bool, device=label.device).scatter(1, ids, True)
    shown[:, IGNORE_INDEX] = False
    drawn = rng.uniform(rng.fold_in(key, "classes"), (IGNORE_INDEX + 1,)).where(shown, 1.0)  # those not shown come last
    place = drawn.argsort(dim=1, stable=True).argsort(dim=1)
    chosen = place < shown.sum(dim=1, keepdim=True) // 2
    return chosen.gather(1, ids).view_as(label).unsqueeze(1)


def _within(side: int, length: Tensor, drawn: Tensor) -> Tensor:
    """`(B, side)`: which rows or columns lie in a box of this length, whose place was drawn in [0, 1)."""
    start = (drawn * (side - length + 1)).floor()
    place = torch.arange(side, device=drawn.device)
    return (place >= start.unsqueeze(1)) & (place < (start + length).unsqueeze(1))

"""Which part of an image is taken from another one where two are mixed.

Ours, because each mask is drawn from its sample's key; torchvision's CutMix draws one box for a whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
    shown = _pixels(label) > 0
    return _drawn(key, label, shown, shown.sum(dim=1, keepdim=True) // 2)


def copy_paste_mask(key: Tensor, label: Tensor) -> Tensor:
    """The pixels of half of the classes that each label `(B, H, W)` shows beside its commonest, rounded up.

    Bool `(B, 1, H, W)`; of a label that shows one class there is none. Objects without their ground: Ghiasi et al.,
    "Simple copy-paste is a strong data augmentation method for instance segmentation", CVPR 2021, where they are known
    one by one; here they stay in their place and size.
    """
    pixels = _pixels(label)
    shown = (pixels > 0).scatter(1, pixels.argmax(dim=1, keepdim=True), False)
    return _drawn(key, label, shown, (shown.sum(dim=1, keepdim=True) + 1) // 2)


def _pixels(label: Tensor) -> Tensor:
    """How many pixels of each id a label shows, `(B, 255)`; those that are ignored are not counted."""
    ids = label.flatten(1)
    ones = torch.ones_like(ids, dtype=torch.int32)
    return ones.new_zeros(len(ids), IGNORE_INDEX + 1).scatter_add(1, ids, ones)[:, :IGNORE_INDEX]


def _drawn(key: Tensor, label: Tensor, shown: Tensor, count: Tensor) -> Tensor:
    """The pixels of `count` `(B, 1)` of the classes `shown` `(B, 255)`."""
    drawn = rng.uniform(rng.fold_in(key, "classes"), (IGNORE_INDEX + 1,))[:, :IGNORE_INDEX].where(shown, 1.0)
    place = drawn.argsort(dim=1, stable=True).argsort(dim=1)  # those not shown come last
    chosen = F.pad(place < count, (0, 1))  # 255 is never one of them
    return chosen.gather(1, label.flatten(1)).view_as(label).unsqueeze(1)


def _within(side: int, length: Tensor, drawn: Tensor) -> Tensor:
    """`(B, side)`: which rows or columns lie in a box of this length, whose place was drawn in [0, 1)."""
    start = (drawn * (side - length + 1)).floor()
    place = torch.arange(side, device=drawn.device)
    return (place >= start.unsqueeze(1)) & (place < (start + length).unsqueeze(1))

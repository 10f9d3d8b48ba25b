"""Boxes of CutMix: each of its own key, rectangles of the asked area, anywhere in the image."""

from __future__ import annotations

import torch

from ssl_seg import rng
from ssl_seg.mixing import AREA, cutmix_mask


def keys(count: int) -> torch.Tensor:
    return rng.fold_in(rng.as_key("boxes"), torch.arange(count))


def test_a_box_is_a_whole_rectangle_of_the_asked_area() -> None:
    boxes = cutmix_mask(keys(500), (40, 60))
    assert boxes.dtype == torch.bool
    assert boxes.shape == (500, 1, 40, 60)
    rows, columns = boxes.any(dim=3, keepdim=True), boxes.any(dim=2, keepdim=True)
    assert torch.equal(boxes, rows & columns), "as many as its rows times its columns"
    assert bool(((rows[:, :, 1:] != rows[:, :, :-1]).sum(dim=2) <= 2).all()), "in one piece"
    share = boxes.float().mean(dim=(1, 2, 3))
    assert AREA[0] * 0.8 < share.min() < 0.06
    assert 0.35 < share.max() < AREA[1] * 1.1


def test_a_box_is_of_its_key_alone_and_every_place_is_met() -> None:
    boxes = cutmix_mask(keys(500), (40, 60))
    assert torch.equal(boxes[7:9], cutmix_mask(keys(9)[7:], (40, 60)))
    often = boxes.float().mean(dim=0)[0]
    assert bool((often[1:-1, 1:-1] > 0).all())
    assert abs(often[:, :30].mean() - often[:, 30:].mean()) < 0.03
    assert abs(often[:20].mean() - often[20:].mean()) < 0.03


def test_a_box_of_half_the_image_is_one_where_the_side_allows_it() -> None:
    share = cutmix_mask(keys(300), (64, 64), (0.5, 0.5)).float().mean(dim=(1, 2, 3))
    assert share.median() > 0.45
    assert share.max() < 0.55

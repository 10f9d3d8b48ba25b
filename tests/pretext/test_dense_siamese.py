from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pretext import dense_siamese
from pretext.dense_siamese import DenseSiamese
from ssl_seg import rng
from ssl_seg.models import EncoderSpec, Features
from ssl_seg.tasks import View
from ssl_seg.testing import check_pretext_task


def keys(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.as_key(seed), torch.arange(count))


def smooth(count: int = 4, height: int = 96, width: int = 128) -> Tensor:
    """Pictures in which every place has a colour of its own and neighbours are alike."""
    return F.interpolate(rng.uniform(keys(count, 9), (3, 3, 4)), size=(height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("task", [DenseSiamese(), DenseSiamese(colour=0.0, points=4, channels=8)], ids=repr)
def test_the_task_keeps_the_contract(task):
    check_pretext_task(task, size=(48, 48))


# The geometry


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.floats(0.2, 1.0), height=st.integers(20, 70), width=st.integers(20, 70))
def test_both_crops_show_the_same_at_the_places_that_are_compared(seed, low, height, width):
    task = DenseSiamese(zoom=(low, 1.0), colour=0.0)
    view = task.corrupt(smooth(3, height, width), keys(3, seed))
    assert view.target.shape == (3, 4, 8, 8)
    assert view.target.min() >= 0
    assert view.target.max() <= 1
    first, second = view.input.chunk(2)
    seen = [
        F.grid_sample(crop, as_grid(part), align_corners=False, padding_mode="border")
        for crop, part in places(first, second, view)
    ]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0.06)  # what interpolation of interpolation may do


def places(first: Tensor, second: Tensor, view: View) -> list[tuple[Tensor, Tensor]]:
    return [(first, view.target[:, :2]), (second, view.target[:, 2:])]


def as_grid(part: Tensor) -> Tensor:
    return part.flip(1).movedim(1, -1) * 2 - 1  # y, x in [0, 1] to x, y in [-1, 1]


def test_crops_are_what_the_boxes_say():
    images, task = smooth(40), DenseSiamese(zoom=(0.5, 0.8), colour=0.0)
    key = keys(40)
    boxes = task._boxes(rng.fold_in(key, "boxes"))
    assert boxes.shape == (40, 2, 3)
    corners, sides = boxes[..., :2], boxes[..., 2:]
    assert sides.min() >= 0.5
    assert sides.max() <= 0.8
    assert corners.min() >= 0
    assert (corners + sides).max() <= 1 + 1e-6
    shared = (corners + sides).amin(dim=1) - corners.amax(dim=1)  # (B, 2)
    least = 0.5 * sides.amin(dim=1)
    assert (shared >= least - 1e-6).all()
    assert (shared > least + 0.05).any()
    flips = rng.randint(rng.fold_in(key, "flips"), (2, 1, 1), 0, 2).flatten(1)
    assert 20 < flips.sum() < 60
    crop = task.corrupt(images, key).input[0]
    top, left, side = boxes[0, 0].tolist()
    rows, columns = (
        slice(round(start * length), round((start + side) * length)) for start, length in ((top, 96), (left, 128))
    )
    cut = F.interpolate(images[:1, :, rows, columns], size=(96, 128), mode="bilinear")[0]
    cut = cut.flip(2) if flips[0, 0] else cut
    torch.testing.assert_close(crop, cut, rtol=0, atol=0.05)


def test_colours_are_changed_in_each_crop_by_itself():
    task = DenseSiamese(zoom=(1.0, 1.0))
    first, second = task.corrupt(smooth(40), keys(40)).input.chunk(2)
    grey = [(crop[:, 0] == crop[:, 1]).flatten(1).all(dim=1) for crop in (first, second)]
    assert all(2 <= own.sum() <= 16 for own in grey)
    assert (grey[0] != grey[1]).any()
    assert (first.mean(dim=(1, 2, 3)) - second.mean(dim=(1, 2, 3))).abs().mean() > 0.05


# The loss


def reference(first: np.ndarray, second: np.ndarray) -> float:
    """VICReg of two clouds `(N, D)`, as in the paper's pseudocode, divided by 25."""
    alike = ((first - second) ** 2).mean()
    varied, apart = 0.0, 0.0
    for cloud in (first, second):
        varied += np.maximum(0, 1 - np.sqrt(cloud.var(axis=0, ddof=1) + 1e-4)).mean() / 2
        covariance = np.cov(cloud.T)
        apart += (covariance**2).sum() / len(covariance) - (np.diag(covariance) ** 2).sum() / len(covariance)
    return alike + varied + apart / 25


def answered(first: Tensor, second: Tensor) -> tuple[Tensor, View]:
    """A view whose points lie in the middles of the cells of maps `(B, D, n, n)`, so that they are read as they are."""
    count, _, points, _ = first.shape
    middle = (torch.arange(points) + 0.5) / points
    own = torch.stack([middle.view(-1, 1).expand(-1, points), middle.expand(points, -1)]).expand(count, -1, -1, -1)
    side = points * dense_siamese.STRIDE
    return torch.cat([first, second]), View(torch.zeros(2 * count, 3, side, side), torch.cat([own, own], dim=1))


def test_the_loss_is_vicregs_over_the_places_of_each_sample():
    first, second = rng.normal(keys(3), (16, 8, 8)), rng.normal(keys(3, 1), (16, 8, 8)) * 0.5
    loss = DenseSiamese(channels=16).loss(*answered(first, second))
    clouds = [[own.flatten(1).T.double().numpy() for own in cloud] for cloud in (first, second)]
    np.testing.assert_allclose(loss, [reference(*pair) for pair in zip(*clouds, strict=True)], rtol=1e-4)


def test_one_answer_for_all_places_costs_what_the_variance_is_worth():
    flat = torch.ones(2, 8, 8, 8)
    loss = DenseSiamese(channels=8, variance=2.0).loss(*answered(flat, flat))
    np.testing.assert_allclose(loss, 2 * (1 - 0.01), rtol=1e-5)
    assert DenseSiamese(channels=8).metrics(*answered(flat, flat))["spread"].tolist() == pytest.approx([0.01] * 2)


def test_places_are_found_where_answers_are_the_places():
    own = rng.normal(keys(2), (8, 8, 8))
    task = DenseSiamese(channels=8)
    prediction, view = answered(own, own)
    assert task.metrics(prediction, view)["found"].tolist() == [1.0, 1.0]
    colours = rng.uniform(keys(4), (3, 64, 64))
    view.input = colours
    assert torch.equal(task.render(prediction, view), task.render_target(view))
    shuffled, view = answered(own, own.flip(3))
    assert task.metrics(shuffled, view)["found"].max() < 0.2


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_a_map_is_read_where_the_image_is_and_not_where_it_is_padded(size):
    strides = (2, 4, 8, 16, 32)
    padded = [-(-side // 32) * 32 for side in size]
    rows, columns = torch.meshgrid(*[(torch.arange(side) + 0.5) / 1.0 for side in padded], indexing="ij")
    image = torch.stack([rows, columns])[None]  # each pixel says where it lies
    maps = [F.avg_pool2d(image, stride) for stride in strides]
    head = DenseSiamese(channels=2).head(EncoderSpec((2,) * 5, strides, dense=lambda *_: None))
    head.levels, head.first = [2], torch.nn.ModuleList([torch.nn.Identity()])  # the map at stride 8 as it is
    head.last = torch.nn.Identity()
    level = head(Features(maps, strides), size)
    view = DenseSiamese().corrupt(torch.zeros(1, 3, *size), keys(1))
    first, _ = DenseSiamese()._answers(torch.cat([level, level]), view)
    wanted = view.target[:, :2].flatten(2) * torch.tensor(size).view(1, 2, 1)
    inside = ((wanted > 4) & (wanted < torch.tensor(size).view(1, 2, 1) - 8)).all(dim=1)
    torch.testing.assert_close(first.movedim(1, -1)[inside], wanted.movedim(1, -1)[inside], rtol=1e-4, atol=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zoom": [0.8, 0.5]}, "zoom is"),
        ({"zoom": [0.5, 1.5]}, "high <= 1"),
        ({"points": 1}, "greater than or equal to 2"),
        ({"colour": 1.0}, "less than 1"),
    ],
)
def test_the_task_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        DenseSiamese.model_validate(options)

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from pretext.restore import Restore
from ssl_seg import rng
from ssl_seg.testing import check_pretext_task


def keys(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.as_key(seed), torch.arange(count))


def pictures(count: int = 3, height: int = 40, width: int = 56) -> Tensor:
    return rng.uniform(keys(count, 9), (3, height, width))


@pytest.mark.parametrize(
    "task",
    [Restore(), Restore(number=1, size=(0.3, 1 / 3), outside=0.0, decoder="light")],
    ids=repr,
)
def test_restore_keeps_the_contract(task):
    check_pretext_task(task, size=(48, 48))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    number=st.integers(1, 6),
    size=st.floats(0.001, 1 / 3),
    seed=st.integers(0, 2**31),
)
def test_every_pixel_is_still_there_at_every_size(height, width, number, size, seed):
    source = Restore(number=number, size=(min(size, 0.1), size)).source(keys(3, seed), height, width)
    places = torch.arange(height * width).expand(3, -1)
    assert torch.equal(source.flatten(1).sort(dim=1).values, places)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40), size=st.floats(0.001, 1 / 3), seed=st.integers(0, 2**31))
def test_one_pair_is_two_squares_that_change_places_and_do_not_overlap(height, width, size, seed):
    task = Restore(number=1, size=(size, size))
    source = task.source(keys(4, seed), height, width)
    moved = source != torch.arange(height * width).view(height, width)
    side = max(1, round(size * min(height, width)))
    assert moved.flatten(1).sum(dim=1).tolist() == [2 * side**2] * 4
    for own in source:
        assert torch.equal(own.flatten()[own.flatten()], torch.arange(height * width))  # put back by the same swap
    distances = {(own.flatten() - torch.arange(height * width)).abs().max().item() for own in source}
    assert all(distance > 0 for distance in distances)


def test_patches_reach_all_places_and_lie_apart_in_both_directions():
    source = Restore(number=1, size=(0.25, 0.25)).source(keys(4000), 12, 12)
    place = torch.arange(144).view(12, 12)
    moved = (source != place).sum(dim=0)
    assert (moved > 0).all()
    shift = (source - place).flatten(1).amax(dim=1)
    rows, columns = (shift + 6) // 12, (shift + 6) % 12 - 6
    assert (columns == 0).any()  # one above the other
    assert (rows == 0).any()  # side by side
    assert (columns.abs() >= 3).any()


def test_only_what_has_moved_is_changed_and_counts_most():
    images, task = pictures(), Restore(outside=0.25)
    view = task.corrupt(images, keys(3))
    moved = (view.loss_mask == 1).expand_as(images)
    assert set(view.loss_mask.unique().tolist()) == {0.25, 1.0}
    assert torch.equal(view.input[~moved], images[~moved])
    assert (view.input != images).any(dim=1, keepdim=True).equal(view.loss_mask == 1)
    assert torch.equal(view.input.flatten(2).sort().values, images.flatten(2).sort().values)
    assert torch.equal(view.target, images)


def test_figures_look_at_what_has_moved_and_tell_what_handing_back_gives():
    images, task = pictures(), Restore()
    view = task.corrupt(images, keys(3))
    moved = view.loss_mask == 1
    given_back = task.metrics(view.input, view)
    assert torch.equal(given_back["psnr"], given_back["psnr_of_input"])
    wrong_elsewhere = torch.where(moved, images, 1 - images)
    assert torch.equal(task.metrics(wrong_elsewhere, view)["mae"], torch.zeros(3))
    assert (task.metrics(images, view)["psnr"] == 100).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": [0.2, 0.1]}, "size is"),
        ({"size": [0.1, 0.4]}, "high <= 1/3"),
        ({"number": 0}, "greater than or equal to 1"),
        ({"outside": 1.5}, "less than or equal to 1"),
        ({"decoder": "none"}, "'light'"),
    ],
)
def test_restore_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        Restore.model_validate(options)

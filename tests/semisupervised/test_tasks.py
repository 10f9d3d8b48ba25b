"""What mean_teacher and unimatch show the network, which pseudo-labels count, and whether they teach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.config import load
from ssl_seg.models import Features
from ssl_seg.semisupervised.mean_teacher import MeanTeacher
from ssl_seg.semisupervised.strong import strong
from ssl_seg.semisupervised.unimatch import UniMatch
from ssl_seg.tasks import Batch, TaskPlugin, View
from ssl_seg.testing.common import pictures

SIZE = (24, 32)


def batch(count: int) -> Batch:
    return Batch(pictures(count, *SIZE), rng.fold_in(rng.as_key("semi"), torch.arange(count)))


def teacher(image: Tensor) -> Tensor:
    return torch.stack([image[:, 0] * 8, image[:, 1] * 8, image[:, 2] * 8], dim=1)


def test_both_are_found_by_their_names() -> None:
    assert load(TaskPlugin, {"type": "unimatch"}) == UniMatch()
    assert load(TaskPlugin, {"type": "mean_teacher"}) == MeanTeacher()
    assert UniMatch().dump()["type"] == "unimatch"
    assert {"unimatch", "mean_teacher", "denoise"} <= set(TaskPlugin.names())


@pytest.mark.parametrize("task", [UniMatch(), MeanTeacher()], ids=["unimatch", "mean_teacher"])
def test_a_view_is_of_the_pair_alone_and_of_keys(task: TaskPlugin) -> None:
    whole = batch(6)
    view, again = (task.view({"pool": whole}, teacher) for _ in range(2))
    assert torch.equal(view.input, again.input)
    copies = len(view.input) // 6
    alone = task.view({"pool": whole[2:4]}, teacher)
    own = view.input.unflatten(0, (copies, 6))[:, 2:4].flatten(0, 1)
    torch.testing.assert_close(own, alone.input)
    torch.testing.assert_close(view.target[2:4], alone.target)
    assert 0 <= view.input.min() <= view.input.max() <= 1 + 1e-6
    other = task.view({"pool": Batch(whole.image, rng.fold_in(whole.key, "other"))}, teacher)
    assert not torch.equal(view.input, other.input)


@pytest.mark.parametrize("task", [UniMatch(), MeanTeacher()], ids=["unimatch", "mean_teacher"])
def test_a_view_does_not_wait_for_the_device(task: TaskPlugin) -> None:
    given = batch(2)
    task.view({"pool": Batch(given.image.to("meta"), given.key.to("meta"))}, teacher)


def test_a_box_holds_the_partner_with_what_is_said_of_it() -> None:
    given = batch(4)
    view = MeanTeacher(noise=0.0, cutmix=1.0).view({"pool": given}, teacher)
    said = teacher(view.input).softmax(dim=1)
    torch.testing.assert_close(view.target, said), "image and answer are cut at the same places"
    plain = MeanTeacher(noise=0.0, cutmix=0.0).view({"pool": given}, teacher)
    assert torch.equal(plain.input, given.image)
    from_partner = (view.input != given.image).any(dim=1).float().mean(dim=(1, 2))
    assert 0.3 < from_partner.mean() < 0.55


def test_mean_teacher_is_the_squared_distance_by_the_sure_share() -> None:
    target = torch.tensor([[0.99, 0.01], [0.6, 0.4]]).t().reshape(1, 2, 1, 2)  # one pixel of two is sure
    logits = torch.zeros(1, 2, 1, 2)
    loss = MeanTeacher(confidence=0.9).loss(logits, View(torch.zeros(1, 3, 1, 2), target))
    distance = (2 * 0.49**2 + 2 * 0.1**2) / 2
    assert loss.item() == pytest.approx(0.5 * distance)
    watched = MeanTeacher(confidence=0.9).watch(logits, View(torch.zeros(1, 3, 1, 2), target))
    assert watched["sure"].tolist() == [0.5]
    assert MeanTeacher(confidence=0.0).loss(logits, View(torch.zeros(1, 3, 1, 2), target)).item() == pytest.approx(
        distance
    )


def test_unimatch_shows_weak_and_two_strong_views() -> None:
    given = batch(4)
    view = UniMatch(cutmix=0.0).view({"pool": given})
    weak, first, second = view.input.split(4)
    assert torch.equal(weak, given.image)
    assert torch.equal(first, strong(given.image, rng.fold_in(given.key, "first")))
    assert not torch.equal(first, second)
    assert not view.target.any()
    many = batch(64)
    boxes = UniMatch().view({"pool": many}).target
    assert 0.3 < boxes.flatten(2).any(dim=2).float().mean() < 0.7


def test_unimatch_leaves_out_channels_of_the_weak_features() -> None:
    given = batch(2)
    task = UniMatch()
    view = task.view({"pool": given})
    maps = Features([torch.ones(6, 400, 4, 4), torch.ones(6, 0, 2, 2)], (2, 4), {"place": torch.arange(6.0)})
    perturbed = task.perturb(maps, view)
    assert perturbed[0].shape == (8, 400, 4, 4)
    assert torch.equal(perturbed[0][:6], maps[0])
    dropped = perturbed[0][6:]
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert bool((dropped == dropped[:, :, :1, :1]).all()), "a channel as a whole"
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    assert not torch.equal(dropped[0], dropped[1])
    assert perturbed.extras["place"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_unimatch_counts_only_what_it_is_sure_of_and_by_all_pixels() -> None:
    sure, unsure = torch.tensor([10.0, 0.0]), torch.tensor([1.0, 0.0])
    weak = torch.stack([sure, unsure], dim=1).view(1, 2, 1, 2).repeat(2, 1, 1, 1)
    weak[1] = weak[1].flip(0)  # the partner shows the other class
    weak.requires_grad_(True)
    given = torch.randn(3, 2, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    box = torch.zeros(2, 2, 1, 2)
    box[0, 1] = 1  # the second strong view of the first image is all its partner's
    view = View(torch.zeros(6, 3, 1, 2), box)
    prediction = torch.cat([weak, given.flatten(0, 1)])
    loss = UniMatch().loss(prediction, view)
    assert UniMatch().watch(prediction, view)["sure"].tolist() == [0.5, 0.5]

    def of(logits: Tensor, label: int) -> Tensor:
        return F.cross_entropy(logits[None, :, 0, 0], torch.tensor([label])) / 2  # the other pixel is not sure

    first, second, dropped = given
    expected = [
        0.25 * of(first[0], 0) + 0.25 * of(second[0], 1) + 0.5 * of(dropped[0], 0),
        0.25 * of(first[1], 1) + 0.25 * of(second[1], 1) + 0.5 * of(dropped[1], 1),
    ]
    torch.testing.assert_close(loss, torch.stack(expected))
    assert torch.autograd.grad(loss.sum(), weak, allow_unused=True)[0].abs().sum() == 0, "its own labels teach it not"
    none = UniMatch(confidence=1.0).loss(torch.cat([weak * 0.1, given.flatten(0, 1)]), view)
    assert none.tolist() == [0.0, 0.0]


def test_dice_gives_what_is_rare_a_say() -> None:
    """A hundredth of the pixels is of the second class: missing it costs next to nothing, with Dice half of it."""
    ids = torch.zeros(1, 10, 10, dtype=torch.long)
    ids[0, 0, 0] = 1
    sure = 20 * F.one_hot(ids, 2).movedim(-1, 1).float()
    missed = 20 * F.one_hot(torch.zeros_like(ids), 2).movedim(-1, 1).float()
    view = View(torch.zeros(3, 3, 10, 10), torch.zeros(1, 2, 10, 10))
    right, wrong = (torch.cat([sure, *[own] * 3]) for own in (sure, missed))
    plain, both = UniMatch(), UniMatch(dice=2.0)
    assert both.loss(right, view).item() == pytest.approx(0.0, abs=1e-5)
    assert both.loss(wrong, view).item() - plain.loss(wrong, view).item() == pytest.approx(2 * 0.5, abs=0.01)
    unsure = torch.zeros(4, 2, 10, 10, requires_grad=True)
    nothing = both.loss(unsure, view)
    assert nothing.item() == 0.0
    assert torch.autograd.grad(nothing.sum(), unsure)[0].abs().sum() == 0

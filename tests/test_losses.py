from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, LovaszLoss, TverskyLoss
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import losses, rng
from ssl_seg.config import load, use_plugin
from ssl_seg.metrics import ConfusionMatrix
from ssl_seg.models import DecoderNet, DenseHead, EncoderSpec, Features
from ssl_seg.runs.folder import read_metrics
from ssl_seg.segment import Segment
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.setup import Options
from ssl_seg.tasks import Batch, PretextTask, View
from tests.small import Textured, finetuning

KINDS = ("mse", "l1", "charbonnier", "smooth_l1")
OBJECTIVES = {
    "cross_entropy": losses.cross_entropy,
    "smoothed": partial(losses.cross_entropy, smoothing=0.1),
    "hardest": partial(losses.cross_entropy, hardest=0.3),
    "dice": losses.dice,
    "focal": losses.focal,
    "focal of a root": partial(losses.focal, gamma=0.5),
    "tversky": losses.tversky,
    "lovasz": losses.lovasz,
    "binary": losses.binary,
    "smooth_l1": losses.smooth_l1,
    "smooth_l1 of a small beta": partial(losses.smooth_l1, beta=0.1),
}
each_objective = pytest.mark.parametrize("loss", OBJECTIVES.values(), ids=OBJECTIVES)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits_and_label(seed: int, classes: int = 5, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = generator(seed)
    logits = 3 * torch.randn(3, classes, 6, 7, generator=draw)
    label = torch.randint(0, classes, (3, 6, 7), generator=draw)
    label[torch.rand(3, 6, 7, generator=draw) < ignored] = 255
    return logits, label


def test_regression_equals_torch_on_one_sample():
    draw = generator(0)
    prediction, target = torch.rand(1, 3, 5, 4, generator=draw), torch.rand(1, 3, 5, 4, generator=draw)
    assert torch.allclose(losses.regression("mse", prediction, target), F.mse_loss(prediction, target))
    assert torch.allclose(losses.regression("l1", prediction, target), F.l1_loss(prediction, target))
    smooth = F.smooth_l1_loss(prediction, target, beta=losses.SMOOTH_L1_BETA)
    assert torch.allclose(losses.regression("smooth_l1", prediction, target), smooth)
    charbonnier = np.sqrt((prediction - target).numpy().astype(float) ** 2 + 1e-6).mean()
    assert losses.regression("charbonnier", prediction, target).item() == pytest.approx(charbonnier, rel=1e-6)


def test_charbonnier_is_l1_for_large_errors():
    prediction, target = torch.full((1, 3, 2, 2), 5.0), torch.zeros(1, 3, 2, 2)
    assert losses.regression("charbonnier", prediction, target).item() == pytest.approx(5.0, abs=1e-6)


def test_regression_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown distance 'huber'"):
        losses.regression("huber", torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_masked_mean_is_numpys_weighted_average(seed):
    draw = generator(seed)
    values = torch.randn(3, 2, 4, 5, generator=draw)
    loss_mask = torch.rand(3, 1, 4, 5, generator=draw) * (torch.rand(3, 1, 4, 5, generator=draw) < 0.5)
    loss_mask[:, :, 0, 0] = 0.25
    expected = [
        np.average(values[i].numpy().astype(float), weights=loss_mask[i].expand(2, -1, -1).numpy().astype(float))
        for i in range(3)
    ]
    assert losses.masked_mean(values, loss_mask).numpy() == pytest.approx(np.array(expected), rel=1e-4, abs=1e-6)


def test_a_uniform_weight_changes_nothing():
    values = torch.rand(2, 3, 4, 5, generator=generator(1))
    assert torch.allclose(losses.masked_mean(values, torch.full((2, 1, 4, 5), 1e-3)), losses.masked_mean(values))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_weight_zero_have_no_influence_even_if_not_finite(kind):
    draw = generator(2)
    prediction, target = torch.rand(2, 3, 4, 4, generator=draw), torch.rand(2, 3, 4, 4, generator=draw)
    loss_mask = torch.ones(2, 1, 4, 4)
    loss_mask[:, :, 1] = 0
    expected = losses.regression(kind, prediction, target, loss_mask)
    spoiled = target.clone()
    spoiled[:, :, 1] = torch.inf
    assert torch.equal(losses.regression(kind, prediction, spoiled, loss_mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_regression_is_zero_with_a_finite_gradient_where_no_pixel_counts(kind):
    prediction = torch.rand(2, 3, 4, 4, generator=generator(3)).requires_grad_()
    loss_mask = torch.zeros(2, 1, 4, 4)
    loss_mask[1] = 1
    loss = losses.regression(kind, prediction, torch.zeros(2, 3, 4, 4), loss_mask)
    loss.sum().backward()
    assert loss[0] == 0
    assert loss[1] > 0
    assert (prediction.grad[0] == 0).all()
    assert prediction.grad[1].all()


@pytest.mark.parametrize("kind", KINDS)
def test_regression_gradients_are_right(kind):
    draw = generator(4)
    prediction = torch.rand(2, 2, 3, 3, generator=draw, dtype=torch.float64).requires_grad_()
    target = torch.rand(2, 2, 3, 3, generator=draw, dtype=torch.float64)
    loss_mask = torch.rand(2, 1, 3, 3, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: losses.regression(kind, p, target, loss_mask), prediction)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, weighted=st.booleans())
def test_cross_entropy_of_each_sample_equals_torch(seed, weighted):
    logits, label = random_logits_and_label(seed)
    weights = torch.rand(5, generator=generator(seed + 1)) + 0.1 if weighted else None
    ours = losses.cross_entropy(logits, label, weights=weights)
    for i in range(3):
        theirs = F.cross_entropy(logits[i : i + 1], label[i : i + 1], weight=weights, ignore_index=255)
        assert torch.allclose(ours[i], theirs, rtol=1e-5, atol=1e-6)


def test_cross_entropy_takes_class_vectors_and_lists_of_tiles():
    draw = generator(5)
    logits, label = torch.randn(4, 6, 9, generator=draw), torch.randint(0, 6, (4, 9), generator=draw)
    expected = F.cross_entropy(logits, label, reduction="none")
    assert torch.allclose(losses.cross_entropy(logits, label), expected.mean(dim=1))
    assert torch.allclose(losses.cross_entropy(logits[..., 0], label[:, 0]), expected[:, 0])


def test_class_255_counts_under_another_ignore_index():
    logits = torch.randn(2, 300, generator=generator(6))
    label = torch.tensor([255, 3])
    assert losses.cross_entropy(logits, label)[0] == 0
    assert torch.allclose(
        losses.cross_entropy(logits, label, ignore_index=-1), F.cross_entropy(logits, label, reduction="none")
    )


@each_objective
def test_an_ignored_sample_is_zero_and_leaves_its_neighbour_alone(loss):
    logits, label = random_logits_and_label(7)
    label[0] = 255
    logits.requires_grad_()
    values = loss(logits, label)
    values.sum().backward()
    assert values[0] == 0
    assert torch.equal(values[1:], loss(logits[1:], label[1:]))
    assert (logits.grad[0] == 0).all()
    assert logits.grad[1:].isfinite().all()
    assert logits.grad[1:].any()
    everything = loss(logits, torch.full_like(label, 255))
    assert torch.equal(everything, torch.zeros(3))


@each_objective
def test_ignored_pixels_have_no_influence(loss):
    logits, label = random_logits_and_label(8)
    other = torch.where((label == 255).unsqueeze(1), -logits, logits)
    assert torch.equal(loss(logits, label), loss(other, label))


@each_objective
@pytest.mark.parametrize("wrong", [5, 254, -1])
def test_an_id_out_of_range_makes_its_own_sample_nan(loss, wrong):
    logits, label = random_logits_and_label(9)
    expected = loss(logits, label)
    label[1, 2, 3] = wrong
    values = loss(logits, label)
    assert values[1].isnan()
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


@each_objective
def test_label_losses_have_right_gradients(loss):
    logits, label = random_logits_and_label(10)
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits.double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, label = random_logits_and_label(11)
    logits = logits.to(dtype)
    for loss in OBJECTIVES.values():
        assert loss(logits, label).dtype == torch.float32
        assert torch.equal(loss(logits, label), loss(logits.float(), label))
    picture = torch.full((1, 3, 64, 64), 300.0, dtype=dtype)  # its square is beyond float16
    assert losses.regression("mse", picture, torch.zeros_like(picture)).item() == pytest.approx(90000.0, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_dice_equals_its_formula_in_numpy(seed):
    logits, label = random_logits_and_label(seed)
    shares = logits.double().softmax(dim=1).numpy()
    ours = losses.dice(logits, label)
    for i in range(3):
        counted = label[i].numpy() != 255
        scores = []
        for k in np.unique(label[i].numpy()[counted]):
            p, g = shares[i, k][counted], (label[i].numpy() == k)[counted].astype(float)
            scores.append(1 - 2 * (p * g).sum() / ((p**2).sum() + (g**2).sum()))
        assert ours[i].item() == pytest.approx(np.mean(scores), abs=1e-5)


def test_dice_equals_smp_where_shares_are_hard():
    # smp's denominator has p where Milletari's has p^2: equal for p in {0, 1}. Every class is in the label, for smp
    # divides by all classes.
    draw = generator(12)
    guess, label = torch.randint(0, 4, (1, 8, 8), generator=draw), torch.randint(0, 4, (1, 8, 8), generator=draw)
    logits = 100.0 * F.one_hot(guess, 4).permute(0, 3, 1, 2).float()
    assert torch.allclose(losses.dice(logits, label), DiceLoss("multiclass")(logits, label), atol=1e-5)


def test_dice_is_zero_for_the_truth_and_one_for_its_opposite():
    label = torch.tensor([[[0, 1], [1, 0]]])
    right = 100.0 * F.one_hot(label, 3).permute(0, 3, 1, 2).float()
    assert losses.dice(right, label).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.dice(right.roll(1, dims=1), label).item() == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, smoothing=st.floats(0.0, 0.9), weighted=st.booleans())
def test_label_smoothing_of_each_sample_equals_torch(seed: int, smoothing: float, weighted: bool) -> None:
    logits, label = random_logits_and_label(seed)
    weights = torch.rand(5, generator=generator(seed + 1)) + 0.1 if weighted else None
    ours = losses.cross_entropy(logits, label, weights=weights, smoothing=smoothing)
    for i in range(3):
        options = {"weight": weights, "ignore_index": 255, "label_smoothing": smoothing}
        theirs = F.cross_entropy(logits[i : i + 1], label[i : i + 1], **options)
        assert torch.allclose(ours[i], theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, share=st.floats(0.01, 1.0))
def test_the_hardest_pixels_are_those_that_cost_most(seed: int, share: float) -> None:
    logits, label = random_logits_and_label(seed)
    ours = losses.cross_entropy(logits, label, hardest=share)
    values = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    for i in range(3):
        counted = values[i][label[i] != 255].sort(descending=True).values
        most = max(1, round(np.float32(share) * np.float32(len(counted))))
        assert torch.allclose(ours[i], counted[:most].mean(), rtol=1e-5)


def test_of_the_hardest_pixels_the_mean_is_weighted() -> None:
    logits = torch.tensor([[[0.0, 1.0, 4.0], [0.0, 0.0, 0.0]]])  # (1, 2, 3): shares of the first class 1/2, 0.73, 0.98
    label = torch.tensor([[1, 0, 1]])
    values = F.cross_entropy(logits, label, reduction="none")[0]
    ours = losses.cross_entropy(logits, label, weights=torch.tensor([3.0, 1.0]), hardest=0.99)
    assert torch.allclose(ours, (values[0] + 3 * values[1] + values[2]) / 5)
    two = losses.cross_entropy(logits, label, weights=torch.tensor([3.0, 1.0]), hardest=0.67)
    assert torch.allclose(two, (values[0] + values[2]) / 2), "the weights do not choose"


@settings(max_examples=30, deadline=None)
@given(seed=seeds, gamma=st.floats(0.5, 4.0))
def test_focal_of_two_classes_equals_smp(seed: int, gamma: float) -> None:
    logits, label = random_logits_and_label(seed, classes=2)
    ours = losses.focal(logits, label, gamma=gamma)
    theirs = FocalLoss("binary", gamma=gamma, ignore_index=255)
    for i in range(3):
        # smp has sigmoids, as the paper: a softmax over two classes is the sigmoid of their difference.
        assert torch.allclose(ours[i], theirs((logits[i, 1] - logits[i, 0]), label[i]), rtol=1e-4, atol=1e-6)


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, label = random_logits_and_label(13)
    weights = torch.tensor([0.1, 1.0, 2.0, 3.0, 4.0])
    for given_weights in (None, weights):
        ours = losses.focal(logits, label, weights=given_weights, gamma=0.0)
        assert torch.allclose(ours, losses.cross_entropy(logits, label, weights=given_weights))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, beta=st.floats(0.05, 0.95))
def test_tversky_of_each_sample_equals_smp(seed: int, beta: float) -> None:
    logits, label = random_logits_and_label(seed)
    ours = losses.tversky(logits, label, beta=beta)
    theirs = TverskyLoss("multiclass", alpha=1 - beta, beta=beta, ignore_index=255)
    for i in range(3):
        present = len(label[i][label[i] != 255].unique())  # smp divides by all classes
        expected = theirs(logits[i : i + 1], label[i : i + 1]) * 5 / present
        assert torch.allclose(ours[i], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, classes=st.integers(2, 6))
def test_lovasz_of_each_sample_equals_smp_and_so_does_its_gradient(seed: int, classes: int) -> None:
    logits, label = random_logits_and_label(seed, classes)
    logits.requires_grad_()
    ours = losses.lovasz(logits, label)
    theirs = LovaszLoss("multiclass", per_image=True, ignore_index=255)
    expected = torch.stack([theirs(logits[i : i + 1], label[i : i + 1]) for i in range(3)])
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)
    (own,) = torch.autograd.grad(ours.sum(), logits)
    (other,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(own, other, rtol=1e-3, atol=1e-6)


def test_lovasz_of_hard_answers_is_one_minus_iou() -> None:
    draw = generator(14)
    guess, label = torch.randint(0, 4, (1, 8, 8), generator=draw), torch.randint(0, 4, (1, 8, 8), generator=draw)
    logits = 100.0 * F.one_hot(guess, 4).permute(0, 3, 1, 2).float()
    iou = jaccard_score(label.flatten().numpy(), guess.flatten().numpy(), average="macro")
    assert losses.lovasz(logits, label).item() == pytest.approx(1 - iou, abs=1e-5)


def one_hot(label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The counted pixels, and their truth `(N, K)`."""
    counted = label != 255
    return counted, F.one_hot(label[counted], classes).float()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, classes=st.integers(2, 6))
def test_binary_of_each_sample_equals_torch_and_so_does_its_gradient(seed: int, classes: int) -> None:
    logits, label = random_logits_and_label(seed, classes)
    logits.requires_grad_()
    ours = losses.binary(logits, label)
    expected = []
    for i in range(3):
        counted, truth = one_hot(label[i], classes)
        expected.append(F.binary_cross_entropy_with_logits(logits[i].movedim(0, -1)[counted], truth))
    assert torch.allclose(ours, torch.stack(expected), rtol=1e-5, atol=1e-6)
    (own,) = torch.autograd.grad(ours.sum(), logits)
    (other,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    assert torch.allclose(own, other, rtol=1e-4, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, beta=st.floats(0.05, 3.0))
def test_smooth_l1_of_each_sample_equals_torch_and_so_does_its_gradient(seed: int, beta: float) -> None:
    logits, label = random_logits_and_label(seed)
    logits.requires_grad_()
    ours = losses.smooth_l1(logits, label, beta=beta)
    expected = []
    for i in range(3):
        counted, truth = one_hot(label[i], 5)
        expected.append(F.smooth_l1_loss(logits[i].movedim(0, -1)[counted], truth, beta=beta))
    assert torch.allclose(ours, torch.stack(expected), rtol=1e-5, atol=1e-6)
    (own,) = torch.autograd.grad(ours.sum(), logits)
    (other,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    assert torch.allclose(own, other, rtol=1e-4, atol=1e-7)


def test_the_least_of_both_is_the_truth() -> None:
    _, label = random_logits_and_label(15, ignored=0.0)
    truth = F.one_hot(label, 5).permute(0, 3, 1, 2).float()
    assert not losses.smooth_l1(truth, label).any()
    assert losses.binary(100.0 * (2.0 * truth - 1.0), label).max() < 1e-6
    assert losses.smooth_l1(-truth, label).min() > 0.1


@pytest.mark.parametrize("loss", [losses.binary, losses.smooth_l1])
def test_an_ignored_output_that_is_not_finite_has_no_part(loss: Callable[..., Tensor]) -> None:
    logits, label = random_logits_and_label(16)
    ignored = (label == 255).unsqueeze(1)
    expected = loss(logits, label)
    spoilt = torch.where(ignored, torch.inf, logits).requires_grad_()
    values = loss(spoilt, label)
    assert torch.equal(values, expected)
    values.sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert not torch.where(ignored, spoilt.grad, 0.0).any()


def test_both_take_class_vectors_and_lists_of_tiles() -> None:
    draw = generator(17)
    logits, label = torch.randn(4, 6, 9, generator=draw), torch.randint(0, 6, (4, 9), generator=draw)
    for loss in (losses.binary, losses.smooth_l1):
        alone = torch.stack([loss(logits[..., place], label[:, place]) for place in range(9)])
        assert torch.allclose(loss(logits, label), alone.mean(dim=0))


@each_objective
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_order_of_pixels_and_what_is_ignored_change_no_loss(loss: Callable[..., Tensor], seed: int) -> None:
    logits, label = random_logits_and_label(seed)
    flat, ids = logits.flatten(2).requires_grad_(), label.flatten(1)
    order = torch.randperm(ids.shape[1], generator=generator(seed))
    values = loss(flat, ids)
    assert torch.allclose(values, loss(flat[..., order], ids[:, order]), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), flat)
    assert gradient.isfinite().all()
    assert (gradient.movedim(1, -1)[ids == 255] == 0).all()
    more = torch.randn(3, 5, 9, generator=generator(seed + 1))
    wider = loss(torch.cat([flat, more], dim=2), torch.cat([ids, torch.full((3, 9), 255)], dim=1))
    assert torch.allclose(values, wider, rtol=1e-5, atol=1e-6), "as if they were not there"


# ---- nothing to count, one class only, a class that is absent: every loss there is ----

CLASSES = 4
SIDE = 6
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 7.0])


def labels() -> dict[str, Tensor]:
    """`(2, H, W)` each: what masks in the wild are like."""
    some = torch.randint(0, CLASSES - 1, (2, SIDE, SIDE), generator=generator(20))  # the last class is absent
    blank = torch.full_like(some, 255)
    holed, single, half = some.clone(), blank.clone(), some.clone()
    holed[torch.rand(some.shape, generator=generator(21)) < 0.5] = 255
    single[:, 2, 3] = 1
    half[1] = 255
    return {
        "absent class": some,
        "holes": holed,
        "all ignored": blank,
        "one image all ignored": half,
        "first class only": torch.zeros_like(some),
        "last class only": torch.full_like(some, CLASSES - 1),
        "one pixel": single,
    }


def regions() -> dict[str, Tensor]:
    """`(2, 1, H, W)` each: where a dense loss counts."""
    ones = torch.ones(2, 1, SIDE, SIDE)
    half, single = ones.clone(), torch.zeros_like(ones)
    half[1] = 0
    single[:, :, 2, 3] = 1
    return {"everywhere": ones, "nowhere": torch.zeros_like(ones), "one image": half, "one pixel": single}


Call = Callable[
    [Tensor, Tensor], Tensor
]  # of a prediction (2, CLASSES, H, W) and a label, or where a dense loss counts


def calls_of(name: str, function: Callable[..., Tensor]) -> dict[str, tuple[str, Call]]:
    """Each way to call a loss, and whether it takes labels or a region: known by the names of its parameters."""
    parameters = inspect.signature(function).parameters
    if {"logits", "label"} <= set(parameters):
        calls = {name: ("label", lambda logits, label: function(logits, label))}
        if "weights" in parameters:
            calls[f"{name} weighted"] = ("label", lambda logits, label: function(logits, label, weights=WEIGHTS))
        if {"smoothing", "hardest"} <= set(parameters):
            changed = {"smoothing": 0.1, "hardest": 0.5}
            calls[f"{name} changed"] = ("label", lambda logits, label: function(logits, label, **changed))
        return calls
    if {"kind", "prediction", "target", "loss_mask"} <= set(parameters):
        return {f"{name} {kind}": ("region", _dense(function, kind)) for kind in KINDS}
    if {"prediction", "target", "loss_mask"} <= set(parameters):
        return {name: ("region", _dense(function))}
    if list(parameters) == ["values", "loss_mask"]:
        return {name: ("region", function)}
    raise AssertionError(f"losses.{name}: name its parameters as its neighbours', or say here how it is called")


def _dense(function: Callable[..., Tensor], *first: Any) -> Call:
    target = torch.rand(2, CLASSES, SIDE, SIDE, generator=generator(22))

    def call(prediction: Tensor, loss_mask: Tensor) -> Tensor:
        # What a target holds where it does not count is often not a number: depth, for one.
        return function(*first, prediction, torch.where(loss_mask > 0, target, torch.nan), loss_mask)

    return call


def segment_calls() -> dict[str, tuple[str, Call]]:
    """Every combination that `segment:` may ask for."""
    image = torch.zeros(2, 3, SIDE, SIDE)
    calls = {}
    for cross_entropy, dice in ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3)):
        for class_weights in (None, tuple(WEIGHTS.tolist()), "median"):
            options = {"cross_entropy": cross_entropy, "dice": dice, "class_weights": class_weights}
            task = Segment(num_classes=CLASSES, **options)

            def call(logits: Tensor, label: Tensor, task: Segment = task) -> Tensor:
                prepared = task.prepare(*counted_pixels(label))
                return prepared.loss(logits, View(image, label))

            calls[f"segment {options}"] = ("label", call)
    everything = {"dice": 0.5, "focal": 0.5, "tversky": 0.5, "lovasz": 0.5, "label_smoothing": 0.1, "hardest": 0.5}
    everything |= {"binary": 0.5, "smooth_l1": 0.5}
    balance = {"balance": "median", "power": 0.5, "cap": 3}
    task = Segment.model_validate({"num_classes": CLASSES, **everything, "class_weights": balance})
    calls["segment of everything"] = ("label", partial(call, task=task))
    return calls


def counted_pixels(label: Tensor) -> tuple[Tensor, Tensor]:
    """Each class's pixels, and all the counted ones of the images that show it."""
    counts = torch.stack([torch.bincount(one[one != 255], minlength=CLASSES) for one in label])  # (B, K)
    beside = (counts > 0) * counts.sum(dim=1, keepdim=True)
    return counts.sum(dim=0), beside.sum(dim=0)


def every_call() -> dict[str, tuple[str, Call]]:
    own = {
        name: function
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__module__ == losses.__name__ and not name.startswith("_")
    }
    return {case: call for name, function in own.items() for case, call in calls_of(name, function).items()} | (
        segment_calls()
    )


CALLS = every_call()
TARGETS = {"label": labels(), "region": regions()}
TABLE = [(name, case) for name, (takes, _) in CALLS.items() for case in TARGETS[takes]]


def test_the_table_holds_every_loss():
    assert {"masked_mean", "regression mse", "cross_entropy weighted", "dice", "lovasz"} <= set(CALLS)
    with pytest.raises(AssertionError, match=r"losses\.new: name its parameters"):
        calls_of("new", lambda a, b: a)


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_a_loss_and_its_gradient_are_finite_and_zero_where_nothing_counts(name: str, case: str) -> None:
    takes, call = CALLS[name]
    target = TARGETS[takes][case]
    counted = target != 255 if takes == "label" else target[:, 0] > 0  # (B, H, W)
    for dtype in PRECISIONS:
        drawn = 3 * torch.randn(2, CLASSES, SIDE, SIDE, generator=generator(23))
        prediction = drawn.to(dtype).requires_grad_()
        loss = call(prediction, target)
        assert loss.shape == (2,)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.isfinite().all(), dtype
        some = counted.flatten(1).any(dim=1)
        assert (loss[~some] == 0).all(), dtype
        (gradient,) = torch.autograd.grad(loss.mean(), prediction)
        assert gradient.isfinite().all(), dtype
        assert (gradient.movedim(1, -1)[~counted] == 0).all(), dtype
        assert gradient[some].flatten(1).any(dim=1).all(), "what counts is learnt from"


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("name", [name for name, (takes, _) in CALLS.items() if takes == "label"])
def test_a_network_that_is_sure_or_knows_nothing_has_a_finite_loss(name: str, scale: float) -> None:
    for target in labels().values():
        logits = (scale * torch.randn(2, CLASSES, SIDE, SIDE, generator=generator(24))).requires_grad_()
        loss = CALLS[name][1](logits, target)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


NEEDED = {"distill": {"teacher": {"name": "resnet10t", "pretrained": False}}}  # options that have no default


@pytest.mark.parametrize("name", PretextTask.names())
def test_a_pretext_task_bears_images_of_one_colour(name: str) -> None:
    task = PretextTask.choose(name)(**NEEDED.get(name, {}))
    levels = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    images = levels.expand(3, 3, 64, 64).contiguous()
    task = task.prepare(images)
    view = task.view({"pool": Batch(images, rng.fold_in(rng.as_key(name), torch.arange(3)))})
    assert view.input.isfinite().all()
    head = task.head(_spec())
    strides = (2, 4, 8, 16, 32)
    maps = [torch.randn(len(view.input), 8, 64 // stride, 64 // stride) for stride in strides]
    features = Features(maps, strides)
    prediction = head(features, (64, 64))
    loss = task.loss(prediction.float(), view)
    assert loss.isfinite().all()
    loss.mean().backward()
    assert all(weight.grad.isfinite().all() for weight in head.parameters() if weight.grad is not None)


def _spec() -> EncoderSpec:
    def dense(out_channels: int, stride: int = 1, decoder: str = "full") -> nn.Module:
        return DenseHead(FirstLevel(), out_channels, stride)

    return EncoderSpec((8,) * 5, (2, 4, 8, 16, 32), dense)


class FirstLevel(DecoderNet):
    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 8
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, features: Features) -> Tensor:
        return self.mix(features[0])


# ---- and the score of such masks ----


@pytest.mark.parametrize("guess", ["right", "one class", "any"])
@pytest.mark.parametrize("case", labels())
def test_miou_is_over_the_classes_that_occur(case: str, guess: str) -> None:
    truth = labels()[case]
    anything = torch.randint(0, CLASSES, truth.shape, generator=generator(25))
    prediction = {"right": truth.clamp(max=CLASSES - 1), "one class": torch.ones_like(truth), "any": anything}[guess]
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(truth, prediction)
    scores = matrix.scores()
    counted = truth != 255
    if not counted.any():
        assert math.isnan(scores.miou)
        return
    y, p = truth[counted].numpy(), prediction[counted].numpy()
    occurring = np.union1d(y, p)
    assert scores.miou == pytest.approx(jaccard_score(y, p, labels=occurring, average="macro", zero_division=0))
    theirs = torchmetrics.JaccardIndex("multiclass", num_classes=CLASSES, average="none", ignore_index=255)
    assert scores.iou[occurring] == pytest.approx(theirs(prediction, truth).numpy()[occurring], abs=1e-6)
    assert np.isnan(np.delete(scores.iou, occurring)).all()


# ---- a fine-tuning on such masks ----

SEGMENTS = (
    {},
    {"cross_entropy": 0.0, "dice": 1.0},
    {"dice": 1.0, "class_weights": "median"},
    {"cross_entropy": 0.0, "smooth_l1": 1.0, "binary": 1.0},
)


class Masks(Textured):
    """Textured scenes with a third class that none shows, and one fault a mask."""

    fault: str = "mixed"

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("ground", "disc", "unicorn")

    def read(self, index: int) -> Any:
        example = super().read(index)
        fault = ("ignored", "one class", "none", "last class")[index % 4] if self.fault == "mixed" else self.fault
        example.label[:] = {"ignored": 255, "one class": 0, "last class": 2, "none": example.label}[fault]
        return example


def faulty(folder: Path, parts: dict[str, str], segment: dict[str, Any], **train: Any) -> dict[str, Any]:
    """The result.json of a short fine-tuning with these faults in the masks of its parts."""
    values = finetuning(steps=3, **train)
    for part, dataset in values["data"].items():
        dataset.update(type="masks", count=4, fault=parts.get(part, "mixed"))
    done = finetune(load(FinetuneConfig, {**values, "segment": segment}), Options(folder, quiet=True))
    assert all(value.isfinite().all() for value in load_file(done.folder / "model/model.safetensors").values())
    for line in read_metrics(folder):
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line
    text = (folder / "result.json").read_text()
    assert "NaN" not in text
    return json.loads(text)


@pytest.mark.parametrize("segment", SEGMENTS)
def test_faulty_masks_train_and_are_scored(tmp_path: Path, segment: dict[str, Any]) -> None:
    result = faulty(tmp_path / "run", {}, segment)
    for part in ("val", "test"):
        scores = result[part]
        named = [value for name, value in scores.items() if name.startswith("iou/")]
        present = [value for value in named if value is not None]
        assert scores["averaged_classes"] == len(present) > 0
        assert scores["miou"] == pytest.approx(sum(present) / len(present))
        assert all(0.0 <= value <= 1.0 for value in present)


@pytest.mark.parametrize("eval_every", [None, 1])
def test_masks_of_which_nothing_counts_are_no_score_and_no_end(tmp_path: Path, eval_every: int | None) -> None:
    parts = {"val": "ignored", "test": "ignored"}
    result = faulty(tmp_path / "run", parts, SEGMENTS[-1], eval_every=eval_every)
    assert result["selected_step"] == result["steps"] == 3, "no step is the best one, so the last is taken"
    for part in ("val", "test"):
        assert result[part]["averaged_classes"] == 0
        assert result[part]["miou"] is None


@pytest.mark.parametrize("fault", ["one class", "last class"])
def test_masks_of_one_class_are_learnt(tmp_path: Path, fault: str) -> None:
    result = faulty(tmp_path / "run", dict.fromkeys(("labelled", "val", "test"), fault), SEGMENTS[-1])
    assert result["test"]["averaged_classes"] >= 1
    assert 0.0 <= result["test"]["miou"] <= 1.0
    assert result["test"]["iou/disc"] in (None, 0.0)


use_plugin(__name__)  # so that `type: masks` is found

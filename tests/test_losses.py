from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.losses import DiceLoss
from torch.nn import functional as F

from ssl_seg import losses

KINDS = ("mse", "l1", "charbonnier", "smooth_l1")
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
    where = torch.rand(3, 1, 4, 5, generator=draw) * (torch.rand(3, 1, 4, 5, generator=draw) < 0.5)
    where[:, :, 0, 0] = 0.25
    expected = [
        np.average(values[i].numpy().astype(float), weights=where[i].expand(2, -1, -1).numpy().astype(float))
        for i in range(3)
    ]
    assert losses.masked_mean(values, where).numpy() == pytest.approx(np.array(expected), rel=1e-4, abs=1e-6)


def test_a_uniform_weight_changes_nothing():
    values = torch.rand(2, 3, 4, 5, generator=generator(1))
    assert torch.allclose(losses.masked_mean(values, torch.full((2, 1, 4, 5), 1e-3)), losses.masked_mean(values))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_weight_zero_have_no_influence_even_if_not_finite(kind):
    draw = generator(2)
    prediction, target = torch.rand(2, 3, 4, 4, generator=draw), torch.rand(2, 3, 4, 4, generator=draw)
    where = torch.ones(2, 1, 4, 4)
    where[:, :, 1] = 0
    expected = losses.regression(kind, prediction, target, where)
    spoiled = target.clone()
    spoiled[:, :, 1] = torch.inf
    assert torch.equal(losses.regression(kind, prediction, spoiled, where), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_regression_is_zero_with_a_finite_gradient_where_no_pixel_counts(kind):
    prediction = torch.rand(2, 3, 4, 4, generator=generator(3)).requires_grad_()
    where = torch.zeros(2, 1, 4, 4)
    where[1] = 1
    loss = losses.regression(kind, prediction, torch.zeros(2, 3, 4, 4), where)
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
    where = torch.rand(2, 1, 3, 3, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: losses.regression(kind, p, target, where), prediction)


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


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dice])
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


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dice])
def test_ignored_pixels_have_no_influence(loss):
    logits, label = random_logits_and_label(8)
    other = torch.where((label == 255).unsqueeze(1), -logits, logits)
    assert torch.equal(loss(logits, label), loss(other, label))


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dice])
@pytest.mark.parametrize("wrong", [5, 254, -1])
def test_an_id_out_of_range_makes_its_own_sample_nan(loss, wrong):
    logits, label = random_logits_and_label(9)
    expected = loss(logits, label)
    label[1, 2, 3] = wrong
    values = loss(logits, label)
    assert values[1].isnan()
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dice])
def test_label_losses_have_right_gradients(loss):
    logits, label = random_logits_and_label(10)
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits.double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, label = random_logits_and_label(11)
    logits = logits.to(dtype)
    for loss in (losses.cross_entropy, losses.dice):
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

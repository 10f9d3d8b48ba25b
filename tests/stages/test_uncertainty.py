"""Samples with dropout against sums by hand: the same whatever lies beside an image, and nothing but dropout is on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.config import UserError, load
from ssl_seg.stages.uncertainty import DropoutSampling, check_dropout, sample


class Kept(nn.Module):
    """A dropout that keeps or drops the whole batch in turn, as `pattern` says, and takes no random numbers."""

    def __init__(self, *pattern: int) -> None:
        super().__init__()
        self.unused = nn.Dropout(0.5)
        self.pattern = pattern
        self.seen = 0

    def forward(self, image: Tensor) -> Tensor:
        kept = self.pattern[self.seen % len(self.pattern)]
        self.seen += 1
        red = image[:, :1] * kept
        return torch.cat([red, -red, torch.zeros_like(red)], dim=1)


def test_two_samples_by_hand() -> None:
    """Shares of e : 1/e : 1 where it is kept, thirds where it is dropped."""
    found = sample(Kept(1, 0).eval(), torch.ones(1, 3, 2, 2), (2, 2), DropoutSampling(samples=2), ["a"])
    total = math.e + 1 / math.e + 1
    kept = torch.tensor([math.e, 1 / math.e, 1]) / total
    mean = (kept + 1 / 3) / 2
    torch.testing.assert_close(found.mean[0, :, 0, 0], mean)
    variance = ((kept - mean).square() + (1 / 3 - mean).square()) / 2  # of each class, by two samples
    assert found.deviation.shape == (1, 2, 2)
    assert found.deviation[0, 1, 1].item() == pytest.approx(math.sqrt(variance.mean() / (2 / 3 / 3)), rel=1e-5)


@pytest.mark.parametrize("number", [2, 5, 12])
def test_mean_and_variance_are_numpys(number: int) -> None:
    model, image = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.4), nn.Conv2d(4, 3, 1)).eval(), torch.rand(1, 3, 4, 5)
    found = sample(model, image, (8, 10), DropoutSampling(samples=number, seed=3), ["a"])
    key = rng.fold_in(rng.fold_in(rng.as_key(3), "dropout"), "a")
    shares = []
    for each in range(number):
        torch.manual_seed(int(rng.fold_in(key, each)) & (2**63 - 1))
        logits = model.train()(image)
        shares.append(nn.functional.interpolate(logits, size=(8, 10), mode="bilinear").softmax(1)[0].detach().numpy())
    model.eval()
    stacked = torch.from_numpy(np.stack(shares))
    torch.testing.assert_close(found.mean[0], stacked.mean(0))
    variance = stacked.var(0, correction=0).mean(0)
    torch.testing.assert_close(found.deviation[0], (variance / ((1 - 1 / 3) / 3)).sqrt(), atol=1e-4, rtol=1e-3)


def test_samples_that_are_sure_of_different_classes_differ_as_much_as_can_be() -> None:
    model = Kept(1, -1).eval()
    two_classes = nn.Sequential(model, nn.Conv2d(3, 2, 1, bias=False))
    two_classes[1].weight.data = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[..., None, None]
    found = sample(two_classes, torch.full((1, 3, 1, 1), 99.0), (1, 1), DropoutSampling(samples=4), ["a"])
    assert found.deviation.item() == pytest.approx(1)
    assert found.mean.flatten().tolist() == pytest.approx([0.5, 0.5])
    alike = sample(Kept(1).eval(), torch.rand(1, 3, 4, 4), (4, 4), DropoutSampling(samples=7), ["a"])
    assert alike.deviation.max() == 0


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Dropout2d(0.3), nn.Conv2d(8, 3, 1)]
    return nn.Sequential(*layers).eval()


def test_what_is_dropped_depends_on_seed_and_name_alone(model: nn.Module) -> None:
    images, sampling = torch.rand(3, 3, 8, 8), DropoutSampling(samples=3, seed=1)
    together = sample(model, images, (8, 8), sampling, ["a", "b", "c"])
    dice = torch.get_rng_state()
    backwards = sample(model, images.flip(0), (8, 8), sampling, ["c", "b", "a"])
    for own, other in zip(together, backwards, strict=True):
        assert torch.equal(own, other.flip(0))
    alone = sample(model, images[1:2], (8, 8), sampling, ["b"])
    assert torch.equal(alone.deviation, together.deviation[1:2])
    assert torch.equal(torch.get_rng_state(), dice), "the generator goes on as before"
    other = sample(model, images, (8, 8), DropoutSampling(samples=3, seed=2), ["a", "b", "c"])
    assert not torch.equal(other.mean, together.mean)
    assert not torch.equal(sample(model, images[1:2], (8, 8), sampling, ["a"]).mean, alone.mean)
    lying = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sample(model, lying, (8, 8), sampling, ["a", "b", "c"]).mean, together.mean)


def test_nothing_but_dropout_is_as_in_training(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[3].p = 0.0
    sample(model, torch.rand(2, 3, 8, 8), (8, 8), DropoutSampling(samples=2), ["a", "b"])
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(part.training for part in model.modules())


def test_a_network_without_dropout_is_refused_in_a_line_that_says_where_to_get_some(model: nn.Module) -> None:
    check_dropout(model)
    for layer in (model[2], model[3]):
        layer.p = 0.0
    with pytest.raises(
        UserError, match=r"^uncertainty: the model has no dropout.*model\.encoder\.dropout=0\.5.*segnet"
    ):
        check_dropout(model)
    with pytest.raises(UserError, match="samples"):
        load(DropoutSampling, {"samples": 1})

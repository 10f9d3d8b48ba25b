"""A frozen encoder: no gradient, no moments, statistics left alone; for the whole run or for its first steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_seg.config import load
from ssl_seg.data.loading import Samples
from ssl_seg.norm.layers import SwitchNorm2d
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.setup import recalibrate
from ssl_seg.stages.start import build_module
from ssl_seg.training.config import TrainConfig, frozen_at
from ssl_seg.training.learner import Learner
from ssl_seg.training.processes import Processes
from tests.small import pretraining
from tests.training.test_loop import run, weights

UNET = {"type": "unet", "channels": [32, 16, 16, 8, 8]}  # with batch norm, which an fpn has not


def make(norm: str = "batch", **changed: Any) -> tuple[Learner, dict[str, Samples]]:
    values = pretraining(**changed)
    config = load(PretrainConfig, {**values, "model": {**values["model"], "decoder": UNET, "norm": norm}})
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, Processes(config.train))
    return learner, {"pool": Samples(config.data.pool, config.augment, config.seed)}


def of(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(f"{part}.")}


def test_when_the_encoder_is_frozen() -> None:
    assert [frozen_at(TrainConfig(freeze_encoder=2), step) for step in range(4)] == [True, True, False, False]
    assert frozen_at(TrainConfig(encoder_lr=0), 10**6)
    assert not frozen_at(TrainConfig(), 0)


@pytest.mark.parametrize("norm", ["batch", "switch"])
def test_a_rate_of_zero_leaves_the_encoder_alone(norm: str) -> None:
    learner, sources = make(norm, encoder_lr=0.0, steps=3)
    before = weights(learner)
    list(run(learner, sources))
    after = weights(learner)
    torch.testing.assert_close(of("encoder", after), of("encoder", before), rtol=0, atol=0)
    heads = of("heads", after)
    statistics = [name for name in heads if name.endswith("running_mean")]
    assert statistics
    assert not any(torch.equal(heads[name], before[name]) for name in statistics)
    assert not torch.equal(after["heads.denoise.last.weight"], before["heads.denoise.last.weight"])
    assert all(weight.grad is None for weight in learner.module.encoder.parameters())
    in_optimizer = {id(weight) for group in learner.optimizer.param_groups for weight in group["params"]}
    assert in_optimizer == {id(weight) for weight in learner.module.heads.parameters()}
    assert not any(name.startswith("optimizer/encoder.") for name in learner.tensors())


def test_its_norms_and_its_dropout_are_in_evaluation_mode() -> None:
    learner, _ = make(encoder_lr=0.0)
    learner.module.train()
    assert not any(part.training for part in learner.module.encoder.modules())
    assert all(part.training for part in learner.module.heads.modules())
    learner.module.freeze(False)
    assert all(part.training for part in learner.module.modules())


def test_it_learns_after_the_first_steps_and_its_moments_begin_there() -> None:
    frozen, sources = make(freeze_encoder=2, steps=5)
    fixed, _ = make(encoder_lr=0.0, steps=5)
    start = of("encoder", weights(frozen))
    for step, other in zip(run(frozen, sources), run(fixed, sources), strict=True):
        now = weights(frozen)
        if step.number <= 2:
            assert step.metrics == other.metrics
            torch.testing.assert_close(of("encoder", now), start, rtol=0, atol=0)
    changed = {name for name, value in of("encoder", now).items() if not torch.equal(value, start[name])}
    learnt = {f"encoder.{name}" for name, _ in frozen.module.encoder.named_parameters()}
    assert learnt <= changed
    assert any(name.endswith("running_mean") for name in changed)
    counts = {name: value.item() for name, value in frozen.tensors().items() if name.endswith("/step")}
    assert {count for name, count in counts.items() if name.startswith("optimizer/encoder.")} == {3.0}
    assert {count for name, count in counts.items() if name.startswith("optimizer/heads.")} == {5.0}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_state_from_before_at_and_after_the_thaw_goes_on_bit_for_bit(at: int, optimizer: str) -> None:
    settings = {"freeze_encoder": 2, "steps": 4, "optimizer": optimizer}
    whole, sources = make(**settings)
    for step in run(whole, sources):
        if step.number == at:
            saved, data = {name: value.clone() for name, value in whole.tensors().items()}, whole.data()
    other, _ = make(**settings)
    other.restore(saved, data)
    list(run(other, sources, start=at))
    torch.testing.assert_close(other.tensors(), whole.tensors(), rtol=0, atol=0)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_probe_then_layers_with_rates_of_their_own_and_an_average_go_on_bit_for_bit(at: int) -> None:
    """Linear probe, then fine-tuning from the last layer on, exported as the moving average."""
    settings = {"freeze_encoder": 2, "layer_decay": 0.5, "encoder_lr": 0.5, "ema": 0.9, "steps": 4}
    whole, sources = make(**settings)
    start = of("encoder", weights(whole))
    plain, _ = make(**{**settings, "layer_decay": 1.0})
    for step, other in zip(run(whole, sources), run(plain, sources), strict=True):
        if step.number <= 3:  # the update of step 3 is the first in which the rates tell
            assert step.metrics == other.metrics
        if step.number == 2:
            torch.testing.assert_close(of("encoder", weights(whole)), start, rtol=0, atol=0)
        if step.number == at:
            saved, data = {name: value.clone() for name, value in whole.tensors().items()}, whole.data()
    stem = "encoder.backbone.network.conv_stem.weight"
    assert not torch.equal(weights(whole)[stem], weights(plain)[stem])
    assert not torch.equal(weights(whole)[stem], whole.evaluated.state_dict()[stem])
    other, _ = make(**settings)
    other.restore(saved, data)
    list(run(other, sources, start=at))
    torch.testing.assert_close(other.tensors(), whole.tensors(), rtol=0, atol=0)


def test_what_never_learns_does_not_begin_to() -> None:
    learner, _ = make(freeze_encoder=1)
    learner.module.freeze(False)
    first = next(learner.module.encoder.parameters())
    first.requires_grad_(False)
    learner.module.freeze(True)
    learner.module.freeze(False)
    assert not first.requires_grad
    assert sum(weight.requires_grad for weight in learner.module.encoder.parameters()) > 1


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("settings", [{"encoder_lr": 0.0}, {"freeze_encoder": 9}, {"freeze_encoder": 1}])
def test_recalibration_leaves_an_encoder_that_is_frozen(settings: dict[str, Any], ema: float | None) -> None:
    learner, sources = make(**settings, ema=ema, steps=2)
    list(run(learner, sources))
    before = {name: value.clone() for name, value in learner.evaluated.state_dict().items()}
    assert recalibrate(learner, sources["pool"], 4) > 0
    after = learner.evaluated.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("heads.") for name in moved)
    assert any(name.startswith("encoder.") for name in moved) == (settings == {"freeze_encoder": 1})


def test_a_frozen_switch_norm_mixes_what_it_mixes_in_evaluation() -> None:
    learner, _ = make("switch", encoder_lr=0.0)
    layer = next(layer for layer in learner.module.encoder.modules() if isinstance(layer, SwitchNorm2d))
    learner.module.train()
    image = torch.rand(2, layer.num_features, 5, 5, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([layer(image[:1]), layer(image[1:])])
    torch.testing.assert_close(layer(image), alone)
    assert isinstance(layer.mean_logits, nn.Parameter)
    assert not layer.mean_logits.requires_grad


def test_a_head_without_weights_has_nothing_to_learn_while_the_encoder_is_frozen() -> None:
    """The encoder draws the picture, and the other task has a head of its own."""
    values = pretraining(freeze_encoder=1, steps=2)
    encoder = {"type": "stacked", "growth_rate": 16, "blocks": [1, 1, 1, 1], "width": 16, "halves": 2}
    encoder["decoder"] = {"type": "stacked", "widths": [16] * 7}
    values["model"] = {"encoder": encoder, "decoder": {"type": "stacked", "widths": [16] * 7}}
    values["tasks"] = {"denoise": {"decoder": "reconstruction"}, "rotate": {}}
    config = load(PretrainConfig, values)
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
    before = weights(learner)
    steps = run(learner, {"pool": Samples(config.data.pool, config.augment, 0)})
    assert next(steps).metrics["train/denoise/loss"] > 0
    torch.testing.assert_close(of("encoder", weights(learner)), of("encoder", before), rtol=0, atol=0)
    next(steps)
    assert any(not torch.equal(value, before[name]) for name, value in of("encoder", weights(learner)).items())

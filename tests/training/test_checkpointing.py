"""Parts of the encoder computed again: the same gradients and statistics, less kept; or refused in one line."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from ssl_seg.config import load
from ssl_seg.models import EncoderNet, ModelConfig
from ssl_seg.models.timm_maps import kept_bytes
from ssl_seg.training import processes
from ssl_seg.training.config import TrainConfig
from tests.faults import message_of
from tests.training.test_freezing import make
from tests.training.test_loop import run, weights


def encoder_of(name: str, norm: str = "keep") -> EncoderNet:
    torch.manual_seed(0)
    return (
        load(
            ModelConfig, {"encoder": {"name": name, "drop_path": 0.0 if name.startswith("vgg") else 0.1}, "norm": norm}
        )
        .build_encoder()
        .train()
    )


def after_a_pass(encoder: EncoderNet) -> dict[str, Tensor]:
    """Gradients and buffers after one training pass with stochastic depth."""
    torch.manual_seed(1)
    maps = encoder(torch.rand(2, 3, 64, 96))
    sum(level.square().mean() for level in maps if level.numel()).backward()
    gradients = {name: weight.grad for name, weight in encoder.named_parameters() if weight.grad is not None}
    return gradients | dict(encoder.named_buffers())


def check(name: str, norm: str = "keep") -> tuple[int, int]:
    plain, checkpointed = encoder_of(name, norm), encoder_of(name, norm)
    before = kept_bytes(checkpointed.backbone)
    checkpointed.checkpoint()
    wanted, found = after_a_pass(plain), after_a_pass(checkpointed)
    assert found.keys() == wanted.keys()
    for own, value in wanted.items():
        torch.testing.assert_close(found[own], value, rtol=1e-4, atol=1e-6, msg=lambda text, own=own: f"{own}: {text}")
    after = kept_bytes(checkpointed.backbone)
    assert after < before
    return before, after


@pytest.mark.parametrize(("name", "norm"), [("mobilenetv2_035", "keep"), ("resnet10t", "switch")])
def test_gradients_and_statistics_are_the_same(name: str, norm: str) -> None:
    check(name, norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "vgg11_bn",
        "mobilenetv2_100",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_patch16_224",
    ],
)
def test_core_encoders_learn_alike(name: str) -> None:
    before, after = check(name)
    print(f"\n{name}: {before / 2**20:.1f} MiB kept for the gradient, {after / 2**20:.1f} with checkpointing", end="")


def test_statistics_would_follow_twice() -> None:
    """What timm's own switch does alone, so that the comparison above can fail."""
    plain, twice = encoder_of("mobilenetv2_035"), encoder_of("mobilenetv2_035")
    twice.backbone.checkpoint()
    wanted, found = after_a_pass(plain), after_a_pass(twice)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_it_learns_as_one_without(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With it gradients of depthwise convolutions are torch's own, so that a second pass keeps what the first one did.
    monkeypatch.setattr(processes, "DepthwiseGradients", nullcontext)
    learnt = []
    for checkpointing in (False, True):
        learner, sources = make(steps=3, checkpointing=checkpointing, ema=0.9, precision=precision)
        list(run(learner, sources))
        learnt.append(weights(learner))
    torch.testing.assert_close(learnt[1], learnt[0], rtol=1e-4, atol=1e-5)


def test_depthwise_convolutions_in_half_precision_are_computed_again_alike() -> None:
    learner, sources = make(steps=2, checkpointing=True, precision="bf16")
    assert len(list(run(learner, sources))) == 2, "torch raises where the second pass keeps other tensors"


def test_what_cannot_is_refused_in_one_line() -> None:
    own = load(ModelConfig, {"encoder": {"type": "segnet_basic"}, "decoder": {"type": "segnet_basic"}}).build_encoder()
    assert message_of(own.checkpoint).startswith("train.checkpointing: this encoder keeps all that its gradient needs")
    tapped = load(ModelConfig, {"encoder": {"type": "mobilenet_unet", "name": "mobilenetv2_035"}}).build_encoder()
    assert message_of(tapped.checkpoint).startswith(
        "train.checkpointing: timm's mobilenetv2_035 has none that keeps less"
    )


def test_a_config_without_it_is_as_in_version_0_1() -> None:
    assert "checkpointing" not in TrainConfig().dump()
    assert TrainConfig(checkpointing=True).dump()["checkpointing"] is True

"""Depthwise convolutions in half precision: gradients as exact as those in single precision, in the memory of half."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.layers import create_conv2d
from torch import Tensor, nn

from ssl_seg.training.config import TrainConfig
from ssl_seg.training.depthwise import DepthwiseGradients
from ssl_seg.training.processes import Processes

CHANNELS, SIDE = 6, 13


def layers() -> dict[str, nn.Module]:
    """Depthwise ones of every kind that networks have; `same` is TensorFlow's padding by timm."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"padding": 1},
        "stride": {"kernel_size": 5, "stride": 2, "padding": 2},
        "dilation": {"padding": 2, "dilation": 2},
        "without bias": {"padding": 1, "bias": False},
        "two axes": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
        "torch pads": {"padding": "same"},
    }
    torch.manual_seed(0)
    made = {
        word: nn.Conv2d(CHANNELS, CHANNELS, **{"kernel_size": 3, **own}, groups=CHANNELS) for word, own in kinds.items()
    }
    made["same"] = create_conv2d(CHANNELS, CHANNELS, 3, stride=2, padding="same", depthwise=True)
    made["two maps each"] = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, groups=CHANNELS)
    return made


def gradients(layer: nn.Module, image: Tensor, half: bool, single: bool = False) -> list[Tensor]:
    """Of the output's squares, by the weights and the image."""
    layer.zero_grad()
    image = image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half), DepthwiseGradients() if single else nullcontext():
        out = layer(image)
    out.float().square().sum().backward()
    return [image.grad, *(weight.grad for weight in layer.parameters())]


@pytest.mark.parametrize("kind", layers())
def test_gradients_are_no_worse_than_those_of_half_precision(kind: str) -> None:
    layer = layers()[kind]
    image = torch.randn(4, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    exact = gradients(layer, image, half=False)
    plain = gradients(layer, image, half=True)
    ours = gradients(layer, image, half=True, single=True)
    for one, other, truth in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype == truth.dtype
        assert (one - truth).norm() <= 1.05 * (other - truth).norm() + 1e-6
        assert (one - truth).norm() <= 0.02 * truth.norm()


def test_other_convolutions_keep_their_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 2, groups=8))
    image = torch.randn(2, 3, SIDE, SIDE)
    for one, other in zip(gradients(layer, image, True), gradients(layer, image, True, single=True), strict=True):
        assert torch.equal(one, other)


def test_what_is_kept_for_them_is_in_half_precision() -> None:
    image = torch.randn(4, CHANNELS, SIDE, SIDE)
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        DepthwiseGradients(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
        ),
    ):
        layers()["plain"](image)
    assert [tensor.dtype for tensor in kept if tensor.shape == image.shape] == [torch.bfloat16]


@pytest.mark.parametrize(("precision", "is_ours"), [("bf16", True), ("fp32", False)])
def test_a_run_on_a_cpu_takes_them_in_half_precision_alone(precision: str, is_ours: bool) -> None:
    processes = Processes(TrainConfig(precision=precision, device="cpu"))
    with processes.autocast():
        out = layers()["plain"](torch.randn(1, CHANNELS, SIDE, SIDE))
    assert out.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert (type(out.grad_fn).__name__ == "_DepthwiseBackward") == is_ours

"""FCN: the sum of scores by hand, its counts, the maps it wants."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ssl_seg.config import load
from ssl_seg.models import DenseHead, Features, ModelConfig, SegmentationModel
from ssl_seg.models.fcn import FCN
from ssl_seg.testing import check_decoder
from tests.faults import message_of

CHANNELS, STRIDES = (4, 6, 8, 10, 12), (2, 4, 8, 16, 32)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_it_passes_the_public_check(stride: int):
    check_decoder(FCN(stride=stride, channels=16))


@pytest.mark.parametrize(("stride", "widths"), [(32, [12]), (16, [12, 10]), (8, [12, 10, 8])])
def test_it_adds_the_scores_of_its_maps(stride: int, widths: list[int]):
    """As the paper has it, with bilinear upsampling; one 1 x 1 convolution a map and no other weights."""
    torch.manual_seed(0)
    network = FCN(stride=stride, channels=7).build(CHANNELS, STRIDES)
    assert sum(weight.numel() for weight in network.parameters()) == sum(7 * width + 7 for width in widths)
    maps = [torch.randn(2, width, 64 // own, 96 // own) for width, own in zip(CHANNELS, STRIDES, strict=True)]
    coarse_first = [maps[CHANNELS.index(width)] for width in widths]
    summed = torch.zeros(2, 7, 1, 1)
    for score, level in zip(network.scores, coarse_first, strict=True):
        scored = torch.einsum("oc,bchw->bohw", score.weight[..., 0, 0], level) + score.bias.view(-1, 1, 1)
        summed = scored + F.interpolate(summed, size=level.shape[-2:], mode="bilinear")
    decoded = network(Features(maps, STRIDES))
    torch.testing.assert_close(decoded, summed)
    assert decoded.shape == (2, 7, 64 // stride, 96 // stride)


def test_the_network_is_linear_behind_the_encoder():
    """So a decoder and a head of it are the paper's scores: as many matrices as there are maps."""
    torch.manual_seed(0)
    head = DenseHead(FCN().build(CHANNELS, STRIDES), 3)
    assert head.last.kernel_size == (1, 1)
    one, two = ([torch.randn(1, c, 64 // s, 64 // s) for c, s in zip(CHANNELS, STRIDES, strict=True)] for _ in range(2))
    both = [first + second for first, second in zip(one, two, strict=True)]
    answers = [head(Features(maps, STRIDES), (64, 64)) for maps in (one, two, both)]
    nothing = head(Features([torch.zeros_like(level) for level in one], STRIDES), (64, 64))
    torch.testing.assert_close(answers[0] + answers[1] - nothing, answers[2])


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
def test_it_trains_every_weight_that_its_maps_come_from(encoder: str):
    torch.manual_seed(0)
    config = load(ModelConfig, {"encoder": encoder, "decoder": {"type": "fcn", "channels": 16}})
    network = config.build_encoder()
    model = SegmentationModel(network, config.spec(network).dense(2), ("a", "b"))
    answer = model(torch.rand(1, 3, 64, 50))
    assert answer.shape == (1, 2, 64, 50)
    answer.square().mean().backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None]


@pytest.mark.parametrize(
    ("stride", "strides", "wanted"),
    [
        (8, (2, 4, 8, 16, 16), "(8, 16, 32)"),
        (16, (8, 32), "(16, 32)"),
        (32, (1, 2, 4), "(32,)"),
    ],
)
def test_maps_that_do_not_fit_are_one_line(stride: int, strides: tuple[int, ...], wanted: str):
    text = message_of(lambda: FCN(stride=stride).build((8,) * len(strides), strides))
    assert text.startswith(
        f"model.decoder: fcn: wants maps at strides {wanted}, the last of them at 32, not {strides};"
    )

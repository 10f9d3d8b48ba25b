"""R2U-Net: its published size, weights that a recurrence shares, and the units that it is compared with."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretext.colorize import Colorize
from pretext.denoise import Denoise
from pretext.jigsaw import Jigsaw
from ssl_seg.config import load
from ssl_seg.models import Decoder, ModelConfig, SegmentationModel
from ssl_seg.models.r2unet import R2Unet, R2UnetDecoder, Recurrence, Unit, UnitNet
from ssl_seg.models.smp import Segformer, Unet
from ssl_seg.norm.convert import Kind, convert_norm, has_batch_norm
from ssl_seg.stages.start import build_module
from ssl_seg.tasks import PretextTask
from ssl_seg.testing import check_decoder, check_encoder
from tests.faults import message_of
from tests.small import learnt_by_heart

UNITS = get_args(Unit)
WIDTHS = (8, 8, 16, 16, 16)
SMALL = R2Unet(widths=WIDTHS)


def network(
    encoder: R2Unet = SMALL, decoder: Decoder | None = None, classes: int = 2, norm: Kind = "keep"
) -> SegmentationModel:
    torch.manual_seed(0)
    decoder = decoder or R2UnetDecoder(unit=encoder.unit, t=encoder.t)
    config = ModelConfig(encoder=encoder, decoder=decoder, norm=norm)
    built = config.build_encoder()
    return SegmentationModel(built, config.spec(built).dense(classes), ["a"] * classes)


def weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def images(count: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


# As published


def test_it_has_as_many_weights_as_published():
    with torch.device("meta"):
        model = network(R2Unet(), classes=34)
        assert weights(model) == 39_093_538
        assert model.head.last.kernel_size == (1, 1)
        for size in ((96, 128), (360, 480)):
            assert model(torch.empty(2, 3, *size)).shape == (2, 34, *size)


@pytest.mark.parametrize("unit", UNITS)
def test_recurrence_costs_no_weights(unit: Unit):
    with torch.device("meta"):
        counts = {weights(network(R2Unet(widths=WIDTHS, unit=unit, t=t))) for t in (1, 2, 5)}
    assert len(counts) == 1


def test_a_unit_of_any_kind_has_the_weights_of_its_formula():
    """Two 3 x 3 convolutions with bias and batch norm; a 1 x 1 before them where something is added."""
    with torch.device("meta"):
        counts = {unit: weights(UnitNet(8, 16, unit, 2)) for unit in UNITS}
    own = 9 * 16 * 16 + 3 * 16
    first = 9 * 8 * 16 + 3 * 16
    enter = 8 * 16 + 16
    assert counts == {"plain": first + own} | dict.fromkeys(UNITS[1:], enter + 2 * own)


def test_a_unit_is_the_sum_that_is_published():
    """Written out for t = 2 with torch's functions."""
    torch.manual_seed(0)
    unit = UnitNet(4, 8, "recurrent_residual", 2).eval()

    def step(number: int, image: Tensor) -> Tensor:
        convolution, norm, _ = unit.body[number].step
        return F.relu(norm(F.conv2d(image, convolution.weight, convolution.bias, padding=1)))

    image = torch.randn(2, 4, 9, 7)
    entered = F.conv2d(image, unit.enter.weight, unit.enter.bias)
    level = entered
    for number in (0, 1):
        once = step(number, level)
        twice = step(number, level + once)
        level = step(number, level + twice)
    with torch.no_grad():
        torch.testing.assert_close(unit(image), entered + level)
        alone = UnitNet(4, 8, "recurrent", 2).eval()
        alone.load_state_dict(unit.state_dict())
        torch.testing.assert_close(alone(image), level)


def test_gradients_of_a_shared_weight_are_the_sum_over_its_uses():
    torch.manual_seed(0)
    recurrence = Recurrence(4, 2).double().eval()
    image = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    recurrence(image).sum().backward()
    weight = recurrence.step[0].weight
    copies = [Recurrence(4, 1).double().eval().step for _ in range(3)]
    for copy in copies:
        copy.load_state_dict(recurrence.step.state_dict())
    first = copies[0](image)
    copies[2](image + copies[1](image + first)).sum().backward()
    parts = [copy[0].weight.grad for copy in copies]
    assert all(part.any() for part in parts)
    torch.testing.assert_close(weight.grad, sum(parts))


# The contract


@pytest.mark.parametrize("unit", UNITS)
def test_encoders_pass_the_public_check(unit: Unit):
    check_encoder(R2Unet(widths=(4, 8, 8, 8), unit=unit))


@pytest.mark.parametrize("widths", [(4, 8), (4, 8, 8, 8, 8, 8)])
def test_encoders_of_other_depths_pass_the_public_check(widths: tuple[int, ...]):
    check_encoder(R2Unet(widths=widths), sizes=[(33, 70)])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("merge", ["cat", "add"])
def test_decoders_pass_the_public_check(unit: Unit, merge: str):
    check_decoder(R2UnetDecoder(unit=unit, merge=merge), encoder=R2Unet(widths=(4, 8, 8, 8)))


def test_the_decoder_passes_the_public_check_on_other_encoders():
    check_decoder(R2UnetDecoder())


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (360, 480), (33, 47), (1, 1)])
@torch.no_grad()
def test_any_size_is_answered_in_that_size(size: tuple[int, int]):
    model = network().eval()
    answer = model(images(1, *size))
    assert answer.shape == (1, 2, *size)
    assert answer.isfinite().all()


@pytest.mark.parametrize("unit", UNITS)
def test_the_answer_trains_every_weight(unit: Unit):
    model = network(R2Unet(widths=WIDTHS, unit=unit))
    model(images(2)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert all(weight.grad.any() for weight in model.parameters() if weight.ndim > 1)


@pytest.mark.filterwarnings("ignore:norm. sync. works on GPUs only")
@pytest.mark.parametrize("norm", get_args(Kind))
def test_norms_convert_and_a_recurrence_still_shares_one(norm: Kind):
    if norm == "frozen":
        model = network()
        convert_norm(model, norm)
    else:
        model = network(norm=norm)
    assert has_batch_norm(model) == (norm in ("keep", "batch", "sync"))
    model.train()(images(2)).square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    assert model.eval()(images(1, 33, 47)).isfinite().all()


@pytest.mark.parametrize(
    "decoder",
    [Unet(channels=(16, 16, 8, 8)), Segformer(channels=16)],
    ids=lambda decoder: decoder.type,
)
def test_other_decoders_read_its_maps(decoder: Decoder):
    model = network(decoder=decoder)
    assert model.head.last.kernel_size == (3, 3)
    assert model(images(2, 48, 80)).shape == (2, 2, 48, 80)


@pytest.mark.parametrize(
    "task", [Denoise(), Denoise(decoder="light"), Denoise(decoder="deep"), Colorize(target="ab"), Jigsaw(grid=2)]
)
def test_heads_of_pretext_tasks_fit(task: PretextTask):
    module = build_module(ModelConfig(encoder=SMALL, decoder=R2UnetDecoder()), {"task": task}, 0)
    view = task.corrupt(images(2, 64, 96), torch.arange(2))
    assert task.loss(module.predict({"task": view})["task"], view).isfinite().all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"encoder": "convnext_atto", "decoder": {"type": "r2unet"}},
            "model.decoder: r2unet: wants maps with channels, each at twice the stride of the one before, not (0, ",
        ),
        (
            {"encoder": {"type": "stacked"}, "decoder": {"type": "r2unet"}},
            "model.decoder: r2unet: wants maps with channels, each at twice the stride of the one before, not (64, ",
        ),
        ({"encoder": {"type": "r2unet"}}, "model.decoder.channels: unet: wants 4 numbers"),
        (
            {"encoder": {"type": "r2unet", "widths": [4] * 6}, "decoder": {"type": "deeplabv3plus"}},
            "encoder r2unet: has a map at stride 32, and the decoder wants 16 at most; give fewer widths",
        ),
        ({"encoder": {"type": "r2unet", "widths": [4]}}, "encoder.widths: "),
        ({"encoder": {"type": "r2unet", "t": 0}}, "encoder.t: "),
        ({"encoder": {"type": "r2unet", "unit": "dense"}}, "encoder.unit: "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model: dict[str, Any], message: str):
    def build() -> nn.Module:
        config = load(ModelConfig, model)
        return config.spec(config.build_encoder()).dense(2)

    assert message_of(build).startswith(message)


@pytest.mark.parametrize("unit", UNITS)
def test_model_config_dump_and_load_is_the_identity(unit: Unit):
    config = ModelConfig(encoder=R2Unet(unit=unit, t=3), decoder=R2UnetDecoder(unit=unit, t=3, merge="add"))
    assert load(ModelConfig, config.dump()) == config
    assert (config.dump()["encoder"]["type"], config.dump()["decoder"]["type"]) == ("r2unet", "r2unet")


# Learning


@pytest.mark.parametrize("norm", ["keep", "group"])
def test_it_learns_one_image_by_heart(norm: Kind):
    """By kept statistics too: a shared batch norm keeps the average of what all its uses saw."""
    model = network(R2Unet(widths=(8, 16, 16)), classes=3, norm=norm)
    shares = learnt_by_heart(model, torch.optim.Adam(model.parameters(), lr=0.01), steps=40)
    assert min(shares) > 0.99

"""SegNet, SegNet-basic, SegNet-ASPP and Bayesian SegNet: pooling against torch's, the papers' counts, every use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import UserError, load
from ssl_seg.models import DecoderNet, DenseHead, Features, ModelConfig, SegmentationModel
from ssl_seg.models.segnet import POOLS, PoolingLayers, SegNet, SegNetDecoder, max_pool, max_unpool
from ssl_seg.models.segnet_basic import SegNetBasic, SegNetBasicDecoder
from ssl_seg.models.timm import Timm
from ssl_seg.testing import check_decoder, check_encoder
from ssl_seg.weights.receipt import match_tensors
from tests.faults import message_of
from tests.small import learnt_by_heart

SEGNET = {"encoder": {"type": "segnet"}, "decoder": {"type": "segnet"}}
BASIC = {"encoder": {"type": "segnet_basic"}, "decoder": {"type": "segnet_basic"}}
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)  # of VGG16's convolutions (table 1, D)
BACK = (512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 64)


def model_of(values: dict[str, Any], count: int = 3) -> SegmentationModel:
    torch.manual_seed(0)
    config = load(ModelConfig, values)
    encoder = config.build_encoder()
    return SegmentationModel(encoder, config.spec(encoder).dense(count), tuple("abcdefghijk"[:count]))


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def without_gradient(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


@pytest.fixture(scope="module")
def segnet() -> SegmentationModel:
    return model_of(SEGNET)


# Pooling and unpooling against torch's


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_pooling_and_unpooling_are_torchs(ties: bool, dtype: torch.dtype, memory_format: torch.memory_format):
    """Values, places and gradients, to the bit; behind a ReLU a third of all windows hold equal largest values."""
    image = torch.randn(2, 5, 12, 22, generator=torch.Generator().manual_seed(0))
    image = (image - 1).relu() if ties else image
    ours = image.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    theirs = ours.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    pooled, positions = max_pool(ours)
    wanted, indices = F.max_pool2d(theirs, 2, return_indices=True)
    assert torch.equal(pooled, wanted)
    assert positions.dtype == torch.uint8
    assert torch.equal(positions, indices // 22 % 2 * 2 + indices % 2)

    spread = max_unpool(pooled.square(), positions)
    unpooled = F.max_unpool2d(wanted.square(), indices, 2)
    assert torch.equal(spread, unpooled)
    assert spread.dtype == pooled.dtype == dtype
    assert spread.is_contiguous(memory_format=memory_format)
    assert pooled.is_contiguous(memory_format=memory_format)

    weight = torch.randn(spread.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (spread * weight).sum().backward()
    (unpooled * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_gradients_of_gradients_are_right():
    """For balancers that derive the norm of a gradient."""
    image = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)

    def both(level: Tensor) -> Tensor:
        pooled, positions = max_pool(level)
        return max_unpool(pooled.pow(3), positions)

    assert torch.autograd.gradcheck(both, image)
    assert torch.autograd.gradgradcheck(both, image)


def test_what_pooling_keeps_for_the_gradient_is_a_byte_a_value():
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    image = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pooled, positions = max_pool(image)
        max_unpool(pooled, positions)
    assert {tensor.dtype for tensor in kept} == {torch.uint8}
    assert {tensor.untyped_storage().nbytes() for tensor in kept} == {2 * 4 * 4}


# SegNet


def test_the_counts_are_those_of_the_paper(segnet: SegmentationModel):
    """13 convolutions of 3 x 3 with a bias, and batch norm with two weights a channel; mirrored in the decoder."""
    encoder = sum((9 * before + 1) * after + 2 * after for before, after in zip((3, *WIDTHS), WIDTHS, strict=False))
    decoder = sum((9 * before + 1) * after + 2 * after for before, after in zip((512, *BACK), BACK, strict=False))
    assert size_of(segnet.encoder) == encoder == 14_723_136
    assert size_of(segnet.head.decoder) == decoder == 14_756_928
    assert segnet.head.decoder.out_channels == 64
    assert size_of(segnet.head.last) == 64 * 9 * 3 + 3
    for part in (segnet.encoder, segnet.head.decoder):
        layers = [layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
        assert [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 13


@pytest.mark.parametrize("values", [SEGNET, BASIC])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (97, 50)])
def test_one_image_of_any_size_trains_every_weight(size: tuple[int, int], values: dict[str, Any]):
    model = model_of(values).train()
    answer = model(torch.rand(1, 3, *size))
    assert answer.shape == (1, 3, *size)
    answer.square().mean().backward()
    assert not without_gradient(model)
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("values", [SEGNET, BASIC])
def test_camvid_s_size(values: dict[str, Any]):
    """360 rows are no multiple of 32: they are padded to 384."""
    model = model_of(values).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 360, 480)).shape == (1, 3, 360, 480)


def test_the_network_is_the_plain_one_of_torchs_layers(segnet: SegmentationModel):
    """The same weights run by max_pool2d and max_unpool2d with indices: the whole forward pass."""
    model = segnet.eval()
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    backbone, decoder = model.encoder.backbone, model.head.decoder
    assert isinstance(backbone, PoolingLayers)
    with torch.no_grad():
        level = (image - model.encoder.mean) / model.encoder.std
        indices: list[Tensor] = []
        for layer in backbone.features:
            if isinstance(layer, nn.MaxPool2d):
                level, found = F.max_pool2d(level, 2, return_indices=True)
                indices.append(found)
            else:
                level = layer(level)
        for stage, found in zip(decoder.stages, reversed(indices), strict=True):
            level = stage(F.max_unpool2d(level, found, 2))
        assert torch.equal(model(image), model.head.last(level))


def test_the_maps_are_those_of_timm(segnet: SegmentationModel):
    encoder = segnet.encoder.eval()
    vgg = Timm(name="vgg16_bn", options={"mlp_ratio": 0.001}).build().eval()
    weights = encoder.state_dict()
    vgg.load_state_dict({name: weights[name.replace("network.features_", "features.")] for name in vgg.state_dict()})
    image = torch.rand(1, 3, 33, 70)
    with torch.no_grad():
        theirs, ours = vgg(image), encoder(image)
    torch.testing.assert_close(ours.maps, theirs.maps, rtol=0, atol=0)
    assert encoder.channels == vgg.channels
    assert encoder.strides == vgg.strides == ours.strides


def test_positions_are_bytes_within_their_window(segnet: SegmentationModel):
    with torch.no_grad():
        features = segnet.encoder.eval()(torch.rand(2, 3, 50, 70))
    assert tuple(features.extras) == POOLS == ("pool_1", "pool_2", "pool_3", "pool_4", "pool_5")
    for extra, channels, stride in zip(
        features.extras.values(), (64, 128, 256, 512, 512), (2, 4, 8, 16, 32), strict=True
    ):
        assert extra.dtype == torch.uint8
        assert extra.shape == (2, channels, 64 // stride, 96 // stride)
        assert extra.unique().tolist() == [0, 1, 2, 3]


def test_encoder_and_decoder_pass_the_public_checks():
    check_encoder(SegNet(), sizes=[(33, 70)])
    check_decoder(SegNetDecoder(), encoder=SegNet())


@pytest.mark.parametrize("values", [SEGNET, BASIC])
@pytest.mark.parametrize("norm", ["group", "instance", "switch"])
def test_every_norm_is_converted_and_learns(norm: str, values: dict[str, Any]):
    model = model_of({**values, "norm": norm}).train()
    assert not [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert not without_gradient(model)
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    assert model.eval()(torch.rand(1, 3, 40, 64)).isfinite().all()


@pytest.mark.parametrize("values", [SEGNET, BASIC])
def test_half_precision_and_channels_last(values: dict[str, Any]):
    model = model_of(values).train()
    image = torch.rand(2, 3, 64, 64)
    wanted = model(image).detach()
    model = model.to(memory_format=torch.channels_last)
    image = image.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(image), wanted, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encoder(image)
        assert features[-1].dtype == torch.bfloat16
        assert features[-1].is_contiguous(memory_format=torch.channels_last)
        answer = model(image)
    answer.float().square().mean().backward()
    assert not without_gradient(model)
    assert answer.isfinite().all()


@pytest.mark.parametrize(
    "decoder", [{"type": "unet"}, {"type": "fpn"}, {"type": "segformer"}, {"type": "fcn"}], ids=lambda own: own["type"]
)
def test_other_decoders_take_its_maps(decoder: dict[str, Any], segnet: SegmentationModel):
    config = load(ModelConfig, {**SEGNET, "decoder": decoder})
    model = SegmentationModel(segnet.encoder, config.spec(segnet.encoder).dense(2), ("a", "b")).train()
    model.zero_grad(set_to_none=True)
    answer = model(torch.rand(2, 3, 50, 64))
    assert answer.shape == (2, 2, 50, 64)
    answer.square().mean().backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("values", [SEGNET, BASIC])
def test_heads_of_every_kind(values: dict[str, Any]):
    """Its decoder reads no map but the coarsest: `deep`, which takes the others away, is the same as `full`."""
    config = load(ModelConfig, values)
    encoder = config.build_encoder().eval()
    features = encoder(torch.rand(1, 3, 50, 64))
    dense = config.spec(encoder).dense
    full, deep, light = (dense(3, stride=4, decoder=kind).eval() for kind in ("full", "deep", "light"))
    deep.load_state_dict(full.state_dict())
    answer = full(features, (50, 64))
    assert torch.equal(deep(features, (50, 64)), answer)
    assert answer.shape == light(features, (50, 64)).shape == (1, 3, 13, 16)


def test_parts_of_a_batch_are_decoded_as_they_are_alone(segnet: SegmentationModel):
    with torch.no_grad():
        features = segnet.eval().encoder(torch.rand(3, 3, 32, 64))
        parts = [segnet.head(own, (32, 64)) for own in features.split([1, 2])]
        torch.testing.assert_close(torch.cat(parts), segnet.head(features, (32, 64)))


def accuracy_on_one_image(values: dict[str, Any], steps: int) -> float:
    """By the paper's optimizer, with the image's own statistics: a few dozen updates make poor estimates."""
    model = model_of(values)
    return learnt_by_heart(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps)[0]


@pytest.mark.slow
def test_segnet_learns_one_image():
    assert accuracy_on_one_image(SEGNET, steps=30) > 0.99


def test_segnet_basic_learns_one_image():
    assert accuracy_on_one_image(BASIC, steps=40) > 0.99


# Weights


def test_weights_from_a_file_of_vgg(tmp_path: Path):
    """As torchvision's and timm's: the same values in every layer, under the names that the file has."""
    torch.manual_seed(1)
    own = SegNet().build().backbone.state_dict()
    given = {name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    path = tmp_path / "vgg16_bn.safetensors"
    save_file(given, path)
    config = load(ModelConfig, {"encoder": {"type": "segnet", "pretrained": str(path)}}).encoder
    assert isinstance(config, SegNet)
    assert config.weights_file == str(path)
    assert config.published_tensors() is None
    encoder = config.build()
    state = encoder.backbone.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in state.items())
    receipt = match_tensors(path, encoder, given)
    assert receipt.share == 1.0
    assert not receipt.left_over
    assert set(receipt.missing) == {"mean", "std"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("foo", "encoder.pretrained: timm has no weights 'foo' for vgg16_bn; it has: tv_in1k"),
        ("package", "encoder.pretrained: pretrained: package: none has weights of vgg16_bn; there are those of: "),
    ],
)
def test_words_for_weights_are_those_of_timm(word: str, said: str):
    assert message_of(lambda: load(ModelConfig, {"encoder": {"type": "segnet", "pretrained": word}})).startswith(said)
    assert load(ModelConfig, {"encoder": {"type": "segnet", "pretrained": "tv_in1k"}}).encoder.weights_file is None
    missing = load(ModelConfig, {"encoder": {"type": "segnet", "pretrained": "missing.pth"}}).encoder
    assert "missing.pth: no such file" in message_of(missing.build)


# SegNet-basic


def test_the_counts_of_segnet_basic():
    """Four convolutions of 7 x 7 without bias, batch norm, and a classifier of 1 x 1."""
    model = model_of(BASIC, 11)
    assert size_of(model.encoder) == 49 * 64 * (3 + 64) + 4 * 64 == 210_368
    assert size_of(model.head.decoder) == 49 * 64 * (64 + 64) + 4 * 64 == 401_664
    assert size_of(model.head.last) == 64 * 11 + 11
    assert model.head.last.kernel_size == (1, 1)
    assert not [layer for layer in model.head.decoder.modules() if isinstance(layer, nn.ReLU)]


def test_segnet_basic_passes_the_public_checks():
    check_encoder(SegNetBasic())
    check_decoder(SegNetBasicDecoder(), encoder=SegNetBasic())


def test_local_response_norm_sees_bytes():
    """Each value over (1 + alpha / 5 * the sum of the three colours' squares) ** beta, for values of 0 to 255."""
    encoder = SegNetBasic().build()
    seen: list[Tensor] = []
    encoder.backbone.stages[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    image = torch.rand(1, 3, 8, 8)
    encoder(image)
    values = image * 255
    wanted = values / (1 + 1e-4 / 5 * values.square().sum(dim=1, keepdim=True)) ** 0.75
    torch.testing.assert_close(seen[0], wanted)
    assert (seen[0] / values).min() < 0.5, "of values up to 1 nothing would change"


# SegNet-ASPP and Bayesian SegNet


def test_the_pyramid_follows_at_full_resolution():
    decoder = {"type": "segnet", "aspp": [6, 12, 18]}
    model = model_of({**SEGNET, "decoder": decoder}).train()
    pyramid = model.head.decoder.aspp
    convolutions = [layer for layer in pyramid.modules() if isinstance(layer, nn.Conv2d)]
    # A 1 x 1, three 3 x 3, the image's mean, and the mixture of the five; batch norm behind each of the six.
    assert [layer.dilation[0] for layer in convolutions] == [1, 6, 12, 18, 1, 1]
    assert size_of(pyramid) == 64 * 64 * (1 + 3 * 9 + 1 + 5) + 6 * 2 * 64
    seen: list[torch.Size] = []
    pyramid.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    answer = model(torch.rand(2, 3, 50, 64))
    assert seen == [(2, 64, 64, 64)]
    assert answer.shape == (2, 3, 50, 64)
    answer.square().mean().backward()
    assert not without_gradient(model)
    assert "needs 2 images or more" in message_of(lambda: model(torch.rand(1, 3, 64, 64)))
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    assert model_of({**SEGNET, "decoder": decoder, "norm": "group"})(torch.rand(1, 3, 32, 32)).isfinite().all()


def test_the_pyramid_passes_the_public_check():
    check_decoder(SegNetDecoder(aspp=(1, 2, 3)), encoder=SegNet())


def test_dropout_lies_behind_the_central_stages():
    """In training alone: behind the last three poolings and the first three stages of the decoder."""
    model = model_of({"encoder": {"type": "segnet", "dropout": 0.5}, "decoder": {"type": "segnet", "dropout": 0.5}})
    plain = model_of(SEGNET)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    image = torch.rand(2, 3, 64, 64)
    seen: list[tuple[int, ...]] = []
    for part in (model.encoder.backbone, model.head.decoder):
        part.dropout.register_forward_hook(lambda _, given, dropped: seen.append((*dropped.shape[1:],)))
    with torch.no_grad():
        assert torch.equal(model.eval()(image), plain.eval()(image))
    assert seen == [(256, 8, 8), (512, 4, 4), (512, 2, 2), (512, 4, 4), (256, 8, 8), (128, 16, 16)]
    dropped = model.train().encoder(image)[-1]
    kept = plain.train().encoder(image)[-1]
    assert 0.3 < (dropped == 0).float().mean() - (kept == 0).float().mean() < 0.5, "half of those that are not 0 anyway"
    model(image).square().mean().backward()
    assert not without_gradient(model)
    with pytest.raises(UserError, match=r"encoder.dropout"):
        load(ModelConfig, {"encoder": {"type": "segnet", "dropout": 1.0}})


# Refusals


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {**SEGNET, "encoder": "mobilenetv2_035"},
            "model.decoder: segnet reads pool_1, pool_2, pool_3, pool_4, pool_5, ",
        ),
        ({**SEGNET, "encoder": {"type": "segnet_basic"}}, "model.decoder: segnet reads pool_3, pool_4, pool_5, which "),
        (
            {**BASIC, "encoder": {"type": "segnet"}},
            "model.decoder: segnet_basic: wants 64 channels at stride 4 as the ",
        ),
        ({**SEGNET, "decoder": {"type": "deeplabv3plus"}}, "encoder segnet: pools down to stride 32, not 16; choose "),
        ({**SEGNET, "decoder": {"type": "segnet", "aspp": [6, 12]}}, "decoder.aspp"),
    ],
)
def test_what_does_not_fit_is_one_line(values: dict[str, Any], said: str):
    assert message_of(lambda: model_of(values)).startswith(said)


def test_a_wrong_width_is_one_line():
    text = message_of(lambda: SegNetDecoder().build((8, 16), (16, 32)))
    assert (
        text
        == "model.decoder: segnet: wants 512 channels at stride 32 as the last map, not 16 at 32; choose encoder segnet"
    )


# The side of the head's last layer


class Finest(DecoderNet):
    def __init__(self, last_kernel: int | None = None) -> None:
        super().__init__()
        self.out_channels = 2
        if last_kernel is not None:
            self.last_kernel = last_kernel

    def forward(self, features: Features) -> Tensor:
        return features[0]


def test_heads_of_other_decoders_are_as_they_were():
    """3 x 3, with the same first weights from the same random numbers; 1 x 1 where the decoder says so."""
    torch.manual_seed(0)
    head = DenseHead(Finest(), 5)
    after = torch.rand(())
    torch.manual_seed(0)
    last = nn.Conv2d(2, 5, kernel_size=3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    assert torch.equal(head.last.weight, last.weight)
    assert torch.equal(after, torch.rand(()))
    assert head.last.padding == (1, 1)
    features = Features([torch.randn(1, 2, 8, 8)], (1,))
    small = DenseHead(Finest(1), 5)
    assert small.last.weight.shape == (5, 2, 1, 1)
    assert small(features, (7, 8)).shape == head(features, (7, 8)).shape == (1, 5, 7, 8)

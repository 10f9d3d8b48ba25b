"""MobileNetV2 by its expanded maps with transposed convolutions: the published counts, and what its maps are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import load
from ssl_seg.data.loading import Samples
from ssl_seg.models import DenseHead, Features, ModelConfig, SegmentationModel
from ssl_seg.models.mobilenet_unet import HALVING, MobilenetUnet, MobilenetUnetDecoder
from ssl_seg.models.smp import DeepLabV3Plus
from ssl_seg.models.timm import Timm
from ssl_seg.segment import Segment
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.testing import check_decoder, check_encoder
from ssl_seg.training.config import TrainConfig
from ssl_seg.training.learner import Learner, layers_above
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import load_model
from tests.faults import message_of
from tests.small import finetuning, learnt_by_heart
from tests.training.test_loop import run, weights

BOTH = {"encoder": {"type": "mobilenet_unet"}, "decoder": {"type": "mobilenet_unet"}}
SMALL = "mobilenetv2_035"
NARROW = {
    "encoder": {"type": "mobilenet_unet", "name": SMALL},
    "decoder": {"type": "mobilenet_unet", "channels": [24, 16, 16, 8]},
}
CHANNELS = (8, 16, 16, 24, 32)


def images(count: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def features_of(count: int, height: int, width: int) -> Features:
    torch.manual_seed(1)
    sides = [(height // stride, width // stride) for stride in HALVING]
    maps = [torch.randn(count, channels, *size) for channels, size in zip(CHANNELS, sides, strict=True)]
    return Features(maps, HALVING)


def model_of(values: dict[str, Any], classes: int = 3) -> SegmentationModel:
    config = load(ModelConfig, values)
    torch.manual_seed(0)
    encoder = config.build_encoder()
    return SegmentationModel(encoder, config.spec(encoder).dense(classes), [f"{number}" for number in range(classes)])


def in_keras(*parts: nn.Module) -> int:
    """How many parameters Keras would count: those of torch, and the running statistics of batch norm."""
    weights = sum(weight.numel() for part in parts for weight in part.parameters())
    buffers = [(name, value) for part in parts for name, value in part.named_buffers()]
    return weights + sum(value.numel() for name, value in buffers if name.endswith(("running_mean", "running_var")))


# The published network


def test_it_has_the_published_number_of_parameters() -> None:
    model = model_of(BOTH)
    assert model.encoder.channels == (96, 144, 192, 576, 320)
    assert model.encoder.strides == HALVING
    assert in_keras(model.encoder, model.head) == 6_504_227
    assert in_keras(model.encoder) == 1_841_984


def test_with_the_encoder_frozen_the_published_number_is_trained() -> None:
    """As `train.encoder_lr: 0` freezes it: its norms' statistics stay too, and the decoder's move."""
    model = load(ModelConfig, BOTH)
    config = TrainConfig(encoder_lr=0, device="cpu")
    learner = Learner(build_module(model, {"segment": Segment(num_classes=3)}, 0), config, Processes(config))
    trained = sum(weight.numel() for weight in learner.module.parameters() if weight.requires_grad)
    assert trained == 4_660_323
    assert sum(weight.numel() for group in learner.optimizer.param_groups for weight in group["params"]) == trained
    assert in_keras(learner.module) - trained == 1_843_904


def test_frozen_it_leaves_the_encoder_and_its_statistics_alone() -> None:
    config = load(FinetuneConfig, {**finetuning(encoder_lr=0.0, steps=2), "model": NARROW})
    module = build_module(config.model, {"segment": Segment(num_classes=2)}, 0)
    learner = Learner(module, config.train, Processes(config.train))
    before = weights(learner)
    list(run(learner, {"labelled": Samples(config.data.labelled, config.augment, 0, with_labels=True)}))
    moved = {name for name, value in weights(learner).items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"heads"}
    assert moved == {name for name in before if name.startswith("heads.")}, "its own statistics too"


# The encoder


@pytest.mark.parametrize(("name", "output_stride"), [(SMALL, 32), (SMALL, 8), ("mobilenetv2_110d", 32)])
def test_maps_are_what_timm_has_inside_its_blocks(name: str, output_stride: int) -> None:
    """Against hooks on timm's network with the same weights; dilated, and of another depth, too."""
    torch.manual_seed(0)
    encoder = MobilenetUnet(name=name).build(output_stride).eval()
    options = {} if output_stride == 32 else {"output_stride": output_stride, "features_only": True}
    whole = timm.create_model(name, **options).eval()
    for layer in whole.modules():
        if isinstance(layer, nn.BatchNorm2d):  # statistics of its own, or a norm would hardly show
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 2.0)
    kept = encoder.backbone.network.state_dict().keys()
    encoder.backbone.network.load_state_dict({name: whole.state_dict()[name] for name in kept})
    found: dict[str, Tensor] = {}
    tapped = [*(f"blocks.{stage}.0.bn1" for stage in (1, 2, 3, 5)), "blocks.6.0.conv_pwl"]
    for name in tapped:
        part = whole.get_submodule(name)
        # A copy: timm's activations and norms may work in place.
        part.register_forward_hook(lambda _, __, given, name=name: found.update({name: given.clone()}))
    image = images(2)
    with torch.no_grad():
        maps = encoder(image)
        whole((image - encoder.mean) / encoder.std)
    torch.testing.assert_close(maps.maps, [found[name] for name in tapped])
    assert encoder.strides == tuple(min(stride, output_stride) for stride in HALVING)


def test_nothing_is_left_behind_the_coarsest_map() -> None:
    encoder = MobilenetUnet(name=SMALL, options={"depth_multiplier": 2.0}).build()
    names = encoder.backbone.network.state_dict().keys()
    assert not [name for name in names if name.startswith(("conv_head", "bn2", "classifier", "blocks.6.0.bn3"))]
    assert not [name for name in names if name.startswith("blocks.6.1")], "a deeper one's last stage is cut there"
    assert encoder(images(2))[-1].shape == (2, 112, 2, 3)


def test_the_encoder_passes_the_public_check() -> None:
    check_encoder(MobilenetUnet(name=SMALL))


@pytest.mark.parametrize("norm", ["keep", "group"])
def test_its_layers_are_those_of_timm(norm: str) -> None:
    ours = layers_above(load(ModelConfig, {**NARROW, "norm": norm}).build_encoder())
    theirs = layers_above(load(ModelConfig, {"encoder": SMALL, "norm": norm}).build_encoder())
    assert ours == {name: theirs[name] for name in ours}
    assert set(ours.values()) == set(theirs.values())


def test_weights_of_timm_from_a_file_and_one_that_lacks_some(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model(SMALL).state_dict()
    save_file(theirs, tmp_path / "own.safetensors")
    values = {"type": "mobilenet_unet", "name": SMALL, "pretrained": str(tmp_path / "own.safetensors")}
    encoder = load(ModelConfig, {"encoder": values}).build_encoder()
    state = encoder.backbone.network.state_dict()
    assert len(state) > 200
    assert all(torch.equal(value, theirs[name]) for name, value in state.items())
    save_file({name: value for name, value in theirs.items() if "blocks.5" not in name}, tmp_path / "part.safetensors")
    part = {**values, "pretrained": str(tmp_path / "part.safetensors")}
    said = message_of(lambda: load(ModelConfig, {"encoder": part}).build_encoder())
    assert "part.safetensors: holds no weights for" in said
    assert load(ModelConfig, {"encoder": values}).without_pretrained().encoder.pretrained is False


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "resnet18"}, "'resnet18' is no MobileNetV2; give mobilenetv2_100 or another width"),
        ({"name": "mobilenetv2_99"}, "unknown timm model 'mobilenetv2_99'"),
        ({"pretrained": "package"}, "none has weights of mobilenetv2_100"),
        ({"pretrained": "no_such_tag"}, "timm has no weights 'no_such_tag' for mobilenetv2_100"),
        ({"width": 0.5}, "width"),
    ],
)
def test_wrong_values_are_one_line(values: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: load(ModelConfig, {"encoder": {"type": "mobilenet_unet", **values}}))


def test_without_the_file_of_its_weights_it_says_so() -> None:
    encoder = MobilenetUnet(pretrained="missing.safetensors")
    assert "missing.safetensors: no such file" in message_of(encoder.build)


# The decoder


def test_the_decoder_passes_the_public_check() -> None:
    check_decoder(MobilenetUnetDecoder(channels=(24, 16, 16, 8)))


def test_maps_that_do_not_fit_are_one_line() -> None:
    decoder = MobilenetUnetDecoder()
    said = message_of(lambda: decoder.build(CHANNELS, (2, 4, 8, 16, 16)))
    assert said == (
        "model.decoder: mobilenet_unet: wants maps at strides (2, 4, 8, 16, 32), not (2, 4, 8, 16, 16); use unet or "
        "segformer"
    )
    assert "wants maps at strides" in message_of(lambda: decoder.build(CHANNELS[:3], (2, 4, 8)))


def test_the_last_layer_makes_the_last_doubling_and_starts_near_zero() -> None:
    torch.manual_seed(0)
    decoder = MobilenetUnetDecoder(channels=(24, 16, 16, 8)).build(CHANNELS, HALVING)
    assert decoder.out_channels == 8 + CHANNELS[0]
    head = DenseHead(decoder, 3)
    assert isinstance(head.last, nn.ConvTranspose2d)
    assert head.last.weight.shape == (16, 3, 3, 3)
    assert head.last.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert head.last.bias is not None
    assert not head.last.bias.any()
    features = features_of(2, 96, 64)
    decoded = decoder.eval()(features)
    assert decoded.shape == (2, 16, 48, 32)
    # Without an interpolation: each pixel is the transposed convolution's.
    torch.testing.assert_close(head(features, (95, 64)), head.last(decoded)[..., :95, :])


def test_a_transposed_convolution_is_centred_where_the_encoder_s_is() -> None:
    """A point goes down through strided convolutions, and up through transposed ones, and lies where it lay."""
    decoder = MobilenetUnetDecoder(channels=(1, 1, 1, 1)).build((1, 1, 1, 1, 1), HALVING)
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[..., 1, 1] = 1.0
    image = torch.zeros(1, 1, 96, 128)
    image[..., 32, 64] = 1.0
    down = image
    for _ in HALVING:
        down = F.conv2d(down, kernel, stride=2, padding=1)  # as timm's
    assert down.sum() == 1.0
    level = down
    for up in [*(up[0] for up in decoder.ups), decoder.last_layer(1)]:
        layer = nn.ConvTranspose2d(1, 1, 3, stride=2, padding=up.padding, output_padding=up.output_padding, bias=False)
        layer.weight.data = kernel
        level = layer(level)
    assert torch.equal(level, image)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_a_head_of_any_stride_answers_at_it_and_looks_there(stride: int) -> None:
    torch.manual_seed(0)
    head = DenseHead(MobilenetUnetDecoder(channels=(24, 16, 16, 8)).build(CHANNELS, HALVING), 1, stride).eval()
    features = features_of(1, 160, 224)
    finest = features[0].requires_grad_()
    answer = head(features, (150, 220))
    assert answer.shape[-2:] == (-(-150 // stride), -(-220 // stride))
    for row, column in ((8, 208), (136, 8), (72, 112)):
        pixel = answer[0, 0, row // stride, column // stride]
        (gradient,) = torch.autograd.grad(pixel, finest, retain_graph=True)
        weight = gradient.abs().sum(dim=(0, 1))
        peak = divmod(int(weight.argmax()), weight.shape[1])
        assert abs(2 * peak[0] - row) <= 8
        assert abs(2 * peak[1] - column) <= 8


# Both


@pytest.mark.parametrize("norm", ["keep", "batch", "group", "instance", "layer", "switch"])
def test_every_norm_trains_every_weight_at_odd_sizes(norm: str) -> None:
    model = model_of({**NARROW, "norm": norm}).train()
    count = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert (count > 0) == (norm in ("keep", "batch"))
    answer = model(images(2, 71, 45))
    assert answer.shape == (2, 3, 71, 45)
    answer.square().mean().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not missing
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_they_go_together_with_other_encoders_and_decoders() -> None:
    for values in ({**NARROW, "decoder": "unet"}, {**NARROW, "encoder": {"type": "timm", "name": "convnext_atto"}}):
        assert model_of(values).eval()(images(1, 33, 47)).shape == (1, 3, 33, 47)
    dilated = ModelConfig(encoder=MobilenetUnet(name=SMALL), decoder=DeepLabV3Plus(channels=8)).build_encoder()
    assert dilated.strides == (2, 4, 8, 16, 16)


def test_the_config_is_read_back_as_it_was_written() -> None:
    config = load(ModelConfig, NARROW)
    assert isinstance(config.encoder, Timm), "the same words for its weights"
    assert load(ModelConfig, config.dump()) == config
    assert config.dump()["encoder"]["type"] == config.dump()["decoder"]["type"] == "mobilenet_unet"


def test_a_run_of_it_is_exported_and_read_back(tmp_path: Path) -> None:
    """Its last layer is another than a convolution; and the decoder goes on to another task without it."""
    config = load(FinetuneConfig, {**finetuning(steps=2), "model": NARROW})
    done = finetune(config, Options(tmp_path / "first", quiet=True))
    model, _ = load_model(done.folder)
    assert isinstance(model.head.last, nn.ConvTranspose2d)
    values = {**finetuning(steps=1), "model": {}, "init": str(done.folder)}
    finetune(load(FinetuneConfig, {**values, "transfer": "encoder+segment"}), Options(tmp_path / "next", quiet=True))
    receipts = json.loads((tmp_path / "next" / "receipts.json").read_text())
    assert {part: receipt["share"] for part, receipt in receipts.items()} == {"encoder": 1.0, "decoder": 1.0}
    other = load(FinetuneConfig, {**values, "model": {"encoder": SMALL}})
    said = message_of(lambda: finetune(other, Options(tmp_path / "other", quiet=True)))
    assert f"holds a mobilenet_unet of {SMALL}, and model.encoder asks for timm of {SMALL}" in said


def test_it_learns_one_image_by_heart() -> None:
    model = model_of(NARROW)
    own, _ = learnt_by_heart(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps=60)
    assert own > 0.99

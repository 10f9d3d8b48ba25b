"""Features beyond five maps: a stride-1 map, other numbers of levels and extras, from the encoder to the export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_seg.config import Plugin, load
from ssl_seg.data.loading import Samples
from ssl_seg.models import Decoder, DenseHead, Encoder, EncoderNet, EncoderSpec, Features, ModelConfig
from ssl_seg.models.smp import FPN, DeepLabV3Plus, Segformer, Unet, UnetPlusPlus, UPerNet
from ssl_seg.models.timm import Timm
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.testing import check_decoder, check_encoder, check_pretext_task
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import backward, finish_gradients, train
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import load_encoder, load_model
from tests import pooled
from tests.faults import message_of
from tests.pooled import INDICES, SKETCH, STRIDES, Pooled, Redraw, Unpooled
from tests.small import finetuning, pretraining

MODEL = {"encoder": {"type": "pooled"}, "decoder": {"type": "unpooled"}, "norm": "keep"}
TASKS = {"denoise": {}, "redraw": {}, "rotate": {"weight": 0.1}, "jigsaw": {"grid": 2}}


@pytest.fixture(autouse=True)
def _pooled_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As --plugin does, but for these tests alone: others go through every name there is."""
    monkeypatch.setattr(Plugin, "extra_modules", [*Plugin.extra_modules, pooled])


def images(count: int, height: int = 37, width: int = 54) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def built(config: Encoder) -> EncoderNet:
    torch.manual_seed(0)
    return config.build().eval()


def config_of(tasks: dict[str, Any] = TASKS, **train: Any) -> PretrainConfig:
    return load(PretrainConfig, {**pretraining(**train), "model": MODEL, "tasks": tasks})


def learner_of(config: PretrainConfig) -> Learner:
    return Learner(build_module(config.model, config.tasks, config.seed), config.train, Processes(config.train))


def streams_of(config: PretrainConfig, learner: Learner) -> dict[str, Any]:
    samples = {"pool": Samples(config.data.pool, config.augment, config.seed)}
    return open_streams(samples, config.train, learner.processes, config.tasks, 0)


# The class


def test_a_plain_list_of_maps_becomes_features():
    features = built(Timm(name="mobilenetv2_035"))(images(2))
    assert features.strides == (2, 4, 8, 16, 32)
    assert features.extras == {}
    assert features.size == (64, 64)
    assert [level.shape[-1] for level in features] == [32, 16, 8, 4, 2]
    assert features[-1] is features.maps[4]
    assert len(features) == 5


def test_parts_of_a_batch_are_what_they_are_alone():
    """Maps and extras, indices of pooled pixels among them: they count within an image."""
    encoder = built(Pooled())
    parts = [images(3), images(1), images(2)]
    for own, image in zip(encoder(torch.cat(parts)).split([3, 1, 2]), parts, strict=True):
        alone = encoder(image)
        assert own.strides == alone.strides == STRIDES
        assert own.extras.keys() == alone.extras.keys() == {*INDICES, SKETCH}
        torch.testing.assert_close(own.maps, alone.maps)
        torch.testing.assert_close(own.extras, alone.extras)


# The contract of plug-ins


def test_a_network_of_three_levels_passes_the_public_checks():
    check_encoder(Pooled())
    check_decoder(Unpooled(), encoder=Pooled())
    check_pretext_task(Redraw(), encoder=Pooled())


def test_a_decoder_that_needs_extras_is_checked_with_its_encoder():
    with pytest.raises(AssertionError, match="reads pool_2, pool_4; give check_decoder an encoder"):
        check_decoder(Unpooled())


class Faulty(Encoder):
    fault: str

    def build(self, output_stride: int = 32) -> EncoderNet:
        encoder = Pooled().build()
        if self.fault == "undeclared":
            encoder.extras = INDICES
        if self.fault == "missing":
            encoder.extras = (*encoder.extras, "mask")
        if self.fault == "multiple":
            encoder.multiple = 2
        if self.fault == "order":
            encoder.strides = (4, 2, 1)
        encoder.backbone.register_forward_hook(lambda _, given, features: self._spoil(features))
        return encoder

    def _spoil(self, features: Features) -> Features:
        extras = dict(features.extras)
        if self.fault == "rows":
            extras[SKETCH] = extras[SKETCH].mean(dim=0)
        if self.fault == "batch":
            extras[SKETCH] = extras[SKETCH] - extras[SKETCH].mean(dim=0)
        if self.fault == "random":
            extras[SKETCH] = extras[SKETCH] + torch.rand(())
        strides = (2, 4, 8) if self.fault == "strides" else features.strides
        return Features(features.maps, strides, extras)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("undeclared", "declares extras .* and gives .*'sketch'"),
        ("missing", "declares extras .*'mask'"),
        ("multiple", "multiple 2 is no multiple of stride 4"),
        ("order", "not fine to coarse"),
        ("rows", "'sketch' .* without a row for each image"),
        ("batch", "depend on the images beside it"),
        ("random", "other maps at the second call"),
        ("strides", r"name strides \(2, 4, 8\)"),
    ],
)
def test_faulty_extras_are_named(fault: str, message: str):
    with pytest.raises(AssertionError, match=message):
        check_encoder(Faulty(fault=fault))


class ReadsTheFifth(Redraw):
    """A head for one encoder alone."""

    def head(self, encoder: EncoderSpec) -> nn.Module:
        assert len(encoder.strides) == 5, "four maps"
        return encoder.dense(3)


def test_tasks_are_checked_on_other_numbers_of_levels():
    with pytest.raises(AssertionError, match="four maps"):
        check_pretext_task(ReadsTheFifth(), size=(32, 32))


# Refusals


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"encoder": {"type": "pooled"}, "decoder": {"type": "unet"}},
            r"model.decoder.channels: unet: wants 2 numbers .* \(1, 2, 4\), not 5; give 2, such as \[32, 16\]",
        ),
        (
            {"encoder": "mobilenetv2_035", "decoder": {"type": "unpooled"}},
            "model.decoder: unpooled reads pool_2, pool_4, which encoder timm does not give; choose",
        ),
        (
            {"encoder": "mobilenetv2_035", "decoder": {"type": "unpooled"}, "norm": "group"},
            "model.decoder: unpooled reads pool_2, pool_4, which encoder timm does not give; choose",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model: dict[str, Any], message: str):
    def build() -> nn.Module:
        config = load(ModelConfig, model)
        return config.spec(config.build_encoder()).dense(2)

    assert re.match(message, message_of(build))


@pytest.mark.parametrize(
    ("decoder", "strides"),
    [
        (UnetPlusPlus(), (2, 4, 8, 16)),
        (UnetPlusPlus(), (1, 2, 4, 8, 16)),
        (FPN(), (2, 4, 8, 16)),
        (FPN(), (1, 2, 4)),
        (UPerNet(), (1, 2, 4, 8, 16)),
        (DeepLabV3Plus(), (1, 2, 4, 8, 16)),
        (DeepLabV3Plus(), (4,)),
    ],
)
def test_decoders_of_smp_name_the_maps_they_want(decoder: Decoder, strides: tuple[int, ...]):
    text = message_of(lambda: decoder.build((8,) * len(strides), strides))
    assert text.startswith(f"model.decoder: {decoder.type}: wants ")
    assert str(strides) in text
    assert "use unet or segformer" in text


def test_a_task_that_reads_an_extra_refuses_an_encoder_without_it():
    model = load(ModelConfig, {"encoder": "mobilenetv2_035"})
    assert "tasks.redraw: reads sketch" in message_of(lambda: build_module(model, {"redraw": Redraw()}, 0))


# Decoders of smp on other levels


@pytest.mark.parametrize(
    ("decoder", "strides"),
    [
        (Unet(channels=(16, 16)), (1, 2, 4)),
        (Unet(channels=(16, 16, 16, 16)), (2, 4, 8, 16)),
        (Unet(channels=(16, 16, 16, 16)), (1, 2, 4, 8, 16)),
        (Unet(channels=(16, 16, 16), attention="scse"), (1, 2, 4, 8)),
        (Unet(channels=(16, 16, 16)), (4, 8, 16)),
        (FPN(pyramid_channels=16, channels=32), (1, 2, 4, 8, 16, 32)),
        (UPerNet(channels=8), (2, 4, 8)),
        (Segformer(channels=8), (1, 2, 4, 8)),
    ],
)
def test_decoders_of_smp_that_take_other_levels_use_them(decoder: Decoder, strides: tuple[int, ...]):
    torch.manual_seed(0)
    maps = [torch.randn(2, 16, 64 // stride, 96 // stride, requires_grad=True) for stride in strides]
    features = Features(maps, strides)
    head = DenseHead(decoder.build((16,) * len(strides), strides), 3)
    answer = head(features, (61, 93))
    assert answer.shape == (2, 3, 61, 93)
    answer.square().mean().backward()
    used = {stride for stride, level in zip(strides, maps, strict=True) if level.grad is not None}
    left_out = {"fpn": {1, 2}, "upernet": {2}}.get(decoder.type, set())
    assert used == set(strides) - left_out
    missing = [name for name, weight in head.named_parameters() if weight.grad is None]
    assert not missing


@pytest.mark.parametrize(
    "decoder",
    [
        Unet(channels=(16, 8)),
        Unet(channels=(16, 8, 8, 8), interpolation="bilinear", center=True),
        Unet(channels=(16, 16), attention="scse"),
    ],
)
def test_unets_of_fewer_levels_pass_the_public_check(decoder: Unet):
    check_decoder(decoder)


# Training


@pytest.mark.parametrize("views", ["all", "split"])
def test_together_gives_the_gradients_of_in_turn(views: str):
    """The extras of tasks that share a pass are dealt out with the maps."""
    gradients = []
    for encode in ("together", "in_turn"):
        config = config_of(encode=encode, views=views, clip=None)
        learner = learner_of(config)
        learner.module.eval()  # batch norm would see another batch
        backward(learner, {"pool": next(streams_of(config, learner)["pool"])}, last=True)
        finish_gradients(learner)
        gradients.append({name: weight.grad for name, weight in learner.module.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["denoise", "redraw"])
def test_losses_fall(task: str):
    config = config_of({task: {}, "rotate": {"weight": 0.1}}, steps=20, lr=0.01)
    learner = learner_of(config)
    steps = train(learner, streams_of(config, learner), 0, seed=0)
    losses = [step.metrics[f"train/{task}/loss"] for step in steps]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_what_is_pretrained_is_exported_fine_tuned_and_loaded_with_equal_features(tmp_path: Path):
    config = load(PretrainConfig, {**config_of().dump(), "recalibrate": 8})
    pretrained = pretrain(config, Options(tmp_path / "pretrained", quiet=True))
    encoder = built(Pooled())
    receipt = load_encoder(encoder, pretrained.folder)
    assert (receipt.share, receipt.features_equal) == (1.0, True)

    values = {**finetuning(), "model": None, "init": str(pretrained.folder), "transfer": "encoder+denoise"}
    tuned = finetune(load(FinetuneConfig, values), Options(tmp_path / "tuned", quiet=True))
    model, _ = load_model(tuned.folder)
    again = model.encoder(images(2))
    assert again.strides == STRIDES
    assert again.extras.keys() == {*INDICES, SKETCH}
    assert model(images(2)).shape == (2, 2, 37, 54)

"""Networks for images of 1 to 8 channels: published weights adapted as timm does it, and refusals in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from pretext.colorize import Colorize
from pretext.denoise import Denoise
from pretext.dense_siamese import DenseSiamese
from pretext.distill import Distill
from pretext.inpaint import Inpaint
from pretext.jigsaw import Jigsaw
from pretext.restore import Restore
from pretext.rotate import Rotate
from ssl_seg import FinetuneConfig, PretrainConfig
from ssl_seg.config import load
from ssl_seg.models import EncoderNet, ModelConfig, constants_of, evaluating
from ssl_seg.models.timm import Timm
from ssl_seg.segment import Segment
from ssl_seg.semisupervised.strong import strong
from ssl_seg.stages.start import find_start
from ssl_seg.tasks import PretextTask, TaskPlugin
from ssl_seg.weights.export import build_model, export_encoder, load_encoder
from tests.faults import message_of

SMALL = "resnet10t"
STEM = "conv1.0.weight"
POOL = {"pool": {"type": "folder", "images": "nowhere"}}  # which nobody looks at
TASKS = (Denoise, DenseSiamese, Inpaint, Jigsaw, Restore, Rotate)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights as timm's own are, with statistics that are no identity."""
    torch.manual_seed(0)
    network = timm.create_model(SMALL).train()
    network(torch.rand(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "rgb.safetensors"
    save_file(network.state_dict(), path)
    return path


def built(weights: Path, channels: int) -> EncoderNet:
    return Timm(name=SMALL, pretrained=str(weights)).build(channels=channels)


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_weights_of_rgb_are_adapted_as_timm_adapts_them(weights: Path, channels: int) -> None:
    wanted = timm.create_model(
        SMALL, pretrained=True, in_chans=channels, features_only=True, pretrained_cfg_overlay={"file": str(weights)}
    ).state_dict()
    encoder = built(weights, channels)
    found = encoder.backbone.network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert encoder.image_channels == channels
    rgb = built(weights, 3)
    assert constants_of(rgb.mean.flatten().tolist(), channels) == pytest.approx(encoder.mean.flatten().tolist())


def test_one_channel_is_seen_as_grey_was_seen_in_rgb(weights: Path) -> None:
    """But for mean and std, of which there is one in place of three."""
    one, rgb = built(weights, 1), built(weights, 3)
    for net in (one, rgb):
        net.mean.fill_(0.4)
        net.std.fill_(0.25)
    grey = torch.rand(2, 1, 64, 64)
    with evaluating(one), evaluating(rgb):
        for own, other in zip(one(grey), rgb(grey.expand(-1, 3, -1, -1)), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_the_default_is_rgb_and_is_not_written() -> None:
    plain = load(ModelConfig, {"encoder": SMALL})
    assert "channels" not in plain.dump()
    assert load(ModelConfig, {"encoder": SMALL, "channels": 4}).dump()["channels"] == 4
    assert "less than or equal to 8" in message_of(lambda: load(ModelConfig, {"channels": 9}))


def test_images_of_another_number_are_refused_by_the_network() -> None:
    net = load(ModelConfig, {"encoder": SMALL, "channels": 4}).build_encoder()
    for other in (1, 3):
        said = message_of(lambda other=other: net(torch.rand(1, other, 32, 32)))
        assert said == f"images of {other} channels, and the network takes 4 (model.channels)"


def test_a_run_of_another_number_is_refused_in_one_line(tmp_path: Path) -> None:
    config = load(ModelConfig, {"encoder": SMALL, "channels": 4})
    export_encoder(tmp_path, config.build_encoder(), config.dump())
    given = {"data": POOL, "tasks": {"denoise": {}}, "init": str(tmp_path)}
    assert find_start(load(PretrainConfig, given)).model.channels == 4  # what is left out is that of init
    said = message_of(lambda: find_start(load(PretrainConfig, {**given, "model": {"channels": 5}})))
    assert "takes images of 4 channels, and model.channels asks for 5" in said
    other = load(ModelConfig, {"encoder": SMALL}).build_encoder()
    said = message_of(lambda: load_encoder(other, tmp_path))
    assert "of another shape" in said
    assert STEM in said


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"tasks": {"colorize": {}}}, "tasks.colorize: is for images of 3 channels, and model.channels is 4"),
        ({"tasks": {"distill": {"teacher": "resnet10t"}}}, "tasks.distill: is for images of 3 channels"),
        ({"augment": {"hue": 0.1}}, "augment.hue: is about the colours of RGB"),
        ({"augment": {"saturation": 0.1}}, "augment.saturation: is about the colours of RGB"),
    ],
)
def test_what_is_about_colours_is_refused_when_the_config_is_opened(asked: dict[str, Any], word: str) -> None:
    given = {"data": POOL, "tasks": {"denoise": {}}, "model": {"channels": 4}, **asked}
    assert word in message_of(lambda: load(PretrainConfig, given))
    load(PretrainConfig, {**given, "model": {}})
    labelled = {"type": "folder", "images": "nowhere", "masks": "here", "classes": 2}
    joint = {**given, "data": {"labelled": labelled, **POOL}}
    assert word in message_of(lambda: load(FinetuneConfig, joint))


def test_a_task_that_says_nothing_is_for_rgb() -> None:
    assert list(TaskPlugin.channel_counts) == [3]
    assert list(Colorize().channel_counts) == [3]
    for task in (*TASKS, Segment):
        assert list(task.channel_counts) == list(range(1, 9))


def test_a_teacher_of_a_run_brings_its_number(tmp_path: Path) -> None:
    config = load(ModelConfig, {"encoder": SMALL, "channels": 2})
    export_encoder(tmp_path, config.build_encoder(), config.dump())
    assert list(Distill(run=str(tmp_path)).channel_counts) == [2]
    assert list(load(Distill, {"teacher": SMALL}).channel_counts) == [3]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("channels", [1, 4])
def test_channels_are_the_same_to_a_task_whatever_lies_beside(kind: type[PretextTask], channels: int) -> None:
    """The view has as many, and moves no value from one channel to another."""
    image = torch.zeros(2, channels, 48, 48)
    image[:, -1] = torch.rand(2, 48, 48)
    # Contrast is about the mean of all channels, and noise goes to each.
    task = kind(colour=0) if kind in (Jigsaw, DenseSiamese) else kind()
    view = task.corrupt(image, torch.arange(2))
    assert view.input.shape[1:] == image.shape[1:]
    if kind is not Denoise:
        assert not view.input[:, :-1].any()


def test_strong_variation_of_bands_leaves_each_to_itself() -> None:
    image = torch.rand(3, 5, 24, 24)
    seen = strong(image, torch.arange(3))
    assert seen.shape == image.shape
    assert not torch.equal(seen, image)


def test_a_whole_model_of_five_channels_answers() -> None:
    config = load(ModelConfig, {"encoder": SMALL, "channels": 5, "decoder": {"type": "unet", "channels": [8] * 5}})
    model = build_model(config, ("a", "b")).eval()
    assert model(torch.rand(1, 5, 33, 47)).shape == (1, 2, 33, 47)

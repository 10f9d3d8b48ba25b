"""Which weights a run starts from is found once: the order, and what each start takes of the others' files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretext.denoise import Denoise
from ssl_seg.config import UserError, load
from ssl_seg.models import ModelConfig
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.pretrain import PretrainConfig, pretrain, resolve
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import Start, build_module, find_start, origins, start_module
from tests.small import finetuning, pretraining


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    pretrain(load(PretrainConfig, pretraining(steps=1)), Options(folder, quiet=True))
    return folder


def start_of(init: Path | None, folder: Path | None = None, **model: object) -> Start:
    values = {**finetuning(), "init": None if init is None else str(init), "model": model or None}
    return find_start(load(FinetuneConfig, values), folder)


def test_a_checkpoint_comes_before_init_and_init_before_published_weights(pretrained: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"read when the network is built")
    encoder = {"type": "timm", "name": "mobilenetv2_035", "pretrained": str(weights)}
    assert start_of(None).kind == "random"
    assert start_of(None, encoder=encoder).kind == "published"
    assert start_of(pretrained, encoder=encoder).kind == "init"
    assert start_of(pretrained, tmp_path / "nothing yet").kind == "init"
    assert start_of(pretrained, pretrained).kind == "checkpoint"


def test_weights_of_a_file_may_have_seen_images_and_those_of_a_tag_are_known(tmp_path: Path) -> None:
    """So the leak guard says of `pretrained: FILE` what it says of `init: FILE`."""
    for pretrained, asked in ((str(tmp_path / "own.pth"), str(tmp_path / "own.pth")), (False, None), (True, None)):
        model = {"encoder": {"type": "timm", "name": "resnet18", "pretrained": pretrained}}
        config = load(FinetuneConfig, {**finetuning(), "model": model})
        assert origins(config, find_start(config)) == {"pretrained": asked}
    config = load(FinetuneConfig, {**finetuning(), "init": "runs/a"})
    assert origins(config, start_of(None)) == {"init": "runs/a"}


def test_weights_of_a_package_come_with_a_receipt(capfd: pytest.CaptureFixture[str]) -> None:
    model = {"encoder": {"name": "tf_efficientnet_lite0", "pretrained": "package"}}
    config = load(FinetuneConfig, {**finetuning(), "model": model})
    start = find_start(config)
    assert start.kind == "published"
    assert origins(config, start) == {"pretrained": None}, "what it has seen is known: ImageNet"
    module, receipts = start_module(start, {"denoise": Denoise()}, 0, lambda module: {}, quiet=False)
    assert receipts["encoder"].share == 1.0
    assert not receipts["encoder"].missing
    assert receipts["encoder"].path.endswith("efficientnet-lite0-57934424.pth")
    assert "100.0% of the parameters" in capfd.readouterr().err
    again, none = start_module(replace(start, kind="random"), {"denoise": Denoise()}, 0, lambda module: {}, quiet=True)
    assert not none
    stem = "backbone.network.conv_stem.weight"
    assert not torch.equal(module.encoder.state_dict()[stem], again.encoder.state_dict()[stem])


def test_a_network_larger_than_the_memory_is_one_line() -> None:
    model = load(ModelConfig, {**pretraining()["model"], "decoder": {"type": "segformer", "channels": 10**15}})
    with pytest.raises(UserError, match=r"model: out of memory on .*choose a smaller encoder"):
        build_module(model, {"denoise": Denoise()}, seed=0)


def test_a_run_that_goes_on_does_not_look_for_what_it_started_from(pretrained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pretrained, tmp_path / "run")
    assert start_of(Path("gone"), folder).kind == "checkpoint"
    shutil.rmtree(folder / "state")
    with pytest.raises(UserError, match="gone: does not exist"):
        start_of(Path("gone"), folder)


def test_the_model_is_the_config_s_own_else_that_of_init(pretrained: Path) -> None:
    inherited = start_of(pretrained)
    assert (inherited.model.encoder.name, inherited.model.norm) == ("mobilenetv2_035", "group")
    assert start_of(pretrained, norm="instance").model.norm == "instance"
    config, start = resolve(load(PretrainConfig, {**pretraining(), "init": str(pretrained)}))
    assert config.model == start.model == inherited.model


def test_weights_of_batch_norm_are_loaded_as_such_and_then_converted(pretrained: Path, tmp_path: Path) -> None:
    batch = tmp_path / "batch"
    values = {**pretraining(steps=1), "model": {**pretraining()["model"], "norm": "batch"}}
    pretrain(load(PretrainConfig, values), Options(batch, quiet=True))
    start = start_of(batch, norm="group")
    assert (start.exported_norm, start.loaded_norm, start.model.norm) == ("batch", "keep", "group")
    start = start_of(pretrained, norm="group")
    assert (start.exported_norm, start.loaded_norm, start.model.norm) == ("group", "group", "group")

"""Distillation: the teacher is measured once, known by its digest, and held outside of all that is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pretext.distill import Distill
from ssl_seg import rng
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Samples
from ssl_seg.models import EncoderSpec, Features, ModelConfig
from ssl_seg.models.timm import Timm
from ssl_seg.runs.folder import RunFolder
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module, prepare_tasks
from ssl_seg.tasks import PretextTask
from ssl_seg.testing import check_pretext_task
from ssl_seg.training.learner import Learner
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import export_encoder
from tests.small import pretraining

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}  # of a vision transformer
TRANSFORMERS = ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"]
ROUNDING = 1e-3  # of convolutions in batches of another size, in units of a channel's spread


def keys(count: int) -> Tensor:
    return rng.fold_in(rng.as_key(0), torch.arange(count))


def pictures(count: int = 4, height: int = 48, width: int = 64) -> Tensor:
    return rng.uniform(keys(count), (3, height, width))


def weights_of(name: str, path: Path, seed: int = 0, **options: int) -> Path:
    """A file as timm's hub holds one."""
    torch.manual_seed(seed)
    save_file(timm.create_model(name, **options).state_dict(), path)
    return path


@pytest.fixture(params=TRANSFORMERS)
def transformer(request: pytest.FixtureRequest, tmp_path: Path) -> Distill:
    file = weights_of(request.param, tmp_path / "teacher.safetensors", **SMALL)
    return Distill(teacher={"name": request.param, "pretrained": str(file), "options": SMALL})


def convolutional(**options: Any) -> Distill:
    return Distill(teacher={"name": "mobilenetv2_035", "pretrained": False}, **options)


# The contract


def test_distilling_keeps_the_contract_with_a_transformer(transformer):
    assert transformer.taught == (16,)
    check_pretext_task(transformer, size=(48, 48), keyed=False)


@pytest.mark.parametrize("options", [{}, {"strides": (32, 8), "distance": "smooth_l1"}], ids=repr)
def test_distilling_keeps_the_contract_with_a_pyramid(options):
    check_pretext_task(convolutional(**options), size=(48, 48), keyed=False, tolerance=ROUNDING)


def test_a_word_is_a_network_of_timm_with_its_published_weights():
    task = PretextTask.model_validate({"type": "distill", "teacher": "resnet18"})
    assert task.teacher == Timm(name="resnet18", pretrained=True)
    assert PretextTask.model_validate(task.dump()) == task


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "wants one teacher"),
        ({"teacher": "resnet18", "run": "runs/one"}, "wants one teacher"),
        ({"teacher": "resnet19"}, "unknown timm model 'resnet19'"),
        ({"teacher": "resnet18", "strides": []}, "at least 1"),
        ({"teacher": "resnet18", "means": [[0.0]]}, "means and spreads belong together"),
        ({"teacher": "resnet18", "means": [[0.0]], "spreads": [[0.0]]}, "greater than 0"),
    ],
)
def test_distill_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        Distill.model_validate(options)


def test_a_stride_that_the_teachers_weights_do_not_make_is_refused(transformer):
    with pytest.raises(UserError, match="make no map of stride 8; choose among 16"):
        transformer.model_copy(update={"strides": (8,)}).head(spec())


def test_statistics_of_another_teacher_are_refused():
    task = convolutional(strides=(32,), means=[[0.0, 1.0]], spreads=[[1.0, 1.0]])
    with pytest.raises(UserError, match="means: has 2 numbers for maps of 112 channels; leave means"):
        task.head(spec())


def spec(strides: tuple[int, ...] = (2, 4, 8, 16, 32)) -> EncoderSpec:
    return EncoderSpec((8,) * len(strides), strides, dense=lambda *_: None)


# What is asked


def test_the_target_is_the_teachers_map_of_the_image_measured_over_the_pool(transformer):
    images = pictures(6, 64, 96)
    task = transformer.prepare(images)
    name = transformer.teacher.name
    network = timm.create_model(name, **SMALL, **({} if "dinov3" in name else {"dynamic_img_size": True})).eval()
    network.load_state_dict(load_file(transformer.origin))
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    side = network.patch_embed.patch_size[0]
    seen = F.interpolate((images - mean) / std, size=(4 * side, 6 * side), mode="bilinear", antialias=True)
    with torch.no_grad():
        wanted = network.forward_intermediates(seen, indices=1, intermediates_only=True)[0].double()
    mean, spread = wanted.mean(dim=(0, 2, 3)), wanted.std(dim=(0, 2, 3), correction=0)
    np.testing.assert_allclose(task.means[0], mean, atol=1e-5)
    np.testing.assert_allclose(task.spreads[0], spread, rtol=1e-4)
    target = task.corrupt(images, keys(6)).target.view(6, 48, 4, 6)
    torch.testing.assert_close(
        target.double(), (wanted - mean.view(-1, 1, 1)) / spread.view(-1, 1, 1), rtol=0, atol=1e-4
    )


def test_a_map_that_is_the_same_for_all_images_has_a_loss_of_one():
    images = pictures(8)
    task = convolutional().prepare(images)
    view = task.corrupt(images, keys(8))
    flat = torch.zeros_like(view.target)
    assert task.loss(flat, view).mean().item() == pytest.approx(1.0, abs=0.02)
    assert task.metrics(flat, view)["explained_16"].mean().item() == pytest.approx(0.0, abs=0.02)
    assert task.loss(view.target, view).tolist() == [0.0] * 8
    assert task.metrics(view.target, view)["explained_4"].tolist() == [1.0] * 8


def test_every_map_counts_alike_however_many_numbers_it_has():
    images = pictures(2)
    task = convolutional().prepare(images)
    view = task.corrupt(images, keys(2))
    for number, (wrong, _) in enumerate(task._pairs(view.target.clone(), view)):
        answer = [own.clone() for own, _ in task._pairs(view.target, view)]
        answer[number] = wrong + 1.0
        rows = torch.cat([own.flatten(1) for own in answer], dim=1)
        torch.testing.assert_close(task.loss(rows, view), torch.full((2,), 1 / len(task.taught)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("strides", [(2, 4, 8, 16, 32), (1, 2, 4, 8), (2, 4, 8, 16, 16), (16, 32)])
def test_a_student_without_a_stride_of_the_teachers_gives_another_map_for_it(strides):
    task = convolutional()
    head = task.head(spec(strides))
    maps = [torch.randn(2, 8, -(-64 // stride), -(-96 // stride)) for stride in strides]
    rows = head(Features(maps, strides), (50, 90))
    cells = [-(-50 // stride) * -(-90 // stride) for stride in task.taught]
    assert rows.shape == (2, sum(channels * own for channels, own in zip(task.channels, cells, strict=True)))


def test_the_teacher_is_the_encoder_that_a_run_has_exported(tmp_path: Path):
    config = ModelConfig.model_validate({"encoder": "mobilenetv2_035"})
    torch.manual_seed(3)
    encoder = config.build_encoder()
    export_encoder(tmp_path, encoder, config.dump())
    task = Distill(run=str(tmp_path))
    assert task.origin == str(tmp_path)
    assert task.taught == (4, 8, 16, 32)
    images = pictures(2)
    with torch.no_grad():
        wanted = encoder.eval()(images)
    view = task.corrupt(images, keys(2))
    for (mine, _), level in zip(task._pairs(view.target, view), wanted[1:], strict=True):
        assert torch.equal(mine, level[..., : mine.shape[2], : mine.shape[3]])
    with pytest.raises(UserError, match="does not exist"):
        Distill(run=str(tmp_path / "nowhere")).prepare(images)


# Held outside


def test_nobody_holds_the_teacher_and_no_gradient_reaches_it():
    values = pretraining(ema=0.9)
    values["tasks"] = {"distill": {"teacher": {"name": "resnet10t", "pretrained": False}}}
    config = load(PretrainConfig, values)
    task = config.tasks["distill"]
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
    teacher = {id(weight) for weight in task.frozen.net.parameters()}
    assert not any(weight.requires_grad for weight in task.frozen.net.parameters())
    assert not task.frozen.net.training
    held = [*learner.module.parameters(), *learner.teacher.module.parameters()]
    assert teacher.isdisjoint(map(id, held))
    # The moving average is a deep copy, its tasks included.
    assert learner.teacher.module.tasks["distill"].frozen is task.frozen
    assert copy.deepcopy(task).frozen.net is task.frozen.net


def test_another_teacher_under_the_same_name_is_refused_when_a_run_goes_on(tmp_path: Path):
    file = weights_of("mobilenetv2_035", tmp_path / "teacher.safetensors")
    values = pretraining(steps=2, save_every=1)
    values["tasks"] = {"distill": {"teacher": {"name": "mobilenetv2_035", "pretrained": str(file)}}}
    config = load(PretrainConfig, values)
    folder = tmp_path / "run"
    pretrain(config, Options(folder, quiet=True))
    recorded = RunFolder.open(folder).read("tasks.json")["distill"]["prepared"]
    assert recorded["digest"] == load(PretrainConfig, values).tasks["distill"].frozen.digest
    assert len(recorded["means"]) == 4
    assert not any("teacher" in name for name in load_file(folder / "encoder" / "encoder.safetensors"))
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    pretrain(load(PretrainConfig, values), Options(folder, quiet=True))  # the same weights: nothing is left to do
    weights_of("mobilenetv2_035", file, seed=1)
    with pytest.raises(
        UserError, match=r"teacher's weights are not those that the run began with .*--overwrite"
    ) as told:
        pretrain(load(PretrainConfig, values), Options(folder, quiet=True))
    assert "\n" not in str(told.value)
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_a_teacher_that_has_seen_the_scored_images_is_a_leak(tmp_path: Path):
    first = pretraining(steps=1)
    first["data"] = {"pool": first["data"]["val"]}
    pretrain(load(PretrainConfig, first), Options(tmp_path / "teacher", quiet=True))
    values = pretraining(steps=1)
    values["tasks"] = {"distill": {"run": str(tmp_path / "teacher")}}
    with pytest.raises(UserError, match=r"tasks\.distill: the pool it was trained on: leak into data\.val"):
        pretrain(load(PretrainConfig, values), Options(tmp_path / "student", quiet=True))
    values["data"]["val"]["seed"] = 11
    pretrain(load(PretrainConfig, values), Options(tmp_path / "student", overwrite=True, quiet=True))


def test_all_processes_take_what_the_first_has_measured_and_refuse_another_teacher(tmp_path: Path):
    """The second of two, on a machine with another file."""
    file = weights_of("mobilenetv2_035", tmp_path / "teacher.safetensors")
    values = pretraining()
    values["tasks"] = {"distill": {"teacher": {"name": "mobilenetv2_035", "pretrained": str(file)}}, "denoise": {}}
    config = load(PretrainConfig, values)
    pool = Samples(config.data.pool, config.augment, 0)
    of_first = prepare_tasks(config.tasks, {"pool": pool}, {})
    second = Processes(config.train)
    second.from_first = lambda own: {name: task.dump() for name, task in of_first.items()}
    same = prepare_tasks(config.tasks, {"pool": pool}, {}, processes=second)
    assert same == of_first
    weights_of("mobilenetv2_035", file, seed=1)
    other = prepare_tasks(load(PretrainConfig, values).tasks, {"pool": pool}, {}, processes=second)
    assert other == of_first
    with pytest.raises(UserError, match="teacher's weights are not those"):
        build_module(config.model, other, 0)

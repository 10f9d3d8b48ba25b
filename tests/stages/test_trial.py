"""What is tried before the first step: memory by errors as a GPU raises them, and images too small for a norm layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_seg import cli, images
from ssl_seg.config import load
from ssl_seg.data.loading import Packed
from ssl_seg.models import SegmentationModel, evaluating
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.stages import pretrain, scoring, trial
from ssl_seg.stages.evaluate import EvaluateConfig, evaluate
from ssl_seg.stages.finetune import FinetuneConfig, assemble, choose_images, finetune, resolve
from ssl_seg.stages.predict import PredictConfig, predict
from ssl_seg.stages.setup import Options
from ssl_seg.training import loop
from ssl_seg.training.learner import Learner
from ssl_seg.training.memory import GIB, bytes_of
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import load_model
from tests.faults import message_of
from tests.small import MODEL, Textured, finetuning, joining, pretraining
from tests.stages.test_resume import assert_same_run
from tests.two_processes import cut_after

BACKWARD = loop.backward


def room_for(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which the backward pass of more images of a stream than that runs out of memory."""

    def backward(learner: Learner, packed: Mapping[str, Packed], *more: Any, **kept: Any) -> dict[str, torch.Tensor]:
        if max(len(own.image) for own in packed.values()) > count:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return BACKWARD(learner, packed, *more, **kept)

    for module in (loop, trial):
        monkeypatch.setattr(module, "backward", backward)


def learner_of(values: dict[str, Any]) -> Learner:
    config, start = resolve(load(FinetuneConfig, values))
    labelled, _ = choose_images(config)
    return assemble(config, start, Processes(config.train), None, labelled, quiet=True)[0]


@pytest.mark.parametrize(
    ("room", "changed", "found"),
    [
        (8, {}, 1),
        (7, {}, 2),
        (3, {}, 4),
        (7, {"views": "split"}, 2),
        (4, {"batch_size": 12}, 3),
        (5, {"batch_size": 12, "views": "split"}, 3),
    ],
)
def test_auto_is_the_coarsest_cut_that_fits_and_parts_no_pair(
    room: int, changed: dict[str, Any], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task mixes the images of a pair; with `views: split` two tasks share the pool by whole pairs."""
    learner = learner_of(joining(accumulate="auto", **{"batch_size": 8, **changed}))
    before = {name: value.clone() for name, value in learner.tensors().items()}
    room_for(room, monkeypatch)
    trial.fit_in_memory(learner)
    assert learner.config.accumulate == found
    torch.testing.assert_close(learner.tensors(), before, rtol=0, atol=0)
    assert all(weight.grad is None for weight in learner.module.parameters())


def test_no_room_for_the_finest_cut_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(1, monkeypatch)
    said = message_of(lambda: trial.fit_in_memory(learner_of(joining(accumulate="auto"))))
    assert "2 crops of 64 x 64 at a time is too much for the CPU" in said


def test_a_run_by_auto_is_that_of_the_number_found_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and where it is taken up on a device with more room, the number is not found anew."""

    def run(out: str, accumulate: int | str) -> Path:
        values = finetuning(accumulate=accumulate, steps=2, save_every=1)
        return finetune(load(FinetuneConfig, values), Options(tmp_path / out, quiet=True)).folder

    given = run("given", 2)
    room_for(3, monkeypatch)
    found = run("found", "auto")
    monkeypatch.undo()
    assert_same_run(given, found)
    assert json.loads((found / "run.json").read_text())["accumulate"] == 2
    cut_after(1, found, tmp_path / "cut")
    run("cut", "auto")
    assert_same_run(given, tmp_path / "cut")
    assert load_state(tmp_path / "cut").data["learner"]["accumulate"] == 2


def test_training_that_runs_out_of_memory_is_one_line_with_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room_for(3, monkeypatch)
    assert cli.run(lambda: finetune(load(FinetuneConfig, finetuning()), Options(tmp_path, quiet=True))) == 2
    said = capsys.readouterr().err
    assert "step 1: 4 crops of 64 x 64 at a time: out of memory" in said
    assert "train.accumulate=auto" in said
    assert said.count("\n") == 1


def test_an_image_that_does_not_fit_whole_is_one_line_and_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(FinetuneConfig, finetuning(steps=2))
    real = SegmentationModel.forward

    def forward(model: SegmentationModel, image: torch.Tensor) -> torch.Tensor:
        if image.shape[-1] > 64:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, image)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModel, "forward", forward)
        patch.setattr(trial.Judged, "check", lambda _: None)
        said = message_of(lambda: finetune(config, Options(tmp_path / "run", quiet=True)))
        assert "a prediction of 80 x 80 pixels at once: out of memory" in said
    assert finetune(config, Options(tmp_path / "run", quiet=True)).steps == 2
    photographs = {"type": "textured", "count": 2}
    asked = load(PredictConfig, {"model": str(tmp_path / "run"), "data": {"images": photographs}, "workers": 0})
    monkeypatch.setattr(SegmentationModel, "forward", forward)
    assert "2 of 2 images cannot be predicted" in message_of(lambda: predict(asked, tmp_path / "masks"))
    assert "textured_0_1: a prediction of 80 x 80 pixels at once" in capsys.readouterr().err


# ---- a CPU, where running out is a kill ----


def has_free(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for asking in (trial, scoring):
        monkeypatch.setattr(asking, "available", lambda: gib * GIB)


def test_a_step_beyond_the_memory_is_refused_with_a_cut_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    values = joining(batch_size=32)
    learner = learner_of(values)
    before = {name: value.clone() for name, value in learner.tensors().items()}
    has_free(0.001, monkeypatch)
    counted = trial.Counted.of(learner)
    assert counted is not None
    whole, half, quarter = (counted.bytes_of_step(learner, cut) for cut in (1, 2, 4))
    assert quarter < half < whole
    has_free((quarter + half) / 2 / GIB, monkeypatch)
    said = message_of(lambda: trial.fit_in_memory(learner))
    assert "a step of 32 crops of 64 x 64 at a time takes more than" in said
    assert "train.accumulate=4 or auto" in said
    torch.testing.assert_close(learner.tensors(), before, rtol=0, atol=0)
    with_room = next(cut for cut in (1, 2, 4, 8, 16) if trial.ROOM * counted.bytes_of_step(learner, cut) <= whole)
    for accumulate, free, found in ((4, (quarter + half) / 2, 4), ("auto", whole, with_room)):
        has_free(free / GIB, monkeypatch)
        values["train"]["accumulate"] = accumulate
        learner = learner_of(values)
        trial.fit_in_memory(learner)
        assert learner.config.accumulate == found
    for accumulate in (1, "auto"):
        values["train"]["accumulate"] = accumulate
        learner = learner_of(values)
        has_free(0.001, monkeypatch)
        assert "give a smaller augment.crop or model" in message_of(lambda own=learner: trial.fit_in_memory(own))


def test_what_may_be_too_much_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    learner = learner_of(joining(batch_size=32))
    has_free(0.001, monkeypatch)
    counted = trial.Counted.of(learner)
    has_free(1.2 * counted.bytes_of_step(learner) / GIB, monkeypatch)
    trial.fit_in_memory(learner, quiet=False)
    assert "may take more than is free, and be killed" in capsys.readouterr().err
    has_free(1.6 * counted.bytes_of_step(learner) / GIB, monkeypatch)
    trial.fit_in_memory(learner, quiet=False)
    assert not capsys.readouterr().err


def test_a_huge_crop_is_counted_on_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of its size is computed before: in pretraining that took minutes."""
    largest = 0
    real = pretrain.MultiTask.passes

    def passes(module: Any, views: Any) -> Any:
        nonlocal largest
        largest = max(largest, *(max(view.input.shape) for view in views.values()))
        return real(module, views)

    monkeypatch.setattr(pretrain.MultiTask, "passes", passes)
    values = pretraining()
    values["augment"]["crop"] = [10_000, 6_400]
    values["data"]["pool"] = {"type": "textured", "count": 2}
    has_free(4, monkeypatch)
    said = message_of(lambda: pretrain.try_out(load(pretrain.PretrainConfig, values)))
    assert "a step of 4 crops of 10000 x 6400 at a time takes more than" in said
    assert 0 < largest <= 512


def test_a_count_on_a_smaller_crop_is_that_of_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(joining())
    has_free(0.001, monkeypatch)
    exact = trial.Counted.of(learner)
    monkeypatch.setattr(trial, "PROBED_CROP", 32)
    assert trial.Counted.of(learner).bytes_of_step(learner) == pytest.approx(exact.bytes_of_step(learner), rel=0.1)


def test_what_surely_fits_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "bytes_of", None)
    monkeypatch.setattr(trial, "backward", None)
    has_free(4, monkeypatch)
    trial.fit_in_memory(learner_of(finetuning()))


def test_a_whole_image_beyond_the_memory_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(FinetuneConfig, finetuning(steps=1))
    data = config.data.model_copy(update={"test": Textured(count=2, size=(512, 384), seed=3)})
    config = config.model_copy(update={"data": data})
    has_free(0.02, monkeypatch)
    monkeypatch.setattr(trial, "fit_in_memory", lambda *_: None)
    said = message_of(lambda: finetune(config, Options(tmp_path / "run", quiet=True)))
    assert said.startswith("data.test: textured_3_0: 512 x 384 pixels at once take more than")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_predict_and_evaluate_count_before_they_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The large one is left out and named, the small ones are predicted; in between a line tells."""
    photos = tmp_path / "photos"
    for name, side in (("a.png", 64), ("b.png", 640), ("c.png", 96)):
        images.write_image(photos / name, np.full((side, side, 3), 90, dtype=np.uint8))
        images.write_mask(tmp_path / "masks" / name, np.zeros((side, side), np.uint8), np.zeros((2, 3), np.uint8))
    run = finetune(load(FinetuneConfig, finetuning(steps=1)), Options(tmp_path / "run", quiet=True))
    model, _ = load_model(run.folder)
    probe = torch.zeros(1, 3, 128, 128)
    with evaluating(model):
        needed = bytes_of(lambda: scoring.predict_ids(model, probe, (128, 128))) / 128**2 * 640**2 / GIB
    pictures = {"type": "folder", "images": str(photos)}
    asked = load(PredictConfig, {"model": str(run.folder), "data": {"images": pictures}, "workers": 0})
    has_free(0.9 * needed, monkeypatch)
    assert "1 of 3 images cannot be predicted" in message_of(lambda: predict(asked, tmp_path / "out"))
    assert "b.png: predicting: 640 x 640 pixels at once take more than" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {"a.png", "c.png"}
    labelled = {**pictures, "masks": str(tmp_path / "masks"), "classes": ["ground", "disc"]}
    scored = load(EvaluateConfig, {"model": str(run.folder), "data": {"test": labelled}, "workers": 0})
    assert "b.png: 640 x 640 pixels at once take more" in message_of(lambda: evaluate(scored))
    has_free(1.2 * needed, monkeypatch)
    assert len(predict(asked, tmp_path / "out").names) == 3
    assert "the system may kill this" in capsys.readouterr().err


# ---- images too small for a norm layer ----


def test_an_image_too_small_for_a_norm_layer_is_named_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FPN's group norm has a channel a group here: of one pixel it has no variance. Its crops are large enough."""
    values = finetuning(steps=1)
    values["model"] = {**MODEL, "decoder": {"type": "fpn", "pyramid_channels": 32, "channels": 32}}
    values["data"]["test"] = {"type": "textured", "count": 2, "size": [16, 16]}
    said = message_of(lambda: finetune(load(FinetuneConfig, values), Options(tmp_path / "small", quiet=True)))
    assert said.startswith("data.test: textured_0_0: an image of 16 x 16 leaves a norm layer one value a channel")
    assert not (tmp_path / "small" / "metrics.jsonl").exists()
    del values["data"]["test"]
    done = finetune(load(FinetuneConfig, values), Options(tmp_path / "fine", quiet=True))
    assert done.steps == 1, "the same network is right for images of 80 x 80"
    tiny = load(PredictConfig, {"model": str(done.model), "data": {"images": {"type": "textured", "size": [16, 16]}}})
    assert "12 of 12 images cannot be predicted" in message_of(lambda: predict(tiny, tmp_path / "masks"))
    assert "textured_0_11: an image of 16 x 16 leaves a norm layer" in capsys.readouterr().err


def test_one_crop_too_small_for_a_norm_layer_is_named_before_the_first_step() -> None:
    values = finetuning(batch_size=4)
    values["model"] = {**MODEL, "decoder": {"type": "fpn", "pyramid_channels": 32, "channels": 32}}
    values["augment"] = {"crop": [32, 32]}
    assert "an image of 32 x 32 leaves a norm layer" in message_of(lambda: trial.check_crops(learner_of(values)))

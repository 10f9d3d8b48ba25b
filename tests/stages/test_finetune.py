"""Fine-tuning: where its weights come from, joint training, what is selected, when it stops, which images it sees."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssl_seg import images
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Samples, loader
from ssl_seg.data.splits import sample_digest
from ssl_seg.datasets import Dataset, Example
from ssl_seg.datasets.folder import Folder
from ssl_seg.evidence.passport import verify
from ssl_seg.images import write_image, write_mask
from ssl_seg.models import EncoderNet, Features
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.runs.folder import read_metrics
from ssl_seg.runs.lock import LOCK
from ssl_seg.runs.writer import RUN_FILES
from ssl_seg.scores import read_image_confusion
from ssl_seg.stages.evaluate import EvaluateConfig, evaluate
from ssl_seg.stages.finetune import (
    SEGMENT,
    FinetuneConfig,
    Finetuned,
    choose_images,
    finetune,
    load_weights,
    of_recalibration,
    of_small_images,
    resolve,
    try_out,
)
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.scoring import measure
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.weights.export import load_model, read_model_info, temperature_of
from ssl_seg.weights.receipt import Receipt
from tests.faults import message_of
from tests.small import MODEL, POOL, Textured, finetuning, joining, pretraining, sharing
from tests.two_processes import cut_after


def run(folder: Path, changed: dict[str, Any] | None = None, **train: Any) -> Finetuned:
    values = {**finetuning(**train), **(changed or {})}
    return finetune(load(FinetuneConfig, values), Options(folder, quiet=True))


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    """From scratch, by the small set-up; a test that changes its files copies them."""
    return run(tmp_path_factory.mktemp("finetuned") / "run")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(folder, quiet=True))
    return folder


def test_the_average_is_what_is_scored_chosen_and_exported(tmp_path: Path) -> None:
    done = finetune(load(FinetuneConfig, joining(eval_every=2)), Options(tmp_path, quiet=True))
    state = load_state(tmp_path, done.selected_step).tensors
    averaged = {name.removeprefix("teacher/"): state[name] for name in state if name.startswith("teacher/")}
    encoder = {name.removeprefix("encoder."): averaged[name] for name in averaged if name.startswith("encoder.")}
    torch.testing.assert_close(load_file(tmp_path / "encoder" / "encoder.safetensors"), encoder, rtol=0, atol=0)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in exported.items():
        own = name.replace("head.", f"heads.{SEGMENT}.", 1) if name.startswith("head.") else name
        torch.testing.assert_close(value, averaged[own], rtol=0, atol=0)
    decoder = load_file(tmp_path / "decoders" / f"{SEGMENT}.safetensors")
    assert all(torch.equal(value, exported[f"head.decoder.{name}"]) for name, value in decoder.items())
    assert not torch.equal(exported["head.last.weight"], state[f"model/heads.{SEGMENT}.last.weight"])
    model, _ = load_model(tmp_path)  # which compares its features with those of the export
    assert measure(model, Textured(count=3, seed=6)).confusions.scores().miou == done.val.miou
    assert not (tmp_path / "decoders" / "consistent.safetensors").exists()


def started(init: Path | None, transfer: str = "encoder") -> dict[str, torch.Tensor]:
    """The weights before the first step."""
    values = {**finetuning(), "init": None if init is None else str(init), "transfer": transfer}
    config, start = resolve(load(FinetuneConfig, values))
    module = build_module(config.model, {SEGMENT: config.segment}, config.seed)
    if start.kind == "init":
        load_weights(config, module)
    return module.state_dict()


def test_the_encoder_is_the_pretrained_one_and_the_head_is_fresh(pretrained: Path) -> None:
    scratch, encoder = started(None), started(pretrained)
    exported = load_file(pretrained / "encoder" / "encoder.safetensors")
    for name, value in exported.items():
        assert torch.equal(encoder[f"encoder.{name}"], value)
    heads = [name for name in scratch if name.startswith("heads.")]
    assert all(torch.equal(scratch[name], encoder[name]) for name in heads)
    assert any(not torch.equal(scratch[name], encoder[name]) for name in scratch if name.startswith("encoder."))


def test_the_decoder_of_a_task_may_come_along_all_but_its_last_layer(pretrained: Path) -> None:
    scratch, both = started(None), started(pretrained, "encoder+denoise")
    exported = load_file(pretrained / "decoders" / "denoise.safetensors")
    assert exported
    for name, value in exported.items():
        assert torch.equal(both[f"heads.{SEGMENT}.decoder.{name}"], value)
    assert torch.equal(both[f"heads.{SEGMENT}.last.weight"], scratch[f"heads.{SEGMENT}.last.weight"])


def test_a_fine_tuned_run_is_a_start_too_so_that_masks_of_a_drawn_world_can_pretrain(finetuned: Finetuned) -> None:
    state = started(finetuned.folder, f"encoder+{SEGMENT}")
    model = load_file(finetuned.model / "model.safetensors")
    encoder = {name: value for name, value in model.items() if name.startswith("encoder.")}
    assert encoder
    assert all(torch.equal(state[name], value) for name, value in encoder.items())
    decoder = load_file(finetuned.folder / "decoders" / f"{SEGMENT}.safetensors")
    assert decoder
    assert all(torch.equal(state[f"heads.{SEGMENT}.decoder.{name}"], value) for name, value in decoder.items())


def test_a_whole_model_may_be_the_start_of_another_fine_tuning(finetuned: Finetuned, tmp_path: Path) -> None:
    model = load_file(finetuned.model / "model.safetensors")
    state = started(finetuned.folder, "model")
    own = {name.replace("head.", f"heads.{SEGMENT}.", 1): value for name, value in model.items()}
    assert own.keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in own.items())
    done = run(tmp_path / "again", {"init": str(finetuned.folder), "transfer": "model"}, steps=1)
    (receipt,) = json.loads((done.folder / "receipts.json").read_text()).values()
    assert (receipt["share"], receipt["features_equal"]) == (1.0, True)


def test_a_whole_model_of_other_classes_or_of_no_classes_is_one_line(
    pretrained: Path, finetuned: Finetuned, tmp_path: Path
) -> None:
    supervised = shutil.copytree(finetuned.folder, tmp_path / "supervised")
    about = supervised / "model" / "model.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "class_names": ["sky", "road"]}))
    for init, said in (
        (supervised, r"takes all but the last layer"),
        (pretrained, r"no model/model\.safetensors"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            started(init, "model")
        assert "\n" not in str(caught.value)


def test_a_task_without_a_decoder_cannot_lend_one(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rotate"):
        run(tmp_path / "run", {"init": str(pretrained), "transfer": "encoder+rotate"})


def test_the_model_is_that_of_the_encoder_where_none_is_given(pretrained: Path) -> None:
    values = {key: value for key, value in finetuning().items() if key != "model"}
    assert (
        resolve(load(FinetuneConfig, {**values, "init": str(pretrained)}))[0].model.dump()
        == resolve(load(FinetuneConfig, finetuning()))[0].model.dump()
    )
    assert resolve(load(FinetuneConfig, values))[0].model.encoder.name == "resnet18"


def test_another_encoder_is_refused_by_its_name(pretrained: Path, tmp_path: Path) -> None:
    other = {**MODEL, "encoder": {"type": "timm", "name": "mobilenetv2_050"}}
    with pytest.raises(
        UserError, match=r"holds a mobilenetv2_035, and model.encoder asks for mobilenetv2_050"
    ) as caught:
        run(tmp_path / "run", {"init": str(pretrained), "model": other})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"does not fit this network"):  # its tensors are looked at all the same
        run(tmp_path / "run", {"init": str(pretrained), "model": other, "init_allow": ["no such tensor"]})


def test_what_the_config_leaves_out_of_the_model_is_that_of_init(pretrained: Path) -> None:
    model = {"decoder": {"type": "unet", "channels": [32, 16, 16, 8, 8]}}
    resolved = resolve(load(FinetuneConfig, {**finetuning(), "model": model, "init": str(pretrained)}))[0].model
    assert (resolved.encoder.name, resolved.decoder.type, resolved.norm) == ("mobilenetv2_035", "unet", "group")


def test_what_the_config_leaves_out_of_encoder_or_decoder_is_that_of_init_too(pretrained: Path) -> None:
    model = {"encoder": {"drop_path": 0.1, "pretrained": True}, "decoder": {"type": "fpn", "dropout": 0.0}}
    resolved, start = resolve(load(FinetuneConfig, {**finetuning(), "model": model, "init": str(pretrained)}))
    encoder, decoder = resolved.model.encoder.dump(), resolved.model.decoder.dump()
    assert (encoder["name"], encoder["drop_path"], start.kind) == ("mobilenetv2_035", 0.1, "init")
    assert (decoder["channels"], decoder["pyramid_channels"], decoder["dropout"]) == (64, 32, 0.0)


def test_crops_that_enlarge_the_images_are_told() -> None:
    values = finetuning()
    size = load(FinetuneConfig, values).data.labelled.image(0).image.shape[:2]
    for crop, resize, is_told in (
        (size, None, False),
        ((size[0] + 1, size[1]), None, True),
        ((64, 64), (32, 48), True),
        ((32, 32), (32, 48), False),
    ):
        data = {**values["data"], "resize": resize}
        config = load(FinetuneConfig, {**values, "augment": {"crop": crop}, "data": data})
        assert bool(of_small_images(config, config.data.labelled)) is is_told
        padded = load(FinetuneConfig, {**values, "augment": {"crop": crop, "pad": True}, "data": data})
        assert not of_small_images(padded, config.data.labelled)


def test_a_pretraining_takes_the_model_of_init_too(pretrained: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in pretraining(steps=1).items() if key != "model"}
    done = pretrain(load(PretrainConfig, {**values, "init": str(pretrained)}), Options(tmp_path / "run", quiet=True))
    config = json.loads((done.folder / "run.json").read_text())["config"]
    assert config["model"] == json.loads((pretrained / "run.json").read_text())["config"]["model"]
    other = {**values, "init": str(pretrained), "model": {"encoder": {"name": "resnet18"}}}
    with pytest.raises(UserError, match=r"model\.encoder asks for resnet18"):
        pretrain(load(PretrainConfig, other), Options(tmp_path / "other", quiet=True))
    assert not (tmp_path / "other").exists()


UNET = {"encoder": {"name": "resnet18"}, "decoder": {"channels": [64, 32, 16, 16, 16]}, "norm": "group"}


@pytest.mark.parametrize(
    ("encode", "model"),
    [
        ("together", MODEL),
        ("in_turn", {**MODEL, "norm": "batch"}),
        pytest.param("together", {**MODEL, "norm": "switch"}, marks=pytest.mark.slow),
        pytest.param("together", UNET, marks=pytest.mark.slow),
    ],
)
def test_joint_training_with_no_weight_is_supervised_training_bit_for_bit(
    encode: str, model: dict[str, Any], tmp_path: Path
) -> None:
    alone = run(tmp_path / "alone", {"model": model}, encode=encode)
    data = {**finetuning()["data"], "pool": POOL}
    tasks = {"denoise": {"weight": 0.0}, "unimatch": {"weight": 0.0, "ramp": 4}}
    joint = run(tmp_path / "joint", {"model": model, "data": data, "tasks": tasks}, encode=encode)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (alone.folder, joint.folder))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    for one, other in zip(read_metrics(alone.folder), read_metrics(joint.folder), strict=True):
        assert one["train/segment/loss"] == other["train/segment/loss"]
        assert one.keys() == other.keys()
    assert not (joint.folder / "decoders" / "denoise.safetensors").exists()
    assert "pool" not in json.loads((joint.folder / "data.json").read_text())


def test_a_stream_that_no_task_with_a_weight_reads_is_not_opened(tmp_path: Path) -> None:
    pool = {**POOL, "count": 2, "size": [8, 8], "seed": 3}  # too small for a crop's details, and never read
    values = {"data": {**finetuning()["data"], "pool": pool}, "tasks": {"unimatch": {"weight": 0.0}}}
    with mock.patch.object(Textured, "read", side_effect=read_but(3), autospec=True):
        run(tmp_path / "run", values, steps=1, batch_size={"labelled": 2, "pool": 3})


def read_but(seed: int) -> Callable[[Textured, int], Example]:
    real = Textured.read

    def read(dataset: Textured, index: int) -> Example:
        assert dataset.seed != seed, "its images are not looked at"
        return real(dataset, index)

    return read


@pytest.mark.parametrize("encode", ["together", pytest.param("in_turn", marks=pytest.mark.slow)])
def test_joint_training_without_labels_is_pretraining_bit_for_bit(encode: str, tmp_path: Path) -> None:
    before = pretraining(encode=encode, steps=3)
    alone = pretrain(load(PretrainConfig, before), Options(tmp_path / "alone", quiet=True))
    data = {**finetuning()["data"], "pool": POOL}
    changed = {"data": data, "tasks": before["tasks"], "segment": {"weight": 0.0}}
    joint = run(tmp_path / "joint", changed, encode=encode, steps=3)
    wanted, found = (load_state(folder).tensors for folder in (alone.folder, joint.folder))
    assert {name for name in found if name not in wanted} == {
        name for name in found if name.startswith(f"model/heads.{SEGMENT}.")
    }
    torch.testing.assert_close({name: found[name] for name in wanted}, wanted, rtol=0, atol=0)


def test_labelled_images_of_another_origin_are_learnt_from_and_not_counted(
    finetuned: Finetuned, tmp_path: Path
) -> None:
    data = {**finetuning()["data"], "beside": {**POOL, "count": 6, "seed": 8}}
    done = run(tmp_path / "run", {"data": data, "labels": {"count": 2}, "leaks": {"check": True}}, steps=2)
    assert len(done.labelled) == 2
    assert all(name.startswith("textured_5_") for name in done.labelled)
    assert "beside" in json.loads((done.folder / "images.json").read_text())
    assert json.loads((done.folder / "data.json").read_text())["beside"]["images"] == 6
    assert (
        not {"beside", "beside_share"}
        & json.loads((finetuned.folder / "run.json").read_text())["config"]["data"].keys()
    )
    same = run(tmp_path / "same", {"data": finetuning()["data"], "labels": {"count": 2}}, steps=2)
    losses = [[line["train/loss"] for line in read_metrics(of.folder)] for of in (done, same)]
    assert losses[0] != losses[1]


def test_images_beside_are_asked_for_leaks_and_classes(tmp_path: Path) -> None:
    data = finetuning()["data"]
    with pytest.raises(UserError, match=r"beside.*val|val.*beside"):
        run(tmp_path / "leaking", {"data": {**data, "beside": {**POOL, "count": 2, "seed": 6}}}, steps=1)
    other = {"type": "synthetic", "kind": "street", "count": 2, "size": [64, 64]}
    with pytest.raises(UserError, match=r"data\.beside: its classes .* are not those of data\.labelled"):
        run(tmp_path / "other", {"data": {**data, "beside": other}}, steps=1)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UserError, match=r"segment\.weight: 0, so nothing is learnt"):
        load(FinetuneConfig, {**finetuning(), "segment": {"weight": 0.0}})
    with pytest.raises(UserError, match=r"no task is left to train"):
        load(PretrainConfig, {**pretraining(), "tasks": {"denoise": {"weight": 0.0}}})


def test_each_stream_has_its_batch(tmp_path: Path) -> None:
    values = joining(steps=2, batch_size={"labelled": 3, "pool": 6})
    done = finetune(load(FinetuneConfig, values), Options(tmp_path, quiet=True))
    assert json.loads((done.folder / "run.json").read_text())["cost"]["images"] == 2 * 9
    assert json.loads((done.folder / "run.json").read_text())["config"]["train"]["batch_size"] == {
        "labelled": 3,
        "pool": 6,
    }


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        ({"labelled": 3}, r"train\.batch_size: pool: missing"),
        ({"labelled": 3, "pol": 6}, r"train\.batch_size: unknown key 'pol'; did you mean 'pool'"),
        ({"labelled": 0, "pool": 6}, r"train\.batch_size: labelled: Input should be greater than 0, not 0"),
        (
            {"labelled": 3, "pool": 5},
            r"train\.batch_size\.pool: 5 cannot be divided .* images that are mixed; use 4 or 6",
        ),
        ("many", r"train\.batch_size: Input should be a valid integer.*, not \"many\"$"),
    ],
)
def test_batches_that_cannot_be_are_told(batch_size: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        try_out(load(FinetuneConfig, joining(batch_size=batch_size)))


@pytest.mark.parametrize(
    ("sees", "train", "passes"),
    [("denoise", {}, 1), (None, {}, 2), ("denoise", {"encode": "in_turn"}, 2), ("denoise", {"accumulate": 2}, 2)],
)
def test_a_noisy_labelled_image_goes_through_the_encoder_once(
    sees: str | None, train: dict[str, Any], passes: int, tmp_path: Path
) -> None:
    """Without a pool; `passes` a step."""
    real, seen = EncoderNet.forward, []

    def forward(net: EncoderNet, image: torch.Tensor) -> Features:
        seen.extend([len(image)] * net.training)
        return real(net, image)

    with mock.patch.object(EncoderNet, "forward", forward):
        done = run(tmp_path / "run", {**sharing(steps=3, **train), "segment": {"sees": sees}})
    assert seen == [4 // train.get("accumulate", 1)] * 3 * passes
    record = json.loads((done.folder / "run.json").read_text())
    assert record["cost"]["images"] == 3 * 4
    assert record["config"]["tasks"]["denoise"]["stream"] == "labelled"
    for line in read_metrics(done.folder):
        assert line["train/loss"] == pytest.approx(line["train/segment/loss"] + 3 * line["train/denoise/loss"])
    assert (done.folder / "decoders" / "denoise.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {**finetuning()["data"], "pool": POOL}}, r"data\.pool: would not be looked at; name a task that"),
        ({"tasks": {"denoise": {}}}, r"data\.pool: missing; tasks\.denoise takes"),
        ({"tasks": {"denoise": {"stream": "labelled", "weight": 0.0}}}, r"segment\.sees: 'denoise' is no other task"),
        ({"segment": {"sees": "denois"}}, r"segment\.sees: 'denois' is no other task .*; those are: denoise$"),
        ({"segment": {"sees": "denoise", "mix": "cutmix"}}, r"segment: sees: what denoise shows is not mixed; drop"),
        ({"tasks": {"denoise": {"stream": "labeled"}}}, r"tasks\.denoise\.stream: .*'pool' or 'labelled'"),
    ],
)
def test_a_pass_that_cannot_be_shared_is_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        try_out(load(FinetuneConfig, {**sharing(), **changed}))
    assert "\n" not in str(caught.value)


def test_pretraining_has_no_labelled_images(tmp_path: Path) -> None:
    values = {**pretraining(), "tasks": {"denoise": {"stream": "labelled"}}}
    with pytest.raises(UserError, match=r"^tasks\.denoise: reads labelled images, and this stage has none; use it in"):
        pretrain(load(PretrainConfig, values), Options(tmp_path / "run", quiet=True))


def test_joint_training_with_weight_changes_the_encoder(finetuned: Finetuned, tmp_path: Path) -> None:
    joint = run(tmp_path / "joint", {"data": {**finetuning()["data"], "pool": POOL}, "tasks": {"denoise": {}}})
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (finetuned.folder, joint.folder))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_it_learns_to_find_the_disc(tmp_path: Path) -> None:
    done = run(tmp_path / "run", {"segment": {"dice": 1.0, "class_weights": "median"}}, steps=80, lr=3e-3)
    ground = (done.test.confusion[0].sum() / done.test.confusion.sum()).item()
    assert done.test.miou > 0.6 > ground / 2, "far above one class everywhere"
    recorded = json.loads((done.folder / "tasks.json").read_text())[SEGMENT]["prepared"]
    assert recorded["class_weights"] != "median"
    assert min(recorded["class_weights"]) < 1 < max(recorded["class_weights"])


def test_the_exported_model_gives_the_scores_of_the_run(finetuned: Finetuned) -> None:
    model, resize = load_model(finetuned.folder)
    config = load(FinetuneConfig, finetuning())
    again = measure(model, config.data.test, resize).confusions.scores()
    assert torch.equal(torch.as_tensor(again.confusion), torch.as_tensor(finetuned.test.confusion))
    image = torch.rand(1, 3, 37, 51)
    assert model(image).shape == (1, 2, 37, 51)


def test_the_temperature_of_the_validation_images_lies_beside_the_weights(finetuned: Finetuned, tmp_path: Path) -> None:
    fitted = temperature_of(read_model_info(finetuned.folder))
    assert fitted is not None
    assert fitted == finetuned.temperature == temperature_of(read_model_info(finetuned.model))
    assert fitted.split == read_image_confusion(finetuned.folder)["val"].digest
    assert fitted.nll[1] <= fitted.nll[0]
    kept = json.loads((finetuned.folder / "calibration.json").read_text())
    assert kept["temperature"] == fitted.value
    assert {part: set(own) for part, own in kept["parts"].items()} == {"val": {"plain"}, "test": {"plain", "tempered"}}
    result = json.loads((finetuned.folder / "result.json").read_text())
    config = load(FinetuneConfig, finetuning())
    asked = {"data": {"test": config.data.test}, "temperature": "val", "workers": 0, "device": "cpu"}
    done = evaluate(EvaluateConfig(model=str(finetuned.folder), **asked))
    assert done.measured.tempered.ece == pytest.approx(result["test"]["tempered/ece"], abs=1e-9)
    assert not done.is_in_sample
    own = evaluate(EvaluateConfig(model=str(finetuned.folder), **{**asked, "data": {"test": config.data.val}}))
    assert own.is_in_sample


def test_every_image_s_confusion_adds_up_to_the_run_s(finetuned: Finetuned) -> None:
    kept = json.loads((finetuned.folder / "confusion.json").read_text())
    found = read_image_confusion(finetuned.folder)
    assert {part: confusions.total().tolist() for part, confusions in found.items()} == {
        part: kept[part] for part in ("val", "test")
    }
    for part, seed in (("val", 6), ("test", 7)):
        assert found[part].names == tuple(f"textured_{seed}_{index}" for index in range(3))
        assert found[part].class_names == ("ground", "disc")
    assert {path.name for path in finetuned.folder.iterdir()} <= {*RUN_FILES, LOCK}, "--overwrite would leave the rest"
    assert verify(finetuned.folder).largest <= 1e-9
    said = json.loads((finetuned.folder / "result.json").read_text())["passport"]
    assert said["val"]["split"] == found["val"].digest != said["test"]["split"]
    split = json.loads((finetuned.folder / "split.json").read_text())
    labelled = Textured(count=4, seed=5)
    assert split["sha256_of_labelled"] == sample_digest(labelled) != sample_digest(Textured(count=4, seed=6))


def test_averages_are_in_the_result_alone(tmp_path: Path) -> None:
    config = load(FinetuneConfig, finetuning())
    assert "averages" not in config.dump(), "as it always was"
    done = run(tmp_path / "run", {"averages": ["weighted"]}, steps=1)
    result = json.loads((done.folder / "result.json").read_text())
    for part, scores in (("val", done.val), ("test", done.test)):
        assert result[part]["weighted/jaccard"] == scores.averaged("weighted")["jaccard"]
    assert verify(done.folder).largest <= 1e-9
    assert "weighted" not in (done.folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("select", ["best", "last"])
def test_the_same_command_draws_and_counts_again_what_is_lost(select: str, tmp_path: Path) -> None:
    def made() -> dict[str, bytes]:
        pictures = (tmp_path / "run" / "pictures").glob("[!0-9]*.png")
        others = [tmp_path / "run" / name for name in ("confusion_images.safetensors", "extremes.json")]
        return {path.name: path.read_bytes() for path in (*others, *pictures)}

    run(tmp_path / "run", {"select": select})
    first = made()
    assert set(first) > {"extremes.json", "val_worst_1.png", "val_worst_2.png", "val_best_1.png", "test_best_1.png"}
    for name in first:
        next((tmp_path / "run").rglob(name)).unlink()
    run(tmp_path / "run", {"select": select})
    assert made() == first


def test_the_best_weights_are_selected_and_the_last_on_request(tmp_path: Path) -> None:
    best = run(tmp_path / "best", steps=30, eval_every=3, lr=0.02)
    scores = {line["step"]: line["val/miou"] for line in read_metrics(best.folder) if "val/miou" in line}
    assert best.selected_step == max(scores, key=scores.get)
    assert best.selected_step != best.steps, "else this test shows nothing"
    assert best.val.miou == pytest.approx(max(scores.values()))
    last = run(tmp_path / "last", {"select": "last"}, steps=30, eval_every=3, lr=0.02)
    assert last.selected_step == last.steps == 30
    assert last.val.miou == pytest.approx(scores[30])


@pytest.fixture(scope="module")
def tired(tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    """A run that nothing improves."""
    return run_tired(tmp_path_factory.mktemp("tired") / "run")


def run_tired(folder: Path) -> Finetuned:
    return run(folder, {"stop": {"patience": 2}}, steps=60, eval_every=1, lr=1e-7)


BATCH = {"encoder": {"name": "mobilenetv2_035"}, "decoder": {"channels": [16, 16, 8, 8, 8]}, "norm": "batch"}


def test_running_statistics_are_estimated_anew_before_the_scores(tmp_path: Path) -> None:
    """As torch's update_bn does on the run's own crops, with nothing but statistics changed; a run taken up too."""
    data = {"labelled": {**POOL, "count": 4, "seed": 5}, "val": {**POOL, "count": 1, "seed": 6}}
    changed = {"data": data, "model": BATCH, "select": "last", "recalibrate": 6}
    done = run(tmp_path / "anew", changed, steps=2, batch_size=3, save_every=1)
    trained = {name.removeprefix("model/"): value for name, value in load_state(done.folder).tensors.items()}
    exported = load_file(done.folder / "model" / "model.safetensors")
    names = {name: name.replace("head.", f"heads.{SEGMENT}.", 1) for name in exported}
    differ = {name for name, own in names.items() if not torch.equal(exported[name], trained[own])}
    assert differ == {name for name in names if "running_" in name}, "in either case two batches have been counted"
    config = load(FinetuneConfig, {**finetuning(steps=2, batch_size=3), **changed})
    model, _ = load_model(done.folder)
    model.load_state_dict({name: trained[own] for name, own in names.items()})
    samples = Samples(config.data.labelled, config.augment, config.seed, with_labels=True)
    batches = [packed.to(torch.device("cpu")).image for packed in loader(samples, [[0, 1, 2], [3, 4, 5]])]
    torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(model.state_dict(), exported, rtol=1e-4, atol=1e-5)
    scored = measure(load_model(done.folder)[0], config.data.val).confusions.scores()
    assert (scored.confusion == done.val.confusion).all(), "the scores are those of what is exported"
    cut_after(1, done.folder, tmp_path / "cut")
    again = run(tmp_path / "cut", changed, steps=2, batch_size=3, save_every=1)
    torch.testing.assert_close(load_file(again.model / "model.safetensors"), exported, rtol=0, atol=0)
    assert (again.val.confusion == done.val.confusion).all()


def test_recalibrating_says_what_it_did_and_stands_in_no_config_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(FinetuneConfig, {**finetuning(steps=1), "recalibrate": 2})
    assert config.dump()["recalibrate"] == 2
    assert "recalibrate" not in load(FinetuneConfig, finetuning()).dump(), "as it always was"
    finetune(config, Options(tmp_path))
    assert "recalibrate: has nothing to do, for no norm layer that learns keeps" in capsys.readouterr().err
    assert of_recalibration(4, 100) == "running statistics are those of 100 training images, in 4 norm layers"
    with pytest.raises(UserError, match="recalibrate: one image has no batch statistics"):
        load(FinetuneConfig, {**finetuning(), "recalibrate": 1})


def test_it_stops_when_nothing_improves_and_when_the_target_is_reached(tired: Finetuned, tmp_path: Path) -> None:
    scores = [line["val/miou"] for line in read_metrics(tired.folder)]
    assert tired.steps < 60
    assert max(scores[-2:]) <= max(scores[:-2])
    content = run(tmp_path / "content", {"stop": {"target": 0.3}}, steps=60, eval_every=1, lr=3e-3)
    reached = [line["val/miou"] >= 0.3 for line in read_metrics(content.folder)]
    assert reached.index(True) == len(reached) - 1


def test_it_stops_at_an_accuracy_and_chooses_by_it(tmp_path: Path) -> None:
    stop = {"target": 0.6, "metric": "accuracy"}
    done = run(tmp_path / "run", {"stop": stop}, steps=60, eval_every=1, lr=3e-3)
    reached = [line["val/accuracy"] >= 0.6 for line in read_metrics(done.folder)]
    assert reached.index(True) == len(reached) - 1
    assert done.steps == done.selected_step == len(reached)
    again = run(tmp_path / "run", {"stop": stop}, steps=60, eval_every=1, lr=3e-3)
    assert again.steps == done.steps, "it is not taken up again"


def test_the_best_weights_are_those_of_the_figure_that_is_named(tmp_path: Path) -> None:
    found = run(tmp_path, {"stop": {"metric": "iou/disc"}}, steps=2, eval_every=1, lr=0.02)
    lines = [line for line in read_metrics(tmp_path) if "val/iou/disc" in line]
    best = {figure: max(lines, key=lambda line: line[f"val/{figure}"])["step"] for figure in ("iou/disc", "miou")}
    assert found.selected_step == best["iou/disc"]
    assert found.selected_step != best["miou"], "else this test shows nothing"


def test_another_figure_does_not_go_by_the_best_of_the_first(tmp_path: Path) -> None:
    """A target that the accuracy had reached ends no run that is now judged by the mIoU."""
    changed = {"stop": {"target": 0.5, "metric": "accuracy"}}
    first = run(tmp_path, changed, steps=3, eval_every=1, lr=1e-7)
    assert first.steps == 1
    values = {**finetuning(steps=3, eval_every=1, lr=1e-7), "stop": {"target": 0.5}}
    assert first.val.miou < 0.5 <= first.val.accuracy, "else this test shows nothing"
    options = Options(tmp_path, quiet=True, allow_changed=("stop.*",))
    assert finetune(load(FinetuneConfig, values), options).steps == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stop": {"metric": "averaged_classes"}}, "stop.metric: 'averaged_classes' is no share that validation gives"),
        ({"stop": {"metric": "iou/unicorn"}}, "or iou/ with the name of a class"),
        ({"stop": {"metric": "val/accuracy"}}, "write miou, accuracy, band/miou"),
        ({"stop": {"metric": "accuracy"}, "select": "last"}, "stop.metric: nothing goes by it"),
    ],
)
def test_a_figure_that_cannot_be_gone_by_is_one_line(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in message_of(lambda: run(tmp_path / "run", changed, eval_every=1))
    assert not (tmp_path / "run").exists()


def test_the_figure_is_written_once_it_is_another() -> None:
    values = {**finetuning(eval_every=1), "stop": {"target": 0.5}}
    assert load(FinetuneConfig, values).dump()["stop"] == {"patience": None, "target": 0.5}
    config = load(FinetuneConfig, {**values, "stop": {"metric": "accuracy"}})
    assert config.dump()["stop"]["metric"] == "accuracy"
    assert load(FinetuneConfig, config.dump()) == config


def test_a_stopped_run_is_not_taken_up_again(tired: Finetuned, tmp_path: Path) -> None:
    again = run_tired(shutil.copytree(tired.folder, tmp_path / "run"))
    assert again.steps == tired.steps
    assert again.val.miou == tired.val.miou
    assert load_state(again.folder).step == tired.steps


def test_validation_is_held_out_where_none_is_given() -> None:
    data = {"labelled": {**POOL, "count": 10}}
    config, _ = resolve(load(FinetuneConfig, {**finetuning(), "data": data, "labels": {"count": 4}}))
    labelled, val = choose_images(config)
    names = [{part.name(index) for index in range(len(part))} for part in (labelled, val)]
    assert [len(part) for part in names] == [4, 2]
    assert not names[0] & names[1]


def test_one_labelled_image_trains(tmp_path: Path) -> None:
    done = run(tmp_path / "run", {"labels": {"count": 1}})
    assert len(done.labelled) == 1
    assert json.loads((done.folder / "split.json").read_text())["labelled"] == list(done.labelled)


class Astray(Textured):
    """Its last image has no mask, or a class that there is not: a plug-in is not asked to look for that itself."""

    fault: str = "id"

    def read(self, index: int) -> Example:
        example = super().read(index)
        if index < self.count - 1:
            return example
        label = None if self.fault == "none" else example.label.copy()
        if label is not None:
            label[0, 0] = 7
        return replace(example, label=label)


@pytest.mark.parametrize(
    ("part", "fault", "said"),
    [
        ("val", "id", "textured_0_2: its mask holds class id 7, and there are 2 classes"),
        ("test", "none", "textured_0_2: has no mask"),
        ("test", "file", "masks/b.png"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_a_wrong_mask_among_those_to_be_scored_is_named_before_the_first_step(
    part: str, fault: str, said: str, check: bool, tmp_path: Path
) -> None:
    values = {**finetuning(), "leaks": {"check": check}}
    config = load(FinetuneConfig, values)
    dataset: Dataset = Astray(count=3, fault=fault)
    if fault == "file":
        for name in "ab":
            example = Textured(seed=3).read(ord(name))
            images.write_image(tmp_path / "images" / f"{name}.png", example.image)
            images.write_mask(tmp_path / "masks" / f"{name}.png", example.label, np.zeros((256, 3), np.uint8))
        wrong = np.full((80, 80), 7, np.uint8)
        images.write_mask(tmp_path / "masks" / "b.png", wrong, np.zeros((256, 3), np.uint8))
        folders = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
        dataset = Folder(**folders, classes=["ground", "disc"])
    data = config.data.model_copy(update={part: dataset})
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        finetune(config.model_copy(update={"data": data}), Options(out, quiet=True))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (out / "metrics.jsonl").exists()
    assert not (out / "state").exists()


def ignore_labels(monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """Of the labelled images only the first `known` keep their labels."""
    read = Textured.read

    def little_known(self: Textured, index: int) -> Any:
        example = read(self, index)
        if self.seed == 5 and index >= known:  # the labelled images
            example.label[:] = 255
        return example

    monkeypatch.setattr(Textured, "read", little_known)


def test_batches_that_are_all_ignored_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_labels(monkeypatch, known=1)
    done = run(tmp_path / "run", {"segment": {"dice": 1.0, "class_weights": "median"}}, batch_size=1)
    losses = [line["train/loss"] for line in read_metrics(done.folder)]
    assert 0 in losses
    assert np.isfinite(losses).all()
    assert all(value.isfinite().all() for value in load_file(done.folder / "model" / "model.safetensors").values())
    assert 0 <= done.val.miou <= 1


def test_nothing_labelled_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_labels(monkeypatch, known=0)
    with pytest.raises(UserError, match=r"data\.labelled: every pixel of all 4 masks is ignored"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*/step_*"))
    with pytest.raises(UserError, match="every pixel"):
        try_out(load(FinetuneConfig, finetuning()))


def put_kinds(root: Path) -> dict[str, Any]:
    """Photographs of plants sorted into a folder a kind, with masks; the data set that reads them."""
    random = np.random.default_rng(0)
    for kind, name in enumerate(("ash", "birch", "cedar", "oak", "pine"), start=1):
        for number in range(2):
            mask = np.zeros((40, 40), dtype=np.uint8)
            mask[8:32, 8:32] = kind
            photograph = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            write_image(root / "images" / name / f"{number}.png", photograph)
            write_mask(root / "masks" / name / f"{number}.png", mask)
    return {"type": "folder", "images": f"{root}/images", "masks": f"{root}/masks", "classes": 6}


def test_a_kind_that_is_held_out_whole_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**finetuning(steps=1), "data": {"labelled": put_kinds(tmp_path)}}
    config = load(FinetuneConfig, values)
    try_out(config)
    told = [line for line in capsys.readouterr().err.splitlines() if "none of the 8 masks" in line]
    assert len(told) == 1
    assert re.match(r"data\.val: shows class_\d, and none of .* it will be scored 0; give data\.val", told[0])
    finetune(config, Options(tmp_path / "run"))
    lines = capsys.readouterr().err.splitlines()
    assert told[0] in lines
    assert [line for line in lines if line.startswith("CAUTION: hardly predicts 'class_")], "after a step it knows none"
    finetune(config, Options(tmp_path / "run"))
    assert told[0] not in capsys.readouterr().err.splitlines()  # it has been told, and no mask is read again for it


def test_one_class_is_refused_whatever_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Textured, "class_names", ("disc",))
    with pytest.raises(UserError, match=r"data\.labelled: one class, 'disc', leaves nothing to tell it from"):
        resolve(load(FinetuneConfig, finetuning()))


def test_the_receipts_are_kept(pretrained: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", {"init": str(pretrained), "transfer": "encoder+denoise"})
    kept = json.loads((done.folder / "receipts.json").read_text())
    for part in ("encoder", "decoder"):
        receipt = Receipt(**kept[part])
        assert receipt.share == 1.0
        assert not receipt.missing + receipt.left_over
    assert kept["encoder"]["features_equal"] is True

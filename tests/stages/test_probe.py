"""`ssl-seg probe`: what a frozen encoder tells of a few labelled images, and the probe that watches a pretraining."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

from ssl_seg import cli, images
from ssl_seg.config import UserError, load
from ssl_seg.data.splits import IGNORE, Labels, Subset, names_of
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.scores import SegmentationScores
from ssl_seg.stages import probe as stage
from ssl_seg.stages.features import open_encoder
from ssl_seg.stages.finetune import FinetuneConfig, choose_images
from ssl_seg.stages.pretrain import PretrainConfig, labelled_of, pretrain
from ssl_seg.stages.probe import (
    ALPHA,
    RARITY,
    Points,
    ProbeConfig,
    blocks_of,
    choose_labelled,
    left_out,
    probe,
    read_points,
    scored,
    scores_of,
)
from ssl_seg.stages.setup import Options
from tests.small import pretraining

SQUARES: dict[str, Any] = {"type": "synthetic", "count": 6, "size": [64, 64]}
NETWORK: dict[str, Any] = {"encoder": {"type": "timm", "name": "resnet10t"}, "norm": "batch"}


class Named:
    """A data set of which the probe needs the names alone."""

    def __init__(self, *names: str, classes: int = 2) -> None:
        self.names = names
        self.class_names = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]


def named(*names: str, classes: int = 2, chosen: Sequence[int] | None = None) -> Subset:
    return Subset(Named(*names, classes=classes), tuple(range(len(names)) if chosen is None else chosen))  # type: ignore[arg-type]


def points_of(ids: np.ndarray, features: np.ndarray) -> Points:
    return Points(features.astype(np.float32), ids.astype(np.uint8), np.ones((1, len(ids)), dtype=bool))


def random_ids(count: int, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, classes, 200)


def test_features_that_are_the_classes_are_told_apart_and_noise_is_not() -> None:
    names = named("a", "b", "c", "d", classes=3)
    ids = [random_ids(seed) for seed in range(4)]
    told = [points_of(own, np.eye(3)[own]) for own in ids]
    assert scored(told, left_out(told, names), names).miou == 1
    noise = np.random.default_rng(0)
    told = [points_of(own, noise.normal(size=(200, 5))) for own in ids]
    assert scored(told, left_out(told, names), names).miou < 0.3  # of three classes alike, chance is 0.2


def test_the_layer_is_that_of_the_normal_equations() -> None:
    """Weighted ridge regression of the one-hot classes with a free constant, features at mean 0 and variance 1."""
    noise = np.random.default_rng(1)
    ids = np.where(noise.uniform(size=400) < 0.1, 1, 0)
    features = noise.normal(size=(400, 3)) + ids[:, None]
    names = named("a", "b")
    both = [points_of(ids[:200], features[:200]), points_of(ids[200:], features[200:])]
    mean, spread = features[:200].mean(axis=0), features[:200].std(axis=0)
    fitted, held = ((own - mean) / spread for own in (features[:200], features[200:]))
    weights = np.bincount(ids[:200])[ids[:200]] ** -RARITY
    weights /= weights.mean()
    design = np.column_stack([fitted, np.ones(200)])
    penalty = np.diag([ALPHA * 200] * 3 + [0.0])
    layer = np.linalg.solve(design.T * weights @ design + penalty, design.T * weights @ np.eye(2)[ids[:200]])
    expected = (np.column_stack([held, np.ones(200)]) @ layer).argmax(axis=1)
    assert 0 < expected.mean() < 1
    assert (left_out(both, names)[1] == expected).all()


def of_blocks(ids: Sequence[np.ndarray], blocks: Sequence[int]) -> list[Points]:
    """Features that tell the classes, in every block by another one."""
    features = [np.zeros((len(own), max(blocks) + 1)) for own in ids]
    for place, own in enumerate(ids):
        features[place][:, blocks[place]] = 2.0 * own - 1
    return [points_of(own, other) for own, other in zip(ids, features, strict=True)]


def test_an_image_is_scored_by_a_layer_that_never_saw_it() -> None:
    """Only a layer of the image itself would know its feature: the others take it for one class throughout."""
    ids = [random_ids(seed, 2) for seed in range(6)]
    predicted = left_out(of_blocks(ids, range(6)), named(*"abcdef"))
    assert all(len(set(one.tolist())) == 1 for one in predicted)


def test_neighbouring_frames_are_left_out_together() -> None:
    """Frames 0 to 9 of a hundred are neighbours, by which they could tell each other."""
    chosen = (0, 4, 9, 40, 44, 90)
    frames = named(*(f"drive_{number:04}.png" for number in range(100)), chosen=chosen)
    blocks = blocks_of(frames).tolist()
    assert blocks[0] == blocks[1] == blocks[2] != blocks[3] == blocks[4] != blocks[5]
    ids = [random_ids(seed, 2) for seed in range(6)]
    places = [sorted(set(blocks)).index(block) for block in blocks]
    assert all(len(set(one.tolist())) == 1 for one in left_out(of_blocks(ids, places), frames))
    told = of_blocks(ids, range(6))  # and frames of one drive alone, if all are neighbours, one by one
    assert len(left_out(told, named(*(f"drive_{number:04}.png" for number in range(6))))) == 6


def labelled(count: int = 4) -> Subset:
    squares = load(Synthetic, {key: own for key, own in SQUARES.items() if key != "type"})
    return Labels(count=count).choose(squares)


def test_the_encoder_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    encoder = load(ProbeConfig, config_values()).model.build_encoder().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    first = scores_of(encoder, labelled())
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    again = scores_of(encoder, labelled())
    assert (first.confusion == again.confusion).all()


def test_points_are_those_of_the_mask_and_none_that_is_ignored() -> None:
    encoder = load(ProbeConfig, config_values()).model.build_encoder()
    examples = labelled(2)
    (first, _) = read_points(encoder, examples)
    label = examples.label(0)
    assert label is not None
    assert first.where.shape == (16, 16)
    assert (first.ids == images.resize_mask(label, (16, 16))[first.where]).all()
    assert IGNORE not in first.ids
    assert first.features.shape == (len(first.ids), sum(encoder.channels))


def test_scores_are_those_of_scikit_learn() -> None:
    names = named("a", "b", "c")
    noise = np.random.default_rng(0)
    ids = [random_ids(seed, 2) for seed in range(3)]
    told = [points_of(own, own[:, None] + noise.normal(size=(200, 1))) for own in ids]
    predicted = left_out(told, names)
    expected = jaccard_score(np.concatenate(ids), np.concatenate(predicted), average="macro")
    assert scored(told, predicted, names).miou == pytest.approx(expected)


def config_values(**values: Any) -> dict[str, Any]:
    return {"data": {"labelled": SQUARES}, "model": NETWORK, "device": "cpu", **values}


def test_a_run_is_probed_beside_random_weights_and_its_page_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(tmp_path / "run", quiet=True))
    words = ["data.labelled.type=synthetic", "data.labelled.count=6", "data.labelled.size=[64,64]", "device=cpu"]
    words = ["probe", str(tmp_path / "run"), *words, "labels.count=4", "--out", str(tmp_path / "out")]
    assert cli.run(partial(cli.app, args=words, prog_name="ssl-seg", standalone_mode=False)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("one linear layer on frozen maps, 4 labelled images")
    assert said[2].endswith(str(tmp_path / "run"))
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    (one,) = record["encoders"]
    assert 0 <= one["miou"] <= 1
    assert one["random"]["miou"] != one["miou"]
    assert len(record["labelled"]) == 4
    assert record["chance"]["iou/square"] == 0
    assert images.read_image(tmp_path / "out" / "sheet.png").shape[1] > 3 * stage.PANEL


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"init": "resnet19"}, "resnet19: there is no such run or file, and encoder.name: unknown timm model"),
        ({"init": "runs/none"}, "runs/none: does not exist"),
        ({"labels": {"count": 1}}, "data.labelled: one image is left out in turn"),
        ({"labels": {"count": 7}, "holds_out": False}, "labels.count: 7 is more than the 6"),
        ({"labels": {"count": 6}}, "labels.count: 6 is more than the 5"),
    ],
)
def test_what_cannot_be_probed_is_a_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        probe(load(ProbeConfig, config_values(**values)), quiet=True)
    assert str(caught.value).startswith(said)


def test_images_without_classes_are_refused() -> None:
    bare = Named("a", classes=0)
    with pytest.raises(UserError, match="the probe tells classes apart"):
        choose_labelled(bare, Labels(), False, "data.labelled")  # type: ignore[arg-type]


@pytest.mark.parametrize("has_val", [False, True])
def test_its_images_are_those_that_fine_tuning_chooses(has_val: bool) -> None:
    many = {**SQUARES, "count": 20}
    data = {"labelled": many, **({"val": {**many, "seed": 1}} if has_val else {})}
    labels = {"count": 6}
    config = load(FinetuneConfig, {"data": data, "labels": labels})
    theirs, _ = choose_images(config)
    ours = choose_labelled(config.data.labelled, load(Labels, labels), not has_val, "data.labelled")
    assert names_of(ours) == names_of(theirs)


def test_masks_that_leave_nothing_to_fit_a_layer_to_are_a_line() -> None:
    empty = points_of(np.empty(0), np.empty((0, 2)))
    with pytest.raises(UserError, match="hold no labelled pixel"):
        left_out([points_of(random_ids(1, 2), np.zeros((200, 2))), empty], named("a", "b"))


# ---- while a run is pretrained ----


def watched(**values: Any) -> PretrainConfig:
    rule = {"labelled": SQUARES, "labels": {"count": 4}, "every": 2}
    return load(PretrainConfig, {**pretraining(steps=6), "probe": rule, **values})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "encoder" / "encoder.safetensors")


def metrics_of(folder: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def test_the_probe_changes_no_bit_of_the_encoder_and_its_figures_are_in_the_metrics(tmp_path: Path) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=6)), Options(tmp_path / "bare", quiet=True))
    pretrain(watched(), Options(tmp_path / "probed", quiet=True))
    bare, probed = weights_of(tmp_path / "bare"), weights_of(tmp_path / "probed")
    assert bare.keys() == probed.keys()
    assert all(torch.equal(bare[name], probed[name]) for name in bare)
    found = metrics_of(tmp_path / "probed")
    assert {step for step, line in found.items() if "probe/miou" in line} == {2, 4, 6}
    assert len({line["probe/random"] for line in found.values() if "probe/random" in line}) == 1
    result = json.loads((tmp_path / "probed" / "result.json").read_text())
    assert result["selected_step"] == 6
    assert result["probe"]["chose"] is False
    assert len(result["probe"]["labelled"]) == 4
    listed = json.loads((tmp_path / "probed" / "images.json").read_text())
    assert "labelled" in json.dumps(listed)


def test_the_probe_is_of_the_encoder_as_it_is_exported(tmp_path: Path) -> None:
    """With batch norm, whose statistics of corrupted images are not those of the export."""
    config = watched(model={**pretraining()["model"], "norm": "batch"}, recalibrate=12)
    found = pretrain(config, Options(tmp_path / "run", quiet=True))
    labelled = labelled_of(config)["labelled"]
    encoder = open_encoder(found.encoder, config.model)
    assert metrics_of(tmp_path / "run")[6]["probe/miou"] == pytest.approx(scores_of(encoder, labelled).miou, abs=1e-6)


def scores(miou: float) -> SegmentationScores:
    right = round(1000 * miou)
    return SegmentationScores.from_confusion(np.array([[right, 0], [1000 - right, 0]]))


def test_the_step_of_the_best_probe_is_exported_and_labels_have_chosen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = iter([0.1, 0.4, 0.7, 0.2])  # of random weights, then of steps 2, 4 and 6
    monkeypatch.setattr(stage, "scores_of", lambda *_, **__: scores(next(came)))
    found = pretrain(watched(select="probe", recalibrate=0), Options(tmp_path / "best", quiet=True))
    monkeypatch.undo()
    assert found.selected_step == 4
    result = json.loads((tmp_path / "best" / "result.json").read_text())
    assert (result["selected_step"], result["probe"]["chose"]) == (4, True)
    pretrain(load(PretrainConfig, {**pretraining(steps=6), "recalibrate": 0}), Options(tmp_path / "last", quiet=True))
    best, last = weights_of(tmp_path / "best"), weights_of(tmp_path / "last")
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_a_run_ends_when_its_probe_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "scores_of", lambda *_, **__: scores(0.5))
    found = pretrain(watched(stop={"patience": 1}), Options(tmp_path / "run", quiet=True))
    assert found.steps == 4


def test_a_run_of_version_0_1_is_described_as_then() -> None:
    dumped = load(PretrainConfig, pretraining(steps=2)).dump()
    assert not {"probe", "select", "stop"} & dumped.keys()
    assert watched(select="probe").dump()["select"] == "probe"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"select": "probe"}, "select: is judged by the probe"),
        ({"stop": {"patience": 2}}, "stop: is judged by the probe"),
        ({"probe": {"labelled": SQUARES}}, "probe: is made when the run is evaluated"),
    ],
)
def test_keys_that_do_not_fit_together_are_a_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(PretrainConfig, {**pretraining(steps=2), **values})

"""Scores at the labels' own resolution, against scikit-learn; pretext figures that are the same at every evaluation."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn

from ssl_seg import images
from ssl_seg.calibration import Confidences, Temperature
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import CenterCrops, loader
from ssl_seg.data.splits import Subset
from ssl_seg.datasets import Dataset, Example
from ssl_seg.evidence.compare import compare
from ssl_seg.evidence.passport import differing, verify
from ssl_seg.figures.panels import GAP, IGNORE_COLOUR, PANEL_SIDE, error_map, grid, overlay, palette
from ssl_seg.leaks.guard import LeakError, Leaks, Question, check
from ssl_seg.metrics import near_boundaries
from ssl_seg.norm.convert import OneByOne
from ssl_seg.reports.console import confidence_lines
from ssl_seg.runs.folder import RunFolder, description_of, labelled_digest, leak_word
from ssl_seg.runs.lock import hold
from ssl_seg.runs.writer import Run
from ssl_seg.scores import named_scores, read_image_confusion
from ssl_seg.stages.evaluate import EvaluateConfig, evaluate
from ssl_seg.stages.panels import changed_pictures, error_picture, prediction_panel, task_pictures, write_images
from ssl_seg.stages.pretrain import PretrainConfig, of_idle_tasks
from ssl_seg.stages.scoring import (
    PLAINLY,
    Also,
    Looks,
    Mirrored,
    logits_at,
    looks_at,
    measure,
    predict_ids,
    score_tasks,
)
from ssl_seg.stages.start import build_module
from ssl_seg.stages.tiles import InTiles
from ssl_seg.training.multitask import make_views
from tests.faults import message_of
from tests.small import Textured, pretraining


class Halves(Dataset):
    """Images of several sizes, dark on the left and bright on the right; the mask says which, with a border ignored."""

    count: int = 3

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("dark", "bright", "never")

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Example:
        height, width = 40 + 7 * index, 50 + 11 * index
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[:, width // 2 :] = 255
        label = (image[..., 0] > 0).astype(np.uint8)
        label[:, width // 2 - 2 : width // 2 + 2] = 255
        return Example(image, label, f"halves_{index}")


class Unmasked(Halves):
    """The same, and in the second image no pixel counts."""

    def read(self, index: int) -> Example:
        example = super().read(index)
        if index == 1:
            example.label[:] = 255
        return example


class Brightness(nn.Module):
    """Class 1 where it is bright, wrong in the top quarter; logits at half of the input's resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bright = nn.functional.avg_pool2d(image[:, :1], 2)
        bright[:, :, : bright.shape[2] // 4] = 1 - bright[:, :, : bright.shape[2] // 4]
        return torch.cat([1 - bright, bright, torch.full_like(bright, -9)], dim=1)


@pytest.mark.parametrize("resize", [None, (24, 32), (80, 100)])
def test_scores_are_scikit_learns_at_the_label_s_resolution(resize: tuple[int, int] | None) -> None:
    scores = measure(Brightness(), Halves(), resize).confusions.scores()
    labels = [Halves().read(index).label for index in range(3)]
    assert scores.confusion.sum() == sum((label != 255).sum() for label in labels)
    named = named_scores(scores, Halves().class_names)
    assert named["iou/never"] is None, "neither there nor predicted"
    assert named["miou"] == pytest.approx((named["iou/dark"] + named["iou/bright"]) / 2)
    truth, prediction = [], []
    for index, label in enumerate(labels):
        image = torch.from_numpy(Halves().read(index).image / 255).permute(2, 0, 1)[None].float()
        expected = (image[0, 0] > 0.5).numpy()
        expected[: label.shape[0] // 4] ^= True
        truth.append(label.ravel())
        prediction.append(expected.ravel())
    counted = np.concatenate(truth) != 255
    oracle = jaccard_score(np.concatenate(truth)[counted], np.concatenate(prediction)[counted], average="macro")
    assert named["miou"] == pytest.approx(oracle, abs=0.05)  # the quarter's edge moves by a pixel or two


def test_an_image_without_a_mask_cannot_be_scored() -> None:
    class Bare(Halves):
        def read(self, index: int) -> Example:
            return Example(super().read(index).image, None, "bare")

    with pytest.raises(UserError, match="bare: has no mask"):
        measure(Brightness(), Bare())


def test_task_scores_repeat_and_do_not_depend_on_the_batch() -> None:
    config = load(PretrainConfig, pretraining())
    module = build_module(config.model, config.tasks, 0)
    first = score_tasks(module, config.data.val, config.augment, batch_size=16)
    assert first == score_tasks(module, config.data.val, config.augment, batch_size=16)
    assert score_tasks(module, config.data.val, config.augment, batch_size=1) == pytest.approx(first, rel=1e-4)
    assert {"denoise/loss", "denoise/psnr", "rotate/loss", "rotate/accuracy"} <= set(first)
    assert module.training, "the mode is put back"


def test_what_a_task_has_learnt_is_told_against_its_guess() -> None:
    config = load(PretrainConfig, pretraining())
    module = build_module(config.model, config.tasks, 0)
    scores = score_tasks(module, config.data.val, config.augment)
    assert scores["rotate/learnt"] == pytest.approx(1 - scores["rotate/loss"] / math.log(4), rel=1e-5)
    (packed,) = loader(CenterCrops(config.data.val, config.augment), [list(range(len(config.data.val)))])
    view = make_views(module.tasks, {"pool": packed.to(torch.device("cpu"))})["denoise"]
    task = module.tasks["denoise"]
    blurred = task.loss(task.guess(view), view).mean().item()
    assert scores["denoise/learnt"] == pytest.approx(1 - scores["denoise/loss"] / blurred, rel=1e-4)
    assert not any(name.endswith("/guess") for name in scores)
    lines = of_idle_tasks({"a/learnt": 0.01, "b/learnt": 0.3, "c/loss": 0.0, "d/learnt": -2.0})
    assert [line.partition(":")[0] for line in lines] == ["tasks.a", "tasks.d"]


def test_pictures_have_a_row_an_image() -> None:
    config = load(PretrainConfig, pretraining())
    module = build_module(config.model, config.tasks, 0)
    sheets = task_pictures(module, config.data.val, config.augment)
    assert sheets["denoise"].shape == (3 * 64 + 2 * GAP, 3 * 64 + 2 * GAP, 3)
    panel = prediction_panel(Brightness(), Subset(Halves(), (1, 2)))
    rows, below = panel[: 2 * 54 + GAP], panel[2 * 54 + GAP :]
    assert rows.shape == (2 * 54 + GAP, 3 * 72 + 2 * GAP, 3)
    for colour in palette(3)[:3]:  # dark, bright, never
        assert (below == colour).all(axis=2).any()


def test_pictures_of_large_images_are_as_large_as_other_panels() -> None:
    class Large(Halves):
        def read(self, index: int) -> Example:
            example = super().read(index)
            return Example(
                *(np.repeat(np.repeat(pixels, 20, 0), 20, 1) for pixels in (example.image, example.label)), ""
            )

    panel = prediction_panel(Brightness(), Large(count=1))
    assert panel.shape[1] == 3 * PANEL_SIDE + 2 * GAP
    colours = {tuple(colour) for colour in panel[:100, PANEL_SIDE + GAP :].reshape(-1, 3).tolist()}
    assert colours <= {*map(tuple, palette(3)[:3].tolist()), IGNORE_COLOUR, (255, 255, 255)}, "ids are not mixed"
    config = load(PretrainConfig, {**pretraining(), "augment": {"crop": [64, 512]}})
    sheets = task_pictures(build_module(config.model, config.tasks, 0), config.data.val, config.augment)
    assert sheets["denoise"].shape == (3 * 50 + 2 * GAP, 3 * PANEL_SIDE + 2 * GAP, 3)


def test_each_image_has_scikit_learn_s_confusion_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_seg.metrics.BAND_WIDTH", 0.1)  # wider than the ignored line between the halves
    found = measure(Brightness(), Unmasked()).confusions
    assert found.names == ("halves_0", "halves_1", "halves_2")
    for index in range(3):
        example = Unmasked().read(index)
        image = torch.from_numpy(example.image / 255).permute(2, 0, 1)[None].float()
        ids = predict_ids(Brightness(), image, example.label.shape)[0].numpy()
        counted = example.label != 255
        oracle = confusion_matrix(example.label[counted], ids[counted], labels=range(3)) if counted.any() else 0
        np.testing.assert_array_equal(found.total([index]), np.zeros((3, 3)) + oracle)
        near = near_boundaries(example.label)
        oracle = confusion_matrix(example.label[near], ids[near], labels=range(3)) if near.any() else 0
        np.testing.assert_array_equal(found.at_boundaries().total([index]), np.zeros((3, 3)) + oracle)
    assert found.at_boundaries().total().sum() > 0
    assert np.isnan(found.per_image_miou()).tolist() == [False, True, False]


class Doctored(Halves):
    """The same images under the same names, with one pixel of the second changed."""

    what: str = "image"

    def read(self, index: int) -> Example:
        example = super().read(index)
        if index == 1:
            pixels = example.image if self.what == "image" else example.label
            pixels[0, 0] = 1
        return example


def test_the_digest_is_of_the_images_as_they_are_and_not_of_the_model_or_its_input() -> None:
    digest = measure(Brightness(), Halves()).confusions.digest
    assert measure(Brightness(), Halves(), (24, 32)).confusions.digest == digest
    others = [
        measure(Brightness(), data).confusions.digest for data in (Doctored(), Doctored(what="label"), Unmasked())
    ]
    assert len({digest, *others}) == 4


def listed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What extremes.json says, after looking whether it is true."""
    extremes = json.loads((folder / "extremes.json").read_text())
    told = [entry["picture"] for entries in extremes.values() for entry in entries]
    pngs = [path.relative_to(folder).as_posix() for path in (folder / "pictures").glob("[!0-9]*.png")]
    assert sorted(told) == sorted(pngs)
    for picture in told:
        assert images.read_image(folder / picture).shape[1] == 4 * PANEL_SIDE + 3 * GAP
    return extremes


def test_the_worst_and_best_images_are_drawn_and_listed(tmp_path: Path) -> None:
    many, few, resize = Halves(count=10), Unmasked(), (24, 32)
    parts = {
        part: (data, measure(Brightness(), data, resize).confusions) for part, data in (("val", many), ("test", few))
    }
    write_images(tmp_path, Brightness(), parts, resize)
    extremes = listed(tmp_path)
    assert [entry["kind"] for entry in extremes["val"]] == ["worst"] * 4 + ["best"] * 4
    assert extremes["val"][0]["picture"] == "pictures/val_worst_1.png"
    assert extremes["val"][4]["picture"] == "pictures/val_best_1.png"
    miou = dict(zip(parts["val"][1].names, parts["val"][1].per_image_miou(), strict=True))
    for entry in extremes["val"]:
        assert entry["miou"] == miou[entry["name"]]
    assert [entry["miou"] for entry in extremes["val"][:4]] == sorted(miou.values())[:4]
    assert [entry["miou"] for entry in extremes["val"][4:]] == sorted(miou.values())[:-5:-1]
    first = error_picture(Brightness(), many, parts["val"][1].names.index(extremes["val"][0]["name"]), resize)
    np.testing.assert_array_equal(images.read_image(tmp_path / "pictures" / "val_worst_1.png"), first)
    assert {entry["name"] for entry in extremes["test"]} == {"halves_0", "halves_2"}, "one has no pixel that counts"


def test_drawn_again_only_the_new_pictures_are_there_and_those_of_training_stay(tmp_path: Path) -> None:
    many, few = Halves(count=10), Halves(count=1)
    write_images(tmp_path, Brightness(), {"test": (many, measure(Brightness(), many).confusions)})
    during = tmp_path / "pictures" / "00000005_best_worst_1.png"
    images.write_image(during, np.zeros((4, 4, 3), dtype=np.uint8))
    write_images(tmp_path, Brightness(), {"val": (few, measure(Brightness(), few).confusions)})
    assert [entry["kind"] for entry in listed(tmp_path)["val"]] == ["worst"]
    assert during.exists()


def test_the_error_map_shows_what_was_counted_wrong() -> None:
    image = np.full((2, 2, 3), 200, dtype=np.uint8)
    drawn = error_map(image, np.array([[0, 1], [1, 255]], np.uint8), np.array([[0, 0], [1, 0]], np.uint8)).tolist()
    assert drawn[0][0] == drawn[1][0] == [80, 80, 80]
    red, green, blue = drawn[0][1]
    assert red > 200 > 100 > green > blue
    assert drawn[1][1] == list(IGNORE_COLOUR)


@pytest.mark.parametrize("resize", [None, (24, 32)])
def test_the_drawn_errors_are_the_counted_ones(resize: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Halves()
    height, width = examples.read(2).label.shape
    monkeypatch.setattr("ssl_seg.figures.panels.PANEL_SIDE", width)  # pixel by pixel
    sheet = error_picture(Brightness(), examples, 2, resize)
    total = measure(Brightness(), examples, resize).confusions.total([2])
    errors = sheet[:height, 3 * (width + GAP) :]
    coloured = errors[..., 0] != errors[..., 2]
    assert coloured.sum() == total.sum() - total.trace() > 0
    assert (errors == IGNORE_COLOUR).all(axis=2).sum() == height * width - total.sum()
    np.testing.assert_array_equal(sheet[:height, :width], examples.read(2).image)


def test_evaluate_keeps_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Brightness()
    model.class_names = Halves().class_names
    monkeypatch.setattr("ssl_seg.stages.evaluate.load_model", lambda path: (model, None))
    monkeypatch.setattr("ssl_seg.stages.evaluate.read_model_info", lambda path: {})
    config = EvaluateConfig(model="x", data={"test": Unmasked()}, workers=0, device="cpu")
    evaluate(config, tmp_path / "out")
    summed = read_image_confusion(tmp_path / "out")["test"].total().tolist()
    assert summed == json.loads((tmp_path / "out" / "confusion.json").read_text())["test"]
    assert verify(tmp_path / "out").largest <= 1e-12
    assert len(listed(tmp_path / "out")["test"]) == 2
    with pytest.raises(UserError, match=r"data\.test: holds no image"):
        evaluate(EvaluateConfig(model="x", data={"test": Halves(count=0)}), tmp_path / "empty")


class Ground(Brightness):
    """Class 0 everywhere, and the classes of `Textured`."""

    class_names = ("ground", "disc")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[:, 0], image[:, 0] - 9], dim=1)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of a model that was trained on two images, as `finetune` leaves it."""
    monkeypatch.setattr("ssl_seg.stages.evaluate.load_model", lambda path: (Ground(), None))
    monkeypatch.setattr("ssl_seg.stages.evaluate.read_model_info", lambda path: {})
    folder = tmp_path / "run"
    folder.mkdir()
    place = Run(folder, {}, os.open(folder / "lock", os.O_CREAT | os.O_RDWR))
    check(place, Question({"labelled": Textured(count=2, seed=5)}, {"val": Textured(count=2, seed=6)}, Leaks()))
    config = {
        "seed": 3,
        "transfer": "encoder",
        "init": None,
        "data": {"labelled": {}, "test": {"type": "x", "root": "y"}},
    }
    place.write_json("run.json", {"stage": "finetune", "status": "finished", "config": config, "origin": None})
    place.write_json("split.json", {"labelled": ["a"], "val": ["b"], "sha256_of_labelled": "1"})
    return folder


def of_textured(model: Path, seed: int, count: int = 2, **more: Any) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(model), data={"test": Textured(count=count, seed=seed)}, workers=0, device="cpu", **more
    )


def test_images_that_the_model_was_trained_on_are_no_test(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where it writes if no folder is named
    for out in (tmp_path / "out", None):
        with pytest.raises(
            LeakError, match=r"^model: the labelled it was .*: leak into data\.test: 2 exact.*textured_5_0"
        ) as raised:
            evaluate(of_textured(trained / "model", 5), out)
        assert Path(re.search(r"see (\S+leaks\.json)", str(raised.value))[1]).is_file()
        assert raised.value.exit_code == 3
    allowed = of_textured(trained, 5, leaks={"allow": ["exact"]})
    assert evaluate(allowed, tmp_path / "out").out == tmp_path / "out", "the refused one is taken again"
    assert leak_word(RunFolder.open(tmp_path / "out").read("leaks.json")) == "allowed"
    evaluate(of_textured(trained, 5, leaks={"check": False}), tmp_path / "unchecked")
    assert leak_word(RunFolder.open(tmp_path / "unchecked").read("leaks.json")) == "unchecked"


def test_the_model_s_own_validation_images_are_no_leak(trained: Path, tmp_path: Path) -> None:
    evaluate(of_textured(trained, 6), tmp_path / "out")
    record = RunFolder.open(tmp_path / "out").read("leaks.json")
    assert leak_word(record) == "clean"
    assert list(record["trained"].values()) == [2]


def test_an_evaluation_says_of_which_run_its_model_is(trained: Path, tmp_path: Path) -> None:
    evaluate(of_textured(trained / "model", 7), tmp_path / "out")
    run = RunFolder.open(tmp_path / "out")
    own = RunFolder.open(trained)
    assert run.is_done
    assert run.record["origin"] == {"stage": "finetune", "config": own.config, "origin": None}
    assert labelled_digest(run.read("split.json")) == labelled_digest(own.read("split.json")) != ""
    described = description_of(run.record)
    assert (described["seed"], described["data.test.seed"]) == ("3", "7")
    assert "data.test.root" not in described
    assert run.read("data.json")["test"]["images"] == 2


def test_a_mirrored_look_is_the_mean_of_two() -> None:
    class Sided(nn.Module):
        """Another answer for each column."""

        class_names = ("a", "b", "c")

        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.mix(image) * torch.linspace(0, 9, image.shape[-1])

    torch.manual_seed(0)
    model, image = Sided(), torch.rand(2, 3, 8, 11)
    with torch.no_grad():
        found = Mirrored(model)(image).exp()
        expected = (model(image).softmax(1) + model(image.flip(-1)).softmax(1).flip(-1)) / 2
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(Mirrored(model)(image.flip(-1)).exp().flip(-1), found)
        even = Evenly()
        torch.testing.assert_close(Mirrored(even)(image), even(image).log_softmax(1))


def test_with_its_own_statistics_an_image_is_what_training_makes_of_it_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    images_ = torch.rand(5, 3, 9, 8) * torch.arange(1, 6)[:, None, None, None]
    expected = torch.cat([copy.deepcopy(model).train()(one) for one in images_.split(1)])
    before = copy.deepcopy(model.eval().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(OneByOne(model)(images_), expected)
        torch.testing.assert_close(OneByOne(model)(images_[3:4]), expected[3:4])
        mirrored = Looks(flips=True, statistics="image").of(model)
        assert isinstance(mirrored, Mirrored)
        assert isinstance(mirrored.model, OneByOne)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_without_running_statistics_there_is_nothing_to_replace(capsys: pytest.CaptureFixture[str]) -> None:
    assert looks_at(nn.GroupNorm(1, 4), "image", flips=True) == Looks(flips=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "statistics: image has nothing to do, for no norm layer of the model keeps running statistics"
    assert looks_at(nn.BatchNorm2d(4), "image") == Looks(statistics="image")
    assert looks_at(nn.BatchNorm2d(4), "running") == Looks()
    assert capsys.readouterr().err == ""


class Contrast(Brightness):
    """Class 1 where it is brighter than the statistics say."""

    class_names = ("ground", "disc")

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        relative = self.norm(image[:, :1])
        return torch.cat([-relative, relative], dim=1)


def test_scores_by_the_images_own_statistics_say_so_and_are_never_ranked_with_others(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_seg.stages.evaluate.load_model", lambda path: (Contrast().eval(), None))
    plain, own = of_textured(trained, 6), of_textured(trained, 6, statistics="image")
    assert "statistics" not in plain.dump(), "as it always was"
    assert own.dump()["statistics"] == "image"
    everywhere = evaluate(plain, tmp_path / "plain").scores
    scores = evaluate(own, tmp_path / "own").scores
    assert everywhere.confusion[:, 0].sum() == 0, "all is brighter than fresh statistics, whose mean is 0"
    assert scores.miou > everywhere.miou + 0.2
    runs = [RunFolder.open(tmp_path / name) for name in ("plain", "own")]
    passports = [run.result["passport"] for run in runs]
    assert passports[1]["test"] == {**passports[0]["test"], "statistics": "image"}
    assert differing(*passports) == ["test: statistics"]
    assert len(compare([tmp_path / "plain", tmp_path / "own"]).tables) == 2
    assert verify(tmp_path / "own").figures == 6 + 3, "three of how sure it is"
    monkeypatch.setattr("ssl_seg.stages.panels.load_model", lambda path: (Contrast().eval(), None))
    (row,) = changed_pictures(*runs, "test", ["textured_6_0"], "cpu")
    monkeypatch.setattr("ssl_seg.stages.panels.looks_of", lambda config: PLAINLY.dump())
    (other,) = changed_pictures(*runs, "test", ["textured_6_0"], "cpu")
    assert not np.array_equal(row, other), "each is drawn as it was scored"


class Evenly(Brightness):
    class_names = ("dark", "bright", "never")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image[:, :2], 1 - image[:, :1]], dim=1)


def test_scores_with_mirrored_looks_say_so_and_are_never_ranked_with_others(trained: Path, tmp_path: Path) -> None:
    plain, flipped = of_textured(trained, 6), of_textured(trained, 6, flips=True)
    assert "flips" not in plain.dump(), "as it always was"
    evaluate(plain, tmp_path / "plain")
    scores = evaluate(flipped, tmp_path / "flipped").scores
    runs = [RunFolder.open(tmp_path / name) for name in ("plain", "flipped")]
    passports = [run.result["passport"] for run in runs]
    assert "flips" not in passports[0]["test"]
    assert passports[1]["test"]["flips"] is True
    assert differing(*passports) == ["test: flips"]
    assert len(compare([tmp_path / "plain", tmp_path / "flipped"]).tables) == 2
    assert verify(tmp_path / "flipped").figures == 6 + 3
    assert (measure(Mirrored(Ground()), flipped.data.test).confusions.total() == scores.confusion).all()
    spoiled = json.loads((tmp_path / "flipped/result.json").read_text())
    del spoiled["passport"]["test"]["flips"]
    (tmp_path / "flipped/result.json").write_text(json.dumps(spoiled))
    assert differing(spoiled["passport"], passports[0]) == []


def test_averages_stand_beside_the_scores_where_they_are_asked_for(trained: Path, tmp_path: Path) -> None:
    plain, asked = of_textured(trained, 6), of_textured(trained, 6, averages=["macro", "one_vs_rest_micro"])
    assert "averages" not in plain.dump(), "as it always was"
    assert asked.dump()["averages"] == ["macro", "one_vs_rest_micro"]
    evaluate(plain, tmp_path / "plain")
    scores = evaluate(asked, tmp_path / "asked").scores
    before, after = (RunFolder.open(tmp_path / name).result for name in ("plain", "asked"))
    assert after["passport"] == before["passport"], "what the mIoU means is the same"
    assert after["test"].items() > before["test"].items()
    assert after["test"]["macro/f1"] == scores.averaged("macro")["f1"]
    assert after["test"]["one_vs_rest_micro/recall"] == scores.accuracy
    assert verify(tmp_path / "asked").figures == 6 + 3 + 2 * 6
    (table,) = compare([tmp_path / "plain", tmp_path / "asked"]).tables
    assert len(table) == 1, "no score comes out differently"


def temperature(value: float = 2.0, split: str = "") -> dict[str, Any]:
    return Temperature(value, 3, 900, split, (0.5, 0.4), (0.1, 0.05)).dump()


def test_how_sure_it_is_is_counted_where_pixels_count_and_at_a_temperature_too() -> None:
    found = measure(Brightness(), Unmasked(), also=Also(temperature=2.0))
    confidences, tempered, right = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for index in range(3):
        example = Unmasked().read(index)
        image = torch.from_numpy(example.image).permute(2, 0, 1)[None] / 255
        logits = logits_at(Brightness(), image, example.label.shape)
        counted = example.label != 255
        for own, divisor in ((confidences, 1.0), (tempered, 2.0)):
            own.append((logits / divisor).softmax(dim=1).amax(dim=1)[0].numpy()[counted])
        right.append((logits.argmax(dim=1)[0].numpy() == example.label)[counted])
    for said, own in ((found.confidences, confidences), (found.tempered, tempered)):
        wanted = Confidences.of(np.concatenate(own), np.concatenate(right))
        np.testing.assert_array_equal(said.pixels, wanted.pixels)
        np.testing.assert_array_equal(said.doubted_right, wanted.doubted_right)
        assert said.ece == pytest.approx(wanted.ece, abs=1e-7)
    assert found.confidences.total == found.confusions.total().sum() > 0
    assert found.confidences.error == pytest.approx(1 - found.confusions.scores().accuracy)


def test_pixels_for_a_temperature_are_drawn_by_the_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_seg.stages.scoring.SAMPLED", 300)
    first, again = (measure(Brightness(), Unmasked(), also=Also(pixels=True)).pixels for _ in range(2))
    np.testing.assert_array_equal(first.logits, again.logits)
    assert (first.images, len(first.truth)) == (2, 200), "of one image no pixel counts"
    assert 255 not in first.truth
    counted = [int((Unmasked().read(index).label != 255).sum()) for index in (0, 2)]
    np.testing.assert_allclose(np.unique(first.weights), sorted(own / 100 for own in counted))
    alone = measure(Brightness(), Subset(Unmasked(), (2,)), also=Also(pixels=True)).pixels
    assert len(alone.truth) == 300
    np.testing.assert_array_equal(alone.logits[:100], first.logits[100:])


def test_an_evaluation_tells_calibration_and_outlines_and_verifies_them(trained: Path, tmp_path: Path) -> None:
    plain = of_textured(trained, 6)
    asked = of_textured(trained, 6, contours=True, temperature=3.0)
    assert not {"contours", "temperature", "tiles"} & plain.dump().keys(), "as it always was"
    assert asked.dump().items() >= {"contours": True, "temperature": 3.0}.items()
    evaluate(plain, tmp_path / "plain")
    done = evaluate(asked, tmp_path / "asked")
    before, after = (RunFolder.open(tmp_path / name).result for name in ("plain", "asked"))
    assert after["passport"] == before["passport"], "what the mIoU means is the same"
    assert after["test"].items() > before["test"].items()
    assert before["test"].keys() >= {"ece", "overconfidence", "aurc"}
    assert after["test"]["tempered/ece"] != after["test"]["ece"]
    rows = (tmp_path / "asked" / "contours.csv").read_text().splitlines()
    assert rows[1:3] == [
        rows[1],
        f"test,textured_6_0,disc,truth,0,{rows[2].split(',')[5]},0.0,{math.hypot(80, 80)!r}",
    ], "ground everywhere: the disc is nowhere"
    assert after["test"]["hd95_one_sided"] == 2
    assert verify(tmp_path / "asked").figures == 6 + 3 + 3 + 3 + 2 * 2
    assert len(compare([tmp_path / "plain", tmp_path / "asked"]).tables) == 1
    assert (done.temperature, done.is_in_sample) == (3.0, False)
    told = confidence_lines("test", done.measured, done.temperature)
    assert [line.partition(":")[0] for line in told[:2]] == [
        told[0].partition(":")[0],
        "test at temperature 3.00 (not the set that it was fitted on)",
    ]
    assert told[-1].split() == ["disc", "0.0000", f"{math.hypot(80, 80):.1f}"]


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("result.json", lambda own: own["test"].update(ece=0.5), "test/ece = 0.5, its counts in calibration.json say"),
        (
            "calibration.json",
            lambda own: own["parts"]["test"]["plain"]["right"].__setitem__(-1, 0),
            "counts other pixels of test than its matrices",
        ),
        ("result.json", lambda own: own["test"].update(hd95=1.0), "test/hd95 = 1.0, its outlines in contours.csv say"),
        ("calibration.json", lambda own: own["parts"].clear(), "test/ece follows from no confusion matrix"),
        ("calibration.json", lambda own: own["parts"]["test"]["plain"]["pixels"].pop(), "not of as many bins"),
    ],
)
def test_a_figure_that_does_not_follow_is_named(
    name: str, edit: Callable[[dict[str, Any]], object], said: str, trained: Path, tmp_path: Path
) -> None:
    evaluate(of_textured(trained, 6, contours=True), tmp_path / "out")
    written = json.loads((tmp_path / "out" / name).read_text())
    edit(written)
    (tmp_path / "out" / name).write_text(json.dumps(written))
    assert said in message_of(lambda: verify(tmp_path / "out"))


def test_the_temperature_of_the_run_is_in_sample_on_its_own_images_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = measure(Ground(), Textured(count=2, seed=6)).confusions.digest
    for name in ("evaluate", "scoring"):
        monkeypatch.setattr(f"ssl_seg.stages.{name}.read_model_info", lambda _: {"temperature": temperature(2.0, own)})
    there = evaluate(of_textured(trained, 6, temperature="val"))
    elsewhere = evaluate(of_textured(trained, 7, temperature="val"), tmp_path / "out")
    assert (there.temperature, there.is_in_sample) == (2.0, True)
    assert (elsewhere.temperature, elsewhere.is_in_sample) == (2.0, False)
    assert "in-sample: it was fitted on these images" in confidence_lines("test", there.measured, 2.0, True)[1]
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["temperature"] == 2.0
    assert "looks once" in message_of(lambda: evaluate(of_textured(trained, 6, temperature="val", flips=True)))
    monkeypatch.setattr("ssl_seg.stages.scoring.read_model_info", lambda _: {})
    assert "has none (its run is of an earlier version" in message_of(
        lambda: evaluate(of_textured(trained, 6, temperature="val"))
    )


def test_scores_in_tiles_say_so_and_are_never_ranked_with_others(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_seg.stages.evaluate.load_model", lambda path: (Contrast().eval(), None))
    tiles = {"size": 64, "overlap": 16}
    plain, tiled = of_textured(trained, 6), of_textured(trained, 6, tiles=tiles)
    whole, parts = evaluate(plain, tmp_path / "plain"), evaluate(tiled, tmp_path / "tiled")
    assert (whole.scores.confusion == parts.scores.confusion).all(), "a network that sees single pixels"
    assert parts.measured.confidences.ece == pytest.approx(whole.measured.confidences.ece, abs=1e-5)
    runs = [RunFolder.open(tmp_path / name) for name in ("plain", "tiled")]
    passports = [run.result["passport"] for run in runs]
    assert "tiles" not in passports[0]["test"]
    assert passports[1]["test"]["tiles"] == tiles
    assert differing(*passports) == ["test: tiles"]
    assert len(compare([tmp_path / "plain", tmp_path / "tiled"]).tables) == 2
    assert verify(tmp_path / "tiled").figures == 6 + 3
    monkeypatch.setattr("ssl_seg.stages.panels.load_model", lambda path: (Contrast().eval(), None))
    looked: list[type] = []
    monkeypatch.setattr(
        "ssl_seg.stages.panels.predict_ids",
        lambda model, image, size: looked.append(type(model)) or predict_ids(model, image, size),
    )
    list(changed_pictures(*runs, "test", ["textured_6_0"], "cpu"))
    assert looked == [Contrast, InTiles]
    monkeypatch.setattr("ssl_seg.stages.evaluate.load_model", lambda path: (Contrast().eval(), (80, 80)))
    assert "tiles: the model looks at every image at 80 x 80" in message_of(lambda: evaluate(tiled))


def test_what_changed_is_drawn_by_the_model_as_it_was_scored(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name, flips in (("plain", False), ("flipped", True)):
        evaluate(of_textured(trained, 6, flips=flips), tmp_path / name)
        runs.append(RunFolder.open(tmp_path / name))
    monkeypatch.setattr("ssl_seg.stages.panels.load_model", lambda path: (Ground(), None))
    looked: list[type] = []
    monkeypatch.setattr(
        "ssl_seg.stages.panels.predict_ids",
        lambda model, image, size: looked.append(type(model)) or predict_ids(model, image, size),
    )
    name = Textured(seed=6, count=2).name(0)
    assert len(list(changed_pictures(*runs, "test", [name], "cpu"))) == 1
    assert looked == [Ground, Mirrored]


def test_a_place_that_cannot_be_written_is_told_before_any_image_is_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_seg.leaks.guard.check", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", Path("/proc/nope/out")):
        assert f"{out}: cannot be written" in message_of(lambda out=out: evaluate(of_textured(trained, 6), out))
    for taken in (trained, tmp_path / "file", tmp_path):
        assert "exists already" in message_of(lambda out=taken: evaluate(of_textured(trained, 6), out))


@pytest.mark.parametrize("name", ["measure", "write_scores", "manifest", "prediction_panel"])
def test_an_evaluation_that_was_killed_is_taken_again(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    config, out = of_textured(trained, 6), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(f"ssl_seg.stages.evaluate.{name}", die)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, out)
    assert not RunFolder.open(out).is_done
    evaluate(config, out)
    assert verify(out).figures == 6 + 3
    with pytest.raises(UserError, match="exists already"):
        evaluate(config, out)


def test_two_evaluations_do_not_write_one_folder(trained: Path, tmp_path: Path) -> None:
    with hold(tmp_path / "out"):
        assert "in use by process" in message_of(lambda: evaluate(of_textured(trained, 6), tmp_path / "out"))


def test_the_model_s_classes_must_be_the_data_s(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Brightness()
    model.class_names = ("ground", "disc")
    monkeypatch.setattr("ssl_seg.stages.evaluate.load_model", lambda path: (model, None))
    monkeypatch.setattr("ssl_seg.stages.evaluate.read_model_info", lambda path: {})
    assert evaluate(EvaluateConfig(model="x", data={"test": Textured(count=1)}, workers=0)).out is None
    with pytest.raises(UserError, match=r"data\.test: has the classes dark, bright, never"):
        evaluate(EvaluateConfig(model="x", data={"test": Halves()}))


def test_class_colours_differ_and_ids_without_a_class_are_grey() -> None:
    for count in (2, 11, 30):
        colours = palette(count)[:count].astype(int)
        distances = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 999 * np.eye(count, dtype=int)
        assert distances.min() > 20
    assert palette(11)[255].tolist() == [224, 224, 224]


def test_a_grid_keeps_panels_in_their_places() -> None:
    red, blue = np.full((4, 6, 3), (255, 0, 0), np.uint8), np.full((2, 3, 3), (0, 0, 255), np.uint8)
    sheet = grid([[red, blue], [blue]])
    assert sheet.shape == (8 + GAP, 12 + GAP, 3)
    assert (sheet[:4, 6 + GAP :] == (0, 0, 255)).all()
    assert (sheet[4 + GAP :, 6 + GAP :] == 255).all()
    assert overlay(red, np.zeros((4, 6), np.uint8), palette(2)).shape == red.shape

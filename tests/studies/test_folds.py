"""Cross-validated studies: what their plan makes, and that pooled folds are one evaluation of all images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_seg.config import UserError, load
from ssl_seg.data.splits import names_of
from ssl_seg.evidence.compare import compare
from ssl_seg.evidence.passport import verify
from ssl_seg.leaks import guard
from ssl_seg.runs.folder import Records, RunFolder, software_of
from ssl_seg.runs.writer import provenance
from ssl_seg.scores import COLUMNS, read_image_confusion
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.panels import examples_of, write_scores
from ssl_seg.stages.scoring import Also, Measured, measure
from ssl_seg.studies.config import StudyConfig
from ssl_seg.studies.folds import digests_in, is_pooled, pool
from ssl_seg.studies.plan import make_plan
from ssl_seg.studies.study import StudyOptions, leak_question, outline, study
from tests.faults import message_of
from tests.small import Textured, finetuning
from tests.studies.test_study import PLUGIN, record, short

COUNT = 3  # folds


def images(count: int = 8) -> dict[str, Any]:
    return {"type": "textured", "count": count, "seed": 5}


def crossed(**keys: Any) -> dict[str, Any]:
    """The values of a StudyConfig of two arms whose labelled images are cut into folds."""
    base = {**short(finetuning()), "data": {"labelled": images()}, "labels": {"folds": COUNT}}
    return {"finetune": base, "arms": {"scratch": {}, "wide": {"train.lr": 0.01}}, "seeds": 2, **keys}


# ---- the plan ----


def test_a_cell_has_a_run_for_each_fold_and_arms_share_the_cut(tmp_path: Path) -> None:
    config = load(StudyConfig, crossed())
    plan = make_plan(config, tmp_path)
    assert [len(cell.folds) for cell in plan.cells] == [COUNT] * 4
    assert [run.config.labels.fold for run in plan.folds] == [0, 1, 2] * 4
    assert len({run.id for run in plan.folds}) == 12
    assert {run.config.select for run in plan.folds} == {"last"}
    held = {
        (run.arm, run.seed, run.config.labels.fold): run.config.labels.divide(Textured(count=8))[1]
        for run in plan.folds
    }
    for seed in (0, 1):
        for fold in range(COUNT):
            assert held["scratch", seed, fold].indices == held["wide", seed, fold].indices
    told = outline(config, tmp_path)
    assert "12 runs of folds, 0 of them finished" in told
    assert "4 cells, 0 of them finished, each pooled of its folds" in told
    without = make_plan(load(StudyConfig, crossed(finetune={**crossed()["finetune"], "labels": {}})), tmp_path)
    assert not without.folds
    assert [cell.runs for cell in without.cells] == [(cell,) for cell in without.cells]


def test_folds_are_an_axis_too(tmp_path: Path) -> None:
    base = {**crossed()["finetune"], "labels": {}}
    plan = make_plan(load(StudyConfig, crossed(finetune=base, grid={"labels.folds": [2, 4]})), tmp_path)
    assert [len(cell.folds) for cell in plan.cells] == [2, 2, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"labels": {"folds": 3, "fold": 1}}, "labels.fold: a study makes every fold"),
        (
            {"data": {"labelled": images(), "test": images(4)}},
            "labels.folds: the labelled images are what such a study",
        ),
        ({"data": {"labelled": images(), "val": images(4)}}, "labels.folds: the fold that is held out judges"),
        ({"select": "best"}, "select: best: would choose by the fold that it scores"),
        (
            {"stop": {"patience": 2}, "train": {**finetuning()["train"], "eval_every": 2}},
            "stop: would choose by the fold that it scores",
        ),
    ],
)
def test_what_makes_no_sense_with_folds_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = load(StudyConfig, crossed(finetune={**crossed()["finetune"], **keys}))
    assert said in message_of(lambda: make_plan(config, tmp_path))


def test_a_search_has_nothing_to_choose_on_and_folds_want_images(tmp_path: Path) -> None:
    searching = load(StudyConfig, crossed(search={"grid": {"segment.dice": [0, 1]}}))
    assert "search: with labels.folds every labelled image scores" in message_of(lambda: make_plan(searching, tmp_path))
    many = load(StudyConfig, crossed(finetune={**crossed()["finetune"], "labels": {"folds": 9}}))
    assert "labels.folds: 9 is more than the 8 labelled images; write 8 or less" in message_of(
        lambda: outline(many, tmp_path)
    )
    labels = load(StudyConfig, crossed(finetune={**crossed()["finetune"], "labels": {"folds": 2, "count": 5}}))
    assert "more than the 4 labelled images to train on" in message_of(lambda: outline(labels, tmp_path))


# ---- leaks ----


class Copied(Textured):
    """The last image is the first once more."""

    def read(self, index: int) -> Any:
        found = super().read(0 if index == len(self) - 1 else index)
        return found.__class__(found.image, found.label, self.name(index))

    def name(self, index: int) -> str:
        return "abcdefghijkl"[index]


def test_copies_leak_only_where_a_cut_parts_them(tmp_path: Path) -> None:
    data = Copied(count=8, seed=5)
    for first, last, stops in ((0, 1, True), (1, 1, False)):
        cut = dict.fromkeys(names_of(data), 0) | {data.name(0): first, data.name(7): last}
        pair = ("labelled", "val")
        question = guard.Question(
            {"labelled": data}, {"val": data}, guard.Leaks(), own_cuts=frozenset({pair}), folds={pair: [cut]}
        )
        place = Records(tmp_path / str(first))
        place.folder.mkdir()
        if stops:
            said = message_of(lambda own=question, at=place: guard.check(at, own, quiet=True))
            assert "data.labelled: leak into data.val: 1 exact: " in said
        else:
            assert not guard.check(place, question, quiet=True)["leaks"]


def test_the_study_asks_about_every_cut_and_reads_each_image_once_a_side(tmp_path: Path) -> None:
    question = leak_question(make_plan(load(StudyConfig, crossed()), tmp_path))
    assert question is not None
    assert set(question.given) == {"labelled", "val"}
    cuts = question.folds["labelled", "val"]
    assert len(cuts) == 2, "one for each seed"
    assert all(sorted(set(cut.values())) == [0, 1, 2] and len(cut) == 8 for cut in cuts)


# ---- pooled ----


class Threshold(nn.Module):
    """Bright pixels are the disc; its weight makes it a network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, image: Tensor) -> Tensor:
        bright = image.mean(dim=1, keepdim=True) - 0.5
        return self.scale * torch.cat([-bright, bright], dim=1)


def fold_run(folder: Path, config: FinetuneConfig, fold: int) -> Measured:
    """What a run of a fold leaves that is read of it, with a network that needs no training."""
    labels = config.labels.model_copy(update={"fold": fold})
    rest, held = labels.divide(config.data.labelled)
    found = measure(Threshold(), held, also=Also(contours=True))
    place = Records(folder)
    place.folder.mkdir(parents=True)
    own = config.model_copy(update={"labels": labels})
    about = {"stage": "finetune", "status": "finished", **provenance(), "resumed": [], "device": "1 x cpu", "seed": 0}
    cost = {"seconds": 2.0, "images": 10, "peak_memory_mib": 100.0 + fold}
    place.write_json("run.json", {**about, "origin": None, "ended": None, "config": own.dump(), "cost": cost})
    split = {"labels": labels.dump(), "labelled": names_of(rest), "val": names_of(held), "sha256_of_labelled": "ab"}
    place.write_json("split.json", split)
    write_scores(place, Threshold(), {"val": (held, found)}, about={"steps": 2})
    return found


@pytest.fixture
def folded(tmp_path: Path) -> tuple[FinetuneConfig, list[Path]]:
    """A config, and the runs of its folds in a study's folder."""
    config = load(FinetuneConfig, crossed()["finetune"])
    runs = [tmp_path / "folds" / f"cell-fold{fold}" for fold in range(COUNT)]
    for fold, run in enumerate(runs):
        fold_run(run, config, fold)
    return config, runs


def test_pooled_folds_are_one_evaluation_of_all_images(
    folded: tuple[FinetuneConfig, list[Path]], tmp_path: Path
) -> None:
    config, runs = folded
    cell = tmp_path / "cells" / "cell"
    assert pool(cell, runs, config, digests_in(config.data.labelled)) == ()
    whole = measure(Threshold(), config.data.labelled, also=Also(contours=True))
    found = read_image_confusion(cell)["val"]
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(found, column), getattr(whole.confusions, column))
    assert (found.names, found.digest) == (whole.confusions.names, whole.confusions.digest)
    run = RunFolder.open(cell)
    assert run.is_done
    assert run.result is not None
    assert run.result["val"] == pytest.approx(whole.named())
    means = np.mean([(RunFolder.open(own).result or {})["val"]["miou"] for own in runs])
    assert run.result["val"]["miou"] != pytest.approx(means, abs=1e-6), "a mIoU is no mean over folds"
    assert verify(cell).largest <= 1e-9
    assert run.record["cost"] == {"seconds": 6.0, "images": 30, "peak_memory_mib": 102.0}
    assert [own["run"] for own in run.record["pooled"]] == [own.name for own in runs]
    assert "fold" not in run.config["labels"]
    assert [len(own) for own in run.read("split.json")["folds"]] == [3, 3, 2]  # type: ignore[index]
    extremes = run.read("extremes.json")["val"]  # type: ignore[index]
    assert [entry["name"] for entry in extremes[:4]] == [found.names[index] for index in found.extremes(4)[0]]
    assert all((cell / entry["picture"]).is_file() for entry in extremes)
    assert names_of(examples_of(run, "val")) == names_of(config.data.labelled)
    assert [arm.label for arm in compare([cell]).arms] == ["scratch"]


def test_a_pooled_cell_says_what_each_of_its_runs_was_made_with(
    folded: tuple[FinetuneConfig, list[Path]], tmp_path: Path
) -> None:
    """Folds that were made on several machines, which settled `precision: auto` each in its way."""
    config, runs = folded
    for run, precision in zip(runs, ("bf16", "fp32", "fp32"), strict=True):
        path = run / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "precision": precision}))
    cell = tmp_path / "cells" / "cell"
    pool(cell, runs, config, digests_in(config.data.labelled))
    assert set(software_of(RunFolder.open(cell).record)["precision"].split(", ")) == {"bf16", "fp32"}


def test_a_pooled_cell_is_that_of_its_very_runs(folded: tuple[FinetuneConfig, list[Path]], tmp_path: Path) -> None:
    config, runs = folded
    cell = tmp_path / "cells" / "cell"
    digests = digests_in(config.data.labelled)
    assert not is_pooled(cell, runs)
    pool(cell, runs, config, digests)
    assert is_pooled(cell, runs)
    assert not is_pooled(cell, runs[:2])
    counts = runs[0] / "confusion_images.safetensors"
    kept = counts.read_bytes()
    counts.write_bytes(kept + b" ")
    assert not is_pooled(cell, runs), "another run of that name"
    counts.unlink()
    assert is_pooled(cell, runs), "its runs may go"
    counts.write_bytes(kept)
    other = {**digests, names_of(config.data.labelled)[0]: "ab"}
    assert "was scored on other images or masks than data.labelled has now" in message_of(
        lambda: pool(cell, runs, config, other)
    )
    with pytest.raises(UserError, match="no cut of data"):
        pool(cell, runs[:2], config, digests)


def test_an_image_without_a_pixel_that_counts_is_told(tmp_path: Path) -> None:
    class Blank(Textured):
        def read(self, index: int) -> Any:
            found = super().read(index)
            label = np.full_like(found.label, 255) if index == 2 else found.label
            return found.__class__(found.image, label, found.name)

    config = load(FinetuneConfig, {**crossed()["finetune"], "data": {"labelled": Blank(count=8, seed=5)}})
    runs = [tmp_path / "folds" / f"cell-fold{fold}" for fold in range(COUNT)]
    for fold, run in enumerate(runs):
        fold_run(run, config, fold)
    assert pool(tmp_path / "cells" / "cell", runs, config, digests_in(config.data.labelled)) == ("textured_5_2",)


# ---- a whole study ----


@pytest.mark.slow
def test_a_cross_validated_study_pairs_pooled_cells_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "study"
    config = load(StudyConfig, crossed())
    given = StudyOptions(out, jobs=2, plugins=(PLUGIN,), quiet=True)
    found = study(config, given)
    assert found.gains[0].n == 2
    assert (
        {own["status"] for own in record(out)["cells"]}
        == {own["status"] for own in record(out)["folds"]}
        == {"finished"}
    )
    assert len(record(out)["folds"]) == 12
    passports = {json.dumps(cell.passports, sort_keys=True) for cell in found.cells}
    assert len(passports) == 1, "every seed is scored on the same images, whatever its cut"
    changed = found.changed(found.arms[1], "val/miou", found.conditions[0])
    assert {one.name for one in changed} <= set(names_of(Textured(count=8, seed=5)))
    assert changed, "images are paired over seeds"
    split = json.loads((out / "folds" / record(out)["folds"][0]["id"] / "split.json").read_text())
    assert split["val"] == split["folds"][0]
    assert not {*split["val"]} & {*split["labelled"]}
    assert "Runs of folds" in (out / "report.html").read_text()
    assert list((out / "changed").glob("*.png"))

    made = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    assert len(made) == 16
    listed = record(out)
    shutil.rmtree(out / "folds" / listed["folds"][0]["id"])  # not needed, for its cell has its score
    shutil.rmtree(out / "folds" / listed["folds"][4]["id"])
    (out / "cells" / listed["cells"][1]["id"] / "result.json").unlink()
    again = study(config, given)
    now = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    assert len(now) == 15
    assert sum(now[path] != made[path] for path in now) == 2
    assert again.gains[0].mean == pytest.approx(found.gains[0].mean, abs=1e-6)

"""Groups of runs: what makes two runs one group, which are paired, and which keys are shown."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_seg import cli
from ssl_seg.data.splits import hold_out
from ssl_seg.evidence import compare
from ssl_seg.evidence.cautions import notes
from ssl_seg.evidence.claims import certainty
from ssl_seg.evidence.compare import group
from ssl_seg.evidence.comparison import Arm, Outcome
from ssl_seg.evidence.statistics import block_bootstrap
from ssl_seg.figures.panels import GAP, palette
from ssl_seg.images import read_image, resize_mask
from ssl_seg.reports import runs
from ssl_seg.runs import folder as run_folder
from ssl_seg.runs.folder import RunFolder, described, scores_of
from ssl_seg.scores import IMAGES_FILE
from ssl_seg.stages.panels import changed_pictures, examples_of
from ssl_seg.stages.scoring import measure
from ssl_seg.tracking import experiments, mirror
from tests.evidence.test_passport import change, scored, write_scored
from tests.faults import message_of
from tests.small import Textured

CONFIG = {
    "data": {"labelled": {"type": "camvid", "drives": ["a", "b"]}},
    "labels": {"count": 10, "seed": 0},
    "model": {"encoder": {"name": "resnet18", "pretrained": False}},
    "train": {"steps": 400},
    "init": None,
    "transfer": "encoder",
    "seed": 0,
    "tracking": {"type": "none"},
}
PRETRAINING = {"tasks": {"denoise": {"weight": 3.0}}, "train": {"steps": 1500}, "init": None, "seed": 0}
# A pair of leaks.json.
LEAK = {
    "kind": "exact",
    "part": "pool",
    "name": "a",
    "scored_part": "val",
    "scored": "b",
    "detail": "",
    "allowed": True,
}


def laid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over`'s dotted keys laid on a copy."""
    copy = json.loads(json.dumps(base))
    for key, value in over.items():
        *parents, last = key.split(".")
        place = copy
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return copy


def finetuned(miou: float, pretraining: dict[str, Any] | None = None, **over: Any) -> Outcome:
    """A fine-tuning with these keys changed (`__` for a dot), from a pretraining with those."""
    dotted = {key.replace("__", "."): value for key, value in over.items()}
    start = None
    if pretraining is not None:
        start = {"stage": "pretrain", "config": laid(PRETRAINING, pretraining), "origin": None}
    description = described(laid(CONFIG, dotted), start)
    return compare.outcome("run", "finetune", description, {"val/miou": miou, "val/iou/road": miou / 2})


def written(folder: Path, config: dict[str, Any], result: dict[str, Any] | None, **more: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"stage": "finetune", "status": "finished", "config": config, **more}
    (folder / "run.json").write_text(json.dumps(record))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_runs_that_differ_in_seeds_alone_are_one_group() -> None:
    outcomes = [finetuned(0.1 * seed, seed=seed, labels__seed=seed) for seed in range(3)]
    outcomes += [
        finetuned(0.5, {"seed": start}, seed=seed, init=f"runs/pre_{start}") for start in (0, 1) for seed in (0, 1)
    ]
    found = group(outcomes)
    assert [(own.label, len(own.outcomes)) for own in found.arms] == [("scratch", 3), ("pre", 4)]
    assert found.differing == {"init": (None, "pre_0, pre_1")}


def test_tracking_does_not_tell_runs_apart() -> None:
    assert len(group([finetuned(0.1), finetuned(0.2, seed=1, tracking={"type": "mlflow", "uri": "x"})]).arms) == 1


def test_keys_that_change_no_weight_do_not_tell_runs_apart() -> None:
    other = {"train__workers": 4, "train__log_every": 50, "train__save_every": None}
    pretrained = finetuned(0.3, {"train.workers": 8}, init="runs/pre_0", **other)
    again = finetuned(0.3, {"train.workers": 0, "seed": 1}, init="runs/pre_1")
    found = group([finetuned(0.1, train__workers=2), finetuned(0.2, seed=1, **other), pretrained, again])
    assert [len(own.outcomes) for own in found.arms] == [2, 2]
    assert list(found.differing) == ["init"]
    assert found.gain(found.arms[1], "val/miou").values == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("key", "value"),
    [("train__steps", 800), ("labels__count", 30), ("data__labelled__drives", ["a"]), ("transfer", "encoder+denoise")],
)
def test_any_other_key_makes_another_group(key: str, value: Any) -> None:
    found = group([finetuned(0.1), finetuned(0.2, **{key: value})])
    assert len(found.arms) == 2
    assert list(found.differing) == [key.replace("__", ".")]


def test_gains_are_paired_by_seed() -> None:
    base, gains = [0.2, 0.4, 0.3], [0.01, 0.02, 0.06]
    scratch = [finetuned(miou, seed=seed) for seed, miou in enumerate(base)]
    pretrained = [finetuned(base[seed] + gains[seed], {}, seed=seed, init="runs/pre") for seed in (2, 0, 1)]
    unpaired = finetuned(0.9, {}, seed=7, init="runs/pre")
    found = group([*pretrained, unpaired, *scratch])
    assert [own.label for own in found.arms] == ["scratch", "pre"], "what is from scratch comes first"
    gain = found.gain(found.arms[1], "val/miou")
    assert sorted(gain.values) == pytest.approx(gains)
    assert gain.differences.sd == pytest.approx(stdev(gains))
    assert found.gain(found.arms[0], "val/miou") is None


def test_runs_of_the_same_seeds_count_once() -> None:
    scratch = [finetuned(0.2, seed=0), finetuned(0.4, seed=0), finetuned(0.5, seed=1)]
    starts = [(0, 0.4), (1, 0.6)]
    pretrained = [finetuned(miou, {"seed": start}, seed=0, init=f"runs/pre_{start}") for start, miou in starts]
    for outcomes in ([*scratch, *pretrained], [*pretrained, *reversed(scratch)]):
        found = group(outcomes)
        assert found.gain(found.arms[1], "val/miou").values == pytest.approx([0.2]), "0.5 less 0.3"


def test_pretrainings_under_every_seed_are_no_more_pretrainings_than_they_are() -> None:
    scratch = [finetuned(0.2, seed=seed) for seed in range(4)]
    for starts, in_words in ((1, "one"), (2, "these 2")):
        pretrained = [
            finetuned(0.21 + 0.01 * seed, {"seed": start}, seed=seed, init=f"runs/pre_{start}")
            for start in range(starts)
            for seed in range(4)
        ]
        found = group([*scratch, *pretrained])
        gain = found.gain(found.arms[1], "val/miou")
        assert (gain.n, gain.differences.num_starts, gain.differences.is_of_few) == (4, starts, True)
        assert f"4 pairs from {'this ' * (starts == 1)}{in_words} pretraining" in certainty(gain)
        (note,) = notes(found)
        assert note.endswith(f"are not independent: {found.arms[1].label} (4 pairs, pretrainings: {starts})")


def test_pretrainings_on_other_images_under_one_path_are_no_group(tmp_path: Path) -> None:
    for number, images in enumerate((266, 300, 266)):
        pretrained = written(
            tmp_path / f"pre_{number}", {**PRETRAINING, "seed": number}, {"steps": 1}, stage="pretrain"
        )
        pool = {"images": images, "sha256_of_names": f"{images:064d}"}
        (pretrained / "data.json").write_text(json.dumps({"pool": pool}))
        record = {"stage": "finetune", "config": {**CONFIG, "init": str(pretrained)}}
        record["origin"] = run_folder.origin(record["config"]["init"])
        (tmp_path / f"run_{number}").mkdir()
        (tmp_path / f"run_{number}" / "run.json").write_text(json.dumps({**record, "status": "finished"}))
        (tmp_path / f"run_{number}" / "result.json").write_text(json.dumps({"val": {"miou": 0.2}}))
    found = compare.compare([tmp_path / f"run_{number}" for number in range(3)])
    assert [len(own.outcomes) for own in found.arms] == [2, 1]


def test_a_pretraining_is_one_however_it_is_named() -> None:
    named = ("runs/pre", "runs/pre/encoder", str(Path("runs/pre").resolve()), "runs/../runs/pre")
    pretrained = [finetuned(0.3, {}, seed=seed, init=init) for seed, init in enumerate(named)]
    found = group([*(finetuned(0.2, seed=seed) for seed in range(4)), *pretrained])
    assert found.gain(found.arms[1], "val/miou").differences.num_starts == 1
    assert [own.label for own in found.arms] == ["scratch", "pre"]


@pytest.mark.parametrize("pretrained", ["a1_in1k", "weights.safetensors", True])
def test_weights_by_tag_or_file_are_no_scratch(pretrained: object) -> None:
    found = group([finetuned(0.3, model__encoder__pretrained=pretrained)])
    assert not found.arms[0].from_scratch


def test_a_start_called_scratch_is_no_baseline() -> None:
    found = group([finetuned(0.1), finetuned(0.3, {}, init="runs/scratch")])
    assert [own.from_scratch for own in found.arms] == [True, False]


def test_the_main_score_is_that_which_most_runs_have() -> None:
    tested = compare.outcome("scores", "evaluate", {"model": "runs/a"}, {"test/miou": 0.9})
    assert group([finetuned(0.1), finetuned(0.2, seed=1), tested]).main_score == "val/miou"


def test_a_run_that_goes_on_has_no_result_yet(tmp_path: Path) -> None:
    written(tmp_path / "a", CONFIG, {"val": {"miou": 0.4}})
    written(tmp_path / "b", laid(CONFIG, {"train.steps": 9}), {"val": {"miou": 0.4}}, status="killed")
    found = compare.compare([tmp_path])
    assert found.unfinished == (str(tmp_path / "b"),)


def test_the_baseline_has_the_same_labels_and_steps() -> None:
    outcomes = [finetuned(0.1 * count / 10, labels__count=count) for count in (10, 30)]
    outcomes += [finetuned(0.5, {}, labels__count=count, init="runs/pre") for count in (10, 30, 50)]
    found = group(outcomes)
    gains = {own.settings["labels.count"]: found.gain(own, "val/miou") for own in found.arms[2:]}
    assert gains["10"].values == pytest.approx([0.4])
    assert gains["30"].values == pytest.approx([0.2])
    assert gains["50"] is None


def test_an_arm_without_a_gain_says_why() -> None:
    scratch = [finetuned(0.1), finetuned(0.1, train__steps=7, model__decoder__type="fpn")]
    found = group([*scratch, finetuned(0.3, {}, init="runs/pre", train__steps=800)])
    (line,) = found.apart
    told = "the runs from scratch differ in train.steps; make some with its settings, all but init"
    assert line == f"no gain of {found.arms[2].label}: {told}"
    assert not group([finetuned(0.1), finetuned(0.3, {}, init="runs/pre")]).apart
    assert not group([finetuned(0.3, {}, init="runs/pre")]).apart


def test_weights_of_timm_are_no_scratch() -> None:
    found = group([finetuned(0.3, model__encoder__pretrained=True), finetuned(0.1)])
    assert found.arms[0].label.startswith("scratch")
    assert found.arms[1].label.startswith("weights of timm")
    assert found.gain(found.arms[1], "val/miou").values == pytest.approx([0.2])


def test_a_whole_task_more_is_one_line() -> None:
    more = {"tasks.jigsaw": {"weight": 0.1, "grid": 3, "gap": 2}}
    found = group([finetuned(0.1, {}, init="runs/one"), finetuned(0.2, more, init="runs/two"), finetuned(0.0)])
    assert found.differing == {"init": (None, "one", "two"), "init.tasks.jigsaw": (None, None, "given")}


def test_another_weight_of_a_task_is_shown_with_both_values() -> None:
    lighter = {"tasks.denoise.weight": 1.0}
    found = group([finetuned(0.1, {}, init="runs/a"), finetuned(0.2, lighter, init="runs/b")])
    assert found.differing["init.tasks.denoise.weight"] == ("3.0", "1.0")


def test_groups_with_one_name_are_numbered() -> None:
    lighter = {"tasks.denoise.weight": 1.0}
    found = group([finetuned(0.1, {}, init="x/pre"), finetuned(0.2, lighter, init="y/pre")])
    assert [own.label for own in found.arms] == ["pre #1", "pre #2"]


def test_a_start_without_a_record_is_told_by_its_path() -> None:
    found = group([finetuned(0.1, init="a.safetensors"), finetuned(0.2, init="b.safetensors")])
    assert found.differing["init"] == ("a.safetensors", "b.safetensors")
    assert len(found.arms) == 2


def test_a_folder_of_runs_stands_for_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        written(tmp_path / f"s{seed}", laid(CONFIG, {"seed": seed}), {"val": {"miou": 0.1 + seed, "iou/x": None}})
    written(tmp_path / "going", CONFIG, None, status="killed")
    (tmp_path / "mlflow.db").write_bytes(b"")
    found = compare.compare([tmp_path, tmp_path / "s0"])
    assert len(found.arms[0].outcomes) == 2, "a run that is named twice counts once"
    assert found.unfinished == (str(tmp_path / "going"),)
    assert found.scores == ("val/miou",)
    assert found.arms[0].spread("val/iou/x") is None


def test_a_start_is_the_same_by_its_folder_and_by_its_encoder(tmp_path: Path) -> None:
    written(tmp_path / "pre", PRETRAINING, {}, stage="pretrain")
    (tmp_path / "pre" / "encoder").mkdir()
    for init in (tmp_path / "pre", tmp_path / "pre" / "encoder"):
        config = laid(CONFIG, {"init": str(init)})
        start = run_folder.origin(str(init))
        folder = written(tmp_path / init.name / "fine", config, {"val": {"miou": 0.1}}, origin=start)
        (own,) = compare.compare([folder]).arms
        assert own.outcomes[0].start == "pre"
        assert own.settings["init.tasks.denoise.weight"] == "3.0"


def test_a_start_has_its_own_start(tmp_path: Path) -> None:
    first = written(tmp_path / "first", PRETRAINING, {}, stage="pretrain")
    between = laid(PRETRAINING, {"init": str(first), "train.steps": 9})
    second = written(tmp_path / "second", between, {}, stage="pretrain", origin=run_folder.origin(str(first)))
    description = described(laid(CONFIG, {"init": str(second)}), run_folder.origin(str(second)))
    assert description["init.train.steps"] == "9"
    assert description["init.init.train.steps"] == "1500"


@pytest.mark.parametrize("kind", ["nothing", "stranger", "unfinished"])
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "a"
    if kind == "stranger":
        folder.mkdir()
        (folder / "run.json").write_text("{}")
    if kind == "unfinished":
        written(folder, CONFIG, None)
    expected = {"nothing": "is no run folder", "stranger": "not one of ours", "unfinished": "has no result yet"}
    assert expected[kind] in message_of(lambda: compare.compare([folder]))


# ---- what may be ranked, and over which images ----


def of_images(folder: Path, answers: int, seed: int = 0, init: str | None = None, **scored_as: Any) -> Path:
    """A finished fine-tuning with its images' matrices, from scratch or not."""
    origin = None if init is None else {"stage": "pretrain", "config": PRETRAINING, "origin": None}
    config = laid(CONFIG, {"seed": seed, "init": init})
    run = write_scored(folder, {"val": scored(answers, **scored_as)}, config=config, origin=origin)
    (run / "split.json").write_text(json.dumps({"labelled": ["a", "b"], "sha256_of_labelled": "0" * 64}))
    return run


def change_result(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    change(run / "result.json", edit)


def names_of(table: Sequence[Arm]) -> list[str]:
    return [Path(outcome.name).name for own in table for outcome in own.outcomes]


def test_scores_of_other_images_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    of_images(tmp_path / "scratch", 0)
    of_images(tmp_path / "pre", 1, init="runs/pre")
    of_images(tmp_path / "pre_on_others", 2, init="runs/pre", images="b")
    found = compare.compare([tmp_path])
    assert [names_of(table) for table in found.tables] == [["scratch", "pre"], ["pre_on_others"]]
    gains = [found.gain(own, "val/miou") is not None for table in found.tables for own in table]
    assert gains == [False, True, False], "the settings and seeds are the same, the images on disk are not"
    (line,) = found.apart
    assert line.endswith("it differs in val: split")


def test_a_report_calls_none_of_them_the_highest(tmp_path: Path) -> None:
    one = of_images(tmp_path / "one", 0, init="runs/pre")
    other = of_images(tmp_path / "other", 1, init="runs/pre", images="b")
    alike = of_images(tmp_path / "alike", 1, init="runs/pre")
    change(alike / "run.json", lambda record: record["config"]["train"].update(steps=9))
    assert "so none is the highest" in runs.report([one, other]).headline
    assert "it differs in val: split." in (tmp_path / "report.html").read_text()
    assert "The highest mean mIoU" in runs.report([one, alike]).headline


def test_a_run_without_a_passport_is_ranked_among_its_like_alone(tmp_path: Path) -> None:
    for name, init in (("scratch", None), ("pre", "runs/pre")):
        of_images(tmp_path / f"new_{name}", 0, init=init)
        change_result(of_images(tmp_path / f"old_{name}", 0, init=init), lambda result: result.pop("passport"))
    found = compare.compare([tmp_path])
    assert [names_of(table) for table in found.tables] == [["new_scratch", "new_pre"], ["old_scratch", "old_pre"]]
    assert [found.gain(own, "val/miou") is None for table in found.tables for own in table] == [True, False] * 2
    assert "differs in val: passport" in found.apart[0]
    assert found.apart[1].startswith("no passport, so nothing says")
    alone = compare.compare([tmp_path / "old_scratch", tmp_path / "old_pre"])
    assert len(alone.tables) == len(alone.apart) == 1


def test_the_size_of_the_input_and_the_software_do_not_keep_scores_apart(tmp_path: Path) -> None:
    of_images(tmp_path / "one", 0)
    other = {"resize": [24, 32], "software": "9.9"}
    change_result(of_images(tmp_path / "two", 1, seed=1), lambda result: result["passport"]["val"].update(other))
    found = compare.compare([tmp_path])
    assert [len(own.outcomes) for own in found.arms] == [2]
    assert found.apart == ()


@pytest.mark.parametrize("split", [{"labelled": ["a", "c"]}, {"labelled": ["a", "b"], "sha256_of_labelled": "1"}, {}])
def test_other_labelled_images_are_no_pair(split: dict[str, Any], tmp_path: Path) -> None:
    of_images(tmp_path / "scratch", 0)
    run = of_images(tmp_path / "pre", 1, init="runs/pre")
    found = compare.compare([tmp_path])
    assert found.gain(found.arms[1], "val/miou").n == 1
    (run / "split.json").write_text(json.dumps(split))
    found = compare.compare([tmp_path])
    assert found.baselines[found.arms[1]] is found.arms[0]
    assert found.gain(found.arms[1], "val/miou") is None
    assert found.pairs(found.arms[1]).sides("val/miou") == {}


def test_differences_over_images_are_the_block_bootstrap_s(tmp_path: Path) -> None:
    for seed in (0, 1):
        of_images(tmp_path / f"scratch_{seed}", seed, seed=seed, count=100)
        of_images(tmp_path / f"pre_{seed}", 10 + seed, seed=seed, init="runs/pre", count=100)
    of_images(tmp_path / "pre_9", 30, seed=9, init="runs/pre", count=100)  # without a pair
    found = compare.compare([tmp_path])
    scratch, group = found.arms
    base, own = ([scored(seed, 100) for seed in seeds] for seeds in ((0, 1), (10, 11)))
    expected = block_bootstrap(base, own, resamples=compare.RESAMPLES)
    assert found.over_images(group, "val/miou") == expected
    near = ([images.at_boundaries() for images in side] for side in (base, own))
    assert found.over_images(group, "val/band/miou") == block_bootstrap(*near, resamples=compare.RESAMPLES)
    assert found.over_images(group, "val/band/miou") != expected
    assert found.over_images(scratch, "val/miou") is None
    assert found.over_images(group, "test/miou") is None
    (tmp_path / "pre_1" / IMAGES_FILE).unlink()
    left = compare.compare([tmp_path])
    group = left.arms[1]
    assert left.gain(group, "val/miou").n == 2
    assert left.over_images(group, "val/miou") is None, "one pair would be another quantity than the gain of two"
    changed = left.changed(group, "val/miou")
    assert changed[0].difference in (own[0].per_image_miou() - base[0].per_image_miou()), "the pair that was kept"


def test_the_interval_is_that_of_the_gain_beside_it(tmp_path: Path) -> None:
    for number in range(3):
        of_images(tmp_path / f"scratch_0_{number}", number, count=60)
        of_images(tmp_path / f"pre_{number}", 10 + number, init=f"runs/p{number}", count=60)
    of_images(tmp_path / "scratch_1", 5, seed=1, count=60)
    of_images(tmp_path / "pre_9", 19, seed=1, init="runs/p0", count=60)
    found = compare.compare([tmp_path])
    _, group = found.arms
    gain, interval = found.gain(group, "val/miou"), found.over_images(group, "val/miou")
    assert gain.n == 2
    sides = [
        [*(scored(first + number, 60) for number in range(3)), scored(last, 60)] for first, last in ((0, 5), (10, 19))
    ]
    once = [1, 1, 1, 3]
    assert interval == block_bootstrap(*sides, resamples=compare.RESAMPLES, weights=(once, once))
    assert interval != block_bootstrap(*sides, resamples=compare.RESAMPLES)
    base, own = ([images.per_image_miou() for images in side] for side in sides)
    expected = np.average(own, axis=0, weights=once) - np.average(base, axis=0, weights=once)
    changed = found.changed(group, "val/miou")
    assert [image.difference for image in changed] == pytest.approx([expected[image.index] for image in changed])


def test_the_images_that_changed_most_come_first(tmp_path: Path) -> None:
    of_images(tmp_path / "scratch", 0)
    of_images(tmp_path / "pre", 1, init="runs/pre")
    found = compare.compare([tmp_path])
    changed = found.changed(found.arms[1], "val/miou")
    differences = scored(1).per_image_miou() - scored(0).per_image_miou()
    assert [image.index for image in changed] == np.argsort(-np.abs(differences)).tolist()
    assert [image.difference for image in changed] == pytest.approx([differences[image.index] for image in changed])
    assert changed[0].name == f"a_{changed[0].index}"
    assert found.changed(found.arms[0], "val/miou") == ()


def test_runs_that_were_not_made_with_the_same_as_their_baseline_are_told(tmp_path: Path) -> None:
    for name, init, device in (("scratch", None, "1 x cpu"), ("pre", "runs/pre", "1 x cuda")):
        run = of_images(tmp_path / name, 0, init=init)
        change(run / "run.json", lambda record, device=device: record.update(device=device))
    assert notes(compare.compare([tmp_path])) == (
        "not made with the same as what is from scratch (device 1 x cpu, 1 x cuda): pre",
    )


def ssl_seg(*words: object) -> int:
    return cli.run(lambda: cli.app(args=[str(word) for word in words], standalone_mode=False))


def test_the_command_verifies_and_keeps_tables_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_images(tmp_path / "scratch", 0, count=100)
    of_images(tmp_path / "pre", 1, init="runs/pre", count=100)
    of_images(tmp_path / "other", 2, init="runs/pre", images="b")
    assert ssl_seg("compare", tmp_path, "--verify") == 0
    said = capsys.readouterr().out
    assert said.count("figures follow from the confusion matrices") == 3
    for words in (
        "95 % over images",
        "gain in val/band/miou",
        "gain in val/iou/sky",
        "not ranked with the first table",
    ):
        assert words in said
    change_result(tmp_path / "pre", lambda result: result["val"].update(miou=0.9))
    assert ssl_seg("compare", tmp_path, "--verify") == 2
    said = capsys.readouterr()
    assert "gain in" not in said.out
    assert said.err.startswith(f"ssl-seg: {tmp_path / 'pre'}: result.json says val/miou = 0.9")
    assert ssl_seg("compare", "--experiment", "x", "--verify") == 2


class Constant(nn.Module):
    """One class everywhere."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ids = torch.full((len(image), *image.shape[2:]), self.index)  # (B, H, W) -> (B, 2, H, W)
        return nn.functional.one_hot(ids, 2).movedim(-1, 1).float()


def test_the_images_that_changed_most_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    side = 80
    monkeypatch.setattr("ssl_seg.figures.panels.PANEL_SIDE", side)
    data = Textured(count=9)
    models = {tmp_path / name: Constant(index) for index, name in enumerate(("scratch", "pre"))}
    monkeypatch.setattr("ssl_seg.stages.panels.load_model", lambda run: (models[run], (40, 40)))
    for (folder, model), init in zip(models.items(), (None, "runs/pre"), strict=True):
        config = laid(CONFIG, {"data.val": data.dump(), "init": init})
        origin = None if init is None else {"stage": "pretrain", "config": PRETRAINING, "origin": None}
        write_scored(folder, {"val": measure(model, data).confusions}, config=config, origin=origin)
    out = tmp_path / "out"
    assert ssl_seg("compare", *models, "--pictures", out) == 0
    assert "6 images that changed most" in capsys.readouterr().out
    listed = json.loads((out / "changed.json").read_text())["pre"]
    assert [entry["picture"] for entry in listed] == [f"group2_{rank}.png" for rank in range(1, 7)]
    sizes = [abs(entry["difference"]) for entry in listed]
    assert sizes == sorted(sizes, reverse=True)
    sheet = read_image(out / "group2_1.png")
    assert sheet.shape[1] == 5 * side + 4 * GAP
    index = int(listed[0]["image"].rpartition("_")[2])
    truth = resize_mask(data.read(index).label, (side, side))
    panels = [sheet[:side, start : start + side] for start in range(0, sheet.shape[1], side + GAP)]
    for panel, ids in zip(panels[1:4], (truth, np.zeros_like(truth), np.ones_like(truth)), strict=True):
        np.testing.assert_array_equal(panel, palette(2)[ids])
    bluer = panels[4][..., 2].astype(int) - panels[4][..., 0]
    np.testing.assert_array_equal(bluer > 0, truth == 1, "blue where the second is right")
    np.testing.assert_array_equal(bluer < 0, truth == 0, "orange where the first was")
    assert ssl_seg("compare", *models, "--pictures", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert ssl_seg("compare", tmp_path / "scratch", "--pictures", tmp_path / "none") == 2
    assert "no run has a baseline" in capsys.readouterr().err


def test_images_that_are_gone_are_named(tmp_path: Path) -> None:
    run = RunFolder.open(written(tmp_path / "run", {"data": {"val": Textured(count=2).dump()}}, {}))
    said = message_of(lambda: next(changed_pictures(run, run, "val", ["textured_0_7"])))
    assert "has no image textured_0_7 any more" in said
    assert "has no data.test" in message_of(lambda: examples_of(run, "test"))
    labelled = Textured(count=10)
    without = RunFolder.open(written(tmp_path / "held", {"data": {"labelled": labelled.dump(), "val": None}}, {}))
    assert examples_of(without, "val") == hold_out(labelled)[1]


@pytest.mark.slow  # a fresh database takes seconds; a quick one of test_tracking compares passports too
def test_an_experiment_keeps_the_same_scores_apart_and_an_overwritten_run_counts_once(tmp_path: Path) -> None:
    runs_folder = tmp_path / "runs"
    folders = [
        of_images(runs_folder / "scratch", 0),
        of_images(runs_folder / "pre", 1, init="runs/pre"),
        of_images(runs_folder / "pre_on_others", 2, init="runs/pre", images="b"),
    ]
    for folder in folders:
        mirror.track(folder)
    shutil.rmtree(folders[2])
    of_images(folders[2], 5, init="runs/pre", images="b")
    mirror.track(folders[2])
    by_folder = compare.compare([runs_folder])
    by_name = experiments.compare_experiment("ssl_seg", f"sqlite:///{runs_folder / 'mlflow.db'}")
    assert [len(table) for table in by_name.tables] == [len(table) for table in by_folder.tables] == [2, 1]
    assert by_name.apart == by_folder.apart
    for one, other in zip(by_name.arms, by_folder.arms, strict=True):
        assert one.spread("val/miou") == other.spread("val/miou")
        gains = (by_name.gain(one, "val/miou"), by_folder.gain(other, "val/miou"))
        assert len({None if gain is None else gain.differences for gain in gains}) == 1
        assert one.outcomes[0].labelled == other.outcomes[0].labelled != ""
    assert by_name.over_images(by_name.arms[1], "val/miou") is None, "images stay in their folders"


# ---- evaluations, leaks, other held-out images ----


def evaluated(folder: Path, answers: int, seed: int, init: str | None, with_origin: bool = True) -> Path:
    """What `evaluate --out` leaves of a fine-tuned model, scored on images that its own run did not have."""
    start = None if init is None else {"stage": "pretrain", "config": PRETRAINING, "origin": None}
    own = laid(CONFIG, {"seed": seed, "init": init, "data.test": {"type": "camvid", "drives": ["c"]}})
    origin = {"stage": "finetune", "config": own, "origin": start} if with_origin else None
    config = {"model": f"runs/{folder.name}/model", "data": {"test": {"type": "folder"}}, "workers": seed}
    write_scored(folder, {"test": scored(answers)}, stage="evaluate", config=config, origin=origin)
    (folder / "split.json").write_text(json.dumps({"labelled": ["a", "b"]}))
    return folder


def test_evaluations_are_grouped_and_paired_as_the_runs_whose_models_they_score(tmp_path: Path) -> None:
    for seed in (0, 1):
        evaluated(tmp_path / f"scratch_{seed}", seed, seed, None)
        evaluated(tmp_path / f"pre_{seed}", 10 + seed, seed, "runs/pre")
    found = compare.compare([tmp_path])
    assert [(own.label, own.stage, len(own.outcomes)) for own in found.arms] == [
        ("scratch", "evaluate", 2),
        ("pre", "evaluate", 2),
    ]
    gain = found.gain(found.arms[1], "test/miou")
    assert gain.values == pytest.approx(
        [scored(10 + seed).scores().miou - scored(seed).scores().miou for seed in (0, 1)]
    )
    assert found.arms[0].settings["data.test.type"] == "folder"
    assert "data.test.drives" not in found.arms[0].settings, "that of the fine-tuning is not what was scored"
    assert found.differing == {"init": (None, "pre")}


def test_an_evaluation_is_no_baseline_of_a_fine_tuning(tmp_path: Path) -> None:
    evaluated(tmp_path / "scratch", 0, 0, None)
    run = of_images(tmp_path / "pre", 1, init="runs/pre")
    change(
        run / "run.json", lambda record: record["config"]["data"].update(test={"type": "folder"})
    )  # all else is equal
    found = compare.compare([tmp_path])
    assert [own.label.partition(" (")[0] for own in found.arms] == ["scratch evaluated", "pre"]
    assert found.arms[1] not in found.baselines


def test_an_evaluation_of_a_model_without_a_run_is_no_scratch(tmp_path: Path) -> None:
    evaluated(tmp_path / "alone", 0, 0, None, with_origin=False)
    (own,) = compare.compare([tmp_path]).arms
    assert not own.from_scratch
    assert own.settings["model"] == "runs/alone/model"


def test_leaks_that_were_let_pass_or_not_looked_for_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = {"checked": True, "trained": {"pool": 1}, "scored": {"val": 1}, "leaks": []}
    said = {
        "clean": clean,
        "allowed": {**clean, "leaks": [LEAK]},
        "found": {**clean, "leaks": [LEAK, {**LEAK, "allowed": False}]},
        "unchecked": {**clean, "checked": False},
        "unknown": {**clean, "pairs": [{"part": "x", "scored_part": "val", "pictures": "unknown", "names": "unknown"}]},
        "none": {**clean, "scored": {}},
    }
    for number, (word, record) in enumerate(said.items()):
        run = of_images(tmp_path / word, number, seed=number, init="runs/pre" if word == "allowed" else None)
        (run / "leaks.json").write_text(json.dumps(record))
    of_images(tmp_path / "older", 9, seed=9)
    found = compare.compare([tmp_path])
    words = {Path(outcome.name).name: outcome.leaks for own in found.arms for outcome in own.outcomes}
    assert words == {**{word: word for word in said}, "older": "none"}
    assert found.apart == ()
    assert notes(found) == (
        "trained on some of the scored images, which leaks.allow let pass: pre (1 of 1 runs)",
        "trained on some of the scored images: scratch (1 of 6 runs)",
        "not checked for training images among the scored ones (leaks.check=false): scratch (1 of 6 runs)",
        "started from weights whose training images are not known, so these were not checked: scratch (1 of 6 runs)",
    )
    assert ssl_seg("compare", tmp_path) == 0
    assert all(line in capsys.readouterr().out for line in notes(found)[:1])


def test_pretrainings_with_other_held_out_images_are_not_ranked_without_a_word(tmp_path: Path) -> None:
    for name, digest in (("a", "1"), ("b", "2"), ("c", "2")):
        config = laid(PRETRAINING, {"tasks.denoise.weight": name})
        run = written(tmp_path / name, config, {"val": {"denoise/psnr": 20.0}}, stage="pretrain")
        (run / "data.json").write_text(json.dumps({"val": {"images": 3, "sha256_of_names": digest}}))
    (note,) = notes(compare.compare([tmp_path]))
    assert note.startswith("scored on different held-out images (data.val)")
    assert notes(compare.compare([tmp_path / "b", tmp_path / "c"])) == ()


# ---- what a stranger's folder may hold ----


def with_config(**config: Any) -> dict[str, Any]:
    return {"stage": "finetune", "config": config}


def with_record(**record: Any) -> dict[str, Any]:
    return {"stage": "finetune", "config": {}, **record}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("result.json", [1]),
        ("result.json", {"val": {"miou": "0.4"}}),
        ("result.json", {"val": {"miou": True}}),
        ("result.json", {"val": [0.4]}),
        ("result.json", {"val": {"miou": {"road": 1}}}),
        ("result.json", {"val": {"miou": 0.5}, "passport": [1]}),
        ("result.json", {"val": {"miou": 0.5}, "passport": {"val": 3}}),
        ("result.json", {"val": {"miou": 0.5}, "passport": {"val": {"resize": 5}}}),
        ("result.json", {"val": {"miou": 0.5}, "passport": {"val": {"resize": [5]}}}),
        ("run.json", [1]),
        ("run.json", {"stage": "finetune", "config": [1]}),
        ("run.json", {"stage": 3, "config": {}}),
        ("run.json", with_config(init=3)),
        ("run.json", with_config(train=[3])),
        ("run.json", with_config(tasks=3)),
        ("run.json", with_config(data=3)),
        ("run.json", with_record(status=3)),
        ("run.json", with_record(origin="x")),
        ("run.json", with_record(origin={"stage": "x", "config": 3})),
        ("run.json", with_record(origin={"stage": "x", "config": {"data": 3}})),
        ("run.json", with_record(started="yesterday")),
        ("run.json", with_record(started="2026-01-01T00:00:00")),
        ("run.json", with_record(cost={"seconds": math.nan})),
        ("run.json", with_record(versions=3)),
        ("run.json", with_record(resumed=3)),
        ("split.json", {"labelled": [3]}),
        ("split.json", {"labelled": 3}),
        ("data.json", {"val": 3}),
        ("data.json", {"val": {"images": "3"}}),
        ("confusion.json", {"classes": 3}),
        ("confusion.json", {"classes": ["a"], "val": 3}),
        ("confusion.json", {"classes": ["a"], "val": [[1, 2]]}),
        ("confusion.json", {"classes": ["a"], "val": [[-1]]}),
        ("confusion.json", {"classes": ["a"], "val": [[0.5]]}),
        ("confusion.json", {"val": [[1]]}),
        ("extremes.json", {"val": 3}),
        ("extremes.json", {"val": [3]}),
        ("extremes.json", {"val": [{"kind": "best", "name": "a", "picture": "b", "miou": "0.3"}]}),
        ("kinds.json", {"uncovered": 3, "places": {}}),
        ("kinds.json", {"uncovered": {"val": {"names": ["a"]}}, "places": {}}),
        ("kinds.json", {"uncovered": {}, "places": {"val": {"x": [1.0], "y": []}}}),
        ("receipts.json", {"encoder": 3}),
        ("receipts.json", {"encoder": {"share": "all"}}),
        ("receipts.json", {"encoder": {"matched": 3}}),
    ],
)
def test_a_file_of_a_stranger_that_makes_no_sense_is_one_line(name: str, values: Any, tmp_path: Path) -> None:
    run = written(tmp_path / "run", CONFIG, {"val": {"miou": 0.5, "iou/a": 0.5}})
    runs.report([run])
    (run / name).write_text(json.dumps(values))
    assert str(run) in message_of(lambda: runs.report([run]))
    if name in ("run.json", "result.json", "split.json"):
        assert str(run) in message_of(lambda: compare.compare([run]))


def test_a_start_that_does_not_name_its_own_is_read(tmp_path: Path) -> None:
    run = written(
        tmp_path / "run",
        laid(CONFIG, {"init": "x"}),
        {"val": {"miou": 0.5}},
        origin={"stage": "pretrain", "config": {}},
    )
    assert compare.compare([run]).arms[0].settings["init.stage"] == "pretrain"


def test_json_nested_without_end_and_metrics_that_are_no_numbers_are_one_line(tmp_path: Path) -> None:
    run = written(tmp_path / "run", CONFIG, {"val": {"miou": 0.5}})
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": "low"}\n')
    assert "line 1 is no metrics record" in message_of(lambda: runs.report([run]))
    (run / "result.json").write_text("[" * 100_000)
    assert "result.json: not readable as JSON" in message_of(lambda: compare.compare([run]))


def test_a_score_that_is_no_finite_number_is_none() -> None:
    result = {"val": {"miou": 0.5, "iou/a": math.nan, "iou/b": math.inf, "iou/c": None, "iou/d": 10**400}}
    assert scores_of(result) == {"val/miou": 0.5}

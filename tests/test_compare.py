"""Groups of runs: what makes two runs one group, which are paired, and which keys are shown."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_seg import compare, runs
from ssl_seg.compare import Outcome, Spread, group
from tests.faults import message_of

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
    description = runs.described(laid(CONFIG, dotted), start)
    return compare.outcome("run", "finetune", description, {"val/miou": miou, "val/iou/road": miou / 2})


def written(folder: Path, config: dict[str, Any], result: dict[str, Any] | None, **more: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"stage": "finetune", "status": "finished", "config": config, **more}
    (folder / "run.json").write_text(json.dumps(record))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_spread_is_that_of_the_standard_library(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert spread.mean == mean(values)
    assert spread.n == len(values)
    assert spread.sd == (stdev(values) if len(values) > 1 else None)


def test_spread_in_words() -> None:
    assert Spread((0.25,)).text() == "0.2500"
    assert Spread((0.2, 0.4)).text(2) == "0.30 ± 0.14"
    assert Spread((0.2, 0.4)).text(1, "+") == "+0.3 ± 0.1"


def test_runs_that_differ_in_seeds_alone_are_one_group() -> None:
    outcomes = [finetuned(0.1 * seed, seed=seed, labels__seed=seed) for seed in range(3)]
    outcomes += [
        finetuned(0.5, {"seed": start}, seed=seed, init=f"runs/pre_{start}") for start in (0, 1) for seed in (0, 1)
    ]
    found = group(outcomes)
    assert [(own.label, len(own.outcomes)) for own in found.groups] == [("scratch", 3), ("pre", 4)]
    assert found.differing == {"init": (None, "pre_0, pre_1")}


def test_tracking_does_not_tell_runs_apart() -> None:
    assert len(group([finetuned(0.1), finetuned(0.2, seed=1, tracking={"type": "mlflow", "uri": "x"})]).groups) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("train__steps", 800), ("labels__count", 30), ("data__labelled__drives", ["a"]), ("transfer", "encoder+denoise")],
)
def test_any_other_key_makes_another_group(key: str, value: Any) -> None:
    found = group([finetuned(0.1), finetuned(0.2, **{key: value})])
    assert len(found.groups) == 2
    assert list(found.differing) == [key.replace("__", ".")]


def test_gains_are_paired_by_seed() -> None:
    base, gains = [0.2, 0.4, 0.3], [0.01, 0.02, 0.06]
    scratch = [finetuned(miou, seed=seed) for seed, miou in enumerate(base)]
    pretrained = [finetuned(base[seed] + gains[seed], {}, seed=seed, init="runs/pre") for seed in (2, 0, 1)]
    unpaired = finetuned(0.9, {}, seed=7, init="runs/pre")
    found = group([*pretrained, unpaired, *scratch])
    assert [own.label for own in found.groups] == ["scratch", "pre"], "what is from scratch comes first"
    gain = found.gain(found.groups[1], "val/miou")
    assert sorted(gain.values) == pytest.approx(gains)
    assert gain.sd == pytest.approx(stdev(gains))
    assert found.gain(found.groups[0], "val/miou") is None


def test_runs_of_the_same_seeds_count_once() -> None:
    scratch = [finetuned(0.2, seed=0), finetuned(0.4, seed=0), finetuned(0.5, seed=1)]
    starts = [(0, 0.4), (1, 0.6)]
    pretrained = [finetuned(miou, {"seed": start}, seed=0, init=f"runs/pre_{start}") for start, miou in starts]
    for outcomes in ([*scratch, *pretrained], [*pretrained, *reversed(scratch)]):
        found = group(outcomes)
        assert found.gain(found.groups[1], "val/miou").values == pytest.approx([0.2]), "0.5 less 0.3"


@pytest.mark.parametrize("pretrained", ["a1_in1k", "weights.safetensors", True])
def test_weights_by_tag_or_file_are_no_scratch(pretrained: object) -> None:
    found = group([finetuned(0.3, model__encoder__pretrained=pretrained)])
    assert not found.groups[0].from_scratch


def test_a_start_called_scratch_is_no_baseline() -> None:
    found = group([finetuned(0.1), finetuned(0.3, {}, init="runs/scratch")])
    assert [own.from_scratch for own in found.groups] == [True, False]


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
    gains = {own.settings["labels.count"]: found.gain(own, "val/miou") for own in found.groups[2:]}
    assert gains["10"].values == pytest.approx([0.4])
    assert gains["30"].values == pytest.approx([0.2])
    assert gains["50"] is None


def test_weights_of_timm_are_no_scratch() -> None:
    found = group([finetuned(0.3, model__encoder__pretrained=True), finetuned(0.1)])
    assert found.groups[0].label.startswith("scratch")
    assert found.groups[1].label.startswith("weights of timm")
    assert found.gain(found.groups[1], "val/miou").values == pytest.approx([0.2])


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
    assert [own.label for own in found.groups] == ["pre #1", "pre #2"]


def test_a_start_without_a_record_is_told_by_its_path() -> None:
    found = group([finetuned(0.1, init="a.safetensors"), finetuned(0.2, init="b.safetensors")])
    assert found.differing["init"] == ("a.safetensors", "b.safetensors")
    assert len(found.groups) == 2


def test_a_folder_of_runs_stands_for_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        written(tmp_path / f"s{seed}", laid(CONFIG, {"seed": seed}), {"val": {"miou": 0.1 + seed, "iou/x": None}})
    written(tmp_path / "going", CONFIG, None, status="killed")
    (tmp_path / "mlflow.db").write_bytes(b"")
    found = compare.compare([tmp_path, tmp_path / "s0"])
    assert len(found.groups[0].outcomes) == 2, "a run that is named twice counts once"
    assert found.unfinished == (str(tmp_path / "going"),)
    assert found.scores == ("val/miou",)
    assert found.groups[0].spread("val/iou/x") is None


def test_the_start_of_an_older_run_is_looked_up(tmp_path: Path) -> None:
    written(tmp_path / "pre", PRETRAINING, {}, stage="pretrain")
    (tmp_path / "pre" / "encoder").mkdir()
    for init in (tmp_path / "pre", tmp_path / "pre" / "encoder"):
        folder = written(tmp_path / init.name / "fine", laid(CONFIG, {"init": str(init)}), {"val": {"miou": 0.1}})
        (own,) = compare.compare([folder]).groups
        assert own.outcomes[0].start == "pre"
        assert own.settings["init.tasks.denoise.weight"] == "3.0"


def test_a_start_has_its_own_start(tmp_path: Path) -> None:
    first = written(tmp_path / "first", PRETRAINING, {}, stage="pretrain")
    between = laid(PRETRAINING, {"init": str(first), "train.steps": 9})
    second = written(tmp_path / "second", between, {}, stage="pretrain", origin=runs.origin(str(first)))
    description = runs.described(laid(CONFIG, {"init": str(second)}), runs.origin(str(second)))
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

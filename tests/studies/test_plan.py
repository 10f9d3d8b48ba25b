"""What a study is going to do: arms, conditions, pairs, ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssl_seg.config import load
from ssl_seg.studies.config import StudyConfig, arms_of
from ssl_seg.studies.plan import Cell, check_images_of, choice_key, choose, make_plan
from tests.faults import message_of
from tests.small import finetuning, pretraining

OUT = Path("runs/study")


def values(**keys: Any) -> dict[str, Any]:
    return {
        "finetune": finetuning(),
        "pretrain": {"two": pretraining()},
        "arms": {"scratch": {}, "encoder": {"init": "two"}},
        "grid": {"labels.count": [1, 2]},
        "seeds": 3,
        **keys,
    }


def plan_of(**keys: Any) -> list[Cell]:
    return list(make_plan(load(StudyConfig, values(**keys)), OUT).cells)


def names_of(**keys: Any) -> list[str]:
    return [arm.name for arm in arms_of(load(StudyConfig, values(arms={}, **keys)))]


def test_every_arm_sees_every_condition_with_the_same_seeds_and_labels() -> None:
    cells = plan_of()
    seen = {(cell.arm, cell.config.labels.count, cell.config.seed, cell.config.labels.seed) for cell in cells}
    assert seen == {(arm, count, seed, seed) for arm in ("scratch", "encoder") for count in (1, 2) for seed in range(3)}
    assert len(cells) == len({cell.id for cell in cells}) == 12


def test_seeds_share_the_pretrainings_in_turn() -> None:
    plan = make_plan(load(StudyConfig, values(pretrainings=2)), OUT)
    assert [cell.config.seed for cell in plan.pretrainings] == [0, 1]
    started = [cell for cell in plan.cells if cell.arm == "encoder" and cell.config.labels.count == 1]
    ids = [cell.id for cell in plan.pretrainings]
    assert [cell.start for cell in started] == [ids[0], ids[1], ids[0]]
    assert started[1].config.init == str(OUT / "pretrained" / ids[1])


def test_a_pretraining_that_no_arm_needs_is_not_made() -> None:
    config = load(StudyConfig, values(arms={"scratch": {}, "wide": {"train.lr": 0.1}}))
    assert not make_plan(config, OUT).pretrainings


def drawn(**keys: Any) -> dict[str, Any]:
    """The keys of a pretraining by other images' masks."""
    own = finetuning()
    return {**own, "data": {"labelled": {**own["data"]["labelled"], "seed": 11}}, **keys}


def test_a_start_with_labelled_images_learns_their_masks() -> None:
    arms = {
        "scratch": {},
        "encoder": {"init": "drawn"},
        "decoder": {"init": "drawn", "transfer": "encoder+segment"},
        "whole": {"init": "drawn", "transfer": "model"},
    }
    asked = values(pretrain={"drawn": drawn()}, arms=arms, grid={}, pretrainings=3)
    plan = make_plan(load(StudyConfig, asked), OUT)
    made = [(cell.stage, cell.place, cell.config.seed, cell.config.labels.seed) for cell in plan.pretrainings]
    assert made == [("finetune", "pretrained", seed, seed) for seed in range(3)]
    assert {cell.start for cell in plan.cells if cell.arm != "scratch"} == {cell.id for cell in plan.pretrainings}
    assert plan.baseline == "scratch"
    other = values(pretrain={"drawn": drawn(segment={"dice": 0.5})}, arms=arms, grid={})
    assert make_plan(load(StudyConfig, other), OUT).pretrainings[0].id != plan.pretrainings[0].id


def test_an_id_is_that_of_the_config_and_the_weights_and_of_nothing_else() -> None:
    few = {"grid": {"labels.count": [1]}, "seeds": 1}
    ids = {cell.id for cell in plan_of(**few)}
    assert ids < {cell.id for cell in plan_of(**{**few, "seeds": 2})}  # a study that grows keeps its cells
    elsewhere = make_plan(load(StudyConfig, values(**few)), Path("moved/study"))
    assert {cell.id for cell in elsewhere.cells} == ids
    tracked = {**finetuning(), "tracking": {"type": "mlflow", "experiment": "other"}}
    assert {cell.id for cell in plan_of(finetune=tracked, **few)} == ids
    assert not {cell.id for cell in plan_of(finetune=finetuning(steps=7), **few)} & ids
    longer = [cell for cell in plan_of(pretrain={"two": pretraining(steps=7)}, **few) if cell.id not in ids]
    assert {cell.arm for cell in longer} == {"encoder"}


def test_dotted_and_nested_keys_are_the_same() -> None:
    nested = {"grid": {"labels": {"count": [1, 2]}}, "arms": {"scratch": {}, "wide": {"train": {"lr": 0.1}}}}
    dotted = {"grid": {"labels.count": [1, 2]}, "arms": {"scratch": {}, "wide": {"train.lr": 0.1}}}
    cells = plan_of(seeds=1, **nested)
    assert {cell.id for cell in cells} == {cell.id for cell in plan_of(seeds=1, **dotted)}
    wide = [cell for cell in cells if cell.arm == "wide"]
    assert {cell.config.train.lr for cell in wide} == {0.1}


def test_seed_may_be_an_axis_of_the_grid() -> None:
    config = values(grid={"labels.count": [1], "seed": [4, 7]})
    del config["seeds"]
    assert load(StudyConfig, config).seeds == (4, 7)
    assert list(load(StudyConfig, config).grid) == ["labels.count"]


def test_a_recipe_lies_below_the_keys_beside_it() -> None:
    data = {"labelled": {"root": "camvid"}, "val": {"root": "camvid"}}
    cells = plan_of(finetune={"recipe": "camvid_labelled", "data": data, "train": {"batch_size": 4}}, arms=WIDE)
    assert cells[0].config.train.batch_size == 4
    assert cells[0].config.train.steps == 400
    assert str(cells[0].config.data.val.root) == "camvid"


EMPTY = {"type": "textured", "count": 0}
SQUARES = {"type": "synthetic", "kind": "squares", "count": 10}
LR = {"grid": {"train.lr": [0.001, 0.01]}}
WIDE = {"scratch": {}, "wide": {"train.lr": 0.1}}


def test_all_arms_have_one_model_though_the_study_names_none() -> None:
    bare = {key: value for key, value in finetuning().items() if key != "model"}
    cells = plan_of(finetune=bare)
    assert {cell.arm for cell in cells} == {"scratch", "encoder"}
    assert {cell.config.model.encoder.name for cell in cells} == {"mobilenetv2_035"}


def test_axes_of_the_start_make_arms() -> None:
    grid = {"init": [None, "two", "imagenet"], "transfer": ["encoder", "encoder+denoise"], "labels.count": [1]}
    assert names_of(grid=grid) == ["scratch", "two", "two + denoise decoder", "imagenet"]
    known = {"encoder": {"type": "timm", "name": "resnet18"}}  # timm has weights for it
    both = {"finetune": {**finetuning(), "model": known}, "pretrain": {"two": {**pretraining(), "model": known}}}
    plan = make_plan(load(StudyConfig, values(arms={}, grid=grid, **both)), OUT)
    assert plan.baseline == "scratch"
    assert list(plan.axes) == ["labels.count"]
    by_arm = {cell.arm: cell.config for cell in plan.cells}
    assert by_arm["imagenet"].init is None
    assert by_arm["imagenet"].model.encoder.pretrained is True
    assert by_arm["two + denoise decoder"].transfer == "encoder+denoise"


def test_a_pretraining_that_goes_on_from_imagenet_leaves_scratch_from_scratch() -> None:
    further = {**pretraining(), "model": {"encoder": {"type": "timm", "name": "resnet18", "pretrained": True}}}
    bare = {key: value for key, value in finetuning().items() if key != "model"}
    arms = {"scratch": {}, "imagenet": {"init": "imagenet"}, "further": {"init": "two"}}
    plan = make_plan(load(StudyConfig, values(arms=arms, finetune=bare, pretrain={"two": further})), OUT)
    told = {cell.arm: (cell.from_scratch, cell.config.model.encoder.pretrained) for cell in plan.cells}
    assert told == {"scratch": (True, False), "imagenet": (False, True), "further": (False, False)}
    assert all(cell.config.model.encoder.pretrained for cell in plan.pretrainings)


def test_any_other_axis_can_be_compared() -> None:
    grid = {"model.norm": ["group", "switch"], "labels.count": [1]}
    assert names_of(grid=grid, compare=["model.norm"]) == ["model.norm=group", "model.norm=switch"]


def test_the_baseline_is_from_scratch_unless_named() -> None:
    arms = {"encoder": {"init": "two"}, "fresh": {}}
    for named, expected in ((None, "fresh"), ("encoder", "encoder")):
        config = load(StudyConfig, values(arms=arms, baseline=named, grid={}, seeds=1))
        assert make_plan(config, OUT).baseline == expected


def test_from_scratch_is_what_starts_from_nothing_whatever_its_arm_says() -> None:
    known = {**finetuning(), "model": {"encoder": {"type": "timm", "name": "resnet18", "pretrained": True}}}
    arms = {"a": {}, "b": {"model.encoder.pretrained": False}}
    plan = make_plan(load(StudyConfig, values(arms=arms, finetune=known, grid={}, seeds=1)), OUT)
    assert plan.baseline == "b"
    assert [plan.from_scratch(arm) for arm in ("a", "b")] == [False, True]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"baseline": "none"}, "baseline: there is no arm 'none'; name one of: scratch, encoder"),
        ({"arms": {"scratch": {}, "b": {"train.lrr": 1}}}, "arm b: train: unknown key 'lrr'; did you mean 'lr'?"),
        ({"grid": {"labels.count": []}}, "grid: grid.labels.count: name one value or more, each once"),
        ({"grid": {"labels.count": [1, 1]}}, "grid: grid.labels.count: name one value or more, each once"),
        ({"arms": {}}, "arms: nothing to compare; name two arms or more, or give grid.init several values"),
        ({"arms": {"../up": {}, "b": {}}}, "arms: '../up' cannot name a folder; use letters, digits and _ + - ."),
        ({"grid": {"init": [None, "two"]}}, "config: arms, and the axis init of the grid, both say what is compared"),
        ({"compare": ["model.norm"]}, "config: compare: model.norm is no axis of the grid; name one of: labels.count"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]: name one seed or more, each once"),
        ({"seeds": 0}, "seeds: []: name one seed or more, each once"),
        ({"finetune": {**finetuning(), "recipe": "no"}}, "no: no such file or recipe"),
        ({"search": {"grid": {"train.lr": []}}}, "search.grid: search.grid.train.lr: name one value or more"),
        ({"search": {"grid": {"train.lr": [1]}, "at": {"x": 1}}}, "config: search.at: x is no axis of the grid"),
        ({"arms": {"scratch": {}, "b": {"init": "gone"}}}, "gone: does not exist; name a run folder or a file"),
        ({"pretrain": {"init": pretraining()}}, "pretrain: 'init' is the key that names a start; choose another name"),
        ({"arms": {"scratch": {}, "b": {"init": ["two"]}}}, "arm b: init is a name, a path, imagenet or null"),
        ({"arms": {"scratch": {}, "b": {"labels.count": 3}}}, "arms.b.labels.count: grid.labels.count sets it too"),
        ({"arms": {"scratch": {}, "b": {"seed": 3}}}, "arms.b.seed: the seeds of a study are those of `seeds`"),
        ({"grid": {"labels.seed": [1, 2]}}, "grid.labels.seed: the seeds of a study are those of `seeds`"),
        ({"search": {"grid": {"labels.count": [1]}}}, "grid.labels.count: search.grid.labels.count sets it too"),
        ({"pretrain": {"two": {**pretraining(), "seed": 3}}}, "pretrain.two.seed: they have the seeds 0, 1, ..."),
        ({"arms": {"scratch": {}, "b": {}}}, "arms: scratch and b are one and the same run; drop one"),
        ({"arms": {"scratch": {}, "b": {"init": "two", "transfer": "encoder+rotat"}}}, "arm b: transfer: pretrain.two"),
        ({"arms": {"scratch": {}, "b": {"init": "two", "model.encoder.name": "resnet18"}}}, "arm b: "),
        (
            {"pretrain": {"two": drawn()}, "arms": {"a": {}, "b": {"init": "two", "transfer": "encoder+denoise"}}},
            "arm b: transfer: pretrain.two has no task denoise; it has: segment",
        ),
        ({"arms": {"a": {}, "b": {"init": "two", "transfer": "model"}}}, "arm b: transfer: model takes a fine-tuned"),
        ({"pretrain": {"two": drawn(tasks={"denoise": {}})}}, "pretrain.two: config: data.pool: missing"),
        ({"pretrain": {"two": drawn(seed=1)}}, "pretrain.two.seed: they have the seeds 0, 1, ..."),
        ({"primary": {"contrasts": {"four": "scratch"}}}, "primary.contrasts: there is no arm 'four'; name two of: "),
        ({"primary": {"contrasts": {"encoder": "encoder"}}}, "primary.contrasts: encoder is measured from itself"),
        ({"primary": {"contrasts": {}}}, "primary.contrasts: "),
        (
            {"primary": {"contrasts": {"encoder": "scratch"}, "at": {"labels.count": 7}}},
            "config: primary.at.labels.count: 7 is no value of that axis of the grid",
        ),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(keys: dict[str, Any], said: str) -> None:
    assert message_of(lambda: make_plan(load(StudyConfig, values(**keys)), OUT)).startswith(said)


def test_a_search_on_the_images_that_score_is_refused() -> None:
    own = finetuning()
    own["data"] = {"labelled": own["data"]["labelled"]}
    make_plan(load(StudyConfig, values(finetune=own)), OUT)
    config = load(StudyConfig, values(finetune=own, search=LR))
    assert message_of(lambda: make_plan(config, OUT)).startswith("search: would choose on the images that score; give ")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grid": {"labels.count": [2, 500]}}, "arm scratch: labels.count: 500 is more than the 4 labelled images"),
        # Its trials hold one of the four labelled images out.
        ({"grid": {"labels.count": [4]}, "search": LR}, "arm scratch: labels.count: 4 is more than the 3 labelled"),
        ({"pretrain": {"two": {**pretraining(), "data": {"pool": EMPTY}}}}, "pretrain.two.data.pool: holds no image"),
        ({"pretrain": {"two": drawn(labels={"count": 50})}}, "pretrain.two: labels.count: 50 is more than the 3"),
        (
            {
                "pretrain": {"two": drawn(data={"labelled": SQUARES})},
                "arms": {"a": {}, "b": {"init": "two", "transfer": "model"}},
            },
            "arm b: transfer: model: pretrain.two tells background, ",
        ),
    ],
)
def test_images_that_are_missing_are_told_before_anything_runs(keys: dict[str, Any], said: str) -> None:
    plan = make_plan(load(StudyConfig, values(**keys)), OUT)
    assert message_of(lambda: check_images_of(plan)).startswith(said)


def test_a_search_tries_each_value_for_each_arm_on_images_that_score_nothing() -> None:
    search = {"grid": {"train.lr": [0.001, 0.01]}, "seeds": 2, "at": {"labels.count": 1}}
    config = load(StudyConfig, values(search=search))
    plan = make_plan(config, OUT)
    trials = plan.trials
    assert len(trials) == 2 * 2 * 2  # arms, values, seeds; at one label count
    assert all(trial.cell.config.data.val is None and trial.cell.config.data.test is None for trial in trials)
    assert {trial.cell.seed for trial in trials}.isdisjoint(config.seeds)
    scores = {own.cell.id: own.found["train.lr"] * (1 if own.cell.arm == "encoder" else -1) for own in trials}
    assert choose(trials, scores)[choice_key(config, "encoder", {"labels.count": 2})] == {"train.lr": 0.01}
    final = make_plan(config, OUT, scores)
    assert final.trials == trials
    assert {(cell.arm, cell.config.train.lr) for cell in final.cells} == {("scratch", 0.001), ("encoder", 0.01)}


def test_a_search_takes_the_first_of_equals_and_leaves_failed_runs_out() -> None:
    search = {"grid": {"train.lr": [0.001, 0.01, 0.1]}, "seeds": 2}
    config = load(StudyConfig, values(search=search, grid={}))
    trials = make_plan(config, OUT).trials
    scores = {own.cell.id: 0.5 for own in trials if own.found["train.lr"] > 0.001}
    assert choose(trials, scores)[choice_key(config, "scratch", {})] == {"train.lr": 0.01}
    assert choose(trials, {}) == {}
    best = next(own.cell.id for own in trials if own.found["train.lr"] == 0.1)
    lucky = {name: score for name, score in scores.items() if name != best} | {
        own.cell.id: 0.9 for own in trials if own.found["train.lr"] == 0.1 and own.cell.id != best
    }
    assert choose(trials, lucky)[choice_key(config, "scratch", {})] == {"train.lr": 0.01}  # 0.1 has crashed once


def test_the_search_has_seeds_of_its_own() -> None:
    plan = make_plan(load(StudyConfig, values(search=LR, seeds=[1000, 1001], grid={"labels.count": [1]})), OUT)
    assert {trial.cell.seed for trial in plan.trials} == {1002, 1003}


def test_a_pretraining_is_known_by_what_it_starts_from_too(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        again = {"two": {**pretraining(), "init": str(tmp_path / name)}}
        ids |= {cell.id for cell in make_plan(load(StudyConfig, values(pretrain=again, seeds=1)), OUT).pretrainings}
    assert len(ids) == 2


def test_a_model_named_in_part_lies_on_that_of_the_pretraining() -> None:
    part = {**finetuning(), "model": {"encoder": {"type": "timm", "name": "mobilenetv2_035"}}}
    cells = plan_of(finetune=part, seeds=1, grid={})
    assert {cell.config.model.norm for cell in cells} == {"group"}


def test_two_starts_of_one_name_are_not_one_arm(tmp_path: Path) -> None:
    grid = {"init": [None, str(tmp_path / "x" / "four"), str(tmp_path / "y" / "four")]}
    said = message_of(lambda: arms_of(load(StudyConfig, values(arms={}, grid=grid))))
    assert said == "grid.init: two arms would be called 'four'; name them under arms: instead"

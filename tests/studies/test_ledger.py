"""Which task earned what: shares against all orders counted one by one, and a study of every choice of two tasks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import combinations, permutations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_seg import cli
from ssl_seg.config import load
from ssl_seg.evidence import ledger, results
from ssl_seg.evidence.ledger import Choice, extras, ledgers, shares
from ssl_seg.evidence.statistics import holm, sign_flip_p, t_interval
from ssl_seg.reports.console import print_study
from ssl_seg.studies.config import StudyConfig, arms_of
from ssl_seg.studies.executor import Call, Executor, Handle
from ssl_seg.studies.plan import make_plan
from tests.faults import message_of
from tests.reports.test_study import cells_of, change, page_of, section, text_of, write_json, write_study
from tests.small import MODEL, UNTRACKED, finetuning, pretraining, words

TASKS = ("denoise", "inpaint", "colorize", "jigsaw")
NONE: Choice = frozenset()


def choices(tasks: tuple[str, ...]) -> list[Choice]:
    return [frozenset(own) for size in range(len(tasks) + 1) for own in combinations(tasks, size)]


def games(tasks: tuple[str, ...] = TASKS) -> st.SearchStrategy[dict[Choice, Fraction]]:
    """The score of every choice of tasks."""
    scores = st.lists(st.fractions(0, 1, max_denominator=1000), min_size=2 ** len(tasks), max_size=2 ** len(tasks))
    return scores.map(lambda own: dict(zip(choices(tasks), own, strict=True)))


# ---- shares ----


def by_orders(values: Mapping[Choice, Fraction], tasks: tuple[str, ...]) -> dict[Choice, Fraction]:
    """What each task adds to those before it, as a mean over all orders, one by one."""
    orders = list(permutations(tasks))
    found = dict.fromkeys((frozenset({task}) for task in tasks), Fraction(0))
    for order in orders:
        for place, task in enumerate(order):
            before = frozenset(order[:place])
            found[frozenset({task})] += (values[before | {task}] - values[before]) / len(orders)
    return found


def pairs_by_orders(values: Mapping[Choice, Fraction], tasks: tuple[str, ...]) -> dict[Choice, Fraction]:
    """What each pair adds with the tasks before the first of them, as a mean over all orders."""
    orders = list(permutations(tasks))
    found = dict.fromkeys((frozenset(pair) for pair in combinations(tasks, 2)), Fraction(0))
    for order in orders:
        for one, other in combinations(tasks, 2):
            before = frozenset(order[: min(order.index(one), order.index(other))])
            with_both = values[before | {one, other}] - values[before | {one}]
            found[frozenset({one, other})] += (with_both - values[before | {other}] + values[before]) / len(orders)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_and_pairs_are_those_of_all_orders(count: int) -> None:
    tasks = TASKS[:count]
    random = np.random.default_rng(count)
    values = {choice: Fraction(int(random.integers(1000)), 1000) for choice in choices(tasks)}
    assert shares(values) == by_orders(values, tasks)
    assert extras(values) == pairs_by_orders(values, tasks)


@settings(max_examples=25, deadline=None)
@given(games())
def test_shares_add_up_to_all_less_none_and_pairs_explain_them(values: dict[Choice, Fraction]) -> None:
    every = frozenset(TASKS)
    found, pairs = shares(values), extras(values)
    alone = {task: values[frozenset({task})] - values[NONE] for task in TASKS}
    assert sum(found.values()) == values[every] - values[NONE]
    assert sum(alone.values()) + sum(pairs.values()) == values[every] - values[NONE]
    for task in TASKS:
        halves = sum(own for pair, own in pairs.items() if task in pair) / 2
        assert found[frozenset({task})] == alone[task] + halves


@settings(max_examples=25, deadline=None)
@given(games(), games())
def test_shares_and_pairs_of_a_sum_are_sums(one: dict[Choice, Fraction], other: dict[Choice, Fraction]) -> None:
    both = {choice: one[choice] + other[choice] for choice in one}
    for share in (shares, extras):
        assert share(both) == {own: share(one)[own] + share(other)[own] for own in share(both)}


@settings(max_examples=25, deadline=None)
@given(games(TASKS[:3]), st.fractions(-1, 1, max_denominator=1000))
def test_a_task_that_adds_the_same_to_all_earns_just_that(values: dict[Choice, Fraction], own: Fraction) -> None:
    """A null player, at 0; and it makes no pair."""
    last = TASKS[3]
    whole = {choice: values[choice - {last}] + own * (last in choice) for choice in choices(TASKS)}
    assert shares(whole)[frozenset({last})] == own
    assert not any(value for pair, value in extras(whole).items() if last in pair)
    for task in TASKS[:3]:
        assert shares(whole)[frozenset({task})] == shares(values)[frozenset({task})]


@settings(max_examples=25, deadline=None)
@given(games())
def test_tasks_that_do_the_same_earn_the_same(values: dict[Choice, Fraction]) -> None:
    """Symmetry: with the first two exchanged, and the mean of both."""
    swapped = {"denoise": "inpaint", "inpaint": "denoise"}

    def other(choice: Choice) -> Choice:
        return frozenset(swapped.get(task, task) for task in choice)

    even = {choice: values[choice] + values[other(choice)] for choice in values}
    found, pairs = shares(even), extras(even)
    assert found[frozenset({"denoise"})] == found[frozenset({"inpaint"})]
    assert pairs[frozenset({"denoise", "jigsaw"})] == pairs[frozenset({"inpaint", "jigsaw"})]


# ---- a study with a planted value ----

Value = Callable[[Choice, int], float]


def planted(choice: Choice, seed: int) -> float:
    """Colorize alone is worth something, and a little less beside jigsaw."""
    noise = 0.004 * np.sin(7 * seed + 3 * len(choice) + sum(map(len, choice)))
    return 0.06 * ("colorize" in choice) - 0.01 * ({"colorize", "jigsaw"} <= choice) + float(noise)


def write_subsets(folder: Path, value: Value = planted, seeds: int = 3, pretrainings: int = 1000) -> Path:
    """A study of every choice of four tasks, whose gains over the arm of none are the `value`."""
    named = {"+".join(task for task in TASKS if task in own): own for own in choices(TASKS) if own}
    gains = {name: [[value(own, seed) - value(NONE, seed) for seed in range(seeds)]] for name, own in named.items()}
    write_study(folder, gains, {}, {name: {"init": name} for name in named}, pretrainings)
    record = json.loads((folder / "study.json").read_text())
    for arm in record["arms"]:
        arm["tasks"] = [task for task in TASKS if task in named.get(arm["name"], NONE)]
    write_json(folder / "study.json", record)
    return folder


def by_hand(value: Value, seeds: int) -> dict[Choice, list[float]]:
    """The shares of each seed."""
    each = [by_orders({own: Fraction(value(own, seed)) for own in choices(TASKS)}, TASKS) for seed in range(seeds)]
    return {own: [float(found[own]) for found in each] for own in each[0]}


def test_a_planted_task_earns_the_gain_with_the_intervals_of_any_other_gain(tmp_path: Path) -> None:
    (book,) = ledgers(results.read(write_subsets(tmp_path, seeds=8)))
    hand = by_hand(planted, 8)
    assert [own.tasks for own in book.shares] == [(task,) for task in TASKS]
    assert max(book.shares, key=lambda own: own.mean).tasks == ("colorize",)
    assert not book.missing
    for own in book.shares:
        values = hand[frozenset(own.tasks)]
        assert own.values == pytest.approx(values)
        assert own.interval == t_interval(own.values)
        assert (own.interval.low, own.interval.high) == pytest.approx((t_interval(values).low, t_interval(values).high))
        assert own.p == sign_flip_p(own.values)
        assert (own.interval.low > 0) is (own.tasks == ("colorize",))
    entries = [*book.shares, *book.extras]
    assert [own.p_holm for own in entries] == pytest.approx(holm([own.p for own in entries]))
    assert sum(own.mean for own in book.shares) == pytest.approx(book.whole.mean, abs=1e-15)
    pair = next(own for own in book.extras if own.tasks == ("colorize", "jigsaw"))
    assert pair.mean == min(own.mean for own in book.extras) == pytest.approx(-0.01, abs=0.005)


def test_seeds_that_share_pretrainings_count_as_these(tmp_path: Path) -> None:
    (book,) = ledgers(results.read(write_subsets(tmp_path, seeds=6, pretrainings=3)))
    for own in book.shares:
        means = [mean((own.values[start], own.values[start + 3])) for start in range(3)]
        assert own.independent == pytest.approx(means)
        assert own.interval == t_interval(own.independent)
        assert (own.n, own.num_weights, own.p) == (6, 3, None)
    assert sum(own.mean for own in book.shares) == pytest.approx(book.whole.mean, abs=1e-15)


def test_the_page_the_terminal_and_the_table_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results.read(write_subsets(tmp_path))
    results.write_tables(found)
    print_study(found)
    said = capsys.readouterr().out
    printed = said[said.index("share of the gain") :].splitlines()
    rows = table(tmp_path)
    shown = section(page_of(tmp_path), "ledger")
    (book,) = ledgers(found)
    for own in (*book.shares, *book.extras):
        (row,) = [row for row in rows if row["tasks"] == "+".join(own.tasks) and row["what"] in ("share", "pair")]
        assert float(row["gain"]) == own.mean
        assert float(row["low"]) == own.interval.low
        text = f"{100 * own.mean:+.1f}".replace("-", "\N{MINUS SIGN}")
        assert cells_of(shown, own.name)[0].startswith(text)
        name = own.name if len(own.tasks) == 1 else f"{own.name}, as a pair"
        assert text in next(line for line in printed if f"\N{BOX DRAWINGS LIGHT VERTICAL} {name} " in line)
    assert [row["what"] for row in rows] == ["share"] * 4 + ["alone"] * 4 + ["pair"] * 6 + ["all"]
    assert str(tmp_path / "ledger.csv") in said.replace("\n", "")


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "ledger.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_seed_that_lacks_an_arm_is_left_out_and_told(tmp_path: Path) -> None:
    write_subsets(tmp_path, seeds=4)
    change(tmp_path, "denoise+jigsaw-0-0-2", status="failed", message="exit 2: no room")
    (book,) = ledgers(results.read(tmp_path))
    assert book.missing == {2: ("denoise+jigsaw",)}
    hand = by_hand(planted, 4)
    for own in book.shares:
        values = hand[frozenset(own.tasks)]
        assert own.values == pytest.approx([values[seed] for seed in (0, 1, 3)])
    line = "seed 2 is left out of the ledger of tasks: it lacks denoise+jigsaw"
    assert list(ledger.notes(book)) == [line]
    assert f"{line[0].upper()}{line[1:]}." in text_of(section(page_of(tmp_path), "ledger"))


def test_without_a_complete_seed_there_is_one_line_that_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_subsets(tmp_path, seeds=2)
    for name in ("scratch-0-0-0", "jigsaw-0-0-0", "jigsaw-0-0-1"):
        change(tmp_path, name, status="waiting")
    found = results.read(tmp_path)
    results.write_tables(found)
    assert not (tmp_path / "ledger.csv").exists()
    print_study(found)
    line = "no ledger of tasks: no seed has all 16 arms; seed 1, the most complete, lacks jigsaw"
    assert line in " ".join(capsys.readouterr().out.split())
    assert line[1:] in text_of(section(page_of(tmp_path), "ledger"))


def test_a_study_without_subsets_has_no_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results.read(write_study(tmp_path, {"four": [[0.05, 0.06, 0.07]]}, {}))
    results.write_tables(found)
    print_study(found)
    assert not ledgers(found)
    assert not (tmp_path / "ledger.csv").exists()
    assert "ledger" not in capsys.readouterr().out
    assert 'id="ledger"' not in page_of(tmp_path)


# ---- what is planned ----


def values(**keys: Any) -> dict[str, Any]:
    return {"finetune": finetuning(), "subsets": pretraining(), "seeds": 2, "pretrainings": 2, **keys}


def test_every_choice_of_tasks_is_a_pretraining_and_an_arm() -> None:
    config = load(StudyConfig, values())
    plan = make_plan(config, Path("runs/study"))
    assert [(arm.name, arm.tasks) for arm in plan.arms] == [
        ("scratch", ()),
        ("denoise", ("denoise",)),
        ("rotate", ("rotate",)),
        ("denoise+rotate", ("denoise", "rotate")),
    ]
    assert plan.baseline == "scratch"
    assert len(plan.pretrainings) == 3 * 2
    assert len(plan.cells) == 4 * 2
    given = pretraining()["tasks"]
    for cell in plan.pretrainings:
        own = {name: task.weight for name, task in cell.config.tasks.items()}
        assert list(own) == cell.arm.split("+")
        assert own.get("rotate", 0.5) == given["rotate"]["weight"]
    images = {cell.config.train.steps * cell.config.train.batch_size for cell in plan.pretrainings}
    assert len(images) == 1, "at equal images"


def test_subsets_lie_beside_other_arms_and_may_have_a_recipe() -> None:
    arms = {"wide": {"init": "denoise+rotate", "train.lr": 0.1}}
    assert [arm.name for arm in arms_of(load(StudyConfig, values(arms=arms)))][-1] == "wide"
    recipe = {"recipe": "squares", "model": MODEL, "tracking": UNTRACKED}
    made = make_plan(load(StudyConfig, values(subsets=recipe)), Path("runs/study")).pretrainings
    assert [list(cell.config.tasks) for cell in made[::2]] == [["denoise"], ["inpaint"], ["denoise", "inpaint"]]


def test_with_weights_to_go_on_from_no_task_is_an_arm_that_has_them() -> None:
    model = {"encoder": {"type": "timm", "name": "resnet18", "pretrained": True}}
    bare = {key: value for key, value in finetuning().items() if key != "model"}
    plan = make_plan(
        load(StudyConfig, values(finetune=bare, subsets={**pretraining(), "model": model})), Path("runs/a")
    )
    assert plan.arms[0].name == "no task"
    assert all(cell.config.model.encoder.pretrained for cell in plan.cells if cell.arm == "no task")
    assert plan.baseline == "no task"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"subsets": {**pretraining(), "tasks": {"denoise": {}}}}, "subsets.tasks: 1 of them; name 2 to 6"),
        ({"subsets": {**pretraining(), "tasks": {"a+b": {}, "denoise": {}}}}, "subsets.tasks.a+b: "),
        ({"subsets": {**pretraining(), "seed": 1}}, "subsets.seed: they have the seeds 0, 1, ..."),
        ({"subsets": {**pretraining(), "augmnt": {}}}, "subsets: "),
        ({"arms": {"denoise": {}}}, "arms.denoise: so one of subsets is called already"),
        ({"pretrain": {"rotate": pretraining()}}, "pretrain.rotate: so one of subsets is called already"),
        ({"grid": {"init": [None, "imagenet"]}}, "subsets, and the axis init of the grid, both say what is compared"),
    ],
)
def test_what_cannot_be_is_one_line(keys: dict[str, Any], message: str) -> None:
    said = message_of(lambda: make_plan(load(StudyConfig, values(**keys)), Path("runs/study")))
    assert message in said


# ---- end to end ----


class Inside(Executor):
    """Runs in this process: eleven of their own would spend a minute on imports."""

    poll = 0.0

    def __init__(self, *_: object) -> None:
        pass

    def start(self, call: Call, slot: int) -> Handle:
        return Ended(cli.run(lambda: cli.app(args=list(call.words), standalone_mode=False)))


class Ended(Handle):
    def __init__(self, code: int) -> None:
        self.ended = code

    def code(self) -> int:
        return self.ended

    def ask(self) -> None:
        pass

    def end(self, patience: float) -> None:
        pass


def test_a_study_of_two_tasks_writes_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssl_seg.studies.study.Here", Inside)
    squares = {"type": "synthetic", "kind": "squares", "size": [64, 64]}
    train = {"steps": 2, "batch_size": 2, "workers": 0, "device": "cpu", "save_every": 100}
    common = {"augment": {"crop": [64, 64]}, "train": train, "tracking": UNTRACKED}
    model = {"encoder": "mobilenetv2_035", "decoder": {"type": "fpn", "pyramid_channels": 8, "channels": 32}}
    data = {"labelled": {**squares, "count": 4, "seed": 1}, "test": {**squares, "count": 3, "seed": 2}}
    study = {
        "finetune": {**common, "data": data},
        "subsets": {
            **common,
            "data": {"pool": {**squares, "count": 8}},
            "model": {**model, "norm": "group"},
            "tasks": {"denoise": {}, "rotate": {}},
            "recalibrate": 0,
        },
        "seeds": 2,
    }
    out = tmp_path / "study"
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", words(study, tmp_path)[0], "--out", str(out), "--quiet"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    rows = table(out)
    whole = float(rows[-1]["gain"])
    assert sum(float(row["gain"]) for row in rows if row["what"] == "share") == pytest.approx(whole, abs=1e-15)
    with (out / "cells.csv").open() as file:
        scores = {(row["arm"], row["seed"]): float(row["test/miou"]) for row in csv.DictReader(file)}
    gains = [scores["denoise+rotate", seed] - scores["scratch", seed] for seed in ("0", "1")]
    assert whole == pytest.approx(mean(gains), abs=1e-15)
    assert [row["tasks"] for row in rows if row["what"] == "share"] == ["denoise", "rotate"]
    assert "share of the gain" in said.out
    assert 'id="ledger"' in (out / "report.html").read_text()

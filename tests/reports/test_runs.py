"""`ssl-seg report`: what its first sentence may claim, that its numbers are those of `compare`, and that the page is
safe, whole and offline, whatever the runs hold."""

from __future__ import annotations

import base64
import fcntl
import html
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats

from ssl_seg import cli, images
from ssl_seg.calibration import Confidences, in_words, left_out_in_words
from ssl_seg.config import UserError
from ssl_seg.evidence.claims import Answer, answer, left_open, rules, sentence, verdict
from ssl_seg.evidence.compare import compare
from ssl_seg.evidence.comparison import Arm, Gain
from ssl_seg.evidence.formatting import NOTHING, p_in_words, percent, points
from ssl_seg.evidence.pairs import Spread
from ssl_seg.reports import runs
from ssl_seg.reports.runs import compared, default_path
from ssl_seg.runs.folder import RunFolder, find_runs
from tests.evidence.test_compare import LEAK

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    '" onload="alert(1)',
    "'><img src=http://x.test/a.png>",
    "$x_1$",
    "道路 🚲",
    "{{ 7 * 7 }}",
]
CLASSES = ("sky", "road", "pole")


# ---- runs without training ----


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_run(
    folder: Path,
    miou: float | None = 0.25,
    *,
    stage: str = "finetune",
    seed: int = 0,
    init: str | None = None,
    classes: Sequence[str] = CLASSES,
    config: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    finished: bool = True,
    status: str = "finished",
    **record: Any,
) -> Path:
    """A run folder as `store` leaves it, with the files that no run lacks."""
    values = {"seed": seed, "train": {"steps": 400, "lr": 0.001}, **(config or {})}
    if stage == "finetune":
        values |= {"init": init, "transfer": "encoder", "labels": {"seed": seed}}
    told = {"stage": stage, "status": status, "config": values, "origin": None, **record}
    write_json(folder / "run.json", told)
    lines = [
        {"step": step, "train/segment/loss": 1 / step, "lr": 0.001, "val/miou": 0.1} for step in range(10, 401, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if not finished:
        return folder
    ious = {f"iou/{name}": None if name == "pole" else miou for name in classes}
    write_json(folder / "result.json", result or {"steps": 400, "val": {"miou": miou, "accuracy": 0.5, **ious}})
    if stage == "finetune":
        matrix = (np.eye(len(classes), dtype=int) * 50 + 1).tolist()
        write_json(folder / "confusion.json", {"classes": list(classes), "val": matrix})
        write_json(folder / "data.json", {"labelled": {"images": 266}, "val": {"images": 101}})
        write_json(folder / "split.json", {"labelled": ["a", "b"]})
    return folder


def write_pairs(folder: Path, gains: Sequence[float], scratch: float = 0.25) -> Path:
    for seed, gain in enumerate(gains):
        write_run(folder / f"scratch_{seed}", scratch + 0.01 * seed, seed=seed)
        write_run(folder / f"four_{seed}", scratch + 0.01 * seed + gain, seed=seed, **started("four", seed))
    return folder


def started(name: str, seed: int) -> dict[str, Any]:
    """What a run from a pretraining of its own notes of it."""
    config = {"seed": seed, "tasks": {name: {}}}
    return {"init": f"runs/{name}_{seed}", "origin": {"stage": "pretrain", "config": config, "origin": None}}


def write_picture(path: Path, height: int = 40, width: int = 60) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    images.write_image(path, noise)


def page_of(*folders: Path, out: Path | None = None) -> str:
    return runs.report(folders, out).path.read_text(encoding="utf-8")


def answer_of(folder: Path) -> Answer:
    """As the page has it, without drawing the page."""
    return answer(compared(find_runs([folder])))


def headline_of(folder: Path) -> str:
    return answer_of(folder).headline


def gain_of(differences: Sequence[float]) -> Gain:
    return Gain(Arm("x", ()), "val/miou", Spread(tuple(differences)))


# ---- reading a page as a stranger would ----


class Reader(HTMLParser):
    """Every element with its attributes, and the text outside of styles; fails where an element is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def cells_of(page: str, head: str) -> list[str]:
    """The cells of the first table row with this head."""
    rows = re.findall(r'<tr><th scope="row".*?</tr>', page, re.S)
    for row in rows:
        shown, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        if html.unescape(re.sub(r"<span class=\"mark\">.*?</span>|<[^>]+>", "", shown, flags=re.S)) == head:
            return [html.unescape(cell) for cell in cells]
    raise AssertionError(f"no row {head}")


def check_safe(page: str, places: tuple[str, ...] = ()) -> None:
    """`places` are folders beside the page that its links may lead into."""
    reader = read(page)
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    for _, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset", "background"):
            link = attributes.get(name)
            assert link is None or link.startswith(("data:image/", "#", *places)), link
    names = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"][1:] for _, attributes in reader.elements if attributes.get("href", "").startswith("#")]
    assert set(links) <= set(names)
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


# ---- the first sentence ----


def test_a_run_made_again_and_killed_has_no_answer_yet(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.25, status="killed")
    assert headline_of(tmp_path).startswith("No answer yet: the run is killed, ")
    assert "mIoU" not in page_of(tmp_path).split("</h1>")[0]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((0.02, 0.03, 0.04), "gain"),
        ((-0.02, -0.03, -0.04), "loss"),
        ((0.001, 0.2, 0.001), "none"),  # one sign, but the interval is -22 to +35 points
        ((0.01, 0.02, 0.03), "none"),  # 3.5 standard errors from 0: of three pairs Student wants 4.3
        ((0.02, 0.03, 0.02, 0.03, 0.02, -0.001), "gain"),  # not of one sign, but far from 0
        ((-0.02, -0.03, -0.02, -0.03, -0.02, 0.001), "loss"),
        ((0.0002, 0.0002, 0.0002), "none"),  # what is written as 0.0 is none
        ((-0.0002, -0.0002, -0.0002), "none"),
        ((0.03, -0.02, 0.01), "none"),
        ((-0.03, 0.02, -0.01), "none"),
        ((0.0, 0.0, 0.0), "none"),
        ((0.01, 0.0, 0.0), "none"),  # no difference is no gain
        ((0.01, 0.01, 0.01), "gain"),
        ((0.1, 0.1), "few"),
        ((0.1,), "few"),
    ],
)
def test_a_gain_is_told_by_the_rules_alone(differences: tuple[float, ...], expected: str) -> None:
    gain = gain_of(differences)
    assert verdict(gain) == expected
    opening = {"gain": "Pretraining (x) gave +", "loss": "Pretraining (x) lost ", "none": "No gain can be told: "}
    assert sentence(gain, "x").startswith(opening.get(expected, f"Too few runs to tell (n = {gain.n}): "))


@pytest.mark.parametrize("pairs", [3, 5, 8])
def test_where_nothing_is_to_be_found_something_is_told_in_5_of_100(pairs: int) -> None:
    drawn = np.random.default_rng(pairs).normal(0, 0.02, (2000, pairs))
    told = [verdict(gain_of(differences.tolist())) in ("gain", "loss") for differences in drawn]
    assert np.mean(told) == pytest.approx(0.05, abs=0.015)


def test_the_sentence_of_one_comparison(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.012, 0.013, 0.020])
    assert headline_of(tmp_path) == (
        "Pretraining (four) gave +1.5 points of mIoU over scratch (95 % interval +0.4 to +2.6, 3 pairs)."
    )


def test_from_eight_pairs_on_the_exact_p_is_told(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.007, 0.013, 0.024, 0.02, 0.011, 0.016, 0.018, -0.001])
    assert headline_of(tmp_path) == (
        "Pretraining (four) gave +1.4 points of mIoU over scratch "
        "(95 % interval +0.7 to +2.0, 8 pairs, exact p = 0.016)."
    )
    assert p_in_words(1 / 1024) == "p < 0.001"


def test_a_loss_and_a_null_result_are_as_plain(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a", [-0.017, -0.02, -0.023])
    assert headline_of(tmp_path / "a") == (
        "Pretraining (four) lost 2.0 points of mIoU against scratch (95 % interval -2.7 to -1.3, 3 pairs)."
    ).replace(" -", " \N{MINUS SIGN}")
    write_pairs(tmp_path / "b", [-0.01, 0.02, 0.01])
    assert headline_of(tmp_path / "b") == (
        "No gain can be told: pretraining (four) differs from scratch by +0.7 points of mIoU "
        "(95 % interval -3.1 to +4.5, 3 pairs)."
    ).replace(" -", " \N{MINUS SIGN}")
    write_pairs(tmp_path / "c", [0.05, 0.06])
    assert headline_of(tmp_path / "c") == (
        "Too few runs to tell (n = 2): pretraining (four) differs from scratch by +5.5 points of mIoU, "
        "from +5.0 to +6.0."
    )


def test_pairs_that_share_pretrainings_are_told_by_the_means_of_these_as_in_a_study(tmp_path: Path) -> None:
    gains = [0.01, 0.012, 0.014, 0.05, 0.052, 0.054, -0.03, -0.028]
    for seed, gain in enumerate(gains):
        write_run(tmp_path / f"scratch_{seed}", 0.25, seed=seed)
        write_run(tmp_path / f"four_{seed}", 0.25 + gain, seed=seed, **started("four", seed // 3))
    assert headline_of(tmp_path) == (
        "No gain can be told: pretraining (four) differs from scratch by +1.2 points of mIoU "
        "(95 % interval -8.9 to +11.2 over 3 pretrainings, 8 pairs)."
    ).replace(" -", " \N{MINUS SIGN}")
    assert "by as many pretrainings with as many pairs each of this spread" in answer_of(tmp_path).below[-1]
    for run in tmp_path.glob("four_*"):
        record = json.loads((run / "run.json").read_text())
        shared = started("four", 0)
        record["config"]["init"], record["origin"] = shared["init"], shared["origin"]
        write_json(run / "run.json", record)
    assert "8 pairs from this one pretraining, exact p = " in headline_of(tmp_path)


def test_a_null_result_says_what_it_leaves_open(tmp_path: Path) -> None:
    write_pairs(tmp_path / "null", [-0.01, 0.02, 0.01])
    told = [words for words in answer_of(tmp_path / "null").below if "8 times in 10" in words]
    assert told == [
        "A true gain of 5.0 points would have been told 8 times in 10 by as many independent pairs of this spread; "
        "to tell one of 1 point takes about 21 of them."
    ]
    write_pairs(tmp_path / "gain", [0.017, 0.02, 0.023])
    write_pairs(tmp_path / "few", [0.017, 0.02])
    write_pairs(tmp_path / "same", [0.0, 0.0, 0.0])
    for name in ("gain", "few", "same"):
        assert "8 times in 10" not in " ".join(answer_of(tmp_path / name).below)
    (tiny,) = left_open([gain_of((0.0002, -0.0002, 0.0001))])
    assert tiny.startswith("A true gain of 0.1 points"), "one that is written as 0.0 is never told"
    assert tiny.endswith("takes about 3 of them."), "nor is anything of two pairs"
    several = [(-0.01, 0.02, 0.01), (-0.2, 0.3, 0.1), (0.01, 0.012, 0.014)]
    (words,) = left_open(map(gain_of, several))
    assert words.startswith("Where nothing can be told, a true gain of 5.0 to 82.1 points would have been told 8 times")
    assert words.endswith("takes about 21 to 1,000 or more of them.")


def test_of_several_comparisons_none_is_picked_out(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01, 0.012, 0.014])
    for seed in range(3):
        write_run(tmp_path / f"one_{seed}", 0.25 + 0.01 * seed + (-0.01) ** seed, seed=seed, **started("one", seed))
        write_run(tmp_path / f"bad_{seed}", 0.15, seed=seed, **started("bad", seed))
    headline = headline_of(tmp_path)
    assert headline.startswith("Against scratch, pretraining gave a gain in 1 of 3 comparisons, lost in 1, and in 1 ")
    assert headline.endswith("3 pairs each. Corrected for 3 comparisons, both stand.")
    told = [label for label, words in answer_of(tmp_path).single if f"({label})" in words]
    assert sorted(told) == ["bad", "four", "one"], "each has its own sentence below"


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (("clear", "null"), "Corrected for 2 comparisons, it stands."),
        (("weak", "null"), "Corrected for 2 comparisons, it does not stand."),
        (("weak", "null", "few"), "Corrected for 2 comparisons, it does not stand."),
        (("clear", "weak", "null"), "Corrected for 3 comparisons, 1 of these stands."),
        (("weak", "weak", "null", "null"), "Corrected for 4 comparisons, none stands."),
        (("clear", "clear", "clear"), "Corrected for 3 comparisons, all 3 stand."),
        (("clear", "few"), "2 to 3 pairs each."),
        (("null", "null"), "3 pairs each."),
    ],
)
def test_the_first_sentence_says_what_stands_among_so_many(tmp_path: Path, arms: Sequence[str], expected: str) -> None:
    gains = {"clear": (0.01, 0.0101, 0.0102), "weak": (0.02, 0.013, 0.01), "null": (0.01, -0.01, 0.002)}
    gains["few"] = gains["clear"][:2]
    for seed in range(3):
        write_run(tmp_path / f"scratch_{seed}", 0.25, seed=seed)
    for number, arm in enumerate(arms):
        for seed, gain in enumerate(gains[arm]):
            name = "abcd"[number]
            write_run(tmp_path / f"{name}_{seed}", 0.25 + gain, seed=seed, **started(name, seed))
    assert headline_of(tmp_path).endswith(f" {expected}")


def test_two_comparisons_are_told_with_their_intervals(tmp_path: Path) -> None:
    write_pairs(tmp_path, [-0.01, 0.02, 0.01])
    for seed in range(2):
        write_run(tmp_path / f"two_{seed}", 0.27 + 0.01 * seed, seed=seed, **started("two", seed))
    assert headline_of(tmp_path) == (
        "No gain can be told in any of 2 comparisons with scratch: +0.7 (four; 95 % interval -3.1 to +4.5) and "
        "+2.0 (two) points of mIoU, 2 to 3 pairs each."
    ).replace(" -", " \N{MINUS SIGN}")


def test_without_runs_from_scratch_nothing_is_claimed(tmp_path: Path) -> None:
    write_run(tmp_path / "a_0", 0.3, init="runs/a")
    write_run(tmp_path / "b_0", 0.4, init="runs/b")
    headline = headline_of(tmp_path)
    assert headline.startswith("No gain can be told: there are no runs from scratch")
    assert "The highest mean mIoU is 40.0 % (b, n = 1)" in headline


def test_one_fine_tuning_tells_its_score_and_its_classes(tmp_path: Path) -> None:
    scores = {"miou": 0.291, "accuracy": 0.75, "iou/sky": 0.81, "iou/road": 0.0, "iou/pole": 0.0}
    write_run(tmp_path / "run", result={"steps": 400, "val": scores})
    assert headline_of(tmp_path / "run") == (
        "mIoU 29.1 %: best class sky with 81.0, worst road with 0.0 (like 1 other)."
    )
    assert answer_of(tmp_path / "run").below == ("Measured on 101 validation images.",)


def test_scores_of_the_images_that_chose_the_step_are_said_to_be_bright(tmp_path: Path) -> None:
    often = {"steps": 400, "lr": 0.001, "eval_every": 100}
    write_run(tmp_path / "best", config={"select": "best", "train": often})
    assert "on the bright side" in answer_of(tmp_path / "best").below[0]
    write_run(tmp_path / "last", config={"select": "last", "train": often})
    write_run(tmp_path / "once", config={"select": "best"})  # scored at its end alone
    for name in ("last", "once"):
        assert "on the bright side" not in answer_of(tmp_path / name).below[0]


def test_a_pretraining_tells_what_its_tasks_reach(tmp_path: Path) -> None:
    scores = {"denoise/loss": 0.08, "denoise/psnr": 23.7, "jigsaw/accuracy": 0.464, "rotate/loss": 1.25}
    write_run(tmp_path / "run", stage="pretrain", result={"steps": 1500, "val": scores})
    write_json(tmp_path / "run" / "data.json", {"pool": {"images": 400}, "val": {"images": 101}})
    assert headline_of(tmp_path / "run") == (
        "On 101 held-out images after 1,500 steps: denoise PSNR 23.7 dB, jigsaw accuracy 46.4 %, rotate loss 1.25."
    )


def test_nothing_held_out_and_no_score_are_said(tmp_path: Path) -> None:
    write_run(tmp_path / "a", stage="pretrain", result={"steps": 1500, "val": {}})
    assert headline_of(tmp_path / "a").startswith("Nothing was scored")
    write_run(tmp_path / "b", result={"steps": 400, "val": {"miou": None, "accuracy": None, "iou/sky": None}})
    assert headline_of(tmp_path / "b").startswith("Nothing was scored")


def test_a_score_that_is_no_number_is_no_score(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01, 0.02, 0.03])
    write_run(tmp_path / "four_3", math.nan, seed=3, **started("four", 3))
    write_run(tmp_path / "scratch_3", 0.2, seed=3)
    assert "3 pairs" in headline_of(tmp_path)
    assert not re.search(r"\bnan\b", "".join(read(page_of(tmp_path)).text))


# ---- what is on the page ----


def test_the_answer_comes_first_with_its_rules(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.007, 0.013, 0.024])
    written = runs.report([tmp_path])
    page = written.path.read_text(encoding="utf-8")
    assert html.unescape(re.search(r"<h1>(.*?)</h1>", page, re.S)[1]) == written.headline == headline_of(tmp_path)
    text = "".join(read(page).text)
    assert all(rule in text for rule in rules())
    assert text.index(written.headline) < text.index("Scores")


def test_the_numbers_are_those_of_compare(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.007, 0.013, 0.024, -0.002])
    page = page_of(tmp_path)
    found = compare([tmp_path])
    scratch, four = found.arms
    gain = found.gain(four, "val/miou")
    cells = cells_of(page, "four")
    assert cells[:2] == ["4", percent(four.spread("val/miou"))]
    assert cells[3] == f"{points(gain.mean)} ± {100 * gain.differences.sd:.1f}"
    interval = scipy.stats.ttest_1samp(gain.values, 0).confidence_interval(0.95)
    assert cells[4:] == [f"{points(interval.low)} to {points(interval.high)}", "4"]
    assert cells_of(page, "scratch")[1] == percent(scratch.spread("val/miou"))
    of_sky = found.gain(four, "val/iou/sky")
    assert cells_of(page, "sky")[1] == f"{percent(four.spread('val/iou/sky'))} ({points(of_sky.mean)})"
    assert cells_of(page, "pole") == ["absent", "absent"]


def test_two_pairs_have_no_interval(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.007, 0.013])
    assert cells_of(page_of(tmp_path), "four")[4:] == [NOTHING, "2"]


def test_leaks_are_told_with_their_pairs_and_picture(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01, 0.02])
    pair = {"kind": "exact", "part": "pool", "name": HOSTILE[0], "scored_part": "val", "scored": "b"}
    pair |= {"detail": "the same pixels", "allowed": True}
    record = {"checked": True, "trained": {"pool": 9}, "scored": {"val": 3}, "leaks": [pair] * 30}
    for seed in (0, 1):
        write_json(tmp_path / f"four_{seed}" / "leaks.json", record)
    write_json(tmp_path / "scratch_0" / "leaks.json", {**record, "checked": False, "leaks": []})
    write_picture(tmp_path / "four_1" / "leaks.png")
    page = page_of(tmp_path)
    shown = re.search(r'<section id="leaks".*?</section>', page, re.S)[0]
    assert "2 runs: LEAK: 30 exact among" in shown
    assert shown.count("was not checked") == 2, "by leaks.check=false, and by a run without a leaks.json"
    assert cells_of(shown, f"pool: {HOSTILE[0]}") == ["val: b", "exact", "the same pixels", "yes"]
    assert shown.count("the same pixels") == 20
    assert shown.count("<img") == 1
    assert "which leaks.allow let pass: four (2 of 2 runs)" in page
    assert "(leaks.check=false): scratch (1 of 2 runs)" in page
    check_safe(page)


def test_a_leak_s_picture_outside_of_the_run_is_not_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_json(run / "leaks.json", {"checked": True, "trained": {"pool": 1}, "scored": {"val": 1}, "leaks": [LEAK]})
    write_picture(tmp_path / "secret.png")
    (run / "leaks.png").symlink_to(tmp_path / "secret.png")
    assert "<img" not in page_of(run)


def test_only_keys_that_differ_are_listed(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01])
    page = page_of(tmp_path)
    differing = re.search(r'<section id="differences".*?</section>', page, re.S)[0]
    assert "init" in differing
    assert "train.steps" not in differing
    assert "train.steps: 400" in page, "but the config has it"


def test_a_run_with_everything_shows_it(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        command="ssl-seg finetune camvid",
        versions={"torch": "2.14.1"},
        cost={"seconds": 125.0, "images": 3200, "peak_memory_mib": 1234.5},
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T01:00:00+00:00",
        config={"tasks": {"denoise": {}}},
    )
    for step in (100, 200, 300, 400):
        write_picture(run / "pictures" / f"{step:08d}_denoise.png")
        write_picture(run / "pictures" / f"{step:08d}_predictions.png")
    write_picture(run / "pictures" / "val_worst_1.png")
    worst = {"kind": "worst", "name": "frame 7", "miou": 0.123, "picture": "pictures/val_worst_1.png"}
    write_json(run / "extremes.json", {"val": [worst]})
    receipt = {"path": "runs/four", "matched": {"a": "a"}, "missing": ["b"], "share": 0.5, "features_equal": False}
    write_json(run / "receipts.json", {"encoder": receipt})
    page = page_of(run)
    check_safe(page)
    assert page.count("<img ") == 3 + 1 + 1
    for step in ("100", "200", "400"):
        assert f"denoise, step {step}" in page
    assert "denoise, step 300" not in page
    assert "frame 7: mIoU 12.3 %" in page
    assert cells_of(page, "scratch")[:5] == ["1", "25.0", "50.0"]
    cost = re.search(r'<section id="cost".*?</section>', page, re.S)[0]
    assert cells_of(cost, "scratch")[1:5] == ["2 min 5 s", "3,200", "25.6", "1,234 MiB"]
    assert "50% of the parameters (1 matched, 1 missing, 0 left over, 0 mismatched tensors) from runs/four" in page
    assert "differ from the exporter" in page
    for text in ("ssl-seg finetune camvid", "torch 2.14.1", "labelled 266, val 101, labels used 2"):
        assert text in page


def test_a_bare_run_has_a_page_too(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "run.json", {"stage": "evaluate", "config": {"model": "runs/a"}})
    write_json(tmp_path / "run" / "result.json", {"test": {"miou": 0.5, "accuracy": 0.6}})
    page = page_of(tmp_path / "run")
    check_safe(page)
    assert "mIoU 50.0 %" in page
    assert 'id="cost"' not in page
    assert 'id="predictions"' not in page


def test_the_median_run_stands_for_its_group(tmp_path: Path) -> None:
    for seed, miou in enumerate((0.5, 0.1, 0.3)):
        run = write_run(tmp_path / f"scratch_{seed}", miou, seed=seed)
        write_picture(run / "pictures" / "00000400_predictions.png")
    page = page_of(tmp_path)
    assert "scratch_2, the median run of 3" in page
    assert page.count("<img ") == 1


def test_runs_without_a_result_are_listed_with_their_state(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01, 0.02, 0.03])
    write_run(tmp_path / "x_running", finished=False, status="running")
    write_run(tmp_path / "x_gone", finished=False, status="running")
    write_run(tmp_path / "x_failed", finished=False, status="failed")
    with (tmp_path / "x_running" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = page_of(tmp_path)
    notice = re.search(r'<div class="notice">.*?</div>', page, re.S)[0]
    assert re.findall(r"<li>(.*?)</li>", notice) == [
        "x_failed: failed, at step 400 of 400",
        "x_gone: killed, at step 400 of 400",
        "x_running: running, at step 400 of 400",
    ]
    assert "3 pairs" in page


def test_before_anything_is_finished_there_is_a_page_with_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, status="failed")
    assert headline_of(run) == "No answer yet: the run is failed, at step 400 of 400."
    page = page_of(run)
    check_safe(page)
    assert 'id="curves"' in page
    assert 'id="classes"' not in page


def test_how_far_tasks_agree_is_drawn_over_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    pair = "train/affinity/denoise/rotate"
    lines = [
        {"step": step, "train/denoise/factor": 1.0 + step / 100, pair: 0.2, f"{pair}/stem": 0.3, f"{pair}/layer1": -0.1}
        for step in (100, 200, 300)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = page_of(run)
    check_safe(page)
    section = re.search(r'<section id="affinity".*?</section>', page, re.S)[0]
    assert "denoise and rotate: +0.20 on average" in section
    assert section.count("<figure") == 1
    assert all(name in section for name in ("encoder", "stem", "layer1"))
    curves = re.search(r'<section id="curves".*?</section>', page, re.S)[0]
    assert "training: denoise factor" in curves
    assert "affinity" not in curves


# ---- safe, small, the same ----


def test_nothing_foreign_becomes_markup(tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        folder = tmp_path / f"{number}{text.replace('/', '_')}"
        run = write_run(folder, 0.2, seed=0, classes=[*HOSTILE, "road"], config={"note": text}, command=text)
        write_picture(run / "pictures" / "00000400_predictions.png")
        write_picture(run / "pictures" / "00000400_$x$<b>.png")
        write_picture(run / "pictures" / "val_best_1.png")
        entry = {"kind": "best", "name": text, "miou": None, "picture": "pictures/val_best_1.png"}
        write_json(run / "extremes.json", {"val": [entry]})
        lines = (
            json.dumps({"step": 1, f"train/{text}/loss": 1.0})
            + "\n"
            + json.dumps({"step": 2, f"train/{text}/loss": 0.5})
        )
        (run / "metrics.jsonl").write_text(lines + "\n")
    page = page_of(tmp_path)
    check_safe(page)
    shown = "".join(read(page).text)
    for text in HOSTILE:
        assert text in shown, "as text it is there"
    assert "<script" not in page


def test_control_characters_and_broken_surrogates_are_replaced(tmp_path: Path) -> None:
    write_run(tmp_path / "run", classes=["a\x00b", "c\udc80d", "e\x0bf"], command="x\x1by")
    page = page_of(tmp_path / "run")
    check_safe(page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)


def test_a_picture_outside_of_the_run_is_not_taken(tmp_path: Path) -> None:
    write_picture(tmp_path / "secret.png")
    run = write_run(tmp_path / "runs" / "run")
    stolen = {"kind": "best", "name": "a", "miou": 0.5, "picture": "../../secret.png"}
    write_json(run / "extremes.json", {"val": [stolen]})
    assert "<img " not in page_of(run)


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_picture(run / "pictures" / "00000400_predictions.png", height=1200, width=2400)
    source = re.search(r'<img src="data:image/(\w+);base64,([^"]+)" width="(\d+)" height="(\d+)"', page_of(run))
    assert source[1] == "jpeg"
    assert (int(source[3]), int(source[4])) == (900, 450)
    assert base64.b64decode(source[2])[:3] == b"\xff\xd8\xff"


def test_forty_runs_make_a_page_that_loads(tmp_path: Path) -> None:
    for seed in range(4):
        for arm in range(10):
            init = f"runs/arm{arm}" if arm else None
            run = write_run(tmp_path / f"arm{arm}_{seed}", 0.2 + 0.01 * arm, seed=seed, init=init)
            write_picture(run / "pictures" / "00000400_predictions.png", 480, 480)
    start = time.monotonic()
    page = page_of(tmp_path)
    assert time.monotonic() - start < 15
    assert len(page.encode()) < 8_000_000
    assert page.count("<img ") == 8
    assert "to keep the page small" in page
    assert "arm9" in page


def test_the_same_runs_make_the_same_bytes(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01, 0.02, 0.03])
    first = runs.report([tmp_path]).path.read_bytes()
    assert runs.report([tmp_path]).path.read_bytes() == first


# ---- where it goes, and what it refuses ----


def test_a_page_goes_into_the_run_or_beside_the_runs(tmp_path: Path) -> None:
    write_pairs(tmp_path / "runs", [0.01])
    one, other = RunFolder(tmp_path / "runs" / "four_0"), RunFolder(tmp_path / "runs" / "scratch_0")
    assert default_path([one]) == one.folder / "report.html"
    assert default_path([one, other]) == tmp_path / "runs" / "report.html"
    assert runs.report([tmp_path / "runs"]).path == tmp_path / "runs" / "report.html"
    assert runs.report([one.folder], tmp_path / "mine.html").path == tmp_path / "mine.html"
    assert (tmp_path / "mine.html").is_file()


def test_a_run_named_twice_counts_once(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.01, 0.02, 0.03])
    assert "3 pairs" in runs.report([tmp_path, tmp_path / "four_0", tmp_path]).headline


def test_what_cannot_be_reported_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        runs.report([tmp_path])
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="is a folder; name the file"):
        runs.report([run], tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        runs.report([run], tmp_path / "absent" / "report.html")
    (run / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: not readable"):
        runs.report([run])


def test_the_command_says_the_answer_and_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert cli.run(lambda: cli.app(args=["report", str(run)], standalone_mode=False)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("mIoU 25.0 %")
    assert said[1] == f"report: {run / 'report.html'}"
    assert cli.run(lambda: cli.app(args=["report", str(tmp_path / "none")], standalone_mode=False)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    script = (
        "import sys\nfrom ssl_seg.reports.runs import report\n"
        f"report([{str(tmp_path / 'run')!r}])\n"
        "assert not {'torch', 'mlflow', 'timm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def counted(sharpness: float, seed: int = 0) -> Confidences:
    """Of 20,000 pixels that are right four times in five, whatever is said."""
    random = np.random.default_rng(seed)
    return Confidences.of(random.beta(sharpness, 2, 20_000), random.random(20_000) < 0.8)


def test_how_sure_runs_are_is_told_and_drawn_where_they_have_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "earlier", 0.4)
    assert "how often right" not in page_of(tmp_path / "earlier"), "a run of before says nothing"
    for seed in (0, 1):
        run = write_run(tmp_path / f"run_{seed}", 0.4, seed=seed, init="x")
        own, mended = counted(18, seed), counted(8, seed)
        parts = {"val": {"plain": own.dump(), "tempered": mended.dump()}}
        write_json(run / "calibration.json", {"bins": 15, "temperature": 2.0, "parts": parts})
    page = page_of(*sorted(tmp_path.glob("run_*")), tmp_path / "earlier")
    both = counted(18, 0) + counted(18, 1)
    assert in_words(both) in page, "summed over the runs of a group"
    assert left_out_in_words(both)[1:] in page
    assert f"<td>{100 * (counted(8, 0) + counted(8, 1)).ece:.1f}</td>" in page
    assert "Dashed: tempered." in page
    assert page.count('id="confidence"') == 1


def test_outlines_have_a_row_a_class(tmp_path: Path) -> None:
    figures = {"boundary/miou": 0.5, "hd95": 4.25, "hd95_one_sided": 0}
    figures |= {f"boundary/iou/{name}": 0.25 for name in CLASSES} | {f"hd95/{name}": 7.5 for name in CLASSES}
    scores = {"miou": 0.4, "accuracy": 0.5, **{f"iou/{name}": 0.4 for name in CLASSES}, **figures}
    write_run(tmp_path / "run", 0.4, result={"steps": 400, "val": scores})
    page = page_of(tmp_path / "run")
    section = page[page.index('id="outlines"') :]
    assert section.index("4.2") < section.index("7.5")
    assert section.count("<td>25.0</td>") == len(CLASSES)
    write_run(tmp_path / "plain", 0.4)
    assert 'id="outlines"' not in page_of(tmp_path / "plain")

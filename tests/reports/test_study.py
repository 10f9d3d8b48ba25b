"""The page about a study: what its first sentence may claim, that its numbers are those of `findings`, and that it is
safe, whole and offline, whatever the study holds."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from scipy import stats

from ssl_seg import cli
from ssl_seg.config import UserError
from ssl_seg.evidence import label_curve, results
from ssl_seg.evidence.claims import OF_CONDITIONS, answer, rules
from ssl_seg.evidence.formatting import NOTHING, points
from ssl_seg.evidence.statistics import detectable
from ssl_seg.figures import charts
from ssl_seg.reports.console import print_study
from ssl_seg.reports.study import report
from tests.faults import message_of
from tests.reports.test_runs import HOSTILE, cells_of, check_safe, read, write_json, write_picture

CLASSES = ("sky", "road", "pole")
GAIN = (0.05, 0.06, 0.07, 0.06)
NULL = (0.01, -0.02, 0.03, 0.0)


def write_study(
    folder: Path,
    gains: Mapping[str, Sequence[Sequence[float]]],
    axes: Mapping[str, Sequence[Any]] | None = None,
    changes: Mapping[str, Any] | None = None,
    pretrainings: int = 1000,
    **record: Any,
) -> Path:
    """`gains` are those of each arm: for each value of the first axis one a seed. Values of a second axis are alike.

    The seeds take the `pretrainings` in turn.
    """
    axes = {"labels.count": [5, 10]} if axes is None else axes
    keys = list(axes)
    arms = ["scratch", *gains]
    seeds = max(len(own) for per_value in gains.values() for own in per_value)
    first = axes[keys[0]] if keys else [None]
    others = axes[keys[1]] if len(keys) > 1 else [None]
    cells = []
    for place, value in enumerate(first):
        for other in others:
            condition = dict(zip(keys, (value, other), strict=False))
            for arm in arms:
                own = [0.0] * seeds if arm == "scratch" else gains[arm][place]
                for seed, gain in enumerate(own):
                    name = f"{arm.replace('/', '_')}-{place}-{others.index(other)}-{seed}"
                    start = None if arm == "scratch" else f"four-seed{seed % pretrainings}"
                    cells.append(cell(name, arm, condition, seed, start))
                    write_cell(folder / "cells" / name, 0.25 + 0.1 * place + 0.01 * seed + gain)
    changes = {arm: {"init": "four"} for arm in gains} if changes is None else changes
    listed = [{"name": arm, "changes": changes.get(arm, {}), "pretraining": None} for arm in arms]
    about = {"baseline": "scratch", "axes": axes, "seeds": list(range(seeds)), "level": 0.95, "status": "finished"}
    write_json(folder / "study.json", {**about, "arms": listed, "cells": cells, **record})
    return folder


def cell(
    name: str, arm: str, condition: Mapping[str, Any], seed: int, start: str | None, **more: Any
) -> dict[str, Any]:
    own = {"id": name, "arm": arm, "condition": condition, "seed": seed, "start": start}
    return {**own, "status": "finished", "message": "", "seconds": 90.0, **more}


def write_cell(folder: Path, miou: float, **result: Any) -> None:
    cost = {"seconds": 60.0, "images": 1200, "peak_memory_mib": 500.0}
    write_json(folder / "run.json", {"stage": "finetune", "config": {"select": "last"}, "cost": cost})
    ious = {f"iou/{name}": miou + 0.1 * place for place, name in enumerate(CLASSES)}
    write_json(folder / "result.json", {"steps": 4, "test": {"miou": miou, **ious}, **result})
    write_json(folder / "data.json", {"test": {"images": 30}})


def change(folder: Path, name: str, **values: Any) -> None:
    """Other values in a run's entry of study.json."""
    record = json.loads((folder / "study.json").read_text())
    for own in record["cells"]:
        if own["id"] == name:
            own |= values
    write_json(folder / "study.json", record)


def headline_of(folder: Path) -> str:
    return answer(results.read(folder)).headline


def page_of(folder: Path, out: Path | None = None) -> str:
    return report([folder], out).path.read_text(encoding="utf-8")


def section(page: str, anchor: str) -> str:
    return re.search(rf'<section id="{anchor}".*?</section>', page, re.S)[0]


def text_of(page: str) -> str:
    return "".join(read(page).text)


def interval_of(differences: Sequence[float]) -> str:
    """As the page writes Student's, by scipy."""
    found = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{points(found.low)} to {points(found.high)}"


# ---- the first sentence ----


def test_one_arm_under_one_condition_is_one_sentence(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {})
    assert headline_of(tmp_path) == (
        f"Pretraining (four) gave +6.0 points of mIoU over scratch (95 % interval {interval_of(GAIN)}, 4 pairs)."
    )
    assert "scratch: 26.5 ± 1.3 % mIoU." in answer(results.read(tmp_path)).below


@pytest.mark.parametrize(
    ("differences", "begin"),
    [
        ((-0.05, -0.06, -0.07), "Pretraining (four) lost 6.0 points of mIoU against scratch"),
        (NULL, "No gain can be told: pretraining (four) differs from scratch by +0.5 points of mIoU"),
        ((0.05, 0.06), "Too few runs to tell (n = 2): pretraining (four) differs from scratch by +5.5 points of mIoU"),
    ],
)
def test_a_loss_and_a_null_result_are_as_plain(tmp_path: Path, differences: Sequence[float], begin: str) -> None:
    write_study(tmp_path, {"four": [differences]}, {})
    assert headline_of(tmp_path).startswith(begin)


def test_several_conditions_count_by_their_mean_seed_by_seed(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN, NULL]})
    found = results.read(tmp_path)
    mean = found.over_conditions(found.arm("four"))
    assert len(mean.conditions) == 2
    assert mean.values == pytest.approx(np.mean([GAIN, NULL], axis=0).tolist())
    assert answer(found).headline == (
        "Pretraining (four) gave +3.2 points of mIoU over scratch "
        f"(95 % interval {interval_of(mean.values)}, 4 pairs), "
        "on average over 2 conditions: a gain in 1, nothing to tell in 1."
    )


def test_a_seed_without_a_pair_under_some_condition_is_no_part_of_the_mean(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN, NULL]})
    change(tmp_path, "scratch-1-0-3", status="failed", message="exit 2: no room")
    found = results.read(tmp_path)
    mean = found.over_conditions(found.arm("four"))
    assert mean.values == pytest.approx(np.mean([GAIN[:3], NULL[:3]], axis=0).tolist())
    for seed in range(3):
        change(tmp_path, f"four-1-0-{seed}", status="waiting")
    change(tmp_path, "four-1-0-3", status="waiting")
    found = results.read(tmp_path)
    mean = found.over_conditions(found.arm("four"))
    assert (len(mean.conditions), mean.values) == (1, pytest.approx(GAIN)), "a condition without any pair is left out"
    assert "on average over 1 of 2 conditions: a gain in 1." in headline_of(tmp_path)


def test_of_several_arms_none_is_picked_out(tmp_path: Path) -> None:
    write_study(tmp_path, {"none": [NULL], "good": [GAIN], "bad": [[-own for own in GAIN]]}, {})
    told = answer(results.read(tmp_path))
    assert told.headline.startswith(
        "Against scratch, pretraining gave a gain in 1 of 3 comparisons, lost in 1, and in 1 nothing can be told: "
    )
    assert [arm for arm, words in told.single if f"({arm})" in words] == ["none", "good", "bad"]


def test_the_answer_speaks_of_what_was_named_beforehand_alone(tmp_path: Path) -> None:
    gains = {"four": [GAIN, GAIN], "joint": [NULL, NULL], "other": [GAIN, NULL]}
    primary = {"contrasts": {"four": "scratch", "joint": "four"}, "at": {"labels.count": 5}}
    write_study(tmp_path, gains, config={"primary": primary})
    headline, lines = headline_of(tmp_path), answer(results.read(tmp_path)).below
    assert headline.startswith("Under labels.count=5: Pretraining (four) gave +6.0 points of mIoU over scratch")
    lost = [ours - theirs for ours, theirs in zip(NULL, GAIN, strict=True)]
    assert f"joint lost 5.5 points of mIoU against four (95 % interval {interval_of(lost)}, 4 pairs)." in headline
    assert headline.endswith("Corrected for 2 comparisons, both stand.")
    assert "other" not in headline
    assert lines[0].startswith("These were named before there was a score.")
    page = page_of(tmp_path)
    assert cells_of(section(page, "primary"), "joint")[:4] == ["four", "labels.count=5", "4", f"{points(-0.055)} ± 1.9"]
    assert "Holm" not in section(page, "gains")


def test_what_stands_is_told_by_the_p_of_the_table(tmp_path: Path) -> None:
    """All eight differences are losses, a few of them large: rare by sign flips, and by Student's t not so rare."""
    skewed = [-0.002, -0.003, -0.005, -0.008, -0.01, -0.02, -0.045, -0.05]
    assert 0.05 / 2 < stats.ttest_1samp(skewed, 0).pvalue < 0.05
    primary = {"contrasts": {"four": "scratch", "joint": "scratch"}, "at": {}}
    gains = {"four": [skewed], "joint": [[0.01, -0.01] * 4]}
    write_study(tmp_path, gains, {"labels.count": [5]}, config={"primary": primary})
    told = answer(results.read(tmp_path))
    assert told.headline.endswith("Corrected for 2 comparisons, it stands.")
    assert "8 pairs, exact p = 0.008" in told.headline
    assert not any("exact" in words for _, words in told.single), "of what is exploratory the intervals alone"
    assert cells_of(section(page_of(tmp_path), "primary"), "four")[-2:] == ["0.008", "0.016"]


def test_nothing_is_said_to_stand_where_nothing_was_told(tmp_path: Path) -> None:
    primary = {"contrasts": {"four": "scratch", "joint": "scratch"}, "at": {}}
    gains = {"four": [[0.02, -0.01, 0.0]], "joint": [[0.01, -0.01, 0.002]]}
    write_study(tmp_path, gains, {"labels.count": [5]}, config={"primary": primary})
    headline = answer(results.read(tmp_path)).headline
    assert headline.count("No gain can be told") == 2
    assert "Corrected" not in headline


def test_what_was_named_and_has_no_pair_yet_is_told(tmp_path: Path) -> None:
    primary = {"contrasts": {"four": "scratch", "joint": "scratch"}, "at": {}}
    write_study(tmp_path, {"four": [GAIN], "joint": [GAIN]}, {"labels.count": [5]}, config={"primary": primary})
    for seed in range(len(GAIN)):
        change(tmp_path, f"joint-0-0-{seed}", status="waiting")
    assert headline_of(tmp_path).endswith("joint: no seed has a pair with scratch yet.")
    assert cells_of(section(page_of(tmp_path), "primary"), "joint")[2:] == ["0", *[NOTHING] * 4]


def test_what_is_told_under_single_conditions_is_corrected_for_all_of_them(tmp_path: Path) -> None:
    weak = (0.01, 0.02, 0.03, 0.045)  # p = 0.03 alone
    write_study(tmp_path, {"good": [GAIN, NULL], "weak": [weak, NULL]})
    assert 0.05 / 3 < stats.ttest_1samp(weak, 0).pvalue < 0.05
    below = " ".join(answer(results.read(tmp_path)).below)
    assert "corrected for all 4 comparisons, 1 of the 2 told stands." in below


def test_arms_that_start_from_no_weights_are_no_pretraining(tmp_path: Path) -> None:
    write_study(tmp_path, {"wide": [GAIN], "four": [GAIN]}, {}, {"four": {"init": "four"}})
    told = answer(results.read(tmp_path))
    assert told.headline.startswith("The other arms gave a gain over scratch in both comparisons: ")
    assert dict(told.single)["wide"].startswith("wide gave +6.0 points of mIoU over scratch (")
    assert dict(told.single)["four"].startswith("Pretraining (four) gave +6.0 points")


def test_before_there_is_a_pair_there_is_no_answer(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {})
    for seed in range(4):
        change(tmp_path, f"scratch-0-0-{seed}", status="waiting")
    assert headline_of(tmp_path) == (
        "No answer yet: no seed has finished both an arm and scratch (of 8 cells 4 waiting, 4 finished)."
    )
    for seed in range(4):
        change(tmp_path, f"four-0-0-{seed}", status="stalled")
    assert headline_of(tmp_path) == "No answer yet: no cell has a score (of 8 cells 4 waiting, 4 stalled)."
    page = page_of(tmp_path)
    check_safe(page, ("cells/",))
    assert 'id="gains"' not in page


def test_why_there_is_no_answer_is_said_as_it_is(tmp_path: Path) -> None:
    write_study(tmp_path / "unequal", {"four": [GAIN[:2], GAIN[:2]]})
    for name in ("four-0-0-0", "four-1-0-1"):  # another seed under each condition
        change(tmp_path / "unequal", name, status="failed", message="exit 2")
    assert headline_of(tmp_path / "unequal") == (
        "No answer yet: no seed has a pair with scratch under all conditions (of 8 cells 6 finished, 2 failed)."
    )
    write_study(tmp_path / "other", {"four": [GAIN[:1]]}, {})
    write_cell(tmp_path / "other" / "cells" / "four-0-0-0", 0.3, passport={"test": {"images": 31, "split": "ab"}})
    assert headline_of(tmp_path / "other").startswith(
        "No answer: no cell is a pair with one of scratch; four-0-0-0: no pair with scratch-0-0-0: their scores differ"
    )


def below(folder: Path) -> str:
    return " ".join(answer(results.read(folder)).below)


def test_one_pretraining_for_all_pairs_is_said_to_be_one(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {}, pretrainings=1)
    assert headline_of(tmp_path).endswith(f"interval {interval_of(GAIN)}, 4 pairs from this one pretraining).")
    assert "All pairs of four start from one pretraining" in below(tmp_path)


def test_one_pretraining_that_both_sides_start_from_is_no_word_of_the_answer(tmp_path: Path) -> None:
    """As where chosen labels are compared with drawn ones, both from ImageNet's weights."""
    arms = {"scratch": {"init": "four", "labels.blind": True}, "four": {"init": "four", "labels.names": ["a.png"]}}
    write_study(tmp_path, {"four": [GAIN]}, {}, changes=arms, pretrainings=1)
    for seed in range(len(GAIN)):
        change(tmp_path, f"scratch-0-0-{seed}", start="four-seed0")
    assert headline_of(tmp_path).endswith(f"interval {interval_of(GAIN)}, 4 pairs).")
    assert "pretraining" not in below(tmp_path)


def test_pairs_that_share_two_pretrainings_are_said_to_be_about_these(tmp_path: Path) -> None:
    write_study(tmp_path / "a", {"four": [GAIN * 2, GAIN * 2]}, pretrainings=2)
    assert ", 8 pairs from these 2 pretrainings, exact p = 0.008), on average over" in headline_of(tmp_path / "a")
    caution = "The pairs of four start from 2 pretrainings, and pairs that share one are not independent"
    assert caution in below(tmp_path / "a")
    assert caution in section(page_of(tmp_path / "a"), "gains")
    write_study(tmp_path / "b", {"four": [GAIN * 2], "five": [NULL * 2]}, {}, pretrainings=2)
    assert "points of mIoU, 8 pairs each, from only 2 pretrainings. " in headline_of(tmp_path / "b")
    write_study(tmp_path / "c", {"four": [GAIN, GAIN]})
    assert "pretrainings" not in headline_of(tmp_path / "c") + below(tmp_path / "c")


def test_of_three_shared_pretrainings_their_means_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_start = (0.09, 0.001, 0.02)
    gains = tuple(by_start[seed % 3] + 0.001 * (seed // 3) for seed in range(9))
    means = tuple(own + 0.001 for own in by_start)
    write_study(tmp_path, {"four": [gains, gains]}, pretrainings=3)
    assert stats.ttest_1samp(gains, 0).pvalue < 0.05 < stats.ttest_1samp(means, 0).pvalue
    assert headline_of(tmp_path) == (
        "No gain can be told: pretraining (four) differs from scratch by +3.8 points of mIoU "
        f"(95 % interval {interval_of(means)} over 3 pretrainings, 9 pairs), "
        "on average over 2 conditions: nothing to tell in 2."
    )
    assert "is told by the interval over the means of each pretraining" in below(tmp_path)
    gain_table = section(page_of(tmp_path), "gains")
    assert cells_of(gain_table, "four")[-1] == interval_of(means)
    assert cells_of(section(page_of(tmp_path), "classes"), "road")[0] == f"+3.8 ({interval_of(means)})"
    low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    drawn = []
    monkeypatch.setattr(charts, "bands", lambda name, bands, *_, **__: drawn.append((name, bands)) or "")
    page_of(tmp_path)
    (four,) = dict(drawn)["gains0"]
    assert four.intervals[0] == pytest.approx((100 * low, 100 * high)), "the curves have it too"
    assert "Over starts (t)" in gain_table


def test_over_a_baseline_that_is_pretrained_too_no_gain_is_one_of_pretraining(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN], "five": [GAIN]}, {})
    record = json.loads((tmp_path / "study.json").read_text())
    for arm in record["arms"]:
        arm["from_scratch"] = False  # by a key that all arms share
    write_json(tmp_path / "study.json", record)
    told = answer(results.read(tmp_path))
    assert told.headline.startswith("The other arms gave a gain over scratch in both comparisons: ")
    assert dict(told.single)["four"].startswith("four gave +6.0 points of mIoU over scratch (")
    record["arms"][0]["from_scratch"] = True
    write_json(tmp_path / "study.json", record)
    assert headline_of(tmp_path).startswith("Pretraining gave a gain over scratch in both comparisons: ")


@pytest.mark.parametrize(
    ("resumed", "is_told"),
    [
        (["2026-01-02"], False),
        ([{"started": "2026-01-02", "seeds": 4}], False),
        (["2026-01-02", {"started": "2026-01-03", "seeds": 3}], True),
        ([{"started": "2026-01-02", "seeds": [0, 1, 2]}], True),
    ],
)
def test_seeds_that_came_later_are_told(tmp_path: Path, resumed: list[Any], is_told: bool) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {}, resumed=resumed)
    assert ("Seeds were added after an earlier end (there had been 3)" in below(tmp_path)) is is_told
    assert cells_of(section(page_of(tmp_path), "setup"), "Taken up again") == [
        ", ".join(("2026-01-02", "2026-01-03")[: len(resumed)])
    ]


def test_seeds_that_are_left_out_are_told(tmp_path: Path) -> None:
    resumed = [{"started": "2026-01-02", "seeds": [0, 1, 2, 9]}]
    write_study(tmp_path, {"four": [GAIN]}, {}, resumed=resumed)
    assert "CAUTION: seeds of an earlier start were left out (9);" in below(tmp_path)
    assert "Seeds were added" not in below(tmp_path)


def test_cells_that_were_scored_otherwise_are_told_apart(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {})
    for name in ("scratch-0-0-0", "four-0-0-0"):
        images = 30 if name.startswith("scratch") else 31
        write_cell(tmp_path / "cells" / name, 0.25, passport={"test": {"images": images, "split": "ab"}})
    told = [words for words in answer(results.read(tmp_path)).below if words.startswith("CAUTION")]
    assert len(told) == 2
    assert "test: images" in told[0]
    assert told[1].startswith("CAUTION: cells that are no pair are left out of every gain: four-0-0-0: no pair with ")


@pytest.mark.parametrize("pools", [("266 images", "266 images"), ("266 images", "300 images")])
def test_pretrainings_on_other_images_are_told(tmp_path: Path, pools: Sequence[str]) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {})
    for seed, pool in enumerate(pools):
        path = tmp_path / "cells" / f"four-0-0-{seed}" / "run.json"
        origin = {"stage": "pretrain", "config": {}, "origin": None, "pool": pool}
        write_json(path, {**json.loads(path.read_text()), "origin": origin})
    said = "CAUTION: the pretrainings of four did not read the same images" in below(tmp_path)
    assert said is (pools[0] != pools[1])


def test_pairs_that_were_not_made_with_the_same_are_told(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {})
    for name, torch in (("scratch-0-0-0", "2.14.0"), ("four-0-0-0", "2.14.1")):
        record = json.loads((tmp_path / "cells" / name / "run.json").read_text())
        write_json(
            tmp_path / "cells" / name / "run.json", {**record, "versions": {"torch": torch}, "device": "1 x cpu"}
        )
    told = [words for words in answer(results.read(tmp_path)).below if words.startswith("CAUTION")]
    assert told == [
        "CAUTION: paired cells were not all made with the same (torch 2.14.0, 2.14.1); a gain may come from that."
    ]


def test_a_study_is_judged_at_its_own_level_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, clear = (0.01, 0.02, 0.03), GAIN[:3]
    assert 0.05 < stats.ttest_1samp(weak, 0).pvalue < 0.1
    arms = {"weak": [weak, weak], "clear": [clear, clear]}
    usual, own = (write_study(tmp_path / name, arms, level=level) for name, level in (("usual", 0.95), ("own", 0.9)))
    assert headline_of(usual).startswith("Against scratch, pretraining gave a gain in 1 of 2 comparisons, and in 1 ")
    headline = headline_of(own)
    assert headline.startswith("Pretraining gave a gain over scratch in both comparisons: ")
    assert headline.endswith("Corrected for 2 comparisons, both stand.")
    low, high = stats.ttest_1samp(weak, 0).confidence_interval(0.9)
    interval = f"{points(low)} to {points(high)}"
    told = dict(answer(results.read(own)).single)["weak"]
    assert f"gave +2.0 points of mIoU over scratch (90 % interval {interval}, 3 pairs), on average over" in told
    drawn: dict[str, Sequence[Any]] = {}
    monkeypatch.setattr(charts, "bands", lambda name, bands, *_, **__: drawn.update({name: bands}) or "")
    monkeypatch.setattr(charts, "changes", lambda name, rows, columns, cells, *_: drawn.update({name: cells}) or "")
    page = page_of(own)
    assert drawn["gains0"][0].intervals[0] == pytest.approx((100 * low, 100 * high))
    of_scores = [0.25 + 0.01 * seed + gain for seed, gain in enumerate(weak)]
    ends = stats.ttest_1samp(of_scores, np.mean(of_scores)).confidence_interval(0.9)
    assert drawn["scores0"][1].intervals[0] == pytest.approx((100 * ends.low, 100 * ends.high))
    assert all(cell.is_sure for row in drawn["classes0"] for cell in row)
    assert cells_of(section(page, "gains"), "weak")[5] == interval
    assert cells_of(section(page, "classes"), "road")[0] == f"+2.0 ({interval})"
    text = text_of(page)
    assert "95 %" not in text
    for words in (
        "with 90 % intervals of the mean gain",
        "with its 90 % interval",
        "in 10 of 100 comparisons",
        *rules(0.9),
    ):
        assert words in text
    print_study(results.read(own))
    said = capsys.readouterr().out
    assert "90 % over seeds" in said
    assert "90 % over images" in said
    assert interval in said
    assert "95 %" not in said
    assert results.gain_rows(results.read(own))[0]["detectable"] == pytest.approx(detectable(weak, 0.9))


# ---- what is on the page ----


def test_the_answer_comes_first_with_its_rules_and_its_numbers_are_those_of_findings(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN, NULL]})
    written = report([tmp_path])
    assert written.path == tmp_path / "report.html"
    page = written.path.read_text(encoding="utf-8")
    check_safe(page, ("cells/",))
    assert html.unescape(re.search(r"<h1>(.*?)</h1>", page, re.S)[1]) == written.headline == headline_of(tmp_path)
    text = text_of(page)
    assert all(rule in text for rule in (OF_CONDITIONS, *rules()))
    gain, _ = results.read(tmp_path).gains
    cells = cells_of(section(page, "gains"), "four")
    assert cells[:5] == ["5", "26.5 ± 1.3", "32.5 ± 1.9", "4", "+6.0 ± 0.8"]
    assert cells[5] == f"{points(gain.interval.low)} to {points(gain.interval.high)}" == interval_of(GAIN)
    assert cells[6:] == [NOTHING, NOTHING, NOTHING, "4"]
    for reason in ("exact p is told from 8 independent pairs on", "needs 5 pairs", "over images needs 5 blocks"):
        assert reason in section(page, "gains")
    assert not re.search(r"\b0\.[0-9]{3,}", re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.S))


def test_eight_pairs_have_an_exact_p_and_nothing_is_excused(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN * 2, [own + 0.001 for own in NULL * 2]]})
    gains = section(page_of(tmp_path), "gains")
    assert cells_of(gains, "four")[-2] == "0.008 (0.016)"
    assert "told from 8 pairs" not in gains
    assert "needs 5 pairs" not in gains


def test_curves_are_drawn_over_the_longest_axis_of_numbers(tmp_path: Path) -> None:
    axes = {"labels.count": [5, 10, 40], "train.steps": [400, 1600]}
    write_study(tmp_path, {"four": [GAIN, NULL, GAIN]}, axes)
    learning = section(page_of(tmp_path), "learning")
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", learning)
    assert titles == [
        "train.steps=400: test mIoU, %",
        "train.steps=1600: test mIoU, %",
        "train.steps=400: gain over scratch, points of mIoU",
        "train.steps=1600: gain over scratch, points of mIoU",
    ]
    assert learning.count("over labels.count for") == 4
    assert learning.count('class="panels') == 2, "short and long beside each other, gains below"


def test_what_labels_are_worth_is_one_sentence_on_the_page_and_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results.read(write_study(tmp_path, {"four": [GAIN] * 3}, {"labels.count": [5, 10, 20]}, level=0.9))
    told = label_curve.sentence(found)
    assert told.startswith("With 10 labelled images pretraining (four) is worth 6 more (90 % interval ")
    shown = section(page_of(tmp_path), "labels")
    assert html.unescape(shown).count(told) == 1
    assert shown.count("over labels.count for") == 1
    assert cells_of(shown, "four")[:2] == ["5", "4"]
    print_study(found)
    said = " ".join(capsys.readouterr().out.split())
    assert told in said
    assert "labels.csv" in said
    drawn = {}
    monkeypatch.setattr(charts, "bands", lambda name, lines, *_, **more: drawn.update({name: (lines, more)}) or "")
    page_of(tmp_path)
    (scratch, four), more = drawn["labels0"]
    (worth,) = label_curve.worths(found)
    arrow, own = more["arrow"], worth.at(10)
    assert (arrow.start, arrow.tip, arrow.low, arrow.high) == (10, 10 + own.middle, 10 + own.low, 10 + own.high)
    assert arrow.height == pytest.approx(np.mean(four.values[1]))
    assert [place for place, *_ in scratch.ahead] == [20, 40, 80]


def test_without_numbers_of_labels_nothing_is_said_of_their_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, {"four": [GAIN] * 2}, {"train.steps": [400, 1400]})
    assert 'id="labels"' not in page_of(study)
    print_study(results.read(study))
    said = capsys.readouterr().out
    assert "labels.csv" not in said
    assert "labelled images" not in said
    unfinished = write_study(tmp_path / "two", {"four": [GAIN[:2]] * 2})
    assert "cannot be told" in section(page_of(unfinished), "labels")


def test_without_an_axis_of_numbers_every_run_is_a_dot(tmp_path: Path) -> None:
    page = page_of(write_study(tmp_path, {"four": [GAIN, NULL]}, {"model.norm": ["group", "batch"]}))
    assert 'id="learning"' not in page
    shown = section(page, "scores")
    assert "four (model.norm=batch)" in shown
    assert len(re.findall(r"<use ", shown)) >= 2 * 2 * 4 + 2 * 4


def test_gains_of_classes_are_a_map_over_conditions_and_dots_under_one(tmp_path: Path) -> None:
    maps = section(page_of(write_study(tmp_path / "a", {"four": [GAIN, NULL]})), "classes")
    assert cells_of(maps, "road") == [f"+6.0 ({interval_of(GAIN)})", f"+0.5 ({interval_of(NULL)})"]
    drawing = re.search(r"<svg.*?</svg>", maps, re.S)[0]
    assert re.findall(r">([+\u2212][0-9.]+)<", drawing) == ["+6.0", "+0.5"] * 3
    one = section(page_of(write_study(tmp_path / "b", {"four": [GAIN]}, {})), "classes")
    assert cells_of(one, "road") == [f"+6.0 ({interval_of(GAIN)})"]
    assert "Mean gain, and its 95 % interval." in one
    assert ">+6<" in one, "in points"


def test_the_search_is_told_with_all_it_tried(tmp_path: Path) -> None:
    trials = [
        cell(f"four-{rate}-{seed}", "four", {"labels.count": 5}, seed, None, tried={"train.lr": rate}, miou=miou)
        for rate, miou in ((0.001, 0.2), (0.01, 0.3))
        for seed in (1000, 1001)
    ]
    chosen = [{"arm": "four", "condition": {"labels.count": 5}, "chosen": {"train.lr": 0.01}}]
    write_study(tmp_path, {"four": [GAIN, GAIN]}, search={"trials": trials, "chosen": chosen})
    page = page_of(tmp_path)
    search = section(page, "search")
    assert cells_of(search, "four") == ["labels.count=5", "20.0 ± 0.0", "30.0 ± 0.0", "train.lr=0.01"]
    assert "2 seeds that no cell has" in search
    assert cells_of(section(page, "cost"), "search")[0] == "4"


def test_leaks_are_told_with_their_pairs_and_picture(tmp_path: Path) -> None:
    write_study(tmp_path / "a", {"four": [GAIN]}, {})
    assert "was not checked" in section(page_of(tmp_path / "a"), "leaks")
    pair = {"kind": "exact", "part": "pool", "name": "a.png", "scored_part": "test", "scored": "b.png"}
    pair |= {"alike": 1.0, "detail": "equal pixels", "allowed": True}
    record = {"checked": True, "trained": {"pool": 9}, "scored": {"test": 3}, "leaks": [pair] * 30}
    clean = {**record, "leaks": []}
    for seed in range(4):
        write_json(tmp_path / "a" / "cells" / f"four-0-0-{seed}" / "leaks.json", record)
        write_json(tmp_path / "a" / "cells" / f"scratch-0-0-{seed}" / "leaks.json", clean)
    write_picture(tmp_path / "a" / "cells" / "four-0-0-1" / "leaks.png")
    shown = section(page_of(tmp_path / "a"), "leaks")
    assert "4 runs: LEAK: 30 exact among 9 images of pool compared with 3 images of test" in shown
    assert "4 runs: No leak" in shown
    assert cells_of(shown, "pool: a.png") == ["test: b.png", "exact", "equal pixels", "yes"]
    assert "The worst 20 of 30 pairs." in shown
    assert shown.count("<img ") == 1


def test_at_most_eight_changed_images_and_none_from_elsewhere(tmp_path: Path) -> None:
    write_study(tmp_path / "a", {"four": [GAIN]}, {})
    write_picture(tmp_path / "secret.png")
    for number in range(9):
        write_picture(tmp_path / "a" / "changed" / f"{number}.png")
    (tmp_path / "a" / "changed" / "00_link.png").symlink_to(tmp_path / "secret.png")
    shown = section(page_of(tmp_path / "a"), "changed")
    assert shown.count("<img ") == 8
    assert "00_link" not in shown
    assert "The first 8 of 9." in shown


def test_what_is_missing_is_counted_above_and_listed_with_its_message(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN, NULL]}, status="running")
    change(tmp_path, "four-0-0-1", status="failed", message="exit 2: no room")
    change(tmp_path, "four-0-0-2", status="timeout", message="given up after 5:00")
    page = page_of(tmp_path)
    notice = re.search(r'<div class="notice">.*?</div>', page, re.S)[0]
    assert re.findall(r"<li>(.*?)</li>", notice) == ["1 cell: failed", "1 cell: timeout", "the study: killed"]
    assert cells_of(section(page, "missing"), "four-0-0-1") == ["failed", "exit 2: no room"]
    assert cells_of(section(page, "missing"), "four-0-0-2") == ["timeout", "given up after 5:00"]


def test_cost_adds_up(tmp_path: Path) -> None:
    pretrained = [cell("four-seed0", "four", {}, 0, None, seconds=600.0)]
    write_study(tmp_path, {"four": [GAIN]}, {}, pretrained=pretrained)
    write_cell(tmp_path / "pretrained" / "four-seed0", 0.2)
    change(tmp_path, "four-0-0-1", seconds=None)  # what it trained is known all the same
    cost = section(page_of(tmp_path), "cost")
    assert cells_of(cost, "pretraining four") == ["1", "10 min 0 s", "1 min 0 s", "20.0", "500 MiB", "10 min 0 s"]
    assert cells_of(cost, "scratch")[-1] == "6 min 0 s"
    assert cells_of(cost, "four")[-1] == "5 min 30 s"
    assert "Together 21 min 30 s of computing for 9 runs." in cost


def test_every_link_leads_to_something_wherever_the_page_is(tmp_path: Path) -> None:
    study = write_study(tmp_path / "a b#c", {"four": [GAIN]}, {})
    (study / "cells" / "four-0-0-1" / "report.html").write_text("")
    record = {"runs": {"sqlite:///x": "ab12"}, "key": "0" * 32, "folder": str(study / "cells" / "four-0-0-2")}
    write_json(study / "cells" / "four-0-0-2" / "tracking" / "mlflow.json", record)
    change(study, "four-0-0-3", id="not begun", status="waiting")
    for out in (None, tmp_path / "elsewhere" / "page.html"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        page = page_of(study, out)
        place = study if out is None else out.parent
        links = [own["href"] for _, own in read(section(page, "cells")).elements if "href" in own]
        assert len(links) == 7
        assert not re.search("[ #]", "".join(links)), "what a browser would read as something else"
        assert all((place / unquote(link)).exists() for link in links)
        assert sum(link.endswith("/four-0-0-1/report.html") for link in links) == 1
    assert cells_of(section(page, "cells"), "four-0-0-2")[-1] == "ab12"


# ---- safe, small, the same ----


def test_nothing_foreign_becomes_markup(tmp_path: Path) -> None:
    arms = {text: [GAIN, NULL] for text in HOSTILE}
    study = write_study(
        tmp_path, arms, {HOSTILE[0]: [*HOSTILE[:1], HOSTILE[1]]}, command=HOSTILE[2], config={"a": HOSTILE}
    )
    for seed, text in enumerate(HOSTILE[:4]):
        change(study, f"scratch-0-0-{seed}", status="failed", message=text)
    page = page_of(study)
    check_safe(page, ("cells/",))
    shown = text_of(page)
    assert all(text in shown for text in HOSTILE)
    assert "<script" not in page


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("arms", {"a": 1}),
        ("arms", [{"name": "four", "changes": {}}]),  # without the baseline
        ("level", 95),
        ("seeds", "0"),
        ("axes", {"labels.count": 5}),
        ("cells", [{"id": "a"}]),
        ("cells", [cell("../../a", "four", {}, 0, None)]),
        ("cells", [cell("a", "four", {}, 0, None, seconds="1")]),
        ("search", {"trials": [{}]}),
        ("leaks", {"checked": True}),
        ("config", [1]),
    ],
)
def test_a_strangers_study_is_one_line(tmp_path: Path, place: str, value: Any) -> None:
    about = {"baseline": "scratch", "axes": {}, "seeds": [0], "level": 0.95, "cells": []}
    about |= {"arms": [{"name": "scratch", "changes": {}}]}
    write_json(tmp_path / "study.json", about)
    assert [arm.label for arm in results.read(tmp_path).arms] == ["scratch"]
    write_json(tmp_path / "study.json", {**about, place: value})
    said = message_of(lambda: report([tmp_path]))
    assert "study.json: not as ssl-seg study writes it (" in said
    assert "\n" not in said


def test_ninety_six_cells_make_a_page_that_loads(tmp_path: Path) -> None:
    axes = {"labels.count": [5, 10, 20, 40]}
    write_study(tmp_path, {"four": [GAIN * 2] * 4, "five": [NULL * 2] * 4}, axes)
    start = time.monotonic()
    page = page_of(tmp_path)
    assert time.monotonic() - start < 15  # some 2 on a quiet machine
    assert len(page.encode()) < 3_000_000
    assert "All 96 cells" in page


def test_the_same_study_makes_the_same_bytes(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN, NULL]})
    assert page_of(tmp_path) == page_of(tmp_path)


def test_a_page_of_a_study_needs_no_torch(tmp_path: Path) -> None:
    write_study(tmp_path, {"four": [GAIN]}, {})
    script = (
        "import sys\nfrom ssl_seg.reports.study import report\n"
        f"report([{str(tmp_path)!r}])\n"
        "assert not {'torch', 'mlflow', 'timm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the command, and what it refuses ----


def test_the_command_knows_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study", {"four": [GAIN]}, {})

    def run(*words: str) -> int:
        return cli.run(lambda: cli.app(args=["report", *words], standalone_mode=False))

    assert run(str(study)) == 0
    assert capsys.readouterr().out.splitlines() == [headline_of(study), f"report: {study / 'report.html'}"]
    assert run(str(study), str(study / "cells")) == 2
    assert "is a study, which has a page of its own; name it alone" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a folder; name the file"):
        report([study], tmp_path)

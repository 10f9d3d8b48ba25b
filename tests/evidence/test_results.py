"""What a study has found, against figures made by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ssl_seg.evidence import results
from ssl_seg.evidence.comparison import Condition, Gain
from ssl_seg.evidence.results import Study
from ssl_seg.evidence.statistics import Interval, detectable
from ssl_seg.scores import IMAGES_FILE, ImageConfusions, Row, image_confusion_bytes, read_image_confusion
from tests.faults import message_of

CLASSES = ("ground", "disc")
COUNTS = (5, 10)
SEEDS = tuple(range(8))


def confusions(seed: int, shift: float) -> ImageConfusions:
    """Sixty images, so six blocks, whose share of right pixels goes up with `shift`."""
    random = np.random.default_rng(seed)
    rows = []
    for image in range(60):
        right = np.clip(random.normal(0.6 + shift, 0.05, 2), 0.01, 0.99) * 1000
        cells = np.array([right[0], 1000 - right[0], 1000 - right[1], right[1]]).astype(np.int64)
        rows.append(Row(image, f"frame_{image:03d}", np.arange(4), cells, cells // 10, ""))
    return ImageConfusions.from_rows(CLASSES, rows)


def write_study(folder: Path, num_starts: int = 2, **changes: Any) -> Path:
    """Scratch and two arms, one better by 5 points at 5 labels and by nothing at 10, one cell failed."""
    cells = []
    for count in COUNTS:
        for arm, shift in (("scratch", 0.0), ("good", 0.05 if count == 5 else 0.0), ("same", 0.0)):
            for seed in SEEDS:
                own = {"id": f"{arm}{count}s{seed}", "arm": arm, "condition": {"labels.count": count}, "seed": seed}
                failed = (arm, count, seed) == ("same", 10, 7)
                status = {"status": "failed", "message": "exit 2: no room"} if failed else {"status": "finished"}
                start = None if arm == "scratch" else f"two-seed{seed % num_starts}"
                cells.append({"message": "", "seconds": 60.0, **own, **status, "start": start})
                if not failed:
                    write_run(folder / "cells" / own["id"], seed, arm, shift)
    arms = [{"name": name, "changes": {}, "from_scratch": name == "scratch"} for name in ("good", "scratch", "same")]
    record = {"arms": arms, "baseline": "scratch", "axes": {"labels.count": COUNTS}, "seeds": SEEDS, "level": 0.95}
    (folder / "study.json").write_text(json.dumps({**record, "cells": cells, **changes}))
    return folder


def write_run(folder: Path, seed: int, arm: str, shift: float) -> None:
    folder.mkdir(parents=True)
    # Scores of a seed go up and down together; the arms differ by little beside it.
    found = confusions(seed, shift + 0.03 * np.sin(seed) + 0.002 * np.cos(7 * seed + len(arm)))
    scores = found.scores()
    named = {"miou": scores.miou, **{f"iou/{name}": iou for name, iou in zip(CLASSES, scores.iou, strict=True)}}
    (folder / "result.json").write_text(json.dumps({"steps": 4, "test": named, "val": {"miou": 0.1}}))
    (folder / "run.json").write_text(json.dumps({"stage": "finetune", "config": {}, "status": "finished"}))
    (folder / IMAGES_FILE).write_bytes(image_confusion_bytes({"test": found}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


def scores_in(folder: Path, arm: str, count: int, seeds: tuple[int, ...] = SEEDS) -> np.ndarray:
    paths = [folder / "cells" / f"{arm}{count}s{seed}" / "result.json" for seed in seeds]
    return np.array([json.loads(path.read_text())["test"]["miou"] for path in paths])


def gain_of(found: Study, arm: str, condition: Condition) -> Gain:
    return found.gain(found.arm(arm), "test/miou", condition)


def over_images(found: Study, gain: Gain) -> Interval | None:
    return found.over_images(gain.arm, gain.score, *gain.conditions)


def test_gains_are_paired_by_seed(folder: Path) -> None:
    found = results.read(folder)
    assert [arm.label for arm in found.arms] == ["scratch", "good", "same"]
    assert found.main_score == "test/miou"
    gain = gain_of(found, "good", (("labels.count", "5"),))
    differences = scores_in(folder, "good", 5) - scores_in(folder, "scratch", 5)
    assert gain.values == pytest.approx(differences.tolist())
    test = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (gain.interval.low, gain.interval.high) == pytest.approx((test.low, test.high))
    assert gain.p == pytest.approx(2 / 2**8)  # all eight of one sign
    assert gain.num_weights == 2


def test_a_failed_cell_takes_its_pair_along_and_no_other(folder: Path) -> None:
    found = results.read(folder)
    gain = gain_of(found, "same", (("labels.count", "10"),))
    assert gain.keys == SEEDS[:7]
    assert gain.p is None  # seven pairs
    differences = scores_in(folder, "same", 10, SEEDS[:7]) - scores_in(folder, "scratch", 10, SEEDS[:7])
    assert gain.values == pytest.approx(differences.tolist())
    assert found.arm("same").spread("test/miou", (("labels.count", "10"),)).n == 7


def test_the_interval_over_images_holds_the_mean_gain(folder: Path) -> None:
    found = results.read(folder)
    for gain in found.gains:
        images = over_images(found, gain)
        assert images.low < gain.mean < images.high


def test_pretrainings_that_serve_several_pairs_have_an_interval_of_their_own(tmp_path: Path) -> None:
    found = results.read(write_study(tmp_path, num_starts=4))
    gain = gain_of(found, "good", (("labels.count", "5"),))
    means = [np.mean([gain.values[seed] for seed in SEEDS if seed % 4 == start]) for start in range(4)]
    wanted = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (gain.over_starts.low, gain.over_starts.high) == pytest.approx((wanted.low, wanted.high))
    assert results.read(write_study(tmp_path / "two")).gains[0].over_starts is None
    assert results.read(write_study(tmp_path / "all", num_starts=8)).gains[0].over_starts is None


def test_p_and_the_mean_are_those_of_what_is_independent(tmp_path: Path) -> None:
    condition = (("labels.count", "5"),)
    own = gain_of(results.read(write_study(tmp_path / "own", num_starts=8)), "good", condition)
    assert own.p == pytest.approx(2 / 2**8)
    gain = gain_of(results.read(write_study(tmp_path / "three", num_starts=3)), "good", condition)
    assert gain.p is None, "three means say nothing exactly"
    means = [np.mean([gain.values[seed] for seed in SEEDS if seed % 3 == start]) for start in range(3)]
    assert gain.mean == pytest.approx(np.mean(means))
    assert (gain.over_starts.low + gain.over_starts.high) / 2 == pytest.approx(gain.mean)
    (row, *_) = results.gain_rows(results.read(tmp_path / "three"))
    assert (row["independent"], row["starts_low"]) == (3, gain.over_starts.low)
    assert row["detectable"] == pytest.approx(detectable(means))


def test_masks_corrected_between_two_starts_take_intervals_over_images_and_nothing_else(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    digests = {"scratch5s0": "new", "good5s0": "new", "scratch5s1": "old", "good5s1": "old", "same5s1": "old"}
    for name, digest in digests.items():
        run = folder / "cells" / name
        images = {part: replace(own, digest=digest) for part, own in read_image_confusion(run).items()}
        (run / IMAGES_FILE).write_bytes(image_confusion_bytes(images))
    found = results.read(folder)
    gain = gain_of(found, "good", (("labels.count", "5"),))
    assert (gain.n, over_images(found, gain)) == (8, None)
    results.write_tables(found)


def test_damaged_images_of_one_cell_take_its_intervals_over_images_and_nothing_else(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    (folder / "cells" / "good5s3" / IMAGES_FILE).write_bytes(b"no such file")
    found = results.read(folder)
    missing = [
        (gain.arm.label, *dict(*gain.conditions).values()) for gain in found.gains if over_images(found, gain) is None
    ]
    assert missing == [("good", "5")]
    assert len(found.faults) == 1
    assert "good5s3" in found.faults[0]
    results.write_tables(found)


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        ({"id": ".."}, "id"),
        ({"id": "."}, "id"),
        ({"condition": {"labels.count": "all"}}, "none of the axes"),
        ({"condition": {}}, "none of the axes"),
    ],
)
def test_cells_that_no_study_writes_are_one_line(edit: dict[str, Any], place: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    record = json.loads((folder / "study.json").read_text())
    record["cells"][0] |= edit
    (folder / "study.json").write_text(json.dumps(record))
    assert place in message_of(lambda: results.read(folder))


def test_cells_of_other_labelled_images_are_no_pair(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    for run in (folder / "cells").glob("*5s*"):
        (run / "split.json").write_text(json.dumps({"labelled": ["a"]}))
    (folder / "cells" / "good5s3" / "split.json").write_text(json.dumps({"labelled": ["b"]}))
    found = results.read(folder)
    assert gain_of(found, "good", (("labels.count", "5"),)).keys == (0, 1, 2, 4, 5, 6, 7)
    assert found.apart == ("good5s3: no pair with scratch5s3: their labelled images differ",)


def test_p_is_adjusted_for_all_comparisons_of_the_study(folder: Path) -> None:
    told = [gain for gain in results.read(folder).gains if gain.p is not None]
    assert len(told) == 3
    assert min(gain.p_holm for gain in told) == pytest.approx(3 * 2 / 2**8)
    assert all(gain.p_holm >= gain.p for gain in told)


PRIMARY = {"contrasts": {"good": "scratch", "same": "good"}, "at": {"labels.count": 5}}


def test_what_was_named_beforehand_is_measured_from_its_own_arm_and_corrected_alone(tmp_path: Path) -> None:
    found = results.read(write_study(tmp_path, config={"primary": PRIMARY}))
    good, same = found.contrasts
    at_five = np.array([scores_in(tmp_path, arm, 5) for arm in ("scratch", "good", "same")])
    assert good.gain.values == pytest.approx(at_five[1] - at_five[0])
    assert same.gain.values == pytest.approx(at_five[2] - at_five[1])
    assert [own.p_holm for own in (good, same)] == [2 * 2 / 2**8] * 2
    assert [gain.arm.label for gain in found.gains] == ["good", "same"] * 2  # all others are there as ever
    results.write_tables(found)
    rows = list(csv.DictReader((tmp_path / "primary.csv").read_text().splitlines()))
    assert [(row["arm"], row["from"], row["n"]) for row in rows] == [("good", "scratch", "8"), ("same", "good", "8")]
    assert float(rows[1]["gain"]) == pytest.approx((at_five[2] - at_five[1]).mean())


def test_over_conditions_that_are_left_open_what_was_named_is_their_mean(tmp_path: Path) -> None:
    found = results.read(write_study(tmp_path, config={"primary": {**PRIMARY, "at": {}}}))
    per_count = [scores_in(tmp_path, "good", count) - scores_in(tmp_path, "scratch", count) for count in COUNTS]
    assert found.contrasts[0].gain.values == pytest.approx(np.mean(per_count, axis=0))
    assert found.contrasts[1].gain.n == 7  # one cell of `same` has failed


def test_an_arm_that_there_is_not_is_no_part_of_what_was_named(tmp_path: Path) -> None:
    write_study(tmp_path, config={"primary": {"contrasts": {"best": "scratch"}, "at": {}}})
    assert "primary names an arm that there is not" in message_of(lambda: results.read(tmp_path))


def test_tables_are_tidy(folder: Path) -> None:
    found = results.read(folder)
    results.write_tables(found)
    cells = list(csv.DictReader((folder / "cells.csv").read_text().splitlines()))
    assert len(cells) == 2 * 3 * 8
    assert [row["message"] for row in cells if row["status"] != "finished"] == ["exit 2: no room"]
    assert float(cells[0]["test/miou"]) == scores_in(folder, "scratch", 5)[0]
    gains = list(csv.DictReader((folder / "gains.csv").read_text().splitlines()))
    assert {row["score"] for row in gains} == {"test/miou", "test/iou/ground", "test/iou/disc"}
    assert len(gains) == 2 * 2 * 3
    first = next(row for row in gains if row["arm"] == "good" and row["labels.count"] == "5")
    assert float(first["gain"]) == pytest.approx(found.gains[0].mean)


def test_what_is_no_study_is_one_line(tmp_path: Path) -> None:
    assert "is no study" in message_of(lambda: results.read(tmp_path))
    (tmp_path / "study.json").write_text('{"cells": [{"id": 3}]}')
    assert "not as ssl-seg study writes it" in message_of(lambda: results.read(tmp_path))

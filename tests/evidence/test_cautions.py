"""Classes that runs hardly predict: told of each run, of the arms of a comparison, and of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_seg.evidence import cautions, results
from ssl_seg.evidence.cautions import hardly_predicted, unpredicted_in_words
from ssl_seg.evidence.compare import compare
from ssl_seg.scores import SegmentationScores
from tests.evidence.test_results import write_study

CLASSES = ["ground", "membrane", "pole"]
# Of 1,000 pixels 780, 200 and 20; of the membrane never one is predicted, of the pole's 20 one.
LOST = [[780, 0, 0], [200, 0, 0], [20, 0, 0]]
FOUND = [[700, 70, 10], [50, 150, 0], [10, 0, 10]]


def record(matrix: list[list[int]], part: str = "test") -> dict[str, Any]:
    return {"classes": CLASSES, part: matrix}


def test_what_is_hardly_predicted_comes_with_its_share_of_the_pixels() -> None:
    assert hardly_predicted(record(LOST)) == {"membrane": 0.2, "pole": 0.02}
    assert hardly_predicted(record(FOUND)) == {}
    assert hardly_predicted(None) == {}
    assert hardly_predicted(record(LOST, "val")) == {"membrane": 0.2, "pole": 0.02}
    assert hardly_predicted({**record(LOST, "val"), "test": FOUND}) == {}, "the test images are what is told of"
    nothing = [[0, 0, 0]] * 3
    assert hardly_predicted(record(nothing)) == {}


def test_a_class_that_no_mask_shows_is_none_of_them() -> None:
    assert hardly_predicted(record([[980, 0, 20], [0, 0, 0], [0, 0, 0]])) == {}


@given(st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=3, max_size=3))
def test_their_iou_is_below_the_bound(matrix: list[list[int]]) -> None:
    found = hardly_predicted(record(matrix))
    scores = dict(zip(CLASSES, SegmentationScores.from_confusion(matrix).iou, strict=True))
    assert all(scores[name] < cautions.HARDLY for name in found)


def test_large_classes_are_told_with_their_share_and_small_ones_together() -> None:
    assert unpredicted_in_words(record(FOUND)) == ""
    told = unpredicted_in_words(record(LOST))
    assert told.startswith("hardly predicts 'membrane' (20 % of the scored pixels), 'pole' (below 5 %): train longer, ")
    many = {
        "classes": [str(number) for number in range(7)],
        "val": [[940 if not n else 10, *[0] * 6] for n in range(7)],
    }
    assert unpredicted_in_words(many).startswith("hardly predicts '1', '2', '3' and 3 more (below 5 %): ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of 47 runs that have a score: of the two arms at five labels half of the runs know no membrane."""
    write_study(tmp_path)
    for cell in (tmp_path / "cells").iterdir():
        lost = "5s" in cell.name and not cell.name.startswith("same") and int(cell.name[-1]) < 4
        (cell / "confusion.json").write_text(json.dumps(record(LOST if lost else FOUND)))
    return tmp_path


def test_a_study_says_how_many_runs_they_are(folder: Path) -> None:
    told = [line for line in cautions.cautions(results.read(folder)) if "hardly predict" in line]
    assert [line[:74] for line in told] == [
        "CAUTION: 8 of 47 runs hardly predict 'membrane' (20 % of the scored pixels",
        "8 of 47 runs hardly predict 'pole' (below 5 %), whose IoU is about 0 there",
    ]
    for cell in (folder / "cells").iterdir():
        (cell / "confusion.json").write_text(json.dumps(record(FOUND)))
    assert not [line for line in cautions.cautions(results.read(folder)) if "hardly" in line]


def test_compare_says_of_which_arm(folder: Path) -> None:
    found = compare([folder / "cells" / f"{arm}5s{seed}" for arm in ("scratch", "same") for seed in range(8)])
    told = [line for line in cautions.notes(found) if "hardly" in line]
    assert len(told) == 1
    assert "(4 of " in told[0]
    assert told[0].endswith("hardly predicts 'membrane' (20 % of the scored pixels), 'pole' (below 5 %)")

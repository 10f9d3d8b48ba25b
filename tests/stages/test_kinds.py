"""Kinds of image that are scored and not labelled: found where they are scored far worse, and only there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_seg.config import load
from ssl_seg.data.splits import Subset
from ssl_seg.data.workers import ALONE
from ssl_seg.datasets import Example
from ssl_seg.evidence.cautions import kinds_in_words
from ssl_seg.evidence.compare import compare
from ssl_seg.reports.runs import report
from ssl_seg.scores import ImageConfusions, Row
from ssl_seg.stages import kinds
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.setup import Options
from tests.small import POOL, Textured, finetuning

GOOD, BAD = (90, 10, 10, 90), (60, 40, 60, 40)  # pixels of two classes, truth by prediction: mIoU 0.82 and 0.33


def confusions(cells: list[tuple[int, ...]]) -> ImageConfusions:
    """Of images by the pixels in the cells of their matrix."""
    rows = []
    for index, own in enumerate(cells):
        there = np.flatnonzero(own)
        rows.append(Row(index, f"{index}.png", there, np.array(own)[there], np.zeros(len(there), int), ""))
    return ImageConfusions.from_rows(("ground", "disc"), rows)


def features(of_kind: list[int], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (10 * np.eye(4)[of_kind] + random.normal(0, 0.5, (len(of_kind), 4))).astype(np.float32)


def test_a_kind_without_a_label_that_scores_far_worse_is_found() -> None:
    of_kind = [0] * 20 + [1] * 6
    scored = confusions([GOOD] * 20 + [BAD] * 6)
    found = kinds.uncovered(features([0] * 5), features(of_kind, 1), scored, range(26))
    assert found is not None
    assert found.indices == tuple(range(20, 26))
    assert (found.miou, found.miou_of_others) == pytest.approx((0.330, 90 / 110), abs=1e-3)


@pytest.mark.parametrize(
    ("labelled", "of_kind", "cells"),
    [
        ([0, 0, 0, 0, 1], [0] * 20 + [1] * 6, [GOOD] * 20 + [BAD] * 6),  # one label is of that kind
        ([0] * 5, [0] * 20 + [1] * 6, [GOOD] * 26),  # no label is, and it does as well
        ([0] * 5, [0] * 20 + [1] * 2, [GOOD] * 20 + [BAD] * 2),  # two odd images
        ([0] * 5, [0] * 26, [GOOD] * 20 + [BAD] * 6),  # all are of one kind
        ([0] * 5, [1] * 26, [BAD] * 26),  # nothing else is scored to compare with
        ([0] * 5, [0] * 20 + [1] * 6, [GOOD] * 20 + [(190, 10, 0, 0)] * 6),  # a few pixels of an absent class
    ],
)
def test_no_word_where_there_is_nothing_to_be_said(
    labelled: list[int], of_kind: list[int], cells: list[tuple[int, ...]]
) -> None:
    scored = confusions(cells)
    assert kinds.uncovered(features(labelled), features(of_kind, 1), scored, range(len(of_kind))) is None


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_images_of_one_kind_with_scores_by_chance_give_no_alarm(seed: int) -> None:
    random = np.random.default_rng(seed)
    shares = random.uniform(0.5, 1.0, 60)
    scored = confusions([(int(90 * own), 100 - int(90 * own), 10, 90) for own in shares])
    assert kinds.uncovered(features([0] * 10, seed), features([0] * 60, seed + 1), scored, range(60)) is None


@dataclass(frozen=True)
class Mixed(Subset):
    """The last `dark` images of a data set are turned into negatives."""

    dark: int = 0

    def image(self, index: int) -> Example:
        example = super().image(index)
        pixels = example.image if index < len(self) - self.dark else 255 - example.image
        return Example(pixels, None, example.name)


def test_it_is_told_by_the_run_by_compare_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune(load(FinetuneConfig, finetuning(steps=1)), Options(tmp_path / "run", quiet=True)).folder
    assert not (run / "kinds.json").exists()  # three images have no kinds
    scored = Mixed(Textured(count=24, seed=3), tuple(range(24)), dark=6)
    matrices = confusions([GOOD] * 18 + [BAD] * 6)
    labelled = Textured(count=5, seed=4)
    record = kinds.look(labelled, {"test": (scored, matrices)}, ALONE, torch.device("cpu"))
    (run / "kinds.json").write_text(json.dumps(record))
    assert record["places"]["test"]["names"] == [scored.name(index) for index in range(24)]
    assert record["places"]["test"]["miou"] == pytest.approx(matrices.per_image_miou().tolist())
    named = record["uncovered"]["test"]["names"]
    assert set(named) <= {f"{index}.png" for index in range(18, 24)}
    (sentence,) = kinds_in_words(record)
    assert sentence.startswith(
        f"test: {len(named)} of 24 images are of a kind that none of the 5 labelled images shows ({named[0]}, "
    )
    assert sentence.endswith("their mIoU is 0.33, that of the others 0.82; ssl-seg select names images to label")
    from ssl_seg.reports.console import print_comparison

    print_comparison(compare([run]))
    assert sentence in capsys.readouterr().out
    page = report([run]).path.read_text()
    assert sentence[1:] in page
    assert "map of the images of scratch: 3 worst of test, 5 labelled, 24 test" in page


def test_a_run_that_is_scored_on_enough_images_notes_where_they_lie(tmp_path: Path) -> None:
    values = finetuning(steps=1)
    values["data"]["val"] = {**POOL, "count": 20, "seed": 6}
    run = finetune(load(FinetuneConfig, values), Options(tmp_path / "run", quiet=True)).folder
    record = json.loads((run / "kinds.json").read_text())
    assert {part: len(own["x"]) for part, own in record["places"].items()} == {"labelled": 4, "val": 20}
    assert record["uncovered"] == {}


def test_images_that_are_all_the_same_have_no_kinds() -> None:
    same = Subset(Textured(count=1), (0,) * 20)
    found = {"val": (same, confusions([GOOD] * 20))}
    record = kinds.look(Subset(Textured(count=1), (0,)), found, ALONE, torch.device("cpu"))
    assert record["uncovered"] == {}
    assert len(record["places"]["val"]["x"]) == 20

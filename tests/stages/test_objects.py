"""Objects against masks drawn by hand and scipy's labels, and one table of a folder made in two goes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from ssl_seg import cli, images
from ssl_seg.config import load
from ssl_seg.stages.objects import Objects, find_objects
from ssl_seg.stages.predict import PredictConfig, predict
from tests.faults import message_of
from tests.stages.test_predict import CUT, Bright, mend, model, of, photos

NAMES = ("ground", "leaf", "stem")
__all__ = ["model", "photos"]  # fixtures


def test_two_objects_by_hand() -> None:
    ids = np.zeros((8, 10), dtype=np.uint8)
    ids[1:3, 2:6] = 1
    ids[5:8, 0:2] = 1
    ids[3, 6] = 1  # touches the first at its corner
    ids[0, 9] = 2
    wanted = Objects(smallest=2, classes=("leaf", "stem"))
    assert [tuple(one) for one in find_objects(ids, "a.png", NAMES, wanted)] == [
        ("a.png", "leaf", 1, 9, 2, 1, 7, 4, 3.78, 1.67),
        ("a.png", "leaf", 2, 6, 0, 5, 2, 8, 0.5, 6.0),
    ]
    by_edges = find_objects(ids, "a.png", NAMES, Objects(smallest=1, neighbours=4))
    assert [one.area for one in by_edges if one.of_class == "leaf"] == [8, 1, 6]
    assert [one.area for one in by_edges if one.of_class == "stem"] == [1]


@settings(max_examples=40, deadline=None)
@given(
    ids=arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 2)),
    neighbours=st.sampled_from([8, 4]),
    smallest=st.integers(1, 6),
)
def test_objects_are_those_that_scipy_finds(ids: np.ndarray, neighbours: int, smallest: int) -> None:
    wanted = load(Objects, {"smallest": smallest, "neighbours": neighbours})
    structure = np.ones((3, 3)) if neighbours == 8 else None
    expected = set()
    for class_id, name in enumerate(NAMES):
        labels = np.zeros(ids.shape, dtype=np.int32)
        ndimage.label(ids == class_id, structure, output=labels)
        for number, place in enumerate(ndimage.find_objects(labels), start=1):
            own = labels == number
            rows, columns = place
            if own.sum() >= smallest:
                centre = tuple(round(float(middle), 2) for middle in np.argwhere(own).mean(axis=0)[::-1])
                expected.add((name, int(own.sum()), columns.start, rows.start, columns.stop, rows.stop, *centre))
    found = find_objects(ids, "a", NAMES, wanted)
    assert {(one.of_class, one.area, *one[4:]) for one in found} == expected
    for name in NAMES:
        numbers = [one.number for one in found if one.of_class == name]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_folder_made_in_two_goes_has_one_table(
    model: Bright, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["predict", "model=m", f"data.images={{type: folder, images: {photos}}}", "workers=0", "device=cpu"]
    command = [*words, "objects=true", "--out", str(out)]
    assert cli.run(lambda: cli.app(args=command, standalone_mode=False)) == 2
    assert [row["image"] for row in rows_of(out)] == ["a.png", "deep/c.png"]
    mend(photos)
    assert cli.run(lambda: cli.app(args=command, standalone_mode=False)) == 0
    assert model.seen == 3
    assert [(row["image"], row["class"], row["area"]) for row in rows_of(out)] == [
        ("a.png", "bright", "108"), (CUT, "bright", "120"), ("deep/c.png", "bright", "132")
    ]  # fmt: skip
    assert json.loads((out / "objects.json").read_text()) == {
        "smallest": 16, "neighbours": 8, "classes": [], "images": 3,
        "per_class": {
            "dark": {"objects": 0, "images": 0, "pixels": 0},
            "bright": {"objects": 3, "images": 3, "pixels": 360},
        },
    }  # fmt: skip
    assert f"objects (0 dark, 3 bright): {out}/objects.csv" in capsys.readouterr().out


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "objects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_none_are_listed_unasked_and_unknown_classes_are_refused(model: Bright, photos: Path, tmp_path: Path) -> None:
    mend(photos)
    assert "objects" not in of(photos).dump()
    assert predict(of(photos), tmp_path / "plain").objects is None
    assert not list((tmp_path / "plain").glob("objects.*"))
    asked = load(PredictConfig, {**of(photos).dump(), "objects": {"classes": ["leaf"]}})
    said = message_of(lambda: predict(asked, tmp_path / "out"))
    assert said == "objects.classes: the model knows no 'leaf'; it tells dark, bright apart"
    assert images.read_mask(tmp_path / "plain" / "masks" / "a.png").any()

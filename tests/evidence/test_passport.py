"""Passports: what they say, what keeps scores apart, and that every stored score follows from its matrices."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_seg.config import UserError
from ssl_seg.evidence.passport import differing, passport_of, passports_in, verify, verify_all
from ssl_seg.scores import AVERAGES, IMAGES_FILE, Average, ImageConfusions, Row, image_confusion_bytes
from ssl_seg.tracking.server import from_tags, to_tags
from tests.faults import message_of

CLASSES = ("road", "sky", "never")


def scored(seed: int = 0, count: int = 5, classes: tuple[str, ...] = CLASSES, images: str = "a") -> ImageConfusions:
    """What a model with that seed takes some images for; the last class occurs nowhere."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        matrix = random.integers(0, 900, (len(classes), len(classes)))
        matrix[-1] = matrix[:, -1] = 0
        cell = np.flatnonzero(matrix)
        pixels = matrix.ravel()[cell]
        rows.append(Row(index, f"{images}_{index}", cell, pixels, pixels // 3, f"digest {images} {index}"))
    return ImageConfusions.from_rows(classes, rows)


def write_scored(
    folder: Path, parts: dict[str, ImageConfusions], averages: Sequence[Average] = (), **record: Any
) -> Path:
    """A finished run with these scores, as finetune writes it."""
    folder.mkdir(parents=True)
    passports = {part: passport_of(found).dump() for part, found in parts.items()}
    result = {"steps": 5, **{part: found.named(averages) for part, found in parts.items()}, "passport": passports}
    classes = next(iter(parts.values())).class_names
    summed = {part: found.total().tolist() for part, found in parts.items()}
    write_json(folder / "run.json", {"stage": "finetune", "status": "finished", "config": {}, **record})
    write_json(folder / "result.json", result)
    write_json(folder / "confusion.json", {"classes": classes, **summed})
    (folder / IMAGES_FILE).write_bytes(image_confusion_bytes(parts))
    return folder


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    write_json(path, values)


def test_a_passport_says_what_a_score_means() -> None:
    found = scored()
    said = passport_of(found, (240, 320)).dump()
    assert json.loads(json.dumps(said)) == said
    assert said["classes"] == list(CLASSES)
    assert (said["images"], said["split"], said["resize"], said["ignore"]) == (5, found.digest, [240, 320], 255)
    assert {"averaging", "absent", "resolution", "band", "definition", "software"} <= said.keys()


@given(st.integers(0, 10_000), st.integers(0, 12))
def test_every_score_is_recomputed_to_a_billionth(seed: int, count: int) -> None:
    found = scored(seed, count)
    summed = sum((found.total([index]) for index in range(count)), np.zeros((3, 3), dtype=np.int64))
    np.testing.assert_array_equal(summed, found.total())
    again = json.loads(json.dumps(found.named()))
    for name, value in found.named().items():
        assert again[name] == value, "and JSON keeps every digit"


def test_a_run_is_verified_image_by_image_and_summed(tmp_path: Path) -> None:
    run = write_scored(tmp_path / "run", {"val": scored(0), "test": scored(1, 3)})
    found = verify(run)
    figures = 3 + len(CLASSES)  # and that of the band, from images alone
    assert found.figures == 2 * (figures + 1), "two parts; each figure counts once, by whatever it is checked"
    assert found.largest <= 1e-9
    assert found.without_passport == ()


def test_averages_are_verified_where_there_are_some(tmp_path: Path) -> None:
    run = write_scored(tmp_path / "run", {"val": scored(0)}, averages=AVERAGES)
    assert verify(run).figures == 3 + len(CLASSES) + 1 + 6 * len(AVERAGES)
    change(run / "result.json", lambda result: result["val"].update({"macro/f1": 0.5}))
    with pytest.raises(UserError, match=r"result.json says val/macro/f1 = 0.5, its confusion matrices say"):
        verify(run)


def spoil_score(run: Path) -> None:
    change(run / "result.json", lambda result: result["val"].update(miou=result["val"]["miou"] + 1e-8))


def spoil_band(run: Path) -> None:
    change(run / "result.json", lambda result: result["val"].update({"band/miou": 0.5}))


def lose_score(run: Path) -> None:
    change(run / "result.json", lambda result: result["val"].update({"iou/sky": None}))


def invent_score(run: Path) -> None:
    change(run / "result.json", lambda result: result["val"].update({"iou/never": 0.5}))


def add_score(run: Path) -> None:
    change(run / "result.json", lambda result: result["val"].update({"iou/cat": 0.5}))


def score_nan(run: Path) -> None:
    change(run / "result.json", lambda result: result["val"].update(miou=math.nan))


def spoil_sum(run: Path) -> None:
    change(run / "confusion.json", lambda summed: summed["val"][0].__setitem__(1, 7))


def lose_sum(run: Path) -> None:
    change(run / "confusion.json", lambda summed: summed.pop("val"))


def lose_images(run: Path) -> None:
    (run / IMAGES_FILE).unlink()


def other_images(run: Path) -> None:
    (run / IMAGES_FILE).write_bytes(image_confusion_bytes({"val": replace(scored(), digest="0" * 64)}))


def other_number(run: Path) -> None:
    change(run / "result.json", lambda result: result["passport"]["val"].update(images=6))


def other_rule(run: Path) -> None:
    change(run / "result.json", lambda result: result["passport"]["val"].update(ignore=0))


def later_definition(run: Path) -> None:
    change(run / "result.json", lambda result: result["passport"]["val"].update(definition=99))


def no_scores(run: Path) -> None:
    write_json(run / "result.json", {"steps": 5})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_score, "val/miou = "),
        (spoil_band, "val/band/miou = 0.5"),
        (lose_score, "val/iou/sky = nothing"),
        (invent_score, "val/iou/never = 0.5, its confusion matrices say nothing"),
        (add_score, "val/iou/cat follows from no confusion matrix"),
        (score_nan, "val/miou = nan"),
        (spoil_sum, "confusion.json is not the sum"),
        (lose_sum, "has no matrices of val"),
        (lose_images, f"{IMAGES_FILE}: is not there"),
        (other_images, "the passport of val says another split"),
        (other_number, "the passport of val says another images"),
        (other_rule, "the passport of val says another ignore"),
        (later_definition, "by definition 99"),
        (no_scores, "has no segmentation scores"),
    ],
)
def test_a_score_that_does_not_follow_is_named(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    run = write_scored(tmp_path / "run", {"val": scored()})
    spoil(run)
    message = message_of(lambda: verify(run))
    assert said in message
    assert str(run) in message


def test_a_run_without_a_passport_is_verified_too(tmp_path: Path) -> None:
    run = write_scored(tmp_path / "run", {"val": scored()})
    change(run / "result.json", lambda result: result.pop("passport"))
    assert verify(run).largest <= 1e-9
    assert verify(run).without_passport == ("val",), "nothing says which images, and whoever verifies must know"
    assert passports_in(json.loads((run / "result.json").read_text())) == {"val": None}


def test_of_many_runs_the_good_ones_are_told_before_the_first_bad_one(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_scored(tmp_path / name, {"val": scored()})
    write_json(tmp_path / "c" / "run.json", {"stage": "finetune", "status": "killed", "config": {}})
    spoil_score(tmp_path / "a")
    spoil_score(tmp_path / "d")
    told = []
    with pytest.raises(UserError, match=r"a: result.json says .* \(and 1 more runs\)"):
        told.extend(run.name for run, _ in verify_all([tmp_path]))
    assert told == ["b"], "c has not finished"
    assert "no finished run" in message_of(lambda: list(verify_all([tmp_path / "c"])))


def both(one: ImageConfusions, other: ImageConfusions) -> list[str]:
    return differing({"val": passport_of(one).dump()}, {"val": passport_of(other).dump()})


def test_the_same_images_and_definition_are_ranked_whatever_the_model_and_its_input() -> None:
    assert both(scored(0), scored(1)) == []
    small, large = (passport_of(scored(), size).dump() for size in ((24, 32), (48, 64)))
    assert differing({"val": small}, {"val": {**large, "software": "9.9"}}) == []
    assert differing({"val": small}, {"test": passport_of(scored(images="b")).dump()}) == [], "no score in common"


def test_what_differs_is_named() -> None:
    assert both(scored(), scored(images="b")) == ["val: split"]
    assert both(scored(count=4), scored()) == ["val: images, split"]
    assert both(scored(), replace(scored(), class_names=("road", "sky", "other"))) == ["val: classes"]
    one, other = {"val": passport_of(scored()).dump()}, {"val": {**passport_of(scored()).dump(), "new": 1}}
    assert differing(one, other) == ["val: new"], "a later version may know more"
    assert differing(one, {"val": None})[0].startswith("val: passport")
    assert differing({"val": None}, {"val": None}) == []


def test_mlflow_s_tags_tell_the_same_apart() -> None:
    def tagged(found: ImageConfusions) -> dict[str, Any]:
        result = {"val": found.named(), "passport": {"val": passport_of(found).dump()}}
        return from_tags(to_tags(result), [f"val/{name}" for name in found.named()])

    assert differing(tagged(scored(0)), tagged(scored(1))) == []
    assert differing(tagged(scored()), tagged(scored(images="b"))) == ["val: split"]
    many = tuple(f"a class with quite a long name, number {index}" for index in range(2000))
    of_many = {"val": {"miou": 0.5}, "passport": {"val": {**passport_of(scored()).dump(), "classes": list(many)}}}
    assert len(to_tags(of_many)["passport.val"]) < 2000
    assert from_tags({}, ["val/miou", "val/iou/road", "val/band/miou"]) == {"val": None}
    for text in ("{", "3"):
        assert "is no passport" in message_of(lambda text=text: from_tags({"passport.val": text}, ["val/miou"]))


def test_it_needs_no_torch() -> None:
    script = "import sys\nfrom ssl_seg.evidence import compare, passport\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

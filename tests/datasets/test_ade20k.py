"""ADE20K's 150 classes by the layout of its archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_seg.config import load
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.ade20k import CLASSES, Ade20k
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.testing import check_dataset
from tests.faults import message_of

SIZE = (20, 26)
HEADER = "Idx\tRatio\tTrain\tVal\tStuff\tName"


def put_ade20k(root: Path) -> Path:
    """What the archive unpacks to, with a table of made-up names in the form of the publisher's."""
    random = np.random.default_rng(0)
    rows = [f"{number}\t0.01\t100\t10\t{number % 2}\tthing {number}, matter {number}   " for number in range(1, 151)]
    rows[3] = "4\t0.01\t100\t10\t1\tscreen, silver screen"
    rows[4] = "5\t0.01\t100\t10\t1\tscreen, crt"
    root.mkdir(parents=True, exist_ok=True)
    (root / "objectInfo150.txt").write_text("\n".join([HEADER, *rows, ""]))
    for part, count in (("training", 3), ("validation", 2)):
        (root / "images" / part).mkdir(parents=True)
        (root / "annotations" / part).mkdir(parents=True)
        for number in range(count, 0, -1):
            name = f"ADE_{part[:5]}_{number:08d}"
            image = Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
            image.save(root / "images" / part / f"{name}.jpg")
            ids = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 151
            Image.fromarray(np.roll(ids, number).astype(np.uint8)).save(root / "annotations" / part / f"{name}.png")
    return root


@pytest.mark.parametrize(("split", "count"), [("train", 3), ("val", 2)])
@pytest.mark.parametrize("labels", [150, None])
def test_it_conforms(split: str, count: int, labels: int | None, tmp_path: Path) -> None:
    ade = Ade20k(root=str(put_ade20k(tmp_path)), split=split, labels=labels)
    check_dataset(ade)
    names = [ade.name(index) for index in range(len(ade))]
    assert names == sorted(names)
    assert len(names) == count
    assert len(ade.class_names) == (labels or 0)
    assert load(Dataset, ade.dump()) == ade


def test_stored_ids_are_one_more_and_0_does_not_count(tmp_path: Path) -> None:
    put_ade20k(tmp_path)
    stored = np.asarray(Image.open(tmp_path / "annotations" / "training" / "ADE_train_00000001.png")).astype(int)
    label = Ade20k(root=str(tmp_path)).label(0)
    np.testing.assert_array_equal(label, np.where(stored == 0, 255, stored - 1))


def test_classes_are_named_by_the_first_of_their_names(tmp_path: Path) -> None:
    names = Ade20k(root=str(put_ade20k(tmp_path))).class_names
    assert names[:3] == ("thing 1", "thing 2", "thing 3")
    assert names[3:5] == ("screen, silver screen", "screen, crt"), "the whole, where the first names two"
    assert len(set(names)) == CLASSES


def test_fewer_images_than_published_are_told(tmp_path: Path) -> None:
    (note,) = Ade20k(root=str(put_ade20k(tmp_path))).notes()
    assert note == f"{tmp_path}: 3 images of this split of ade20k are there, of 20,210 that were published"


def test_what_is_missing_or_strange_is_one_line(tmp_path: Path) -> None:
    said = message_of(lambda: len(Ade20k(root=str(tmp_path))))
    assert said.startswith(
        f"{tmp_path}: no folder images/training in it, as ade20k has; unpack ADEChallengeData2016.zip"
    )
    put_ade20k(tmp_path)
    Image.new("L", (SIZE[1], SIZE[0]), 151).save(tmp_path / "annotations" / "training" / "ADE_train_00000001.png")
    assert "is no mask of ade20k, for it holds ids 151" in message_of(lambda: Ade20k(root=str(tmp_path)).read(0))
    table = tmp_path / "objectInfo150.txt"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[:100]))
    assert "is no table of 150 classes with their names" in message_of(lambda: Ade20k(root=str(tmp_path)).class_names)
    table.write_text("\n".join([rows[0], rows[2], rows[1], *rows[3:]]))
    assert "is no table of 150 classes with their names" in message_of(lambda: Ade20k(root=str(tmp_path)).class_names)
    table.unlink()
    assert "it names the classes; unpack ADEChallengeData2016.zip anew, or give labels: null" in message_of(
        lambda: Ade20k(root=str(tmp_path)).class_names
    )
    check_dataset(Ade20k(root=str(tmp_path), labels=None))


def test_the_recipe_loads() -> None:
    config = load(FinetuneConfig, ["ade20k_labelled", "data.labelled.root=a", "data.val.root=a"])
    assert config.data.labelled == Ade20k(root="a", split="train")
    assert config.data.val == Ade20k(root="a", split="val")

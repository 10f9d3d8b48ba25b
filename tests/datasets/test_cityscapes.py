"""Cityscapes by its own layout, beside torchvision's class on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from ssl_seg.config import load
from ssl_seg.data.loading import Whole
from ssl_seg.datasets import Dataset, numbering
from ssl_seg.datasets.cityscapes import NAMES, OFFICIAL, Cityscapes
from ssl_seg.images import write_image, write_mask
from ssl_seg.stages.evaluate import EvaluateConfig, evaluate
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.testing import check_dataset
from ssl_seg.weights.export import build_model, export_model
from tests.faults import message_of
from tests.small import MODEL

TABLE = [own for own in torchvision.datasets.Cityscapes.classes if own.id >= 0]
SIZE = (17, 36)
FRAMES = {
    "train": ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "zurich/zurich_000000_000019"),
    "val": ("frankfurt/frankfurt_000000_000294",),
    "test": ("berlin/berlin_000000_000019", "berlin/berlin_000001_000019"),
    "train_extra": ("bad-honnef/bad-honnef_000000_000000",),
}
MASKS = {"gtFine": ("train", "val", "test"), "gtCoarse": ("train", "val", "train_extra")}


def put_cityscapes(root: Path) -> Path:
    """What the archives unpack to: the test split with the publisher's dummies."""
    random = np.random.default_rng(0)
    for split, frames in FRAMES.items():
        for frame in frames:
            image = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            write_image(root / "leftImg8bit" / split / f"{frame}_leftImg8bit.png", image)
    for kind, splits in MASKS.items():
        for split in splits:
            for frame in FRAMES[split]:
                ids = random.permutation(np.arange(SIZE[0] * SIZE[1]) % 34).astype(np.uint8).reshape(SIZE)
                ids = ids * (split != "test") * (ids % 2 if kind == "gtCoarse" else 1)
                start = root / kind / split / f"{frame}_{kind}"
                write_mask(Path(f"{start}_labelIds.png"), ids)
                write_mask(Path(f"{start}_instanceIds.png"), ids.astype(np.uint16) * 1000)
                write_image(Path(f"{start}_color.png"), np.dstack([ids] * 3))
                Path(f"{start}_polygons.json").write_text("{}")
    return root


def names_of(dataset: Dataset) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


@pytest.mark.parametrize(
    ("split", "annotations"),
    [("train", "fine"), ("val", "fine"), ("train", "coarse"), ("val", "coarse"), ("train_extra", "coarse")],
)
@pytest.mark.parametrize("labels", [19, 34])
def test_it_conforms(split: str, annotations: str, labels: int, tmp_path: Path) -> None:
    root = str(put_cityscapes(tmp_path))
    frames = Cityscapes(root=root, split=split, annotations=annotations, labels=labels)
    check_dataset(frames)
    assert names_of(frames) == [f"{split}/{name}_leftImg8bit.png" for name in FRAMES[split]]
    assert len(frames.class_names) == labels
    assert load(Dataset, frames.dump()) == frames


@pytest.mark.parametrize("split", list(FRAMES))
def test_every_split_is_a_pool_without_any_mask(split: str, tmp_path: Path) -> None:
    put_cityscapes(tmp_path)
    for kind in MASKS:
        (tmp_path / kind).rename(tmp_path / f"not_{kind}")
    pool = Cityscapes(root=str(tmp_path), split=split)
    assert pool.image(0).image.shape == (*SIZE, 3)
    (note,) = pool.notes(with_labels=False)
    assert note.endswith(f"of {OFFICIAL[split]:,} that were published")
    unlabelled = Cityscapes(root=str(tmp_path), split=split, labels=None)
    check_dataset(unlabelled)
    assert unlabelled.class_names == ()
    assert unlabelled.notes() == (note,)


def test_the_classes_are_those_of_the_publisher() -> None:
    assert tuple(own.name for own in TABLE) == NAMES
    assert [own.id for own in TABLE] == list(range(34))
    by_train_id = {own.train_id: own.name for own in TABLE if own.train_id != 255}
    assert Cityscapes(root="r").class_names == tuple(by_train_id[number] for number in range(19))
    assert Cityscapes(root="r", labels=34).class_names == NAMES


@pytest.mark.parametrize(
    ("split", "annotations"), [("train", "fine"), ("val", "fine"), ("train", "coarse"), ("train_extra", "coarse")]
)
def test_frames_and_masks_are_torchvision_s(split: str, annotations: str, tmp_path: Path) -> None:
    root = str(put_cityscapes(tmp_path))
    theirs = torchvision.datasets.Cityscapes(root, split=split, mode=annotations, target_type="semantic")
    train_id = np.array([own.train_id for own in TABLE])
    by_name = {Path(path).name: theirs[index] for index, path in enumerate(theirs.images)}
    assert len(by_name) == len(FRAMES[split])
    for labels in (19, 34):
        ours = Cityscapes(root=root, split=split, annotations=annotations, labels=labels)
        assert len(ours) == len(theirs)
        for index in range(len(ours)):
            example = ours.read(index)
            image, mask = by_name[Path(example.name).name]
            np.testing.assert_array_equal(example.image, np.asarray(image))
            ids = np.asarray(mask)
            np.testing.assert_array_equal(example.label, ids if labels == 34 else train_id[ids])


def test_a_city_is_kept_together_and_frames_of_a_drive_are_numbered(tmp_path: Path) -> None:
    frames = Cityscapes(root=str(put_cityscapes(tmp_path)))
    assert [frames.sequence(index) for index in range(3)] == ["aachen", "aachen", "zurich"]
    assert numbering(frames.name(1)) == ("aachen/aachen_000001_#_leftImg8bit", 19)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"split": "test"}, "split test has no public labels, its masks are dummies; score on split val"),
        ({"split": "test", "annotations": "coarse"}, "split test has no public labels"),
        ({"split": "train_extra"}, "split train_extra has no fine masks; write annotations: coarse"),
    ],
)
def test_masks_that_are_none_are_refused(fields: dict[str, str], words: str, tmp_path: Path) -> None:
    frames = load(Dataset, {"type": "cityscapes", "root": str(put_cityscapes(tmp_path)), **fields})
    assert frames.image(0).label is None
    assert frames.greys_read() == {}
    for ask in (lambda: frames.label(0), lambda: frames.read(0), frames.notes):
        message = message_of(ask)
        assert message.startswith(f"{tmp_path}: {words}")


def test_nothing_is_scored_on_the_test_split(tmp_path: Path) -> None:
    put_cityscapes(tmp_path / "cityscapes")
    model = build_model(load(FinetuneConfig, {"data": {"labelled": "textured"}, "model": MODEL}).model, NAMES)
    export_model(tmp_path / "run", model, {**MODEL}, {"resize": None})
    test = {"type": "cityscapes", "root": f"{tmp_path}/cityscapes", "split": "test", "labels": 34}
    config = load(EvaluateConfig, {"model": f"{tmp_path}/run/model", "data": {"test": test}, "workers": 0})
    assert "split test has no public labels" in message_of(lambda: evaluate(config))


def test_a_missing_mask_is_told_before_it_is_read(tmp_path: Path) -> None:
    put_cityscapes(tmp_path)
    gone = tmp_path / "gtFine" / "train" / "zurich" / "zurich_000000_000019_gtFine_labelIds.png"
    gone.unlink()
    frames = Cityscapes(root=str(tmp_path))
    message = message_of(frames.notes)
    assert (
        f"{tmp_path}: no mask for 1 of the 3 images (gtFine/train/zurich/{gone.name}); unpack gtFine_train" in message
    )
    assert message_of(lambda: frames.label(0)) == message
    coarse = Cityscapes(root=str(tmp_path), annotations="coarse")
    check_dataset(coarse)


def test_what_is_missing_is_told_with_its_archive(tmp_path: Path) -> None:
    message = message_of(lambda: len(Cityscapes(root=str(tmp_path))))
    said = (
        f"{tmp_path}: no folder leftImg8bit/train in it, as cityscapes has; unpack leftImg8bit_trainvaltest.zip there"
    )
    assert message.startswith(said)
    (tmp_path / "leftImg8bit_trainextra.zip").touch()
    extra = Cityscapes(root=str(tmp_path), split="train_extra")
    assert "unpack leftImg8bit_trainextra.zip, which lies there" in message_of(lambda: len(extra))
    (tmp_path / "leftImg8bit" / "val" / "ulm").mkdir(parents=True)
    empty = message_of(lambda: len(Cityscapes(root=str(tmp_path), split="val")))
    assert empty.startswith(f"{tmp_path}/leftImg8bit/val: no frame in it (*_leftImg8bit.png)")


def test_other_files_are_left_out_and_told(tmp_path: Path) -> None:
    put_cityscapes(tmp_path)
    aachen = tmp_path / "leftImg8bit" / "train" / "aachen"
    write_image(aachen / "preview.png", np.zeros((4, 4, 3), dtype=np.uint8))
    (aachen / "._aachen_000000_000019_leftImg8bit.png").write_bytes(b"\0\5\26\7")
    (aachen / "license.txt").touch()
    frames = Cityscapes(root=str(tmp_path))
    assert len(frames) == 3
    first, second = frames.notes()
    assert first.startswith(f"{tmp_path}/leftImg8bit/train: files that are no frames of Cityscapes (*_leftImg8bit.png)")
    assert first.endswith("which are left out: 1 (aachen/preview.png)")
    assert second == f"{tmp_path}: 3 images of this split of cityscapes are there, of 2,975 that were published"


def test_ids_that_are_none_are_refused(tmp_path: Path) -> None:
    put_cityscapes(tmp_path)
    frames = Cityscapes(root=str(tmp_path))
    path = tmp_path / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    write_mask(path, np.full(SIZE, 34, dtype=np.uint8))
    message = message_of(lambda: frames.read(0))
    assert message.startswith(f"{path}: is no mask of cityscapes, for it holds ids 34; unpack gtFine_trainvaltest.zip")


def test_frames_are_brought_to_another_size_and_masks_are_not(tmp_path: Path) -> None:
    """Half the width and height, as many networks are trained on Cityscapes, by `data.resize` as of any data set."""
    frames = Cityscapes(root=str(put_cityscapes(tmp_path)))
    packed = Whole(frames, (8, 18))[0]
    assert packed.image.shape == (8, 18, 3)
    np.testing.assert_array_equal(packed.label, frames.label(0))


def test_the_recipe_loads() -> None:
    config = load(FinetuneConfig, ["cityscapes_labelled", "data.labelled.root=a", "data.val.root=a"])
    assert config.data.labelled == Cityscapes(root="a", labels=34)
    assert config.data.val == Cityscapes(root="a", split="val", labels=34)
    assert config.augment.crop == (512, 512)
    segnet = {"encoder": {"type": "segnet"}, "decoder": {"type": "segnet", "aspp": [6, 12, 18]}}
    assert load(FinetuneConfig, {**config.dump(), "model": segnet}).model.encoder.type == "segnet"


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"split": "trainval"}, "split"), ({"labels": 20}, "labels"), ({"annotations": "exact"}, "annotations")],
)
def test_a_wrong_key_is_one_line(fields: dict[str, Any], key: str) -> None:
    assert message_of(lambda: load(Dataset, {"type": "cityscapes", "root": "r", **fields})).startswith(key)

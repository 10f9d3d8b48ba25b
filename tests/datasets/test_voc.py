"""PASCAL VOC 2012 by its own layout, beside torchvision's class on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCSegmentation
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

from ssl_seg.config import load
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.voc import CLASSES, OFFICIAL, Voc
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.testing import check_dataset
from tests.faults import message_of

SIZE = (24, 30)
LISTS = {
    "train": ("2007_000032", "2007_000039"),
    "val": ("2007_000033",),
    "trainval": ("2007_000032", "2007_000033", "2007_000039"),
    "trainaug": ("2007_000032", "2007_000039", "2008_000002"),
}


def palette() -> list[int]:
    """The publisher's colours: the bits of an index, three by three from the lowest, into red, green and blue."""
    colours = []
    for index in range(256):
        bits = [index >> number & 1 for number in range(8)]
        colours += [sum(bit << 7 - place for place, bit in enumerate(bits[part::3])) for part in range(3)]
    return colours


def put_voc(root: Path) -> Path:
    """What the archive unpacks to, and trainaug's list and masks beside it, which are grey."""
    random = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "SegmentationObject", "Annotations"):
        (root / folder).mkdir(parents=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in LISTS.items():
        (lists / f"{split}.txt").write_text("\n".join([*names, ""]))
        for name in names:
            ids = random.integers(0, 21, (SIZE[0] // 6, SIZE[1] // 6)).repeat(6, axis=0).repeat(6, axis=1)
            ids[::7] = 255  # outlines
            mask = Image.fromarray(ids.astype(np.uint8))
            image = Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
            image.save(root / "JPEGImages" / f"{name}.jpg")
            mask.save(root / "SegmentationClassAug" / f"{name}.png")
            if split != "trainaug":
                mask.putpalette(palette())
                mask.save(root / "SegmentationClass" / f"{name}.png")
    return root


def test_the_palette_is_the_publisher_s() -> None:
    colours = np.array(palette()).reshape(256, 3).tolist()
    assert colours[1:4] == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[15] == [192, 128, 128]
    assert colours[255] == [224, 224, 192]


@pytest.mark.parametrize("split", LISTS)
@pytest.mark.parametrize("labels", [21, None])
def test_it_conforms(split: str, labels: int | None, tmp_path: Path) -> None:
    voc = Voc(root=str(put_voc(tmp_path)), split=split, labels=labels)
    check_dataset(voc)
    assert [voc.name(index) for index in range(len(voc))] == [f"{name}.jpg" for name in LISTS[split]]
    assert voc.class_names == (CLASSES if labels else ())
    assert load(Dataset, voc.dump()) == voc


@pytest.mark.filterwarnings("ignore:.*unclosed file", "ignore:Exception ignored in")  # torchvision's
def test_images_and_masks_are_torchvision_s(tmp_path: Path) -> None:
    put_voc(tmp_path / "VOCdevkit" / "VOC2012")
    for split in ("train", "val", "trainval"):
        theirs = VOCSegmentation(str(tmp_path), image_set=split)
        ours = Voc(root=f"{tmp_path}/VOCdevkit/VOC2012", split=split)
        assert len(ours) == len(theirs) == len(LISTS[split])
        for index, (image, mask) in enumerate(theirs):
            example = ours.read(index)
            np.testing.assert_array_equal(example.image, np.asarray(image))
            np.testing.assert_array_equal(example.label, np.asarray(mask))
    (note,) = ours.notes()
    assert (
        note == f"{tmp_path}/VOCdevkit/VOC2012: 3 images of this split of voc are there, of 2,913 that were published"
    )


def test_classes_are_those_of_networks_that_were_trained_on_them() -> None:
    assert OFFICIAL["train"] + OFFICIAL["val"] == OFFICIAL["trainval"]
    assert CLASSES[1:] == tuple(DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"][1:])


def test_more_masks_are_grey_and_lie_elsewhere(tmp_path: Path) -> None:
    put_voc(tmp_path)
    more = Voc(root=str(tmp_path), split="trainaug")
    stored = np.asarray(Image.open(tmp_path / "SegmentationClassAug" / "2008_000002.png"))
    np.testing.assert_array_equal(more.label(2), stored)
    (tmp_path / "SegmentationClassAug").rename(tmp_path / "elsewhere")
    assert "unpack the masks of SegmentationClassAug there" in message_of(
        lambda: Voc(root=str(tmp_path), split="trainaug").notes()
    )
    check_dataset(Voc(root=str(tmp_path), split="trainaug", labels=None))


def test_what_is_missing_or_strange_is_one_line(tmp_path: Path) -> None:
    assert "no folder JPEGImages in it, as voc has; unpack VOCtrainval" in message_of(
        lambda: len(Voc(root=str(tmp_path)))
    )
    put_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").unlink()
    message = message_of(lambda: len(Voc(root=str(tmp_path), split="trainaug")))
    assert message == f"{lists}/trainaug.txt: cannot be read (No such file or directory); put trainaug's list there"
    (lists / "val.txt").write_text("2007_000033 1\n")
    assert "val.txt: line 1 is not the name of an image" in message_of(
        lambda: len(Voc(root=str(tmp_path), split="val"))
    )
    (lists / "val.txt").write_text("/JPEGImages/2007_000033.jpg /SegmentationClassAug/2007_000033.png\n")
    said = (
        "val.txt: line 1 is not the name of an image; a line holds one, such as 2007_000032, without folder and ending"
    )
    assert said in message_of(lambda: len(Voc(root=str(tmp_path), split="val")))
    (lists / "val.txt").write_text("\ufeff2007_000033\n")
    assert len(Voc(root=str(tmp_path), split="val")) == 1, "some editors begin a file with a mark"
    (lists / "val.txt").write_text("2007_999999\n")
    assert "none of the images that val.txt in ImageSets/Segmentation lists" in message_of(
        lambda: len(Voc(root=str(tmp_path), split="val"))
    )
    Image.new("L", (SIZE[1], SIZE[0]), 77).save(tmp_path / "SegmentationClass" / "2007_000032.png")
    assert "is no mask of voc, for it holds ids 77" in message_of(lambda: Voc(root=str(tmp_path)).read(0))


def test_the_recipe_loads() -> None:
    config = load(FinetuneConfig, ["voc_labelled", "data.labelled.root=a", "data.val.root=a"])
    assert config.data.labelled == Voc(root="a", split="trainaug")
    assert config.data.val == Voc(root="a", split="val")

"""PASCAL VOC 2012: photographs with 20 kinds of object, 1,464 with masks to train on and 1,449 to validate on.

Everingham et al., "The PASCAL visual object classes challenge: a retrospective", IJCV 2015; the 10,582 images of
`trainaug` have the further masks of Hariharan et al., "Semantic contours from inverse detectors", ICCV 2011. Ours,
because torchvision's class gives pictures of Pillow, and knows neither the names of the classes nor what is missing.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

from ssl_seg.config import UserError
from ssl_seg.datasets.layout import Layout, Listed
from ssl_seg.datasets.masks import IGNORE, Meaning
from ssl_seg.files import names_in, read_bytes
from ssl_seg.images import show_path

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
OFFICIAL = {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582}
LISTS = Path("ImageSets/Segmentation")
ARCHIVE = "VOCtrainval_11-May-2012.tar"


class Voc(Layout):
    """A split of PASCAL VOC 2012's segmentation.

    `root` is the folder that holds `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation`: `VOCdevkit/VOC2012`
    of the archive. The split is what `ImageSets/Segmentation/<split>.txt` lists; listed images that are not there are
    left out, which a run tells. The outlines in the masks, 255, do not count.

    `trainaug` is no part of the archive: its list and its masks, `SegmentationClassAug`, are found with many
    implementations of published networks, and have to be put beside the others.
    """

    split: Literal["train", "val", "trainval", "trainaug"] = "train"  # as published
    labels: Literal[21] | None = 21  # the 20 kinds and the background; null: none, and no mask is looked for

    @property
    def meaning(self) -> Meaning:
        names = CLASSES[: self.labels or 0]
        return Meaning(names, (*((number, number) for number in range(len(names))), (IGNORE, IGNORE)))

    @property
    def official(self) -> int:
        return OFFICIAL[self.split]

    @property
    def mask_archive(self) -> str:
        return "the masks of SegmentationClassAug" if self.split == "trainaug" else ARCHIVE

    @cached_property
    def listed(self) -> tuple[Listed, ...]:
        images = self.unpacked("JPEGImages", ARCHIVE)
        there = set(names_in(images))
        names = [name for name in self._read_list() if f"{name}.jpg" in there]
        if not names:
            raise UserError(
                f"{show_path(images)}: none of the images that {self.split}.txt in {LISTS} lists{self._mending}"
            )
        masks = "SegmentationClassAug" if self.split == "trainaug" else "SegmentationClass"
        return tuple(Listed(f"{name}.jpg", f"JPEGImages/{name}.jpg", f"{masks}/{name}.png") for name in names)

    def _read_list(self) -> list[str]:
        """The names in the split's list, each once. Raises UserError for a list that cannot be read as one."""
        path = self.folder / LISTS / f"{self.split}.txt"
        try:
            lines = read_bytes(path).decode("utf-8-sig", "replace").splitlines()
        except OSError as error:
            raise UserError(f"{show_path(path)}: cannot be read ({error.strerror}){self._mending}") from error
        names: dict[str, None] = {}
        for number, line in enumerate(lines, start=1):
            name = line.strip()
            if not name:
                continue
            if len(name.split()) != 1 or Path(name).name != name or Path(name).suffix:
                raise UserError(
                    f"{show_path(path)}: line {number} is not the name of an image; a line holds one, such as "
                    "2007_000032, without folder and ending"
                )
            names[name] = None
        return list(names)

    @property
    def _mending(self) -> str:
        """What to do about a list or images that are not there."""
        return "; put trainaug's list there" if self.split == "trainaug" else f"; unpack {ARCHIVE} anew"

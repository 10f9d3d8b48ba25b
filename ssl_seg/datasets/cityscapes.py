"""Cityscapes: street scenes of 50 cities, 2048 x 1024; 2,975 finely labelled frames to train on and 500 to validate on.

Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016. Ours, because torchvision's
class gives pictures of Pillow with ids that are no classes yet, in the order in which the file system lists them, and
takes the masks of the test split for labels.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from ssl_seg.config import UserError
from ssl_seg.datasets.folder import Found, find_files
from ssl_seg.datasets.layout import Layout, Listed
from ssl_seg.datasets.masks import IGNORE, Meaning
from ssl_seg.datasets.pairs import some_names
from ssl_seg.images import show_path

# By their ids, 0 to 33, as the publisher's own table of labels has them; -1, the license plate, is in no mask.
NAMES = (
    "unlabeled",
    "ego vehicle",
    "rectification border",
    "out of roi",
    "static",
    "dynamic",
    "ground",
    "road",
    "sidewalk",
    "parking",
    "rail track",
    "building",
    "wall",
    "fence",
    "guard rail",
    "bridge",
    "tunnel",
    "pole",
    "polegroup",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "caravan",
    "trailer",
    "train",
    "motorcycle",
    "bicycle",
)
SCORED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # the ids of train ids 0 to 18
OFFICIAL = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
SUFFIX = "_leftImg8bit.png"


class Annotations(NamedTuple):
    """How finely masks are drawn: their folder, what it comes in, and the splits it has labels of."""

    folder: str
    archive: str
    splits: tuple[str, ...]


ANNOTATIONS = {
    "fine": Annotations("gtFine", "gtFine_trainvaltest.zip", ("train", "val")),
    "coarse": Annotations("gtCoarse", "gtCoarse.zip", ("train", "val", "train_extra")),
}


class Cityscapes(Layout):
    """A split of Cityscapes; the sequence of a frame is its city.

    `root` holds `leftImg8bit/<split>/<city>/*_leftImg8bit.png`, and `gtFine` or `gtCoarse` with `*_labelIds.png` of the
    same frames, as the publisher's archives unpack.

    The public masks of `test` are dummies, and `train_extra` has coarse ones only: as pools, and for `predict`, both
    are read as others; whoever asks for such masks is refused.
    """

    split: Literal["train", "val", "test", "train_extra"] = "train"  # as published
    # 19: those that the benchmark scores, in its order, the others ignored. 34: all ids, with those that mean nothing.
    # null: none, and no mask is looked for.
    labels: Literal[19, 34] | None = 19
    annotations: Literal["fine", "coarse"] = "fine"  # how finely masks are drawn

    @property
    def meaning(self) -> Meaning:
        if self.labels is None:
            return Meaning(())
        kept = SCORED if self.labels == len(SCORED) else range(len(NAMES))
        ids = [(stored, kept.index(stored) if stored in kept else IGNORE) for stored in range(len(NAMES))]
        return Meaning(tuple(NAMES[stored] for stored in kept), (*ids, (IGNORE, IGNORE)))

    @property
    def official(self) -> int:
        return OFFICIAL[self.split]

    @property
    def mask_archive(self) -> str:
        return ANNOTATIONS[self.annotations].archive

    @property
    def without_masks(self) -> str:
        if self.split in ANNOTATIONS[self.annotations].splits:
            return ""
        if self.split == "train_extra":
            return "split train_extra has no fine masks; write annotations: coarse, or labels: null for a pool"
        return (
            "split test has no public labels, its masks are dummies; score on split val, or predict the test split and "
            "send it to the benchmark's server"
        )

    def sequence(self, index: int) -> str:
        return PurePosixPath(self.name(index)).parent.name

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        lines = self._found.notes(self._image_folder)
        strange = [name for name in self._found.files if not name.endswith(SUFFIX)]
        if strange:
            lines += (
                f"{show_path(self._image_folder)}: files that are no frames of Cityscapes (*{SUFFIX}), which are left "
                f"out: {len(strange)} ({some_names(strange)})",
            )
        return lines + super().notes(with_labels)

    @cached_property
    def listed(self) -> tuple[Listed, ...]:
        masks = ANNOTATIONS[self.annotations].folder
        frames = [f"{self.split}/{name}" for name in self._found.files if name.endswith(SUFFIX)]
        if not frames:
            raise UserError(f"{show_path(self._image_folder)}: no frame in it (*{SUFFIX}); unpack {self._archive} anew")
        return tuple(
            Listed(name, f"leftImg8bit/{name}", f"{masks}/{name.removesuffix(SUFFIX)}_{masks}_labelIds.png")
            for name in frames
        )

    @property
    def _archive(self) -> str:
        """What the images come in."""
        return f"leftImg8bit_{'trainextra' if self.split == 'train_extra' else 'trainvaltest'}.zip"

    @property
    def _image_folder(self) -> Path:
        return self.folder / "leftImg8bit" / self.split

    @cached_property
    def _found(self) -> Found:
        return find_files(self.unpacked(f"leftImg8bit/{self.split}", self._archive), {".png"})

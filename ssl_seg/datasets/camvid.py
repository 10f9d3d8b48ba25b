"""CamVid: street scenes filmed from a car, 11 classes, 367 training, 101 validation and 233 test frames of 480 x 360.

Brostow, Fauqueur and Cipolla, "Semantic object classes in video: a high-definition ground truth database", Pattern
Recognition Letters 30 (2009); classes and splits of Badrinarayanan, Kendall and Cipolla, "SegNet", TPAMI 39 (2017).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.datasets import Dataset, Example
from ssl_seg.datasets.folder import Folder, is_folder
from ssl_seg.images import show_path

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
UNLABELLED = 11
SPLITS = ("train", "val", "test")
LAYOUTS = (("images/{0}", "masks/{0}"), ("{0}", "{0}annot"))  # the second is the SegNet tutorial's


class Camvid(Dataset):
    """A split of CamVid, or some of its drives; the sequence of a frame is its drive.

    `root` holds `images/<split>` and `masks/<split>`, or `<split>` and `<split>annot` as the SegNet tutorial has them.
    Splits that are absent are left out of `all`. Neighbouring frames of a drive are nearly the same picture, and the
    val split is one clip of a drive that train holds too: `drives` makes splits that keep drives apart.
    """

    root: PathText  # the folder of images/ and masks/
    split: Literal["train", "val", "test", "all"] = "train"  # as published; all: all there are
    drives: tuple[str, ...] = ()  # 0001TP, 0006R0, 0016E5, Seq05VD; empty: all

    @field_validator("drives", mode="before")
    @classmethod
    def _mend_numbers(cls, value: Any) -> Any:
        """YAML reads an unquoted 0016E5 as 16e5; no other drive is a number."""
        if isinstance(value, list | tuple):
            return tuple("0016E5" if drive == 16e5 else drive for drive in value)
        return value

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES

    def __len__(self) -> int:
        return len(self._frames)

    def image(self, index: int) -> Example:
        split, position = self._frames[index]
        return replace(self._folders[split].image(position), name=self.name(index))

    def read(self, index: int) -> Example:
        split, position = self._frames[index]
        example = self._folders[split].read(position)
        return replace(example, name=self.name(index))

    def doubt(self, index: int) -> str:
        split, position = self._frames[index]
        return self._folders[split].doubt(position)

    def files(self, index: int) -> tuple[Path, ...]:
        split, position = self._frames[index]
        return self._folders[split].files(position)

    def label(self, index: int) -> np.ndarray | None:
        split, position = self._frames[index]
        return self._folders[split].label(position)

    def name(self, index: int) -> str:
        split, position = self._frames[index]
        return f"{split}/{self._folders[split].name(position)}"

    def sequence(self, index: int) -> str:
        return _drive(self.name(index))

    def greys_read(self) -> dict[str, str]:
        return {chosen: how for folder in self._folders.values() for chosen, how in folder.greys_read().items()}

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        return tuple(note for folder in self._folders.values() for note in folder.notes(with_labels))

    @cached_property
    def _folders(self) -> dict[str, Folder]:
        wanted = SPLITS if self.split == "all" else (self.split,)
        root = user_path(self.root)
        found = {}
        for split in wanted:
            for images, masks in LAYOUTS:
                folder = root / images.format(split)
                if is_folder(folder):
                    mask_folder = root / masks.format(split)
                    ignore = (UNLABELLED,)
                    found[split] = Folder(images=str(folder), masks=str(mask_folder), classes=CLASSES, ignore=ignore)
                    break
        if not found:
            layouts = " or ".join(f"{images} and {masks}".format(wanted[0]) for images, masks in LAYOUTS)
            raise UserError(f"{show_path(root)}: no split '{self.split}' of CamVid in it; it should hold {layouts}")
        return found

    @cached_property
    def _frames(self) -> tuple[tuple[str, int], ...]:
        """The split and the number in it of every frame that is kept."""
        frames = [(split, number) for split, folder in self._folders.items() for number in range(len(folder))]
        if not self.drives:
            return tuple(frames)
        drives = [_drive(self._folders[split].name(number)) for split, number in frames]
        absent = [drive for drive in self.drives if drive not in drives]
        if absent:
            known = ", ".join(sorted(set(drives)))
            raise UserError(f"{show_path(self.root)}: no drive '{absent[0]}' in split '{self.split}'; known: {known}")
        return tuple(frame for frame, drive in zip(frames, drives, strict=True) if drive in self.drives)


def _drive(name: str) -> str:
    return PurePosixPath(name).name.partition("_")[0]

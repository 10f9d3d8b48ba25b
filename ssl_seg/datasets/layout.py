"""What the sources of published data sets share: their layout says which images are of a split, and where masks lie.

Ours beside `folder`, whose rule is that what lies in a folder belongs to it and a mask has its image's relative path.
Masks mean what they mean there (`masks`), and are not looked for until they are to be read: a pool needs none.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.datasets import Dataset, Example
from ssl_seg.datasets.folder import is_folder
from ssl_seg.datasets.masks import Meaning, Reading, how_to_read
from ssl_seg.datasets.pairs import note_turned, say_sizes, some_names
from ssl_seg.files import is_there
from ssl_seg.images import doubt, read_image, show_path


class Listed(NamedTuple):
    """An image of a split, and where it and its mask lie, from `root` on."""

    name: str
    image: str
    mask: str


class Layout(Dataset):
    """A split of a published data set, as its archives unpack into the folder `root`."""

    root: PathText  # the folder that the archives were unpacked in

    # ---- what each says of itself ----

    @property
    @abstractmethod
    def listed(self) -> tuple[Listed, ...]:
        """The images that are there, in the order of the publisher. Raises UserError where there are none."""

    @property
    @abstractmethod
    def meaning(self) -> Meaning:
        """What the values in masks are; without names where no mask is to be read."""

    @property
    @abstractmethod
    def official(self) -> int:
        """How many images the split has where it was published."""

    @property
    @abstractmethod
    def mask_archive(self) -> str:
        """What the masks come in."""

    @property
    def without_masks(self) -> str:
        """Why the split has none that one could learn from or score by, and what to do; '' where it has."""
        return ""

    # ---- what follows from that ----

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.meaning.names

    def __len__(self) -> int:
        return len(self.listed)

    def image(self, index: int) -> Example:
        return Example(read_image(self._image_path(index)), None, self.name(index))

    def read(self, index: int) -> Example:
        example, label = self.image(index), self.label(index)
        if label is not None and label.shape != example.image.shape[:2]:
            sizes = (example.image.shape[:2], self._mask_path(index), label.shape)
            raise UserError(say_sizes(self._image_path(index), *sizes))
        return replace(example, label=label)

    def label(self, index: int) -> np.ndarray | None:
        if not self.class_names:
            return None
        self._refuse_without_masks()
        path = self._mask_path(index)
        values = self._reading.values(path)
        try:
            return self.meaning.label(values)
        except ValueError as error:
            raise UserError(
                f"{show_path(path)}: is no mask of {self.type}, for it holds {self._strange(values)}; unpack "
                f"{self.mask_archive} anew, or read other masks by {{type: folder}} with a mapping"
            ) from error

    def name(self, index: int) -> str:
        return self.listed[index].name

    def doubt(self, index: int) -> str:
        return doubt(self._image_path(index))

    def files(self, index: int) -> tuple[Path, ...]:
        masks = (self._mask_path(index),) if self.class_names else ()
        return self._image_path(index), *masks

    def greys_read(self) -> dict[str, str]:
        if not self.class_names or self.without_masks:
            return {}
        chosen = self._reading.chosen
        return {} if chosen is None else {chosen: self._reading.mapping}

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        lines: tuple[str, ...] = ()
        if len(self) < self.official:
            lines += (
                f"{show_path(self.folder)}: {len(self):,} images of this split of {self.type} are there, of "
                f"{self.official:,} that were published",
            )
        if with_labels and self.class_names:
            self._refuse_without_masks()
            lines += (f"{show_path(self.folder)}: {self._reading.note}",) if self._reading.note else ()
            sources = [(own.image, self.folder / own.image, self.folder / own.mask) for own in self.listed]
            lines += note_turned(show_path(self.folder), sources)
        return lines

    @property
    def folder(self) -> Path:
        """`root` as a path."""
        return user_path(self.root)

    def unpacked(self, name: str, archive: str) -> Path:
        """A folder in `root`. Raises UserError for one that is not there, with the archive that it comes in."""
        folder = self.folder / name
        if not is_folder(folder):
            is_packed = is_there(self.folder / archive)
            what = f"unpack {archive}, which lies there" if is_packed else f"unpack {archive} there"
            raise UserError(
                f"{show_path(self.folder)}: no folder {name} in it, as {self.type} has; {what}, or give as root the "
                f"folder that holds {name}"
            )
        return folder

    def _strange(self, values: np.ndarray) -> str:
        """What a mask holds that means nothing here."""
        if values.ndim == 3:
            return "colours"
        return f"ids {some_names([str(value) for value in np.unique(values) if not self.meaning.knows([value])])}"

    def _refuse_without_masks(self) -> None:
        if self.without_masks:
            raise UserError(f"{show_path(self.folder)}: {self.without_masks}")

    def _image_path(self, index: int) -> Path:
        return self.folder / self.listed[index].image

    def _mask_path(self, index: int) -> Path:
        return self.folder / self.listed[index].mask

    @cached_property
    def _reading(self) -> Reading:
        """How the masks are read, all of which have to be there."""
        names = [own.mask for own in self.listed]
        missing = [name for name in names if not is_there(self.folder / name)]
        if missing:
            raise UserError(
                f"{show_path(self.folder)}: no mask for {len(missing)} of the {len(names)} images "
                f"({some_names(missing)}); unpack {self.mask_archive} there, or remove these images"
            )
        return how_to_read(self.meaning, self.folder, [self.folder / name for name in names])

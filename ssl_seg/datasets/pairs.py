"""Images that are decoded one by one, each with its mask: how a pair is read, whatever says which belong together, and
whether the two are files of their own or parts of an archive.

Ours, because torchvision's data sets know neither masks nor images of more than 8 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from ssl_seg.config import UserError, load
from ssl_seg.datasets import Example
from ssl_seg.datasets.labelled import Classed, Labelled
from ssl_seg.datasets.masks import MAX_STORED, Reading, how_to_read
from ssl_seg.images import (
    Range,
    RangeField,
    Size,
    Source,
    default_range,
    doubt,
    largest_value,
    read_header,
    read_image,
    show_path,
    takes_range,
)

PROBED_IMAGES = 8  # how many are read to say how much of their 16 bits is used
LEAST_USED = 0.1  # of 16 bits: 12 bits fill a sixteenth
QUARTER_TURNS = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange height and width


class Pictures(Classed):
    """Images and masks, each of which `images` decodes."""

    # Stored values that become black and white, in images of more than 8 bits a channel, [0, 4095] or a pair for each
    # channel; None: 65535 is white.
    range: RangeField | None = None

    # ---- what each says of itself ----

    @property
    @abstractmethod
    def image_place(self) -> str:
        """Where the images are, in messages about all of them."""

    @property
    @abstractmethod
    def mask_place(self) -> str:
        """The same for masks."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether each image has one."""

    @abstractmethod
    def image_source(self, index: int) -> Source:
        """What an image is decoded from."""

    @abstractmethod
    def mask_source(self, index: int) -> Source:
        """What its mask is decoded from; nobody asks where there are none."""

    # ---- what follows from that ----

    def image(self, index: int) -> Example:
        return Example(read_image(self.image_source(index), self.range, self.channels), None, self.name(index))

    def read(self, index: int) -> Example:
        if not self.has_masks:
            return self.image(index)
        example, label = self.image(index), self.label(index)
        assert label is not None  # as there are masks
        if label.shape != example.image.shape[:2]:
            sizes = (example.image.shape[:2], self.mask_source(index), label.shape)
            raise UserError(say_sizes(self.image_source(index), *sizes, self.channels))
        return replace(example, label=label)

    def label(self, index: int) -> np.ndarray | None:
        if not self.has_masks:
            return None
        mask = self.mask_source(index)
        values = self._reading.values(mask)
        try:
            return self._meaning.label(values)
        except ValueError as error:
            raise UserError(f"{show_path(mask)} (mask of {show_path(self.image_source(index))}): {error}") from error

    def doubt(self, index: int) -> str:
        return doubt(self.image_source(index), self.channels)

    def value_range(self) -> Range | None:
        return self.range or next((own for own in self._default_ranges if own is not None), None)

    def in_range(self, value_range: Range) -> Self:
        if self.range is not None or not self._take_range:  # no range for images of 8 bits
            return self
        return load(type(self), {**self.dump(), "range": value_range})

    def greys_read(self) -> dict[str, str]:
        chosen = None if not self.has_masks else self._reading.chosen
        return {} if chosen is None else {chosen: self._reading.mapping}

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        lines = self._note_dark()
        if with_labels and self.has_masks:
            lines += (f"{self.mask_place}: {self._reading.note}",) if self._reading.note else ()
            sources = [(self.name(i), self.image_source(i), self.mask_source(i)) for i in range(len(self))]
            lines += note_turned(self.image_place, sources, self.channels)
        return lines

    @cached_property
    def _default_ranges(self) -> list[Range | None]:
        """Of some images. Of a file that cannot be read whoever needs it speaks."""
        found = []
        for index in self._probed:
            with suppress(UserError):
                found.append(default_range(self.image_source(index), self.channels))
        return found

    @property
    def _take_range(self) -> bool:
        """Whether those that speak for all have more than 8 bits, but for files that cannot be read."""
        for index in self._probed:
            with suppress(UserError):
                if not takes_range(self.image_source(index), self.channels):
                    return False
        return True

    @property
    def _probed(self) -> Sequence[int]:
        """Images that speak for all: up to `PROBED_IMAGES`, evenly apart."""
        return range(0, len(self), max(1, len(self) // PROBED_IMAGES))[:PROBED_IMAGES]

    @cached_property
    def _reading(self) -> Reading:
        """How the masks are read. Loader workers inherit it, where it has been asked for before there are any."""
        try:
            return how_to_read(self._meaning, self.mask_place, [self.mask_source(index) for index in range(len(self))])
        except ValueError as error:  # with classes of dataset.json this is the first look at the mapping
            raise UserError(f"{self.mask_place}: {error}") from error

    def _note_dark(self) -> tuple[str, ...]:
        """A word where 16 bits are used so little that images are nearly black."""
        if self.range is not None:
            return ()
        largest = []
        for index in self._probed:
            with suppress(UserError):  # of a file that cannot be read whoever needs it speaks
                value = largest_value(self.image_source(index), self.channels)
                largest += [] if value is None else [value]
        if not any(largest) or max(largest) >= LEAST_USED * MAX_STORED:
            return ()
        white = 2 ** max(largest).bit_length() - 1
        return (
            f"{self.image_place}: nearly black: in {len(largest)} images of 16 bits that were read no "
            f"value is above {max(largest)} of {MAX_STORED}; if less than that is white, write range: [0, {white}]",
        )


class Pairs(Pictures, Labelled):
    """Images and masks that are told by their paths in two folders."""

    # ---- what each says of itself ----

    @property
    @abstractmethod
    def image_folder(self) -> Path:
        """What the paths of images begin from."""

    @property
    @abstractmethod
    def mask_folder(self) -> Path:
        """What those of masks begin from."""

    @property
    @abstractmethod
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The paths of each image and its mask, '' where there are no masks. Loader workers inherit what was found."""

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    # ---- what follows from that ----

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0]

    def files(self, index: int) -> tuple[Path, ...]:
        masks = (self.mask_source(index),) if self.has_masks else ()
        return self.image_source(index), *masks

    @property
    def image_place(self) -> str:
        return show_path(self.image_folder)

    @property
    def mask_place(self) -> str:
        return show_path(self.mask_folder)

    def image_source(self, index: int) -> Path:
        return self.image_folder / self.pairs[index][0]

    def mask_source(self, index: int) -> Path:
        return self.mask_folder / self.pairs[index][1]


def note_turned(place: str, sources: Sequence[tuple[str, Source, Source]], channels: int = 3) -> tuple[str, ...]:
    """A word where EXIF turns images but not their masks, and no size tells what a mask was drawn on.

    `sources` gives of each image its name, the image and the mask; `place` is where they all are.
    """
    turned = []
    for name, image, mask in sources:
        header = read_header(image, channels)
        told_by_size = header.orientation in QUARTER_TURNS and header.size[0] != header.size[1]
        if header.orientation == 1 or told_by_size or read_header(mask).orientation != 1:
            continue
        turned.append(name)
    if not turned:
        return ()
    return (
        f"{place}: EXIF turns or mirrors {len(turned)} of the images ({some_names(turned)}); their masks "
        "are taken to be drawn on the turned ones",
    )


def say_sizes(image: Source, size: Size, mask: Source, mask_size: Size, channels: int = 3) -> str:
    """That a mask has another size than its image, and what to do."""
    said = (
        f"{show_path(mask)}: {mask_size[0]} x {mask_size[1]} pixels (H x W), but its image {show_path(image)} has "
        f"{size[0]} x {size[1]}"
    )
    orientation = read_header(image, channels).orientation
    if mask_size == size[::-1] and orientation in QUARTER_TURNS:
        return (
            f"{said} when it is turned by its EXIF orientation ({orientation}), so the mask was drawn on the picture "
            "as it is stored; turn the mask alike, or take that tag out of the image"
        )
    return f"{said}; make the mask anew or remove both"


def some_names(names: Sequence[str], limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(show_path(name) for name in names[:limit]) + more

"""Images of another data set with masks that a model has written: those of a round of pseudo-labels."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import SerializeAsAny

from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.datasets import Dataset, Example
from ssl_seg.files import read_json
from ssl_seg.images import Range, read_mask, show_path

RECORD = "masks.json"  # the classes, and the file of each image's mask


class Relabelled(Dataset):
    """Those of `images` that have a mask in the folder `masks`, by its `masks.json`; 255 is ignored."""

    images: SerializeAsAny[Dataset]  # those that a model has labelled
    masks: PathText  # the folder that masks.json lies in

    @cached_property
    def _record(self) -> dict[str, dict[str, str]]:
        return read_json(user_path(self.masks) / RECORD)

    @cached_property
    def _found(self) -> list[tuple[int, Path]]:
        """The number of each image in its data set, and the file of its mask."""
        masks = self._record["masks"]
        known = {self.images.name(index): index for index in range(len(self.images))}
        lost = [name for name in masks if name not in known]
        if lost:
            raise UserError(
                f"{self.masks}: has a mask of {show_path(lost[0])}, which is no image any more; put it back"
            )
        return [(known[name], user_path(self.masks) / file) for name, file in masks.items()]

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self._record["classes"])

    @property
    def num_channels(self) -> int:
        return self.images.num_channels

    def in_channels(self, count: int) -> Self:
        return self.model_copy(update={"images": self.images.in_channels(count)})

    def __len__(self) -> int:
        return len(self._found)

    def read(self, index: int) -> Example:
        return replace(self.image(index), label=self.label(index))

    def image(self, index: int) -> Example:
        return self.images.image(self._found[index][0])

    def label(self, index: int) -> np.ndarray:
        return read_mask(self._found[index][1])

    def name(self, index: int) -> str:
        return self.images.name(self._found[index][0])

    def doubt(self, index: int) -> str:
        return self.images.doubt(self._found[index][0])

    def sequence(self, index: int) -> str:
        return self.images.sequence(self._found[index][0])

    def files(self, index: int) -> tuple[Path, ...]:
        place, mask = self._found[index]
        return (*self.images.files(place)[:1], mask)

    def value_range(self) -> Range | None:
        return self.images.value_range()

"""The contract of a data set: numbered examples, read on demand. One source a file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ssl_seg.config import Plugin


@dataclass(frozen=True)
class Example:
    """An image as it is on disk, RGB `(H, W, 3)` uint8; class ids `(H, W)` uint8, 255 ignored, or None; a name."""

    image: np.ndarray
    label: np.ndarray | None
    name: str


class Dataset(Plugin, ABC):
    """Images, and masks if it has any. Pure: `read(i)` gives the same arrays at every call and in every process."""

    package: ClassVar[str] = "ssl_seg.datasets"
    group: ClassVar[str] = "ssl_seg.datasets"

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class id; empty for a data set without labels."""
        return ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Example:
        """The example with its name; raises UserError with the file's name for one that cannot be read."""

    def image(self, index: int) -> Example:
        """The example without its label; a data set overrides it to leave the mask's file alone."""
        return replace(self.read(index), label=None)

    def name(self, index: int) -> str:
        """What `read(index).name` gives. Override it: every start of a run asks for all names, and this reads files."""
        return self.read(index).name

    def sequence(self, index: int) -> str:
        """The clip, drive or subfolder an image belongs to: splits keep a sequence whole. '' where there is none."""
        return ""

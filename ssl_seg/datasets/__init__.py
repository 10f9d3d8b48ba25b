"""The contract of a data set: numbered examples, read on demand. One source a file beside this one."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar, Self

import numpy as np

from ssl_seg.config import Plugin, UserError, builtin_type
from ssl_seg.images import Range

SPLIT_WORDS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "images", "leftImg8bit"})
NUMBER = re.compile(r"\d+(?![0-9A-Za-z])")


@dataclass(frozen=True)
class Example:
    """An image as it is on disk, RGB `(H, W, 3)` uint8; class ids `(H, W)` uint8, 255 ignored, or None; a name.

    Of a data set with another number of channels the image is `(H, W, C)`.
    """

    image: np.ndarray
    label: np.ndarray | None
    name: str


class Dataset(Plugin, ABC):
    """Images, and masks if it has any. Pure: `read(i)` gives the same arrays at every call and in every process."""

    package: ClassVar[str] = "ssl_seg.datasets"
    group: ClassVar[str] = "ssl_seg.datasets"

    @classmethod
    def choose(cls, name: str) -> builtin_type[Self]:
        """As `Plugin.choose`; the message knows that a folder alone was meant."""
        try:
            return super().choose(name)
        except ValueError as error:
            if not os.path.isdir(os.path.expanduser(name)):
                raise
            raise ValueError(f"'{name}' is a folder; write {{type: folder, images: {name}}}") from error

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class id; empty for a data set without labels."""
        return ()

    @property
    def num_channels(self) -> int:
        """Of its images; three are RGB."""
        return 3

    def in_channels(self, count: int) -> Self:
        """The data set with images of so many channels, as the network takes. Raises UserError where it has others.

        No file is looked at: images of another number of channels are refused when they are read.
        """
        if count != self.num_channels:
            raise UserError(
                f"its images have {self.num_channels} channels, and the network takes {count} (model.channels); leave "
                "one out or write both alike"
            )
        return self

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Example:
        """The example with its name; raises UserError with the file's name for one that cannot be read."""

    def image(self, index: int) -> Example:
        """The example without its label; a data set overrides it to leave the mask's file alone."""
        return replace(self.read(index), label=None)

    def label(self, index: int) -> np.ndarray | None:
        """The label without its image; a data set overrides it to leave the image's file alone."""
        return self.read(index).label

    def name(self, index: int) -> str:
        """What `read(index).name` gives. Override it: every start of a run asks for all names, and this reads files."""
        return self.read(index).name

    def doubt(self, index: int) -> str:
        """What a person should look at in the files of an example that can be read, in a few words; '' for nothing.

        The leak guard asks for every image of a run, once. Raises UserError for damage that `read` does not notice.
        """
        return ""

    def sequence(self, index: int) -> str:
        """The clip, drive or subfolder an image belongs to: splits keep a sequence whole. '' where there is none."""
        return ""

    def files(self, index: int) -> tuple[Path, ...]:
        """The files that an example is read from: the image's, then the mask's if it has one; () where there are none.

        By their size and time a run that goes on notices other pictures under the same names.
        """
        return ()

    def value_range(self) -> Range | None:
        """The stored values that become black and white, of images of more than 8 bits a channel; None for others.

        An export keeps it, and images that are read by another one are told of.
        """
        return None

    def in_range(self, value_range: Range) -> Self:
        """The data set with these values as black and white, where it gives none of its own; else as it is."""
        return self

    def greys_read(self) -> dict[str, str]:
        """What was taken for ids where masks have palettes of greys: 'greys' or 'indices', by what the masks hold.

        With the `mapping` that says the same by colours; empty where nothing had to be chosen. The parts of a run have
        to agree.
        """
        return {}

    def join_masks(self, masks: Sequence[Path], folder: Path) -> None:
        """Put the masks that were predicted, a file for each image, together in `folder` as the images are.

        Asked once all are there; nothing for images that are files of their own.
        """
        return

    def join_overlays(self, overlays: Sequence[Path], folder: Path) -> None:
        """The same for pictures to look at, the masks laid over the images, as for frames of a video."""
        return

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        """What a person should know of the files that are taken or passed over, a line each; told when a run starts.

        `with_labels` says that the masks are going to be read.
        """
        return ()


def place_in(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Of files that hold several images each: which one an image is in, and its number there.

    `ends` says how many images there are up to the end of each file. Negative indices count from the end, as a list's.
    """
    index = range(ends[-1])[index]
    number = int(np.searchsorted(ends, index, side="right"))
    return number, index - (ends[number - 1] if number else 0)


def numbering(name: str) -> tuple[str, int] | None:
    """The sequence that a name speaks of, and its number in it: its last number that no letter follows.

    Words for splits in the path do not make another sequence. None for a name without a number.

    >>> numbering("train/aachen/aachen_000001_000019_leftImg8bit.png")
    ('aachen/aachen_000001_#_leftImg8bit', 19)
    """
    path = PurePosixPath(name)
    numbers = list(NUMBER.finditer(path.stem))
    if not numbers:
        return None
    last = numbers[-1]
    folders = [folder for folder in path.parts[:-1] if folder not in SPLIT_WORDS]
    pattern = path.stem[: last.start()] + "#" + path.stem[last.end() :]
    return "/".join([*folders, pattern]), int(last[0])

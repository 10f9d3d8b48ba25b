"""ADE20K as its scene parsing challenge gives it: 20,210 photographs of 150 classes to train on, 2,000 to validate on.

Zhou et al., "Scene parsing through ADE20K dataset", CVPR 2017. Ours, because torchvision has no class for it.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

from ssl_seg.config import UserError
from ssl_seg.datasets.layout import Layout, Listed
from ssl_seg.datasets.masks import IGNORE, Meaning
from ssl_seg.files import names_in, read_bytes
from ssl_seg.images import show_path

CLASSES = 150
FOLDERS = {"train": "training", "val": "validation"}
OFFICIAL = {"train": 20210, "val": 2000}
ARCHIVE = "ADEChallengeData2016.zip"
TABLE = "objectInfo150.txt"
COLUMNS = 5  # of the table, numbers all, before the name


class Ade20k(Layout):
    """A split of ADE20K's 150 classes.

    `root` is the folder `ADEChallengeData2016` of the archive: it holds `images/training`, `images/validation`,
    `annotations` with the same folders, and `objectInfo150.txt`, which names the classes: the first name of each is
    taken. Masks hold 1 to 150, and 0 where a pixel is of no class, which does not count.
    """

    split: Literal["train", "val"] = "train"  # as published: training and validation
    labels: Literal[150] | None = 150  # null: none, and no mask is looked for

    @cached_property
    def meaning(self) -> Meaning:
        names = self._names() if self.labels else ()
        return Meaning(names, ((0, IGNORE), *((number + 1, number) for number in range(len(names)))))

    @property
    def official(self) -> int:
        return OFFICIAL[self.split]

    @property
    def mask_archive(self) -> str:
        return ARCHIVE

    @cached_property
    def listed(self) -> tuple[Listed, ...]:
        part = FOLDERS[self.split]
        images = self.unpacked(f"images/{part}", ARCHIVE)
        names = [name for name in names_in(images) if name.endswith(".jpg")]
        if not names:
            raise UserError(f"{show_path(images)}: no images (*.jpg) in it; unpack {ARCHIVE} anew")
        masks = [PurePosixPath(f"annotations/{part}/{name}").with_suffix(".png") for name in names]
        pairs = zip(names, masks, strict=True)
        return tuple(Listed(name, f"images/{part}/{name}", mask.as_posix()) for name, mask in pairs)

    def _names(self) -> tuple[str, ...]:
        """Of all classes, by their ids. Raises UserError for a table of another form."""
        path = self.folder / TABLE
        try:
            lines = read_bytes(path).decode("utf-8", "replace").splitlines()
        except OSError as error:
            raise UserError(
                f"{show_path(path)}: cannot be read ({error.strerror}), and it names the classes; unpack {ARCHIVE} "
                "anew, or give labels: null for a pool"
            ) from error
        rows = [line.split(maxsplit=COLUMNS) for line in lines[1:] if line.strip()]
        is_table = all(len(row) == COLUMNS + 1 and row[0] == str(number) for number, row in enumerate(rows, start=1))
        if not is_table or len(rows) != CLASSES:
            raise UserError(
                f"{show_path(path)}: is no table of {CLASSES} classes with their names; unpack {ARCHIVE} anew"
            )
        whole = [row[COLUMNS].strip() for row in rows]
        first = [name.split(",")[0].strip() for name in whole]
        often = Counter(first)
        return tuple(name if often[short] > 1 else short for name, short in zip(whole, first, strict=True))

"""The Oxford-IIIT Pet dataset: cats and dogs of 37 breeds, 3,680 images to train and validate on and 3,669 to test on.

Parkhi, Vedaldi, Zisserman and Jawahar, "Cats and Dogs", CVPR 2012. Ours, because torchvision's class gives pictures of
Pillow, knows neither what trimaps mean nor what is missing, and reads images whatever is in them.
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

CLASSES = ("body", "background", "border")  # 1, 2 and 3 in a trimap
OFFICIAL = {"trainval": 3680, "test": 3669}
COLUMNS = 4  # of a line of a list: name, class, species, breed


class Pets(Layout):
    """A split of the pets.

    `root` holds `images` and `annotations`, as images.tar.gz and annotations.tar.gz unpack. The split is what
    `annotations/<split>.txt` lists: images beside it (41 are in no list) and files that macOS has left (`._*`) are not
    looked at, and listed images that are not there are left out, which a run tells.

    Some .jpg are PNGs, GIFs or grey: every image is read by what it is, not by its name.
    """

    split: Literal["trainval", "test"] = "trainval"  # as published
    # 3: body, background, border. 2: body and background, and the border is ignored, as the publisher's "not
    # classified" says. null: none, and no mask is looked for.
    labels: Literal[3, 2] | None = 3

    @property
    def meaning(self) -> Meaning:
        names = CLASSES[: self.labels or 0]
        ids = [(number + 1, number if number < len(names) else IGNORE) for number in range(len(CLASSES))]
        return Meaning(names, (*ids, (IGNORE, IGNORE)))

    @property
    def official(self) -> int:
        return OFFICIAL[self.split]

    @property
    def mask_archive(self) -> str:
        return "annotations.tar.gz"

    @cached_property
    def listed(self) -> tuple[Listed, ...]:
        images = self.unpacked("images", "images.tar.gz")
        annotations = self.unpacked("annotations", self.mask_archive)
        there = set(names_in(images))
        names = [name for name in _read_list(annotations / f"{self.split}.txt") if f"{name}.jpg" in there]
        if not names:
            raise UserError(
                f"{show_path(images)}: none of the images that annotations/{self.split}.txt lists; unpack "
                "images.tar.gz anew"
            )
        return tuple(Listed(f"{name}.jpg", f"images/{name}.jpg", f"annotations/trimaps/{name}.png") for name in names)


def _read_list(path: Path) -> list[str]:
    """The names in a list, each once. Raises UserError for a line of another form."""
    try:
        lines = read_bytes(path).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise UserError(
            f"{show_path(path)}: cannot be read ({error.strerror}); unpack annotations.tar.gz anew"
        ) from error
    names: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != COLUMNS or Path(words[0]).name != words[0]:
            raise UserError(
                f"{show_path(path)}: line {number} is no name with class, species and breed; unpack annotations.tar.gz "
                "anew"
            )
        names[words[0]] = None
    return list(names)

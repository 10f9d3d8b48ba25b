"""What every file of a data set holds, each read once: what is wrong with it is kept beside the rest, not raised.

A run stops at the first file that is wrong; `check` tells all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import cv2
import numpy as np

from ssl_seg import images
from ssl_seg.config import UserError
from ssl_seg.data.splits import digest_of
from ssl_seg.data.workers import Workers, collected
from ssl_seg.datasets import Dataset, Example
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.masks import IGNORE
from ssl_seg.images import Pair, Size
from ssl_seg.leaks.near_duplicates import thumb
from ssl_seg.terminal import reporter


@dataclass(frozen=True)
class Seen:
    """What is kept of an image and its mask: a few kilobytes."""

    fault: str = ""  # why the image cannot be used; and the mask
    mask_fault: str = ""
    size: Size = (0, 0)
    kind: str = ""
    used: Pair = (0.0, 0.0)
    digest: str = ""
    thumb: np.ndarray | None = None
    doubt: str = ""
    mask_size: Size = (0, 0)
    values: np.ndarray | None = None  # (N,) what the mask holds, ids or colour codes, each once
    painted: np.ndarray | None = None  # (N,) the colour codes that its palette shows for them
    pixels: np.ndarray | None = None  # (N,) of each
    coloured: bool = False
    thin: int = 0  # pixels of 255 near its edge


@dataclass(frozen=True)
class Files:
    """The images of a part, numbered, as a loader's workers read them: of a folder whatever is missing."""

    dataset: Dataset
    pairs: tuple[tuple[str, str], ...] | None  # of a folder

    nbytes = 0  # what is handed over is small, and goes by pipe

    def __len__(self) -> int:
        return len(self.dataset) if self.pairs is None else len(self.pairs)

    def name(self, index: int) -> str:
        return self.dataset.name(index) if self.pairs is None else self.pairs[index][0]

    def paths(self, index: int) -> tuple[Path, Path | None]:
        """Of a folder's image and its mask."""
        assert self.pairs is not None
        assert isinstance(self.dataset, Folder)
        image, mask = self.pairs[index]
        return self.dataset.image_folder / image, self.dataset.mask_folder / mask if mask else None

    def __getitem__(self, index: int) -> Seen:
        seen = self._image(index)
        if self.pairs is not None:
            path = self.paths(index)[1]
            return seen if path is None else _with_mask(seen, path)
        try:
            label = self.dataset.label(index) if self.dataset.class_names else None
        except UserError as error:
            return replace(seen, mask_fault=str(error))
        return seen if label is None else _holding(seen, label)

    def _image(self, index: int) -> Seen:
        name = self.name(index)
        try:
            if self.pairs is None:
                image, doubt = self.dataset.image(index).image, self.dataset.doubt(index)
                kind, used = _kind(image), (float(image.min()), float(image.max()))
            else:
                assert isinstance(self.dataset, Folder)
                path = self.paths(index)[0]
                image, refusal, kind, used = images.examine(path, self.dataset.range, self.dataset.channels)
                if image is None:
                    return Seen(refusal, kind=kind, used=used)
                doubt = images.doubt(path, self.dataset.channels)
        except UserError as error:
            return Seen(str(error))
        digest = digest_of(Example(image, None, name))
        return Seen("", "", image.shape[:2], kind, used, digest, thumb(image), doubt)


def _kind(image: np.ndarray) -> str:
    """Of an image whose file is not looked into."""
    channels = image.shape[-1]
    named = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    return f"8 bits {named}"


def _with_mask(seen: Seen, path: Path) -> Seen:
    try:
        values, palette = images.read_mask(path), images.read_palette(path)
    except UserError as error:
        return replace(seen, mask_fault=str(error))
    seen = _holding(seen, values)
    assert seen.values is not None
    if palette is not None and seen.values.max() < len(palette):
        red, green, blue = palette[seen.values].T.astype(np.int32)
        seen = replace(seen, painted=(red << 16) | (green << 8) | blue)
    return seen


def _holding(seen: Seen, mask: np.ndarray) -> Seen:
    """With what a mask `(H, W)` or `(H, W, 3)` holds."""
    coloured = mask.ndim == 3 and not (mask == mask[..., :1]).all()
    if coloured:
        codes = mask.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
        values, pixels = np.unique(codes, return_counts=True)
    else:
        mask = mask[..., 0] if mask.ndim == 3 else mask
        counts = np.bincount(mask.ravel())
        values = np.flatnonzero(counts)
        pixels = counts[values]
    void = np.zeros((0, 0), np.uint8) if coloured or IGNORE not in values else (mask == IGNORE).astype(np.uint8)
    inner = cv2.erode(void, np.ones((5, 5), np.uint8)) if void.size else void
    thin = int(void.sum()) - int(inner.sum())
    return replace(seen, mask_size=mask.shape[:2], values=values, pixels=pixels, coloured=coloured, thin=thin)


def inspect(own: Files, workers: Workers, quiet: bool) -> list[Seen]:
    """All images of a part and their masks, with a line now and then."""
    count = len(own)
    seen = []
    with reporter(count, 0, 1, quiet, unit="image") as report:
        for number, read in enumerate(collected(own, [[index] for index in range(count)], workers, itemgetter(0)), 1):
            if isinstance(read, UserError):  # of the workers themselves
                raise read
            seen.append(read)
            report.step(number, {})
    return seen

"""Stacks: TIFF files of many pages, each an image, with masks in stacks of as many pages.

tifffile writes them, and `images.pages` reads them by it. Ours is what it leaves to its callers: which page is whose
mask, and what is black and white of 12 bits in 16.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import tifffile
from pydantic import NonNegativeInt, model_validator

from ssl_seg import files
from ssl_seg.config import UserError, load, user_path
from ssl_seg.datasets import Example, place_in
from ssl_seg.datasets.folder import by_stem, is_folder, scan
from ssl_seg.datasets.labelled import Labelled
from ssl_seg.datasets.masks import check_ids
from ssl_seg.images import Pair, Range, RangeField, read_mask, show_path
from ssl_seg.images.limits import MAX_CHANNELS
from ssl_seg.images.pages import PagedTiff, opened
from ssl_seg.images.values import in_bytes, three_channels

SUFFIXES = frozenset({".tif", ".tiff"})
# What is cut off below and above. Programs cut 0 to 1 % (ImageJ 0.18 on either side, CSBDeep 1 and 0.2, nnU-Net 0.5 of
# CT): small bright things, such as spots, are often less than 1 % of the pixels, and hot ones less than 0.1 %.
PERCENTILES = (0.1, 99.9)
SAMPLED_PAGES = 32  # for percentiles
SAMPLED_SIDE = 512  # pixels of each of them, along a side, evenly apart


class Entry(NamedTuple):
    """A stack and its masks, as their directories have them."""

    stem: str
    image: str
    mask: str  # '' where there are none
    pages: int
    dtype: str
    bits: int | None  # that are used, where the file says it is fewer than it has
    seen_bits: int  # of the largest value that ImageJ showed; 0 where that says nothing


class Stack(Labelled):
    """The pages of TIFF stacks, named `<stack>/<number>`, from 0 on.

    `images` is a file or a folder of them, and `masks` the same: a stack of masks has its images' relative path and as
    many pages. All axes but channels and sides count pages, in the file's own order (of TZCYX first all Z of the first
    T). One channel is grey and three are RGB; `channel` takes one of them. A network that takes another number
    of channels (`model.channels`) gets all of pages that have as many. The sequence of a page is its stack.

    `range` gives the stored values that become black and white, of more than 8 bits: the same for all pages of all
    stacks. `bits`, the default, is 0 and the largest value of the bits that are used: by the file's word (OME's
    SignificantBits, bits a sample), else by the largest value of all pages, or that ImageJ showed as white.
    `percentile` is `PERCENTILES` of the values, of pages evenly apart. Signed and float values have no bits and need
    one of the others. A run tells what it takes.

    Errors (UserError, one line): as of `folder`, and other numbers or orders of pages, pages that differ, are cut off
    or were never written, several files for one stack, palettes, turned pages, a kind of compression that needs
    imagecodecs.
    """

    # stored values that are black and white, or by what they are told; None: bits
    range: RangeField | Literal["bits", "percentile"] | None = None
    channel: NonNegativeInt | None = None  # counted from 0

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        if self.masks is not None and self.classes is None:
            raise ValueError("classes is missing; write their names in the order of their ids, or their number")
        if self.masks == self.images:
            raise ValueError("images and masks are one path; give each its own file or folder")
        return self

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        entry, page = self._at(index)
        return f"{entry.stem}/{page:0{max(4, len(str(entry.pages - 1)))}d}"

    def sequence(self, index: int) -> str:
        return self._at(index)[0].stem

    def files(self, index: int) -> tuple[Path, ...]:
        entry, _ = self._at(index)
        return tuple(Path(path) for path in (entry.image, entry.mask) if path)

    def image(self, index: int) -> Example:
        entry, page = self._at(index)
        file = opened(entry.image)
        values = file.read(page, self.channel)
        value_range, most = self._chosen.range or (0, 255), self._chosen.most
        if most is not None and values.max() > most:
            raise UserError(
                f"{file.shown}: page {page} holds {values.max()}, more than the bits that the files declare "
                f"({most}); write range: [0, {2 ** int(values.max()).bit_length() - 1}]"
            )
        image = in_bytes(values, value_range, file.is_inverted)
        # Grey is one channel of a network that takes one, and three alike of one that takes colours.
        image = image[..., None] if image.ndim == 2 and self.channels == 1 else three_channels(image)
        return Example(image, None, self.name(index))

    def read(self, index: int) -> Example:
        example = self.image(index)
        return example if self.masks is None else Example(example.image, self.label(index), example.name)

    def label(self, index: int) -> np.ndarray | None:
        if self.masks is None:
            return None
        self._check_ids()
        entry, page = self._at(index)
        file = opened(entry.mask)
        try:
            return self._meaning.label(file.ids(page))
        except ValueError as error:
            raise UserError(f"{file.shown} (mask of {show_path(entry.image)}), page {page}: {error}") from error

    def value_range(self) -> Range | None:
        # What wants a range and has none is refused when it is read: a model's may come first.
        return None if self.range is None and self._wants_range else self._chosen.range

    def in_range(self, value_range: Range) -> Self:
        if self.range is not None or _has_8_bits(self._entries[0]):
            return self
        return load(type(self), {**self.dump(), "range": value_range})

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        if with_labels and self.masks is not None:
            self._check_ids()
        return self._listed.notes + ((f"{show_path(self.images)}: {self._chosen.note}",) if self._chosen.note else ())

    def join_masks(self, masks: Sequence[Path], folder: Path) -> None:
        for number, entry in enumerate(self._entries):
            own = masks[self._ends[number] - entry.pages : self._ends[number]]
            write_stack(folder / f"{entry.stem}.tif", own)

    def _at(self, index: int) -> tuple[Entry, int]:
        number, page = place_in(self._ends, index)
        return self._entries[number], page

    @cached_property
    def _ends(self) -> list[int]:
        """How many pages there are up to the end of each stack."""
        return np.cumsum([entry.pages for entry in self._entries]).tolist()

    @cached_property
    def _listed(self) -> _Listed:
        """The stacks that are there; workers inherit it."""
        images = user_path(self.images)
        masks = None if self.masks is None else user_path(self.masks)
        if masks is not None and images.is_file() != masks.is_file():
            raise UserError(f"{show_path(masks)}: images and masks are both a file, or both a folder; give two alike")
        if images.is_file():
            pairs, notes = [(images, masks)], ()
        elif is_folder(images):
            found = scan(images, masks, SUFFIXES, SUFFIXES)
            by_stem(images, [name for name, _ in found.pairs])
            pairs, notes = [(images / name, masks / mask if masks else None) for name, mask in found.pairs], found.notes
        else:
            raise UserError(f"{show_path(images)}: no such file or folder; check the path")
        root = images.parent if images.is_file() else images
        entries = [self._entry(root, image, mask) for image, mask in pairs]
        kinds = {(np.dtype(entry.dtype).kind, np.dtype(entry.dtype).itemsize): entry for entry in entries}
        if len(kinds) > 1:
            one, other, *_ = kinds.values()
            raise UserError(
                f"{show_path(other.image)}: {other.dtype} values, and {show_path(one.image)} has {one.dtype}; name a "
                "data set for each kind"
            )
        return _Listed(tuple(entries), notes)

    @property
    def _entries(self) -> tuple[Entry, ...]:
        return self._listed.entries

    def _entry(self, root: Path, image: Path, mask: Path | None) -> Entry:
        file = opened(str(image))
        file.check_shown()
        self._check_channels(file)
        if mask is not None:
            labels = opened(str(mask))
            labels.check_ids(has_colours=bool(self._meaning.colours))
            if len(labels) != len(file):
                raise UserError(
                    f"{labels.shown}: {len(labels)} pages, and its images {file.shown} have {len(file)}; each page "
                    "needs one of the other"
                )
            if labels.size != file.size:
                (height, width), (own_height, own_width) = file.size, labels.size
                raise UserError(
                    f"{labels.shown}: pages of {own_height} x {own_width} pixels (H x W), and its images {file.shown} "
                    f"have {height} x {width}; make the masks anew"
                )
            if {*file.order} == {*labels.order} == {*"TZ"} and file.order != labels.order:
                raise UserError(
                    f"{labels.shown}: its pages are in the order {labels.order}, and those of {file.shown} in "
                    f"{file.order}; save both alike"
                )
        stem = image.relative_to(root).with_suffix("").as_posix()
        return Entry(stem, str(image), str(mask or ""), len(file), str(file.dtype), file.declared_bits, file.seen_bits)

    def _check_channels(self, file: PagedTiff) -> None:
        """Raise UserError unless pages have as many as are read, or are grey where three are."""
        count = file.channels
        if self.channel is not None:
            if self.channel >= count:
                raise UserError(
                    f"{file.shown}: has {count} channels, counted from 0, so there is no channel {self.channel}; write "
                    "another"
                )
            count = 1
        if count in (self.channels, 1) and self.channels in (count, 3):
            return
        others = [f"channel: 0 to {count - 1} for one of them"] if count > 1 else []
        others += [f"model.channels={count} for all of them"] if count <= MAX_CHANNELS else []
        wanted = "one (grey) or three (RGB)" if self.channels == 3 else f"{self.channels}, which the network takes"
        raise UserError(
            f"{file.shown}: pages of {count} channels ({file.axes}); write {', or '.join(others)}, or save {wanted}"
        )

    @cached_property
    def _chosen(self) -> _Chosen:
        """Black and white for all pages; workers inherit it."""
        where = show_path(self.images)
        if _has_8_bits(self._entries[0]):
            if self.range is not None:
                raise UserError(
                    f"{where}: has 8 bits a channel, and range is for more; leave range out of the data set"
                )
            return _Chosen(None)
        if isinstance(self.range, tuple):
            return _Chosen(self.range)
        if self.range == "percentile":
            black, white = self._percentiles()
            how = f"{PERCENTILES[0]:g} and {PERCENTILES[1]:g} % of the values are below"
        elif self._wants_range:
            raise UserError(
                f"{where}: {self._entries[0].dtype} values have no white of their own; say which are black and white: "
                "range: [black, white] in the data set, or range: percentile"
            )
        else:
            return self._by_bits()
        return _Chosen((black, white), f"{black:g} is black and {white:g} white, since {how}; {_keep(black, white)}")

    @property
    def _wants_range(self) -> bool:
        """Whether values have no bits that could tell white."""
        return np.dtype(self._entries[0].dtype).kind != "u"

    def _by_bits(self) -> _Chosen:
        told = [entry.bits for entry in self._entries]
        bits = max((own for own in told if own is not None), default=1)
        if None not in told:
            how = f"the files declare {bits} bits"
            return _Chosen((0.0, 2.0**bits - 1), _say_bits(bits, how), most=2**bits - 1)
        largest = 0
        for index in range(len(self)):
            entry, page = self._at(index)
            if entry.bits is None:
                with suppress(UserError):  # of a page that cannot be read whoever needs it speaks
                    largest = max(largest, int(opened(entry.image).read(page, self.channel).max()))
        seen = max(entry.seen_bits for entry in self._entries)
        bits = max(bits, largest.bit_length(), seen)
        how = f"the largest value is {largest}" + (f" and ImageJ showed {seen} bits" if seen == bits else "")
        return _Chosen((0.0, 2.0**bits - 1), _say_bits(bits, how), most=2**bits - 1)

    def _percentiles(self) -> Pair:
        parts = []
        for index in np.unique(np.linspace(0, len(self) - 1, SAMPLED_PAGES).round().astype(int)):
            entry, page = self._at(index)
            with suppress(UserError):
                values = opened(entry.image).read(page, self.channel)
                step = [max(1, side // SAMPLED_SIDE) for side in values.shape[:2]]
                some = values[:: step[0], :: step[1]].ravel()
                parts.append(some[np.isfinite(some)])
        values = np.concatenate([*parts, np.empty(0)])
        # Six digits, as they are printed: who writes down what is told takes the same.
        black, white = (float(f"{own:.6g}") for own in np.percentile(values, PERCENTILES)) if len(values) else (0, 0)
        if black >= white:
            raise UserError(
                f"{show_path(self.images)}: {PERCENTILES[0]:g} and {PERCENTILES[1]:g} % of its values are one value, "
                f"{black:g}; write range: [black, white]"
            )
        return black, white

    def _check_ids(self) -> None:
        _ = self._are_ids

    @cached_property
    def _are_ids(self) -> bool:
        """Raises UserError where all masks are black and white among more classes."""
        pages = (opened(entry.mask).ids(page) for entry in self._entries for page in range(entry.pages))
        check_ids(self._meaning, user_path(self.masks or ""), pages)
        return True


class _Listed(NamedTuple):
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


class _Chosen(NamedTuple):
    """Black and white of more than 8 bits, and a line about how they came."""

    range: Range | None
    note: str = ""
    most: int | None = None  # the largest value, where the files declare their bits


def _has_8_bits(entry: Entry) -> bool:
    return entry.dtype == "uint8"


def _keep(black: float, white: float) -> str:
    return f"to keep it whatever the files, write range: [{black:.10g}, {white:.10g}]"


def _say_bits(bits: int, how: str) -> str:
    white = 2**bits - 1
    return f"0 is black and {white} white, since {how}; {_keep(0, white)}"


# ---- files ----


def write_stack(path: Path, masks: Sequence[Path]) -> None:
    """Masks of one size, read one at a time, as the pages of one TIFF of uint8; whole or not at all."""
    first = read_mask(masks[0])
    part = path.with_name(f".{path.name}.part")
    with files.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tifffile.imwrite(
                part,
                map(read_mask, masks),
                shape=(len(masks), *first.shape),
                dtype=np.uint8,
                photometric="minisblack",
                compression="zlib",
                ome=path.name.endswith(".ome.tif"),  # which other programs expect by the name
                metadata={"axes": "ZYX"},
            )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

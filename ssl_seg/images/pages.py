"""TIFF by its axes: pages, planes and samples of any number and kind, read page by page.

tifffile knows the axes of ImageJ and OME, BigTIFF and stacks whose pages have no directory. Ours is a refusal where it
goes on with fewer pages, or zeros in their place, after a line in a log. It takes 0.4 s to import, so this file is
reached by those alone who read such files.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NoReturn

import numpy as np
import tifffile

from ssl_seg.config import UserError
from ssl_seg.images.limits import Size, check_size, show_path
from ssl_seg.images.opening import DECODE_ERRORS
from ssl_seg.images.tiff import NO_DATA

COLOURS = "CS"  # axes: channels in pages of their own, or within a page
SIDES = "YX"
NAMELESS = "IQ"  # axes of pages of which nothing is said
MIN_IS_WHITE, PALETTE = 0, 3  # photometric interpretations
SHOWN = frozenset({MIN_IS_WHITE, 1, 2})  # those that are grey or RGB as they are stored
YCBCR, JPEG = 6, 7  # a photometric that is decoded to RGB where it is compressed so
SPEAKING = ("shaped", "mmstack", "ome", "imagej", "lsm")  # kinds of metadata that say what a page is
ORIENTATION = 274  # a tag
IMAGECODECS = "imagecodecs"
OPENED = 64  # files whose directories a process keeps
MOST_ID = 65535  # in a mask


def opened(path: str) -> PagedTiff:
    """The file of pages, whose directories are read once a process while it is the same."""
    try:
        about = os.stat(path)
    except OSError as error:
        raise UserError(f"{show_path(path)}: cannot be read ({error.strerror}); put it back") from error
    return _open(path, about.st_size, about.st_mtime_ns)


class PagedTiff:
    """The directories of a TIFF. The file itself is open only while a page is read, so it may cross a fork."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shown = show_path(path)
        with naming_tiff(self.shown), tifffile.TiffFile(path) as self.tiff:
            pictures = [own for own in self.tiff.series if not own.keyframe.subfiletype & NO_DATA]
            series = self._one_kind(pictures)
            self.parts = [[page for page in own if page is not None] for own in pictures]
            self.keyframe = series.keyframe
            is_plain = self.keyframe.bitspersample == 8 * series.dtype.itemsize
            self.starts = [own.dataoffset if is_plain else None for own in pictures]
            self.palette = self.keyframe.colormap
            self.dtype = np.dtype(series.dtype).newbyteorder("=")
            self.declared_bits, self.seen_bits = self._bits()
            if self.keyframe.tags.valueof(ORIENTATION, 1) != 1:
                self._refuse("its pages are turned by an orientation tag; save them upright")
        depth = len(self.keyframe.shape)
        lead, self.inner = series.axes[:-depth], series.axes[-depth:]
        if {*self.inner} - {*COLOURS, *SIDES} or {*SIDES} - {*self.inner} or {*lead} & {*SIDES}:
            self._refuse(f"its pages have the axes {self.inner}, which are not read; save each plane as a page (YX)")
        if "C" in lead and {*COLOURS} & {*self.inner}:
            self._refuse(f"has channels on two axes ({series.axes}); save grey pages with an axis of channels")
        shape = series.shape[:-depth]
        sides = dict(zip(self.inner, self.keyframe.shape, strict=True))
        self.size: Size = (sides["Y"], sides["X"])
        # The number of each plane, page by page, and its channels where they are planes of their own.
        planes = np.arange(math.prod(shape)).reshape(shape)
        planes = np.moveaxis(planes, lead.index("C"), -1) if "C" in lead else planes[..., None]
        self.planes = planes.reshape(-1, planes.shape[-1])
        for start, own in zip(self.starts, self.parts, strict=True):
            # One that holds all is that of a large ImageJ stack.
            if len(own) != self.planes.size and (start is None or len(own) > 1):
                self._refuse(f"has {len(own)} pages, not the {self.planes.size} that its metadata name; save it anew")
        self.axes, self.order = series.axes, lead.replace("C", "")
        self.channels = planes.shape[-1] * math.prod(sides.get(axis, 1) for axis in COLOURS)
        self.is_inverted = self.keyframe.photometric == MIN_IS_WHITE
        self._check()

    def __len__(self) -> int:
        return len(self.parts) * len(self.planes)

    def read(self, page: int, channel: int | None = None) -> np.ndarray:
        """The values of a page, `(H, W)` of one channel, else `(H, W, C)`."""
        part, number = divmod(page, len(self.planes))
        planes = self.planes[number]
        with naming_tiff(f"{self.shown}, page {page}"):
            if len(planes) > 1:
                chosen = planes if channel is None else planes[[channel]]
                values = np.stack([self._plane(part, int(plane)) for plane in chosen], axis=-1)
            else:
                values = self._plane(part, int(planes[0]))
                for axis in {*COLOURS} & {*self.inner}:
                    values = np.moveaxis(values, self.inner.index(axis), -1)
                if values.ndim == 3 and channel is not None:
                    values = values[..., channel]
        return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values

    def ids(self, page: int) -> np.ndarray:
        """The values of a mask, `(H, W)` or colours `(H, W, 3)`. Raises UserError for what can be no id."""
        values = self.read(page)
        if values.dtype == bool:
            return values.astype(np.uint8)
        if values.min() < 0 or values.max() > MOST_ID:
            raise UserError(
                f"{self.shown}, page {page}: ids {values.min()} to {values.max()} do not fit 16 bits; save them with 8 "
                "or 16"
            )
        return values if values.dtype == np.uint8 else values.astype(np.uint16)

    def check_shown(self) -> None:
        """Raise UserError for pages that are no pictures: of a palette, of inks, of values that are no numbers."""
        photometric, compression = self.keyframe.photometric, self.keyframe.compression
        if photometric == PALETTE:
            self._refuse(
                "has a palette (ImageJ: a lookup table); save it as RGB, or as grey (Image > Lookup Tables > Grays)"
            )
        if photometric not in SHOWN and (photometric, compression) != (YCBCR, JPEG):
            self._refuse(f"pixels of photometric {int(photometric)} are not read; save them as grey or RGB")
        if self.dtype.kind not in "uif":
            self._refuse(f"{self.dtype} values are no image; save grey or RGB of 8 bits or more")

    def check_ids(self, has_colours: bool) -> None:
        """Raise UserError for pages that are no masks."""
        if self.is_inverted:
            self._refuse("greys are stored upside down (white is 0); save the masks with black as 0")
        if (
            self.dtype.kind not in "bui"
            or self.channels not in (1, 3)
            or (self.channels == 3 and self.dtype != np.uint8)
        ):
            kind = f"{self.channels} channels of {self.dtype} values"
            self._refuse(f"{kind} are no class ids; save the masks as 8- or 16-bit grey, or 8-bit RGB")
        palette = self.palette
        if palette is None:
            return
        if has_colours:
            self._refuse("has a palette, and mapping names colours; save the masks as RGB, or map ids")
        greys = (palette == palette[:1]).all()
        if greys and not np.array_equal(palette[0] >> 8, np.arange(palette.shape[1])):
            self._refuse("has a palette of greys that are not the ids; save the masks as plain grey")

    def _bits(self) -> tuple[int | None, int]:
        """The bits that are used, where the file says it is fewer than it has; those of what ImageJ showed as white."""
        all_bits = 8 * self.dtype.itemsize
        told = [int(self.keyframe.bitspersample)]
        told += [int(own) for own in re.findall(r'\bSignificantBits="(\d{1,2})"', self.tiff.ome_metadata or "")]
        shown = (self.tiff.imagej_metadata or {}).get("max", 0)
        # The largest value that there can be is what programs write which do not know.
        seen = int(shown).bit_length() if isinstance(shown, int | float) and 0 < shown < 2**all_bits - 1 else 0
        declared = [bits for bits in told if 0 < bits < all_bits]
        return max(declared, default=None), seen if seen < all_bits else 0

    def _plane(self, part: int, plane: int) -> np.ndarray:
        keyframe, start = self.keyframe, self.starts[part]
        if start is not None:  # one after the other and as they are: those of a large ImageJ stack have no directory
            dtype = np.dtype(self.tiff.byteorder + self.dtype.char)
            offset = start + plane * keyframe.size * dtype.itemsize
            values = np.fromfile(self.path, dtype, keyframe.size, offset=offset)
            if values.size < keyframe.size:
                raise OSError("its end is missing")
            return values.reshape(keyframe.shape).astype(self.dtype)
        page = self.parts[part][plane]
        if 0 in (*page.dataoffsets, *page.databytecounts):
            raise OSError("a part of the page was never written")
        if max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > os.path.getsize(self.path):
            raise OSError("its end is missing")
        self.tiff.filehandle.open()
        try:
            return np.array(page.asarray(maxworkers=1)).astype(self.dtype)
        finally:
            self.tiff.filehandle.close()

    def _one_kind(self, found: Sequence[tifffile.TiffPageSeries]) -> tifffile.TiffPageSeries:
        """The first of the series in a file, which all have to be like it."""
        if not found:
            self._refuse("holds no page that is a picture; copy it again or remove it")
        first = found[0]
        spoken = [kind for kind in SPEAKING if getattr(self.tiff, f"is_{kind}")]
        if spoken and first.kind not in spoken:
            self._refuse(f"its metadata ({spoken[0]}) do not fit its pages; save it anew")
        kinds = [f"{'x'.join(map(str, series.shape))} {series.dtype} ({series.axes})" for series in found]
        # Pages of several kinds are sorted by kind, so what looks alike may be out of order.
        if len({*kinds}) > 1 or (len(found) > 1 and first.kind not in ("shaped", "ome")):
            other = next((kind for kind in kinds if kind != kinds[0]), kinds[-1])
            self._refuse(f"holds pages of several kinds, {kinds[0]} and {other}; save those of one kind alone")
        for page in (page for series in found for page in series):
            if page is None:
                self._refuse("lacks pages that its metadata name; save it anew")
            elif page.parent is not self.tiff:
                self._refuse("names pages of other files; save the stack as one file")
        return first

    def _check(self) -> None:
        try:
            check_size(self.size)
        except ValueError as error:
            self._refuse(f"pages of {error}")
        if self.starts[0] is None:
            try:
                self.read(0)
            except UserError as error:  # of other faults whoever reads that page is told
                if IMAGECODECS in str(error):
                    raise

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.shown}: {what}")


_open = lru_cache(maxsize=OPENED)(lambda path, size, modified: PagedTiff(path))


class _Told(logging.Handler):
    """The first thing that tifffile says and goes on after."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        # Warnings may be about odd metadata that are not read, but those about series say that pages are others.
        if record.levelno >= logging.ERROR or record.funcName.startswith("_series"):
            self.first = self.first or record.getMessage()


@contextmanager
def naming_tiff(shown: str) -> Iterator[None]:
    """What goes wrong inside becomes one line about a file, also what tifffile only logs."""
    logger, told = logging.getLogger("tifffile"), _Told()
    logger.addHandler(told)
    former, logger.propagate = logger.propagate, False
    try:
        yield
        if told.first:
            raise OSError(told.first)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check its permissions") from error
    except (tifffile.TiffFileError, *DECODE_ERRORS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if IMAGECODECS in reason:
            kind = re.search(r"COMPRESSION\.(\w+)", reason)
            what = f"compressed by {kind[1]}" if kind else "packed"
            raise UserError(
                f"{shown}: {what}, for which another package is needed; pip install {IMAGECODECS}, or save it with "
                "deflate or none"
            ) from error
        raise UserError(f"{shown}: no TIFF, damaged or cut off ({reason}); copy it again or remove it") from error
    finally:
        logger.removeHandler(told)
        logger.propagate = former

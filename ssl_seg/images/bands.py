"""Images of any number of channels, as they are stored: bands of a satellite, stains of a microscope, arrays of numpy.

Where pictures are what a person sees, here a channel is what the file has: nothing is laid on white, no palette is
looked up, and alpha is a channel as any. TIFFs are read by their axes (`pages`), .npy and .npz without pickles, PNGs of
grey or RGB with alpha by Pillow.

Which axis holds the channels is decided by what the file says. An array says its shape alone: the axis that is as long
as the wanted number of channels.
"""

from __future__ import annotations

import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy
from PIL.ImageFile import ImageFile

from ssl_seg.config import UserError, first_line
from ssl_seg.images.limits import MAX_CHANNELS, Size, check_file, check_pixels, show_path
from ssl_seg.images.opening import ARRAY_SUFFIXES, DECODE_ERRORS, decode, is_animation, layout_of, upright_frame
from ssl_seg.images.pages import NAMELESS, PagedTiff, opened
from ssl_seg.images.pictures import Examined
from ssl_seg.images.sources import Source
from ssl_seg.images.values import Range, in_bytes, pairs_of

TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
WITH_ALPHA = {2: "LA", 4: "RGBA"}  # Pillow's modes of as many channels
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Bands:
    """An image file of which so many channels are wanted.

    Its methods raise UserError with one line for a file that cannot be read, has another number of channels, or does
    not say which of its axes they are.
    """

    def __init__(self, path: str | Path, channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self.shown = show_path(path)
        self.suffix = self.path.suffix.lower()

    def read(self, value_range: Range | None = None) -> np.ndarray:
        """`(H, W, C)` uint8, scaled as `read_image` says."""
        values = self._values()
        return in_bytes(values, self._range_for(values.dtype, value_range), self._is_inverted)

    def examine(self, value_range: Range | None = None) -> Examined:
        """As `images.examine`."""
        values = self._values()
        try:
            image, refusal = in_bytes(values, self._range_for(values.dtype, value_range), self._is_inverted), ""
        except UserError as error:
            image, refusal = None, str(error)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        kind = {"f": "float ", "i": "signed "}.get(values.dtype.kind, "")
        of = f"{self.channels} channels" if self.channels > 1 else "grey"
        return Examined(image, refusal, f"{8 * values.dtype.itemsize} bits {kind}{of}", (low, high))

    def largest(self) -> int | None:
        """The largest stored value where a channel has 16 bits; None for others."""
        return int(self._values().max()) if self._dtype == np.uint16 else None

    def default_range(self) -> Range | None:
        """The values that are black and white where no range is given; None where there are none, and of 8 bits."""
        return (0.0, self._white) if self._dtype == np.uint16 else None

    def takes_range(self) -> bool:
        """Whether it has more than 8 bits a channel."""
        return self._dtype != np.uint8

    def size(self) -> Size:
        """(H, W)"""
        if self._tiff is not None:
            return self._tiff.size
        height, width = self._values().shape[:2]
        return height, width

    # ---- what the file says ----

    @cached_property
    def _tiff(self) -> PagedTiff | None:
        if self.suffix not in TIFF_SUFFIXES:
            return None
        check_file(self.path, self.shown)
        file = opened(str(self.path))
        file.check_shown()
        return file

    @property
    def _is_inverted(self) -> bool:
        return self._tiff is not None and self._tiff.is_inverted

    @property
    def _white(self) -> float:
        """Of 16 bits, or of as many as a TIFF declares."""
        bits = self._tiff.keyframe.bitspersample if self._tiff is not None else 16
        return 2.0**bits - 1

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        if self._tiff is not None:
            return self._tiff.dtype
        if self.suffix not in ARRAY_SUFFIXES:
            return np.dtype(np.uint8)
        return self._array(header_alone=True).dtype.newbyteorder("=")  # whatever machine has written it

    def _range_for(self, dtype: np.dtype[Any], value_range: Range | None) -> Range:
        """What is black and white. Raises UserError where nobody knows, and for another number than there are."""
        if dtype == np.uint8:
            if value_range is not None:
                self._refuse(
                    "has 8 bits a channel, and range is for more; leave range out of the data set, or the image"
                )
            return 0.0, 255.0
        own = value_range or ((0.0, self._white) if dtype == np.uint16 else None)
        if own is None:
            self._refuse(
                f"{dtype} values have no white of their own; say which are black and white: range: [black, white] in "
                "the data set, or one of these for each channel"
            )
        if len(pairs_of(own)) not in (1, self.channels):
            self._refuse(
                f"range has {len(pairs_of(own))} pairs for {self.channels} channels; give one, or one for each"
            )
        return own

    # ---- values ----

    def _values(self) -> np.ndarray:
        """`(H, W, C)` of the file's own type."""
        if self._tiff is not None:
            return self._of_tiff(self._tiff)
        if self.suffix in ARRAY_SUFFIXES:
            return self._channels_last(self._array())
        return decode(self.path, self._of_pillow)

    def _of_tiff(self, file: PagedTiff) -> np.ndarray:
        """Channels are an axis of channels or samples, else pages of which nothing is said."""
        if len(file) == 1:
            values = file.read(0)
            values = values[..., None] if values.ndim == 2 else values
        elif file.channels == 1 and file.order and {*file.order} <= {*NAMELESS}:
            if len(file) != self.channels:
                self._refuse_count(len(file), f"{len(file)} pages")
            values = np.stack([file.read(page) for page in range(len(file))], axis=-1)
        else:
            self._refuse(
                f"{len(file)} pages that are no channels ({file.axes}); read them by {{type: stack}}, or save each "
                "as a file of its own"
            )
        if values.shape[-1] != self.channels:
            self._refuse_count(values.shape[-1], f"axes {file.axes}")
        return values

    def _channels_last(self, values: np.ndarray) -> np.ndarray:
        """By the axis that is as long as there are channels."""
        if values.ndim == 2 and self.channels in (1, 3):  # grey, three times where colours are wanted
            return np.repeat(values[..., None], self.channels, axis=-1)
        if values.ndim == 2:
            self._refuse_count(1, f"shape {values.shape}")
        if values.ndim != 3 or 0 in values.shape:
            self._refuse(f"an array of shape {values.shape}; save (H, W, C) or (C, H, W)")
        places = [axis for axis in (0, 2) if values.shape[axis] == self.channels]
        if not places:
            self._refuse_count(min(values.shape[0], values.shape[2]), f"shape {values.shape}")
        if len(places) > 1:
            self._refuse(
                f"an array of shape {values.shape}, whose first or last axis may be the {self.channels} channels; save "
                f"images of more than {self.channels} pixels a side, or a TIFF, which says what its axes are"
            )
        return np.moveaxis(values, places[0], -1)

    def _array(self, header_alone: bool = False) -> np.ndarray:
        """The only array in a file of numpy; of its header an array of one value that stands for all."""
        check_file(self.path, self.shown)
        try:
            if self.suffix == ".npy":
                with self.path.open("rb") as file:
                    self._check_header(file)
                values = npy.open_memmap(self.path, mode="r")
            else:
                with zipfile.ZipFile(self.path) as held:
                    names = [name for name in held.namelist() if name.endswith(".npy")]
                    if len(names) != 1:
                        self._refuse(f"holds {len(names)} arrays; save the image alone")
                    with held.open(names[0]) as file:
                        shape, dtype = self._check_header(file)
                    if header_alone:
                        return np.broadcast_to(np.zeros((), dtype), shape)
                    with held.open(names[0]) as file:
                        values = npy.read_array(file, allow_pickle=False)
        except UserError:
            raise
        except (zipfile.BadZipFile, *DECODE_ERRORS) as error:
            self._refuse(f"no array of numpy, damaged or cut off ({first_line(error)}); save it anew")
        if values.dtype.kind not in "uif":
            self._refuse(f"{values.dtype} values are no image; save numbers")
        return values if header_alone else np.array(values, dtype=values.dtype.newbyteorder("="))

    def _check_header(self, file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and type, before any memory is taken for them."""
        version = npy.read_magic(file)
        if version not in HEADERS:
            self._refuse(f"an array of format {version}, which is not read; save it by numpy.save")
        shape, _, dtype = HEADERS[version](file)
        check_pixels(int(np.prod(shape, dtype=np.float64) / self.channels), self.shown)
        return shape, dtype

    def _of_pillow(self, image: ImageFile, _: Source) -> np.ndarray:
        mode = WITH_ALPHA.get(self.channels)
        deep = layout_of(image).startswith("16")
        if image.mode != mode or deep or is_animation(image):
            bits = " of 16 bits" if deep else ""
            self._refuse_count(len(image.getbands()), f"a {image.format} of mode {image.mode}{bits}")
        return np.array(upright_frame(image))

    def _refuse_count(self, found: int, how: str) -> NoReturn:
        other = f"give model.channels={found}, or " if found in range(1, MAX_CHANNELS + 1) else ""
        self._refuse(
            f"has {found} channel{'s' * (found != 1)} ({how}), and the network takes {self.channels} (model.channels); "
            f"{other}save TIFF or .npy with {self.channels}"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.shown}: {what}")

"""An image as `(H, W, C)` uint8, whatever its file: pictures to RGB or grey, bands of any other number as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl_seg.config import UserError
from ssl_seg.images import opening, pictures
from ssl_seg.images.limits import show_path
from ssl_seg.images.opening import ARRAY_SUFFIXES, Header
from ssl_seg.images.pictures import Examined
from ssl_seg.images.sources import Packed, Source
from ssl_seg.images.values import Range, pairs_of

if TYPE_CHECKING:
    from ssl_seg.images.bands import Bands


def read_image(path: str | Source, value_range: Range | None = None, channels: int = 3) -> np.ndarray:
    """An image `(H, W, C)` uint8, upright by its EXIF orientation.

    Of three channels it is the picture as a person sees it, in RGB. Transparent pixels are laid on white, CMYK, palette
    and bilevel pictures are converted, grey is three times itself, of an animation the first frame is taken. Of one
    channel it is the same in grey, and colours are refused. Any other number, and arrays of numpy, are `bands`: as they
    are stored.

    Of 16 bits 65535 is white. `value_range` says which stored values are black and white instead, in images of more
    than 8 bits a channel: between them values are scaled, beyond them cut off, and what is no number is black. Signed,
    32-bit and float values have no white of their own, so they are read with a range only.

    Raises UserError with one line for a file that is missing, empty, damaged, no image, of several pages, of another
    number of channels, of values that are neither grey nor colours, or larger than MAX_PIXELS.
    """
    bands = _bands(path, channels)
    if bands is not None:
        return bands.read(value_range)
    rgb = pictures.read_rgb(path, _one(value_range, path))
    return rgb if channels == 3 else _grey(rgb, show_path(path))


def picture_of(given: object, value_range: Range | None = None, channels: int = 3) -> np.ndarray:
    """An image in any form, as `read_image` gives it: `(H, W, C)` uint8.

    A path, of which `value_range` is taken where the file has more than 8 bits; a picture of Pillow; an array
    `(H, W, C)` or, grey, `(H, W)` of uint8, or of another type with `value_range`, which says what is black and white
    in all that has more than 8 bits (of uint16 alone 65535 is white). Raises UserError as `read_image`, and for
    anything else.
    """
    if isinstance(given, str | Path):
        # As `Dataset.in_range` of a data set: 8 bits have their white, and a file that says it needs no telling.
        own = value_range is not None and takes_range(given, channels) and default_range(given, channels) != value_range
        return read_image(given, value_range if own else None, channels)
    if isinstance(given, np.ndarray):
        return pictures.of_array(given, value_range, channels)
    if channels not in (1, 3):
        raise UserError(f"an image of type {type(given).__name__}: give a path, or an array (H, W, {channels})")
    rgb = pictures.of_pillow(given, _one(value_range, "the picture"))
    return rgb if channels == 3 else _grey(rgb, "the picture")


def examine(path: str | Source, value_range: Range | None = None, channels: int = 3) -> Examined:
    """As `read_image`, with what the pixels were before they had 8 bits.

    Of 16-bit colours the upper byte tells what is used, so that up to 255 more may be. Raises UserError for what cannot
    be decoded.
    """
    bands = _bands(path, channels)
    if bands is not None:
        return bands.examine(value_range)
    found = pictures.examine_rgb(path, _one(value_range, path))
    if channels == 3 or found.image is None:
        return found
    try:
        return found._replace(image=_grey(found.image, show_path(path)))
    except UserError as error:
        return found._replace(image=None, refusal=str(error))


def largest_value(path: str | Source, channels: int = 3) -> int | None:
    """The largest stored value of an image of 16 bits a channel, for colours up to 255 too high; None for others."""
    bands = _bands(path, channels)
    return pictures.largest_of_rgb(path) if bands is None else bands.largest()


def default_range(path: str | Source, channels: int = 3) -> Range | None:
    """The values that `read_image` takes for black and white where no range is given; None where there are none.

    So of 8 bits a channel. No pixel is decoded.
    """
    bands = _bands(path, channels)
    return pictures.range_of_rgb(path) if bands is None else bands.default_range()


def takes_range(path: str | Source, channels: int = 3) -> bool:
    """Whether an image is read with a range where one is known: it has more than 8 bits a channel."""
    bands = _bands(path, channels)
    return pictures.range_of_rgb(path) is not None if bands is None else bands.takes_range()


def doubt(path: str | Source, channels: int = 3) -> str:
    """What a person should look at in an image that can be decoded, in a few words; '' for nothing.

    A JPEG is decoded once more, for the warnings that Pillow swallows. Raises UserError for one that has lost pixels.
    """
    return pictures.doubt_of(path) if _bands(path, channels) is None else ""


def read_header(path: str | Source, channels: int = 3) -> Header:
    """What an image file says of itself. Of a picture no pixel is decoded; bands lie as they are stored."""
    bands = _bands(path, channels)
    return opening.read_header(path) if bands is None else Header(1, bands.size())


def _bands(path: str | Source, channels: int) -> Bands | None:
    """The file as bands; None for a picture."""
    if isinstance(path, Packed):
        if channels not in (1, 3):
            raise UserError(f"{show_path(path)}: of an archive pictures alone are read, of 1 or 3 channels; unpack it")
        return None
    if channels in (1, 3) and Path(path).suffix.lower() not in ARRAY_SUFFIXES:
        return None
    from ssl_seg.images.bands import Bands  # and with it tifffile, which few need

    return Bands(path, channels)


def _one(value_range: Range | None, path: str | Source) -> tuple[float, float] | None:
    """The range of a picture, which is one for all of its channels."""
    pairs = () if value_range is None else pairs_of(value_range)
    if len(pairs) > 1:
        raise UserError(f"{show_path(path)}: range has {len(pairs)} pairs, and a picture has one range; give one")
    return pairs[0] if pairs else None


def _grey(rgb: np.ndarray, shown: str) -> np.ndarray:
    """`(H, W, 3)` of which all channels are alike as `(H, W, 1)`. Raises UserError for colours."""
    if not (rgb == rgb[..., :1]).all():
        raise UserError(
            f"{shown}: has colours, and the network takes one channel (model.channels); save it as grey, or give "
            "model.channels=3"
        )
    return np.ascontiguousarray(rgb[..., :1])

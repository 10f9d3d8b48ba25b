"""Pictures as a person sees them: any pixel mode to RGB of 8 bits, and what a file's values were before."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ssl_seg.config import UserError, first_line
from ssl_seg.images.limits import show_path
from ssl_seg.images.opening import (
    DECODE_ERRORS,
    TURNS,
    decode,
    is_animation,
    layout_of,
    orientation_of,
    upright_frame,
)
from ssl_seg.images.sources import Source, bytes_of
from ssl_seg.images.tiff import bits_of, is_signed, number_in
from ssl_seg.images.values import Pair, Range, in_bytes, scaled, three_channels

NUMBER = r"\d+ "  # in what libjpeg says: equal faults are told together
# What it says where pixels are lost; it fills them with grey.
LOST = ("premature end of data segment", "bad Huffman code")


def read_rgb(path: str | Source, value_range: Pair | None = None) -> np.ndarray:
    """RGB `(H, W, 3)` uint8, as `images.read_image` says."""
    convert = _to_rgb if value_range is None else partial(_in_range, value_range=value_range)
    return decode(path, convert)


def of_array(given: np.ndarray, value_range: Range | None = None, channels: int = 3) -> np.ndarray:
    """An array `(H, W, C)` or, grey, `(H, W)` as an image `(H, W, C)` uint8, as `images.picture_of` says."""
    as_grey = channels in (1, 3) and given.ndim == 2
    if 0 in given.shape or not (as_grey or given.shape[2:] == (channels,)):
        raise UserError(f"an array of shape {given.shape}: give (H, W, {channels}), or (H, W) of grey")
    if as_grey:
        given = np.repeat(given[..., None], channels, axis=-1)
    if given.dtype == np.uint8:
        return np.array(given, order="C")  # a copy: the given one may be read-only
    own = value_range or ((0.0, 65535.0) if given.dtype == np.uint16 else None)
    if own is None or not np.issubdtype(given.dtype, np.number) or np.iscomplexobj(given):
        raise UserError(
            f"an array of {given.dtype}: its white is not known; give uint8 from 0 to 255, or a tensor in [0, 1]"
        )
    return in_bytes(given, own)


def of_pillow(given: object, value_range: Pair | None = None) -> np.ndarray:
    """A picture of Pillow as its file would be read. Of 16 bits of colour it keeps 8 alone, so these need the file."""
    if not isinstance(given, Image.Image):
        raise UserError(f"an image of type {type(given).__name__}: give a path, a Pillow image, an array or a tensor")
    path = Path("the picture")
    try:
        is_deep = isinstance(given, ImageFile) and layout_of(given).startswith("16")  # it forgets when it is loaded
        given.load()
        if is_deep and given.mode == "RGB":
            raise UserError("the picture: of 16 bits of its colours Pillow keeps 8; give its path, or an array")
        if not given.mode.startswith(("I", "F")):
            return _to_rgb(given, path)
        if value_range is not None:
            return _in_range(cast("ImageFile", given), path, value_range)
        if given.mode in ("I", "F") and given.format is None:
            raise UserError(f"a picture of mode {given.mode}: its white is not known; give it in 8 bits, or its path")
        return _to_rgb(given, path)
    except DECODE_ERRORS as error:
        raise UserError(f"the picture: cannot be read ({first_line(error)}); give its path, or a whole one") from error


def largest_of_rgb(path: str | Source) -> int | None:
    """As `images.largest_value`."""
    return decode(path, _largest)


class Examined(NamedTuple):
    """A picture and what its file holds, by one decoding."""

    image: np.ndarray | None  # as `images.read_image` gives it; None where its values have no white of their own
    refusal: str  # what that says then
    kind: str  # such as '8 bits RGB'
    used: Pair  # the smallest and the largest stored value


def examine_rgb(path: str | Source, value_range: Pair | None = None) -> Examined:
    """As `images.examine`."""
    return decode(path, partial(_examined, value_range=value_range))


def range_of_rgb(path: str | Source) -> Pair | None:
    """As `images.default_range`."""
    return decode(path, _default_range)


def doubt_of(path: str | Source) -> str:
    """As `images.doubt`."""
    return decode(path, _doubt)


# ---- of what Pillow has opened ----


def _to_rgb(image: Image.Image, path: Source) -> np.ndarray:
    shown = show_path(path)
    white = _white(image)
    upright = upright_frame(image)
    if white is not None:
        grey = ((np.asarray(upright).astype(np.int32) * 255 + white // 2) // white).astype(np.uint8)
        return three_channels(255 - grey if _is_inverted(image) else grey)
    if upright.mode in ("I", "F"):
        values = _stored_values(image, upright)
        raise UserError(
            f"{shown}: its values ({values.min():.7g} to {values.max():.7g}) have no white of their own; say which are "
            "black and white: range: [black, white] in the data set"
        )
    if upright.mode == "LAB":
        raise UserError(f"{shown}: pixels of mode {upright.mode} have no known range; convert it to 8-bit RGB")
    if isinstance(image, TiffImageFile) and is_signed(image.tag_v2):
        raise UserError(f"{shown}: signed 8-bit values have no known white; save it as unsigned")
    if upright.has_transparency_data:
        # Nobody chose the colour under a transparent pixel (most programs leave black); viewers show white there.
        colours = upright.convert("RGBA")
        paper = Image.new("RGBA", colours.size, "white")
        upright = Image.alpha_composite(paper, colours)
    return np.array(upright.convert("RGB"))


def _in_range(image: ImageFile, path: Source, value_range: Pair) -> np.ndarray:
    """As `_to_rgb`, of more than 8 bits, with the values that are black and white."""
    shown = show_path(path)
    is_deep = layout_of(image).startswith("16")
    is_turned = orientation_of(image) in TURNS
    upright = upright_frame(image)
    if image.format == "PPM" and upright.mode == "I":
        raise UserError(f"{shown}: a PNM says itself which value is white; leave range out of the data set")
    if upright.mode.startswith(("I", "F")):
        values = _stored_values(image, upright)
    elif is_deep and upright.mode == "RGB" and not is_turned:  # OpenCV turns TIFFs itself, and PNGs not
        values = _deep_colours(path, upright)
    elif is_deep:
        what = "turned by EXIF" if is_turned else f"of mode {upright.mode}"
        raise UserError(f"{shown}: 16-bit pixels {what} are not scaled by range; save it as upright grey or RGB")
    else:
        raise UserError(
            f"{shown}: has 8 bits a channel, and range is for more; leave range out of the data set, or the image"
        )
    return scaled(values, value_range, _is_inverted(image))


def _white(image: Image.Image) -> int | None:
    """The grey value of more than 8 bits that is white; None where it is not known, and for 8 bits."""
    if isinstance(image, TiffImageFile):
        return 2 ** bits_of(image.tag_v2) - 1 if image.mode.startswith("I;16") else None
    return 65535 if image.mode.startswith("I") else None  # Pillow has scaled the values of a PNM


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white, of more than 8 bits; Pillow turns 8 bits round, and these not."""
    return isinstance(image, TiffImageFile) and number_in(image.tag_v2, ExifTags.Base.PhotometricInterpretation) == 0


def _stored_values(image: Image.Image, upright: Image.Image) -> np.ndarray:
    """Grey of any kind, `(H, W)`."""
    values = np.asarray(upright)
    if upright.mode == "I" and isinstance(image, TiffImageFile) and not is_signed(image.tag_v2):
        return values.view(np.uint32)  # Pillow has no mode for these
    return values


def _deep_colours(path: Source, upright: Image.Image) -> np.ndarray:
    """Colours of 16 bits `(H, W, 3)` uint16, by OpenCV: Pillow keeps the upper byte, by which the two are compared."""
    found = cv2.imdecode(np.frombuffer(bytes_of(path), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.dtype == np.uint16 and found.ndim == 3:
        values = np.array(found[..., 2::-1], dtype=np.uint16)  # blue, green, red, anything -> red, green, blue
        if np.array_equal(values >> 8, np.asarray(upright)):
            return values
    raise UserError(f"{show_path(path)}: 16-bit colours of this layout are not scaled by range; save it as PNG")


def _largest(image: ImageFile, _: Source) -> int | None:
    is_deep = layout_of(image).startswith("16")
    if _white(image) == 65535 and image.format != "PPM":
        return int(np.asarray(image).max())
    return int(np.asarray(image).max()) * 256 + 255 if is_deep and image.mode == "RGB" else None


def _examined(image: ImageFile, path: Source, value_range: Pair | None) -> Examined:
    is_deep = layout_of(image).startswith("16")  # loading forgets it
    bits = bits_of(image.tag_v2) if isinstance(image, TiffImageFile) else 16 if is_deep or image.mode[0] == "I" else 8
    try:
        rgb, refusal = (_to_rgb(image, path) if value_range is None else _in_range(image, path, value_range)), ""
    except UserError as error:
        rgb, refusal = None, str(error)
    values = _stored_values(image, image) if image.mode[0] in "IF" else np.asarray(image)
    values = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if is_deep and image.mode == "RGB":  # Pillow keeps the upper byte
        low, high = low * 256, high * 256 + 255
    kind = {"1": "grey", "L": "grey", "P": "palette", "I": "grey", "I;16": "grey", "F": "float grey"}
    named = kind.get(image.mode, "grey" if image.mode.startswith("I;16") else image.mode)
    return Examined(rgb, refusal, f"{bits} bit{'s' * (bits != 1)} {named}", (low, high))


def _default_range(image: ImageFile, _: Source) -> Pair | None:
    white = _white(image) or (65535 if layout_of(image).startswith("16") else None)
    return None if white is None else (0.0, float(white))


def _doubt(image: ImageFile, path: Source) -> str:
    if is_animation(image):
        return "an animation, of which the first frame is used"
    if image.format not in ("JPEG", "MPO"):
        return ""
    try:
        # An eighth of the size and grey: all data are gone through, in half the time.
        colours = "CMYK" if image.mode == "CMYK" else "GRAY"
        simplejpeg.decode_jpeg(bytes_of(path), colours, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        warning = str(error)
        if any(words in warning for words in LOST):
            raise UserError(f"{show_path(path)}: damaged or cut off ({warning}); copy it again or remove it") from error
        # Anything else is what this decoder does not know, such as a rare subsampling.
        if "Corrupt" in warning:
            return f"a JPEG that may be damaged ({re.sub(NUMBER, '', warning)})"
    return ""

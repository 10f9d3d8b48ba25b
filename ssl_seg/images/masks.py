"""Masks as they are stored: nothing is converted or interpolated, and what does not keep ids is refused."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ssl_seg.config import UserError
from ssl_seg.images.limits import show_path
from ssl_seg.images.opening import decode, is_animation, layout_of, upright_frame
from ssl_seg.images.sources import Source
from ssl_seg.images.tiff import is_signed

MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # those that keep ids exactly: JPEG and WebP are lossy, PPM rescales
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif"})
GREY_STEPS = {"2": 85, "4": 17}  # by bits a pixel: Pillow spreads 2 and 4 bit greys over 0..255


def read_mask(path: str | Source) -> np.ndarray:
    """The values as they are stored, upright by the EXIF orientation: nothing is converted or interpolated.

    `(H, W)` uint8 for grey, palette (the indices) and bilevel masks (0 and 1), `(H, W)` uint16 for 16-bit grey,
    `(H, W, 3)` uint8 for colours; alpha is dropped. Raises UserError as `read_image` does, and for a format or pixel
    mode that does not keep ids exactly.
    """
    return decode(path, _to_stored)


def read_palette(path: str | Source) -> np.ndarray | None:
    """The colour that a viewer shows for each value that `read_mask` gives, RGB `(N, 3)` uint8.

    None where a mask has no palette and its greys stand for themselves, and for colours. Greys of 1, 2 and 4 bits do
    not: viewers spread them over 0 to 255. No pixel is decoded. Raises UserError for a file that is
    missing, empty or no image.
    """
    return decode(path, _to_palette)


def _to_stored(image: ImageFile, path: Source) -> np.ndarray:
    shown = show_path(path)
    if image.format not in MASK_FORMATS:
        known = ", ".join(MASK_FORMATS)
        raise UserError(f"{shown}: {image.format} does not keep class ids exactly; save masks as one of: {known}")
    if is_animation(image):
        raise UserError(f"{shown}: an animation, and a mask has one frame; save the mask alone")
    layout = layout_of(image)
    upright = upright_frame(image)
    if upright.mode.startswith("I"):
        return _sixteen_bits(upright, shown).astype(np.uint16)
    if upright.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise UserError(f"{shown}: pixels of mode {upright.mode} are no class ids; save the mask as 8-bit grey or RGB")
    if layout.startswith("16"):
        raise UserError(f"{shown}: 16 bits a channel would lose their lower half; save the mask as 8-bit grey or RGB")
    if "I" in layout:
        raise UserError(f"{shown}: greys are stored upside down (white is 0); save the mask with black as 0")
    array = np.array(upright).astype(np.uint8)  # mode 1 comes as bool
    if isinstance(image, TiffImageFile) and is_signed(image.tag_v2) and array.max() > 127:
        raise UserError(f"{shown}: holds negative ids; save the mask with unsigned ones, 255 for what is ignored")
    if upright.mode in ("LA", "PA", "RGBA"):
        opaque, alpha = array[..., :-1], array[..., -1]
        if (opaque == opaque[0, 0]).all() and (alpha != alpha[0, 0]).any():
            raise UserError(
                f"{shown}: one colour throughout, and only its transparency differs; save the mask as ids or colours"
            )
        return np.ascontiguousarray(opaque if upright.mode == "RGBA" else opaque[..., 0])
    if upright.mode == "L":
        return array // GREY_STEPS.get(layout[:1], 1)
    return array


def _to_palette(image: ImageFile, _: Source) -> np.ndarray | None:
    if image.mode in ("P", "PA") and image.palette is not None:
        # `image.getpalette` would decode the pixels, and formats order theirs each its way.
        probe = Image.new("P", (1, 1))
        probe.putpalette(image.palette)
        return np.array(probe.getpalette(), dtype=np.uint8).reshape(-1, 3)
    layout = "1" if image.mode == "1" else layout_of(image)[:1] * (image.mode == "L")
    if layout != "1" and layout not in GREY_STEPS:
        return None
    greys = np.linspace(0, 255, 2 ** int(layout)).astype(np.uint8)
    return np.repeat(greys[:, None], 3, axis=-1)  # (N,) -> (N, 3)


def _sixteen_bits(image: Image.Image, shown: str) -> np.ndarray:
    """Ids of 16 bits, `(H, W)` int32, as mode I holds them in 32."""
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UserError(f"{shown}: ids {low} to {high} do not fit 16 bits; save it with 8 or 16 bits")
    return values

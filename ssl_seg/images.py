"""Files to arrays and back: the only place of the project that decodes an image or a mask.

Pillow decodes, because it reports damage: OpenCV returns half of a truncated JPEG without a word and reads palette
masks as colours. OpenCV resizes, since it works on arrays. Ours is what neither does: one rule for every pixel mode,
masks as the values that are stored, a size limit checked before decoding, and errors of one line that name the file.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar
from uuid import uuid4

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from ssl_seg.config import UserError

# Pillow knows 40 more formats; each is one more decoder that a stranger's file can reach (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # those that keep ids exactly: JPEG and WebP are lossy, PPM rescales
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
)
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif"})
# 400 MB as RGB, an aerial photograph of 11585 x 11585; Pillow by itself refuses from 179 million pixels on.
MAX_PIXELS = 2**27

# What Pillow's decoders let through for a damaged file, apart from its own errors; programs cannot tell them apart.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
GREY_STEPS = {"2": 85, "4": 17}  # by bits a pixel: Pillow spreads 2 and 4 bit greys over 0..255
TURNS = {  # EXIF orientation: the turn that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
T = TypeVar("T")
Size = tuple[int, int]


def read_image(path: str | Path) -> np.ndarray:
    """The picture as a person sees it: RGB `(H, W, 3)` uint8, upright by its EXIF orientation.

    16-bit grey is scaled by 1/257 (65535 is white), transparent pixels are laid on white, CMYK, palette and bilevel
    pictures are converted, of an animation the first frame is taken. Raises UserError with one line for a file that is
    missing, empty, damaged, no image, of float or LAB pixels, or larger than MAX_PIXELS.
    """
    return _decode(Path(path), _to_rgb)


def read_mask(path: str | Path) -> np.ndarray:
    """The values as they are stored, upright by the EXIF orientation: nothing is converted or interpolated.

    `(H, W)` uint8 for grey, palette (the indices) and bilevel masks (0 and 1), `(H, W)` uint16 for 16-bit grey,
    `(H, W, 3)` uint8 for colours; alpha is dropped. Raises UserError as `read_image` does, and for a format or pixel
    mode that does not keep ids exactly.
    """
    return _decode(Path(path), _to_stored)


def read_palette(path: str | Path) -> np.ndarray | None:
    """The colour that a viewer shows for each value that `read_mask` gives, RGB `(N, 3)` uint8.

    None where a mask has no palette and its greys stand for themselves, and for colours. Greys of 1, 2 and 4 bits do
    not: viewers spread them over 0 to 255. No pixel is decoded. Raises UserError for a file that is
    missing, empty or no image.
    """
    return _decode(Path(path), _to_palette, whole=False)


class Header(NamedTuple):
    """What an image file says of itself before its pixels."""

    orientation: int  # by EXIF; 1: stored upright
    size: Size  # (H, W), of a quarter turn either way round


def read_header(path: str | Path) -> Header:
    """No pixel is decoded. Raises UserError for a file that is missing, empty or no image."""
    return _decode(Path(path), _to_header, whole=False)


def write_image(path: str | Path, array: np.ndarray, noisy: bool = False) -> None:
    """Write RGB `(H, W, 3)` or grey `(H, W)` uint8 as PNG, whole or not at all. Raises UserError for a full disk.

    `noisy` says that nothing in it repeats, so that zlib need not search: a tenth of the time (4.6 ms by OpenCV instead
    of 46 by Pillow for 480 x 360 with sensor noise) and 7 % more bytes.
    """
    if noisy:
        ordered = array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
        strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
        _write_png(Path(path), cv2.imencode(".png", ordered, strategy)[1].tobytes())
    else:
        _write_png(Path(path), _encoded(Image.fromarray(array)))


def write_mask(
    path: str | Path, array: np.ndarray, palette: Sequence[Sequence[int]] | np.ndarray | None = None
) -> None:
    """Write ids `(H, W)` uint8 or uint16 as PNG, whole or not at all; `palette` gives an RGB colour an id (uint8 only).

    The ids are stored either way: a palette only changes what a viewer shows. Masks are small however little zlib
    tries: 6.5 kB in 0.5 ms for a street of 480 x 360, instead of 5.0 kB in 1.3 ms.
    """
    image = Image.fromarray(array)
    if palette is not None:
        colours = np.zeros((256, 3), dtype=np.uint8)  # Pillow packs a shorter palette into fewer bits and loses id 255
        colours[: len(palette)] = palette
        image.putpalette(colours.tobytes())
    _write_png(Path(path), _encoded(image, level=3))


def resize_image(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(H, W)` or `(H, W, 3)` uint8 at another `size` (H, W): averaged where it shrinks, linear where it grows."""
    height, width = size
    small_height = min(height, array.shape[0])
    small_width = min(width, array.shape[1])
    small = cv2.resize(array, (small_width, small_height), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_mask(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(H, W)` ids at another `size` (H, W) by the nearest pixel; no new id appears."""
    height, width = size
    # Not INTER_NEAREST: that one takes corners for centres and shifts the mask against its image by half a pixel.
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def show_path(path: str | Path) -> str:
    """A path as one printable line: file names may hold line breaks and bytes that are no text."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _decode(path: Path, convert: Callable[[ImageFile, str], T], whole: bool = True) -> T:
    """What `convert` makes of the image in a file; `whole` says that it is about pixels, which have to be sound."""
    shown = show_path(path)
    _check_file(path, shown)
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata without a file name, and of large images, which are checked here.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(path, formats=FORMATS) as image:
                _check_pixels(image.width * image.height, shown)
                if image.format == "PNG" and whole:
                    _verify(path)
                return convert(image, shown)
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise UserError(f"{shown}: no image of a known format ({known}); convert it to PNG or remove it") from error
    except Image.DecompressionBombError as error:
        raise UserError(_too_large(shown)) from error
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{shown}: damaged or cut off ({reason}); copy it again or remove it") from error


def _check_file(path: Path, shown: str) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise UserError(f"{shown}: not a file; give the path of an image")
    if found.st_size == 0:
        raise UserError(f"{shown}: empty (0 bytes); copy it again or remove it")


def _verify(path: Path) -> None:
    """Compare a PNG's checksums, which decoding leaves out: of 3,000 flipped bits 254 came through as other ids."""
    with Image.open(path, formats=("PNG",)) as image:
        image.verify()


def _check_pixels(count: int, shown: str) -> None:
    if count > MAX_PIXELS:
        raise UserError(_too_large(shown))


def _too_large(shown: str) -> str:
    return f"{shown}: more than {MAX_PIXELS} pixels by its header; cut it into tiles or remove it"


def _to_rgb(image: ImageFile, shown: str) -> np.ndarray:
    upright = _upright(image)
    if upright.mode.startswith("I"):
        grey = (_sixteen_bits(upright, shown) + 128) // 257  # 65535 / 255 = 257; the half rounds
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)  # (H, W) -> (H, W, 3)
    if upright.mode in ("F", "LAB"):
        raise UserError(f"{shown}: pixels of mode {upright.mode} have no known range; convert it to 8-bit RGB")
    if upright.has_transparency_data:
        # Nobody chose the colour under a transparent pixel (most programs leave black); viewers show white there.
        colours = upright.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        upright = Image.alpha_composite(white, colours)
    return np.array(upright.convert("RGB"))


def _to_stored(image: ImageFile, shown: str) -> np.ndarray:
    if image.format not in MASK_FORMATS:
        known = ", ".join(MASK_FORMATS)
        raise UserError(f"{shown}: {image.format} does not keep class ids exactly; save masks as one of: {known}")
    layout = _layout(image)
    upright = _upright(image)
    if upright.mode.startswith("I"):
        return _sixteen_bits(upright, shown).astype(np.uint16)
    if upright.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise UserError(f"{shown}: pixels of mode {upright.mode} are no class ids; save the mask as 8-bit grey or RGB")
    if layout.startswith("16"):
        raise UserError(f"{shown}: 16 bits a channel would lose their lower half; save the mask as 8-bit grey or RGB")
    if "I" in layout:
        raise UserError(f"{shown}: greys are stored upside down (white is 0); save the mask with black as 0")
    array = np.array(upright).astype(np.uint8)  # mode 1 comes as bool
    if upright.mode in ("LA", "PA"):
        return np.ascontiguousarray(array[..., 0])
    if upright.mode == "RGBA":
        return np.ascontiguousarray(array[..., :3])
    if upright.mode == "L":
        return array // GREY_STEPS.get(layout[:1], 1)
    return array


def _to_palette(image: ImageFile, shown: str) -> np.ndarray | None:
    if image.mode in ("P", "PA") and image.palette is not None:
        probe = Image.new(
            "P", (1, 1)
        )  # `image.getpalette` would decode the pixels, and formats order theirs each its way
        probe.putpalette(image.palette)
        return np.array(probe.getpalette(), dtype=np.uint8).reshape(-1, 3)
    layout = "1" if image.mode == "1" else _layout(image)[:1] * (image.mode == "L")
    if layout != "1" and layout not in GREY_STEPS:
        return None
    greys = np.linspace(0, 255, 2 ** int(layout)).astype(np.uint8)
    return np.repeat(greys[:, None], 3, axis=-1)  # (N,) -> (N, 3)


def _to_header(image: ImageFile, shown: str) -> Header:
    # EXIF of a PNG may follow its pixels, and Pillow would decode these to find it; those who write one put it first.
    late = image.format == "PNG" and "exif" not in image.info
    return Header(1 if late else _orientation(image), (image.height, image.width))


def _layout(image: ImageFile) -> str:
    """How pixels lie in the file, after Pillow's `;`: '16B', '4', 'I' (inverted); '' where it says nothing."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    first = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return str(first).partition(";")[2]


def _upright(image: Image.Image) -> Image.Image:
    """The first frame, decoded and turned by its EXIF orientation.

    Not `ImageOps.exif_transpose`: it also writes the other tags anew and fails on those that are malformed.
    """
    image.load()  # first, since a TIFF turns itself while loading and drops the tag
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """What EXIF says of how to turn it, 1 where it says nothing."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:  # unreadable metadata around whole pixels
        return 1


def _sixteen_bits(image: Image.Image, shown: str) -> np.ndarray:
    """Grey values of 16 bits, `(H, W)` int32. Mode I has 32 bits: more than 16 of them have no known white."""
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UserError(f"{shown}: grey values {low} to {high} do not fit 16 bits; save it with 8 or 16 bits")
    return values


def _encoded(image: Image.Image, level: int = 6) -> bytes:
    """As PNG; `level` is zlib's, whose own choice is 6."""
    stream = BytesIO()
    image.save(stream, format="PNG", compress_level=level)
    return stream.getvalue()


def _write_png(path: Path, encoded: bytes) -> None:
    shown = show_path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{shown}: pictures are written as PNG; give a name that ends in .png")
    part = path.with_name(f".{uuid4().hex}.part")  # beside the target, so that the rename is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(encoded)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):  # where even that fails, the first error is the one to tell
            part.unlink(missing_ok=True)
        reason = f"{error.strerror}; {len(encoded)} bytes needed"
        raise UserError(f"{shown}: cannot be written ({reason}); free the disk or choose another folder") from error

"""From a path to what Pillow has opened: every file is looked over first, and every error becomes one line.

What is done with it, a picture as people see it or ids as they are stored, is handed in.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import PREFIXES as TIFF_STARTS

from ssl_seg.config import UserError
from ssl_seg.images.limits import Pieces, Size, check_file, check_pixels, show_path, too_large
from ssl_seg.images.sources import Packed, Source, source_of
from ssl_seg.images.tiff import check_tiff, not_read, tags_at_start

# Pillow knows 40 more formats; each is one more decoder that a stranger's file can reach (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
)
ARRAY_SUFFIXES = frozenset({".npy", ".npz"})  # of images of any number of channels, as numpy saves them
# A text or a colour profile of a PNG may be as large as Pillow lets all of them be (64 MB): what Photoshop writes is
# often more than its own limit for one (1 MB).
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
MAX_COMMENTS = 1_000  # among the numbers of a PNM that is text: Pillow takes minutes for a million
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
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_PNMS = (b"P1", b"P2", b"P3")
ANIMATIONS = ("GIF", "PNG", "WEBP")
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


def decode(given: str | Source, convert: Callable[[ImageFile, Source], T]) -> T:
    """What `convert` makes of the opened file, of which no pixel is decoded yet. Raises UserError with one line."""
    path = source_of(given)
    if isinstance(path, Packed):
        path = path.fetched()  # once: it is looked over, decoded, and may be asked for colours once more
    check_file(path, show_path(path))
    with warnings.catch_warnings():
        # Pillow warns of odd metadata without a file name, and of large images, which are checked here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return _decode_quietly(path, show_path(path), convert)


def _decode_quietly(path: Source, shown: str, convert: Callable[[ImageFile, Source], T]) -> T:
    try:
        with Pieces(path) as file:
            _check_parts(file, shown)
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(image.width * image.height, shown)
                return convert(image, path)
    except UnidentifiedImageError as error:
        raise UserError(_unidentified(path, shown)) from error
    except Image.DecompressionBombError as error:
        raise UserError(too_large(shown)) from error
    except PermissionError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check its permissions") from error
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "raw mode" in reason:
            raise UserError(_unidentified(path, shown)) from error
        if "MAX_TEXT" in reason:
            megabytes = PngImagePlugin.MAX_TEXT_MEMORY >> 20
            raise UserError(f"{shown}: more than {megabytes} MB of text beside the picture; save it without") from error
        raise UserError(f"{shown}: damaged or cut off ({reason}); copy it again or remove it") from error


def _check_parts(file: Pieces, shown: str) -> None:
    """What Pillow would take too long for, or leave out."""
    start = file.read(len(PNG_SIGNATURE))
    if start == PNG_SIGNATURE:
        _check_chunks(file, shown)
    elif start.startswith(tuple(TIFF_STARTS)):
        check_tiff(file, shown)
    elif start[:2] in TEXT_PNMS:
        comments = file.read().count(b"#")
        if comments > MAX_COMMENTS:
            raise UserError(f"{shown}: {comments} comments among its numbers; save it anew or remove it")
    file.seek(0)


def _check_chunks(file: Pieces, shown: str) -> None:
    """Compare a PNG's checksums, which decoding leaves out: of 3,000 flipped bits 254 came through as other ids.

    A second colour profile is refused: each may unpack to megabytes, and Pillow unpacks them all.
    """
    profiles = 0
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise OSError("its end is missing")
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        data = file.read(length)
        if file.read(4) != struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))):
            raise OSError(f"the checksum of chunk {kind.decode('ascii', 'replace')} is another")
        profiles += kind == b"iCCP"
        if profiles > 1:
            raise UserError(f"{shown}: has two colour profiles; save it anew or remove it")


def _unidentified(path: Source, shown: str) -> str:
    """Why Pillow decodes none of it, and what to do."""
    try:
        with Pieces(path) as file:
            return f"{shown}: {not_read(tags_at_start(file))}"
    except DECODE_ERRORS:
        known = ", ".join(FORMATS)
        return f"{shown}: no image of a known format ({known}); convert it to PNG or remove it"


# ---- the first frame ----


class Header(NamedTuple):
    """What an image file says of itself before its pixels."""

    orientation: int  # by EXIF; 1: stored upright
    size: Size  # (H, W), of a quarter turn either way round


def read_header(path: str | Source) -> Header:
    """No pixel is decoded. Raises UserError for a file that is missing, empty or no image."""
    return decode(path, _to_header)


def _to_header(image: ImageFile, _: Source) -> Header:
    # EXIF of a PNG may follow its pixels, and Pillow would decode these to find it; those who write one put it first.
    late = image.format == "PNG" and "exif" not in image.info
    return Header(1 if late else orientation_of(image), (image.height, image.width))


def layout_of(image: ImageFile) -> str:
    """How pixels lie in the file, after Pillow's `;`: '16B', '4', 'I' (inverted); '' where it says nothing."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    first = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return str(first).partition(";")[2]


def is_animation(image: ImageFile) -> bool:
    """Whether it has frames that are shown one after the other."""
    return image.format in ANIMATIONS and getattr(image, "is_animated", False)


def upright_frame(image: Image.Image) -> Image.Image:
    """The first frame, decoded and turned by its EXIF orientation.

    Not `ImageOps.exif_transpose`: it also writes the other tags anew and fails on those that are malformed.
    """
    image.load()  # first, since a TIFF turns itself while loading and drops the tag
    turn = TURNS.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """By EXIF; 1: stored upright."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODE_ERRORS:  # unreadable metadata around whole pixels
        return 1

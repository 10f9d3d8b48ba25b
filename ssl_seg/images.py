"""Files to arrays and back: the only place of the project that decodes an image or a mask.

Pillow decodes, because it reports damage: OpenCV returns half of a truncated JPEG without a word and reads palette
masks as colours. OpenCV resizes, since it works on arrays, and gives the lower bytes of 16-bit colours, which Pillow
drops. simplejpeg decodes nothing that is used: it alone hands on the warnings of libjpeg, which Pillow swallows. Ours
is what none of them does: one rule for every pixel mode, masks as the values that are stored, what a file holds beside
its first picture, limits checked before decoding, and errors of one line that name the file.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast
from uuid import uuid4

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile
from PIL.TiffImagePlugin import PREFIXES as TIFF_STARTS
from pydantic import AfterValidator, FiniteFloat, PositiveInt

from ssl_seg.config import UserError, first_line

# Pillow knows 40 more formats; each is one more decoder that a stranger's file can reach (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # those that keep ids exactly: JPEG and WebP are lossy, PPM rescales
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
)
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif"})
# 400 MB as RGB, an aerial photograph of 11585 x 11585; Pillow by itself refuses from 179 million pixels on.
MAX_PIXELS = 2**27
# A text or a colour profile of a PNG may be as large as Pillow lets all of them be (64 MB): what Photoshop writes is
# often more than its own limit for one (1 MB).
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# In how many pieces a file is read at most, and one more for so many bytes. Pillow reads headers piece by piece: 10 MB
# of a PNM's comment took 1.6 s, of empty EXIF segments 35 s. A PNG's data is read in five pieces for each 8 kB.
MAX_PIECES = 100_000
BYTES_A_PIECE = 512
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
# NewSubfileType of a TIFF's page that is no picture of its own: a smaller copy (1) or a transparency mask (4).
NO_DATA = 1 | 4
SMALLER_COPY = 2  # the same in SubfileType, which it has replaced
IMAGE_DEPTH = 32997  # tag of the slices of a volume
PAGE_SIDES = (ExifTags.Base.ImageLength, ExifTags.Base.ImageWidth, ExifTags.Base.SamplesPerPixel)
NUMBER = r"\d+ "  # in what libjpeg says: equal faults are told together
# What it says where pixels are lost; it fills them with grey.
LOST = ("premature end of data segment", "bad Huffman code")
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
Range = tuple[float, float]


@dataclass(frozen=True)
class Packed:
    """An image that is no file of its own, as a member of an archive: what to call it, and how its bytes are got."""

    shown: str
    fetch: Callable[[], bytes]

    def __str__(self) -> str:
        return self.shown


Source = Path | Packed  # where the bytes of an image come from


def check_size(size: Size) -> Size:
    """Raise ValueError for more pixels than an image may have."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} are more than {MAX_PIXELS} pixels; write a smaller (H, W)")
    return size


def _check_range(value: Range) -> Range:
    if value[0] >= value[1]:
        raise ValueError(f"black ({value[0]:g}) has to be less than white ({value[1]:g})")
    return value


SizeField = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(check_size)]  # (H, W), as a key of a config
RangeField = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_check_range)]  # black and white, likewise


def read_image(path: str | Source, value_range: Range | None = None) -> np.ndarray:
    """The picture as a person sees it: RGB `(H, W, 3)` uint8, upright by its EXIF orientation.

    Transparent pixels are laid on white, CMYK, palette and bilevel pictures are converted, of an animation the first
    frame is taken. Of 16 bits 65535 is white. `value_range` says which stored values are black and white instead, in
    pictures of more than 8 bits a channel: between them values are scaled, beyond them cut off, and what is no number
    is black. Signed, 32-bit and float values have no white of their own, so they are read with a range only.

    Raises UserError with one line for a file that is missing, empty, damaged, no image, of several pages, of bands or
    values that are neither grey nor colours, or larger than MAX_PIXELS.
    """
    convert = _to_rgb if value_range is None else partial(_in_range, value_range=value_range)
    return _decode(path, convert)


def picture_of(given: object, value_range: Range | None = None) -> np.ndarray:
    """An image in any form, as `read_image` gives it: RGB `(H, W, 3)` uint8.

    A path; a picture of Pillow; an array `(H, W, 3)` or, grey, `(H, W)` of uint8, or of another type with
    `value_range`, which says what is black and white in all that has more than 8 bits (of uint16 alone 65535 is white).
    Raises UserError as `read_image`, and for anything else.
    """
    if isinstance(given, str | Path):
        return _read_in_own_range(Path(given), value_range)
    if isinstance(given, Image.Image):
        return _of_pillow(given, value_range)
    if not isinstance(given, np.ndarray):
        raise UserError(f"an image of type {type(given).__name__}: give a path, a Pillow image, an array or a tensor")
    if given.ndim not in (2, 3) or 0 in given.shape or given.shape[2:] not in ((), (3,)):
        raise UserError(f"an array of shape {given.shape}: give (H, W, 3), or (H, W) of grey")
    if given.dtype == np.uint8:
        return np.array(_three_channels(given), order="C")  # a copy: the given one may be read-only
    own = value_range or ((0.0, 65535.0) if given.dtype == np.uint16 else None)
    if own is None or not np.issubdtype(given.dtype, np.number) or np.iscomplexobj(given):
        raise UserError(
            f"an array of {given.dtype}: its white is not known; give uint8 from 0 to 255, or a tensor in [0, 1]"
        )
    return scaled(given, own)


def _of_pillow(given: Image.Image, value_range: Range | None) -> np.ndarray:
    """As its file would be read. Of 16 bits of colour Pillow keeps 8 alone, so these need the file."""
    path = Path("the picture")
    try:
        is_deep = isinstance(given, ImageFile) and _layout(given).startswith("16")  # it forgets when it is loaded
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


def _read_in_own_range(path: Path, value_range: Range | None) -> np.ndarray:
    """As a model's images are read: its range where the file has more than 8 bits and another white of its own."""
    own = None if value_range is None else default_range(path)
    return read_image(path, value_range if own is not None and own != value_range else None)


def read_mask(path: str | Source) -> np.ndarray:
    """The values as they are stored, upright by the EXIF orientation: nothing is converted or interpolated.

    `(H, W)` uint8 for grey, palette (the indices) and bilevel masks (0 and 1), `(H, W)` uint16 for 16-bit grey,
    `(H, W, 3)` uint8 for colours; alpha is dropped. Raises UserError as `read_image` does, and for a format or pixel
    mode that does not keep ids exactly.
    """
    return _decode(path, _to_stored)


def largest_value(path: str | Source) -> int | None:
    """The largest stored value of a picture of 16 bits a channel, for colours up to 255 too high; None for others."""
    return _decode(path, _largest)


class Examined(NamedTuple):
    """A picture and what its file holds, by one decoding."""

    image: np.ndarray | None  # as `read_image` gives it; None where its values have no white of their own
    refusal: str  # what `read_image` says then
    kind: str  # such as '8 bits RGB'
    used: Range  # the smallest and the largest stored value


def examine(path: str | Source, value_range: Range | None = None) -> Examined:
    """As `read_image`, with what the pixels were before they became RGB of 8 bits.

    Of 16-bit colours the upper byte tells what is used, so that up to 255 more may be. Raises UserError for what cannot
    be decoded.
    """
    return _decode(path, partial(_examined, value_range=value_range))


def default_range(path: str | Source) -> Range | None:
    """The values that `read_image` takes for black and white where no range is given; None of 8 bits a channel.

    No pixel is decoded.
    """
    return _decode(path, _default_range)


def doubt(path: str | Source) -> str:
    """What a person should look at in a picture that can be decoded, in a few words; '' for nothing.

    A JPEG is decoded once more, for the warnings that Pillow swallows. Raises UserError for one that has lost pixels.
    """
    return _decode(path, _doubt)


def read_palette(path: str | Source) -> np.ndarray | None:
    """The colour that a viewer shows for each value that `read_mask` gives, RGB `(N, 3)` uint8.

    None where a mask has no palette and its greys stand for themselves, and for colours. Greys of 1, 2 and 4 bits do
    not: viewers spread them over 0 to 255. No pixel is decoded. Raises UserError for a file that is
    missing, empty or no image.
    """
    return _decode(path, _to_palette)


class Header(NamedTuple):
    """What an image file says of itself before its pixels."""

    orientation: int  # by EXIF; 1: stored upright
    size: Size  # (H, W), of a quarter turn either way round


def read_header(path: str | Source) -> Header:
    """No pixel is decoded. Raises UserError for a file that is missing, empty or no image."""
    return _decode(path, _to_header)


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


def scaled(values: np.ndarray, value_range: Range, inverted: bool = False) -> np.ndarray:
    """Stored values `(H, W)` or `(H, W, 3)` as RGB `(H, W, 3)` uint8, given those that are black and white.

    Values beyond them are cut off, and what is no number is black; `inverted` says that the first of them is white.
    """
    if values.dtype in (np.uint8, np.uint16):
        return _three_channels(_table(np.iinfo(values.dtype).max + 1, value_range, inverted)[values])
    return _three_channels(_to_bytes(values, value_range, inverted))


def _to_bytes(values: np.ndarray, value_range: Range, inverted: bool) -> np.ndarray:
    shown = np.interp(values, value_range, (255, 0) if inverted else (0, 255))
    return np.rint(np.nan_to_num(shown)).astype(np.uint8)


@lru_cache(maxsize=8)
def _table(count: int, value_range: Range, inverted: bool) -> np.ndarray:
    """The same of every value there can be: to look it up takes a tenth of the time."""
    return _to_bytes(np.arange(count), value_range, inverted)


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


def show_path(path: str | Source) -> str:
    """A path as one printable line: file names may hold line breaks and bytes that are no text."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


# ---- opening ----


def _decode(given: str | Source, convert: Callable[[ImageFile, Source], T]) -> T:
    source = Path(given) if isinstance(given, str) else given
    if isinstance(source, Packed):
        payload = source.fetch()  # once, for it may come over a network
        source = Packed(source.shown, lambda: payload)
    _check_file(source, show_path(source))
    with warnings.catch_warnings():
        # Pillow warns of odd metadata without a file name, and of large images, which are checked here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return _decode_quietly(source, show_path(source), convert)


def _bytes_of(source: Source) -> bytes:
    return source.fetch() if isinstance(source, Packed) else source.read_bytes()


def _decode_quietly(path: Source, shown: str, convert: Callable[[ImageFile, Source], T]) -> T:
    try:
        with _Pieces(path) as file:
            _check_parts(file, shown)
            with Image.open(file, formats=FORMATS) as image:
                _check_pixels(image.width * image.height, shown)
                return convert(image, path)
    except UnidentifiedImageError as error:
        raise UserError(_unidentified(path, shown)) from error
    except Image.DecompressionBombError as error:
        raise UserError(_too_large(shown)) from error
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


class _Pieces(BufferedReader):
    """A file that may be read in so many pieces only: what has more is no picture, but keeps its reader busy."""

    def __init__(self, source: Source) -> None:
        if isinstance(source, Packed):
            payload = source.fetch()
            size = len(payload)
            super().__init__(cast("FileIO", BytesIO(payload)))  # which has all that is asked of a file
        else:
            raw = FileIO(source)  # BufferedReader closes it
            size = os.fstat(raw.fileno()).st_size
            super().__init__(raw)
        self.shown = show_path(source)
        self.left = MAX_PIECES + size // BYTES_A_PIECE

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UserError(_too_many_pieces(self.shown))
        return super().read(size)


def _check_file(path: Source, shown: str) -> None:
    if isinstance(path, Packed):
        if not path.fetch():
            raise UserError(f"{shown}: empty (0 bytes); pack it again or remove it")
        return
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise UserError(f"{shown}: not a file; give the path of an image")
    if found.st_size == 0:
        raise UserError(f"{shown}: empty (0 bytes); copy it again or remove it")


def _check_parts(file: _Pieces, shown: str) -> None:
    """What Pillow would take too long for, or leave out."""
    start = file.read(len(PNG_SIGNATURE))
    if start == PNG_SIGNATURE:
        _check_chunks(file, shown)
    elif start.startswith(tuple(TIFF_STARTS)):
        _check_tiff(file, shown)
    elif start[:2] in TEXT_PNMS:
        comments = file.read().count(b"#")
        if comments > MAX_COMMENTS:
            raise UserError(f"{shown}: {comments} comments among its numbers; save it anew or remove it")
    file.seek(0)


def _check_chunks(file: _Pieces, shown: str) -> None:
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


def _too_many_pieces(shown: str) -> str:
    return f"{shown}: in more pieces than a picture can have; save it anew or remove it"


def _check_pixels(count: int, shown: str) -> None:
    if count > MAX_PIXELS:
        raise UserError(_too_large(shown))


def _too_large(shown: str) -> str:
    return f"{shown}: more than {MAX_PIXELS} pixels by its header; cut it into tiles or remove it"


# ---- what TIFF alone has: pages, bands, and values of any kind ----


def _check_tiff(file: _Pieces, shown: str) -> None:
    """Refuse what holds more than one picture, or another one than Pillow would read."""
    tags = _tags_at_start(file)
    if not _is_picture(tags):
        raise UserError(f"{shown}: its first page is a smaller copy of the picture; save the picture alone")
    _check_strips(tags, shown)
    compression = _number(tags, ExifTags.Base.Compression)
    if compression not in COMPRESSION_INFO:
        raise UserError(
            f"{shown}: a TIFF of compression {compression}, which is not read; save it with deflate or none"
        )
    bands = _number(tags, ExifTags.Base.SamplesPerPixel)
    if bands == 2 and _all(tags, ExifTags.Base.ExtraSamples) == (0,):  # Pillow leaves the second out
        raise UserError(f"{shown}: {_not_read(tags)}")
    has_colours = _number(tags, ExifTags.Base.PhotometricInterpretation) in (2, 5)  # RGB, CMYK
    if has_colours and _bits(tags) > 8 and _is_planar(tags) and compression == 1:
        # Pillow 13 takes each byte of a plane for a pixel: stripes.
        raise UserError(
            f"{shown}: uncompressed 16-bit colours, plane by plane, are not read; save them pixel by pixel "
            "(gdal_translate -co INTERLEAVE=PIXEL)"
        )
    pages = max(_said_pages(tags), _count_pages(file, tags))  # last: the tags become those of the last page
    if pages > 1:
        raise UserError(f"{shown}: a TIFF of {pages} pages, which are not read; save each as a file of its own")


def _check_strips(tags: ImageFileDirectory_v2, shown: str) -> None:
    """Refuse a picture with holes, where Pillow reads black, or the header as pixels."""
    height, width = _number(tags, ExifTags.Base.ImageLength), _number(tags, ExifTags.Base.ImageWidth)
    _check_pixels(height * width, shown)
    if ExifTags.Base.TileOffsets in tags:
        places = _all(tags, ExifTags.Base.TileOffsets)
        down = height / max(1, _number(tags, ExifTags.Base.TileLength))
        wanted = math.ceil(down) * math.ceil(width / max(1, _number(tags, ExifTags.Base.TileWidth)))
    else:
        places = _all(tags, ExifTags.Base.StripOffsets)
        wanted = math.ceil(height / max(1, _number(tags, ExifTags.Base.RowsPerStrip, height)))
    if len(places) > MAX_PIECES:
        raise UserError(_too_many_pieces(shown))
    if _is_planar(tags):
        wanted *= _number(tags, ExifTags.Base.SamplesPerPixel)
    if len(places) < wanted or 0 in places:
        raise OSError("a part of the picture was never written")


def _is_picture(tags: ImageFileDirectory_v2) -> bool:
    kind = _number(tags, ExifTags.Base.NewSubfileType, 0)
    return not kind & NO_DATA and _number(tags, ExifTags.Base.SubfileType) != SMALLER_COPY


def _count_pages(file: _Pieces, tags: ImageFileDirectory_v2) -> int:
    """Pages that are pictures of their own. Pillow counts all, and stops at one that it cannot decode."""
    seen = {tags.offset}
    pages = 1
    while tags.next and tags.next not in seen:
        seen.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        if ExifTags.Base.ImageWidth not in tags:
            raise OSError("the directory of a page is missing")
        pages += _is_picture(tags)
    return pages


def _said_pages(tags: ImageFileDirectory_v2) -> int:
    """Pages without a directory: ImageJ and tifffile tell of them in the description, others in a tag of slices."""
    words = str(tags.get(ExifTags.Base.ImageDescription, ""))
    depth = _number(tags, IMAGE_DEPTH)
    images = re.match(r"ImageJ=.*?^images=(\d{1,9})$", words, re.DOTALL | re.MULTILINE)
    if images:
        return max(depth, int(images[1]))
    shape = re.match(r'\{"shape": \[([\d, ]{1,99})\].*"truncated": true', words)
    if shape:
        page = math.prod(_number(tags, tag) for tag in PAGE_SIDES)
        return max(depth, math.prod(map(int, shape[1].split(","))) // max(1, page))
    return depth


def _tags_at_start(file: _Pieces) -> ImageFileDirectory_v2:
    """The tags of a TIFF's first page. Raises SyntaxError for another format."""
    file.seek(0)
    start = file.read(8)
    if start[2:4] in (b"+\0", b"\0+"):  # BigTIFF
        start += file.read(8)
    tags = ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _all(tags: ImageFileDirectory_v2, tag: int) -> tuple[Any, ...]:
    """The values of a tag, which Pillow gives alone where it is one."""
    found = tags.get(tag, ())
    return found if isinstance(found, tuple) else (found,)


def _number(tags: ImageFileDirectory_v2, tag: int, default: int = 1) -> int:
    """The first value of a tag."""
    return int(next(iter(_all(tags, tag)), default))


def _bits(tags: ImageFileDirectory_v2) -> int:
    return _number(tags, ExifTags.Base.BitsPerSample)


def _is_planar(tags: ImageFileDirectory_v2) -> bool:
    return _number(tags, ExifTags.Base.PlanarConfiguration) == 2


def _is_signed(tags: ImageFileDirectory_v2) -> bool:
    return _number(tags, ExifTags.Base.SampleFormat) == 2


def _not_read(tags: ImageFileDirectory_v2) -> str:
    """What a TIFF holds, such as `5 bands of 16-bit values` or `1 band of 64-bit float values`, and what to do."""
    bands = _number(tags, ExifTags.Base.SamplesPerPixel)
    kind = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex "}.get(_number(tags, ExifTags.Base.SampleFormat), "")
    contents = f"{bands} band{'s' * (bands != 1)} of {_bits(tags)}-bit {kind}values"
    meaning = _number(tags, ExifTags.Base.PhotometricInterpretation)
    return f"a TIFF of {contents} (photometric {meaning}), which are not read; save grey or RGB of 8 or 16 bits"


def _unidentified(path: Source, shown: str) -> str:
    """Why Pillow decodes none of it, and what to do."""
    try:
        with _Pieces(path) as file:
            return f"{shown}: {_not_read(_tags_at_start(file))}"
    except DECODE_ERRORS:
        known = ", ".join(FORMATS)
        return f"{shown}: no image of a known format ({known}); convert it to PNG or remove it"


# ---- decoding ----


def _to_rgb(image: Image.Image, path: Source) -> np.ndarray:
    shown = show_path(path)
    white = _white(image)
    upright = _upright(image)
    if white is not None:
        grey = ((np.asarray(upright).astype(np.int32) * 255 + white // 2) // white).astype(np.uint8)
        return _three_channels(255 - grey if _is_inverted(image) else grey)
    if upright.mode in ("I", "F"):
        values = _stored_values(image, upright)
        raise UserError(
            f"{shown}: its values ({values.min():.7g} to {values.max():.7g}) have no white of their own; say which are "
            "black and white: range: [black, white] in the data set"
        )
    if upright.mode == "LAB":
        raise UserError(f"{shown}: pixels of mode {upright.mode} have no known range; convert it to 8-bit RGB")
    if isinstance(image, TiffImageFile) and _is_signed(image.tag_v2):
        raise UserError(f"{shown}: signed 8-bit values have no known white; save it as unsigned")
    if upright.has_transparency_data:
        # Nobody chose the colour under a transparent pixel (most programs leave black); viewers show white there.
        colours = upright.convert("RGBA")
        paper = Image.new("RGBA", colours.size, "white")
        upright = Image.alpha_composite(paper, colours)
    return np.array(upright.convert("RGB"))


def _in_range(image: ImageFile, path: Source, value_range: Range) -> np.ndarray:
    """As `_to_rgb`, of more than 8 bits, with the values that are black and white."""
    shown = show_path(path)
    is_deep = _layout(image).startswith("16")
    is_turned = _orientation(image) in TURNS
    upright = _upright(image)
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


def _three_channels(array: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)"""
    return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1)


def _white(image: Image.Image) -> int | None:
    """The grey value of more than 8 bits that is white; None where it is not known, and for 8 bits."""
    if isinstance(image, TiffImageFile):
        return 2 ** _bits(image.tag_v2) - 1 if image.mode.startswith("I;16") else None
    return 65535 if image.mode.startswith("I") else None  # Pillow has scaled the values of a PNM


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white, of more than 8 bits; Pillow turns 8 bits round, and these not."""
    return isinstance(image, TiffImageFile) and _number(image.tag_v2, ExifTags.Base.PhotometricInterpretation) == 0


def _stored_values(image: Image.Image, upright: Image.Image) -> np.ndarray:
    """Grey of any kind, `(H, W)`."""
    values = np.asarray(upright)
    if upright.mode == "I" and isinstance(image, TiffImageFile) and not _is_signed(image.tag_v2):
        return values.view(np.uint32)  # Pillow has no mode for these
    return values


def _deep_colours(path: Source, upright: Image.Image) -> np.ndarray:
    """Colours of 16 bits `(H, W, 3)` uint16, by OpenCV: Pillow keeps the upper byte, by which the two are compared."""
    found = cv2.imdecode(np.frombuffer(_bytes_of(path), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.dtype == np.uint16 and found.ndim == 3:
        values = np.array(found[..., 2::-1], dtype=np.uint16)  # blue, green, red, anything -> red, green, blue
        if np.array_equal(values >> 8, np.asarray(upright)):
            return values
    raise UserError(f"{show_path(path)}: 16-bit colours of this layout are not scaled by range; save it as PNG")


def _largest(image: ImageFile, _: Source) -> int | None:
    is_deep = _layout(image).startswith("16")
    if _white(image) == 65535 and image.format != "PPM":
        return int(np.asarray(image).max())
    return int(np.asarray(image).max()) * 256 + 255 if is_deep and image.mode == "RGB" else None


def _examined(image: ImageFile, path: Source, value_range: Range | None) -> Examined:
    is_deep = _layout(image).startswith("16")  # loading forgets it
    bits = _bits(image.tag_v2) if isinstance(image, TiffImageFile) else 16 if is_deep or image.mode[0] == "I" else 8
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


def _default_range(image: ImageFile, _: Source) -> Range | None:
    white = _white(image) or (65535 if _layout(image).startswith("16") else None)
    return None if white is None else (0.0, float(white))


def _doubt(image: ImageFile, path: Source) -> str:
    if _is_animation(image):
        return "an animation, of which the first frame is used"
    if image.format not in ("JPEG", "MPO"):
        return ""
    try:
        # An eighth of the size and grey: all data are gone through, in half the time.
        colours = "CMYK" if image.mode == "CMYK" else "GRAY"
        simplejpeg.decode_jpeg(_bytes_of(path), colours, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        warning = str(error)
        if any(words in warning for words in LOST):
            raise UserError(f"{show_path(path)}: damaged or cut off ({warning}); copy it again or remove it") from error
        # Anything else is what this decoder does not know, such as a rare subsampling.
        if "Corrupt" in warning:
            return f"a JPEG that may be damaged ({re.sub(NUMBER, '', warning)})"
    return ""


def _is_animation(image: ImageFile) -> bool:
    return image.format in ANIMATIONS and getattr(image, "is_animated", False)


def _to_stored(image: ImageFile, path: Source) -> np.ndarray:
    shown = show_path(path)
    if image.format not in MASK_FORMATS:
        known = ", ".join(MASK_FORMATS)
        raise UserError(f"{shown}: {image.format} does not keep class ids exactly; save masks as one of: {known}")
    if _is_animation(image):
        raise UserError(f"{shown}: an animation, and a mask has one frame; save the mask alone")
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
    if isinstance(image, TiffImageFile) and _is_signed(image.tag_v2) and array.max() > 127:
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
    layout = "1" if image.mode == "1" else _layout(image)[:1] * (image.mode == "L")
    if layout != "1" and layout not in GREY_STEPS:
        return None
    greys = np.linspace(0, 255, 2 ** int(layout)).astype(np.uint8)
    return np.repeat(greys[:, None], 3, axis=-1)  # (N,) -> (N, 3)


def _to_header(image: ImageFile, _: Source) -> Header:
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
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODE_ERRORS:  # unreadable metadata around whole pixels
        return 1


def _sixteen_bits(image: Image.Image, shown: str) -> np.ndarray:
    """Ids of 16 bits, `(H, W)` int32, as mode I holds them in 32."""
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UserError(f"{shown}: ids {low} to {high} do not fit 16 bits; save it with 8 or 16 bits")
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

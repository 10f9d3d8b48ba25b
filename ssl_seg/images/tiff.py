"""What TIFF alone has: directories of tags, pages, bands, and values of any kind. Read by Pillow's parser of tags.

Of a file with more than one picture Pillow reads the first; here such a file is refused before a pixel is decoded.
"""

from __future__ import annotations

import math
import re
from typing import Any

from PIL import ExifTags
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

from ssl_seg.config import UserError
from ssl_seg.images.limits import MAX_CHANNELS, Pieces, check_pieces, check_pixels

# NewSubfileType of a TIFF's page that is no picture of its own: a smaller copy (1) or a transparency mask (4).
NO_DATA = 1 | 4
SMALLER_COPY = 2  # the same in SubfileType, which it has replaced
IMAGE_DEPTH = 32997  # tag of the slices of a volume
PAGE_SIDES = (ExifTags.Base.ImageLength, ExifTags.Base.ImageWidth, ExifTags.Base.SamplesPerPixel)


def check_tiff(file: Pieces, shown: str) -> None:
    """Refuse what holds more than one picture, or another one than Pillow would read."""
    tags = tags_at_start(file)
    if not _is_picture(tags):
        raise UserError(f"{shown}: its first page is a smaller copy of the picture; save the picture alone")
    _check_strips(tags, shown)
    compression = number_in(tags, ExifTags.Base.Compression)
    if compression not in COMPRESSION_INFO:
        raise UserError(
            f"{shown}: a TIFF of compression {compression}, which is not read; save it with deflate or none"
        )
    bands = number_in(tags, ExifTags.Base.SamplesPerPixel)
    if bands == 2 and _all(tags, ExifTags.Base.ExtraSamples) == (0,):  # Pillow leaves the second out
        raise UserError(f"{shown}: {not_read(tags)}")
    has_colours = number_in(tags, ExifTags.Base.PhotometricInterpretation) in (2, 5)  # RGB, CMYK
    if has_colours and bits_of(tags) > 8 and _is_planar(tags) and compression == 1:
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
    height, width = number_in(tags, ExifTags.Base.ImageLength), number_in(tags, ExifTags.Base.ImageWidth)
    check_pixels(height * width, shown)
    if ExifTags.Base.TileOffsets in tags:
        places = _all(tags, ExifTags.Base.TileOffsets)
        down = height / max(1, number_in(tags, ExifTags.Base.TileLength))
        wanted = math.ceil(down) * math.ceil(width / max(1, number_in(tags, ExifTags.Base.TileWidth)))
    else:
        places = _all(tags, ExifTags.Base.StripOffsets)
        wanted = math.ceil(height / max(1, number_in(tags, ExifTags.Base.RowsPerStrip, height)))
    check_pieces(len(places), shown)
    if _is_planar(tags):
        wanted *= number_in(tags, ExifTags.Base.SamplesPerPixel)
    if len(places) < wanted or 0 in places:
        raise OSError("a part of the picture was never written")


def _is_picture(tags: ImageFileDirectory_v2) -> bool:
    kind = number_in(tags, ExifTags.Base.NewSubfileType, 0)
    return not kind & NO_DATA and number_in(tags, ExifTags.Base.SubfileType) != SMALLER_COPY


def _count_pages(file: Pieces, tags: ImageFileDirectory_v2) -> int:
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
    depth = number_in(tags, IMAGE_DEPTH)
    images = re.match(r"ImageJ=.*?^images=(\d{1,9})$", words, re.DOTALL | re.MULTILINE)
    if images:
        return max(depth, int(images[1]))
    shape = re.match(r'\{"shape": \[([\d, ]{1,99})\].*"truncated": true', words)
    if shape:
        page = math.prod(number_in(tags, tag) for tag in PAGE_SIDES)
        return max(depth, math.prod(map(int, shape[1].split(","))) // max(1, page))
    return depth


def tags_at_start(file: Pieces) -> ImageFileDirectory_v2:
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


def number_in(tags: ImageFileDirectory_v2, tag: int, default: int = 1) -> int:
    """The first value of a tag."""
    return int(next(iter(_all(tags, tag)), default))


def bits_of(tags: ImageFileDirectory_v2) -> int:
    """Of a value."""
    return number_in(tags, ExifTags.Base.BitsPerSample)


def _is_planar(tags: ImageFileDirectory_v2) -> bool:
    return number_in(tags, ExifTags.Base.PlanarConfiguration) == 2


def is_signed(tags: ImageFileDirectory_v2) -> bool:
    """Whether values may be below 0."""
    return number_in(tags, ExifTags.Base.SampleFormat) == 2


def not_read(tags: ImageFileDirectory_v2) -> str:
    """What a TIFF holds, such as `5 bands of 16-bit values` or `1 band of 64-bit float values`, and what to do."""
    bands = number_in(tags, ExifTags.Base.SamplesPerPixel)
    kinds = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex "}
    kind = kinds.get(number_in(tags, ExifTags.Base.SampleFormat), "")
    contents = f"{bands} band{'s' * (bands != 1)} of {bits_of(tags)}-bit {kind}values"
    meaning = number_in(tags, ExifTags.Base.PhotometricInterpretation)
    also = f", or give model.channels={bands}" if 1 < bands <= MAX_CHANNELS else ""
    return f"a TIFF of {contents} (photometric {meaning}), which are not read; save grey or RGB of 8 or 16 bits{also}"

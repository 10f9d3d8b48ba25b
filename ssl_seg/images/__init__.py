"""Files to arrays and back: the only place of the project that decodes an image or a mask.

Pillow decodes, because it reports damage: OpenCV returns half of a truncated JPEG without a word and reads palette
masks as colours. OpenCV resizes, since it works on arrays, and gives the lower bytes of 16-bit colours, which Pillow
drops. simplejpeg decodes nothing that is used: it alone hands on the warnings of libjpeg, which Pillow swallows. Ours
is what none of them does: one rule for every pixel mode, masks as the values that are stored, what a file holds beside
its first picture, limits checked before decoding, and errors of one line that name the file. tifffile reads TIFFs of
many pages or channels (`pages`), of which Pillow knows the first.

The names that others use stand here; each concern has a file beside this one.
"""

from ssl_seg.images.limits import MAX_CHANNELS, MAX_PIXELS, ChannelsField, Size, SizeField, check_size, show_path
from ssl_seg.images.masks import MASK_FORMATS, MASK_SUFFIXES, read_mask, read_palette
from ssl_seg.images.opening import ARRAY_SUFFIXES, DECODE_ERRORS, FORMATS, IMAGE_SUFFIXES, Header
from ssl_seg.images.pictures import Examined
from ssl_seg.images.reading import (
    default_range,
    doubt,
    examine,
    largest_value,
    picture_of,
    read_header,
    read_image,
    takes_range,
)
from ssl_seg.images.resizing import resize_image, resize_mask, with_channels
from ssl_seg.images.sources import Packed, Source
from ssl_seg.images.values import Pair, Range, RangeField, composite, say_range, scaled, written_range
from ssl_seg.images.writing import array_bytes, write_image, write_mask

__all__ = [
    "ARRAY_SUFFIXES",
    "DECODE_ERRORS",
    "FORMATS",
    "IMAGE_SUFFIXES",
    "MASK_FORMATS",
    "MASK_SUFFIXES",
    "MAX_CHANNELS",
    "MAX_PIXELS",
    "ChannelsField",
    "Examined",
    "Header",
    "Packed",
    "Pair",
    "Range",
    "RangeField",
    "Size",
    "SizeField",
    "Source",
    "array_bytes",
    "check_size",
    "composite",
    "default_range",
    "doubt",
    "examine",
    "largest_value",
    "picture_of",
    "read_header",
    "read_image",
    "read_mask",
    "read_palette",
    "resize_image",
    "resize_mask",
    "say_range",
    "scaled",
    "show_path",
    "takes_range",
    "with_channels",
    "write_image",
    "write_mask",
    "written_range",
]

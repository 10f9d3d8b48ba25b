"""What an image may ask for: pixels, and pieces that it is read in. Also how its path is shown.

A file's header may claim any size, and Pillow reads headers piece by piece: what asks for more than a picture can need
is refused before it takes memory or minutes.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt

from ssl_seg.config import UserError
from ssl_seg.images.sources import Packed, Source, raw_of

# 400 MB as RGB, an aerial photograph of 11585 x 11585; Pillow by itself refuses from 179 million pixels on.
MAX_PIXELS = 2**27
MAX_CHANNELS = 8  # of an image: bands of a satellite, stains of a microscope
# In how many pieces a file is read at most, and one more for so many bytes. Pillow reads headers piece by piece: 10 MB
# of a PNM's comment took 1.6 s, of empty EXIF segments 35 s. A PNG's data is read in five pieces for each 8 kB.
MAX_PIECES = 100_000
BYTES_A_PIECE = 512
Size = tuple[int, int]


def check_size(size: Size) -> Size:
    """Raise ValueError for more pixels than an image may have."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} are more than {MAX_PIXELS} pixels; write a smaller (H, W)")
    return size


ChannelsField = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
SizeField = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(check_size)]  # (H, W), as a key of a config


class Pieces(BufferedReader):
    """A file that may be read in so many pieces only: what has more is no picture, but keeps its reader busy."""

    def __init__(self, source: Source) -> None:
        raw = raw_of(source)  # which BufferedReader closes
        super().__init__(raw)
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        self.shown = show_path(source)
        self.left = MAX_PIECES + size // BYTES_A_PIECE

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UserError(_too_many_pieces(self.shown))
        return super().read(size)


def check_file(path: Source, shown: str) -> None:
    """Raise UserError for what is missing, empty or no file."""
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


def check_pixels(count: int, shown: str) -> None:
    """Raise UserError for more pixels than an image may have."""
    if count > MAX_PIXELS:
        raise UserError(too_large(shown))


def too_large(shown: str) -> str:
    """What is said of a file with more pixels than an image may have."""
    return f"{shown}: more than {MAX_PIXELS} pixels by its header; cut it into tiles or remove it"


def check_pieces(count: int, shown: str) -> None:
    """Raise UserError for a picture that its file keeps in more pieces than it may have."""
    if count > MAX_PIECES:
        raise UserError(_too_many_pieces(shown))


def _too_many_pieces(shown: str) -> str:
    return f"{shown}: in more pieces than a picture can have; save it anew or remove it"


def show_path(path: str | Source) -> str:
    """A path as one printable line: file names may hold line breaks and bytes that are no text."""
    text = str(path)
    return text if text.isprintable() else ascii(text)

"""What surfaces are painted with: grain, colours in light and haze, directions; all of integers."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ssl_seg import rng
from ssl_seg.worlds.drawing import tile
from ssl_seg.worlds.street.perspective import Colour

# Those of CamVid, in its order; a test compares them.
CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CLASSES))

# round(1024 sin(90 degrees * i / 16)): written out, since the last bit of a library's sine is its own
SINES = (0, 100, 200, 297, 392, 483, 569, 650, 724, 792, 851, 903, 946, 980, 1004, 1019, 1024)
TURN = 64  # directions in a full turn


_QUARTER = SINES[:-1] + SINES[:0:-1]
_ROUND = _QUARTER + tuple(-size for size in _QUARTER)


def sine(direction: int) -> int:
    """Of 1024; 64 directions make a turn."""
    return _ROUND[direction % TURN]


def cosine(direction: int) -> int:
    return _ROUND[(direction + 16) % TURN]


@lru_cache(maxsize=1 << 10)
def disc(x: int, y: int, width: int, height: int | None = None, corners: int = 16) -> np.ndarray:
    """An ellipse's outline `(corners, 2)` from its centre and half sides."""
    high = width if height is None else height
    directions = range(0, TURN, TURN // corners)
    outline = np.array([(x + (width * cosine(d) >> 10), y + (high * sine(d) >> 10)) for d in directions])
    outline.setflags(write=False)
    return outline


@lru_cache(maxsize=1)
def scatter() -> bytes:
    """Random bytes for small choices: a thing keeps a place in them and reads on from there."""
    return rng.bits(rng.as_key("scatter"), (1 << 13,)).numpy().tobytes()


@lru_cache(maxsize=8)
def grain(cell: int, octaves: int = 1) -> np.ndarray:
    """A tile of noise, 512 x 512."""
    return tile(f"grain {cell} {octaves}", 512, cell, octaves)


@lru_cache(maxsize=8)
def wide_grain(cell: int, octaves: int = 1) -> np.ndarray:
    """Four of the tiles, 1024 x 1024, to cut pieces from."""
    return np.tile(grain(cell, octaves), (2, 2))


@lru_cache(maxsize=4)
def rough(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What a surface is lighter and darker by, `(1024, 1024, 4)` uint8."""
    blotch, fine = wide_grain(64, 4).astype(np.int16) - 128, wide_grain(4, 2).astype(np.int16) - 128
    change = (blotch >> 3) + (fine >> 3)
    if kind == "brick":
        stretched = wide_grain(2)[:512, :512].repeat(2, axis=1).repeat(2, axis=0).astype(np.int16) - 128
        courses = np.where(np.arange(1024) % 3 == 0, 7, -3)[:, None]
        change = (blotch >> 3) + (stretched >> 2) + courses
    planes = []
    for signed in (change, -change):
        plane = np.zeros((1024, 1024, 4), dtype=np.uint8)
        plane[..., :3] = np.clip(signed, 0, 255)[..., None]
        planes.append(plane)
    return planes[0], planes[1]


@lru_cache(maxsize=1)
def ground() -> tuple[np.ndarray, np.ndarray]:
    """What light the ground throws back, of 256: of its grain and of its patches, uint16 `(512 * 512,)` to be added."""
    fine, patches = ((grain(*kind).ravel().astype(np.int16) - 128) for kind in ((2,), (64, 4)))
    return (256 + (fine >> 3)).astype(np.uint16), (patches >> 2).astype(np.uint16)


@lru_cache(maxsize=1)
def sensor() -> np.ndarray:
    """Noise nearly normal, int8 with deviation 32: 2^19 in a row, twice, to begin anywhere in them."""
    words = rng.bits(rng.as_key("sensor"), (1 << 19,)).numpy().view(np.uint8)
    four = words.reshape(-1, 4).astype(np.int16)
    return np.tile(np.clip((four.sum(axis=1) - 510) * 7 // 32, -127, 127).astype(np.int8), 2)


LEVELS = np.arange(256, dtype=np.int32)
PARTS = LEVELS.repeat(4)  # of 256 pixels in a row: numpy is slow on short rows


class Air(NamedTuple):
    """What the light and the distance make of a colour."""

    top: int  # light on faces that look up, to the camera, left and right; of 256
    front: int
    left: int
    right: int
    haze: Colour
    depth: int  # cm away at which haze is about a third
    night: bool = False

    def tone(self, colour: Colour, light: int, away: int) -> Colour:
        veil = self.veil(away)
        red, green, blue = colour
        red, green, blue = red * light >> 8, green * light >> 8, blue * light >> 8
        far_red, far_green, far_blue = self.haze
        return (
            min(255, red + ((far_red - red) * veil >> 8)),
            min(255, green + ((far_green - green) * veil >> 8)),
            min(255, blue + ((far_blue - blue) * veil >> 8)),
        )

    def veil(self, away: int) -> int:
        """The share of haze, of 256."""
        away = max(0, away)
        return 180 * away // (away + self.depth)

    @property
    def lights(self) -> tuple[int, int, int, int]:
        """On a face by where it looks: TOP, FRONT, LEFT, RIGHT."""
        return self.top, self.front, self.left, self.right

    def tones(self, light: int, away: int) -> np.ndarray:
        """`tone` of every level, a table `(1, 256, 4)` uint8 for packed pixels; the class stays."""
        lit = np.minimum(255, PARTS * light >> 8)
        mixed = _every_level(self.haze) - lit
        mixed *= self.veil(away)
        mixed >>= 8
        mixed += lit
        table = mixed.astype(np.uint8).reshape(1, 256, 4)
        table[0, :, 3] = LEVELS
        return table


@lru_cache(maxsize=4)
def _every_level(colour: Colour) -> np.ndarray:
    return np.tile(np.array([*colour, 0], dtype=np.int32), 256)


Scale = tuple[int, int]  # pixels to the metre, across and up


def fitting(scale: Scale, width: int, height: int) -> Scale:
    """Not more than a texture may have of pixels."""
    return min(scale[0], 700 * 100 // width), min(scale[1], 600 * 100 // height)


def texels(scale: Scale, width: int, height: int) -> tuple[int, int]:
    """The rows and columns of a texture at a `fitting` scale."""
    return max(2, height * scale[1] // 100), max(2, width * scale[0] // 100)


@lru_cache(maxsize=1 << 12)
def times(colour: Colour, share: int) -> Colour:
    """Lighter or darker: `share` of 256."""
    red, green, blue = colour
    return min(255, red * share >> 8), min(255, green * share >> 8), min(255, blue * share >> 8)


def ramp(dark: Colour, light: Colour, label: int) -> np.ndarray:
    """256 packed pixels from one colour to another."""
    low, high = np.array((*dark, label), dtype=np.int32), np.array((*light, label), dtype=np.int32)
    pixels = low + (high - low) * LEVELS[:, None] // 255
    return pixels.astype(np.uint8).view("<u4")[:, 0]

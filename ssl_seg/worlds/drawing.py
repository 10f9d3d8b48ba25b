"""What worlds draw with: integers from a key, and smooth noise. No float, so every machine draws the same pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_seg import rng

T = TypeVar("T")
Window = tuple[slice, slice]
Outline = Sequence[tuple[int, int]]  # corners (x, y) in 1/1024 of the radius

TURN = 1024  # steps of a full turn
ONE = 1 << 14  # the sine table's 1
# No value lies near a half, so every machine's `sin` is rounded to the same integers.
SINE = np.array([round(ONE * math.sin(2 * math.pi * step / TURN)) for step in range(TURN)], dtype=np.int32)
UNIT = 1024  # an outline's radius
SUBPIXEL = 4  # fractional bits of outlines and texture coordinates, in pixels

BYTES = 4  # random bytes summed for one value of sensor noise: nearly a normal, and never above 3.5 deviations
DEVIATION = math.sqrt(BYTES * (256**2 - 1) / 12)  # of that sum
BLOCK = 256  # words from one key
BLOCKS = 4  # drawn at once: a call of torch costs as much as a thousand words


class Dice:
    """Integers from a key, one after the other: the order of the calls is part of a world's definition."""

    def __init__(self, key: Tensor, first: Sequence[int] = ()) -> None:
        """`first` are words of the key that were drawn already, whole blocks of them."""
        self._words = _words(key, first)

    @classmethod
    def several(cls, keys: Tensor, blocks: int = 2) -> list[Self]:
        """Dice for keys `(N,)`, the same as from each alone, whose first words are drawn in one go."""
        return [cls(key, words) for key, words in zip(keys, _draw(keys, 0, blocks), strict=True)]

    def roll(self, low: int, high: int) -> int:
        """An integer in [low, high); the range is under 2^31."""
        return low + (next(self._words) * (high - low) >> 32)

    # Written out as `roll` has it: a street makes a thousand of these choices.
    def chance(self, percent: int) -> bool:
        return next(self._words) * 100 >> 32 < percent

    def pick(self, options: Sequence[T]) -> T:
        return options[next(self._words) * len(options) >> 32]


def _words(key: Tensor, words: Sequence[int]) -> Iterator[int]:
    block = len(words) // BLOCK
    while True:
        yield from words
        (words,) = _draw(key[None], block, BLOCKS)
        block += BLOCKS


def _draw(keys: Tensor, block: int, blocks: int) -> list[list[int]]:
    """The words of some blocks, from number `block` on, for each of keys `(N,)`."""
    blocks_of = rng.fold_in(keys[:, None], torch.arange(block, block + blocks))
    drawn = rng.bits(blocks_of, (BLOCK,)).numpy()
    return (drawn.view(np.uint64) >> np.uint64(32)).reshape(len(keys), -1).tolist()


def noise(key: Tensor, size: tuple[int, int], cell: int, octaves: int = 1) -> np.ndarray:
    """Smooth noise `(H, W)` uint8 around 128: random levels `cell` pixels apart, blended linearly between.

    Each octave more adds half the height at half the cell (value noise).
    """
    height, width = size
    total = np.zeros(size, dtype=np.int32)
    for octave in range(octaves):
        side = max(1, cell >> octave)
        rows, columns = height // side + 2, width // side + 2
        lattice = _levels(rng.fold_in(key, octave), rows, columns)
        # Bit-exact by contract, unlike INTER_LINEAR.
        smooth = cv2.resize(lattice, (columns * side, rows * side), interpolation=cv2.INTER_LINEAR_EXACT)
        total += (smooth[:height, :width].astype(np.int32) - 128) >> octave
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def tile(name: str, side: int, cell: int, octaves: int = 1) -> np.ndarray:
    """Noise as `noise` draws it, `(side, side)`, whose edges meet: it can be laid again and again.

    `side` is a multiple of `cell`, and that of 2^(octaves - 1).
    """
    key = rng.as_key(name)
    total = np.zeros((side, side), dtype=np.int32)
    for octave in range(octaves):
        step = cell >> octave
        count = side // step
        wrapped = np.pad(_levels(rng.fold_in(key, octave), count, count), 1, mode="wrap")
        whole = side + 2 * step
        smooth = cv2.resize(wrapped, (whole, whole), interpolation=cv2.INTER_LINEAR_EXACT)
        total += (smooth[step:-step, step:-step].astype(np.int32) - 128) >> octave
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def _levels(key: Tensor, rows: int, columns: int) -> np.ndarray:
    """Even random levels, uint8."""
    words = rng.bits(key, (rows * columns,)).numpy()
    return (words.view(np.uint64) >> np.uint64(56)).astype(np.uint8).reshape(rows, columns)


# ---- outlines and where they lie ----


def direction(turn: int) -> tuple[int, int]:
    """Cosine and sine of an angle, of 2^14."""
    return int(SINE[(turn + TURN // 4) % TURN]), int(SINE[turn % TURN])


def polar(radii: Sequence[int]) -> list[tuple[int, int]]:
    """Corners at equal angles around the centre."""
    corners = []
    for number, radius in enumerate(radii):
        cos, sin = direction(number * TURN // len(radii))
        corners.append((radius * cos >> 14, radius * sin >> 14))
    return corners


def filled(outlines: Sequence[Outline], radius: int, turn: int) -> np.ndarray:
    """Outlines filled with 255, `(2 * radius + 3,) * 2` uint8 around their centre; a second outline is a hole."""
    side = 2 * radius + 3
    cos, sin = direction(turn)
    contours = []
    for outline in outlines:
        x, y = np.array(outline, dtype=np.int64).T
        turned = np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1)
        pixels = (turned * radius << SUBPIXEL) // (ONE * UNIT) + (side // 2 << SUBPIXEL)
        contours.append(pixels.astype(np.int32))
    mask = np.zeros((side, side), dtype=np.uint8)
    return cv2.fillPoly(mask, contours, 255, shift=SUBPIXEL)


def window(patch: np.ndarray, row: int, column: int, size: tuple[int, int]) -> tuple[Window, Window]:
    """Where a patch around a centre lies in the picture, and which part of the patch that is."""
    here, inside = [], []
    for centre, length, side in zip((row, column), patch.shape, size, strict=True):
        start = centre - length // 2
        low, high = max(0, start), max(0, min(side, start + length))
        here.append(slice(low, max(low, high)))
        inside.append(slice(low - start, max(low, high) - start))
    return tuple(here), tuple(inside)


# ---- lens and sensor ----


def blurred(image: np.ndarray, blur: int) -> np.ndarray:
    """Each pixel the mean of those under a pyramid of side 2 * blur + 1: two boxes, in exact integers."""
    if blur == 0:
        return image
    side = blur + 1
    total = cv2.copyMakeBorder(image, blur, blur, blur, blur, cv2.BORDER_REFLECT_101)
    for anchor in (0, blur):
        total = box(total, side, anchor)
    inner = total[blur:-blur, blur:-blur]
    return ((inner + side**4 // 2) // side**4).astype(np.uint8)


def box(image: np.ndarray, side: int, anchor: int) -> np.ndarray:
    """The sums over a box around every pixel, int32; `anchor` is the pixel's place in the box."""
    return cv2.boxFilter(image, cv2.CV_32S, (side, side), anchor=(anchor, anchor), normalize=False)


def noisy(image: np.ndarray, key: Tensor, deviation: float) -> np.ndarray:
    if deviation == 0:
        return image
    drawn = rng.bits(key, (-(-image.size * BYTES // 8),)).numpy().view(np.uint8)[: image.size * BYTES]
    total = drawn.reshape(BYTES, -1).sum(axis=0, dtype=np.uint16).reshape(image.shape)
    step = round(deviation * 255 / DEVIATION * 4096)
    levels = np.arange(BYTES * 255 + 1, dtype=np.int32) - BYTES * 255 // 2
    table = (levels * step + 2048 >> 12).astype(np.int16)
    return np.clip(image + table[total], 0, 255).astype(np.uint8)

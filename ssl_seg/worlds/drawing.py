"""What worlds draw with: integers from a key, and smooth noise. No float, so every machine draws the same pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_seg import rng

T = TypeVar("T")
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

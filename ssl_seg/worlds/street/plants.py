"""Trees as sprites and hedges as textures, grown once from fixed keys."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from ssl_seg import rng
from ssl_seg.worlds.drawing import Dice
from ssl_seg.worlds.street.materials import TURN, Scale, cosine, sine, texels, wide_grain
from ssl_seg.worlds.street.perspective import CLEAR, Part


def hedge(width: int, height: int, scale: Scale, seed: int, colours: np.ndarray, part: Part) -> np.ndarray:
    """Part of a hedge as a texture with a ragged top; `colours` are packed, dark to light, 256 of them."""
    rows, columns = texels(scale, width, height)
    leaves = wide_grain(4, 2)[seed % 99 : seed % 99 + rows, :columns].astype(np.int32)
    clumps = wide_grain(64, 4)[seed % 77 : seed % 77 + rows, seed % 50 : seed % 50 + columns].astype(np.int32)
    light = 150 - np.arange(rows)[:, None] * 90 // rows
    level = np.clip(light + (leaves - 128) * 3 // 4 + (clumps - 128) // 2, 0, 255)
    packed = colours[level]
    top = (wide_grain(16, 2)[seed % 300, :columns].astype(np.int32) + leaves[0] // 2) * rows // 1200
    packed[np.arange(rows)[:, None] < top[None]] = CLEAR
    return packed[part]


class Crown(NamedTuple):
    """A tree's sprite at one size."""

    planes: np.ndarray  # `(side, side)` packed, as `Picture.sprite` takes them
    solid: bool


SIDE = 256


@lru_cache(maxsize=64)
def crown(kind: str, number: int) -> list[Crown]:
    """A tree of `kind` (leafy, bare, conifer, bush), in halves from SIDE down to 8 pixels."""
    dice = Dice(rng.fold_in(rng.as_key(f"crown {kind}"), number))
    if kind == "bare":
        cover, level = _bare(dice)
        reach = cv2.dilate(cover, np.ones((7, 7), np.uint8))
        planes = _half(np.stack([cover, level, reach, np.zeros_like(cover)], axis=-1))
    else:
        cover, level = _leafy(dice, kind)
        planes = np.stack([cover, level, cover, np.zeros_like(cover)], axis=-1)
    found = [Crown(_packed(planes), kind != "bare")]
    while len(planes) > 8:
        planes = _half(planes)
        found.append(Crown(_packed(planes), False))
    return found


def _packed(planes: np.ndarray) -> np.ndarray:
    return planes.view("<u4")[..., 0]


def _half(plane: np.ndarray) -> np.ndarray:
    wide = plane.astype(np.uint16)
    return (wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2] + 2 >> 2).astype(np.uint8)


def _leafy(dice: Dice, kind: str) -> tuple[np.ndarray, np.ndarray]:
    level = np.zeros((SIDE, SIDE), dtype=np.uint8)
    clumps = []
    for _ in range(170 if kind != "bush" else 90):
        if kind == "conifer":
            row = dice.roll(30, 240)
            reach = 3 + (row - 28) * 90 // 212
            column = 128 + dice.roll(-reach, reach + 1)
            clumps.append((row, column, 5 + row // 20 + dice.roll(-2, 3)))
        else:
            direction, out = dice.roll(0, TURN), dice.roll(0, 92)
            row = 128 + (out * sine(direction) >> 10)
            column = 128 + (out * cosine(direction) >> 10)
            clumps.append((row, column, dice.roll(16, 34)))
    clumps.sort(key=lambda clump: -abs(clump[1] - 128) - clump[0] // 2)
    for row, column, radius in clumps:
        light = 60 + (255 - row) * 110 // 255 + dice.roll(-22, 23)
        cv2.circle(level, (column, row), radius, light * 3 // 4, -1)
        cv2.circle(level, (column - radius // 5, row - radius // 4), radius * 3 // 4, light, -1)
    top, left = dice.roll(0, 400), dice.roll(0, 400)
    part = (slice(top, top + SIDE), slice(left, left + SIDE))
    across, down, wide = (wide_grain(cell, 2)[part].astype(np.int32) - 128 for cell in (8, 4, 32))
    index = np.arange(SIDE)
    rows = np.clip(index[:, None] + (down + wide >> 3), 0, SIDE - 1)
    columns = np.clip(index + (across + wide >> 3), 0, SIDE - 1)
    level = level[rows, columns]
    cover = np.where(level > 0, 255, 0).astype(np.uint8)
    leaves = wide_grain(4, 2)[part].astype(np.int32)
    holes = (wide_grain(16, 3)[part] > 196) & (leaves > 90)
    cover[holes] = 0
    level = np.clip(level.astype(np.int32) + (leaves - 128) * 2 // 3, 1, 255).astype(np.uint8)
    return cover, level


def _bare(dice: Dice) -> tuple[np.ndarray, np.ndarray]:
    """Branches that fork; drawn at twice the size, so that twigs come out fine."""
    side = 2 * SIDE
    cover = np.zeros((side, side), dtype=np.uint8)
    level = np.full((side, side), 110, dtype=np.uint8)
    limbs = [(side // 2, side - 1, -16, side * 27 // 100, 17, 0)]
    while limbs:
        x, y, direction, length, width, age = limbs.pop()
        end_x, end_y = x + (length * cosine(direction) >> 10), y + (length * sine(direction) >> 10)
        across_x, across_y = -sine(direction), cosine(direction)
        thin = max(1, width * 2 // 3)
        if width > 2:
            corners = [
                (x + (across_x * width >> 11), y + (across_y * width >> 11)),
                (end_x + (across_x * thin >> 11), end_y + (across_y * thin >> 11)),
                (end_x - (across_x * thin >> 11), end_y - (across_y * thin >> 11)),
                (x - (across_x * width >> 11), y - (across_y * width >> 11)),
            ]
            cv2.fillPoly(cover, [np.array(corners, np.int32)], 255)
        else:
            cv2.line(cover, (x, y), (end_x, end_y), 255 if width == 2 else 170)
        if age == 7 or length < 7:
            continue
        for number in range(3 if age else 4):
            turn = dice.roll(-9, 10) if age else (number * 7 - 10 + dice.roll(-3, 4))
            at = dice.roll(60, 101) if number else 100
            start_x, start_y = x + (end_x - x) * at // 100, y + (end_y - y) * at // 100
            shorter = length * dice.roll(58, 82) // 100
            if age < 2 or dice.chance(82):
                upward = min(-3, max(-29, direction + turn))
                limbs.append((start_x, start_y, upward, shorter, thin if number == 0 else thin * 2 // 3, age + 1))
    return cover, level

"""Cell nuclei as three kinds of microscope show them, drawn: a pool with masks where real ones are dear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import cv2
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_seg import rng
from ssl_seg.worlds import Scene, World, check_spans
from ssl_seg.worlds.drawing import SINE, TURN, UNIT, Dice, Outline, Window, blurred, filled, noise, noisy, polar, window

Look = Literal["fluorescence", "stained", "bright"]

CORNERS = 40  # of an outline
MOST = 600  # nuclei of a picture: what a full one of 2 % radius holds
TRIES = 4  # places looked at for a nucleus, which takes the first that is free enough and else is left out
HIDDEN = 25  # percent of the others that a nucleus may cover of its own area: most only touch
# Even steps of the logarithm: most pictures of a fluorescence microscope use a small part of the range.
LEVELS = (14, 18, 24, 31, 41, 53, 70, 91, 119, 155, 202)


@dataclass(frozen=True)
class Nucleus:
    """A nucleus: its silhouette, where in the picture and in the silhouette it is seen, and a key for its looks."""

    mask: np.ndarray  # (S, S) uint8, 255 inside
    radius: int  # pixels
    row: int
    column: int
    here: Window
    inside: Window
    key: Tensor

    @property
    def seen(self) -> np.ndarray:
        """Which pixels of `here` it covers, bool."""
        return self.mask[self.inside] > 0


class Nuclei(World):
    """Nuclei of cells, `background` and `nucleus`, as they look fluorescent, stained or in bright light.

    `fluorescence` shows grey nuclei on a dark ground, most of them in a small part of the range, with light from out
    of focus around them and some very bright ones. `stained` is tissue in violet and rose, whose nuclei are dark,
    mottled and rimmed; some come in grey. `bright` shows pale grey cells of which the small dark part is the nucleus.
    The nuclei of a picture are much of a size and a shape, lie scattered or in heaps, touch and hide each other.

    All is drawn after how such pictures look in general, from no data set. Instances are numbered in the order of
    drawing; a number is missing where later ones hide a nucleus.
    """

    # Each picture is one of these; a name that is given twice comes twice as often.
    looks: Annotated[tuple[Look, ...], Field(min_length=1, max_length=16)] = ("fluorescence", "stained", "bright")
    # Least and most of a picture's nuclei, half of the longest way across one, in thousandths of the picture's short
    # side: 3 to 25 px of 192, and 2 px at least. By area they are round ones of about three quarters of that.
    radius: tuple[Annotated[int, Field(ge=5, le=300)], Annotated[int, Field(ge=5, le=300)]] = (16, 130)
    # Least and most of what discs of that radius would cover, percent; the nuclei, thinner and in part without a place,
    # cover about half of it, and there are never more than 600.
    cover: tuple[Annotated[int, Field(ge=1, le=90)], Annotated[int, Field(ge=1, le=90)]] = (2, 45)
    # The most of a picture's sensor noise, standard deviation as a share of the range; each picture has its own.
    noise: float = Field(default=0.03, ge=0, le=0.3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_spans(radius=self.radius, cover=self.cover)
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("background", "nucleus")

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        nuclei = self.nuclei(key, size)
        instances = np.zeros(size, dtype=np.uint16)
        for number, nucleus in enumerate(nuclei, start=1):
            instances[nucleus.here][nucleus.seen] = number
        dice = Dice(rng.fold_in(key, "look"))
        paint = LOOKS[dice.pick(self.looks)]
        image = paint(dice, key, size, nuclei, self.noise * dice.roll(0, 257) / 256)
        return Scene(image, (instances > 0).astype(np.uint8), instances=instances)

    def nuclei(self, key: Tensor, size: tuple[int, int]) -> list[Nucleus]:
        """The picture's nuclei, later ones before earlier ones."""
        dice = Dice(rng.fold_in(key, "nuclei"))
        # Even in the square root, so that small nuclei are not rare. None of these roots lies near a half, so every
        # machine rounds them alike.
        low, high = (round(share**0.5 * 64) for share in self.radius)
        mean = max(2, min(size) * dice.roll(low, high + 1) ** 2 // (1000 << 12))
        area = size[0] * size[1] * dice.roll(self.cover[0], self.cover[1] + 1) // 100
        count = min(MOST, max(1, area * 100 // (314 * mean * mean)))
        outlines = _Outlines(dice)
        places = _Places(dice, size)
        keys = rng.fold_in(rng.fold_in(key, "nucleus"), torch.arange(count))
        found = []
        for own, dice in zip(keys, Dice.several(keys, blocks=1), strict=True):
            radius = max(2, mean * dice.roll(70, 135) // 100)
            mask = filled([outlines.draw(dice)], radius, outlines.turn(dice))
            nucleus = places.put(dice, own, radius, mask)
            if nucleus is not None:
                found.append(nucleus)
        return found


# ---- what the nuclei of a picture have in common ----


class _Outlines:
    """Ovals, more or less long and wavy; some are bent."""

    def __init__(self, dice: Dice) -> None:
        self._width = dice.roll(45, 101)  # of the length, percent
        self._wavy = dice.roll(0, 70)  # of 1024
        self._bent = dice.roll(0, 40)  # percent of the nuclei
        self._along = dice.roll(0, TURN)
        self._stray = dice.pick((40, 100, TURN, TURN))  # how far they are turned from each other

    def turn(self, dice: Dice) -> int:
        return self._along + dice.roll(0, self._stray)

    def draw(self, dice: Dice) -> Outline:
        radii = [UNIT - 3 * self._wavy] * CORNERS
        for lobes in (2, 3, 4):
            phase, height = dice.roll(0, TURN), dice.roll(0, self._wavy + 1) * 2 // lobes
            for corner in range(CORNERS):
                radii[corner] += int(SINE[(corner * lobes * TURN // CORNERS + phase) % TURN]) * height >> 14
        width = min(100, self._width * dice.roll(85, 116) // 100)
        bend = dice.roll(100, 350) if dice.chance(self._bent) else 0
        corners = []
        for x, y in polar(radii):
            across = y * width // 100 + (bend * (x * x - UNIT * UNIT // 2) // (UNIT * UNIT))
            corners.append((x, max(-UNIT, min(UNIT, across))))
        return corners


class _Places:
    """Where nuclei lie: anywhere, or in heaps."""

    def __init__(self, dice: Dice, size: tuple[int, int]) -> None:
        self._size = size
        self._spread = max(size) * dice.roll(10, 45) // 100
        heaps = dice.roll(1, 5) if dice.chance(50) else 0
        self._heaps = [(dice.roll(0, size[0]), dice.roll(0, size[1])) for _ in range(heaps)]
        self._taken = np.zeros(size, dtype=bool)

    def put(self, dice: Dice, key: Tensor, radius: int, mask: np.ndarray) -> Nucleus | None:
        """The nucleus in a free place, or None where none was found."""
        for _ in range(TRIES):
            row, column = self._draw(dice)
            here, inside = window(mask, row, column, self._size)
            nucleus = Nucleus(mask, radius, row, column, here, inside, key)
            seen = nucleus.seen
            taken = self._taken[here]
            if seen.any() and (taken & seen).sum() * 100 <= HIDDEN * seen.sum():
                taken |= seen
                return nucleus
        return None

    def _draw(self, dice: Dice) -> tuple[int, int]:
        if not self._heaps:
            return dice.roll(0, self._size[0]), dice.roll(0, self._size[1])
        row, column = dice.pick(self._heaps)
        spread = self._spread
        # Two rolls make a hill: most lie near the middle of their heap.
        row += dice.roll(-spread, spread + 1) + dice.roll(-spread, spread + 1) >> 1
        column += dice.roll(-spread, spread + 1) + dice.roll(-spread, spread + 1) >> 1
        return row, column


# ---- three looks ----


def _fluorescence(
    dice: Dice, key: Tensor, size: tuple[int, int], nuclei: list[Nucleus], deviation: float
) -> np.ndarray:
    ground, level = dice.roll(1, 26), dice.pick(LEVELS)
    contrast, bright = dice.roll(20, 140), dice.roll(0, 9)
    light = noise(rng.fold_in(key, "ground"), size, max(2, min(size) // 2)).astype(np.int32)
    canvas = ground * (128 + (light >> 1)) >> 7
    for nucleus, own in _each(nuclei):
        own_level = level * own.roll(60, 141) // 100 * (3 if own.chance(bright) else 1)
        mottled = _mottled(nucleus, contrast)
        shown = ground + (own_level * mottled >> 8)
        view = canvas[nucleus.here]
        np.copyto(view, np.maximum(view, shown), where=nucleus.seen)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    # Light from above and below the focus: a wide, faint copy.
    haze = blurred(image, dice.roll(4, 13)).astype(np.int32) * dice.roll(0, 90) >> 8
    image = np.clip(blurred(image, dice.roll(0, 4)) + haze, 0, 255).astype(np.uint8)
    # Few photons give little noise, in levels.
    image = noisy(image, rng.fold_in(key, "noise"), deviation * min(255, ground + 2 * level) / 255)
    picture = np.repeat(image[..., None], 3, axis=-1)
    if dice.chance(10):  # in the colour of the dye
        picture[..., dice.pick(((0, 1), (0, 2), (1, 2)))] //= 4
    return picture


def _stained(dice: Dice, key: Tensor, size: tuple[int, int], nuclei: list[Nucleus], deviation: float) -> np.ndarray:
    pale = [dice.roll(188, 246), dice.roll(165, 236), dice.roll(205, 246)]
    rose = [
        level - fall for level, fall in zip(pale, (dice.roll(0, 40), dice.roll(20, 80), dice.roll(0, 45)), strict=True)
    ]
    coarse = noise(rng.fold_in(key, "tissue"), size, max(2, min(size) // dice.roll(2, 7)), octaves=5).astype(np.int32)
    share = np.clip((coarse - 128) * dice.roll(1, 4) + dice.roll(64, 193), 0, 255)
    canvas = _between(pale, rose, share)
    dark = [dice.roll(60, 150), dice.roll(15, 110), dice.roll(115, 190)]
    contrast, rim, opaque = dice.roll(15, 110), dice.roll(0, 40), dice.roll(150, 250)
    if dice.chance(40):
        _around(canvas, nuclei, [level * dice.roll(78, 97) // 100 for level in pale], 130)
    for nucleus, own in _each(nuclei):
        shade = own.roll(75, 131)
        mottled = _mottled(nucleus, contrast) * shade // 100
        edge = nucleus.mask[nucleus.inside] > cv2.erode(nucleus.mask, np.ones((3, 3), np.uint8))[nucleus.inside]
        mottled = mottled - rim * edge
        view = canvas[nucleus.here]
        shown = np.array(dark) * mottled[..., None] >> 8
        mixed = view + ((shown - view) * min(255, opaque * own.roll(80, 111) // 100) >> 8)
        np.copyto(view, mixed, where=nucleus.seen[..., None])
    image = blurred(np.clip(canvas, 0, 255).astype(np.uint8), dice.roll(0, 3))
    if dice.chance(25):
        image = np.repeat((image.astype(np.int32) @ (77, 150, 29) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    return noisy(image, rng.fold_in(key, "noise"), deviation)


def _bright(dice: Dice, key: Tensor, size: tuple[int, int], nuclei: list[Nucleus], deviation: float) -> np.ndarray:
    ground = dice.roll(195, 250)
    light = noise(rng.fold_in(key, "ground"), size, max(2, min(size) // 2)).astype(np.int32) - 128
    canvas = np.repeat((ground + (light * dice.roll(2, 14) >> 7))[..., None], 3, axis=-1)
    # Grey, or a little violet.
    tint = [0, -dice.roll(0, 40), 0] if dice.chance(40) else [0, 0, 0]
    body = ground - dice.roll(15, 75)
    _around(canvas, nuclei, [body + part for part in tint], dice.roll(170, 330))
    dark = dice.roll(35, max(36, body - 40))
    contrast = dice.roll(10, 70)
    for nucleus, own in _each(nuclei):
        shown = dark * own.roll(80, 125) // 100 * _mottled(nucleus, contrast) >> 8
        np.copyto(canvas[nucleus.here], shown[..., None] + tint, where=nucleus.seen[..., None])
    image = blurred(np.clip(canvas, 0, 255).astype(np.uint8), dice.roll(0, 3))
    return noisy(image, rng.fold_in(key, "noise"), deviation)


LOOKS: dict[Look, Callable[[Dice, Tensor, tuple[int, int], list[Nucleus], float], np.ndarray]] = {
    "fluorescence": _fluorescence,
    "stained": _stained,
    "bright": _bright,
}


def _each(nuclei: list[Nucleus]) -> Iterator[tuple[Nucleus, Dice]]:
    """The nuclei with dice for what they look like, those of one with another's share nothing."""
    if nuclei:
        keys = rng.fold_in(torch.stack([nucleus.key for nucleus in nuclei]), "surface")
        yield from zip(nuclei, Dice.several(keys, blocks=1), strict=True)


def _mottled(nucleus: Nucleus, contrast: int) -> np.ndarray:
    """How light the nucleus is in each pixel of its window, of 256: chromatin lies in clumps."""
    clumps = noise(rng.fold_in(nucleus.key, "clumps"), nucleus.mask.shape, max(2, nucleus.radius // 2), octaves=2)
    return 256 + ((clumps[nucleus.inside].astype(np.int32) - 128) * contrast >> 7)


def _around(canvas: np.ndarray, nuclei: list[Nucleus], colour: list[int], reach: int) -> None:
    """The cells' bodies, `reach` percent of their nuclei's radii, drawn beneath all nuclei."""
    for nucleus in nuclei:
        dice = Dice(rng.fold_in(nucleus.key, "body"))
        radii = [dice.roll(UNIT * 6 // 10, UNIT) for _ in range(9)]
        mask = filled([polar(radii)], nucleus.radius * reach // 100, dice.roll(0, TURN))
        here, inside = window(mask, nucleus.row, nucleus.column, canvas.shape[:2])
        shade = dice.roll(-12, 13)
        np.copyto(canvas[here], np.array(colour) + shade, where=(mask[inside] > 0)[..., None])


def _between(first: list[int], second: list[int], share: np.ndarray) -> np.ndarray:
    """Colours between two, `(H, W, 3)` int32, for shares `(H, W)` of 255 of the second."""
    mixed = (255 - share[..., None]) * np.array(first) + share[..., None] * np.array(second)
    return (mixed // 255).astype(np.int32)

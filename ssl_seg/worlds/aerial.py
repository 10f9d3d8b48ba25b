"""The streets of a town from above, drawn: blocks of houses, car parks and halls between roads that are the mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import cv2
import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from ssl_seg import rng
from ssl_seg.worlds import Scene, World, check_spans
from ssl_seg.worlds.drawing import (
    ONE,
    SUBPIXEL,
    TURN,
    UNIT,
    Dice,
    blurred,
    direction,
    filled,
    noise,
    noisy,
    polar,
    window,
)

Colour = Sequence[int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in decimetres of the town

ROAD = 1
LAWNS = ((58, 74, 44), (72, 84, 52), (84, 82, 62), (96, 88, 68), (66, 66, 50))
ROOFS = ((112, 104, 96), (92, 90, 92), (120, 96, 80), (140, 126, 108), (76, 72, 72), (104, 80, 68), (150, 146, 140))
HALLS = ((226, 226, 224), (196, 196, 194), (150, 150, 150), (110, 108, 106), (84, 80, 80))
CARS = ((220, 220, 220), (38, 38, 42), (120, 122, 126), (134, 44, 40), (52, 66, 104), (176, 176, 172))
CROWNS = ((52, 74, 34), (66, 90, 40), (44, 60, 36), (86, 104, 52), (96, 88, 74))  # the last is bare
PAVED = (150, 146, 138)
ONE_PIXEL = 1 << SUBPIXEL
CLEAR = 32  # decimetres from the middle of a block to the nearest roof: an alley's half, and a little more


class Aerial(World):
    """A town from above, `background` and `road`: streets, alleys and their crossings, whatever grows over them.

    Streets cross at right angles and a few run slant; between them lie houses and garages in rows, halls with car
    parks, playing fields and railways. Car parks, yards and drives have the colour of roads and are none: what tells a
    road is that it leads on. Trees and shadows fall on roads, which stay roads beneath.

    All is drawn after how such photographs look in general, from no data set. Lengths are in decimetres.
    """

    # Least and most of what a pixel covers, decimetres: 6 to 14 shows 115 to 270 m on 192 pixels.
    # From 30 on an alley would be narrower than a pixel.
    ground: tuple[Annotated[int, Field(ge=1, le=30)], Annotated[int, Field(ge=1, le=30)]] = (6, 14)
    # How many of a picture's places for a tree have one, least and most, percent.
    trees: tuple[Annotated[int, Field(ge=0, le=100)], Annotated[int, Field(ge=0, le=100)]] = (5, 60)
    # The most of a picture's sensor noise, standard deviation as a share of the range; each picture has its own.
    noise: float = Field(default=0.03, ge=0, le=0.3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_spans(ground=self.ground, trees=self.trees)
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("background", "road")

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        dice = Dice(rng.fold_in(key, "picture"))
        view = _View(dice, size, dice.roll(self.ground[0], self.ground[1] + 1))
        town = _Town(dice, view)
        town.blocks(Dice(rng.fold_in(key, "blocks")))
        town.streets(Dice(rng.fold_in(key, "streets")))
        town.planted(rng.fold_in(key, "trees"), dice.roll(self.trees[0], self.trees[1] + 1))
        image = _light(dice, rng.fold_in(key, "light"), town.image)
        image = noisy(image, rng.fold_in(key, "noise"), self.noise * dice.roll(0, 257) / 256)
        return Scene(image, town.label)


# ---- from the town to the picture ----


class _View:
    """Where a point of the town, in decimetres from the picture's middle, lies in the picture."""

    def __init__(self, dice: Dice, size: tuple[int, int], ground: int) -> None:
        self.size = size
        self.ground = ground
        # Maps are often cut along the streets; some are not.
        turn = dice.roll(-30, 31) if dice.chance(65) else dice.roll(0, TURN)
        self._cos, self._sin = direction(turn)
        self.reach = (math.isqrt(size[0] ** 2 + size[1] ** 2) + 2) * ground // 2  # to the corners

    def place(self, u: int, v: int) -> tuple[int, int]:
        """Column and row of a point, in 1/16 px."""
        scale = ONE * self.ground
        x = ((u * self._cos - v * self._sin) << SUBPIXEL) // scale
        y = ((u * self._sin + v * self._cos) << SUBPIXEL) // scale
        return x + (self.size[1] << SUBPIXEL >> 1), y + (self.size[0] << SUBPIXEL >> 1)

    def fill(self, canvas: np.ndarray, box: Rectangle, colour: Colour | int) -> None:
        left, top, right, bottom = box
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        self.polygon(canvas, corners, colour)

    def polygon(self, canvas: np.ndarray, points: Iterable[tuple[int, int]], colour: Colour | int) -> None:
        value = colour if isinstance(colour, int) else tuple(int(part) for part in colour)
        places = [self.place(u, v) for u, v in points]
        columns, rows = zip(*places, strict=True)
        right, bottom = ((side + 1) << SUBPIXEL for side in self.size[::-1])
        if max(columns) < -ONE_PIXEL or max(rows) < -ONE_PIXEL or min(columns) > right or min(rows) > bottom:
            return  # most of the town lies beyond the picture
        cv2.fillPoly(canvas, [np.array(places, dtype=np.int32)], value, shift=SUBPIXEL)


# ---- the town ----


@dataclass(frozen=True)
class _Line:
    """A street along one of the two directions: where its middle is, and half of its width."""

    at: int
    half: int


@dataclass(frozen=True)
class _Crown:
    """A tree from above, and where it stands in the town."""

    mask: np.ndarray  # (S, S) uint8, 255 inside
    u: int
    v: int

    def place(self, view: _View, by: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Its middle's row and column, of the tree or of what is moved away from it by decimetres."""
        column, row = view.place(self.u + by[0], self.v + by[1])
        return row >> SUBPIXEL, column >> SUBPIXEL


class _Town:
    """Draws itself from the ground up onto `image` `(H, W, 3)` and `label` `(H, W)`, both uint8."""

    def __init__(self, dice: Dice, view: _View) -> None:
        self.view = view
        self.image = np.empty((*view.size, 3), dtype=np.uint8)
        self.label = np.zeros(view.size, dtype=np.uint8)
        self._lawn = dice.pick(LAWNS)
        self.image[:] = self._lawn
        asphalt = dice.roll(72, 128)
        self._asphalt = (asphalt, asphalt - dice.roll(0, 4), asphalt - dice.roll(0, 8))
        cos, sin = direction(dice.roll(0, TURN))
        length = dice.roll(15, 60)
        self._shadow = (length * cos >> 14, length * sin >> 14)
        self._walk = dice.roll(18, 40)  # from the kerb to the pavement's far side
        self._across = self._lines(dice, dice.roll(420, 760))
        self._along = self._lines(dice, dice.roll(800, 1700))
        self._alleys = dice.chance(60)
        self._slant = dice.roll(0, TURN) if dice.chance(25) else None
        self._built = dice.roll(45, 95)  # percent of the blocks that are houses
        self._trees: list[tuple[int, int]] = []

    def _lines(self, dice: Dice, spacing: int) -> list[_Line]:
        lines = []
        at = -self.view.reach - dice.roll(0, spacing)
        while at < self.view.reach + spacing:
            lines.append(_Line(at, dice.roll(35, 62) if dice.chance(80) else dice.roll(62, 110)))
            at += spacing * dice.roll(80, 126) // 100
        return lines

    def blocks(self, dice: Dice) -> None:
        """All that lies between the streets."""
        shadows = np.zeros(self.view.size, dtype=np.uint8)
        roofs: list[tuple[Rectangle, Colour, bool]] = []
        for left, right in zip(self._across, self._across[1:], strict=False):
            for top, bottom in zip(self._along, self._along[1:], strict=False):
                block = (left.at + left.half, top.at + top.half, right.at - right.half, bottom.at - bottom.half)
                self._block(dice, block, roofs)
        for box, _, _ in roofs:
            self.view.fill(shadows, _moved(box, *self._shadow), 255)
        _darken(self.image, shadows, 120)
        for box, colour, gabled in roofs:
            self._roof(box, colour, gabled)

    def _block(self, dice: Dice, block: Rectangle, roofs: list[tuple[Rectangle, Colour, bool]]) -> None:
        left, top, right, bottom = block
        if not self._shows(block):
            return
        walk = self._walk
        self.view.fill(self.image, block, PAVED)
        self.view.fill(self.image, _shrunk(block, max(4, walk - 14)), self._lawn)  # the pavement is a line in the lawn
        self.view.fill(self.image, _shrunk(block, max(2, walk - 26)), _shaded(dice, self._lawn))
        inner = _shrunk(block, walk)
        if dice.chance(self._built):
            self._houses(dice, inner, roofs)
        elif dice.chance(60):
            self._halls(dice, inner, roofs)
        elif dice.chance(50):
            self._field(dice, inner)
        else:
            self.view.fill(self.image, inner, _shaded(dice, dice.pick(LAWNS)))
        # Trees stand along the pavement.
        for v in range(top, bottom, 90):
            self._trees += [(left + walk // 2, v), (right - walk // 2, v)]

    def _houses(self, dice: Dice, block: Rectangle, roofs: list[tuple[Rectangle, Colour, bool]]) -> None:
        left, top, right, bottom = block
        middle = (left + right) // 2
        width = dice.roll(85, 150)
        for near, far, sign in ((left, middle, 1), (right, middle, -1)):
            v = top
            while v + width <= bottom:
                lot = (min(near, far), v, max(near, far), v + width)
                self.view.fill(self.image, lot, _shaded(dice, dice.pick(LAWNS) if dice.chance(40) else self._lawn))
                depth = abs(far - near)
                setback = dice.roll(10, 50)
                long = min(depth - setback - CLEAR, dice.roll(110, 220))
                if dice.chance(92) and long > 40:
                    wide = width - dice.roll(14, 50)
                    start = near + sign * setback
                    roofs.append(
                        (_box(start, v + 6, start + sign * long, v + 6 + wide), _roof_colour(dice), dice.chance(70))
                    )
                    if dice.chance(50):
                        drive = _box(near, v + 6 + wide, far, v + width - 2)
                        self.view.fill(self.image, drive, _shaded(dice, PAVED))
                if dice.chance(60) and depth > 260:  # a garage on the alley
                    wide = dice.roll(50, 75)
                    start = far - sign * dice.roll(CLEAR, 45)
                    roofs.append(
                        (_box(start, v + 10, start - sign * 60, v + 10 + wide), _roof_colour(dice), dice.chance(50))
                    )
                self._trees.append((near + sign * dice.roll(0, max(1, depth)), v + dice.roll(0, width)))
                v += width
        if self._alleys and dice.chance(85):
            half = dice.roll(16, 28)
            alley = (middle - half, top - self._walk - 8, middle + half, bottom + self._walk + 8)
            colour = _shaded(dice, _between(self._asphalt, PAVED, dice.roll(0, 101)))
            self.view.fill(self.image, alley, colour)
            self.view.fill(self.label, alley, ROAD)

    def _halls(self, dice: Dice, block: Rectangle, roofs: list[tuple[Rectangle, Colour, bool]]) -> None:
        """Large flat roofs in a car park."""
        left, top, right, bottom = block
        self.view.fill(self.image, block, _shaded(dice, self._asphalt))
        v = top
        while v < bottom - 120:
            deep = dice.roll(150, 500)
            end = min(bottom, v + deep)
            cut = left + (right - left) * dice.roll(30, 90) // 100
            first, second = ((left, cut), (cut, right)) if dice.chance(50) else ((cut, right), (left, cut))
            if dice.chance(75):
                colour = _shaded(dice, dice.pick(HALLS))
                roofs.append(((first[0] + 5, v + 5, first[1] - 5, end - 5), colour, False))
            self._parked(dice, (second[0] + 20, v + 20, second[1] - 20, end - 20))
            v = end

    def _parked(self, dice: Dice, place: Rectangle) -> None:
        left, top, right, bottom = place
        full = dice.roll(10, 95)
        for v in range(top, bottom - 50, dice.roll(100, 170)):
            for u in range(left, right - 20, 27):
                if dice.chance(full):
                    self.view.fill(self.image, (u, v, u + 19, v + 46), dice.pick(CARS))

    def _field(self, dice: Dice, block: Rectangle) -> None:
        self.view.fill(self.image, block, (58, dice.roll(70, 96), 50))
        self.view.fill(self.image, _shrunk(block, 30), (170, 178, 166))
        self.view.fill(self.image, _shrunk(block, 36), (56, dice.roll(70, 96), 48))

    def _roof(self, box: Rectangle, colour: Colour, gabled: bool) -> None:
        self.view.fill(self.image, box, colour)
        if gabled:  # the side away from the light
            left, top, right, bottom = box
            half = (
                (left, top, right, (top + bottom) // 2)
                if right - left > bottom - top
                else (left, top, (left + right) // 2, bottom)
            )
            self.view.fill(self.image, half, [part * 78 // 100 for part in colour])

    def streets(self, dice: Dice) -> None:
        reach = 2 * self.view.reach  # streets end beyond the picture, whatever its turn
        for line in self._along:
            self._street(dice, line, [(-reach, line.at - line.half), (reach, line.at + line.half)], upright=False)
        for line in self._across:
            self._street(dice, line, [(line.at - line.half, -reach), (line.at + line.half, reach)], upright=True)
        if self._slant is not None:
            cos, sin = direction(self._slant)
            half, off = dice.roll(40, 100), dice.roll(-600, 601)
            rail = dice.chance(30)
            strip = []
            for along, across in ((-reach, off - half), (reach, off - half), (reach, off + half), (-reach, off + half)):
                strip.append(((along * cos - across * sin) >> 14, (along * sin + across * cos) >> 14))
            self.view.polygon(self.image, strip, (104, 90, 80) if rail else _shaded(dice, self._asphalt))
            self.view.polygon(self.label, strip, 0 if rail else ROAD)

    def _street(self, dice: Dice, line: _Line, corners: list[tuple[int, int]], upright: bool) -> None:
        (left, top), (right, bottom) = corners
        if dice.chance(6):  # it was never built: lawn leads on
            return
        colour = _shaded(dice, self._asphalt)
        self.view.fill(self.image, (left, top, right, bottom), colour)
        self.view.fill(self.label, (left, top, right, bottom), ROAD)
        reach = self.view.reach
        marked, full = dice.chance(45), dice.roll(0, 60)
        for at in range(-reach, reach, 62):
            if marked and line.half > 40:
                self.view.fill(self.image, _strip(line.at - 2, line.at + 2, at, at + 30, upright), (190, 186, 160))
            for side in (line.at - line.half + 4, line.at + line.half - 24):
                if dice.chance(full):
                    self.view.fill(self.image, _strip(side, side + 20, at, at + 46, upright), dice.pick(CARS))

    def planted(self, key: Tensor, share: int) -> None:
        """Trees and their shadows, over all."""
        dice = Dice(key)
        bare = dice.chance(35)
        standing = [place for place in self._trees if dice.chance(share)]
        crowns = [self._crown(dice, place) for place in standing]
        shadows = np.zeros(self.view.size, dtype=np.uint8)
        for crown in crowns:
            here, inside = window(crown.mask, *crown.place(self.view, self._shadow), self.view.size)
            shadows[here][crown.mask[inside] > 0] = 255
        _darken(self.image, shadows, 140)
        leaves = noise(rng.fold_in(key, "leaves"), self.view.size, 6, octaves=3).astype(np.int32)
        for crown in crowns:
            colour = CROWNS[-1] if bare and dice.chance(80) else dice.pick(CROWNS)
            opaque = dice.roll(90, 190) if bare else dice.roll(200, 257)
            here, inside = window(crown.mask, *crown.place(self.view), self.view.size)
            shown = np.array(colour) * (128 + leaves[here][..., None]) >> 8
            under = self.image[here].astype(np.int32)
            mixed = np.clip(under + ((shown - under) * opaque >> 8), 0, 255).astype(np.uint8)
            np.copyto(self.image[here], mixed, where=(crown.mask[inside] > 0)[..., None])

    def _crown(self, dice: Dice, place: tuple[int, int]) -> _Crown:
        u, v = (at + dice.roll(-25, 26) for at in place)
        radius = max(1, dice.roll(16, 52) // self.view.ground)
        return _Crown(filled([polar([dice.roll(700, UNIT + 1) for _ in range(12)])], radius, 0), u, v)

    def _shows(self, block: Rectangle) -> bool:
        left, top, right, bottom = block
        reach = self.view.reach
        return right > left and bottom > top and right > -reach and left < reach and bottom > -reach and top < reach


# ---- rectangles and colours ----


def _box(u: int, v: int, other_u: int, other_v: int) -> Rectangle:
    return min(u, other_u), min(v, other_v), max(u, other_u), max(v, other_v)


def _strip(low: int, high: int, start: int, end: int, upright: bool) -> Rectangle:
    return (low, start, high, end) if upright else (start, low, end, high)


def _moved(box: Rectangle, u: int, v: int) -> Rectangle:
    return box[0] + u, box[1] + v, box[2] + u, box[3] + v


def _shrunk(box: Rectangle, by: int) -> Rectangle:
    return box[0] + by, box[1] + by, box[2] - by, box[3] - by


def _shaded(dice: Dice, colour: Colour) -> Colour:
    bright = dice.roll(88, 114)
    return [min(255, max(0, part * bright // 100 + dice.roll(-5, 6))) for part in colour]


def _roof_colour(dice: Dice) -> Colour:
    return _shaded(dice, dice.pick(HALLS[:2]) if dice.chance(8) else dice.pick(ROOFS))


def _between(first: Colour, second: Colour, percent: int) -> Colour:
    return [(a * (100 - percent) + b * percent) // 100 for a, b in zip(first, second, strict=True)]


# ---- light ----


def _darken(image: np.ndarray, shadows: np.ndarray, left: int) -> None:
    """What lies in shadow keeps `left` of 256 of its light."""
    np.copyto(image, (image.astype(np.uint16) * left >> 8).astype(np.uint8), where=(shadows > 0)[..., None])


def _light(dice: Dice, key: Tensor, image: np.ndarray) -> np.ndarray:
    """Grain of all surfaces, haze, contrast and a cast of colour."""
    size = image.shape[:2]
    fine = noise(rng.fold_in(key, "fine"), size, 4, octaves=3).astype(np.int32) - 128
    coarse = noise(rng.fold_in(key, "coarse"), size, max(2, min(size) // 5), octaves=4).astype(np.int32) - 128
    grain = 256 + (fine * dice.roll(15, 90) + coarse * dice.roll(5, 50) >> 7)
    bright, lift = dice.roll(80, 125), dice.roll(-14, 25)
    cast = np.array([dice.roll(94, 107) for _ in range(3)], dtype=np.int32)
    lit = (image * grain[..., None] >> 8) * bright * cast // 10_000 + lift
    return blurred(np.clip(lit, 0, 255).astype(np.uint8), dice.roll(0, 2))

"""Textured objects before a wall, where what tells their class is planted: a study then knows what there is to find."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from ssl_seg import rng
from ssl_seg.worlds import Scene, World, check_spans
from ssl_seg.worlds.drawing import (
    SINE,
    SUBPIXEL,
    TURN,
    UNIT,
    Dice,
    blurred,
    box,
    direction,
    filled,
    noise,
    noisy,
    polar,
    window,
)

Cue = Literal["colour", "texture", "shape", "layout"]

SHAPES = ("disc", "ring", "triangle", "rectangle", "star", "cross", "ellipse", "blob")
# Far apart in hue; none above 185, so that the light sides of a texture are not cut off at 255.
COLOURS = {
    "red": (178, 52, 44),
    "green": (70, 140, 58),
    "blue": (48, 88, 176),
    "yellow": (184, 152, 48),
    "purple": (136, 64, 152),
    "teal": (44, 150, 150),
    "white": (182, 178, 172),
    "brown": (112, 74, 48),
}
TEXTURES = ("plain", "striped", "checked", "dotted", "zigzag", "speckled", "netted", "marbled")

NEAREST, FARTHEST, WALL = 2000, 6000, 8000  # depths in mm
FOCUS = 540  # an object 1 mm away would have this many short sides for a radius: 0.07 to 0.3 of it at its depths
CANDIDATES = 4  # places looked at for an object; the one farthest from the others is taken (Mitchell, SIGGRAPH 1991)
CONTRAST = 80  # of 256: how far a texture brightens and darkens its colour
SHADE = 40  # of 256: how far the side towards the lamp is lighter than the middle
SHADOW = 150  # of 256: what is left of the light where a shadow falls


@dataclass(frozen=True)
class Thing:
    """An object: its class, what it looks like (numbers into the tables above), and where it stands."""

    kind: int
    colour: int
    texture: int
    shape: int
    row: int
    column: int
    radius: int
    turn: int  # in 1/1024 of a full turn
    depth: int  # mm
    key: Tensor  # for what is left to draw: its shade of the colour, its texture's period, its outline's variety


class Shapes(World):
    """Textured objects of several classes, near ones before far ones, on a mottled wall; depth and objects are known.

    `cue` says what tells an object's class: its colour, its texture, its shape, the zone of the picture in which its
    centre lies, or several of them, which then agree. Class k has the k-th colour, texture, shape or zone of each cue.
    Everything else about an object is drawn apart from its class: the factors that are no cue evenly from the same
    `classes` values, and number, size, rotation, depth, shade and period too. So an object's class can be told by the
    cues, and by nothing else. The wall is duller than any object, in every setting.

    Zones are one row of cells for two or three classes and two rows for more, along the picture's longer side. A
    factor looks the same whether it is a cue or not; only whom it belongs to changes. With `imbalance` a cue's values
    become as uneven as the classes, those that are no cue stay even.

    `noise`, `light`, `blur` and `shadow` change the picture, never the label: with one key their scenes are the same.
    Depth is in mm (objects 2000 to 6000, the wall 8000); an object is a flat card, so it has one depth. Instances are
    numbered from the farthest, 1, to the nearest; a number is missing where an object is wholly hidden.
    """

    # Fewer than the objects of a scene, so that most classes are in most pictures; the tables above end at eight.
    classes: int = Field(default=6, ge=2, le=8)  # without the background
    # The one that a network has to see as a whole: colour and texture can be told from a few pixels.
    cue: Annotated[tuple[Cue, ...], Field(min_length=1)] = ("shape",)
    # About a quarter of the picture, with some overlap.
    objects: tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]] = (8, 14)  # least, most
    # The first class is drawn so many times as often as the last, geometrically between (Cui et al., CVPR 2019).
    imbalance: int = Field(default=1, ge=1, le=1000)
    # Standard deviation of the sensor's noise, of the range; 0.02 is 5 levels of 255, a photograph taken indoors.
    noise: float = Field(default=0.02, ge=0, le=0.3)
    # How far the brightest and darkest places are from even light: 0.3 is about 70 % to 130 % of it.
    light: float = Field(default=0.3, ge=0, le=1)
    # The lens spreads a point over a pyramid of 2 * blur + 1 px; 1 only takes the steps off the edges.
    blur: int = Field(default=1, ge=0, le=12)
    shadow: bool = True  # objects darken what is behind them, beside their side away from the lamp

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.cue)) < len(self.cue):
            raise ValueError("cue names one thing twice; name each once")
        check_spans(objects=self.objects)
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """By what tells them: `disc`, or `red_striped` where colour and texture do."""
        words = {
            "colour": tuple(COLOURS),
            "texture": TEXTURES,
            "shape": SHAPES,
            "layout": tuple(f"zone{number + 1}" for number in range(8)),
        }
        told = [words[factor] for factor in words if factor in self.cue]
        return ("background", *("_".join(parts[kind] for parts in told) for kind in range(self.classes)))

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        lamp = Dice(rng.fold_in(key, "lamp")).roll(0, TURN)
        image = _wall(rng.fold_in(key, "wall"), size)
        label = np.zeros(size, dtype=np.uint8)
        instances = np.zeros(size, dtype=np.uint16)
        depth = np.full(size, WALL, dtype=np.uint16)
        for number, thing in enumerate(self.things(key, size), start=1):
            mask = silhouette(thing)
            if self.shadow:
                _cast(image, mask, thing, lamp)
            here, inside = window(mask, thing.row, thing.column, size)
            seen = mask[inside] > 0
            np.copyto(image[here], _surface(thing, lamp, size)[inside], where=seen[..., None])
            label[here][seen] = thing.kind + 1
            instances[here][seen] = number
            depth[here][seen] = thing.depth
        image = _lit(image, rng.fold_in(key, "light"), lamp, self.light)
        image = blurred(image, self.blur)
        return Scene(noisy(image, rng.fold_in(key, "noise"), self.noise), label, depth, instances)

    def things(self, key: Tensor, size: tuple[int, int]) -> list[Thing]:
        """The scene's objects, the farthest first."""
        least, most = self.objects
        count = Dice(rng.fold_in(key, "count")).roll(least, most + 1)
        things: list[Thing] = []
        for number in range(count):
            things.append(self._thing(rng.fold_in(rng.fold_in(key, "thing"), number), size, things))
        return sorted(things, key=lambda thing: -thing.depth)

    def _thing(self, key: Tensor, size: tuple[int, int], others: Sequence[Thing]) -> Thing:
        dice = Dice(key)
        kind = bisect_right(self._ladder, dice.roll(0, self._ladder[-1]))
        # All are drawn, those that the class decides as well: a change of the cue leaves the other numbers alone.
        drawn = {factor: dice.roll(0, self.classes) for factor in ("colour", "texture", "shape", "layout")}
        has = {factor: kind if factor in self.cue else value for factor, value in drawn.items()}
        depth = dice.roll(NEAREST, FARTHEST + 1)
        radius = max(1, min(size) * FOCUS * dice.roll(75, 111) // (depth * 100))
        row, column = _place(dice, _zone(has["layout"], self.classes, size), radius, size, others)
        return Thing(
            kind,
            has["colour"],
            has["texture"],
            has["shape"],
            row,
            column,
            radius,
            dice.roll(0, TURN),
            depth,
            rng.fold_in(key, "look"),
        )

    @cached_property
    def _ladder(self) -> list[int]:
        """The running sums of how often each class is drawn: ratio^(1 - k/(classes - 1)), by an exact integer root."""
        root = self.classes - 1
        shares = []
        for kind in range(self.classes):
            power = self.imbalance ** (root - kind) << (10 * root)
            shares.append(bisect_right(range(1000 << 10), power, key=lambda share: share**root) - 1)
        return np.cumsum(shares).tolist()


# ---- where things are ----


def _zone(number: int, count: int, size: tuple[int, int]) -> tuple[range, range]:
    """The rows and columns of one of `count` cells."""
    first = count if count <= 3 else (count + 1) // 2  # cells in the first row
    line, place, places = (0, number, first) if number < first else (1, number - first, count - first)
    lines = 1 if first == count else 2
    long, short = max(size), min(size)
    along = range(long * place // places, long * (place + 1) // places)
    across = range(short * line // lines, short * (line + 1) // lines)
    return (across, along) if size[0] <= size[1] else (along, across)


def _place(
    dice: Dice, zone: tuple[range, range], radius: int, size: tuple[int, int], others: Sequence[Thing]
) -> tuple[int, int]:
    """A centre in the zone, away from the border by the radius where there is room, and from the other objects."""
    rows, columns = (_inner(span, radius, side) for span, side in zip(zone, size, strict=True))
    places = [(dice.roll(*rows), dice.roll(*columns)) for _ in range(CANDIDATES)]
    return max(places, key=lambda place: min((_gap(*place, radius, other) for other in others), default=0))


def _inner(span: range, radius: int, side: int) -> tuple[int, int]:
    low, high = max(span.start, radius), min(span.stop, side - radius)
    if low < high:
        return low, high
    middle = min((span.start + span.stop) // 2, side - 1)
    return middle, middle + 1


def _gap(row: int, column: int, radius: int, other: Thing) -> int:
    """How far two objects are apart, in squared sums of their radii (of 1024)."""
    squared = (row - other.row) ** 2 + (column - other.column) ** 2
    return squared * 1024 // (radius + other.radius) ** 2


# ---- outlines ----


def silhouette(thing: Thing) -> np.ndarray:
    """An object's outline filled with 255, `(2 * radius + 3,) * 2` uint8 around its centre, whole and unhidden."""
    outlines = _outlines(SHAPES[thing.shape], Dice(rng.fold_in(thing.key, "outline")))
    return filled(outlines, thing.radius, thing.turn)


def _outlines(shape: str, dice: Dice) -> list[list[tuple[int, int]]]:
    """Corners in 1/1024 of the radius; a second contour is a hole."""
    if shape == "disc":
        return [polar([900] * 64)]
    if shape == "ring":
        return [polar([960] * 64), polar([dice.roll(480, 600)] * 64)]
    if shape == "triangle":
        return [polar([1024] * 3)]
    if shape == "rectangle":
        half = dice.roll(420, 560)
        return [[(-880, -half), (880, -half), (880, half), (-880, half)]]
    if shape == "star":
        return [polar([1024, dice.roll(400, 480)] * 5)]
    if shape == "cross":
        arm = dice.roll(230, 300)
        quarter = [(arm, 980), (arm, arm), (980, arm)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(y, -x) for x, y in quarter]
        return [corners]
    if shape == "ellipse":
        half = dice.roll(420, 560)
        return [[(x, y * half // UNIT) for x, y in polar([1024] * 64)]]
    lobes, phase = dice.roll(3, 6), dice.roll(0, TURN)
    waves = [int(SINE[(step * lobes * TURN // 64 + phase) % TURN]) for step in range(64)]
    return [polar([780 + (wave * 240 >> 14) for wave in waves])]


# ---- colour and texture ----


def _wall(key: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Two dull colours that run into each other, with a faint texture, `(H, W, 3)` uint8."""
    dice = Dice(key)
    light = dice.roll(80, 170)
    colours = []
    for change in (-1, 1):
        grey = light + change * dice.roll(8, 26)
        colours.append([grey + dice.roll(-14, 15) for _ in range(3)])
    mottled = noise(rng.fold_in(key, "mottled"), size, max(2, min(size) // 4), octaves=5)
    y, x = np.ogrid[: size[0], : size[1]]
    texture = _turned(dice.pick(TEXTURES), x, y, dice, min(size), rng.fold_in(key, "texture"))
    mixed = np.clip(mottled + (texture * dice.roll(12, 40) >> 7), 0, 255)
    levels = np.arange(256, dtype=np.int32)[:, None]
    table = ((255 - levels) * np.array(colours[0]) + levels * np.array(colours[1])) // 255
    return table.astype(np.uint8)[mixed]


def _surface(thing: Thing, lamp: int, size: tuple[int, int]) -> np.ndarray:
    """The object's card as large as its silhouette, uint8: its colour, its texture, and shade away from the lamp."""
    dice = Dice(thing.key)
    bright = dice.roll(84, 116)
    colour = [bright * level // 100 + dice.roll(-12, 13) for level in list(COLOURS.values())[thing.colour]]
    span = np.arange(-thing.radius - 1, thing.radius + 2, dtype=np.int32)
    x, y = span[None, :], span[:, None]
    texture = _turned(TEXTURES[thing.texture], x, y, dice, min(size), rng.fold_in(thing.key, "texture"))
    texture = texture - texture.sum() // texture.size  # no texture is brighter than another
    lamp_cos, lamp_sin = direction(lamp)
    shade = (x * lamp_cos + y * lamp_sin) * SHADE // (thing.radius << 14)
    factor = 256 + (texture * CONTRAST >> 7) + shade
    return np.clip(factor[..., None] * np.array(colour, dtype=np.int32) >> 8, 0, 255).astype(np.uint8)


def _turned(texture: str, x: np.ndarray, y: np.ndarray, dice: Dice, short: int, key: Tensor) -> np.ndarray:
    """A texture in any direction, its period 2.6 to 4.6 % of the picture's short side, at least 3 px."""
    cos, sin = direction(dice.roll(0, TURN))
    u, v = (x * cos + y * sin) >> (14 - SUBPIXEL), (y * cos - x * sin) >> (14 - SUBPIXEL)
    period = max(3 << SUBPIXEL, dice.roll(26, 46) * (short << SUBPIXEL) // 1000)
    phase = dice.roll(0, period)
    return _woven(texture, u + phase, v + phase, period, key)


def _woven(texture: str, u: np.ndarray, v: np.ndarray, period: int, key: Tensor) -> np.ndarray:
    """A texture's heights, -128 to 128, at coordinates in 1/16 px."""
    if texture == "plain":
        return np.zeros_like(u)
    if texture == "striped":
        return _steep(_wave(u, period))
    if texture == "checked":
        return _steep(_wave(u, period) * _wave(v, period) >> 6)
    if texture == "dotted":
        return _steep(_wave(u, period) + _wave(v, period) - 64)
    if texture == "zigzag":
        return _steep(_wave(u + (_wave(v, 2 * period) * period >> 8), period))
    if texture == "netted":
        return -_steep(np.maximum(_wave(u, period), _wave(v, period)) - 80)
    cell = max(1, period >> SUBPIXEL)
    if texture == "speckled":
        return np.clip((noise(key, u.shape, max(1, cell // 4)).astype(np.int32) - 128) * 2, -128, 128)
    mottled = noise(key, u.shape, cell, octaves=2).astype(np.int32) - 128
    return _wave(u + (mottled * period >> 6), 2 * period)


def _wave(along: np.ndarray, period: int) -> np.ndarray:
    """A sine of height 128."""
    return SINE[along * TURN // period % TURN] >> 7


def _steep(height: np.ndarray) -> np.ndarray:
    return np.clip(4 * height, -128, 128)


# ---- light and lens ----


def _cast(image: np.ndarray, mask: np.ndarray, thing: Thing, lamp: int) -> None:
    """Darken what lies behind an object, moved away from the lamp, with a soft edge."""
    cos, sin = direction(lamp)
    reach = max(1, thing.radius // 5)
    side = reach | 1
    # Not cv2.blur, which divides in floats where the box is large.
    soft = box(np.pad(mask, reach), side, side // 2) // side**2
    row, column = thing.row - (reach * sin >> 14), thing.column - (reach * cos >> 14)
    here, inside = window(soft, row, column, image.shape[:2])
    left = 256 - (soft[inside] * (256 - SHADOW) >> 8)
    image[here] = (image[here] * left[..., None] >> 8).astype(np.uint8)


def _lit(image: np.ndarray, key: Tensor, lamp: int, strength: float) -> np.ndarray:
    """Brighter towards the lamp and in patches: each pixel times 1 - strength to 1 + strength."""
    height, width = image.shape[:2]
    cos, sin = direction(lamp)
    x = np.arange(width, dtype=np.int64)[None, :] - width // 2  # 32 bits would overflow from 2,048 px on
    y = np.arange(height, dtype=np.int64)[:, None] - height // 2
    ramp = (x * cos + y * sin) * 128 // (max(height, width) << 13)  # -181 to 181 where the picture is square
    patches = noise(key, (height, width), max(2, min(height, width) // 2)).astype(np.int32) - 128
    field = np.clip((ramp * 3 + patches * 4) >> 2, -120, 120)
    gain = 128 + (field * round(strength * 256) >> 8)  # 8 to 248 of 128
    product = image * gain.astype(np.uint16)[..., None] >> 7
    return np.minimum(product, 255).astype(np.uint8)

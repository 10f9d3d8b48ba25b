"""Fronts of houses, and fences: textures painted in centimetres."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from ssl_seg.worlds.street.materials import BUILDING, FENCE, SIGN, Scale, rough, scatter, texels, times
from ssl_seg.worlds.street.perspective import CLEAR, Colour, Part, channels, pack, texture


class Front(NamedTuple):
    """The front of a house; lengths in cm."""

    width: int
    storeys: int
    storey: int  # height of one
    ground: int  # height of the ground floor
    wall: Colour
    trim: Colour
    base: Colour  # doors, shop fronts
    brick: bool
    bays: int
    pane: tuple[int, int]  # width and height of a window
    shop: bool
    sign: bool
    gable: int  # height of one that looks at the street, 0 for none
    seed: int
    lit: int  # per cent of the windows

    @property
    def eaves(self) -> int:
        return self.ground + (self.storeys - 1) * self.storey + 40

    @property
    def height(self) -> int:
        return self.eaves + self.gable


GLASS = ((40, 48, 58), (58, 68, 80), (30, 34, 40), (120, 132, 146), (26, 28, 34), (76, 86, 96), (150, 160, 172))
LIGHTS = ((236, 196, 120), (220, 170, 96))
CLOTH = ((150, 146, 136), (120, 112, 100), (96, 92, 92))
GOODS = ((150, 60, 50), (170, 160, 140), (60, 80, 120), (180, 140, 60), (90, 110, 90), (110, 90, 80), (200, 196, 190))


class _Sheet:
    """The part of a texture that is seen, painted in centimetres up from the pavement."""

    def __init__(
        self, width: int, height: int, scale: Scale, part: Part, colour: Colour, label: int = BUILDING
    ) -> None:
        self.across, self.up = scale
        self.rows, self.columns = texels(scale, width, height)
        self.top, self.left = part[0].start, part[1].start
        self.size = part[0].stop - self.top, part[1].stop - self.left
        self.packed = texture(self.size, pack(colour, label))

    def shows(self, left: int, low: int, right: int, high: int) -> bool:
        """Whether something of a box is seen."""
        return (
            left * self.across // 100 < self.left + self.size[1]
            and right * self.across // 100 >= self.left
            and self.rows - high * self.up // 100 < self.top + self.size[0]
            and self.rows - low * self.up // 100 >= self.top
        )

    def box(self, left: int, low: int, right: int, high: int, colour: Colour, label: int = BUILDING) -> None:
        first = left * self.across // 100 - self.left
        last = right * self.across // 100 - self.left
        top = self.rows - high * self.up // 100 - self.top
        foot = self.rows - low * self.up // 100 - self.top
        last = last if last > first else first + 1
        foot = foot if foot > top else top + 1
        if last <= 0 or foot <= 0:
            return
        red, green, blue = colour
        self.packed[top if top > 0 else 0 : foot, first if first > 0 else 0 : last] = (
            red | green << 8 | blue << 16 | label << 24
        )

    def roughen(self, kind: str, seed: int) -> None:
        lighter, darker = rough(kind)
        top, left = seed % 300 + self.top, seed * 7 % 300 + self.left
        part = (slice(top, top + self.size[0]), slice(left, left + self.size[1]))
        pixels = channels(self.packed)
        cv2.add(pixels, lighter[part], pixels)
        cv2.subtract(pixels, darker[part], pixels)


def front(spec: Front, scale: Scale, part: Part) -> np.ndarray:
    """Part of a house front as a texture."""
    sheet = _Sheet(spec.width, spec.height, scale, part, spec.wall)
    dark = times(spec.wall, 150)
    if sheet.up >= 8:
        sheet.roughen("brick" if spec.brick else "plaster", spec.seed)
    bytes_ = scatter()
    spot = spec.seed * 64 % (len(bytes_) - 512)
    bay = spec.width // spec.bays
    wide, high = min(spec.pane[0], bay * 4 // 5), spec.pane[1]
    for storey in range(1, spec.storeys):
        low = spec.ground + (storey - 1) * spec.storey + (spec.storey - high) * 2 // 3
        if storey == 1 or bytes_[spot] < 60:
            sheet.box(0, low - 70, spec.width, low - 58, times(spec.wall, 200 + bytes_[spot + 1] % 90))
        for number in range(spec.bays):
            spot += 1
            left = number * bay + (bay - wide) // 2
            _window(sheet, (left, low, left + wide, low + high), spec, bytes_[spot])
    sheet.box(0, spec.eaves - 40, spec.width, spec.eaves - 15, times(spec.trim, 210))
    sheet.box(0, spec.eaves - 52, spec.width, spec.eaves - 40, dark)
    if spec.gable > 250:
        middle = spec.width // 2
        _window(sheet, (middle - 40, spec.eaves, middle + 40, spec.eaves + 110), spec, bytes_[spot])
    if spec.shop:
        _shop(sheet, spec, bytes_[spot : spot + 128])
    else:
        _ground_floor(sheet, spec, bay, wide, bytes_[spot : spot + 128])
    sheet.box(0, 0, spec.width, 22, times(spec.wall, 130))
    sheet.box(0, 0, 9, spec.eaves, dark)  # where it meets its neighbour
    if spec.seed % 3 == 0:  # a drain pipe
        sheet.box(spec.width - 24, 0, spec.width - 13, spec.eaves - 40, (52, 52, 54))
    if spec.seed % 4 == 1 and not spec.shop:  # painted below
        sheet.box(0, 22, spec.width, 60, times(spec.wall, 196))
    if spec.gable:
        _cut_gable(sheet, spec)
    return sheet.packed


def _window(sheet: _Sheet, box: tuple[int, int, int, int], spec: Front, luck: int) -> None:
    left, low, right, high = box
    if not sheet.shows(left - 9, low - 16, right + 9, high + 16):
        return
    if sheet.up < 9:
        sheet.box(left, low, right, high, spec.trim)
        sheet.box(
            left + 12,
            low + 12,
            right - 12,
            high - 12,
            _glass(spec, luck),
        )
        return
    sheet.box(left - 9, low - 16, right + 9, low - 4, times(spec.trim, 230))
    sheet.box(left - 7, high, right + 7, high + 16, times(spec.wall, 215 if luck % 2 else 290))
    sheet.box(left, low - 4, right, high, spec.trim)
    glass = _glass(spec, luck)
    edge = 9
    sheet.box(left + edge, low + 3, right - edge, high - edge, glass)
    sheet.box(left + edge, high - edge - 12, right - edge, high - edge, times(glass, 130))
    if luck % 5 == 0:
        cloth = CLOTH[luck % 3]
        sheet.box(left + edge, (low + high) // 2, right - edge, high - edge, cloth)
    elif luck % 5 == 1:
        cloth = CLOTH[luck % 3]
        fold = (right - left) // 4
        sheet.box(left + edge, low + 3, left + fold, high - edge, cloth)
        sheet.box(right - fold, low + 3, right - edge, high - edge, cloth)
    middle = (low + high) // 2
    sheet.box(left, middle - 3, right, middle + 3, spec.trim)
    if right - left > 90:
        centre = (left + right) // 2
        sheet.box(centre - 3, low, centre + 3, high, spec.trim)


def _glass(spec: Front, luck: int) -> Colour:
    """What is seen in a window: a light, or the sky and the dark of a room."""
    return LIGHTS[luck % len(LIGHTS)] if luck * 100 >> 8 < spec.lit else GLASS[luck * 3 % len(GLASS)]


def _shop(sheet: _Sheet, spec: Front, luck: bytes) -> None:
    base, width, fascia = spec.base, spec.width, spec.ground - 75
    sheet.box(0, 0, width, spec.ground, times(base, 190))
    sheet.box(20, 48, width - 20, fascia - 8, (34, 38, 42))
    at = 30 if sheet.across > 6 else width
    for value in luck[:24]:  # what stands in the window
        wide = 20 + value % 60
        if at + wide > width - 30:
            break
        if value % 3:
            colour = times(GOODS[value % len(GOODS)], 120 + value // 2)
            sheet.box(at, 60 + value % 40, at + wide, 110 + value % 110, colour)
        at += wide + value % 17
    sheet.box(20, fascia - 40, width - 20, fascia - 8, (62, 66, 70))
    for post in range(width // 3, width - 60, width // 3):
        sheet.box(post - 5, 40, post + 5, fascia, times(base, 220))
    door = width // 3 if luck[30] % 2 else width - 160
    sheet.box(door + 10, 0, door + 100, fascia - 10, (26, 28, 30))
    sheet.box(door + 16, 8, door + 94, fascia - 40, (46, 52, 56))
    label = SIGN if spec.sign else BUILDING
    sheet.box(15, fascia, width - 15, spec.ground - 12, base, label)
    sheet.box(0, spec.ground - 12, width, spec.ground, times(spec.trim, 220))
    ink = (226, 222, 210) if sum(base) < 420 else (50, 44, 50)
    at = 40 + luck[31] % 60 if sheet.across > 6 else width
    end = width - 50 - luck[32]
    for value in luck[33:60]:
        wide = 14 + value % 14
        if at + wide > end:
            break
        if value % 6:
            sheet.box(at, fascia + 16, at + wide, spec.ground - 30 + value % 5, ink, label)
            sheet.box(at + 5, fascia + 22, at + wide - 5, spec.ground - 40, base, label)
        at += wide + 7


def _ground_floor(sheet: _Sheet, spec: Front, bay: int, wide: int, luck: bytes) -> None:
    doors = luck[0] % spec.bays
    for number in range(spec.bays):
        left = number * bay + (bay - wide) // 2
        if number == doors:
            left = number * bay + (bay - 100) // 2
            sheet.box(left - 14, 0, left + 114, 236, spec.trim)
            sheet.box(left, 0, left + 100, 224, times(spec.base, 220))
            sheet.box(left, 196, left + 100, 224, (40, 44, 48))
            sheet.box(left + 16, 110, left + 84, 180, times(spec.base, 170))
            sheet.box(left + 16, 20, left + 84, 92, times(spec.base, 180))
            sheet.box(left - 20, 0, left + 120, 12, (120, 118, 114))
        else:
            _window(sheet, (left, 95, left + wide, min(spec.ground - 60, 95 + spec.pane[1])), spec, luck[number + 1])


def _cut_gable(sheet: _Sheet, spec: Front) -> None:
    rows = spec.gable * sheet.up // 100
    half = sheet.columns // 2
    reach = np.arange(sheet.top, rows)[:, None] * half // max(1, rows)
    away = np.abs(np.arange(sheet.left, sheet.left + sheet.size[1]) - half)[None]
    above = sheet.packed[: len(reach)]
    above[away > reach[: len(above)]] = CLEAR


def railing(width: int, height: int, scale: Scale, colour: Colour, kind: str, part: Part) -> np.ndarray:
    """Part of a fence as a texture: bars with gaps between, boards, or a wall of bricks."""
    label = BUILDING if kind == "bricks" else FENCE
    sheet = _Sheet(width, height, scale, part, colour, label)
    dark = times(colour, 170)
    if kind == "bars":
        sheet.packed[:] = CLEAR
        gap = 14 if sheet.across > 12 else 30
        for left in range(0, width, gap):
            sheet.box(left, 0, left + 4, height, colour, label)
        for low in (8, height - 10):
            sheet.box(0, low, width, low + 6, colour, label)
        for left in range(0, width, 200):
            sheet.box(left, 0, left + 8, height, dark, label)
    elif kind == "boards":
        for number, left in enumerate(range(0, width, 16)):
            board = times(colour, 215 + number * 37 % 60)
            sheet.box(left, 0, left + 15, height - number * 5 % 4, board, label)
            sheet.box(left + 14, 0, left + 16, height, dark, label)
        sheet.box(0, height - 30, width, height - 22, dark, label)
        sheet.roughen("plaster", 31)
    else:
        sheet.box(0, height - 12, width, height, times(colour, 290), label)
        sheet.box(0, height - 15, width, height - 12, dark, label)
        sheet.roughen("brick", 77)
    return sheet.packed

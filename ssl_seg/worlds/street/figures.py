"""Figures that face the camera: people, bicycles, lamps and signs, as flat polygons in centimetres."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np

from ssl_seg.worlds.street.materials import Air, disc, sine
from ssl_seg.worlds.street.perspective import Colour

Shapes = list[tuple[list[np.ndarray], Colour]]


@lru_cache(maxsize=1 << 12)
def limb(x: int, y: int, end_x: int, end_y: int, width: int, end_width: int | None = None) -> np.ndarray:
    """A straight piece between two places, `width` thick."""
    across_x, across_y = y - end_y, end_x - x
    length = max(1, isqrt(across_x * across_x + across_y * across_y))
    corners = []
    for place_x, place_y, thick in ((x, y, width), (end_x, end_y, width if end_width is None else end_width)):
        corners.append((place_x, place_y, across_x * thick // (2 * length), across_y * thick // (2 * length)))
    (a, b, c, d), (e, f, g, h) = corners
    outline = np.array([(a + c, b + d), (e + g, f + h), (e - g, f - h), (a - c, b - d)])
    outline.setflags(write=False)
    return outline


COATS = (
    (34, 36, 44),
    (24, 24, 27),
    (58, 48, 44),
    (40, 50, 72),
    (92, 34, 36),
    (70, 74, 80),
    (120, 116, 108),
    (48, 60, 50),
)
TROUSERS = ((30, 32, 40), (24, 24, 26), (46, 54, 76), (66, 60, 54), (40, 38, 38))
SKINS = ((206, 164, 140), (188, 142, 118), (120, 84, 64), (220, 182, 160))
HAIRS = ((40, 30, 24), (24, 20, 20), (96, 72, 46), (120, 116, 112), (70, 46, 32))


def _clothes(seed: int) -> tuple[Colour, Colour, Colour, Colour]:
    coat, legs = COATS[seed % len(COATS)], TROUSERS[seed // 8 % len(TROUSERS)]
    return coat, legs, SKINS[seed // 40 % len(SKINS)], HAIRS[seed // 160 % len(HAIRS)]


def _darker(colour: Colour) -> Colour:
    return colour[0] * 3 // 4, colour[1] * 3 // 4, colour[2] * 3 // 4


def person(seed: int, phase: int, sideways: bool) -> Shapes:
    """Somebody 1.7 m tall who walks; `phase` counts 64 to two steps."""
    coat, legs, skin, hair = _clothes(seed)
    swing = 26 * sine(phase) >> 10
    long = 62 if seed % 5 == 0 else 84  # the hem of the coat
    shapes: Shapes = []
    if sideways:
        knee = abs(swing) // 3
        shapes.append(
            (
                [limb(-2, 90, swing // 2 + knee, 48, 17, 14), limb(swing // 2 + knee, 50, swing, 6, 14, 10)],
                _darker(legs),
            )
        )
        shapes.append(
            ([limb(2, 90, knee - swing // 2, 48, 18, 14), limb(knee - swing // 2, 50, -swing, 6, 14, 10)], legs)
        )
        shapes.append(([limb(swing - 5, 4, swing + 14, 3, 8), limb(-swing - 5, 4, 14 - swing, 3, 8)], (22, 20, 20)))
        shapes.append(([np.array([(-13, 142), (10, 144), (15, 120), (13, long), (-14, long), (-16, 115)])], coat))
        shapes.append(
            ([limb(-2, 138, -swing * 2 // 3, 108, 11), limb(-swing * 2 // 3, 110, 6 - swing, 88, 10)], _darker(coat))
        )
        shapes.append(([disc(3, 158, 9, 12, 12)], skin))
        shapes.append(([np.array([(-8, 152), (-8, 166), (-2, 172), (9, 170), (10, 164), (2, 162), (-1, 152)])], hair))
        if seed % 3 == 0:
            shapes.append(([np.array([(-30, 138), (-13, 140), (-13, 104), (-28, 106)])], (44, 40, 40)))
    else:
        lift = swing // 4
        shapes.append(([limb(-8, 92, -10, 6 + max(0, lift), 17, 12)], legs))
        shapes.append(([limb(8, 92, 10, 6 + max(0, -lift), 17, 12)], _darker(legs)))
        shapes.append(([limb(-14, 4 + max(0, lift), -4, 4 + max(0, lift), 8), limb(5, 4, 15, 4, 8)], (22, 20, 20)))
        shapes.append(([np.array([(-22, 138), (-10, 145), (10, 145), (22, 138), (19, long), (-19, long)])], coat))
        shapes.append(([limb(-23, 136, -27 + lift, 86, 11, 9), limb(23, 136, 27 + lift, 86, 11, 9)], _darker(coat)))
        shapes.append(([disc(0, 158, 9, 12, 12)], skin if seed % 2 else hair))
        shapes.append(([np.array([(-10, 158), (-9, 168), (0, 173), (9, 168), (10, 158), (5, 166), (-5, 166)])], hair))
        if seed % 4 == 1:
            shapes.append(([np.array([(26, 92), (40, 92), (42, 60), (24, 60)])], (90, 70, 50)))
    return shapes


def bicyclist(seed: int, phase: int, sideways: bool) -> Shapes:
    """Somebody on a bicycle."""
    coat, legs, skin, hair = _clothes(seed)
    frame = ((60, 62, 66), (120, 30, 30), (30, 50, 90), (36, 36, 38))[seed % 4]
    shapes: Shapes = []
    if sideways:
        for hub in (-52, 52):
            shapes.append(([disc(hub, 34, 34), disc(hub, 34, 29)], (24, 24, 25)))
        pedal_x, pedal_y = 17 * sine(phase + 16) >> 10, 30 + (17 * sine(phase) >> 10)
        shapes.append(
            (
                [
                    limb(-12, 96, -4 - pedal_x, 66 - pedal_y // 4, 16, 13),
                    limb(-4 - pedal_x, 66 - pedal_y // 4, -pedal_x, 62 - pedal_y, 13, 10),
                ],
                _darker(legs),
            )
        )
        tubes = [
            (-52, 34, -18, 86),
            (-18, 86, 0, 32),
            (-52, 34, 0, 32),
            (0, 32, 36, 80),
            (-18, 80, 36, 84),
            (36, 92, 52, 34),
            (36, 92, 44, 104),
            (-28, 92, -8, 92),
        ]
        shapes += [([limb(*tube, 5)], frame) for tube in tubes]
        shapes.append(
            (
                [
                    limb(-10, 96, 14 + pedal_x // 2, 70 + pedal_y // 6, 18, 14),
                    limb(14 + pedal_x // 2, 72 + pedal_y // 6, pedal_x, pedal_y, 14, 10),
                ],
                legs,
            )
        )
        shapes.append(([limb(pedal_x - 6, pedal_y - 4, pedal_x + 14, pedal_y - 4, 8)], (22, 20, 20)))
        shapes.append(([np.array([(-24, 92), (-22, 112), (4, 146), (20, 144), (18, 124), (2, 92)])], coat))
        shapes.append(([limb(14, 138, 28, 116, 11), limb(28, 117, 44, 106, 9)], _darker(coat)))
        shapes.append(([disc(24, 160, 9, 12, 12)], skin))
        shapes.append(
            (
                [np.array([(14, 160), (14, 170), (24, 175), (34, 170), (35, 166), (22, 165)])],
                hair if seed % 2 else (170, 168, 160),
            )
        )
    else:
        shapes.append(([disc(0, 34, 4, 34)], (24, 24, 25)))
        up = 14 * sine(phase) >> 10
        shapes.append(([limb(-9, 96, -12, 60 + up, 17, 14), limb(-12, 62 + up, -11, 30 + up, 14, 11)], legs))
        shapes.append(([limb(9, 96, 12, 60 - up, 17, 14), limb(12, 62 - up, 11, 30 - up, 14, 11)], _darker(legs)))
        shapes.append(([limb(-14, 28 + up, -6, 28 + up, 9), limb(6, 28 - up, 14, 28 - up, 9)], (22, 20, 20)))
        shapes.append(([limb(-28, 106, 28, 106, 5)], frame))
        shapes.append(([np.array([(-21, 142), (-9, 149), (9, 149), (21, 142), (17, 90), (-17, 90)])], coat))
        shapes.append(([limb(-21, 140, -29, 108, 11), limb(21, 140, 29, 108, 11)], _darker(coat)))
        shapes.append(([disc(0, 162, 9, 12, 12)], skin if seed % 3 else hair))
        shapes.append(
            ([np.array([(-10, 163), (-9, 172), (0, 177), (9, 172), (10, 163)])], hair if seed % 2 else (170, 168, 160))
        )
    return shapes


def grown(shapes: Shapes, share: int) -> Shapes:
    """Larger or smaller, `share` of 256, and mirrored where it is negative."""
    scale = np.array([share, abs(share)])
    return [([outline * scale >> 8 for outline in outlines], colour) for outlines, colour in shapes]


def toned(shapes: Shapes, air: Air, away: int) -> Shapes:
    return [(outlines, air.tone(colour, air.front, away)) for outlines, colour in shapes]


def box(left: int, low: int, right: int, high: int) -> np.ndarray:
    return np.array([(left, low), (right, low), (right, high), (left, high)])


def lamp(height: int, arm: int, colour: Colour, lit: bool) -> tuple[Shapes, Shapes]:
    """A street lamp: its post, and its head, which may shine; `arm` reaches to that side."""
    post: Shapes = [
        ([np.array([(-8, 0), (8, 0), (5, height), (-5, height)])], colour),
        ([box(-11, 0, 11, 110)], colour),
    ]
    if arm:
        post.append(([limb(0, height - 4, arm, height + 24, 8)], colour))
        head = [
            np.array(
                [(arm - 30, height + 18), (arm + 30, height + 22), (arm + 26, height + 34), (arm - 26, height + 32)]
            )
        ]
    else:
        head = [np.array([(-14, height), (14, height), (22, height + 45), (-22, height + 45)])]
    return post, [(head, (255, 226, 160) if lit else (176, 178, 176))]


SIGNS = ("limit", "ban", "warning", "order", "board", "direction", "stop", "plate")


def sign(kind: str, seed: int) -> Shapes:
    """A traffic sign about its middle."""
    white, red, blue, ink = (208, 208, 204), (158, 36, 38), (34, 66, 138), (30, 30, 32)
    if kind == "limit":
        return [([disc(0, 0, 33)], red), ([disc(0, 0, 25)], white), ([box(-13, -11, -3, 11), box(3, -11, 13, 11)], ink)]
    if kind == "ban":
        return [([disc(0, 0, 33)], red), ([box(-23, -7, 23, 7)], white)]
    if kind == "warning":
        outer, inner = np.array([(-38, -30), (38, -30), (0, 38)]), np.array([(-25, -22), (25, -22), (0, 22)])
        return [([outer], red), ([inner], white), ([box(-3, -16, 3, 8)], ink)]
    if kind == "order":
        return [([disc(0, 0, 33)], blue), ([limb(-14, 14, 12, -14, 9)], white)]
    if kind == "stop":
        return [([disc(0, 0, 38, corners=8)], red), ([box(-25, -8, 25, 8)], white)]
    if kind == "direction":
        colour = ((26, 84, 62), blue, white)[seed % 3]
        text = ink if colour == white else white
        lines = [box(-80, 20 - 26 * row, 10 + seed * (row + 3) % 60, 34 - 26 * row) for row in range(3)]
        return [([box(-100, -55, 100, 55)], white), ([box(-95, -50, 95, 50)], colour), (lines, text)]
    if kind == "board":
        colour = ((196, 176, 60), (40, 74, 140), (150, 44, 40), (206, 204, 196))[seed % 4]
        text = white if sum(colour) < 420 else ink
        lines = [box(-34, 40 - 22 * row, 6 + seed * (row + 5) % 30, 50 - 22 * row) for row in range(5)]
        return [([box(-44, -75, 44, 70)], colour), (lines, text)]
    return [
        ([box(-26, -32, 26, 32)], (blue, white, (200, 180, 60))[seed % 3]),
        ([box(-10, -18, 10, 18)], (white, ink, ink)[seed % 3]),
    ]


def traffic_light(state: int) -> Shapes:
    """Three lamps about their middle: red, red and amber, green, amber."""
    on = ((0,), (0, 1), (2,), (1,))[state % 4]
    bright, dim = ((255, 60, 40), (255, 180, 50), (60, 240, 150)), ((52, 20, 18), (50, 40, 18), (16, 44, 32))
    shapes: Shapes = [([box(-24, -58, 24, 58)], (196, 196, 192)), ([box(-21, -55, 21, 55)], (20, 20, 22))]
    for number in range(3):
        colour = bright[number] if number in on else dim[number]
        shapes.append(([disc(0, 34 - 34 * number, 12, corners=16)], colour))
    return shapes

"""Cars, vans, lorries and buses as solids with painted parts, in centimetres."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

from ssl_seg.worlds.street.materials import Air, disc
from ssl_seg.worlds.street.perspective import Colour, Solid

Place = tuple[int, int]  # (along, up)


class Vehicle:
    """A body between its two sides; +s is the front."""

    def __init__(self, half: int, body: Sequence[Place], cabin: Sequence[Place], inset: int) -> None:
        """`body` and `cabin` are outlines of the side, rear foot first and front foot last; a box has no cabin."""
        self.half = half
        self.points: list[tuple[int, int, int]] = []
        self.faces: list[tuple[list[int], str, int]] = []
        rear, front = body[0][0], body[-1][0]
        self.length = front - rear
        low, behind, before = body[0][1], max(along for along, _ in body[:3]), min(along for along, _ in body[-3:])
        self.cores = [(half, low, min(up for _, up in body[2:-2]), behind, before)]
        if cabin:
            (start, up), (stop, end_up) = cabin[1:3]
            self.cores.append((half - inset, low, min(up, end_up), start, stop))
        else:
            self.cores.append((half, low, min(up for _, up in body[2:4]), behind, body[3][0]))
        self.top = max(up for _, up in (*body, *cabin))
        for end in (rear + 45, front - 45):  # tyres and the dark under the car, as seen from its ends
            for side in (-1, 1):
                self.add(
                    [(side * x, y, end) for x, y in ((half, 0), (half - 20, 0), (half - 20, 40), (half, 40))], "tyre"
                )
            self.add(
                [(-half + 20, 16, end), (half - 20, 16, end), (half - 20, 40, end), (-half + 20, 40, end)], "under"
            )
        self._hull(body, [half] * len(body), "body", 55)
        wheel = min(34, half * 2 // 5)
        shoulder = min(up for _, up in body[2:-2]) - 8
        for side in (-1, 1):
            for low, high, part in ((shoulder - 7, shoulder, "shine"), (shoulder - 26, shoulder - 22, "sill")):
                strip = [(rear + 12, low), (front - 30, low), (front - 34, high), (rear + 12, high)]
                self.add([(side * (half + 1), up, along) for along, up in strip], part)
            for along in (rear * 2 // 5, front * 3 // 10):
                gap = [(along, 34), (along + 3, 34), (along + 3, shoulder + 8), (along, shoulder + 8)]
                self.add([(side * (half + 1), up, place) for place, up in gap], "sill")
        for end in (rear - 9, front + 5):  # bumpers
            self.add([(-half + 4, 40, end), (half - 4, 40, end), (half - 4, 52, end), (-half + 4, 52, end)], "sill")
        for side in (-1, 1):
            sill = [
                (side * (half + 1), up, along)
                for along, up in ((rear + 4, 30), (front - 4, 30), (front - 6, 50), (rear + 6, 50))
            ]
            self.add(sill, "sill")
            for along in (rear + 75, front - 80):
                for radius, part in ((wheel + 5, "under"), (wheel, "tyre"), (wheel * 6 // 10, "hub")):
                    ring = disc(along, wheel, radius, corners=16 if radius > 25 else 8)
                    self.add([(side * (half + 2), up, place) for place, up in ring.tolist()], part)
        if cabin:
            halves = [half - 6, half - inset, half - inset, half - 6]
            self._hull(cabin, halves, "body", 90)
            self._windows(cabin, halves)

    def add(self, corners: Sequence[tuple[int, int, int]], part: str, middle: int = 60) -> None:
        start = len(self.points)
        self.points += corners
        self.faces.append((list(range(start, start + len(corners))), part, middle))

    def _hull(self, outline: Sequence[Place], halves: Sequence[int], part: str, middle: int) -> None:
        ends = [(along, up, half) for (along, up), half in zip(outline, halves, strict=True)]
        for (s, y, half), (next_s, next_y, next_half) in pairwise(ends):
            self.add(
                [(-half, y, s), (half, y, s), (next_half, next_y, next_s), (-next_half, next_y, next_s)], part, middle
            )
        for side in (-1, 1):
            self.add([(side * half, y, s) for s, y, half in ends], part, middle)

    def _windows(self, cabin: Sequence[Place], halves: Sequence[int]) -> None:
        corners = [(along, up, half) for (along, up), half in zip(cabin, halves, strict=True)]
        rear, back, top, front = corners
        for low, high, beyond in ((rear, back, -1), (front, top, 1)):  # rear window, windscreen
            quad = []
            for side, share in ((-1, 120), (1, 120), (1, 900), (-1, 900)):
                s, y, half = (a + (b - a) * share // 1000 for a, b in zip(low, high, strict=True))
                quad.append((side * (half - 9), y, s + beyond))
            self.add(quad, "glass", 90)
            (left, foot, place), (right, _, _), _, (high_left, high, high_place) = quad
            gleam = [
                quad[0],
                ((left * 2 + right) // 3, foot, place),
                ((high_left + right) // 2, high, high_place),
                quad[3],
            ]
            self.add(gleam, "gleam", 90)
        for side in (-1, 1):
            for first, last in ((60, 470), (510, 950)):
                quad = []
                for along, share in ((first, 130), (last, 130), (last, 870), (first, 870)):
                    low, high = _between(rear, front, along), _between(back, top, along)
                    s, y, half = _between(low, high, share)
                    quad.append((side * (half + 1), y, s))
                self.add(quad, "glass", 90)

    def lights(self, rear: int, front: int, low: int, high: int, wide: int = 34) -> None:
        half = self.half
        for end, part in ((rear, "tail"), (front, "lamp")):
            for side in (-1, 1):
                self.add(
                    [
                        (side * x, y, end)
                        for x, y in ((half - 4, low), (half - wide, low), (half - wide, high), (half - 4, high))
                    ],
                    part,
                )
        plate = (low + 30) // 2
        for end in (rear, front):
            self.add(
                [(-26, plate - 6, end), (26, plate - 6, end), (26, plate + 6, end), (-26, plate + 6, end)], "plate"
            )
        self.add([(2 * x, y, front) for x, y in ((-24, low), (24, low), (22, high - 4), (-22, high - 4))], "under")


def _between(a: Sequence[int], b: Sequence[int], share: int) -> tuple[int, ...]:
    return tuple(x + (y - x) * share // 1000 for x, y in zip(a, b, strict=True))


VEHICLES = ("hatch", "saloon", "estate", "tall", "van", "truck", "bus")


class Model(NamedTuple):
    """A kind of vehicle."""

    body: Solid
    half: int  # of its width
    reach: int  # half its length
    top: int  # height
    cores: list[tuple[int, int, int, int, int]]  # boxes within it: half the width, y from and to, along from and to


@lru_cache(maxsize=len(VEHICLES))
def vehicle(kind: str) -> Model:
    if kind == "hatch":
        body = [(-190, 28), (-197, 60), (-190, 96), (92, 98), (178, 84), (197, 64), (194, 28)]
        made = Vehicle(84, body, [(-190, 94), (-140, 146), (5, 148), (98, 96)], 22)
        made.lights(-199, 199, 60, 82)
    elif kind == "saloon":
        body = [(-225, 28), (-232, 62), (-226, 98), (-140, 100), (95, 96), (205, 82), (226, 62), (223, 28)]
        made = Vehicle(88, body, [(-160, 97), (-95, 142), (20, 144), (105, 94)], 24)
        made.lights(-234, 228, 66, 86)
    elif kind == "estate":
        body = [(-222, 28), (-230, 62), (-224, 98), (95, 97), (205, 83), (226, 63), (223, 28)]
        made = Vehicle(88, body, [(-222, 95), (-190, 146), (15, 148), (105, 95)], 22)
        made.lights(-232, 228, 62, 88)
    elif kind == "tall":
        body = [(-215, 38), (-222, 70), (-218, 112), (85, 116), (190, 106), (214, 80), (212, 38)]
        made = Vehicle(92, body, [(-214, 110), (-188, 178), (10, 182), (95, 114)], 18)
        made.lights(-224, 216, 76, 102)
    elif kind == "van":
        body = [(-240, 32), (-250, 60), (-248, 205), (90, 212), (165, 130), (232, 112), (246, 76), (244, 32)]
        made = Vehicle(98, body, [], 0)
        made.lights(-252, 248, 78, 106, 26)
        made.add([(-86, 204, 96), (86, 204, 96), (90, 134, 163), (-90, 134, 163)], "glass", 100)
        for side in (-1, 1):
            made.add([(side * 99, y, s) for s, y in ((45, 128), (140, 128), (88, 192), (45, 192))], "glass")
            made.add(
                [(side * -4, 120, -251), (side * -84, 120, -251), (side * -84, 185, -251), (side * -4, 185, -251)],
                "glass",
            )
    elif kind == "truck":
        body = [(-380, 45), (-384, 60), (-382, 330), (370, 330), (380, 300), (384, 45)]
        made = Vehicle(120, body, [], 0)
        made.lights(-386, 388, 70, 95, 30)
        made.add([(-104, 160, 386), (104, 160, 386), (100, 250, 386), (-100, 250, 386)], "glass", 120)
        for side in (-1, 1):
            made.add([(side * 121, y, s) for s, y in ((250, 150), (350, 150), (350, 235), (250, 235))], "glass")
    else:
        body = [(-520, 35), (-524, 60), (-515, 290), (515, 290), (524, 60), (520, 35)]
        made = Vehicle(125, body, [], 0)
        made.lights(-527, 527, 66, 96, 30)
        for end in (-526, 526):
            made.add([(-112, 130, end), (112, 130, end), (108, 262, end), (-108, 262, end)], "glass", 150)
        for side in (-1, 1):
            for first in range(-500, 480, 165):
                made.add(
                    [
                        (side * 126, y, s)
                        for s, y in ((first, 135), (first + 150, 135), (first + 150, 240), (first, 240))
                    ],
                    "glass",
                )
    return Model(Solid(made.points, made.faces), made.half, made.length // 2, made.top, made.cores)


@lru_cache(maxsize=1 << 10)
def fronts(kind: str, turn: tuple[int, int]) -> list[tuple[int, int, int, int, int]]:
    """Upright faces towards the camera that lie within a vehicle, about its place: x from and to, s, y from and to.

    `turn` is within two degrees of a quarter turn's multiples.
    """
    cosine, sine = turn
    found = []
    for half, low, high, rear, front in vehicle(kind).cores:
        ends = (rear, front) if cosine + sine > 0 else (-front, -rear)
        long = max(abs(rear), abs(front))
        # A turn brings the corners this much inwards, at most.
        if abs(cosine) > abs(sine):
            aside, ahead = long * abs(sine) // 1024 + 2, half * abs(sine) // 1024 + 2
            found.append((aside - half, half - aside, ends[0] + ahead, low, high))
        else:
            aside, ahead = half * abs(cosine) // 1024 + 2, long * abs(cosine) // 1024 + 2
            found.append((ends[0] + aside, ends[1] - aside, ahead - half, low, high))
    return found


PAINTS = (
    (150, 153, 156),
    (128, 132, 138),
    (34, 35, 38),
    (22, 23, 26),
    (44, 56, 92),
    (30, 42, 66),
    (112, 28, 30),
    (200, 201, 200),
    (92, 96, 100),
    (38, 58, 50),
    (120, 116, 104),
    (70, 84, 110),
)


def paint(colour: Colour, air: Air, away: int) -> Callable[[str, int], Colour | None]:
    """The colour of a vehicle's part on a side; what would be smaller than a pixel or two has none."""
    near = away < 6000
    lights = air.lights
    red, green, blue = colour
    body = {
        "body": colour,
        "glass": (46, 52, 60),
        "tyre": (20, 20, 21),
        "under": (15, 15, 16),
    }
    if near:
        body |= {
            "gleam": (86, 96, 108),
            "shine": (min(255, red * 11 // 8 + 16), min(255, green * 11 // 8 + 16), min(255, blue * 11 // 8 + 16)),
            "hub": (132, 134, 138),
            "plate": (205, 200, 170),
            "sill": (red * 5 // 8, green * 5 // 8, blue * 5 // 8),
        }
    if air.night:
        shining = {"lamp": (255, 248, 225), "tail": (255, 70, 50)}
    else:
        shining = {"lamp": air.tone((225, 228, 232), 240, away), "tail": air.tone((150, 26, 24), 256, away)}

    @cache
    def tone(part: str, side: int) -> Colour | None:
        if part in shining:
            return shining[part]
        return air.tone(body[part], lights[side], away) if part in body else None

    return tone

"""Things that are put up in a street: houses, hedges, trees, vehicles, people, lamps, signs, and their shadows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ssl_seg.worlds.drawing import Dice
from ssl_seg.worlds.street import facades, figures, materials, plants, vehicles
from ssl_seg.worlds.street.facades import Front
from ssl_seg.worlds.street.figures import Shapes
from ssl_seg.worlds.street.materials import BICYCLIST, BUILDING, CAR, FENCE, PEDESTRIAN, POLE, ROAD, SIGN, TREE
from ssl_seg.worlds.street.perspective import NEAR, PIXEL, SHIFT, Colour, Picture, Solid, channels
from ssl_seg.worlds.street.plan import BRICKS, FAR, SLATES, STONES, Plan

Ends = tuple[tuple[int, int], tuple[int, int]]
SECTIONS = (150, 250, 400, 650, 1000, 1500, 2200, 3200, 4600, 6500, 9000, 13000, 18000)


class Thing(NamedTuple):
    far: int
    number: int  # which was there first, for things equally far
    ends: Ends
    height: int
    cover: int
    paint: Callable[[], None]


class House(NamedTuple):
    side: int  # of the street: -1 left, 1 right
    x: int  # of the front
    back: int
    start: int
    end: int
    pitch: int  # height of the roof
    roof: Colour
    chimney: bool
    front: Front


class Scenery:
    """What is seen of a street, gathered first and then painted from far to near."""

    def __init__(self, picture: Picture, plan: Plan, frame: int) -> None:
        self.picture, self.plan, self.frame = picture, plan, frame
        self.air = plan.air
        self.here = picture.camera.at[2]
        self.things: list[Thing] = []
        self.ground: list[Callable[[], None]] = []
        self.shadows: list[np.ndarray] = []
        self.shades: list[np.ndarray] = []  # under cars, in any light

    def add(self, paint: Callable[[], None], ends: Ends, height: int, cover: int = 0) -> None:
        """Something upright on the ground between two places (x, s); up to `cover` nothing is seen through it."""
        far = max(ends[0][1], ends[1][1])
        if self.here + NEAR < far:
            self.things.append(Thing(far, len(self.things), ends, height, cover, paint))

    def stand(self, paint: Callable[[], None], x: int, s: int, half: int, height: int) -> None:
        self.add(paint, ((x - half, s), (x + half, s)), height)

    def away(self, s: int) -> int:
        return max(NEAR, s - self.here)

    def mark(self) -> Colour:
        """The colour of a line on the road."""
        worn = self.plan.marks
        red, green, blue = (grey + (226 - grey) * worn // 256 for grey in self.plan.asphalt)
        return red, green, blue

    def flat(self, outlines: Sequence[Sequence[tuple[int, int]]], colour: Colour, label: int) -> None:
        """Outlines (x, s) on the ground, all with as many corners."""
        points = np.array(outlines, dtype=np.int64)
        if points[..., 1].max() - self.here > NEAR:
            self.picture.polygons(
                np.stack([points[..., 0], np.zeros_like(points[..., 0]), points[..., 1]], axis=-1), colour, label
            )

    def band(self, left: int, right: int, start: int | None = None, end: int | None = None) -> list[tuple[int, int]]:
        """A strip along the street as an outline with enough corners to follow its bend."""
        first = self.here + NEAR if start is None else max(start, self.here + NEAR)
        last = self.here + FAR if end is None else min(end, self.here + FAR)
        places = [first, *(self.here + part for part in SECTIONS if first < self.here + part < last), last]
        return [*((left, s) for s in places), *((right, s) for s in reversed(places))]

    def patch(self, outline: list[tuple[int, int]], s: int, colour: Colour) -> None:
        """Something flat on the road, where it is near enough to be seen."""
        if -1000 < s - self.here < 6000:
            self.ground.append(partial(self.flat, [outline], self.air.tone(colour, self.air.top, self.away(s)), ROAD))

    def upright(self, x: int, height: int, s: int, shapes: Shapes, label: int) -> None:
        self.picture.flat((x, height, s), figures.toned(shapes, self.air, s - self.here), label)

    def house(self, side: int, line: int, start: int, end: int, front: Front, gable: bool, dice: Dice) -> None:
        """A house whose front is `line` from the street's middle; `gable` where its near end is to be seen."""
        depth, roof = dice.roll(700, 1100), dice.pick(SLATES)
        pitch = 0 if front.storeys > 3 else dice.roll(180, 340)
        house = House(side, side * line, side * (line + depth), start, end, pitch, roof, dice.chance(60), front)
        self.shadow_of_house(side, line, start, end, front.eaves + pitch // 2)
        if pitch:
            high = front.eaves + (front.gable or pitch) + 120
            self.add(partial(self._roof, house), ((house.x, start), (house.back, end)), high)
        if gable:
            peak = 0 if front.gable else pitch
            self.end_wall(house, front._replace(width=depth, gable=peak, bays=2, shop=False, seed=front.seed ^ 5))
        self.front_wall(side, house.x, start, end, front)

    def front_wall(self, side: int, x: int, start: int, end: int, front: Front) -> None:
        """A house front along the street."""
        ends = ((x, start), (x, end)) if side < 0 else ((x, end), (x, start))
        light = self.air.right if side < 0 else self.air.left
        self.add(partial(self.wall, ends, front, light), ends, front.height, front.eaves)

    def end_wall(self, house: House, front: Front) -> None:
        """A house's wall that looks towards the camera."""
        corner, back = (house.x, house.start), (house.back, house.start)
        ends = (back, corner) if house.side < 0 else (corner, back)
        if house.start > self.here + NEAR:
            self.add(partial(self.wall, ends, front, self.air.front), ends, front.height, front.eaves)

    def _roof(self, house: House) -> None:
        """Its slopes, which the walls painted afterwards cut off below, and a chimney."""
        air, away = self.air, self.away(house.start)
        side, x, back, start, end, pitch, colour, chimney, front = house
        eaves, lit = front.eaves, air.right if side < 0 else air.left
        middle, across = (x + back) // 2, (start + end) // 2
        if front.gable:  # the ridge runs away from the street
            peak = eaves + front.gable
            for s, light in ((start, (air.front + air.top) // 2), (end, air.front // 2)):
                slope = [(x, eaves, s), (x, peak, across), (back, peak, across), (back, eaves, s)]
                self.picture.polygons(np.array([slope]), air.tone(colour, light, away), BUILDING)
        else:
            peak = eaves + pitch
            slope = [(x, eaves, start), (x, eaves, end), (middle, peak, end), (middle, peak, start)]
            self.picture.polygons(np.array([slope]), air.tone(colour, (lit + air.top) // 2, away), BUILDING)
        if chimney and away < 9000:
            low, high, s = eaves + pitch - 60, eaves + pitch + 90, start + 70
            near, far = middle - 45 * side, middle + 45 * side
            flank = [(near, low, s), (near, low, s + 90), (near, high, s + 90), (near, high, s)]
            face = [(near, low, s), (far, low, s), (far, high, s), (near, high, s)]
            self.picture.polygons(np.array([flank]), air.tone(front.wall, lit, away), BUILDING)
            self.picture.polygons(np.array([face]), air.tone(front.wall, air.front * 7 // 8, away), BUILDING)

    def wall(self, ends: tuple[tuple[int, int], tuple[int, int]], front: Front, light: int) -> None:
        near, far = sorted((self.away(ends[0][1]), self.away(ends[1][1])))
        scale = self.scale(ends)
        (x, s), (end_x, end_s) = ends
        if scale[1] <= 4 and abs(end_s - s) > abs(end_x - x):  # a window is a pixel or less
            face = [(x, 0, s), (end_x, 0, end_s), (end_x, front.eaves, end_s), (x, front.eaves, s)]
            red, green, blue = front.wall
            plain = (red * 13 // 16, green * 13 // 16, blue * 13 // 16)
            self.picture.polygons(np.array([face]), self.air.tone(plain, light, (near + far) // 2), BUILDING)
            return
        tones = self.air.tones(light, (near + far) // 2)
        self.picture.wall(ends, (0, front.height), facades.front(front, scale), tones)

    def scale(self, ends: Ends) -> tuple[int, int]:
        """Pixels to the metre, across and up, that a wall's texture needs: no more than the picture can show."""
        camera = self.picture.camera
        near = max(300, min(self.away(ends[0][1]), self.away(ends[1][1])))
        far = max(self.away(ends[0][1]), self.away(ends[1][1]))
        near = max(near, far // 3)
        up = camera.focal * 105 // (near * PIXEL)
        aside, deep = abs(ends[0][0] - camera.at[0]), abs(ends[1][1] - ends[0][1])
        across = up if deep < abs(ends[1][0] - ends[0][0]) else up * min(near, aside * 5 // 4) // near
        return min(40, max(3, across)), min(40, max(3, up))

    def barrier(self, kind: str, x: int, start: int, end: int, dice: Dice) -> None:
        """A hedge, a fence or a garden wall along the street, in pieces that can be sorted."""
        if kind == "none" or end - start < 60:
            return
        height = {
            "hedge": dice.roll(90, 210),
            "bars": dice.roll(90, 150),
            "boards": dice.roll(120, 190),
            "bricks": dice.roll(60, 170),
        }[kind]
        colour = {
            "hedge": (0, 0, 0),
            "bars": dice.pick(((40, 42, 44), (84, 88, 90), (52, 66, 58), (150, 152, 152))),
            "boards": dice.pick(((112, 88, 62), (134, 116, 92), (88, 74, 60), (120, 112, 100))),
            "bricks": dice.pick(BRICKS + STONES),
        }[kind]
        seed = dice.roll(0, 90)
        for s in range(start, end, 1000):
            stop = min(end, s + 1000)
            self.add(partial(self._barrier, kind, x, s, stop, height, colour, seed), ((x, s), (x, stop)), height)
        self.shadow([(x, start), (x, end)], height)

    def _barrier(self, kind: str, x: int, start: int, end: int, height: int, colour: Colour, seed: int) -> None:
        away = self.away((start + end) // 2)
        light = self.air.right if x < 0 else self.air.left
        ends = ((x, start), (x, end))
        scale = self.scale(ends)
        if kind == "hedge":
            pixels = plants.hedge(end - start, height, scale, seed, self.greens(light, away))
            self.picture.wall(ends, (0, height), pixels)
            return
        pixels = facades.railing(end - start, height, scale, colour, kind)
        if kind == "bricks":
            channels(pixels)[..., 3] = BUILDING
        holes = FENCE if kind == "bars" else None
        self.picture.wall(ends, (0, height), pixels, self.air.tones(light, away), holes)

    def greens(self, light: int, away: int, colours: tuple[Colour, Colour] | None = None) -> np.ndarray:
        dark, bright = colours or self.plan.leaves
        return materials.ramp(self.air.tone(dark, light, away), self.air.tone(bright, light, away), TREE)

    def vehicle(self, kind: str, x: int, s: int, direction: int, dice: Dice) -> None:
        """`direction` counts 64 to a turn: 0 drives away from the camera, 16 to the right."""
        body, half, reach = vehicles.vehicle(kind)
        colour = dice.pick(vehicles.PAINTS)
        if kind in ("bus", "truck"):
            colour = dice.pick(((150, 40, 40), (176, 178, 176), (66, 96, 124), (196, 190, 170), (60, 90, 70)))
        slight = dice.roll(-24, 25)
        cosine, sine = materials.cosine(direction), materials.sine(direction)
        turn = (cosine - (sine * slight >> 10), sine + (cosine * slight >> 10))
        away = s - self.here
        if away < -reach or away > FAR:
            return
        wide, long = (half, reach) if cosine else (reach, half)
        ends = ((x - wide, s + long), (x + wide, max(self.here + NEAR, s - long)))
        if x < 0:
            ends = ((x - wide, max(self.here + NEAR, s - long)), (x + wide, s + long))
        self.add(partial(self._vehicle, (x, s), turn, body, colour), ends, 340)
        foot = [(x - wide, s - long), (x + wide, s - long), (x + wide, s + long), (x - wide, s + long)]
        self.shades.append(np.array([(a, 0, b) for a, b in foot]))
        self.shadow(foot, 110)

    def _vehicle(self, at: tuple[int, int], turn: tuple[int, int], body: Solid, colour: Colour) -> None:
        x, s = at
        self.picture.solid((x, 0, s), turn, body, vehicles.paint(colour, self.air, s - self.here), CAR)

    def somebody(self, x: int, s: int, across: bool, seed: int, size: int) -> None:
        away = s - self.here
        if not NEAR < away < 9000:
            return
        paint = partial(self._figure, figures.person, x, s, across, seed, 3, size, PEDESTRIAN)
        self.stand(paint, x, s, 45, 185 * size >> 8)
        self.post_shadow(x, s, 165 * size >> 8, 22)

    def rider(self, x: int, s: int, across: bool, seed: int, size: int) -> None:
        away = s - self.here
        if not NEAR < away < 9000:
            return
        paint = partial(self._figure, figures.bicyclist, x, s, across, seed, 4, size, BICYCLIST)
        self.stand(paint, x, s, 95, 190 * size >> 8)
        self.post_shadow(x, s, 165 * size >> 8, 30)

    def _figure(
        self,
        draw: Callable[[int, int, bool], Shapes],
        x: int,
        s: int,
        across: bool,
        seed: int,
        pace: int,
        size: int,
        label: int,
    ) -> None:
        shapes = draw(seed, seed + pace * self.frame, across)
        self.upright(x, 0, s, figures.grown(shapes, size if seed % 2 else -size), label)

    def lamp(self, x: int, s: int, height: int, arm: int, dice: Dice) -> None:
        colour = dice.pick(((92, 96, 98), (62, 70, 66), (44, 46, 48), (120, 122, 122)))
        reach = arm * dice.pick((0, 90, 140, 60))
        away = s - self.here
        if not NEAR < away < 12000:
            return
        self.stand(partial(self._lamp, x, s, height, reach, colour), x, s, 180, height + 50)
        self.post_shadow(x, s, height, 9)

    def _lamp(self, x: int, s: int, height: int, reach: int, colour: Colour) -> None:
        post, head = figures.lamp(height, reach, colour, self.air.night)
        self.upright(x, 0, s, post, POLE)
        if self.air.night:
            self.picture.flat((x, 0, s), head, POLE)
        else:
            self.upright(x, 0, s, head, POLE)

    def bollards(self, x: int, s: int, dice: Dice) -> None:
        colour = dice.pick(((40, 42, 44), (150, 150, 148), (96, 84, 60)))
        for number in range(dice.roll(2, 7)):
            place = s + number * 150
            away = place - self.here
            if NEAR < away < 5000:
                shapes: Shapes = [([figures.box(-7, 0, 7, 95)], colour)]
                self.stand(partial(self.upright, x, 0, place, shapes, POLE), x, place, 10, 95)
                self.post_shadow(x, place, 95, 7)

    def sign_post(self, x: int, s: int, dice: Dice) -> None:
        kind, seed = dice.pick(figures.SIGNS), dice.roll(0, 1 << 12)
        height = dice.roll(210, 290)
        back = dice.chance(25)
        away = s - self.here
        if not NEAR < away < 10000:
            return
        self.stand(partial(self._sign_post, x, s, kind, seed, height, back), x, s, 110, height + 110)
        self.post_shadow(x, s, height, 6)

    def _sign_post(self, x: int, s: int, kind: str, seed: int, height: int, back: bool) -> None:
        plate = figures.sign(kind, seed)
        if back:
            plate = [(plate[0][0], (112, 114, 114))]
        if seed % 4 == 0:
            below = figures.sign("plate", seed)
            plate = plate + [([outline - (0, 75) for outline in outlines], colour) for outlines, colour in below]
        posts = [figures.box(-4, 0, 4, height + 20)]
        if kind == "direction":
            posts = [figures.box(side * 70 - 4, 0, side * 70 + 4, height) for side in (-1, 1)]
        self.upright(x, 0, s, [(posts, (110, 112, 112))], POLE)
        self.upright(x, height, s, plate, SIGN)

    def signal(self, x: int, s: int, state: int, dice: Dice) -> None:
        height = dice.roll(270, 330)
        away = s - self.here
        if not NEAR < away < 10000:
            return
        self.stand(partial(self._signal, x, s, height, state), x, s, 40, height + 60)
        self.post_shadow(x, s, height, 8)

    def _signal(self, x: int, s: int, height: int, state: int) -> None:
        board, case, *lights = figures.traffic_light(state)
        self.upright(x, 0, s, [([figures.box(-6, 0, 6, height)], (70, 72, 72))], POLE)
        self.upright(x, height, s, [board, case], SIGN)
        self.picture.flat((x, height, s), lights, SIGN)

    def tree(self, x: int, s: int, height: int, species: tuple[str, int], dice: Dice) -> None:
        kind, number = species
        light = dice.roll(215, 280)
        tint = dice.roll(-10, 11)
        away = s - self.here
        if not NEAR * 3 < away < FAR:
            return
        self.stand(partial(self.paint_tree, x, s, height, kind, number, light, tint), x, s, height * 3 // 5, height)
        if self.plan.sun and kind != "bare":
            across, along = self.plan.sun
            up = height * 5 // 8
            middle_x, middle_s = x - (across * up >> 8), s - (along * up >> 8)
            ring = materials.disc(0, 0, height // 3).tolist()
            rough = materials.scatter()[number * 16 : number * 16 + 16]
            blob = [
                (middle_x + a * (140 + luck // 2) // 256, middle_s + b * (140 + luck // 2) // 256)
                for (a, b), luck in zip(ring, rough, strict=True)
            ]
            self.shadow(blob, 0)
        self.post_shadow(x, s, height // 2, height // 40)

    def paint_tree(self, x: int, s: int, height: int, kind: str, number: int, light: int, tint: int) -> None:
        picture, air = self.picture, self.air
        column, foot, away = picture.spot(x, 0, s)
        scale = picture.camera.focal
        tall = height * scale // away
        light = light * (air.left + air.right + air.top + air.front) // 4 >> 8
        if kind == "bare":
            bark = self.plan.bark
            dark = tuple(part * 5 // 8 for part in bark)
            colours = self.greens(light, away, (dark, tuple(part * 11 // 8 for part in bark)))
        else:
            (red, green, blue), bright = self.plan.leaves
            if kind == "conifer":
                bright = tuple(part * 3 // 4 for part in bright)
            bright = (bright[0] + tint, bright[1] + tint // 2, bright[2])
            colours = self.greens(light, away, ((red, green, blue), bright))
        half = tall // 2 if kind in ("bare", "leafy") else tall // 3
        top = foot - tall
        low = foot
        if kind == "leafy":
            wide = height // 28
            trunk = [
                [
                    (x - wide, 0, s),
                    (x + wide, 0, s),
                    (x + wide * 2 // 3, height // 2, s),
                    (x - wide * 2 // 3, height // 2, s),
                ]
            ]
            picture.polygons(np.array(trunk), air.tone(self.plan.bark, light, away), TREE)
            low = foot - tall // 5
            half = tall * 2 // 5
        elif kind == "bush":
            half = tall * 3 // 5
            top, low = foot - tall * 9 // 10, foot + tall // 8
        box = (column - half >> SHIFT, top >> SHIFT, column + half >> SHIFT, low >> SHIFT)
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            return
        planes = plants.crown(kind, number)
        level = 0
        while level + 1 < len(planes) and len(planes[level + 1].cover) >= box[3] - box[1]:
            level += 1
        picture.sprite(box, planes[level], colours)

    def shadow(self, outline: Sequence[tuple[int, int]], height: int) -> None:
        """The shadow of an upright prism, on the ground."""
        if self.plan.sun is None:
            return
        across, along = self.plan.sun
        moved = [(x - (across * height >> 8), s - (along * height >> 8)) for x, s in outline]
        hull = _hull([*outline, *moved])
        if len(hull) > 2:
            self.shadows.append(np.array([(x, 0, s) for x, s in hull]))

    def post_shadow(self, x: int, s: int, height: int, wide: int) -> None:
        if self.away(s) < 6000:
            self.shadow([(x - wide, s), (x + wide, s)], height)

    def shadow_of_house(self, side: int, line: int, start: int, end: int, height: int) -> None:
        self.shadow(
            [(side * line, start), (side * line, end), (side * (line + 300), end), (side * (line + 300), start)], height
        )

    def seen(self) -> list[Thing]:
        """The things that no nearer house hides and that stand in the picture, far ones first."""
        camera = self.picture.camera
        height, width = camera.size
        focal, (middle, row) = camera.focal, camera.centre
        covered = np.full(width, height, dtype=np.int64)  # houses stand from the ground up to this row
        seen = []
        for thing in sorted(self.things, key=lambda thing: (thing.far, -thing.number)):
            corners = []
            for x, s in thing.ends:
                right, up, away = self.picture.offset(x, 0, s)
                away = max(away, NEAR)
                base = row - up * focal // away
                corners.append(
                    (
                        middle + right * focal // away,
                        base - thing.height * focal // away,
                        base - thing.cover * focal // away,
                    )
                )
            (start, top, high), (stop, end_top, end_high) = sorted(corners)
            first, last = max(0, (start >> SHIFT) - 1), min(width, (stop >> SHIFT) + 2)
            if first >= last or int(covered[first:last].max()) <= min(top, end_top) >> SHIFT:
                continue
            seen.append(thing)
            if thing.cover and last - first > 4:
                whole = stop - start
                along = (np.arange(first + 2, last - 2) << SHIFT) - start
                edge = (high + (end_high - high) * along // max(1, whole) >> SHIFT) + 1
                part = covered[first + 2 : last - 2]
                np.minimum(part, edge, out=part)
        return seen[::-1]


def rectangle(left: int, start: int, right: int, end: int) -> list[tuple[int, int]]:
    """An outline (x, s) on the ground."""
    return [(left, start), (right, start), (right, end), (left, end)]


def _hull(points: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The convex hull (Andrew 1979)."""
    ordered = sorted(set(points))

    def half(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        chain: list[tuple[int, int]] = []
        for x, y in places:
            while len(chain) > 1 and (chain[-1][0] - chain[-2][0]) * (y - chain[-2][1]) <= (
                chain[-1][1] - chain[-2][1]
            ) * (x - chain[-2][0]):
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    return half(ordered) + half(reversed(ordered))

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
from ssl_seg.worlds.street.hiding import Box, Face, Thing
from ssl_seg.worlds.street.materials import BICYCLIST, BUILDING, CAR, FENCE, PEDESTRIAN, POLE, ROAD, SIGN, TREE, Scale
from ssl_seg.worlds.street.perspective import NEAR, PIXEL, SHIFT, Colour, Ends, Picture, Solid
from ssl_seg.worlds.street.plan import BRICKS, FAR, SLATES, STONES, Plan

SECTIONS = (150, 250, 400, 650, 1000, 1500, 2200, 3200, 4600, 6500, 9000, 13000, 18000)


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

    def add(
        self,
        paint: Callable[[], None],
        ends: Ends,
        height: int,
        cover: int = 0,
        faces: Sequence[Face] = (),
        box: Box | None = None,
    ) -> None:
        """Something upright on the ground, in a box with two places (x, s) as its corners."""
        far = max(ends[0][1], ends[1][1])
        if self.here + NEAR < far:
            (x, s), (end_x, end_s) = ends
            outline = (x, s, end_x, end_s, height, cover)
            self.things.append(Thing(outline, box or (x, end_x, s, end_s, 0, height, False), paint, faces))

    def stand(
        self,
        paint: Callable[[], None],
        x: int,
        s: int,
        half: int,
        height: int,
        body: tuple[int, int, int, int] | None = None,
    ) -> None:
        """`body` is what of it is painted at most, about its place: left, right, from low to high."""
        left, right, low, high = body or (-half, half, 0, height)
        self.add(paint, ((x - half, s), (x + half, s)), height, box=(x + left, x + right, s, s, low, high, True))

    def away(self, s: int) -> int:
        return max(NEAR, s - self.here)

    def mark(self) -> Colour:
        """The colour of a line on the road."""
        worn = self.plan.marks
        red, green, blue = (grey + (226 - grey) * worn // 256 for grey in self.plan.asphalt)
        return red, green, blue

    def flat(self, outlines: Sequence[Sequence[tuple[int, int]]], colour: Colour, label: int) -> None:
        """Outlines (x, s) on the ground, all with as many corners."""
        flat = np.array(outlines)
        if flat[..., 1].max() - self.here <= NEAR:
            return
        points = np.zeros((*flat.shape[:2], 3), dtype=np.int64)
        points[..., ::2] = flat
        self.picture.polygons(points, colour, label)

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
            inner, low = (house.x + house.back) // 2 + side * 45, front.eaves
            box = (
                house.x,
                house.back if front.gable else inner,
                start,
                end,
                low,
                low + max(front.gable or pitch, pitch + 90),
                True,
            )
            self.add(partial(self._roof, house), ((house.x, start), (house.back, end)), high, box=box)
        if gable:
            peak = 0 if front.gable else pitch
            self.end_wall(house, front._replace(width=depth, gable=peak, bays=2, shop=False, seed=front.seed ^ 5))
        self.front_wall(side, house.x, start, end, front)

    def front_wall(self, side: int, x: int, start: int, end: int, front: Front) -> None:
        """A house front along the street."""
        ends = ((x, start), (x, end)) if side < 0 else ((x, end), (x, start))
        light = self.air.right if side < 0 else self.air.left
        self.wall(ends, front, light)

    def end_wall(self, house: House, front: Front) -> None:
        """A house's wall that looks towards the camera."""
        corner, back = (house.x, house.start), (house.back, house.start)
        ends = (back, corner) if house.side < 0 else (corner, back)
        if house.start > self.here + NEAR:
            self.wall(ends, front, self.air.front)

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
                self.picture.polygon(slope, air.tone(colour, light, away), BUILDING)
        else:
            peak = eaves + pitch
            slope = [(x, eaves, start), (x, eaves, end), (middle, peak, end), (middle, peak, start)]
            self.picture.polygon(slope, air.tone(colour, (lit + air.top) // 2, away), BUILDING)
        if chimney and away < 9000:
            low, high, s = eaves + pitch - 60, eaves + pitch + 90, start + 70
            near, far = middle - 45 * side, middle + 45 * side
            flank = [(near, low, s), (near, low, s + 90), (near, high, s + 90), (near, high, s)]
            face = [(near, low, s), (far, low, s), (far, high, s), (near, high, s)]
            self.picture.polygon(flank, air.tone(front.wall, lit, away), BUILDING)
            self.picture.polygon(face, air.tone(front.wall, air.front * 7 // 8, away), BUILDING)

    def wall(self, ends: Ends, front: Front, light: int) -> None:
        """A house's wall between two places (x, s)."""
        (x, s), (end_x, end_s) = ends
        scale = self.scale(ends)
        if scale[1] <= 4 and abs(end_s - s) > abs(end_x - x):  # a window is a pixel or less
            box = (x, end_x, s, end_s, 0, front.eaves, True)
            self.add(partial(self._plain_wall, ends, front, light), ends, front.height, front.eaves, box=box)
            return
        # Beside a gable there is sky, down to a whole texel.
        high = front.eaves - 200 // scale[1] - 2 if front.gable else front.height
        faces = [(x, s, end_x, end_s, 0, high, False)]
        self.add(partial(self._wall, ends, front, light, scale), ends, front.height, front.eaves, faces)

    def _plain_wall(self, ends: Ends, front: Front, light: int) -> None:
        (x, s), (end_x, end_s) = ends
        face = [(x, 0, s), (end_x, 0, end_s), (end_x, front.eaves, end_s), (x, front.eaves, s)]
        red, green, blue = front.wall
        plain = (red * 13 // 16, green * 13 // 16, blue * 13 // 16)
        self.picture.polygon(face, self.air.tone(plain, light, self._middle(ends)), BUILDING)

    def _wall(self, ends: Ends, front: Front, light: int, scale: Scale) -> None:
        scale = materials.fitting(scale, front.width, front.height)
        draw = partial(facades.front, front, scale)
        size = materials.texels(scale, front.width, front.height)
        self.picture.wall(ends, (0, front.height), size, draw, self.air.tones(light, self._middle(ends)))

    def _middle(self, ends: Ends) -> int:
        """How far away a wall is, about."""
        return (self.away(ends[0][1]) + self.away(ends[1][1])) // 2

    def scale(self, ends: Ends) -> Scale:
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
        scale = materials.fitting(self.scale(ends), end - start, height)
        size = materials.texels(scale, end - start, height)
        if kind == "hedge":
            draw = partial(plants.hedge, end - start, height, scale, seed, self.greens(light, away))
            self.picture.wall(ends, (0, height), size, draw)
            return
        draw = partial(facades.railing, end - start, height, scale, colour, kind)
        holes = FENCE if kind == "bars" else None
        self.picture.wall(ends, (0, height), size, draw, self.air.tones(light, away), holes)

    def greens(self, light: int, away: int, colours: tuple[Colour, Colour] | None = None) -> np.ndarray:
        dark, bright = colours or self.plan.leaves
        return materials.ramp(self.air.tone(dark, light, away), self.air.tone(bright, light, away), TREE)

    def vehicle(self, kind: str, x: int, s: int, direction: int, dice: Dice) -> None:
        """`direction` counts 64 to a turn: 0 drives away from the camera, 16 to the right."""
        body, half, reach, top, _ = vehicles.vehicle(kind)
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
        slack = (reach >> 5) + 4  # for the turn, and for lamps and wheels, which stand out
        box = (x - wide - slack, x + wide + slack, s - long - slack, s + long + slack, -6, top, True)
        whole = away - reach - slack > NEAR  # one that is cut off is hollow
        faces = [
            (x + left, s + near, x + right, s + near, low, high, True)
            for left, right, near, low, high in (vehicles.fronts(kind, turn) if whole else ())
        ]
        self.add(partial(self._vehicle, (x, s), turn, body, colour), ends, 340, faces=faces, box=box)
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
        self.stand(paint, x, s, 45, 185 * size >> 8, (-46, 46, -2, 176 * size >> 8))
        self.post_shadow(x, s, 165 * size >> 8, 22)

    def rider(self, x: int, s: int, across: bool, seed: int, size: int) -> None:
        away = s - self.here
        if not NEAR < away < 9000:
            return
        half = 91 if across else 37
        paint = partial(self._figure, figures.bicyclist, x, s, across, seed, 4, size, BICYCLIST)
        self.stand(paint, x, s, 95, 190 * size >> 8, (-half, half, -2, 180 * size >> 8))
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
        self.stand(
            partial(self._lamp, x, s, height, reach, colour),
            x,
            s,
            180,
            height + 50,
            (min(-14, reach - 30), max(14, reach + 30), 0, height + 45),
        )
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
        self.stand(
            partial(self._sign_post, x, s, kind, seed, height, back),
            x,
            s,
            110,
            height + 110,
            (-100, 100, 0, height + 70) if kind == "direction" else (-44, 44, 0, height + 70),
        )
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
        self.put_tree(x, s, height, kind, number, light, tint, height * 3 // 5)
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

    def put_tree(self, x: int, s: int, height: int, kind: str, number: int, light: int, tint: int, half: int) -> None:
        """A tree that is seen at most `half` to its sides; its crown is drawn narrower."""
        wide = height * 3 // 5
        body = (
            (-wide, wide, -height // 8 - 2, height * 9 // 10 + 1)
            if kind == "bush"
            else (-height // 2, height // 2, 0, height)
        )
        self.stand(partial(self.paint_tree, x, s, height, kind, number, light, tint), x, s, half, height, body)

    def paint_tree(self, x: int, s: int, height: int, kind: str, number: int, light: int, tint: int) -> None:
        picture, air = self.picture, self.air
        column, foot, away = picture.spot(x, 0, s)
        scale = picture.camera.focal
        tall = height * scale // away
        light = light * (air.left + air.right + air.top + air.front) // 4 >> 8
        if kind == "bare":
            bark = self.plan.bark
            colours = self.greens(light, away, (materials.times(bark, 160), materials.times(bark, 352)))
        else:
            (red, green, blue), bright = self.plan.leaves
            if kind == "conifer":
                bright = materials.times(bright, 192)
            bright = (bright[0] + tint, bright[1] + tint // 2, bright[2])
            colours = self.greens(light, away, ((red, green, blue), bright))
        half = tall // 2 if kind in ("bare", "leafy") else tall // 3
        top = foot - tall
        low = foot
        if kind == "leafy":
            wide = height // 28
            trunk = [
                (x - wide, 0, s),
                (x + wide, 0, s),
                (x + wide * 2 // 3, height // 2, s),
                (x - wide * 2 // 3, height // 2, s),
            ]
            picture.polygon(trunk, air.tone(self.plan.bark, light, away), TREE)
            low = foot - tall // 5
            half = tall * 2 // 5
        elif kind == "bush":
            half = tall * 3 // 5
            top, low = foot - tall * 9 // 10, foot + tall // 8
        box = (column - half >> SHIFT, top >> SHIFT, column + half >> SHIFT, low >> SHIFT)
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            return
        crowns = plants.crown(kind, number)
        level = 0
        while level + 1 < len(crowns) and len(crowns[level + 1].planes) >= box[3] - box[1]:
            level += 1
        picture.sprite(box, crowns[level].planes, colours, crowns[level].solid)

    def shadow(self, outline: Sequence[tuple[int, int]], height: int) -> None:
        """The shadow of an upright prism, on the ground."""
        if self.plan.sun is None:
            return
        across, along = self.plan.sun
        across, along = -(across * height >> 8), -(along * height >> 8)
        moved = [(x + across, s + along) for x, s in outline]
        if len(outline) == 2:
            (x, s), (end_x, end_s) = outline
            turn = (end_x - x) * along - (end_s - s) * across
            hull = [] if turn == 0 else [*outline, *moved[::-1]] if turn > 0 else [outline[0], *moved, outline[1]]
        else:
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

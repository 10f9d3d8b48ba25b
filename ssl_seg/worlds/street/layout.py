"""What stands where in a street, and what moves: blocks of it, laid out from keys."""

from __future__ import annotations

from functools import partial

from ssl_seg.worlds.drawing import Dice
from ssl_seg.worlds.street import figures, materials
from ssl_seg.worlds.street.facades import Front
from ssl_seg.worlds.street.figures import Shapes
from ssl_seg.worlds.street.materials import PAVEMENT, ROAD, SIGN
from ssl_seg.worlds.street.perspective import NEAR
from ssl_seg.worlds.street.plan import BASES, BLOCK, FAR, LANE, STEP, TRIMS, Side
from ssl_seg.worlds.street.things import Scenery, rectangle


class Layout:
    """Puts things up in a scenery; `traffic` and `crowd` are per cent of what a street has of itself."""

    def __init__(self, put: Scenery, traffic: int, crowd: int) -> None:
        self.put, self.traffic, self.crowd = put, traffic, crowd

    def lay(self, number: int, dice: Dice) -> None:
        """All that stands still in a block."""
        start = number * BLOCK
        crossing = self.put.plan.kind == "junction" and number % 2 == (self.put.plan.seed + 1) % 2
        for side, spec in zip((-1, 1), self.put.plan.sides, strict=True):
            gap = dice.roll(700, 1100) if crossing or dice.chance(16) else 0
            if gap:
                self.side_road(side, spec, start, start + gap, dice)
            self.back_row(side, spec, start, dice)
            self.lots(side, spec, start + (gap + 300 if gap else 0), start + BLOCK, dice)
            self.kerbside(side, spec, start, start + gap, start + BLOCK, dice)
        if crossing:
            self.junction(start, dice)
        self.wear(start, dice)

    def side_road(self, side: int, spec: Side, start: int, end: int, dice: Dice) -> None:
        air, paving, asphalt = self.put.air, self.put.plan.paving, self.put.plan.asphalt
        inner, outer = side * (spec.kerb - 30), side * 6000
        edge = side * (spec.kerb + spec.pavement)

        def paint() -> None:
            self.put.flat(
                [rectangle(edge, start - 250, outer, end + 250)],
                air.tone(paving, air.top, self.put.away(start)),
                PAVEMENT,
            )
            mouth = [
                (inner, start - 160),
                (inner, end + 160),
                (side * (spec.kerb + 120), end),
                (outer, end),
                (outer, start),
                (side * (spec.kerb + 120), start),
            ]
            self.put.flat([mouth], air.tone(asphalt, air.top, self.put.away(start)), ROAD)
            dashes = [
                rectangle(side * (spec.kerb + 20), s, side * (spec.kerb + 35), s + 60) for s in range(start, end, 110)
            ]
            self.put.flat(dashes, air.tone(self.put.mark(), air.top, self.put.away(start)), ROAD)

        self.put.ground.append(paint)
        far = side * dice.roll(3600, 5000)
        front = self.front(dice, spec, 2400, self.put.plan.sides[0].storeys)
        self.put.front_wall(side, far, start - 700, end + 1500, front)
        if dice.chance(50):
            self.put.vehicle(
                dice.pick(("hatch", "saloon", "estate")),
                side * dice.roll(spec.kerb + 250, 2600),
                (start * 3 + end) // 4,
                16 if side < 0 else 48,
                dice,
            )

    def back_row(self, side: int, spec: Side, start: int, dice: Dice) -> None:
        """Trees behind the houses."""
        many = {"park": 4, "houses": 3, "open": 4}.get(spec.style, 1)
        for _ in range(many):
            x, s, height = side * dice.roll(2000, 4800), start + dice.roll(0, BLOCK), dice.roll(600, 1200)
            self.put.tree(x, s, height, (dice.pick((spec.tree[0], "leafy", "bare", "conifer")), dice.roll(0, 6)), dice)

    def lots(self, side: int, spec: Side, start: int, end: int, dice: Dice) -> None:
        line = spec.kerb + spec.pavement + spec.setback
        if spec.style in ("park", "open"):
            self.park(side, spec, start, end, dice)
            return
        common = self.front(dice, spec, 500, spec.storeys)
        s, before = start, 0
        while s < end - 250:
            room = end - s
            if spec.style == "houses":
                width = min(room, dice.roll(650, 1150))
                yard = dice.roll(150, 450)
                front = self.front(dice, spec, max(250, width), spec.storeys)
                self.put.house(side, line + dice.roll(-60, 60), s, s + max(250, width - yard // 2), front, True, dice)
                self.garden(side, spec, s, min(end, s + width + yard), dice)
                s, before = s + width + yard, 0
                continue
            if spec.style == "terrace":
                width = min(room, dice.roll(480, 640))
                front = (
                    common._replace(width=width, seed=dice.roll(0, 4000), base=dice.pick(BASES))
                    if dice.chance(75)
                    else self.front(dice, spec, width, spec.storeys)
                )
                self.garden(side, spec, s, s + width, dice)
            else:
                width = min(room, dice.roll(520, 950) if spec.style == "shops" else dice.roll(1200, 2200))
                front = self.front(dice, spec, width, spec.storeys)
            if room - width < 250:
                width = room
                front = front._replace(width=width)
            self.put.house(side, line, s, s + width, front, front.height > before, dice)
            s, before = s + width, front.height

    def front(self, dice: Dice, spec: Side, width: int, storeys: tuple[int, int]) -> Front:
        modern, shop = spec.style == "modern", spec.style == "shops" and dice.chance(85)
        wall = dice.pick(spec.walls)
        tint = dice.roll(-8, 25)
        wall = (wall[0] + tint, wall[1] + tint, wall[2] + tint)
        gabled = not modern and dice.chance(22)
        pane = (dice.roll(150, 260), dice.roll(130, 180)) if modern else (dice.roll(85, 125), dice.roll(120, 175))
        return Front(
            width=width,
            storeys=dice.roll(storeys[0], storeys[1] + 1),
            storey=dice.roll(280, 350),
            ground=dice.roll(320, 390) if shop or modern else dice.roll(290, 320),
            wall=wall,
            trim=dice.pick(TRIMS),
            base=dice.pick(BASES),
            brick=wall[0] - wall[2] > 26,
            bays=max(1, width // dice.roll(210, 320)),
            pane=pane,
            shop=shop or (modern and dice.chance(35)),
            sign=dice.chance(25),
            gable=dice.roll(220, 380) if gabled else 0,
            seed=dice.roll(0, 4000),
            lit=dice.roll(15, 50) if self.put.air.night else 0,
        )

    def garden(self, side: int, spec: Side, start: int, end: int, dice: Dice) -> None:
        if spec.setback < 150:
            return
        edge = spec.edge if spec.edge != "mixed" else dice.pick(("hedge", "boards", "bricks", "none"))
        x = side * (spec.kerb + spec.pavement + 10)
        gate = dice.roll(100, 260)
        self.put.barrier(edge, x, start, end - gate, dice)
        if spec.setback >= 400:
            if dice.chance(30):
                place = side * (spec.kerb + spec.pavement + dice.roll(120, spec.setback - 100))
                kind = dice.pick(("bush", "leafy", spec.tree[0], "conifer"))
                self.put.tree(place, dice.roll(start, end), dice.roll(250, 650), (kind, dice.roll(0, 6)), dice)
            if dice.chance(35):
                drive = rectangle(x, end - gate - 120, side * (spec.kerb + spec.pavement + spec.setback), end)
                tone = self.put.air.tone(self.put.plan.paving, self.put.air.top, self.put.away(start))
                self.put.ground.append(partial(self.put.flat, [drive], tone, PAVEMENT))

    def park(self, side: int, spec: Side, start: int, end: int, dice: Dice) -> None:
        edge = spec.kerb + spec.pavement
        self.put.barrier(spec.edge, side * (edge + 10), start, end, dice)
        for _ in range(4 if spec.style == "park" else 2):
            place = (side * (edge + dice.roll(250, 2200)), dice.roll(start, end))
            self.put.tree(
                *place, dice.roll(400, 1050), (dice.pick((spec.tree[0], spec.tree[0], "bush")), dice.roll(0, 6)), dice
            )
        if spec.style == "open":
            for row in range(2):
                for s in range(start, end, 290):
                    if dice.chance(min(100, 40 * self.traffic // 100)):
                        self.put.vehicle(
                            self.some_car(dice), side * (edge + 500 + 700 * row), s, dice.pick((16, 48)), dice
                        )
            front = self.front(dice, spec._replace(style="modern"), BLOCK * 3 // 4, (1, 2))
            if dice.chance(60):
                self.put.house(side, edge + 2600, start, start + BLOCK * 3 // 4, front, True, dice)

    def kerbside(self, side: int, spec: Side, start: int, clear: int, end: int, dice: Dice) -> None:
        """Lamps, signs, trees, railings, parked cars and people along the kerb."""
        gap = clear + 100 if clear > start else start
        edge = side * (spec.kerb + 45)
        lamp = dice.roll(550, 900)
        for s in range(gap + dice.roll(0, spec.lamps), end, spec.lamps):
            self.put.lamp(edge, s, lamp, -side, dice)
        if spec.trees:
            kerbside = "leafy" if spec.tree[0] == "conifer" else spec.tree[0]  # one that leaves the road free
            for s in range(gap + dice.roll(0, spec.trees), end, spec.trees):
                x = side * (spec.kerb + min(spec.pavement - 40, 90))
                self.put.tree(x, s + dice.roll(-80, 80), dice.roll(550, 1000), (kerbside, dice.roll(0, 6)), dice)
        for s in range(gap, end - 400, 400):
            if dice.chance(spec.rail):
                self.put.barrier("bars", side * (spec.kerb + 25), s, s + 400, dice)
        for _ in range(dice.roll(1, 5)):
            self.put.sign_post(side * (spec.kerb + dice.roll(30, 80)), dice.roll(gap, end), dice)
        if dice.chance(25):
            self.put.bollards(side * (spec.kerb + 30), dice.roll(gap, end), dice)
        if spec.style == "shops" or dice.chance(25):
            self.hanging_signs(side, spec, gap, end, dice)
        share = spec.parked * self.traffic // 100
        s = gap + 400
        while s < end - 350:
            if dice.chance(min(100, share)):
                self.put.vehicle(
                    self.some_car(dice), side * (spec.kerb - 105), s, 0 if (side < 0) == dice.chance(85) else 32, dice
                )
            s += dice.roll(520, 700)
        busy = {"shops": 5, "modern": 3, "terrace": 2, "open": 2}.get(spec.style, 1)
        for _ in range(dice.roll(0, busy * 2 + 2) * self.crowd // 100):
            self.walker(side, spec, dice.roll(start, end), dice)
        if dice.chance(min(100, 30 * self.crowd // 100)):
            self.cyclist(side, spec, dice.roll(start, end), dice)

    def hanging_signs(self, side: int, spec: Side, start: int, end: int, dice: Dice) -> None:
        line = spec.kerb + spec.pavement + min(spec.setback, 300)
        for _ in range(dice.roll(0, 4)):
            s, height = dice.roll(start, max(start + 1, end)), dice.roll(330, 460)
            base = dice.pick(BASES)
            ink = (214, 210, 200) if sum(base) < 400 else (44, 42, 44)
            x = side * (line - 55)
            away = s - self.put.here
            if NEAR < away < 6000 and spec.style not in ("park", "open", "houses"):
                plate: Shapes = [
                    ([figures.box(-42, -55, 42, 55)], base),
                    ([figures.box(-26, -24, 26, 24)], ink),
                    ([figures.box(-18, -16, 18, 16)], base),
                ]
                self.put.stand(
                    partial(self.put.upright, x, height, s, plate, SIGN),
                    x,
                    s,
                    45,
                    height + 60,
                    (-42, 42, height - 55, height + 55),
                )

    def junction(self, start: int, dice: Dice) -> None:
        """Traffic lights, a stop line, people who cross."""
        left, right = self.put.plan.sides
        state = dice.roll(0, 4)
        for side, spec in ((-1, left), (1, right)):
            self.put.signal(side * (spec.kerb + 40), start - 150, state, dice)
            self.put.signal(side * (spec.kerb + 40), start + 1150, state, dice)
        self.put.ground.append(partial(self._crossing, start - 480, dice.chance(50)))
        for _ in range(dice.roll(0, 6) * self.crowd // 100):
            x = dice.roll(-left.kerb, right.kerb) + dice.pick((-5, 5)) * self.put.frame
            self.put.somebody(x, start - dice.roll(230, 440), True, dice.roll(0, 1 << 12), dice.roll(210, 270))
        if dice.chance(min(100, 40 * self.traffic // 100)):
            self.put.vehicle(
                self.some_car(dice), dice.roll(-900, 1200), start + dice.roll(200, 650), dice.pick((16, 48)), dice
            )

    def _crossing(self, s: int, zebra: bool) -> None:
        left, right = self.put.plan.sides
        tone = self.put.air.tone(self.put.mark(), self.put.air.top, self.put.away(s))
        if zebra:
            stripes = [rectangle(x, s, x + 50, s + 280) for x in range(-left.kerb + 30, right.kerb - 60, 100)]
        else:
            stripes = [
                rectangle(x, s + line, x + 40, s + line + 12)
                for line in (0, 270)
                for x in range(-left.kerb, right.kerb - 30, 70)
            ]
        self.put.flat(stripes, tone, ROAD)
        self.put.flat([rectangle(-left.kerb + 20, s - 130, -10, s - 100)], tone, ROAD)

    def wear(self, start: int, dice: Dice) -> None:
        """Patches, manholes and arrows on the road."""
        left, right = self.put.plan.sides
        for _ in range(3):
            x, s = dice.roll(-left.kerb, right.kerb - 100), start + dice.roll(0, BLOCK)
            wide, long = dice.roll(60, 260), dice.roll(100, 900)
            share = dice.roll(215, 280)
            red, green, blue = self.put.plan.asphalt
            grey = (red * share >> 8, green * share >> 8, blue * share >> 8)
            self.put.patch(rectangle(max(x, -left.kerb + 20), s, min(x + wide, right.kerb - 20), s + long), s, grey)
        for _ in range(2):
            x, s = dice.roll(-left.kerb + 60, right.kerb - 60), start + dice.roll(0, BLOCK)
            self.put.patch([(x + a, s + b) for a, b in materials.disc(0, 0, 32).tolist()], s, (58, 56, 54))
        if dice.chance(30):
            x, s = -LANE // 2, start + dice.roll(0, BLOCK)
            shaft, head = (
                [(x - 8, s), (x + 8, s), (x + 8, s + 220)],
                [(x + 30, s + 220), (x, s + 380), (x - 30, s + 220)],
            )
            self.put.patch([*shaft, *head, (x - 8, s + 220)], s, self.put.mark())

    def drive(self, dice: Dice) -> None:
        """Cars that move, with and against the camera."""
        plan = self.put.plan
        ahead = dice.roll(900, 5000)
        swing = materials.sine(self.put.frame + dice.roll(0, 64))
        lane = plan.eye[0]
        if dice.chance(min(100, 62 * self.traffic // 100)):
            kind = dice.pick(("hatch", "saloon", "estate", "hatch", "tall", "van", "bus", "truck"))
            self.put.vehicle(
                kind, lane + dice.roll(-30, 30), self.put.here + 350 + ahead + (ahead * swing >> 13), 0, dice
            )
        for _ in range(dice.roll(0, 6) * self.traffic // 100):
            start, speed = dice.roll(0, FAR), dice.roll(10, 40)
            row = dice.roll(0, plan.lanes)
            kind = dice.pick(("hatch", "saloon", "estate", "hatch", "saloon", "tall", "van", "bus"))
            s = self.put.here + (start - (speed + STEP) * self.put.frame) % FAR
            self.put.vehicle(kind, LANE // 2 + row * LANE + dice.roll(-30, 31), s, 32, dice)
        for _ in range(dice.roll(0, 3) * self.traffic // 100):
            s = self.put.here + 3000 + (dice.roll(0, FAR) + dice.roll(-6, 12) * self.put.frame) % (FAR - 3000)
            self.put.vehicle(
                dice.pick(("hatch", "saloon", "tall", "van")), -LANE // 2 - (plan.lanes - 1) * LANE, s, 0, dice
            )
        if dice.chance(min(100, 30 * self.crowd // 100)):
            # Beside parked cars, and nearer than the car ahead.
            x = -plan.sides[0].kerb + dice.roll(70, 130) + (180 if plan.sides[0].parked else 0)
            s = self.put.here + dice.roll(500, max(600, ahead)) + dice.roll(-12, 3) * self.put.frame
            self.put.rider(x, s, False, dice.roll(0, 1 << 12), dice.roll(235, 265))

    def some_car(self, dice: Dice) -> str:
        return dice.pick(("hatch", "hatch", "saloon", "saloon", "estate", "tall", "van"))

    def walker(self, side: int, spec: Side, s: int, dice: Dice) -> None:
        x = side * (spec.kerb + dice.roll(60, max(61, spec.pavement - 30)))
        pace = dice.pick((-4, -5, 4, 5, 0))
        across = dice.chance(30)
        size = dice.pick((256, 256, 250, 240, 265, 170))
        self.put.somebody(x, s + pace * self.put.frame, across, dice.roll(0, 1 << 12), size)

    def cyclist(self, side: int, spec: Side, s: int, dice: Dice) -> None:
        across = dice.chance(35)
        x = side * (spec.kerb - dice.roll(60, 130) - (180 if spec.parked else 0))
        pace = 9 if side < 0 else -9
        self.put.rider(x, s + pace * self.put.frame * (not across), across, dice.roll(0, 1 << 12), dice.roll(240, 265))

    def close(self, dice: Dice) -> None:
        """What ends the view: houses and trees far away, which keep their distance."""
        s = self.put.here + FAR
        spread = 11000
        for x in range(-spread, spread, 900):
            kind = dice.pick(("leafy", "leafy", "bare", "house", "house", "bush"))
            height = dice.roll(600, 1300)
            place = x + dice.roll(0, 500)
            if kind == "house":
                front = self.front(dice, self.put.plan.sides[0], dice.roll(900, 1600), (2, 4))
                ends = ((place, s - 300), (place + front.width, s - 300))
                self.put.wall(ends, front, self.put.air.front)
            else:
                self.put.put_tree(place, s - 200, height, kind, dice.roll(0, 6), 256, 0, height)

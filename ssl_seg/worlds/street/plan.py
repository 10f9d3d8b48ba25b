"""The plan of a street scene: what kind of place it is, its widths, its light and its camera, drawn once from a key."""

from __future__ import annotations

from typing import NamedTuple

from ssl_seg.worlds.drawing import Dice
from ssl_seg.worlds.street.materials import Air, sine
from ssl_seg.worlds.street.perspective import PIXEL, Camera, Colour

BLOCK = 4000  # cm
BLOCKS = 4  # seen ahead
FAR = BLOCK * BLOCKS
LANE = 300
STEP = 45  # cm the camera drives in a frame: 50 km/h at 30 frames a second
# As often as they are named: CamVid's classes take about their share, and dusk and rain do not hide too much.
WEATHERS = ("sunny", "sunny", "sunny", "overcast", "overcast", "overcast", "overcast", "dusk", "rain")
PLACES = ("town", "town", "town", "town", "town", "avenue", "suburb", "suburb", "park", "junction", "junction", "open")


Sky = tuple[Colour, Colour, Colour, Colour]  # above, at the horizon, clouds in light and in shade


class Side(NamedTuple):
    """One side of the street, outwards from the kerb; lengths in cm."""

    kerb: int  # from the street's middle
    pavement: int
    setback: int  # from the pavement to the houses
    style: str
    storeys: tuple[int, int]
    walls: tuple[Colour, ...]
    parked: int  # per cent of the places
    trees: int  # from one to the next, 0 for none
    tree: tuple[str, int]
    edge: str  # what stands along the pavement
    rail: int  # per cent of the pieces of kerb with a railing
    lamps: int


class Plan(NamedTuple):
    kind: str
    sides: tuple[Side, Side]  # left, right
    lanes: int
    air: Air
    sun: tuple[int, int] | None  # how far a shadow reaches per height: x, s, of 256
    sky: Sky
    clouds: tuple[int, int]  # how many of 256, how hard
    focal: int  # of 256, in half the sum of the sides
    horizon: int  # of 1024 of the height
    vanish: int  # of 1024 of the width
    eye: tuple[int, int, int]
    bend: int
    rise: int
    asphalt: Colour
    paving: Colour
    grass: tuple[Colour, Colour]
    leaves: tuple[Colour, Colour]
    bark: Colour
    marks: int  # how worn, of 256
    middle: str
    wet: int
    exposure: tuple[int, int, int, int]  # gain of red, green, blue of 256; contrast of 256
    blur: float  # deviation in pixels
    noise: int
    seed: int


BRICKS = ((126, 90, 72), (142, 112, 86), (164, 148, 116), (102, 72, 60), (146, 102, 78), (176, 162, 132))
PLASTERS = ((206, 202, 192), (190, 180, 158), (166, 162, 154), (216, 214, 210), (178, 160, 138), (150, 156, 160))
STONES = ((150, 144, 130), (130, 126, 118), (170, 162, 144), (116, 112, 108))
MODERN = ((152, 154, 154), (178, 174, 166), (124, 118, 112), (140, 108, 88), (104, 110, 116))
TRIMS = ((206, 204, 198), (188, 184, 174), (58, 56, 54), (150, 142, 126), (84, 70, 58), (212, 210, 206))
BASES = (
    (46, 58, 50),
    (40, 44, 70),
    (96, 34, 34),
    (30, 30, 32),
    (150, 146, 136),
    (120, 40, 50),
    (28, 74, 90),
    (140, 110, 50),
    (176, 60, 40),
)
SLATES = ((66, 68, 74), (82, 80, 80), (108, 70, 56), (94, 84, 74), (120, 86, 66))


def draw_plan(dice: Dice, weather: str, kind: str) -> Plan:
    """A plan from a key; `any` weather and kind of place are drawn too."""
    drawn = dice.pick(WEATHERS)
    place = dice.pick(PLACES)
    weather = drawn if weather == "any" else weather
    kind = place if kind == "any" else kind
    lanes = 2 if kind == "avenue" or (kind in ("junction", "open") and dice.chance(40)) else 1
    winter = dice.chance(50)
    sides = (_side(dice, kind, lanes, winter, -1), _side(dice, kind, lanes, winter, 1))
    air, sun, sky, clouds = _light(dice, weather)
    lane = dice.pick((LANE // 2, LANE // 2, LANE * 3 // 2)) if lanes == 2 else LANE // 2
    green = dice.roll(0, 40)
    leaves = (
        (22 + green // 4, 26 + green // 3, 16),
        (124 + dice.roll(-20, 30), 128 + green // 2, 84 + dice.roll(-10, 20)),
    )
    grey = dice.roll(74, 112)
    stone = dice.roll(-6, 16)
    warm = dice.roll(-8, 9)
    gain = 256 + dice.roll(-22, 23)
    return Plan(
        kind=kind,
        sides=sides,
        lanes=lanes,
        air=air,
        sun=sun,
        sky=sky,
        clouds=clouds,
        focal=256 * dice.roll(116, 150) // 100,
        horizon=dice.roll(450, 575),
        vanish=512 + dice.roll(-90, 91),
        eye=(-lane + dice.roll(-40, 41), dice.roll(125, 165), dice.roll(0, BLOCK)),
        bend=dice.roll(-150, 151) if dice.chance(65) else 0,
        rise=dice.roll(0, 36) if dice.chance(40) else 0,
        asphalt=(grey, grey + 1, grey + 4),
        paving=(grey + stone + 14, grey + stone + 12, grey + stone + 8),
        grass=((52 + warm, 66, 34), (104 + warm, 116, 66)),
        leaves=leaves,
        bark=(98 + warm, 90, 80 - warm // 2),
        marks=dice.roll(150, 256),
        middle=dice.pick(
            ("dashes", "dashes", "double", "zigzag", "none") if lanes == 1 else ("line", "island", "dashes")
        ),
        wet=dice.roll(70, 130) if weather == "rain" else 0,
        exposure=(gain + warm, gain, gain - warm, dice.roll(240, 336)),
        blur=dice.pick((0.4, 0.4, 0.5, 0.6)),
        noise=dice.roll(10, 26) + (14 if weather == "dusk" else 0),
        seed=dice.roll(0, 1 << 20),
    )


STYLES = {
    "town": ("shops", "shops", "terrace", "terrace", "modern"),
    "avenue": ("modern", "shops", "modern", "terrace"),
    "suburb": ("houses", "houses", "terrace", "houses", "park"),
    "park": ("park", "houses", "shops", "terrace"),
    "junction": ("shops", "terrace", "modern", "houses"),
    "open": ("open", "park", "houses", "open"),
}


def _side(dice: Dice, kind: str, lanes: int, winter: bool, side: int) -> Side:
    style = dice.pick(STYLES[kind])
    if kind == "park":
        style = "park" if side < 0 else dice.pick(STYLES[kind][1:])
    bay = dice.chance(45) and kind != "junction"
    setback = {
        "shops": 0,
        "terrace": dice.pick((0, 0, 150, 300)),
        "modern": dice.pick((0, 200)),
        "houses": dice.roll(300, 700),
    }
    brick = dice.chance(45)
    pool = {"shops": BRICKS + PLASTERS + STONES, "terrace": BRICKS if brick else PLASTERS, "modern": MODERN + STONES}
    walls = tuple(dice.pick(pool.get(style, BRICKS + PLASTERS)) for _ in range(3))
    tall = {"shops": (2, 4), "terrace": (2, 4), "modern": (3, 6), "houses": (2, 2)}
    green = style in ("park", "houses", "open")
    trees = dice.pick((0, 0, 0, 0, 1600)) if not green else dice.pick((0, 1000, 1300, 2000))
    if kind == "avenue":
        trees = dice.pick((1300, 2000, 0))
    species = "bare" if winter and dice.chance(75) else dice.pick(("leafy", "leafy", "leafy", "bare", "conifer"))
    edge = {
        "houses": dice.pick(("hedge", "hedge", "bricks", "boards", "bars", "mixed")),
        "terrace": dice.pick(("bars", "bricks", "hedge")),
        "park": dice.pick(("bars", "bars", "hedge", "none", "bricks")),
        "open": dice.pick(("bars", "none", "hedge", "none")),
    }
    return Side(
        kerb=lanes * LANE + (220 if bay else dice.roll(0, 60)),
        pavement=dice.roll(190, 420),
        setback=setback.get(style, 1200),
        style=style,
        storeys=tall.get(style, (1, 2)),
        walls=walls,
        parked=dice.roll(20, 65) if bay else (dice.roll(10, 40) if dice.chance(25) else 0),
        trees=trees,
        tree=(species, dice.roll(0, 6)),
        edge=edge.get(style, "none"),
        rail=dice.pick((0, 0, 30, 60)) if style in ("shops", "modern", "open") else dice.pick((0, 0, 0, 20)),
        lamps=dice.roll(2200, 3600),
    )


def _light(dice: Dice, weather: str) -> tuple[Air, tuple[int, int] | None, Sky, tuple[int, int]]:
    if weather == "sunny":
        across, along = dice.roll(-330, 331), dice.roll(-240, 241)
        ambient, direct = dice.roll(112, 160), dice.roll(120, 180)
        # A face is lit where its normal looks at the sun, and shadows fall the other way: to x - across, s - along.
        front, left, right = (ambient + direct * max(0, part) // 400 for part in (-along, -across, across))
        air = Air(ambient + direct, front, left, right, (206, 214, 222), 60000)
        haze = dice.roll(196, 236)
        sky = ((104, 146, 200), (haze, haze + 8, 248), (250, 250, 250), (206, 210, 218))
        if dice.chance(65):  # exposed for the street
            sky = ((196, 216, 240), (250, 252, 254), (254, 254, 254), (238, 240, 244))
        return air, (across, along), sky, (dice.roll(0, 150), dice.roll(2, 6))
    if weather == "overcast":
        light = dice.roll(170, 270)
        bright = dice.roll(232, 256)
        air = Air(
            light + 30,
            light * 7 // 8,
            light * dice.roll(70, 100) // 100,
            light * dice.roll(70, 100) // 100,
            (bright, bright, bright),
            22000,
        )
        return air, None, _covered(bright, (16, 12, 8), (34, 30, 26)), (dice.roll(100, 220), dice.roll(1, 4))
    if weather == "rain":
        light = dice.roll(130, 200)
        bright = dice.roll(196, 244)
        air = Air(
            light + 10, light * 7 // 8, light * 7 // 8, light * 3 // 4, (bright - 10, bright - 8, bright - 4), 9000
        )
        return air, None, _covered(bright, (30, 26, 20), (50, 46, 40)), (dice.roll(140, 240), dice.roll(1, 4))
    light = dice.roll(80, 150)
    red = dice.roll(0, 40)
    air = Air(
        light + 12,
        light * 3 // 4,
        light * dice.roll(60, 100) // 100,
        light * dice.roll(60, 100) // 100,
        (110 + red, 112 + red // 2, 122),
        26000,
        True,
    )
    sky = ((126, 134, 150), (198 + red, 190 + red // 3, 184), (206 + red, 198 + red // 3, 190), (104, 108, 120))
    return air, None, sky, (dice.roll(80, 230), dice.roll(1, 4))


def _covered(bright: int, above: Colour, shade: Colour) -> Sky:
    """A grey sky: how much darker it is above and on the clouds' undersides."""
    grey = (bright, bright, bright)
    return _less(bright, above), grey, grey, _less(bright, shade)


def _less(bright: int, darker: Colour) -> Colour:
    red, green, blue = darker
    return bright - red, bright - green, bright - blue


def camera(plan: Plan, size: tuple[int, int], frame: int) -> Camera:
    """Where the camera is in a frame: it drives on, sways and nods a little."""
    height, width = size
    sway = sine(frame * 2 + plan.seed)
    nod = sine(frame * 5 + plan.seed)
    x, eye, s = plan.eye
    focal = plan.focal * (height + width) * PIXEL >> 9
    column = plan.vanish * width * PIXEL >> 10
    row = (plan.horizon * height * PIXEL >> 10) + (nod * height * PIXEL // 400 >> 10)
    return Camera(
        size, max(PIXEL, focal), (column, row), (x + (sway * 14 >> 10), eye, s + STEP * frame), plan.bend, plan.rise
    )

"""What fills the picture pixel by pixel: sky, ground and the light on it, a wet road, and the camera's own marks."""

from __future__ import annotations

import cv2
import numpy as np

from ssl_seg.worlds.drawing import Dice
from ssl_seg.worlds.street import materials
from ssl_seg.worlds.street.materials import PAVEMENT, ROAD, SKY, TREE
from ssl_seg.worlds.street.perspective import PIXEL, SHIFT, Colour, Picture, split
from ssl_seg.worlds.street.plan import FAR, LANE, Plan, Side
from ssl_seg.worlds.street.things import Scenery, rectangle


class Surface:
    """Paints what is not a thing."""

    def __init__(self, scenery: Scenery) -> None:
        self.scenery, self.picture, self.plan, self.air = scenery, scenery.picture, scenery.plan, scenery.air

    def sky(self) -> None:
        height, width = self.picture.camera.size
        horizon = self.horizon()
        rows = min(height, max(0, horizon) + height // 16 + 1)
        bands = 64
        # (3, bands, 256): the parts of a colour come first, since numpy is slow on short rows.
        above, low, light, shade = (np.array(colour, dtype=np.int32)[:, None, None] for colour in self.plan.sky)
        lift = np.arange(bands, dtype=np.int32)[:, None] * 4
        clear = low + ((above - low) * lift >> 8)
        many, hard = self.plan.clouds
        level = materials.LEVELS
        cover = np.clip((level - 256 + many) * hard + 64, 0, 256)
        body = np.clip((level - 200 + many // 2) * 3, 0, 256)  # thick clouds are darker
        cloud = light + ((shade - light) * body >> 8)
        red, green, blue = np.clip(clear + ((cloud - clear) * cover >> 8), 0, 255).astype(np.uint32)
        table = red | green << np.uint32(8) | blue << np.uint32(16) | np.uint32(SKY << 24)
        climb = horizon - np.arange(rows)
        band = np.clip(climb * 100 // max(1, height), 0, bands - 1)
        down = (self.plan.seed + climb * 768 // max(1, height)) % 512
        across = (self.plan.seed // 7 + np.arange(width) * 420 // max(height, width)) % 512
        levels = materials.grain(128, 6)[down][:, across]
        table.ravel().take(levels + (band * 256)[:, None], out=self.picture.packed[:rows], mode="clip")

    def horizon(self) -> int:
        return self.picture.camera.centre[1] >> SHIFT

    def ground(self) -> None:
        plan, air = self.plan, self.air
        left, right = plan.sides
        for side, spec in ((-1, left), (1, right)):
            green = spec.style in ("park", "houses")
            colour = _midway(*plan.grass) if green else plan.paving
            label = TREE if green else PAVEMENT
            if spec.style == "open":
                colour, label = plan.asphalt, ROAD
            self.scenery.flat([self.scenery.band(0, side * 20000)], air.tone(colour, air.top, 2500), label)
        for side, spec in ((-1, left), (1, right)):
            kerb, edge = side * spec.kerb, side * (spec.kerb + spec.pavement)
            self.scenery.flat([self.scenery.band(kerb, edge)], air.tone(plan.paving, air.top, 1500), PAVEMENT)
            self._slabs(side, spec)
            self.scenery.flat(
                [self.scenery.band(kerb, kerb + side * 16)], air.tone((150, 148, 142), air.top, 1500), PAVEMENT
            )
        self.scenery.flat([self.scenery.band(-left.kerb, right.kerb)], air.tone(plan.asphalt, air.top, 1500), ROAD)
        dirt = air.tone(materials.times(plan.asphalt, 192), air.top, 1500)
        tracks = air.tone(materials.times(plan.asphalt, 248), air.top, 1500)
        middles = [lane * LANE + at for lane in range(-plan.lanes, plan.lanes) for at in (75, 235)]
        self.scenery.flat([self.scenery.band(x - 30, x + 30) for x in middles], tracks, ROAD)
        self.scenery.flat([self.scenery.band(-left.kerb, -left.kerb + 14)], dirt, ROAD)
        self.scenery.flat([self.scenery.band(right.kerb - 14, right.kerb)], dirt, ROAD)
        self._lines()

    def _slabs(self, side: int, spec: Side) -> None:
        joint = self.air.tone(materials.times(self.plan.paving, 208), self.air.top, 1000)
        first = (self.scenery.here // 75 + 1) * 75
        kerb, edge = side * spec.kerb, side * (spec.kerb + spec.pavement)
        seams = [rectangle(kerb, s, edge, s + 3) for s in range(first, first + 1500, 75)]
        self.scenery.flat(seams, joint, PAVEMENT)
        end = self.scenery.here + 1500
        rows = [kerb + side * x for x in range(75, spec.pavement, 75)]
        self.scenery.flat([self.scenery.band(x, x + side * 3, None, end) for x in rows], joint, PAVEMENT)

    def _lines(self) -> None:
        plan, air = self.plan, self.air
        left, right = plan.sides
        tone = air.tone(self.scenery.mark(), air.top, 1500)
        yellow = air.tone((176, 152, 66), air.top, 1500)
        far = self.scenery.here + 9000
        if plan.middle in ("dashes", "zigzag"):
            self._dashes(0, 7, 400, 600, tone)
        elif plan.middle == "double":
            self.scenery.flat([self.scenery.band(-14, -6, None, far)], tone, ROAD)
            self.scenery.flat([self.scenery.band(6, 14, None, far)], tone, ROAD)
        elif plan.middle in ("line", "island"):
            self.scenery.flat([self.scenery.band(-6, 6, None, far)], tone, ROAD)
        if plan.lanes == 2:
            self._dashes(-LANE, 5, 200, 600, tone)
            self._dashes(LANE, 5, 200, 600, tone)
        for side, spec in ((-1, left), (1, right)):
            at = side * (spec.kerb - 28)
            style = (plan.seed >> 3 if side < 0 else plan.seed >> 6) % 4
            if spec.kerb > plan.lanes * LANE + 150:
                self._dashes(side * (spec.kerb - 215), 5, 150, 300, tone)
            elif style < 2:
                for shift in (0,) if style else (0, 18):
                    self.scenery.flat(
                        [self.scenery.band(at - 4 - side * shift, at + 4 - side * shift, None, far)], yellow, ROAD
                    )
            elif style == 2:
                self.scenery.flat([self.scenery.band(at - 6, at + 6, None, far)], tone, ROAD)

    def _dashes(self, x: int, half: int, long: int, step: int, tone: Colour) -> None:
        first = self.scenery.here // step * step
        self.scenery.flat(
            [rectangle(x - half, s, x + half, s + long) for s in range(first, first + 9000, step)], tone, ROAD
        )

    def cast(self) -> None:
        """Grain, shadows and haze over the ground painted so far."""
        picture = self.picture
        camera = picture.camera
        height, width = camera.size
        top = max(0, self.horizon())
        if top >= height:
            return
        rows, columns = np.arange(top, height), np.arange(width)
        ahead = camera.focal * camera.at[1] // np.maximum(rows * PIXEL + PIXEL // 2 - camera.centre[1], PIXEL // 2)
        ahead = np.minimum(ahead, FAR)
        # How many halvings of a texel a pixel is wide and deep: finer grain than that would flicker.
        wide, deep = _log2(ahead * PIXEL // camera.focal), _log2(ahead * ahead * PIXEL // (camera.focal * camera.at[1]))
        along = ahead + self.scenery.here
        step = ((ahead * PIXEL << 10) // camera.focal).astype(np.int32)[:, None]  # cm a pixel, of 1024
        across = (columns - self.picture.camera.centre[0] // PIXEL).astype(np.int32) * step
        across >>= 10
        across += camera.at[0]
        texels = ((along >> deep & 511) * 512).astype(np.int32)[:, None] + (
            across >> wide.astype(np.int32)[:, None] & 511
        )
        fine, patches = materials.ground()
        light = fine.take(texels)
        texels = ((along >> 3 & 511) * 512).astype(np.int32)[:, None] + (across >> 3 & 511)
        light += patches.take(texels)
        shade = np.full((height, width), 255, dtype=np.uint8)
        for outlines, dark in ((self.scenery.shadows, 112), (self.scenery.shades, 60)):
            for cut in picture.outlines(outlines):
                cv2.fillPoly(shade, [cut], dark, cv2.LINE_8, SHIFT)
        veil = np.array([self.air.veil(part) for part in ahead.tolist()])
        # At 128 for 1, a product with a byte fits 16 bits.
        share = (light >> 1) * _soften(shade[top:]) >> 8
        share = share * (256 - veil).astype(np.uint16)[:, None] >> 8
        # A plane after the other: numpy is five times as fast on long rows as on threes.
        ground = picture.rgba[top:]
        planes = split(ground)
        for plane, far in zip(planes[:3], self.air.haze, strict=True):
            lit = plane * share
            lit >>= 7
            lit += (far * veil >> 8).astype(np.uint16)[:, None]
            np.minimum(lit, 255, out=plane, casting="unsafe")
        cv2.merge(planes, ground)

    def mirror(self) -> None:
        """A wet road shows what stands above it, upside down."""
        picture, horizon = self.picture, self.horizon()
        height = picture.camera.size[0]
        rows = np.arange(max(0, horizon + 1), height)
        if not len(rows):
            return
        source = np.clip(2 * horizon - rows, 0, height - 1)
        blurred = sum(picture.rgba[np.maximum(0, source - shift), :, :3].astype(np.int32) for shift in (0, 3, 7, 12))
        seen = blurred >> 2
        ground = picture.rgba[rows[0] :]
        wet = np.isin(ground[..., 3], (ROAD, PAVEMENT))[..., None]
        puddles = materials.grain(128, 6)[rows % 512][:, np.arange(picture.camera.size[1]) // 2 % 512].astype(np.int32)
        share = (self.plan.wet * np.clip(puddles * 2 - 90, 20, 256) >> 8)[..., None]
        mixed = ground[..., :3] + ((seen - ground[..., :3]) * share >> 8)
        np.copyto(ground[..., :3], np.clip(mixed, 0, 255).astype(np.uint8), where=wet)


def _midway(dark: Colour, light: Colour) -> Colour:
    red, green, blue = ((low + high) // 2 for low, high in zip(dark, light, strict=True))
    return red, green, blue


def _log2(numbers: np.ndarray) -> np.ndarray:
    """Rounded down; 0 for numbers under 2."""
    return (numbers[:, None] >> np.arange(1, 24) > 0).sum(axis=1)


def _soften(plane: np.ndarray) -> np.ndarray:
    """A box of 3 x 3."""
    wide = np.pad(plane, 1, mode="edge").astype(np.uint16)
    rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] >> 4).astype(np.uint8)


def expose(picture: Picture, plan: Plan, dice: Dice) -> np.ndarray:
    """The camera: a little blur, noise, gain, contrast and a cast of colour."""
    rgb = cv2.cvtColor(picture.rgba, cv2.COLOR_RGBA2RGB)
    # 8-bit pictures are smoothed in fixed point: OpenCV promises the same bits everywhere.
    rgb = cv2.GaussianBlur(rgb, (3, 3), plan.blur, borderType=cv2.BORDER_REPLICATE)
    levels = np.arange(256)
    bent = np.clip(levels + (plan.exposure[3] - 256) * (levels - 128) * levels * (255 - levels) // (1 << 21), 0, 255)
    table = np.minimum(255, bent[:, None] * np.array(plan.exposure[:3]) >> 8).astype(np.uint8)
    rgb = cv2.LUT(rgb, table[None])
    noise, count = materials.sensor(), rgb.size
    start = dice.roll(0, len(noise) // 2)
    whole = noise if start + count <= len(noise) else np.resize(noise, start + count)
    noisy = whole[start : start + count].astype(np.int16)
    noisy *= plan.noise
    noisy >>= 8
    noisy = noisy.reshape(rgb.shape)
    noisy += rgb
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)

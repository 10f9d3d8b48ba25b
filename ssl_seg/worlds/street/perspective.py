"""A pinhole camera in a street, and the picture it paints: colour and class in one array, so that both always agree.

Ours, because the pixels have to be a pure function of integers: renderers draw with floats, which round differently on
every GPU and CPU, and none paints an exact class map beside the colours. Lengths are centimetres, places on the picture
sixteenths of a pixel, angles and shares of 1024 and 256. Street coordinates are (x to the right, y up, s along the
street); the street may bend and rise, and the camera sees that as parabolas about itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

SHIFT = 4
PIXEL = 1 << SHIFT
FARTHEST = 1 << 20  # cm, to any side
NEAR = 60  # cm; what lies nearer to the camera is cut off
TRANSPARENT = 255  # as a texture's class
CURVE = 24  # bits of fraction in `bend` and `rise`
Colour = tuple[int, int, int]


def pack(colour: Colour, label: int) -> int:
    """A colour and its class as one pixel of a `Picture` or a texture."""
    red, green, blue = colour
    return red | green << 8 | blue << 16 | label << 24


CLEAR = pack((0, 0, 0), TRANSPARENT)
SOLID = 255 << 24  # packed pixels from here on are transparent


def texture(size: tuple[int, int], value: int = CLEAR) -> np.ndarray:
    """Packed pixels `(H, W)`; their bytes are in the same order on every machine."""
    return np.full(size, value, dtype="<u4")


def channels(packed: np.ndarray) -> np.ndarray:
    """The same memory as `(H, W, 4)` uint8: red, green, blue, class."""
    return packed.view(np.uint8).reshape(*packed.shape, 4)


class Camera(NamedTuple):
    size: tuple[int, int]  # (H, W) pixels
    focal: int  # sixteenths of a pixel, as both of `centre`
    centre: tuple[int, int]  # where the street vanishes: column, row
    at: tuple[int, int, int]  # street coordinates
    bend: int = 0  # x per s^2, in 2^-24 / cm
    rise: int = 0


class Solid:
    """A convex-sided body: points `(N, 3)` about its foot, and faces as point numbers with the part they belong to.

    Faces are turned so that their normals point away from `middle`, for hidden ones to be left out.
    """

    def __init__(self, points: Sequence[Sequence[int]], faces: Sequence[tuple[Sequence[int], str, int]]) -> None:
        """A face is `(point numbers, part, height of the middle its normal points away from)`."""
        self.points = np.array(points, dtype=np.int64)
        self.parts = [part for _, part, _ in faces]
        self.faces = [self._outward(list(corners), height) for corners, _, height in faces]
        self.firsts = np.array([corners[0] for corners in self.faces])
        first, second, third = self.points[np.array([corners[:3] for corners in self.faces])].swapaxes(0, 1)
        self.normals = np.cross(second - first, third - first)

    def _outward(self, corners: list[int], height: int) -> list[int]:
        first, second, third = self.points[corners[:3]]
        normal = np.cross(second - first, third - first)
        middle = np.array([0, height, 0])
        return corners if (normal * (first - middle)).sum() > 0 else corners[::-1]


class Picture:
    """What the camera sees so far. Later things hide earlier ones: paint from far to near."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.packed = texture(camera.size, 0)
        self.rgba = channels(self.packed)
        self._origin = np.array(camera.at, dtype=np.int64)
        self._focal = np.array([camera.focal, -camera.focal], dtype=np.int64)
        self._centre = np.array(camera.centre, dtype=np.int64)
        self._curve = np.array([camera.bend, camera.rise], dtype=np.int64)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Street coordinates `(..., 3)` as the camera's (right, up, away)."""
        placed = points - self._origin
        away = placed[..., 2:]
        placed[..., :2] += self._curve * (away * away) >> CURVE
        return placed

    def pixels(self, placed: np.ndarray) -> np.ndarray:
        """Camera coordinates `(..., 3)`, none nearer than NEAR, on the picture: `(..., 2)` int32 sixteenths."""
        flat = placed[..., :2] * self._focal
        flat //= placed[..., 2:]
        flat += self._centre
        return flat.astype(np.int32)

    def spot(self, x: int, y: int, s: int) -> tuple[int, int, int]:
        """A point's column and row in sixteenths of a pixel, and its distance away; the point lies beyond NEAR."""
        right, up, away = self.offset(x, y, s)
        column, row = self.camera.centre
        return column + right * self.camera.focal // away, row - up * self.camera.focal // away, away

    def offset(self, x: int, y: int, s: int) -> tuple[int, int, int]:
        """A point as the camera's (right, up, away)."""
        camera = self.camera
        away = s - camera.at[2]
        return (
            x - camera.at[0] + (camera.bend * away * away >> CURVE),
            y - camera.at[1] + (camera.rise * away * away >> CURVE),
            away,
        )

    def fill(self, outlines: Sequence[np.ndarray], colour: Colour, label: int) -> None:
        """Outlines `(N, 2)` int32 in sixteenths of a pixel; where an even number of them overlap there is a hole."""
        cv2.fillPoly(self.rgba, outlines, (*colour, label), cv2.LINE_8, SHIFT)

    def polygons(self, points: np.ndarray, colour: Colour, label: int) -> None:
        """Polygons `(N, M, 3)` in street coordinates that do not overlap each other."""
        placed = self.place(points)
        before = bool(placed[..., 2].min() >= NEAR)
        outlines = list(self.pixels(placed)) if before else self.outlines(list(points))
        if outlines:
            self.fill(outlines, colour, label)

    def outlines(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those of some polygons `(M, 3)` before the camera, cut at NEAR, as `(M, 2)` on the picture."""
        if not len(polygons):
            return []
        placed = self.place(np.concatenate(polygons).astype(np.int64))
        starts = np.cumsum([0, *(len(polygon) for polygon in polygons)])
        nearest = np.minimum.reduceat(placed[:, 2], starts[:-1]).tolist()
        # What lies before NEAR is projected from there, and thrown away.
        flat = self.pixels(np.maximum(placed, (-FARTHEST, -FARTHEST, NEAR)))
        found = []
        for near, start, stop in zip(nearest, starts.tolist(), starts[1:].tolist(), strict=False):
            if near >= NEAR:
                found.append(flat[start:stop])
            elif placed[start:stop, 2].max() > NEAR:
                found.append(self.pixels(_cut(placed[start:stop])))
        return found

    def flat(self, at: tuple[int, int, int], shapes: Sequence[tuple[Sequence[np.ndarray], Colour]], label: int) -> None:
        """Shapes `(N, 2)` (right, up) about a place, upright and facing the camera."""
        if self.offset(*at)[2] < NEAR:
            return
        column, row, away = self.spot(*at)
        for outlines, colour in shapes:
            scaled = [outline * self.camera.focal // away for outline in outlines]
            self.fill([(_MIRROR * outline + (column, row)).astype(np.int32) for outline in scaled], colour, label)

    def solid(
        self, at: tuple[int, int, int], turn: tuple[int, int], body: Solid, colours: dict[str, list[Colour]], label: int
    ) -> None:
        """A body turned by `turn` (cosine, sine of 1024); `colours[part]` are those of its top, front, left and right.

        Parts without colours are left out.
        """
        cosine, sine = turn
        spin = np.array([(cosine, 0, -sine), (0, 1024, 0), (sine, 0, cosine)])
        placed = self.place((body.points @ spin >> 10) + np.array(at))
        if placed[:, 2].max() <= NEAR:
            return
        normals = body.normals @ spin
        towards = ((normals * placed[body.firsts]).sum(axis=1) < 0).tolist()
        sides = _sides(normals)
        whole = bool(placed[:, 2].min() >= NEAR)
        flat = self.pixels(placed) if whole else placed
        for corners, part, shown, side in zip(body.faces, body.parts, towards, sides, strict=True):
            if shown and part in colours:
                outline = flat[corners]
                if not whole:
                    if outline[:, 2].max() <= NEAR:
                        continue
                    outline = self.pixels(_cut(outline))
                cv2.fillPoly(self.rgba, [outline], (*colours[part][side], label), cv2.LINE_8, SHIFT)

    def wall(
        self,
        ends: tuple[tuple[int, int], tuple[int, int]],
        heights: tuple[int, int],
        pixels: np.ndarray,
        tones: np.ndarray | None = None,
        holes: int | None = None,
    ) -> None:
        """An upright wall from (x, s) to (x, s), first and last column of a texture; transparent ones are not painted.

        `tones` `(1, 256, 4)` uint8 is what light and air make of the texture's bytes: looked up for what is seen of it,
        a third as much. With `holes`, transparent pixels take that class and keep the colour of what is seen through
        them.
        """
        low, high = heights
        (x, s), (end_x, end_s) = ends
        left = _End(*self.offset(x, low, s), 0)
        right = _End(*self.offset(end_x, low, end_s), pixels.shape[1] << 8)
        if max(left.away, right.away) <= NEAR:
            return
        left, right = left.cut(right), right.cut(left)
        focal, (column, row) = self.camera.focal, self.camera.centre
        start, stop = (column + end.right * focal // end.away for end in (left, right))
        if start > stop:
            left, right, start, stop = right, left, stop, start
        height, width = self.camera.size
        first, last = max(0, start + PIXEL // 2 - 1 >> SHIFT), min(width, stop + PIXEL // 2 - 1 >> SHIFT)
        if first >= last:
            return
        along = np.arange(first, last, dtype=np.int64) * PIXEL + PIXEL // 2 - start
        whole = stop - start
        # 1 / distance is linear on the picture, so the place on the wall is not.
        share = along * left.away
        share_of = (whole - along) * right.away + share
        columns = left.texel + (right.texel - left.texel) * share // share_of >> 8
        np.minimum(columns, pixels.shape[1] - 1, out=columns)  # the very end, seen from the other side
        tops, feet = ([row - (end.up + rise) * focal // end.away for end in (left, right)] for rise in (high - low, 0))
        top = tops[0] + (tops[1] - tops[0]) * along // whole
        foot = feet[0] + (feet[1] - feet[0]) * along // whole
        above = max(0, int(top.min()) + PIXEL // 2 - 1 >> SHIFT)
        below = min(height, int(foot.max()) + PIXEL // 2 - 1 >> SHIFT)
        if above >= below:
            return
        texels, wide = pixels.shape
        span = np.maximum(1, foot - top)
        step = ((texels << 20) // span).astype(np.int32)
        rows = np.arange(above, below, dtype=np.int32)[:, None] * PIXEL + PIXEL // 2
        depth = rows - top.astype(np.int32)
        drawn = depth.view(np.uint32) < span.astype(np.uint32)  # what lies above is a large number, unsigned
        depth *= step  # 31 bits at most where it is drawn; elsewhere it may wrap
        depth >>= 20
        depth *= wide
        depth += columns.astype(np.int32)
        found = pixels.ravel().take(depth, mode="clip")
        if tones is not None:
            seen = channels(found)
            cv2.LUT(seen, tones, seen)
        if holes is not None:
            self.rgba[above:below, first:last, 3][drawn] = holes
        # A texture without holes that has gaps has some at its upper edge.
        if holes is not None or int(pixels[0].max()) >= SOLID:
            drawn &= found < SOLID
        np.copyto(self.packed[above:below, first:last], found, where=drawn)

    def sprite(self, box: tuple[int, int, int, int], planes: Sequence[np.ndarray], colours: np.ndarray) -> None:
        """A square sprite in a box (left, top, right, bottom) of pixels, which may reach over the picture's edges.

        `planes` are what it covers of the background (of 255), its level, and where its class holds (not 0), uint8;
        `colours` `(256,)` packed pixels, one a level.
        """
        left, top, right, bottom = box
        height, width = self.camera.size
        first, last = max(0, left), min(width, right)
        above, below = max(0, top), min(height, bottom)
        if first >= last or above >= below:
            return
        side = len(planes[0])
        rows = (np.arange(above, below) - top) * side // (bottom - top)
        columns = (np.arange(first, last) - left) * side // (right - left)
        index = rows[:, None] * side + columns
        cover, level, reach = (plane.ravel().take(index) for plane in planes)
        drawn = colours[level]
        behind = self.rgba[above:below, first:last]
        if planes[2] is planes[0]:
            np.copyto(self.packed[above:below, first:last], drawn, where=cover > 127)
            return
        share = cover[..., None].astype(np.int16) + (cover[..., None] > 127)
        seen = behind[..., :3].astype(np.int16)
        seen += ((channels(drawn)[..., :3] - seen).astype(np.int32) * share >> 8).astype(np.int16)
        behind[..., :3] = seen
        np.copyto(behind[..., 3], channels(drawn)[..., 3], where=reach > 40)


class _End(NamedTuple):
    right: int
    up: int
    away: int
    texel: int

    def cut(self, other: _End) -> _End:
        """Moved to NEAR where it lies before it."""
        if self.away >= NEAR:
            return self
        share, of = NEAR - self.away, other.away - self.away
        moved = [mine + (its - mine) * share // of for mine, its in zip(self, other, strict=True)]
        return _End(moved[0], moved[1], NEAR, moved[3])


_MIRROR = np.array([1, -1])


def _cut(polygon: np.ndarray) -> np.ndarray:
    """The part of a polygon `(N, 3)` beyond NEAR (Sutherland and Hodgman 1974, one plane)."""
    points = polygon.tolist()
    kept = []
    for last, point in zip([points[-1], *points[:-1]], points, strict=True):
        if (last[2] >= NEAR) != (point[2] >= NEAR):
            share, of = NEAR - last[2], point[2] - last[2]
            x, y = (a + (b - a) * share // of for a, b in zip(last[:2], point[:2], strict=True))
            kept.append([x, y, NEAR])
        if point[2] >= NEAR:
            kept.append(point)
    return np.array(kept, dtype=np.int64)


def _sides(normals: np.ndarray) -> list[int]:
    """0 top, 1 front, 2 looking left, 3 looking right: what light falls on a face."""
    x, y, away = normals.T
    flat = np.abs(y) * 5 > (np.abs(x) + np.abs(away)) * 4
    across = np.abs(x) > np.abs(away)
    return np.where(flat, 0, np.where(across, np.where(x < 0, 2, 3), 1)).tolist()

"""A pinhole camera in a street, and the picture it paints: colour and class in one array, so that both always agree.

Ours, because the pixels have to be a pure function of integers: renderers draw with floats, which round differently on
every GPU and CPU, and none paints an exact class map beside the colours. Lengths are centimetres, places on the picture
sixteenths of a pixel, angles and shares of 1024 and 256. Street coordinates are (x to the right, y up, s along the
street); the street may bend and rise, and the camera sees that as parabolas about itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

SHIFT = 4
PIXEL = 1 << SHIFT
FARTHEST = 1 << 20  # cm, to any side
NEAR = 60  # cm; what lies nearer to the camera is cut off
TRANSPARENT = 255  # as a texture's class
TOP, FRONT, LEFT, RIGHT = range(4)  # where a face looks: up, to the camera, to its left, to its right
CURVE = 24  # bits of fraction in `bend` and `rise`
Colour = tuple[int, int, int]
Place = TypeVar("Place", int, np.ndarray)  # one coordinate: of a point, or of many
Part = tuple[slice, slice]  # rows and columns of a texture
Ends = tuple[tuple[int, int], tuple[int, int]]


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


def split(pixels: np.ndarray) -> Sequence[np.ndarray]:
    """Each channel of `(H, W, C)` copied to an array of its own; OpenCV's annotation would allow floats too."""
    return cv2.split(pixels)


def centre(place: Place) -> Place:
    """The first pixel whose middle lies at or after a place in sixteenths."""
    return place + PIXEL // 2 - 1 >> SHIFT


class Camera(NamedTuple):
    size: tuple[int, int]  # (H, W) pixels
    focal: int  # sixteenths of a pixel, as both of `centre`
    centre: tuple[int, int]  # where the street vanishes: column, row
    at: tuple[int, int, int]  # street coordinates
    bend: int = 0  # x per s^2, in 2^-24 / cm
    rise: int = 0

    def offset(self, x: Place, y: Place | int, s: Place) -> tuple[Place, Place, Place]:
        """A place as the camera's (right, up, away): numbers, or arrays of them."""
        away = s - self.at[2]
        return (
            x - self.at[0] + (self.bend * away * away >> CURVE),
            y - self.at[1] + (self.rise * away * away >> CURVE),
            away,
        )


class Solid:
    """A convex-sided body: points `(3, N)` about its foot, and faces as runs of them with the part they belong to.

    Faces are turned so that their normals `(3, F)` point away from `middle`, for hidden ones to be left out.
    """

    def __init__(self, points: Sequence[Sequence[int]], faces: Sequence[tuple[Sequence[int], str, int]]) -> None:
        """A face is `(point numbers, part, height of the middle its normal points away from)`."""
        given = np.array(points, dtype=np.int64)
        turned = [_outward(given[list(corners)], height) for corners, _, height in faces]
        self.points = np.ascontiguousarray(np.concatenate(turned).T)
        self.parts = [part for _, part, _ in faces]
        ends = np.cumsum([len(face) for face in turned])
        self.firsts: np.ndarray = ends - [len(face) for face in turned]
        self.runs = [slice(first, end) for first, end in zip(self.firsts.tolist(), ends.tolist(), strict=True)]
        self.normals = np.ascontiguousarray(np.array([_normal(face) for face in turned]).T)


def _normal(face: np.ndarray) -> np.ndarray:
    return np.cross(face[1] - face[0], face[2] - face[0])


def _outward(face: np.ndarray, height: int) -> np.ndarray:
    middle = np.array([0, height, 0])
    return face if (_normal(face) * (face[0] - middle)).sum() > 0 else face[::-1]


class Picture:
    """What the camera sees so far. Later things hide earlier ones: paint from far to near."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.packed = texture(camera.size, 0)
        self.rgba = channels(self.packed)
        height, width = camera.size
        self._rows = np.arange(height, dtype=np.int32)[:, None] * PIXEL + PIXEL // 2  # their middles
        self._columns = np.arange(width, dtype=np.int64) * PIXEL + PIXEL // 2
        self._origin = np.array(camera.at, dtype=np.int64)
        self._focal = np.array([camera.focal, -camera.focal], dtype=np.int64)
        self._centre = np.array(camera.centre, dtype=np.int64)
        self._curved = bool(camera.bend or camera.rise)
        self._curve = np.array([camera.bend, camera.rise], dtype=np.int64)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Street coordinates `(..., 3)` as the camera's (right, up, away)."""
        placed = points - self._origin
        if self._curved:
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
        right, up, away = self.camera.offset(x, y, s)
        column, row = self.camera.centre
        return column + right * self.camera.focal // away, row - up * self.camera.focal // away, away

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

    def polygon(self, points: Sequence[tuple[int, int, int]], colour: Colour, label: int) -> None:
        """A polygon in street coordinates, of few points: `polygons` takes longer to begin."""
        placed = [self.camera.offset(*point) for point in points]
        nearest = min(away for _, _, away in placed)
        if nearest >= NEAR:
            focal, (column, row) = self.camera.focal, self.camera.centre
            outline = [(column + right * focal // away, row + -up * focal // away) for right, up, away in placed]
            self.fill([np.array(outline, dtype=np.int32)], colour, label)
        else:
            self.polygons(np.array([points]), colour, label)

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
        if self.camera.offset(*at)[2] < NEAR:
            return
        column, row, away = self.spot(*at)
        points = np.concatenate([outline for outlines, _ in shapes for outline in outlines])
        points = (points * self.camera.focal // away * _MIRROR + (column, row)).astype(np.int32)
        first = 0
        for outlines, colour in shapes:
            placed = []
            for outline in outlines:
                placed.append(points[first : first + len(outline)])
                first += len(outline)
            self.fill(placed, colour, label)

    def solid(
        self,
        at: tuple[int, int, int],
        turn: tuple[int, int],
        body: Solid,
        colour: Callable[[str, int], Colour | None],
        label: int,
    ) -> None:
        """A body turned by `turn` (cosine, sine of 1024); `colour(part, side)` for side TOP, FRONT, LEFT or RIGHT.

        Parts without a colour are left out.
        """
        cosine, sine = turn
        spin = np.array([(cosine, 0, sine), (0, 1024, 0), (-sine, 0, cosine)])
        turned = (spin @ body.points >> 10) + np.array(at)[:, None]
        placed = np.stack(self.camera.offset(*turned))
        away = placed[2]
        if away.max() <= NEAR:
            return
        normals = spin @ body.normals
        towards = ((normals * placed[:, body.firsts]).sum(axis=0) < 0).tolist()
        sides = _sides(normals)
        whole = bool(away.min() >= NEAR)
        flat = self.pixels(placed.T) if whole else placed.T
        for run, part, shown, side in zip(body.runs, body.parts, towards, sides, strict=True):
            tone = colour(part, side) if shown else None
            if tone is None:
                continue
            outline = flat[run]
            if not whole:
                if outline[:, 2].max() <= NEAR:
                    continue
                outline = self.pixels(_cut(outline))
            cv2.fillPoly(self.rgba, [outline], (*tone, label), cv2.LINE_8, SHIFT)

    def wall(
        self,
        ends: Ends,
        heights: tuple[int, int],
        size: tuple[int, int],
        draw: Callable[[Part], np.ndarray],
        tones: np.ndarray | None = None,
        holes: int | None = None,
    ) -> None:
        """An upright wall from (x, s) to (x, s), first and last column of a texture; transparent ones are not painted.

        `draw` makes the part of the texture, `(rows, columns)` as a whole, that is seen. `tones` `(1, 256, 4)` uint8 is
        what light and air make of the texture's bytes: looked up for what is seen of it, a third as much. With `holes`,
        transparent pixels take that class and keep the colour of what is seen through them.
        """
        low, high = heights
        (x, s), (end_x, end_s) = ends
        tall, wide = size
        left, right = _End(*self.camera.offset(x, low, s), 0), _End(*self.camera.offset(end_x, low, end_s), wide << 8)
        if max(left.away, right.away) <= NEAR:
            return
        left, right = left.cut(right), right.cut(left)
        focal, (column, row) = self.camera.focal, self.camera.centre
        start, stop = column + left.right * focal // left.away, column + right.right * focal // right.away
        if start > stop:
            left, right, start, stop = right, left, stop, start
        height, width = self.camera.size
        first, last = max(0, centre(start)), min(width, centre(stop))
        if first >= last:
            return
        along = self._columns[first:last] - start
        whole = stop - start
        feet = [row - end.up * focal // end.away for end in (left, right)]
        tops = [row - (end.up + high - low) * focal // end.away for end in (left, right)]
        top = tops[0] + (tops[1] - tops[0]) * along // whole
        span = np.maximum(1, feet[0] + (feet[1] - feet[0]) * along // whole - top)
        # All that follows from a column's place changes one way only: what is seen is found at the ends.
        edge, end_edge = int(top[0]), int(top[-1])
        of, end_of = int(span[0]), int(span[-1])
        above, below = max(0, centre(min(edge, end_edge))), min(height, centre(max(edge + of, end_edge + end_of)))
        if above >= below:
            return
        # 1 / distance is linear on the picture, so the place on the wall is not.
        share = along * left.away
        share_of = (whole - along) * right.away + share
        columns = left.texel + (right.texel - left.texel) * share // share_of >> 8
        np.minimum(columns, wide - 1, out=columns)  # the very end, seen from the other side
        leftmost, rightmost = sorted((int(columns[0]), int(columns[-1])))
        highest = min((above * PIXEL - edge) * tall // of, (above * PIXEL - end_edge) * tall // end_of) - 2
        lowest = max((below * PIXEL - edge) * tall // of, (below * PIXEL - end_edge) * tall // end_of) + 3
        part = slice(max(0, highest), min(tall, lowest)), slice(leftmost, rightmost + 1)
        pixels = draw(part)

        step = ((tall << 20) // span).astype(np.int32)
        depth = self._rows[above:below] - top.astype(np.int32)
        drawn = depth.view(np.uint32) < span.astype(np.uint32)  # what lies above is a large number, unsigned
        depth *= step  # 31 bits at most where it is drawn; elsewhere it may wrap
        depth >>= 20
        depth *= pixels.shape[1]
        depth += (columns - (leftmost + part[0].start * pixels.shape[1])).astype(np.int32)
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

    def sprite(self, box: tuple[int, int, int, int], planes: np.ndarray, colours: np.ndarray, solid: bool) -> None:
        """A square sprite in a box (left, top, right, bottom) of pixels, which may reach over the picture's edges.

        `planes` `(side, side)` pack three bytes: what it covers of the background (of 255), its level, and where its
        class holds (not 0). `colours` `(256,)` are packed pixels, one a level. A `solid` one is not blended.
        """
        left, top, right, bottom = box
        height, width = self.camera.size
        first, last = max(0, left), min(width, right)
        above, below = max(0, top), min(height, bottom)
        if first >= last or above >= below:
            return
        side = len(planes)
        rows = (np.arange(above, below) - top) * side // (bottom - top) * side
        columns = (np.arange(first, last) - left) * side // (right - left)
        cover, level, reach, _ = split(channels(planes.ravel().take(rows[:, None] + columns)))
        if solid:
            np.copyto(self.packed[above:below, first:last], colours.take(level), where=cover > 127)
            return
        behind = self.rgba[above:below, first:last]
        *seen, label = split(behind)
        # At 256 for 1, a product with a byte fits 16 bits.
        share = cover + (cover > 127).astype(np.uint16)
        rest = 256 - share
        for plane, tones in zip(seen, channels(colours).T, strict=False):
            mixed: np.ndarray = share * cv2.LUT(level, np.ascontiguousarray(tones))
            mixed += rest * plane
            plane[:] = mixed >> 8
        label[reach > 40] = colours[0] >> 24
        behind[:] = cv2.merge([*seen, label])


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
    """Of TOP, FRONT, LEFT, RIGHT: what light falls on a face."""
    x, y, away = normals
    flat = np.abs(y) * 5 > (np.abs(x) + np.abs(away)) * 4
    across = np.abs(x) > np.abs(away)
    return np.where(flat, TOP, np.where(across, np.where(x < 0, LEFT, RIGHT), FRONT)).tolist()

"""What of a street is seen at all: half of it stands behind houses and cars, and need not be painted.

Ours, as the pictures are: what is left out here must not change a pixel of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ssl_seg.worlds.street.perspective import NEAR, PIXEL, SHIFT, Camera, centre

# Both end with whether OpenCV fills it.
Face = tuple[int, int, int, int, int, int, bool]  # (x, s) to (x, s), y from and to
Box = tuple[int, int, int, int, int, int, bool]  # x, s and y from and to


class Thing(NamedTuple):
    """Something upright in a street.

    `outline` is (x, s) to (x, s), its height, and up to which height a house hides all that stands behind it; `box` all
    that is painted of it: x, s and y from and to. Nothing is seen through its `faces`.
    """

    outline: tuple[int, int, int, int, int, int]
    box: Box
    paint: Callable[[], None]
    faces: Sequence[Face] = ()


def seen(things: Sequence[Thing], camera: Camera) -> list[Thing]:
    """The things that no house hides, and that nearer things do not cover, far ones first."""
    if not things:
        return []
    height, width = camera.size
    columns = np.arange(width) << SHIFT
    # Houses stand from the ground up to this row. Slivers that are seen past their edges go with the rest: what the
    # pictures show is defined so, while the mask only saves work.
    skyline = np.full(width, height)
    covered = np.zeros(camera.size, dtype=np.uint8)
    faces = covers(things, camera)
    found = []
    for number, outline, box in zip(*places(things, camera), strict=True):
        first, last, top, house, start, whole, high, rise = outline
        if skyline[first:last].max() <= top:
            continue
        if house and last - first > 4:
            edge = (high + rise * (columns[first + 2 : last - 2] - start) // whole >> SHIFT) + 1
            part = skyline[first + 2 : last - 2]
            np.minimum(part, edge, out=part)
        left, above, right, below = box
        part = covered[above:below, left:right]
        if cv2.countNonZero(part) == part.size:
            continue
        found.append(things[number])
        for corners in faces.get(number, ()):
            cv2.fillConvexPoly(covered, corners, 1, cv2.LINE_8, SHIFT)
    return found[::-1]


def places(things: Sequence[Thing], camera: Camera) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Things that stand in the picture, near ones first: their numbers, outlines and boxes in its pixels."""
    height, width = camera.size
    x, s, end_x, end_s, tall, house = _columns([thing.outline for thing in things])
    left, right, near, far, low, high, by_opencv = _columns([thing.box for thing in things])

    ends = np.stack([x, end_x])
    column, base, away = _project(camera, *camera.offset(ends, 0, np.stack([s, end_s])))
    top = (base - tall * camera.focal // away).min(axis=0) >> SHIFT
    edge = base - house * camera.focal // away
    turned = column[0] > column[1]
    column[:, turned], edge[:, turned] = column[::-1, turned], edge[::-1, turned]
    (start, stop), (edge, end_edge) = column, edge
    first, last = np.maximum(0, (start >> SHIFT) - 1), np.minimum(width, (stop >> SHIFT) + 2)
    outlines = np.stack([first, last, top, house, start, np.maximum(1, stop - start), edge, end_edge - edge])

    # A box has its corners at both distances, and is cut where it reaches behind the camera.
    corners = np.stack([near, far, near, far])
    offset = camera.offset(np.stack([left, left, right, right]), np.stack([low, low, high, high]), corners)
    column, row, _ = _project(camera, *offset)
    starts = np.stack([column.min(axis=0), row.min(axis=0)])
    ends = np.stack([column.max(axis=0), row.max(axis=0)])
    # OpenCV counts from the middles of pixels and paints the edges too.
    starts = np.where(by_opencv, starts >> SHIFT, centre(starts))
    ends = np.where(by_opencv, (ends + PIXEL // 2 + 2 >> SHIFT) + 1, centre(ends))
    ends[1, offset[2].min(axis=0) <= NEAR] = height
    boxes = np.concatenate([starts, ends])
    np.maximum(boxes, 0, out=boxes)

    order = np.lexsort((-np.arange(len(things)), np.maximum(s, end_s)))
    order = order[(first < last)[order]]
    return order.tolist(), outlines.T[order].tolist(), boxes.T[order].tolist()


def covers(things: Sequence[Thing], camera: Camera) -> dict[int, list[np.ndarray]]:
    """By thing, what its faces cover of the picture at least: corners `(4, 2)` for OpenCV, in sixteenths of a pixel."""
    owners = [number for number, thing in enumerate(things) for _ in thing.faces]
    if not owners:
        return {}
    x, s, end_x, end_s, low, high, by_opencv = _columns([face for thing in things for face in thing.faces])
    across, up, away = camera.offset(np.stack([x, end_x]), low, np.stack([s, end_s]))
    before = away.max(axis=0) > NEAR
    # Ends nearer than NEAR are moved towards the other one.
    share = np.maximum(0, NEAR - away)
    of = np.maximum(1, away[::-1] - away)
    across, up = (place + (place[::-1] - place) * share // of for place in (across, up))
    column, foot, _ = _project(camera, across, up, away)
    _, top, _ = _project(camera, across, up + high - low, away)
    ends = np.stack([column, top, foot])
    turned = column[0] > column[1]
    ends[:, :, turned] = ends[:, ::-1, turned]
    # OpenCV counts from the middles of pixels, `Picture.wall` from their corners.
    (start, stop), top, foot = ends + by_opencv * (PIXEL // 2)

    first, last = np.maximum(0, centre(start)), np.minimum(camera.size[1], centre(stop)) - 1
    wide = last - first
    whole = np.maximum(1, stop - start)
    columns = np.stack([first, last]) * PIXEL
    along = columns + PIXEL // 2 - start
    corners = []
    for (edge, end_edge), inwards in ((top, 1), (foot, -1)):
        rows = edge + (end_edge - edge) * along // whole
        # The edge itself is painted too, half a pixel to both sides of where it is steeper.
        inset = PIXEL // 2 + 2 + abs(rows[1] - rows[0]) // np.maximum(1, 2 * wide)
        corners.append(rows - PIXEL // 2 + inwards * inset)
    (high, end_high), (low, end_low) = corners
    quads = np.stack([columns[0], high, columns[1], end_high, columns[1], end_low, columns[0], low], axis=1)
    kept = np.flatnonzero(before & (wide >= 2) & (high <= low) & (end_high <= end_low)).tolist()
    quads = quads.astype(np.int32).reshape(-1, 4, 2)
    found: dict[int, list[np.ndarray]] = {}
    for number in kept:
        found.setdefault(owners[number], []).append(quads[number])
    return found


def _columns(rows: Sequence[tuple[int, ...]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).T


def _project(
    camera: Camera, right: np.ndarray, up: np.ndarray, away: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns and rows on the picture, and the distance; what is nearer than NEAR is seen from there."""
    away = np.maximum(away, NEAR)
    return camera.centre[0] + right * camera.focal // away, camera.centre[1] - up * camera.focal // away, away

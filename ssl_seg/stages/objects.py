"""The objects of predicted masks: pixels of one class that hang together, with their areas, boxes and centroids.

OpenCV finds them. They are counted in masks that are written, so a folder that was made in several goes has one table.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import cv2
import numpy as np
from pydantic import BeforeValidator, Field

from ssl_seg import files, images
from ssl_seg.config import Config
from ssl_seg.runs.folder import Records

TABLE = "objects.csv"  # a row an object
SUMMARY = "objects.json"  # how many there are of each class


class Objects(Config):
    """Which objects are listed."""

    # Pixels; smaller ones are dust. 16 are one pixel of a map of stride 4, which is the finest that most decoders draw.
    smallest: int = Field(default=16, ge=1)
    neighbours: Literal[8, 4] = 8  # whether pixels that touch at a corner hang together: by 4 a thin line falls apart
    classes: tuple[str, ...] = ()  # those that are listed; none: all, the background too


def _true_is_all(value: Any) -> Any:
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


ObjectsField = Annotated[Objects | None, BeforeValidator(_true_is_all)]  # `true` stands for the defaults


class Found(NamedTuple):
    """One object: a row of the table."""

    image: str
    of_class: str
    # Of the class in the image, from 1 on: from top to bottom, then from left to right, by the boxes' corners.
    number: int
    area: int  # pixels
    x0: int
    y0: int
    x1: int  # one past the last column
    y1: int  # and row
    centre_x: float  # 0 is the middle of the first column
    centre_y: float


COLUMNS = tuple("class" if name == "of_class" else name for name in Found._fields)


def find_objects(ids: np.ndarray, image: str, class_names: Sequence[str], wanted: Objects) -> list[Found]:
    """Those in a mask `(H, W)` uint8, class by class."""
    found = []
    for class_id, count in enumerate(np.bincount(ids.ravel(), minlength=len(class_names))):
        name = class_names[class_id]
        if count < wanted.smallest or (wanted.classes and name not in wanted.classes):
            continue
        own = (ids == class_id).astype(np.uint8)
        _, _, stats, centroids = cv2.connectedComponentsWithStats(own, connectivity=wanted.neighbours)
        listed = [
            (int(top), int(left), int(width), int(height), int(area), x, y)
            for (left, top, width, height, area), (x, y) in zip(stats[1:], centroids[1:], strict=True)
            if area >= wanted.smallest
        ]
        for number, (top, left, width, height, area, x, y) in enumerate(sorted(listed), start=1):
            box = (left, top, left + width, top + height)
            found.append(Found(image, name, number, area, *box, round(float(x), 2), round(float(y), 2)))
    return found


def write_objects(
    place: Records, masks: Mapping[str, Path], class_names: Sequence[str], wanted: Objects
) -> dict[str, int]:
    """Write the table and the summary of `masks`, by the names of their images; gives how many each class has."""
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    listed = wanted.classes or tuple(class_names)
    summary = {name: {"objects": 0, "images": 0, "pixels": 0} for name in listed}
    for image, path in masks.items():
        found = find_objects(images.read_mask(path), image, class_names, wanted)
        table.writerows(found)
        _add(summary, found)
    files.write_atomic(place.folder / TABLE, text.getvalue().encode("utf-8", "surrogateescape"))
    place.write_json(SUMMARY, {**wanted.dump(), "images": len(masks), "per_class": summary})
    return {name: counts["objects"] for name, counts in summary.items()}


def _add(summary: Mapping[str, dict[str, int]], found: Iterable[Found]) -> None:
    """Count the objects of one image; `images` of a class are those that show one at least."""
    seen = set()
    for one in found:
        counts = summary[one.of_class]
        counts["objects"] += 1
        counts["pixels"] += one.area
        counts["images"] += one.of_class not in seen
        seen.add(one.of_class)

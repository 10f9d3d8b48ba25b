"""How well the outlines of a segmentation fit: Boundary IoU and the 95th percentile of the Hausdorff distance.

Both are of one class against all the rest. Ignored pixels of the label are of no class, in the prediction too, so along
them both have one outline.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from ssl_seg.config import UserError
from ssl_seg.scores import mean_iou

FILE = "contours.csv"  # in a run folder, and in what `evaluate --out` writes
# How deep a boundary reaches into its mask, as a share of the image's diagonal: Cheng et al., "Boundary IoU: improving
# object-centric image segmentation evaluation" (CVPR 2021), section 4.
DILATION_RATIO = 0.02
PERCENTILE = 95
IGNORE_INDEX = 255  # of a label
Shown = Literal["both", "truth", "prediction"]


class Contour(NamedTuple):
    """One class of one image that occurs in the truth or in the prediction: a row of the table."""

    image: str
    of_class: str
    shown_in: Shown
    boundary_hits: int  # pixels of both boundaries
    boundary_union: int  # pixels of one of them or both, at least 1
    hd95: float  # pixels; the image's diagonal where only one of them shows the class

    @property
    def boundary_iou(self) -> float:
        return self.boundary_hits / self.boundary_union


COLUMNS = ("part", "image", "class", "in", "boundary_hits", "boundary_union", "boundary_iou", "hd95")


def inner_boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask `(H, W)` bool that lie within DILATION_RATIO of the diagonal of its outline, as bool.

    That is the mask less what is left when it is eroded so often by 3 x 3 pixels. Where the image cuts it off it has an
    outline too: as `mask_to_boundary` of the authors' code (boundary_iou_api, utils/boundary_utils.py).
    """
    height, width = mask.shape
    times = max(1, round(DILATION_RATIO * math.hypot(height, width)))
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inside = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=times)[1:-1, 1:-1]
    return mask & (inside == 0)


def boundary_overlap(truth: np.ndarray, prediction: np.ndarray) -> tuple[int, int]:
    """Pixels in the intersection and in the union of the inner boundaries of two masks `(H, W)` bool."""
    of_truth, of_prediction = inner_boundary(truth), inner_boundary(prediction)
    return int((of_truth & of_prediction).sum()), int((of_truth | of_prediction).sum())


def hausdorff_95(truth: np.ndarray, prediction: np.ndarray) -> float:
    """The larger of two 95th percentiles, of the distances from one outline's pixels to the nearest of the other.

    In pixels, Euclidean, percentiles interpolated linearly; masks are `(H, W)` bool. An outline is those pixels of a
    mask that touch another pixel, or the image's edge, by a side. The image's diagonal where one mask is empty, for no
    distance in it is larger and leaving such images out would reward finding nothing; 0 where both are.

    >>> square = np.zeros((40, 40), dtype=bool)
    >>> square[5:25, 5:25] = True
    >>> hausdorff_95(square, square), hausdorff_95(square, np.roll(square, 3, axis=1))
    (0.0, 3.0)
    """
    if not (truth.any() and prediction.any()):
        return math.hypot(*truth.shape) if truth.any() or prediction.any() else 0.0
    both = truth | prediction
    rows, columns = (np.flatnonzero(both.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    outlines = [_outline(mask[box]) for mask in (truth, prediction)]
    one_way = np.percentile(_distances(outlines[0], outlines[1]), PERCENTILE)
    other_way = np.percentile(_distances(outlines[1], outlines[0]), PERCENTILE)
    return float(max(one_way, other_way))


def _distances(outline: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each pixel of an outline to the nearest of the other, `(N,)` float64."""
    away = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[outline]
    # Their squares are whole numbers. OpenCV's last bit of a root differs from call to call, as the memory lies.
    return np.sqrt(np.rint(away.astype(np.float64) ** 2))


def _outline(mask: np.ndarray) -> np.ndarray:
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inside == 0)


def contours_of(truth: np.ndarray, prediction: np.ndarray, class_names: Sequence[str], image: str) -> list[Contour]:
    """Of the class ids `(H, W)` of an image of that name, class by class, those that occur."""
    counted = truth != IGNORE_INDEX
    found = []
    for class_id, name in enumerate(class_names):
        of_truth, of_prediction = truth == class_id, counted & (prediction == class_id)
        in_truth, in_prediction = bool(of_truth.any()), bool(of_prediction.any())
        if not (in_truth or in_prediction):
            continue
        shown: Shown = "both" if in_truth and in_prediction else "truth" if in_truth else "prediction"
        overlap = boundary_overlap(of_truth, of_prediction)
        found.append(Contour(image, name, shown, *overlap, hausdorff_95(of_truth, of_prediction)))
    return found


@dataclass(frozen=True)
class Contours:
    """Those of a set of images."""

    class_names: tuple[str, ...]
    rows: tuple[Contour, ...]  # image by image, in the data set's order

    def named(self) -> dict[str, float | None]:
        """The figures of a result.json; None for a class that occurs nowhere.

        Boundaries are summed over the images before anything is divided, as in the mIoU. `hd95/<class>` is the mean
        over the images that show the class in truth or prediction, `hd95` the mean of the classes', `hd95_one_sided`
        how many times an image showed a class in one of them alone, which counts as the image's diagonal.
        """
        of_class = {name: [row for row in self.rows if row.of_class == name] for name in self.class_names}
        hits = np.array([sum(row.boundary_hits for row in own) for own in of_class.values()])
        unions = np.array([sum(row.boundary_union for row in own) for own in of_class.values()])
        miou = float(mean_iou(hits, unions))
        distances = {name: _mean([row.hd95 for row in own]) for name, own in of_class.items()}
        known = [distance for distance in distances.values() if distance is not None]
        ious = zip(of_class, hits.tolist(), unions.tolist(), strict=True)
        return {
            "boundary/miou": None if math.isnan(miou) else miou,
            **{f"boundary/iou/{name}": own / union if union else None for name, own, union in ious},
            "hd95": _mean(known),
            "hd95_one_sided": sum(row.shown_in != "both" for row in self.rows),
            **{f"hd95/{name}": distance for name, distance in distances.items()},
        }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def table_bytes(parts: Mapping[str, Contours]) -> bytes:
    """A CSV of the rows of all parts (val, test), which `read_contours` reads back."""
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for part, contours in parts.items():
        for row in contours.rows:
            *first, hd95 = row
            table.writerow([part, *first, repr(row.boundary_iou), repr(hd95)])
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_contours(folder: str | Path, class_names: Sequence[str]) -> dict[str, Contours]:
    """The rows of a run by part; {} where it has none. Raises UserError for a table that is not as it was written."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    parts: dict[str, list[Contour]] = {}
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        for row in csv.DictReader(StringIO(text, newline="")):
            parts.setdefault(row["part"], []).append(_read(row, class_names))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: damaged; score the run's model anew by ssl-seg evaluate contours=true") from error
    return {part: Contours(tuple(class_names), tuple(rows)) for part, rows in parts.items()}


def _read(row: Mapping[str, str], class_names: Sequence[str]) -> Contour:
    """Raises ValueError for what no table of ours holds."""
    hits, union, distance = int(row["boundary_hits"]), int(row["boundary_union"]), float(row["hd95"])
    if row["class"] not in class_names or not 0 <= hits <= union or union < 1 or not 0 <= distance < math.inf:
        raise ValueError("no such row")
    if row["in"] not in ("both", "truth", "prediction"):
        raise ValueError("no such place")
    return Contour(row["image"], row["class"], row["in"], hits, union, distance)

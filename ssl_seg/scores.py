"""What a segmentation confuses, over a whole set and image by image, and every score that follows from it.

Needs no torch, so that whoever compares many runs or resamples images starts at once. Whole sets are summed before
anything is divided.

The scores are ours because libraries disagree about a class that is absent: torchmetrics counts it 0, smp counts it 1,
and both enter the mean. Here it is nan and left out. The file is ours because it is sparse: an image shows a few of the
K * K cells, so 2,000 images of 150 classes take some megabytes where dense matrices would take 360.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ssl_seg.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

IMAGES_FILE = "confusion_images.safetensors"  # in a run folder, and in what `evaluate --out` writes
COLUMNS = ("image", "cell", "count", "band")
BAND = "band"
# How far the band around class boundaries reaches on each side, as a share of the label's diagonal: 4 pixels at 480 x
# 360, 17 at 2048 x 1024. It is the tolerance of Csurka et al., "What is a good evaluation measure for semantic
# segmentation?" (BMVC 2013). The 2 % of Boundary IoU (Cheng et al., CVPR 2021) is meant for single objects: of street
# scenes such a band takes 37 % (CamVid's 101 validation frames; at 0.75 % it is 16 %).
BAND_WIDTH = 0.0075
# How the figures of classes become one; `SegmentationScores.averaged` says what each does.
Average = Literal["macro", "micro", "weighted", "one_vs_rest_micro"]
AVERAGES: tuple[Average, ...] = get_args(Average)


class Row(NamedTuple):
    """What is counted of one image: what processes share."""

    index: int  # the image's place in its data set
    name: str
    cell: np.ndarray  # (E,) those of the K * K that hold pixels
    count: np.ndarray  # (E,) how many each
    band: np.ndarray  # (E,) how many of them lie near a class boundary
    digest: str  # of the pixels of image and label


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """Everything that follows from a confusion matrix; shares in [0, 1], nan where there is nothing to divide by."""

    confusion: np.ndarray  # (K, K) int64 pixels, [truth, prediction]
    iou: np.ndarray  # (K,) float64; nan for a class in neither truth nor prediction
    miou: float  # the mean over classes with union > 0: one that is predicted but absent counts 0
    accuracy: float  # share of the counted pixels that are right
    class_accuracy: np.ndarray  # (K,) float64, the recall; nan for a class that is absent in the truth
    dice: np.ndarray  # (K,) float64, also called F1; nan as for `iou`

    @classmethod
    def from_confusion(cls, counts: Tensor | np.ndarray) -> Self:
        """The scores of a matrix `(K, K)` of pixels; a tensor lies on the CPU."""
        confusion = np.asarray(counts, dtype=np.int64).copy()
        hits = confusion.diagonal()
        truth = confusion.sum(axis=1)
        predicted = confusion.sum(axis=0)
        union = truth + predicted - hits
        iou = _divide(hits, union)
        return cls(
            confusion=confusion,
            iou=iou,
            miou=float(mean_iou(hits, union)),
            accuracy=float(_divide(hits.sum(), confusion.sum())),
            class_accuracy=_divide(hits, truth),
            dice=_divide(2 * hits, truth + predicted),
        )

    def averaged(self, average: Average) -> dict[str, float]:
        """recall (sensitivity), specificity, precision, f1, accuracy and jaccard; nan with nothing to divide by.

        Each class that the mIoU averages is asked against all others: pixels of it that are found (TP) or missed (FN),
        others that are taken for it (FP) or not (TN).

        - macro: the mean of the classes' figures. A class that is predicted but absent has a recall of 0, one that is
          never predicted a precision of 0. A class that all pixels are of has no specificity, and is left out there.
        - weighted: the same, each class by its pixels in the truth.
        - one_vs_rest_micro: the four counts summed over the classes, and then divided. Each wrong pixel is one FP and
          one FN, so recall, precision and f1 are all the pixel accuracy; and of K classes it is a TN of K - 2, so that
          specificity and accuracy are near 1 whatever is predicted.
        - micro: a pixel is one answer, right or wrong, and not one a class. There is no TN then, so no specificity, and
          the accuracy is that of the pixels.
        """
        truth, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        occurs = truth + predicted > 0
        found = self.confusion.diagonal()[occurs]
        wrong = predicted[occurs] - found
        missed = truth[occurs] - found
        rest = self.confusion.sum() - found - wrong - missed
        if average in ("macro", "weighted"):
            weights = truth[occurs] if average == "weighted" else np.ones(len(found))
            figures = _figures(found, wrong, missed, rest)
            figures |= {name: np.nan_to_num(figures[name]) for name in ("recall", "precision")}
            return {name: _weighted_mean(values, weights) for name, values in figures.items()}
        summed = _figures(found.sum(), wrong.sum(), missed.sum(), rest.sum())
        if average == "micro":
            summed |= {"specificity": np.nan, "accuracy": self.accuracy}
        return {name: float(value) for name, value in summed.items()}


@dataclass(frozen=True, eq=False)
class ImageConfusions:
    """The confusion matrix of each of N images, as the cells that hold pixels: E entries in three columns.

    Entries are ordered by image, then by cell, and each (image, cell) comes once, so equal matrices are equal arrays.
    """

    class_names: tuple[str, ...]  # K
    names: tuple[str, ...]  # N, the images' in their data set's order
    image: np.ndarray  # (E,) int32 in [0, N)
    cell: np.ndarray  # (E,) int32 in [0, K * K): truth * K + prediction
    count: np.ndarray  # (E,) int32 pixels, at least 1
    band: np.ndarray  # (E,) int32 of them near a class boundary, 0 to count
    digest: str  # of names, images and labels, in their order

    @classmethod
    def from_rows(cls, class_names: Sequence[str], rows: Sequence[Row]) -> Self:
        """The images of all processes, put back into the data set's order."""
        ordered = sorted(rows, key=lambda row: row.index)
        none = np.zeros(0, dtype=np.int64)
        return cls(
            class_names=tuple(class_names),
            names=tuple(row.name for row in ordered),
            image=np.repeat(np.arange(len(ordered), dtype=np.int32), [len(row.cell) for row in ordered]),
            cell=np.concatenate([none, *(row.cell for row in ordered)]).astype(np.int32),
            count=np.concatenate([none, *(row.count for row in ordered)]).astype(np.int32),
            band=np.concatenate([none, *(row.band for row in ordered)]).astype(np.int32),
            digest=split_digest((row.name, row.digest) for row in ordered),
        )

    @classmethod
    def joined(cls, parts: Sequence[Self], names: Sequence[str], digest: str) -> Self:
        """Sets of different images as one, in the order of `names`, which are those of all; `digest` is of these.

        Raises ValueError for parts of other images or other classes.
        """
        place = {name: index for index, name in enumerate(names)}
        if sorted(names) != sorted(name for part in parts for name in part.names):
            raise ValueError("the parts do not hold each image once")
        if len({part.class_names for part in parts}) != 1:
            raise ValueError("the parts have other classes")
        image = np.concatenate([np.array([place[name] for name in part.names])[part.image] for part in parts])
        order = np.lexsort((np.concatenate([part.cell for part in parts]), image))
        columns = {name: np.concatenate([getattr(part, name) for part in parts])[order] for name in COLUMNS}
        columns["image"] = image[order].astype(np.int32)
        return cls(parts[0].class_names, tuple(names), **columns, digest=digest)

    def __len__(self) -> int:
        return len(self.names)

    def total(self, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """The summed matrix `(K, K)` int64 of all images, or of those at `indices`, each as often as it is named."""
        num_classes = len(self.class_names)
        pixels = self.count.astype(np.float64)  # what bincount sums; exact up to 2**53 pixels
        if indices is not None:
            pixels *= np.bincount(np.asarray(indices, dtype=np.int64), minlength=len(self))[self.image]
        summed = np.bincount(self.cell, weights=pixels, minlength=num_classes**2)
        return summed.astype(np.int64).reshape(num_classes, num_classes)

    def scores(self, indices: Sequence[int] | np.ndarray | None = None) -> SegmentationScores:
        """The scores of all images together, or of those at `indices` (a resample may name one many times)."""
        return SegmentationScores.from_confusion(self.total(indices))

    def at_boundaries(self) -> Self:
        """The same images with only their pixels near class boundaries."""
        near = self.band > 0
        band = self.band[near]
        return replace(self, image=self.image[near], cell=self.cell[near], count=band, band=band)

    def named(self, averages: Sequence[Average] = ()) -> dict[str, float | None]:
        """The figures of a result.json: `named_scores`, and `band/miou` of the pixels near class boundaries."""
        named = named_scores(self.scores(), self.class_names, averages)
        miou = self.at_boundaries().scores().miou
        return {**named, f"{BAND}/miou": None if math.isnan(miou) else miou}

    def per_image_miou(self) -> np.ndarray:
        """`(N,)` float64: over the classes in an image's truth or prediction; nan where no pixel of it counts."""
        return mean_iou(*self.hits_and_unions())

    def hits_and_unions(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `(N, K)` int64 of each image in the intersection and in the union of each class: what IoU divides."""
        truth, prediction = np.divmod(self.cell, max(1, len(self.class_names)))
        hits = self._by_class(truth, truth == prediction)
        return hits, self._by_class(truth) + self._by_class(prediction) - hits

    def extremes(self, most: int) -> tuple[list[int], list[int]]:
        """The indices of the `most` worst and the `most` best images by their mIoU, the most extreme first.

        An image without a score is in neither; of fewer than 2 `most` images each is in one half, the worse ones first.
        """
        miou = self.per_image_miou()
        ordered = [index for index in np.argsort(miou, kind="stable").tolist() if not math.isnan(miou[index])]
        num_worst = min(most, (len(ordered) + 1) // 2)
        num_best = min(most, len(ordered) // 2)
        return ordered[:num_worst], ordered[::-1][:num_best]

    def _by_class(self, of_class: np.ndarray, counted: np.ndarray | bool = True) -> np.ndarray:
        """Pixels `(N, K)` int64 of each image, by the class that each entry has."""
        num_classes = len(self.class_names)
        slots = self.image.astype(np.int64) * num_classes + of_class
        summed = np.bincount(slots, weights=self.count * counted, minlength=len(self) * num_classes)
        return summed.astype(np.int64).reshape(len(self), num_classes)


def mean_iou(hits: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """The mIoU `(...)` float64 from the pixels `(..., K)` in each class's intersection and in its union.

    The mean over the classes whose union holds a pixel: one that is predicted but absent counts 0. nan where no class
    has any.
    """
    counted = unions > 0
    iou = np.divide(hits, unions, out=np.zeros(np.shape(unions)), where=counted)
    return _divide(iou.sum(axis=-1), counted.sum(axis=-1))


def named_scores(
    scores: SegmentationScores, class_names: Sequence[str], averages: Sequence[Average] = ()
) -> dict[str, float | None]:
    """`miou`, over how many classes it averages, `accuracy` and `iou/<class>`; of `averages` also `macro/f1` and so on.

    A class that occurs neither in truth nor in prediction has no score (None) and is not averaged; where no pixel
    counts nothing has one.
    """
    averaged = int(np.isfinite(scores.iou).sum())
    named = {"miou": scores.miou, "averaged_classes": averaged, "accuracy": scores.accuracy}
    named |= {f"iou/{name}": iou for name, iou in zip(class_names, scores.iou.tolist(), strict=True)}
    for average in averages:
        named |= {f"{average}/{name}": value for name, value in scores.averaged(average).items()}
    return {name: None if math.isnan(value) else value for name, value in named.items()}


def averages_in(named: Mapping[str, Any]) -> tuple[Average, ...]:
    """Those of which a result.json has figures."""
    return tuple(average for average in AVERAGES if any(name.startswith(f"{average}/") for name in named))


def names_share(figure: str, class_names: Sequence[str]) -> bool:
    """Whether `ImageConfusions.named` has a share of this name unasked: all of them but the number of classes."""
    return figure in ("miou", "accuracy", f"{BAND}/miou", *(f"iou/{name}" for name in class_names))


def split_digest(images: Iterable[tuple[str, str]]) -> str:
    """What tells a set of scored images from another, by each one's name and the digest of its pixels and label."""
    hashed = hashlib.sha256()
    for name, digest in images:
        hashed.update(name.encode("utf-8", "surrogateescape") + b"\0")
        hashed.update(digest.encode() + b"\0")
    return hashed.hexdigest()


def image_confusion_bytes(parts: Mapping[str, ImageConfusions]) -> bytes:
    """A .safetensors file of parts (`val`, `test`) that share their classes; `read_image_confusion` reads it back.

    Tensors `<part>/image`, `<part>/cell`, `<part>/count` and `<part>/band`. The header's metadata holds, as `about`,
    JSON in ASCII (names may be no valid text): `classes`, the `names` and the `digests` of each part's images, and a
    `sha256` of all that.
    """
    arrays = {f"{part}/{column}": getattr(found, column) for part, found in parts.items() for column in COLUMNS}
    about = {
        "classes": next(iter(parts.values())).class_names,
        "names": {part: found.names for part, found in parts.items()},
        "digests": {part: found.digest for part, found in parts.items()},
    }
    digested = {**about, "sha256": _digest(arrays, about)}
    # Under one key: safetensors writes several in an order of chance, and equal scores are to be equal files.
    return safetensors.numpy.save(arrays, {"about": json.dumps(digested)})


def read_image_confusion(folder: str | Path) -> dict[str, ImageConfusions]:
    """What each image of a run was taken for, by part: `val`, `test`. `folder` is a run or one of `evaluate --out`.

    Raises UserError where there is no such file, and for one that is not as it was written.
    """
    path = Path(folder) / IMAGES_FILE
    if not path.is_file():
        raise UserError(f"{path}: is not there; give a finished run, or score its model by ssl-seg evaluate --out")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = file.keys()
            arrays = {name: file.get_tensor(name) for name in tensors}
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(_damaged(path)) from error
    if not _is_about(about) or about.pop("sha256", None) != _digest(arrays, about):
        raise UserError(_damaged(path))
    classes = tuple(about["classes"])
    found = {}
    for part, names in about["names"].items():
        try:
            columns = {column: arrays[f"{part}/{column}"] for column in COLUMNS}
            found[part] = ImageConfusions(classes, tuple(names), **columns, digest=about["digests"][part])
        except KeyError as error:
            raise UserError(_damaged(path)) from error
        if not _is_whole(found[part]):
            raise UserError(_damaged(path))
    return found


def _is_about(about: Any) -> bool:
    """Whether a header has the keys that a run writes, each of its kind; names may be no valid text."""
    if not isinstance(about, dict):
        return False
    names, digests = about.get("names"), about.get("digests")
    if not isinstance(names, dict) or not isinstance(digests, dict):
        return False
    lists = [about.get("classes"), list(digests.values()), *names.values()]
    return all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in lists)


def _is_whole(found: ImageConfusions) -> bool:
    """Whether the columns fit each other: a stranger's file may have the right digest and no sense."""
    columns = (found.image, found.cell, found.count, found.band)
    if any(column.ndim != 1 or column.dtype != np.int32 for column in columns):
        return False
    if len({len(column) for column in columns}) > 1:
        return False
    if any(column.min(initial=0) < 0 for column in columns):
        return False
    in_range = found.image.max(initial=-1) < len(found) and found.cell.max(initial=-1) < len(found.class_names) ** 2
    return in_range and bool((found.band <= found.count).all())


def _digest(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str:
    """Of all that the file holds: safetensors itself notices no flipped bit."""
    hashed = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(arrays):
        hashed.update(f"\0{name}\0{arrays[name].dtype}\0".encode())
        hashed.update(arrays[name].tobytes())
    return hashed.hexdigest()


def _damaged(path: Path) -> str:
    return f"{path}: damaged; give the run's command again, or score its model by ssl-seg evaluate --out"


def _figures(found: np.ndarray, wrong: np.ndarray, missed: np.ndarray, rest: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from TP, FP, FN and TN, of each class or summed."""
    return {
        "recall": _divide(found, found + missed),
        "specificity": _divide(rest, rest + wrong),
        "precision": _divide(found, found + wrong),
        "f1": _divide(2 * found, 2 * found + wrong + missed),
        "accuracy": _divide(found + rest, found + wrong + missed + rest),
        "jaccard": _divide(found, found + wrong + missed),
    }


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Of the values that are there; nan where none weighs anything."""
    there = np.isfinite(values)
    return float(_divide((values * weights)[there].sum(), weights[there].sum()))


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """float64; nan, without a warning, where the divisor is 0."""
    result = np.full(np.shape(below), np.nan)
    return np.divide(above, below, out=result, where=np.asarray(below) > 0)

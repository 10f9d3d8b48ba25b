"""Runs in pairs: what a gain is, where it lies over images, and which images changed.

The two runs of a pair differ in what is compared and share all else that is drawn: the seeds and the labelled images,
and so order and crops. The spread of such gains is smaller than that of the scores, and tells whether something helped.
Imports no torch, but to draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ssl_seg.confusion import BAND, IMAGES_FILE, ImageConfusions, read_image_confusion
from ssl_seg.evidence import Interval, block_bootstrap
from ssl_seg.runs import RunFolder

MIN_STARTS = 3  # pretrainings; two means would have an interval of 12.7 standard errors to each side
NUM_CHANGED = 6  # images to look at, of each comparison

Images = list[ImageConfusions | None]  # of some runs; None for one that kept none


@dataclass(frozen=True)
class Spread:
    """Figures of several runs in short."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None for one value."""
        return stdev(self.values) if self.n > 1 else None

    def text(self, digits: int = 4, sign: str = "") -> str:
        """`0.4120 ± 0.0031`; a single value alone."""
        spread = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{spread}"


@dataclass(frozen=True)
class Shared(Spread):
    """Paired differences of which some start from the same pretraining, so that they are not independent.

    Taken as if they were, 8 pairs over 2 pretrainings tell something false in 24 of 100 null comparisons where
    pretrainings differ as much as seeds do.
    """

    starts: tuple[str, ...]  # the pretraining behind each value

    @property
    def mean(self) -> float:
        """Over what counts as independent, so that it lies in the middle of its interval."""
        return super().mean if self.is_of_few else mean(self.means())

    @property
    def num_starts(self) -> int:
        return len(set(self.starts))

    @property
    def is_of_few(self) -> bool:
        """Whether it has too few pretrainings for an interval over them, and is about these alone."""
        return self.num_starts < MIN_STARTS

    def means(self) -> tuple[float, ...]:
        """The mean of each pretraining."""
        by_start: dict[str, list[float]] = {}
        for start, value in zip(self.starts, self.values, strict=True):
            by_start.setdefault(start, []).append(value)
        return tuple(map(mean, by_start.values()))


def of_starts(values: Sequence[float], starts: Sequence[str]) -> Spread:
    """Paired differences, and whether pretrainings are shared among them."""
    return Spread(tuple(values)) if len(set(starts)) == len(values) else Shared(tuple(values), tuple(starts))


def over_starts(gain: Spread) -> tuple[float, ...] | None:
    """The means of the pretrainings that pairs share; None where none is shared, and for too few of them."""
    return gain.means() if isinstance(gain, Shared) and not gain.is_of_few else None


def independent(gain: Spread) -> tuple[float, ...]:
    """What counts as independent: the means of pretrainings that pairs share, the pairs where these are too few."""
    return over_starts(gain) or gain.values


def paired(base: Mapping[Any, Sequence[float]], own: Mapping[Any, Sequence[float]]) -> Spread | None:
    """The differences of the scores that both have under a key, each side by its mean; None where they share none."""
    differences = [mean(own[key]) - mean(base[key]) for key in own if key in base]
    return Spread(tuple(differences)) if differences else None


class Scored(Protocol):
    """A run as pairs see it."""

    @property
    def scores(self) -> Mapping[str, float]: ...  # `val/miou`, `test/iou/road`
    @property
    def folder(self) -> Path | None: ...  # None for a run that is known from MLflow alone
    @property
    def software(self) -> Mapping[str, str]: ...  # `runs.software_of`; empty where it is not known


R = TypeVar("R", bound=Scored)


@dataclass(frozen=True)
class Changed(Generic[R]):
    """An image that the two sides of a comparison take for different things."""

    index: int  # its place in the data set
    name: str
    difference: float  # of its mIoU, as a mean over pairs: above 0 where the baseline is worse
    pair: tuple[R, R]  # that whose own difference comes nearest to the mean, to look at


@dataclass(frozen=True)
class Pairs(Generic[R]):
    """The runs of a baseline and those compared with it, by what a pair has in common.

    Several runs of a side under one key, as those from several pretrainings, count by their mean: they share partners.
    """

    base: Mapping[Any, Sequence[R]]
    own: Mapping[Any, Sequence[R]]
    # Reads the images of a run; a caller with many comparisons gives one that remembers.
    read: Callable[[Path], Mapping[str, ImageConfusions]] = read_image_confusion

    def sides(self, score: str) -> dict[Any, tuple[list[R], list[R]]]:
        """The runs that have the score, of both sides, under each key that both have one under."""
        found = {key: (_having(self.base.get(key, ()), score), _having(runs, score)) for key, runs in self.own.items()}
        return {key: sides for key, sides in found.items() if all(sides)}

    def gain(self, score: str) -> Spread | None:
        """The differences in a score, one for each key; None without a pair."""
        sides = self.sides(score)
        base, own = ({key: [run.scores[score] for run in of[side]] for key, of in sides.items()} for side in (0, 1))
        return paired(base, own)

    def over_images(self, score: str, level: float = 0.95, resamples: int = 10_000) -> Interval | None:
        """Where the gain in a mIoU (`val/miou`, `val/band/miou`) lies for other images of the same kind, runs fixed.

        Of the very runs of the gain, each key counting once as there. None without pairs, where a run of theirs kept no
        images, and for too few images (`evidence.block_bootstrap`).
        """
        found = self._images(score)
        if not found or any(None in (*lower, *upper) for lower, upper in found):
            return None
        runs, weights = zip(*(_weighted(side) for side in zip(*found, strict=True)), strict=True)
        return block_bootstrap(*runs, level=level, resamples=resamples, weights=weights)

    def changed(self, score: str, most: int | None = None) -> tuple[Changed[R], ...]:
        """The images that differ most from the baseline come first; those that do not differ are left out.

        Of the runs whose images were kept, each key counting once.
        """
        pairs: list[tuple[R, R]] = []
        rows, weights = [], []
        names: tuple[str, ...] = ()
        for sides, images in zip(self.sides(score).values(), self._images(score), strict=True):
            kept = [_kept(*side) for side in zip(sides, images, strict=True)]
            for (base, lower), (own, upper) in product(*kept):
                names = lower.names
                pairs.append((base, own))
                rows.append(upper.per_image_miou() - lower.per_image_miou())
                weights.append(1 / (len(kept[0]) * len(kept[1])))
        if not pairs:
            return ()
        changes = np.average(rows, axis=0, weights=weights)  # (N,); nan for an image without a counted pixel
        order = np.argsort(-np.abs(changes), kind="stable")[:most].tolist()  # nan comes last
        nearest = np.argmin(np.abs(rows - changes), axis=0)  # of the pairs, (N,)
        found = (Changed(index, names[index], float(changes[index]), pairs[nearest[index]]) for index in order)
        return tuple(one for one in found if abs(one.difference) > 0)

    def other_software(self, score: str) -> dict[str, tuple[str, ...]]:
        """What the two sides of a pair were made with that is not the same: `torch`, `device`, with all that was used.

        A difference between arms may come from it as well.
        """
        found: dict[str, dict[str, None]] = {}
        for base, own in self.sides(score).values():
            for lower, upper in product(base, own):
                both = [name for name in lower.software if name in upper.software]
                for name in both:
                    if lower.software[name] != upper.software[name]:
                        found.setdefault(name, {}).update(dict.fromkeys((lower.software[name], upper.software[name])))
        return {name: tuple(values) for name, values in found.items()}

    def _images(self, score: str) -> list[tuple[Images, Images]]:
        """For each key that `sides` has, the images of the baseline's runs and of the others."""
        sides = self.sides(score).values()
        found = [tuple([self._images_of(run, score) for run in side] for side in of) for of in sides]
        sets = Counter(_identity(images) for of in found for side in of for images in side if images is not None)
        if not sets:
            return found
        usual = max(sets, key=sets.__getitem__)  # the first of equals
        return [tuple(_of_set(side, usual) for side in of) for of in found]

    def _images_of(self, run: R, score: str) -> ImageConfusions | None:
        part, _, figure = score.partition("/")
        if run.folder is None or not (run.folder / IMAGES_FILE).is_file():
            return None
        found = self.read(run.folder).get(part)
        return found.at_boundaries() if found is not None and figure.startswith(f"{BAND}/") else found


def software_in_words(found: Iterable[Mapping[str, Sequence[str]]]) -> str:
    """Of several comparisons, what `other_software` has found: `torch 2.14.0, 2.14.1; device 1 x cpu, 1 x cuda`."""
    every: dict[str, dict[str, None]] = {}
    for own in found:
        for name, values in own.items():
            every.setdefault(name, {}).update(dict.fromkeys(values))
    return "; ".join(f"{name} {', '.join(values)}" for name, values in every.items())


def pictures_of(changed: Sequence[Changed], part: str) -> list[np.ndarray]:
    """Each image with its truth, both predictions and what changed, as `evaluate.changed_pictures` draws them.

    Raises UserError where a model or an image is not there any more.
    """
    from ssl_seg import evaluate  # torch and the networks, which no table needs

    by_pair: dict[tuple[Path, Path], list[Changed]] = {}
    for one in changed:
        by_pair.setdefault(tuple(run.folder for run in one.pair), []).append(one)
    drawn: dict[int, np.ndarray] = {}
    for folders, ones in by_pair.items():
        runs = [RunFolder.open(folder) for folder in folders]
        found = evaluate.changed_pictures(*runs, part, [one.name for one in ones])
        drawn |= {one.index: picture for one, picture in zip(ones, found, strict=True)}
    return [drawn[one.index] for one in changed]


def _having(runs: Iterable[R], score: str) -> list[R]:
    return [run for run in runs if score in run.scores]


def _kept(runs: Sequence[R], images: Images) -> list[tuple[R, ImageConfusions]]:
    return [(run, own) for run, own in zip(runs, images, strict=True) if own is not None]


def _identity(images: ImageConfusions) -> tuple[Any, ...]:
    """What tells one set of scored images from another: masks may have been corrected under the same names."""
    return images.class_names, images.names, images.digest


def _of_set(side: Images, wanted: tuple[Any, ...]) -> Images:
    """Those of the wanted set; runs of the first versions have no digest, and are known by their names."""

    def fits(images: ImageConfusions | None) -> bool:
        if images is None:
            return False
        *own, digest = _identity(images)
        return own == [*wanted[:-1]] and (digest == wanted[-1] or not digest or not wanted[-1])

    return [images if fits(images) else None for images in side]


def _weighted(side: Sequence[Images]) -> tuple[list[ImageConfusions], list[float]]:
    """All runs of one side of a comparison, and weights by which each key counts once."""
    runs = [images for of_key in side for images in of_key]
    return runs, [1 / len(of_key) for of_key in side for _ in of_key]

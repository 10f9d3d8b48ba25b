"""Runs in pairs: their differences, where the mean difference lies over images, and which images changed.

The two runs of a pair differ in what is compared. They share all else that is drawn: seeds and labelled images, and so
order and crops. Their differences spread less than the scores do, and so tell whether something helped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Generic, Protocol, TypeGuard, TypeVar

import numpy as np

from ssl_seg.evidence.statistics import LEVEL, Interval, block_bootstrap, t_interval
from ssl_seg.scores import BAND, IMAGES_FILE, ImageConfusions, read_image_confusion

MIN_PAIRS = 3  # two would have an interval of 12.7 standard errors to each side
MIN_STARTS = 3  # pretrainings, for the same reason
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
    """Paired differences, one for each choice of seeds, of which some start from the same pretraining.

    They are not independent. Taken as if they were, 8 pairs over 2 pretrainings tell something false in 24 of 100 null
    comparisons where pretrainings differ as much as seeds do; with both pretrainings under each of the seeds, in 28.
    """

    means: tuple[float, ...]  # of each pretraining, over its pairs
    crossed: bool = False  # whether some seeds have runs of several pretrainings
    level: float = LEVEL  # of the intervals of which the wider one counts

    @property
    def mean(self) -> float:
        """Over what counts as independent, so that it lies in the middle of its interval."""
        return mean(self.units)

    @property
    def num_starts(self) -> int:
        return len(self.means)

    @property
    def is_of_few(self) -> bool:
        """Whether it has too few pretrainings for an interval over them, and is about these alone."""
        return self.num_starts < MIN_STARTS

    @property
    def by_start(self) -> bool:
        """Whether the means of pretrainings count as independent, and not the pairs.

        Where each seed has several pretrainings, neither spread holds the other: that with the wider interval counts.
        Of null comparisons, 3 to 8 pretrainings under 3 to 8 seeds, 2 to 8 in 100 are then told (simulated, with
        pretrainings and seeds that differ alike, one half as much as the other, or one not at all).
        """
        if self.is_of_few:
            return False
        pairs, starts = (t_interval(own, self.level) for own in (self.values, self.means))
        return not self.crossed or _width(starts) >= _width(pairs)

    @property
    def units(self) -> tuple[float, ...]:
        return self.means if self.by_start else self.values


def of_differences(differences: Iterable[tuple[Hashable, str, float]], level: float = LEVEL) -> Spread:
    """Paired differences from (what the pair has in common, the pretraining behind it, difference).

    Runs with both the same count by their mean, as then do the pretrainings of a key and the keys of a pretraining.
    `Shared` where a pretraining stands behind several keys.
    """
    cells: dict[tuple[Hashable, str], list[float]] = {}
    for key, start, difference in differences:
        cells.setdefault((key, start), []).append(difference)
    keys, starts = ({} for _ in range(2))
    for (key, start), own in cells.items():
        keys.setdefault(key, []).append(mean(own))
        starts.setdefault(start, []).append(mean(own))
    values = tuple(map(mean, keys.values()))
    if all(len(own) == 1 for own in starts.values()):
        return Spread(values)
    return Shared(values, tuple(map(mean, starts.values())), len(cells) > len(keys), level)


def of_starts(values: Sequence[float], starts: Sequence[str], level: float = LEVEL) -> Spread:
    """Paired differences of one run each, and whether pretrainings are shared among them."""
    return of_differences(((index, *own) for index, own in enumerate(zip(starts, values, strict=True))), level)


def over_starts(gain: Spread) -> tuple[float, ...] | None:
    """The means of the pretrainings that pairs share, where these count as independent; else None."""
    return gain.means if isinstance(gain, Shared) and gain.by_start else None


def independent(gain: Spread) -> tuple[float, ...]:
    """What counts as independent: the means of pretrainings that pairs share, or the pairs."""
    return over_starts(gain) or gain.values


class Scored(Protocol):
    """A run as pairs see it."""

    @property
    def scores(self) -> Mapping[str, float]: ...  # `val/miou`, `test/iou/road`
    @property
    def folder(self) -> Path | None: ...  # None for a run that is known from MLflow alone
    @property
    def software(self) -> Mapping[str, str]: ...  # `folder.software_of`; empty where it is not known


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
    `start` names the pretraining behind a pair (a run of the baseline, one of the others). Without it, and where it
    gives None, each pair has one of its own.
    """

    base: Mapping[Any, Sequence[R]]
    own: Mapping[Any, Sequence[R]]
    start: Callable[[R, R], str | None] | None = None
    # Reads the images of a run; a caller with many comparisons gives one that remembers.
    read: Callable[[Path], Mapping[str, ImageConfusions]] = read_image_confusion
    level: float = LEVEL

    def sides(self, score: str) -> dict[Any, tuple[list[R], list[R]]]:
        """The runs that have the score, of both sides, under each key that both have one under."""
        found = {key: (_having(self.base.get(key, ()), score), _having(runs, score)) for key, runs in self.own.items()}
        return {key: sides for key, sides in found.items() if all(sides)}

    def gain(self, score: str) -> Spread | None:
        """The differences in a score, one for each key, `Shared` where pretrainings are; None without a pair."""
        found = [
            (key, self.start_of(key, base, run), run.scores[score] - mean(partner.scores[score] for partner in base))
            for key, (base, own) in self.sides(score).items()
            for run in own
        ]
        return of_differences(found, self.level) if found else None

    def over_images(self, score: str, resamples: int = 10_000) -> Interval | None:
        """Where the gain in a mIoU (`val/miou`, `val/band/miou`) lies for other images of the same kind, runs fixed.

        Of the very runs of the gain, each counting as much as in its mean. None without pairs, where a run of theirs
        kept no images, and for too few images (`evidence.block_bootstrap`).
        """
        found = self._images(score)
        lower, upper = ([images for sides in found for images in sides[which]] for which in (0, 1))
        if not found or not _are_kept(lower) or not _are_kept(upper):
            return None
        weights = tuple(zip(*self._weights(score), strict=True))
        lower_weights, upper_weights = ([weight for of_key in side for weight in of_key] for side in weights)
        return block_bootstrap(
            lower, upper, level=self.level, resamples=resamples, weights=(lower_weights, upper_weights)
        )

    def changed(self, score: str, most: int | None = None) -> tuple[Changed[R], ...]:
        """The images that differ most from the baseline come first; those that do not differ are left out.

        Of the runs whose images were kept, each key counting once.
        """
        pairs: list[tuple[R, R]] = []
        rows, weights = [], []
        names: tuple[str, ...] = ()
        for sides, images in zip(self.sides(score).values(), self._images(score), strict=True):
            bases, others = (_kept(*side) for side in zip(sides, images, strict=True))
            for (base, lower), (own, upper) in product(bases, others):
                names = lower.names
                pairs.append((base, own))
                rows.append(upper.per_image_miou() - lower.per_image_miou())
                weights.append(1 / (len(bases) * len(others)))
        if not pairs:
            return ()
        changes = np.average(rows, axis=0, weights=weights)  # (N,); nan for an image without a counted pixel
        order: list[int] = np.argsort(-np.abs(changes), kind="stable")[:most].tolist()  # nan comes last
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
                one, other = lower.software, upper.software
                for name in one:
                    if name in other and one[name] != other[name]:
                        found.setdefault(name, {}).update(dict.fromkeys((one[name], other[name])))
        return {name: tuple(values) for name, values in found.items()}

    def start_of(self, key: Any, base: Sequence[R], own: R) -> str:
        """The pretraining behind the pair of a run with those of the baseline."""
        found = None if self.start is None else self.start(base[0], own)
        return str(key) if found is None else found

    def _weights(self, score: str) -> Iterator[tuple[list[float], list[float]]]:
        """For each key, how much the runs of either side count in the mean of the gain."""
        gain = self.gain(score)
        by_start = gain is not None and over_starts(gain) is not None
        starts = {key: [self.start_of(key, base, run) for run in own] for key, (base, own) in self.sides(score).items()}
        keys_of = Counter(start for own in starts.values() for start in set(own))
        for key, (base, own) in self.sides(score).items():
            reruns = Counter(starts[key])
            shared_by = [keys_of[start] for start in starts[key]] if by_start else [len(reruns)] * len(own)
            upper = [1 / (many * reruns[start]) for many, start in zip(shared_by, starts[key], strict=True)]
            yield [sum(upper) / len(base)] * len(base), upper

    def _images(self, score: str) -> list[tuple[Images, Images]]:
        """For each key that `sides` has, the images of the baseline's runs and of the others."""
        read = partial(self._images_of, score=score)
        found = [([*map(read, base)], [*map(read, own)]) for base, own in self.sides(score).values()]
        sets = Counter(_identity(images) for of in found for side in of for images in side if images is not None)
        if not sets:
            return found
        usual = max(sets, key=sets.__getitem__)  # the first of equals
        return [(_of_set(lower, usual), _of_set(upper, usual)) for lower, upper in found]

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


def _width(interval: Interval | None) -> float:
    """Infinite where there are too few values for an interval."""
    return math.inf if interval is None else interval.high - interval.low


def _having(runs: Iterable[R], score: str) -> list[R]:
    return [run for run in runs if score in run.scores]


def _kept(runs: Sequence[R], images: Images) -> list[tuple[R, ImageConfusions]]:
    return [(run, own) for run, own in zip(runs, images, strict=True) if own is not None]


def _are_kept(images: Images) -> TypeGuard[list[ImageConfusions]]:
    return all(own is not None for own in images)


def _identity(images: ImageConfusions) -> tuple[Any, ...]:
    """What tells one set of scored images from another: masks may have been corrected under the same names."""
    return images.class_names, images.names, images.digest


def _of_set(side: Images, wanted: tuple[Any, ...]) -> Images:
    """Those of the wanted set."""
    return [images if images is not None and _identity(images) == wanted else None for images in side]

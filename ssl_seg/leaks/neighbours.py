"""Which images are neighbours in a video: frames close in number, as far as the pictures say that numbers are time.

Ours: names alone would accuse every data set that numbers its images. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from ssl_seg.datasets import numbering
from ssl_seg.leaks.near_duplicates import Fingerprints, between, coarse

BAND = (1.0, 4.0)  # pixels of COARSE: structure by which neighbouring frames are told from others
NEAREST = 4  # frames of a side that one is paired with
LEAST_PAIRS = 5  # of one numbering; smaller ones are judged together
# Shares of pairs taken at random than which numbered ones are more alike in the median: for numbers to be time, and for
# both sides to be of one video. In data that are no video, five pairs pass the first by chance once in a hundred.
ALIKE_IN_TIME, ALIKE_ACROSS = 0.9, 0.7
LEAST_COMBINATIONS = 50  # of an image of each side; among fewer, chance makes any pictures seem to follow each other
MOST_PAIRS = 2000  # whose likeness is looked at
TOO_FEW, NONE_SHARED = "too few", "no numbering in common"
ALWAYS_ALIKE = 0.9  # a standing camera's frames are all alike


def frames_apart(name: str, other: str) -> int | None:
    """How many numbers lie between two names of one numbering; None for two of different ones."""
    one, two = numbering(name), numbering(other)
    return None if one is None or two is None or one[0] != two[0] else abs(one[1] - two[1])


def how_judged(trained: Fingerprints, scored: Fingerprints) -> str:
    """What names say of neighbours: `judged`, TOO_FEW pictures to tell whether numbers are time, or NONE_SHARED.

    The last where numbers are alike but for a folder that one side has, as of one video's frames in two places:
    `clip/00012` and `00013`. They are not compared, for of `a/00012` and `b/00013` the folders tell two clips apart.
    """
    if any(_shared_numberings(trained.names, scored.names)):
        return TOO_FEW if len(trained) * len(scored) < LEAST_COMBINATIONS else "judged"
    ours, theirs = (_by_folder(side.names) for side in (trained, scored))
    return NONE_SHARED if ours[False] & theirs[True] or ours[True] & theirs[False] else "judged"


def _by_folder(names: Sequence[str]) -> dict[bool, set[str]]:
    """The numberings of names without a folder, and without their folder those of the others."""
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for name in names:
        numbered = numbering(name)
        if numbered is not None:
            folder, _, pattern = numbered[0].rpartition("/")
            found[bool(folder)].add(pattern)
    return found


def neighbours(trained: Fingerprints, scored: Fingerprints, frames: int) -> list[Neighbour]:
    """The nearest scored frame of each image that has one within `frames`, where numbers are time.

    Many data sets number what is no video (Pascal VOC, Oxford Pets), and a second has one frame or thirty. So numbers
    count as far as the pictures agree: up to the distance from which on the frames of a numbering, on either side of
    the split or across it, are no more alike than pairs taken at random. Two videos with the same numbers do not count,
    since there those across the split are no more alike than others.
    """
    if how_judged(trained, scored) == TOO_FEW:
        return []
    pictures = _Pictures(trained.pictures, scored.pictures)
    groups = [_numbered(*members, frames) for members in _shared_numberings(trained.names, scored.names)]
    groups = _small_ones_together([group for group in groups if group.across])
    if not groups:
        return []
    usual = pictures.usual_likeness()
    bar, least = (min(float(np.quantile(usual, share)), ALWAYS_ALIKE) for share in (ALIKE_IN_TIME, ALIKE_ACROSS))
    nearest: dict[int, Neighbour] = {}
    for group in groups:
        reach = pictures.reach([*group.within, *group.across], bar)
        kept = [pair for pair in group.across if pair.apart <= reach]
        if kept and pictures.median_likeness(kept) >= least:
            nearest |= {pair.index: pair for pair in sorted(kept, key=lambda pair: -pair.apart)}
    count = len(trained)
    return sorted(Neighbour(pair.index, pair.other - count, pair.apart) for pair in nearest.values())


class Neighbour(NamedTuple):
    """Two frames of one numbering, and how many numbers lie between them."""

    index: int
    other: int
    apart: int


class _Numbered(NamedTuple):
    """Close pairs of a numbering, the scored images counted on from those trained on."""

    within: list[Neighbour]  # both on one side of the split
    across: list[Neighbour]


Numbers = list[tuple[int, int]]  # (number, index), in order


def _shared_numberings(trained: Sequence[str], scored: Sequence[str]) -> Iterator[tuple[Numbers, Numbers]]:
    """The numbered images of both sides, for each numbering that both have."""
    sides: tuple[dict[str, Numbers], dict[str, Numbers]] = (defaultdict(list), defaultdict(list))
    for index, name in enumerate([*trained, *scored]):
        numbered = numbering(name)
        if numbered is not None:
            sides[index >= len(trained)][numbered[0]].append((numbered[1], index))
    for sequence in sides[0].keys() & sides[1].keys():
        yield sorted(sides[0][sequence]), sorted(sides[1][sequence])


def _numbered(trained: Numbers, scored: Numbers, frames: int) -> _Numbered:
    within = [pair for side in (trained, scored) for member in side for pair in _beside(member, side, frames)]
    across = [pair for member in trained for pair in _beside(member, scored, frames)]
    return _Numbered(within, across)


def _beside(member: tuple[int, int], side: Numbers, frames: int) -> list[Neighbour]:
    """An image with the nearest few of a side, within `frames`."""
    number, index = member
    place = bisect_left(side, (number, -1))
    around = [other for other in side[max(0, place - NEAREST) : place + NEAREST + 1] if other != member]
    pairs = [Neighbour(index, other, abs(at - number)) for at, other in around if abs(at - number) <= frames]
    return sorted(pairs, key=lambda pair: pair.apart)[:NEAREST]


def _small_ones_together(groups: Sequence[_Numbered]) -> list[_Numbered]:
    """The groups, those with too few pairs to be judged alone as one."""
    few = [len(group.within) + len(group.across) < LEAST_PAIRS for group in groups]
    small = list(compress(groups, few))
    if not small:
        return list(groups)
    within = [pair for group in small for pair in group.within]
    across = [pair for group in small for pair in group.across]
    return [*(group for group, is_small in zip(groups, few, strict=True) if not is_small), _Numbered(within, across)]


class _Pictures(NamedTuple):
    """The fingerprints of both sides, the scored ones counted on from those trained on."""

    trained: np.ndarray
    scored: np.ndarray

    def of(self, indices: Iterable[int]) -> np.ndarray:
        count = len(self.trained)
        return np.stack([self.trained[i] if i < count else self.scored[i - count] for i in indices])

    def usual_likeness(self) -> np.ndarray:
        """That of pairs across the split taken at random."""
        random = np.random.default_rng(0)
        ours = random.integers(len(self.trained), size=MOST_PAIRS)
        others = random.integers(len(self.scored), size=MOST_PAIRS)
        return _likeness(self.trained[ours], self.scored[others])

    def median_likeness(self, pairs: Sequence[Neighbour]) -> float:
        some = pairs[:: -(-len(pairs) // MOST_PAIRS)]
        return float(np.median(_likeness(self.of(pair.index for pair in some), self.of(pair.other for pair in some))))

    def reach(self, pairs: Sequence[Neighbour], bar: float) -> int:
        """The distance up to which pairs are alike, in steps that double; -1 where even the closest are not."""
        rest = sorted(pairs, key=lambda pair: pair.apart)
        reach = -1
        while rest:
            last = max(2 * rest[0].apart, rest[min(LEAST_PAIRS, len(rest)) - 1].apart)
            step = [pair for pair in rest if pair.apart <= last]
            if self.median_likeness(step) < bar:
                break
            reach = last
            rest = rest[len(step) :]
        return reach


def _likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation (N,) of the middle frequencies of N pairs of fingerprints."""
    a, b = _band(one), _band(other)
    return (a * b).sum(axis=1) / np.maximum(1e-6, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _band(thumbs: np.ndarray) -> np.ndarray:
    small = coarse(thumbs)
    passed = np.stack([between(picture, BAND) for picture in small])
    flat = passed.reshape(len(thumbs), -1)
    return flat - flat.mean(axis=1, keepdims=True)

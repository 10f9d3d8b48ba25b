"""How far two sets of images lie apart in features, how sure that is, and which of them the other one reaches.

The energy distance (Székely and Rizzo 2013), as a share of the distance between the sets: 0 where an image of one is as
far from those of the other as from its own, 1 where each set is a point. It is a kernel distance (MMD) whose kernel has
no width to choose. Where images are few its estimate has hardly a bias, and none where the sets are alike, unlike the
Fréchet distance's (Chong and Forsyth 2020): sets of twenty images can be measured.

Neighbouring frames are nearly one image. So pairs within a block of neighbours do not count, or two halves of a video
would lie apart, and blocks are resampled whole.

Ours is what no library offers together: blocks, pools that share one resample of the target, and shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit
from sklearn.metrics.pairwise import euclidean_distances

from ssl_seg.evidence.statistics import LEVEL, MIN_BLOCKS, Interval

RESAMPLES = 2_000
REACHED_BY = 3  # blocks of the target itself that an image has within its reach
HALVINGS = 200


@dataclass(frozen=True)
class Images:
    """A set of N images as features."""

    features: np.ndarray  # (N, D)
    blocks: np.ndarray  # (N,) ids from 0 of neighbouring images, as `image_blocks` gives them

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_blocks(self) -> int:
        return int(self.blocks.max()) + 1

    @cached_property
    def counts(self) -> np.ndarray:
        """Images in each block, (G,) float64."""
        return np.bincount(self.blocks).astype(np.float64)

    @cached_property
    def inner(self) -> np.ndarray:
        """Distances between the blocks, (G, G) float64, each summed over its pairs of images; 0 within a block."""
        sums = block_sums(self, self)
        np.fill_diagonal(sums, 0)
        return sums


class Distance(NamedTuple):
    """Of a pool from the target."""

    value: float
    interval: Interval | None  # over other images of both kinds; None below 5 blocks in either
    draws: np.ndarray  # (R,) the value in each resample; the target's blocks are the same for every pool


def distances(one: Images, other: Images) -> np.ndarray:
    """Euclidean ones, (N, M) float64."""
    return euclidean_distances(*(images.features.astype(np.float64) for images in (one, other)))


def block_sums(one: Images, other: Images) -> np.ndarray:
    """Distances from each block of the one to each of the other, (G, H) float64, summed over pairs of images."""
    rows, columns = (np.argsort(images.blocks, kind="stable") for images in (one, other))
    starts, other_starts = (np.concatenate([[0], images.counts.cumsum()[:-1]]).astype(int) for images in (one, other))
    apart = distances(one, other)[rows][:, columns]
    return np.add.reduceat(np.add.reduceat(apart, starts, axis=0), other_starts, axis=1)


def measure(
    target: Images, pools: Sequence[Images], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> list[Distance]:
    """How far each pool lies from the target, with an interval over other images of the same kinds.

    Blocks of both sides are drawn, those of the target the same for all pools, so that two pools can be compared by
    their `draws`. The same `seed` gives the same intervals. A set needs two blocks.
    """
    often = _resampled(target, resamples, [seed, 0])
    found = []
    for place, pool in enumerate(pools, start=1):
        between = block_sums(target, pool)
        value = float(_shares(target, pool, between, *(np.ones((1, side.num_blocks)) for side in (target, pool)))[0])
        if min(target.num_blocks, pool.num_blocks) < MIN_BLOCKS:
            found.append(Distance(value, None, np.empty(0)))
            continue
        draws = _shares(target, pool, between, often, _resampled(pool, resamples, [seed, place]))
        found.append(Distance(value, interval_of(draws, target, pool, level=level), draws))
    return found


def interval_of(draws: np.ndarray, *sets: Images, level: float = LEVEL) -> Interval:
    """Quantiles of resampled values, as much farther out as Student's is wider than the normal for as many blocks.

    As in `block_bootstrap` (Hesterberg 2015); the set of the fewest blocks says how many.
    """
    fewest = min(images.num_blocks for images in sets)
    widened = math.sqrt(fewest / (fewest - 1)) * stdtrit(fewest - 1, (1 - level) / 2)
    low, high = np.nanquantile(draws, [ndtr(widened), ndtr(-widened)])
    return Interval(float(low), float(high), level, "block bootstrap")


def of_altered(target: Images, altered: Images) -> float:
    """How far the same images lie from themselves when they are altered; an image is not held against its own block."""
    between = block_sums(target, altered)
    np.fill_diagonal(between, 0)
    once = np.ones((1, target.num_blocks))
    return float(_as_shares(_inside(target, once), _inside(altered, once), between.sum() / _pairs(target, once))[0])


def between_halves(target: Images, seed: int = 0) -> np.ndarray:
    """How far random halves of one set lie apart, (R,): what a distance of 0 looks like with half as many images.

    Empty below four blocks.
    """
    if target.num_blocks < 4:
        return np.empty(0)
    random = np.random.default_rng(seed)
    first = np.zeros((HALVINGS, target.num_blocks))
    for half in first:
        half[random.permutation(target.num_blocks)[: target.num_blocks // 2]] = 1
    # `inner` holds what lies between blocks, and the halves have none in common.
    return _shares(target, target, target.inner, first, 1 - first)


def reach(target: Images) -> np.ndarray:
    """Radius of each image's neighbourhood, (N,): images of three other blocks lie in it, or of all that there are.

    As recall by neighbours (Kynkäänniemi et al. 2019) and coverage (Naeem et al. 2020) have it, but by the nearest
    image of each block: the nearest ones of a frame are the frames beside it.
    """
    apart = distances(target, target)
    nearest = np.full((len(target), target.num_blocks), np.inf)
    for block in range(target.num_blocks):
        nearest[:, block] = apart[:, target.blocks == block].min(axis=1)
    nearest[np.arange(len(target)), target.blocks] = np.inf
    wanted = min(REACHED_BY, target.num_blocks - 1)
    return np.partition(nearest, wanted - 1, axis=1)[:, wanted - 1]


def _resampled(images: Images, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """How often each block is drawn, (R, G) float64."""
    count = images.num_blocks
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    return drawn.astype(np.float64)


def _shares(target: Images, pool: Images, between: np.ndarray, often: np.ndarray, pool_often: np.ndarray) -> np.ndarray:
    """The distance for each row of how often blocks count, (R,); nan where a set is one block alone."""
    sums = ((often @ between) * pool_often).sum(axis=1)
    return _as_shares(
        _inside(target, often), _inside(pool, pool_often), sums / (often @ target.counts) / (pool_often @ pool.counts)
    )


def _inside(images: Images, often: np.ndarray) -> np.ndarray:
    """Mean distance of two images of different blocks, (R,).

    Copies of a block that is drawn twice are no pairs either: an image lies 0 from its copy, as no other image does.
    """
    pairs = _pairs(images, often)
    sums = ((often @ images.inner) * often).sum(axis=1)
    return np.divide(sums, pairs, out=np.full(len(often), np.nan), where=pairs > 0)


def _pairs(images: Images, often: np.ndarray) -> np.ndarray:
    return (often @ images.counts) ** 2 - often**2 @ images.counts**2


def _as_shares(inside: np.ndarray, pool_inside: np.ndarray, between: np.ndarray) -> np.ndarray:
    """0 where all images are one."""
    apart = between - (inside + pool_inside) / 2
    return np.where(between > 0, apart / np.where(between > 0, between, 1), 0 * apart)

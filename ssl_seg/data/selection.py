"""Which images to label next: those that together look like the whole pool.

Greedy facility location (Nemhauser, Wolsey and Fisher 1978, and for choosing what to label Wei, Iyer and Bilmes 2015).
What a pool shows is summed up by typical appearances, of whole images and of their regions. An image covers those that
it resembles; the next one chosen is the one that adds most to what is covered. So ten images are the first ten of
twenty, images that are labelled already count as covered, and nothing is drawn by chance.

Ours is the choice. k-means by scikit-learn finds the appearances.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans

# Typical appearances at most; of fewer images each is one.
OF_IMAGES, OF_REGIONS = 1000, 200
NEIGHBOURS = 5  # of an appearance, whose distance says what "alike" means among regions
SEED = 0  # of k-means alone


@dataclass(frozen=True)
class Coverage:
    """How well each of N images shows each of K typical appearances, and how much each of these counts."""

    likeness: np.ndarray  # (N, K) float32 in [0, 1]; of an image with several regions that of the best
    weight: np.ndarray  # (K,) float64, the sum is 1


@dataclass(frozen=True)
class Choice:
    """Images in the order in which they should be labelled."""

    indices: tuple[int, ...]
    gains: tuple[float, ...]  # what each adds to the covered share of the pool, which is at most 1
    covered: float  # the share that was covered before


def of_images(features: np.ndarray) -> Coverage:
    """Coverage of whole images by their features `(N, D)`: two at the mean squared distance are alike by 1/e.

    Not the median: where most images are of one kind it is a distance within that kind, and the others come late.
    """
    centres, counts = _appearances(features, OF_IMAGES)
    distances = _squared_distances(centres, centres)
    apart = distances[np.triu_indices(len(centres), 1)]
    return _coverage(features[:, None], centres, counts, float(apart.mean()) if len(apart) else 1.0)


def of_regions(features: np.ndarray) -> Coverage:
    """Coverage of what the regions of images show, by their features `(N, R, D)`.

    Rare appearances count by the root of their frequency: by the frequency itself a pool of factory tiles was covered
    by sound surfaces, and no image with a defect was chosen.
    """
    centres, counts = _appearances(features.reshape(-1, features.shape[-1]), OF_REGIONS)
    near = np.sort(_squared_distances(centres, centres), axis=1)[:, 1 : NEIGHBOURS + 1]
    return _coverage(features, centres, np.sqrt(counts), 2 * float(np.median(near)) if near.size else 1.0)


def choose(parts: Sequence[Coverage], count: int, labelled: Collection[int], left_out: Collection[int]) -> Choice:
    """The next `count` images, or all that are left; each part counts alike.

    `labelled` are there already. `left_out` are covered by nothing and chosen never.
    """
    covered = [np.max(part.likeness[list(labelled)], axis=0, initial=0.0) for part in parts]
    before = sum(float(part.weight @ best) for part, best in zip(parts, covered, strict=True)) / len(parts)
    closed = {*labelled, *left_out}
    chosen: list[int] = []
    gains: list[float] = []
    for _ in range(min(count, len(parts[0].likeness) - len(closed))):
        added = [np.maximum(part.likeness - best, 0) @ part.weight for part, best in zip(parts, covered, strict=True)]
        gain = np.mean(added, axis=0)  # (N,)
        gain[[*closed]] = -1.0
        best_image = int(gain.argmax())
        closed.add(best_image)
        chosen.append(best_image)
        gains.append(float(gain[best_image]))
        covered = [np.maximum(part.likeness[best_image], best) for part, best in zip(parts, covered, strict=True)]
    return Choice(tuple(chosen), tuple(gains), before)


def nearest(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of the images `(N, D)` the place of the one that it resembles most among others `(M, D)`, `(N,)`."""
    return _squared_distances(features, others).argmin(axis=1)


def _appearances(features: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` typical features, and how many of all each stands for."""
    if len(features) <= most:
        return features, np.ones(len(features))
    # "auto" is one start, for k-means++ spreads the first centres.
    nearest_centre = MiniBatchKMeans(most, random_state=SEED, n_init="auto", batch_size=4096).fit_predict(features)
    counts = np.bincount(nearest_centre, minlength=most)
    used = np.flatnonzero(counts)
    sums = np.zeros((most, features.shape[1]))
    np.add.at(sums, nearest_centre, features)
    return (sums[used] / counts[used, None]).astype(features.dtype), counts[used].astype(np.float64)


def _coverage(features: np.ndarray, centres: np.ndarray, weight: np.ndarray, scale: float) -> Coverage:
    """`features` `(N, R, D)`: R regions an image."""
    likeness = np.empty((len(features), len(centres)), dtype=np.float32)
    for index, regions in enumerate(features):
        likeness[index] = np.exp(-_squared_distances(regions, centres).min(axis=0) / max(scale, 1e-12))
    return Coverage(likeness, weight / weight.sum())


def _squared_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`(N, D)` and `(M, D)` give `(N, M)`."""
    products = one @ other.T
    return np.maximum((one**2).sum(axis=1)[:, None] - 2 * products + (other**2).sum(axis=1), 0)

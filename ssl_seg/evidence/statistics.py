"""How sure a difference is: intervals over seeds, intervals over images, exact p, and the price of many comparisons.

An interval covers what was drawn anew, and nothing else. Over seeds: other labelled images, orders, crops and first
weights. The scored images stay fixed, and so does whatever all pairs share (one pretraining, one pool). Over images:
other images of the same kind, with the runs fixed.

Needs no torch, and of scipy only `scipy.special`: whoever compares runs imports this, and `scipy.stats` alone takes
most of a second. Ours is what scipy lacks or cannot pay. Its `bootstrap` does not studentize. Its `permutation_test`
lays out all 2**n assignments (20 pairs: 6 s and 1.3 GB, scipy 1.17) where sums of two halves need a millisecond. It
adjusts p for a false discovery rate only. And a mIoU is no mean of images: counts are summed first and divided after.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from scipy.special import nctdtrinc, ndtr, stdtr, stdtrit

from ssl_seg.config import UserError
from ssl_seg.scores import ImageConfusions, mean_iou

LEVEL = 0.95  # the confidence level, unless a study names another
MIN_FLIPS = 8  # pairs; below, even differences of one sign only give p of 1.6 % and more
MAX_FLIPS = 40  # pairs; the sums of one half of the signs then take 8 MB, and a t interval says the same
POWER = 0.8  # the usual one of planned experiments (Cohen 1988)
MAX_NEEDED = 1_000  # pairs; a plan of more is none
MIN_RESAMPLED = 5  # differences; of 4 one resample in 64 holds a single value only, and their quantiles say little
MIN_BLOCKS = 5  # of images; with 5 independent ones 94 of 100 intervals held the truth, with 4 only 89 (simulated)
NEIGHBOURS = 10  # images in a block; see `image_blocks`
AT_ONCE = 4_000_000  # numbers of a chunk of resamples: 32 MB
LAST_NUMBER = re.compile(r"(.*?)([0-9]+)[^0-9]*", re.DOTALL)


@dataclass(frozen=True)
class Interval:
    """Where a difference lies with the given certainty, in the unit of the differences."""

    low: float
    high: float
    level: float  # 0.95: of intervals made like this, 95 in 100 hold the true difference
    method: str  # "t", "bootstrap-t" or "block bootstrap"


def t_interval(differences: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Student's interval of the mean of paired differences, one a seed; None below 2 of them.

    Exact for any number of pairs where the differences are normal and the pairs independent. The means of skewed ones
    are covered less often than said (89 % of the time for 8 differences as skewed as an exponential), those of
    heavy-tailed ones more often. What all pairs share is outside of it: see the top of this file. Pairs that share a
    few pretrainings are not independent: give the mean of each pretraining, or 8 pairs of 2 pretrainings that differ as
    much as seeds do are covered 76 % of the time.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    reach = stdtrit(len(values) - 1, (1 + level) / 2) * _standard_error(values)
    return Interval(float(values.mean() - reach), float(values.mean() + reach), level, "t")


def t_test_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a mean of 0, by Student: below 0.05 exactly where the 95 % `t_interval` leaves 0 out."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    error = _standard_error(values)
    if error == 0:
        return float(values.mean() == 0)
    return float(2 * stdtr(len(values) - 1, -abs(values.mean()) / error))


def detectable(differences: Sequence[float], level: float = LEVEL, power: float = POWER) -> float | None:
    """The true mean that as many pairs of this spread show with probability `power`: what a null result leaves open.

    Shown means that `t_interval` leaves 0 out, on the right side; by the noncentral t (Johnson and Welch 1940). The
    spread is itself estimated, and roughly so from few pairs. None below 2 differences.

        >>> from ssl_seg.evidence import detectable
        >>> round(detectable([-0.010, 0.004, 0.012]), 3)
        0.036
    """
    if len(differences) < 2:
        return None
    errors = _errors_to_show(np.array([len(differences)]), level, power)[0]
    return float(errors * _standard_error(np.asarray(differences, dtype=np.float64)))


def pairs_needed(sd: float, difference: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many pairs whose differences have deviation `sd` show a true mean of `difference`; None above 1,000."""
    numbers = np.arange(2, MAX_NEEDED + 1)
    shown = _errors_to_show(numbers, level, power) * sd / np.sqrt(numbers)
    enough = np.flatnonzero(shown <= abs(difference))
    return int(numbers[enough[0]]) if len(enough) else None


def _errors_to_show(numbers: np.ndarray, level: float, power: float) -> np.ndarray:
    """By the number of pairs, how many standard errors a true mean is from 0 that is shown with `power`."""
    return nctdtrinc(numbers - 1.0, 1 - power, stdtrit(numbers - 1.0, (1 + level) / 2))


def bootstrap_t_interval(
    differences: Sequence[float], level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """The studentized bootstrap (Efron and Tibshirani 1993, 12.5) of the mean of paired differences, one a seed.

    They need not be normal: each resample is measured in its own standard errors, so the interval leans to the side to
    which the differences do (94 % for 8 as skewed as an exponential, where Student's has 89). It is wider than
    Student's, much so below 8 differences, and of heavy tails no better. As for `t_interval` pairs are independent, and
    what they share stays fixed. The same `seed` gives the same interval.

    None below 5 differences, and where so many are the same that an end would be infinite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < MIN_RESAMPLED:
        return None
    mean, error = float(values.mean()), float(_standard_error(values))
    if error == 0:
        return Interval(mean, mean, level, "bootstrap-t")
    random = np.random.default_rng(seed)
    drawn = values[random.integers(len(values), size=(resamples, len(values)))]
    shifts = drawn.mean(axis=1) - mean
    errors = _standard_error(drawn)
    # A resample of one value only is infinitely many of its standard errors away.
    in_errors = np.divide(shifts, errors, out=np.copysign(np.inf, shifts), where=errors > 0)
    # Not interpolated: between infinite ones nothing could be.
    low, high = np.quantile(in_errors, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf").tolist()
    if math.isinf(low) or math.isinf(high):
        return None
    return Interval(mean - high * error, mean - low * error, level, "bootstrap-t")


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of a mean of 0; None below 8 pairs, where it could hardly be small, and above 40.

    The share of all 2**n ways to swap the two arms within pairs whose mean is as far from 0 as the one seen, or farther
    (Fisher 1935). It supposes that without a difference both arms of a pair are interchangeable, and nothing about
    their distribution. What all pairs share breaks that: where one pretraining serves every pair, p is about it alone.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not MIN_FLIPS <= len(values) <= MAX_FLIPS:
        return None
    # Sums that are equal in truth differ by rounding, and count.
    reach = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    if reach <= 0:
        return 1.0
    half = len(values) // 2
    some = _signed_sums(values[:half])
    others = np.sort(_signed_sums(values[half:]))
    as_far = len(others) - np.searchsorted(others, reach - some)
    return 2 * int(as_far.sum()) / 2 ** len(values)  # as many lie on the other side


def holm(p_values: Sequence[float]) -> list[float]:
    """The p of several comparisons, adjusted for their number, in their order (Holm 1979).

    If those up to 0.05 are told, at most 5 pages of 100 tell any wrongly, however the comparisons hang together.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def holm_where_known(p_values: Sequence[float | None]) -> list[float | None]:
    """`holm` of those that have a p; None where there is none."""
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


# ---- over images ----


def image_blocks(names: Sequence[str], size: int = NEIGHBOURS) -> np.ndarray:
    """Block ids `(N,)` int64 from 0: neighbours of one sequence, about `size` in each block.

    Neighbouring frames show the same things and are mistaken alike, so they are resampled together (Kuensch 1989). On a
    drive of CamVid, 101 frames a second apart, what single frames do to the difference of two runs correlates by 0.5 to
    0.6 with the next, 0.2 to 0.4 with the one after and not at all five further: blocks of ten hold nearly all of it,
    and make intervals 1.4 to 2 times as wide as single frames do. Frames that follow faster want larger ones; of images
    that do not depend on each other blocks cost nothing but their number.

    Names alone say so: a sequence is what stands before a name's last number, whatever all names end with aside
    (`0006R0_f00930.png`: `0006R0_f`), and of those that nothing shares this with, what stands before the number before
    (`munster_000012_000019_leftImg8bit.png`: `munster_`). Within one, images are neighbours by that number. Frames
    whose names are no numbers count as independent, which makes intervals too narrow.
    """
    ending = _common_ending(names)
    places: dict[str, list[tuple[int, str, int]]] = {}
    for index, name in enumerate(names):
        sequence, number = _counted(name.removesuffix(ending))
        places.setdefault(sequence, []).append((number, name, index))
    for sequence in [sequence for sequence, own in places.items() if len(own) == 1]:
        wider, number = _counted(sequence)
        if wider != sequence:
            (_, name, index), *_ = places.pop(sequence)
            places.setdefault(f"{wider}#", []).append((number, name, index))
    blocks = np.zeros(len(names), dtype=np.int64)
    first = 0
    for own in places.values():
        ordered = [index for *_, index in sorted(own)]
        count = max(1, round(len(ordered) / size))
        blocks[ordered] = first + np.arange(len(ordered)) * count // len(ordered)
        first += count
    return blocks


def block_bootstrap(
    a: ImageConfusions | Sequence[ImageConfusions],
    b: ImageConfusions | Sequence[ImageConfusions],
    blocks: np.ndarray | None = None,
    level: float = LEVEL,
    resamples: int = 10_000,
    seed: int = 0,
    weights: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Interval | None:
    """How much `b` is above `a` in mIoU, over other images of the same kind; None below 5 blocks with counted pixels.

    Whole blocks are drawn, the same for both sides; their matrices are summed and only then divided, as for the score
    itself. A side is one run or several, whose mIoU is averaged in each resample, with `weights` for the runs of both
    sides where some count less: the runs stay as they are, so the interval says nothing about other seeds. `blocks` are
    ids `(N,)`, by default those of `image_blocks`; block ids of single images would make it too narrow where neighbours
    are alike.

    Quantiles of the resamples, taken as much farther out as Student's is wider than the normal for as many blocks
    (Hesterberg 2015, the expanded percentile interval): plain ones are too narrow for a few blocks. Classes that only
    a few blocks show make it unsure however many there are. The same `seed` gives the same interval.

    Raises UserError where runs were scored on other images or other classes.
    """
    lower = [a] if isinstance(a, ImageConfusions) else list(a)
    upper = [b] if isinstance(b, ImageConfusions) else list(b)
    runs = [*lower, *upper]
    _refuse_others(runs)
    ids = image_blocks(runs[0].names) if blocks is None else np.asarray(blocks)
    counts = _counts_of_blocks(runs, ids)
    shares = [_shares(own) for own in weights or (np.ones(len(lower)), np.ones(len(upper)))]
    signed = np.concatenate([-shares[0], shares[1]])  # (runs,)
    num_blocks = counts.shape[1]
    if num_blocks < MIN_BLOCKS:
        return None
    random = np.random.default_rng(seed)
    chunk = max(1, AT_ONCE // max(num_blocks, counts.shape[0] * counts.shape[2]))
    drawn = []
    for start in range(0, resamples, chunk):
        often = random.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), min(chunk, resamples - start))
        summed = np.tensordot(often.astype(np.float64), counts, axes=(1, 1))  # (resamples, runs, 2 K)
        miou = mean_iou(*np.split(summed, 2, axis=-1))  # (resamples, runs)
        drawn.append(miou @ signed)
    widened = math.sqrt(num_blocks / (num_blocks - 1)) * stdtrit(num_blocks - 1, (1 - level) / 2)
    low, high = np.quantile(np.concatenate(drawn), [ndtr(widened), ndtr(-widened)])
    return Interval(float(low), float(high), level, "block bootstrap")


def _standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean, over the last axis; 0, and no rounding error, where all values are the same."""
    error = values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1])
    return np.where(np.ptp(values, axis=-1) == 0, 0.0, error)


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """The sums under all 2**n choices of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _common_ending(names: Sequence[str]) -> str:
    """What all names end with, from the first character that is no digit: half a number is none."""
    from_the_end = zip(*(reversed(name) for name in names), strict=False)
    length = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, from_the_end))
    ending = names[0][len(names[0]) - length :] if names else ""
    return ending.lstrip("0123456789")


def _counted(stem: str) -> tuple[str, int]:
    """What stands before the last number, and that number; all of it and 0 where there is none."""
    found = LAST_NUMBER.fullmatch(stem)
    return (found[1], int(found[2])) if found else (stem, 0)


def _refuse_others(runs: Sequence[ImageConfusions]) -> None:
    if len({run.class_names for run in runs}) > 1:
        raise UserError("block bootstrap: the runs were scored on different classes; compare runs of one data set")
    digests = {run.digest for run in runs}
    if len({run.names for run in runs}) > 1 or len(digests) > 1:
        raise UserError("block bootstrap: the runs were scored on different images; score both on one data set")


def _shares(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.asarray(weights, dtype=np.float64) / np.sum(weights)


def _counts_of_blocks(runs: Sequence[ImageConfusions], ids: np.ndarray) -> np.ndarray:
    """`(runs, G, 2 K)` float64: pixels in the intersection and in the union of each class. Blocks without any go."""
    _, places = np.unique(ids, return_inverse=True)
    counts = np.zeros((len(runs), places.max(initial=-1) + 1, 2 * len(runs[0].class_names)))
    for own, run in zip(counts, runs, strict=True):
        np.add.at(own, places, np.concatenate(run.hits_and_unions(), axis=1))
    return counts[:, counts.any(axis=(0, 2))]

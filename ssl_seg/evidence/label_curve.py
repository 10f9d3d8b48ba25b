"""What labelled images are worth: how many of them a gain stands for, and how many more the next score takes.

Asked of a study that has `labels.count` among its axes.

**The equivalent, within what was measured.** With 20 labels an arm scores what its baseline needs 20 + x for. Each pair
says its gain with 20, less what its baseline grew from 20 to 20 + x. Where Student's interval of that holds 0, x is
possible (Fieller 1954). So the equivalent holds 0 where no gain can be told, and its end is open where the baseline was
not measured that far or is too flat to say. Between two numbers of labels the baseline is a line over their logarithm,
and may bend. Of 90 % intervals 90 to 96 in 100 held the truth, for curves of six kinds; read off fitted power laws it
was 69 to 95, for a fit that is wrong is wrong with certainty.

**The next score, beyond it.** score(n) = a - b n^-c, the power law with an offset (Hestness et al. 2017). Each seed has
its own a and b, since its numbers of labels are nested; all share c, and every c counts by how well it fits. Curves
need not be power laws, or rise at all (Viering and Loog 2021): so the growth of the last doubling may be off by `BEND`
for each further one. Of 90 % intervals 90 to 99 in 100 then held hidden scores at twice the labels, 85 to 100 at four
times. A bootstrap of the fit over 3 or 5 seeds held 64 to 76 of true
power laws.

scipy fits such curves and knows neither pairs nor open ends, so this is ours. `tests/evidence/test_label_curve.py` has
the simulation: 3, 5 or 8 seeds, 3 to 6 numbers of labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
from scipy.special import stdtr

from ssl_seg.evidence.comparison import Arm, Comparison, Condition, condition_text
from ssl_seg.evidence.formatting import NOTHING, begun, level_text
from ssl_seg.evidence.pairs import MIN_PAIRS, independent, of_starts
from ssl_seg.evidence.statistics import LEVEL, t_interval
from ssl_seg.figures.svg import with_minus

AXIS = "labels.count"
MIN_COUNTS = 3  # numbers of labels that a power law is fitted to: it has three parameters
REACH = 4  # times the most labels measured; farther on nothing is said
BEND = 0.5  # by this share the growth of a doubling may differ from that of the one before; see the top of this file
# From a logarithm (0), which has no upper end, to what is over after two doublings.
EXPONENTS = np.linspace(0.0, 2.0, 21)
STEPS = (0.05, 0.02, 0.01)  # the next score is a multiple of the largest that leads to one within reach
PLACES = 400  # numbers of labels that are looked at
NAMED = 2  # equivalents that the sentence tells one by one; more are counted


@dataclass(frozen=True)
class Labels:
    """A number of labelled images and where it lies; infinite where it lies beyond what can be said."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class LabelCurve:
    """The scores of one arm over numbers of labels, the other keys of a study held."""

    arm: Arm
    held: Condition
    counts: tuple[int, ...]  # rising, 2 or more
    values: np.ndarray  # (independent runs of seeds, counts), 3 rows or more
    level: float = LEVEL

    @property
    def can_look_ahead(self) -> bool:
        return len(self.counts) >= MIN_COUNTS

    @cached_property
    def next_score(self) -> float:
        """The next round score: of the largest of STEPS by which the curve reaches one that far."""
        most = self.counts[-1]
        here, there = self.ahead((most, REACH * most))[1].tolist()
        nexts = [step * (math.floor(here / step + 1e-9) + 1) for step in STEPS]
        return min(1.0, next((score for score in nexts if score <= there), nexts[-1]))

    @cached_property
    def needs(self) -> Labels:
        """How many labels more than the most that were measured that takes."""
        return needed(self.counts, self.values, self.next_score, self.level)

    def ahead(self, counts: Sequence[float]) -> np.ndarray:
        """`predicted` with so many labels."""
        return predicted(self.counts, self.values, counts, self.level)


@dataclass(frozen=True, eq=False)
class Worth:
    """The pairs of an arm and its baseline over numbers of labels."""

    arm: Arm
    held: Condition
    counts: tuple[int, ...]
    base: np.ndarray  # (independent pairs, counts)
    own: np.ndarray
    level: float = LEVEL

    @property
    def told_at(self) -> int:
        """The number of labels that the sentence speaks of: the middle one, the lower of two, whatever was found."""
        return self.counts[(len(self.counts) - 1) // 2]

    def at(self, count: int) -> Labels:
        """The equivalent with so many labels: how many more the baseline needs; below 0 where the arm is worse."""
        return equivalent(self.counts, self.base, self.own, count, self.level)


def equivalent(counts: Sequence[int], base: np.ndarray, own: np.ndarray, at: int, level: float = LEVEL) -> Labels:
    """How many labels more than `at` the baseline needs to score as the arm does with `at`.

    `base` and `own` are scores `(pairs, counts)`, the pairs independent. Infinite where it lies beyond the numbers of
    labels measured. Holds 0 where Student's interval of the gain does; else also where there is nothing measured on the
    side of the gain, and that end is open.
    """
    places = _whole_numbers(counts[0], counts[-1], at)
    logs, means = np.log2(counts), base.mean(axis=0)
    lines = np.array([np.interp(np.log2(places), logs, unit) for unit in np.eye(len(counts))])  # (counts, places)
    column = counts.index(at)
    left = (own[:, column] - base[:, column])[:, None] - base @ (lines - lines[:, places == at])  # (pairs, places)
    # A curve that bends between two numbers of labels has its largest distance to the line half way.
    part = np.clip(np.searchsorted(logs, np.log2(places), side="right") - 1, 0, len(counts) - 2)
    width = logs[part + 1] - logs[part]
    share = (np.log2(places) - logs[part]) / width
    bend = BEND * np.abs(means[part + 1] - means[part]) * width * share * (1 - share) / 2
    error = np.sqrt(left.var(axis=0, ddof=1) / len(left) + bend**2)
    more = _chance(left.mean(axis=0), error, len(left))  # that the baseline needs more
    start = int(np.flatnonzero(places == at)[0])
    tail = (1 - level) / 2
    costs = _outward(1 - more[start::-1], at - places[start::-1], tail)
    gains = _outward(more[start:], places[start:] - at, tail)
    # Labels do no harm: a gain is never worth less than none, where a flat baseline would have it so by its spread.
    low = gains.low if more[start] > 1 - tail else 0.0 - costs.high
    high = 0.0 - costs.low if more[start] < tail else gains.high
    middle = gains.middle if more[start] >= 0.5 else 0.0 - costs.middle
    return Labels(min(max(middle, low), high), low, high)


def _outward(more: np.ndarray, labels: np.ndarray, tail: float) -> Labels:
    """On the way from no labels: where it becomes possible, likely, and impossible that so many are enough."""
    near = labels[np.argmax(more <= 1 - tail)] if (more <= 1 - tail).any() else labels[-1]
    middle = labels[np.argmax(more <= 0.5)] if (more <= 0.5).any() else math.inf
    far = math.inf if more[-1] >= tail else labels[more >= tail].max(initial=near)
    return Labels(float(middle), float(near), float(far))


def predicted(counts: Sequence[int], values: np.ndarray, at: Sequence[float], level: float = LEVEL) -> np.ndarray:
    """Low, middle and high `(3, len(at))` of the mean score with other numbers of labels, by power laws.

    `values` are scores `(independent runs of seeds, counts)`, of 3 counts or more. Within [0, 1], as scores are.
    """
    shares, means, errors = _power_laws(counts, values, np.asarray(at, dtype=float))
    wanted = np.array([(1 - level) / 2, 0.5, (1 + level) / 2])[:, None]
    low, high = np.full((3, len(at)), -1.0), np.full((3, len(at)), 2.0)
    for _ in range(30):  # to a millionth of a point
        middle = (low + high) / 2
        below = np.einsum("c,cqn->qn", shares, 1 - _chance(means[:, None] - middle, errors[:, None], len(values)))
        low, high = np.where(below < wanted, middle, low), np.where(below < wanted, high, middle)
    return np.clip((low + high) / 2, 0.0, 1.0)


def needed(counts: Sequence[int], values: np.ndarray, score: float, level: float = LEVEL) -> Labels:
    """How many labels more than the most that were measured a score takes; infinite beyond REACH times as many."""
    places = _whole_numbers(counts[-1], REACH * counts[-1], counts[-1])
    shares, means, errors = _power_laws(counts, values, places.astype(float))
    reached = shares @ _chance(means - score, errors, len(values))
    tail = (1 - level) / 2
    ends = [places[np.argmax(reached >= p)] if (reached >= p).any() else math.inf for p in (0.5, tail, 1 - tail)]
    return Labels(*(float(end) - counts[-1] for end in ends))


def _power_laws(counts: Sequence[int], values: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of each exponent `(C,)`, and with it the mean score and its standard error `(C, N)`."""
    rows, most = len(values), counts[-1]
    weight = np.asarray(counts) / most  # what comes next is more like what was last
    fits, means, errors = [], [], []
    for exponent in EXPONENTS:
        laws = _laws(np.asarray(counts) / most, exponent)
        solve = np.linalg.pinv(laws * weight[:, None]) * weight  # (2, counts)
        own = values @ solve.T  # of each row: its score with most labels, its steepness
        fits.append(rows * (len(counts) - 2) / 2 * np.log(_squares((values - own @ laws.T) * weight) + 1e-12))
        found = own @ _laws(at / most, exponent).T
        growth = -own.mean(axis=0) @ _laws(np.array([0.5]), exponent)[0] + own[:, 0].mean()
        bend = BEND * growth * np.log2(np.maximum(at / most, 1.0))
        means.append(found.mean(axis=0))
        errors.append(np.sqrt(found.var(axis=0, ddof=1) / rows + bend**2))
    shares = np.exp(np.min(fits) - np.array(fits))
    return shares / shares.sum(), np.array(means), np.array(errors)


def _laws(ratio: np.ndarray, exponent: float) -> np.ndarray:
    """`(N, 2)`: 1, and (1 - ratio^-c) / c, whose limit at 0 is the logarithm."""
    own = np.log(ratio) if exponent == 0 else (1 - ratio**-exponent) / exponent
    return np.stack([np.ones(len(ratio)), own], axis=1)


def _squares(left: np.ndarray) -> float:
    return float((left**2).sum())


def _chance(means: np.ndarray, error: np.ndarray, rows: int) -> np.ndarray:
    """That a mean of so many rows is above 0 in truth, by Student."""
    return stdtr(rows - 1, means / np.maximum(error, 1e-12))


def _whole_numbers(least: int, most: int, also: int) -> np.ndarray:
    """All, or where there are many some, equally far apart by their ratio."""
    return np.unique([*np.geomspace(least, most, PLACES).round().astype(int), also])


# ---- of a study ----


def curves(found: Comparison) -> tuple[LabelCurve, ...]:
    """Of every arm, the baseline first, with each choice of the other keys, where 2 numbers of labels have 3 runs."""
    return tuple(own for arm, held in product(found.arms, _held(found)) if (own := _curve(found, arm, held)))


def _curve(found: Comparison, arm: Arm, held: Condition) -> LabelCurve | None:
    score = found.main_score
    runs = {
        count: {
            run.pair: ((run.scores[score],), run.weights or str(run.pair))
            for run in arm.at(condition)
            if score is not None and score in run.scores and not run.apart
        }
        for count, condition in _conditions(found, held)
    }
    counts, (values,) = _complete(runs, 1, found.level)
    return LabelCurve(arm, held, counts, values, found.level) if counts else None


def worths(found: Comparison) -> tuple[Worth, ...]:
    """Of every arm that has a baseline, with each choice of the other keys, where 2 numbers of labels have 3 pairs."""
    gains = {(gain.arm, gain.condition): gain for gain in found.gains}
    listed = []
    for arm, held in product(found.baselines, _held(found)):
        pairs = {}
        for count, condition in _conditions(found, held):
            gain = gains.get((arm, condition))
            if gain is not None:
                sides = zip(gain.base.values, gain.own.values, strict=True)
                pairs[count] = dict(zip(gain.keys, zip(sides, gain.starts, strict=True), strict=True))
        counts, (base, own) = _complete(pairs, 2, found.level)
        listed += [Worth(arm, held, counts, base, own, found.level)] * bool(counts)
    return tuple(listed)


def _complete(
    runs: Mapping[int, Mapping[Any, tuple[tuple[float, ...], str]]], sides: int, level: float
) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """The numbers of labels with enough runs, and the scores of each side of the seeds that have all of them.

    Runs that share a pretraining count by their mean, as in every gain. No numbers where too little is left.
    """
    counts = tuple(count for count in sorted(runs) if len(runs[count]) >= MIN_PAIRS)
    keys = [key for key in runs[counts[0]] if all(key in runs[count] for count in counts)] if counts else []
    if len(counts) < 2 or len(keys) < MIN_PAIRS:
        return (), [np.empty((0, 0))] * sides
    starts = [" ".join(runs[count][key][1] for count in counts) for key in keys]

    def column(count: int, side: int) -> tuple[float, ...]:
        return independent(of_starts([runs[count][key][0][side] for key in keys], starts, level))

    return counts, [np.array([column(count, side) for count in counts]).T for side in range(sides)]


def _held(found: Comparison) -> Iterator[Condition]:
    """Every choice of the keys beside the number of labels; none where that is no axis."""
    if len(found.axes.get(AXIS, ())) > 1:
        others = {key: values for key, values in found.axes.items() if key != AXIS}
        for values in product(*others.values()):
            yield tuple(zip(others, values, strict=True))


def _conditions(found: Comparison, held: Condition) -> Iterator[tuple[int, Condition]]:
    """Those with a number of labels; `null`, which takes all images, is none."""
    for condition in found.conditions:
        if {*held} <= {*condition}:
            with suppress(ValueError):
                yield int(dict(condition)[AXIS]), condition


# ---- in words ----


def sentence(found: Comparison) -> str:
    """What the arms of a study are worth in labelled images; '' where numbers of labels are no axis."""
    if len(found.axes.get(AXIS, ())) < 2:
        return ""
    listed = worths(found)
    if not listed:
        return f"What labelled images are worth cannot be told: no two numbers of labels have {MIN_PAIRS} pairs each."
    if len(listed) > NAMED:
        return _counted(found, listed)
    words = [worth_in_words(found, own) for own in listed]
    if len(listed) == 1:
        (own,) = listed
        words += [needs_in_words(curve) for curve in curves(found) if curve.arm is own.arm and curve.can_look_ahead]
    return f"{begun('; '.join(words))}."


def worth_in_words(found: Comparison, worth: Worth) -> str:
    """`with 20 labelled images pretraining (four) is worth 37 more (95 % interval 22 to 61)`."""
    count = worth.told_at
    own, level = worth.at(count), level_text(worth.level)
    subject = f"pretraining ({worth.arm.label})" if found.shows_pretraining(worth.arm) else worth.arm.label
    at = f"with {count:,} labelled images{f' under {condition_text(worth.held)}' if worth.held else ''}"
    if own.high == 0 and math.isinf(own.low):  # a loss with the fewest labels
        return f"what {subject} costs {at} cannot be told (fewer were not measured)"
    if _sign(own) == 0:
        return f"what {subject} is worth {at} cannot be told ({level} interval {between(own, worth, count)})"
    verb = "is worth" if own.low > 0 else "costs"
    nearer, farther = sorted((abs(own.low), abs(own.high)))
    more = " more" if own.low > 0 else ""
    if math.isinf(farther):
        return f"{at} {subject} {verb} at least {nearer:,.0f}{more} ({level} bound; no further was measured)"
    return f"{at} {subject} {verb} {abs(own.middle):,.0f}{more} ({level} interval {nearer:,.0f} to {farther:,.0f})"


def between(own: Labels, worth: Worth, count: int) -> str:
    """`-3 to 12`."""
    return f"{in_words(own.low, worth, count)} to {in_words(own.high, worth, count)}"


def in_words(labels: float, worth: Worth, count: int) -> str:
    """`12`; `more than 20` where only so many more than `count` were measured, and `less than` on the other side.

    A dash where nothing was measured there.
    """
    if math.isinf(labels):
        end = worth.counts[-1 if labels > 0 else 0] - count
        return with_minus(f"{'more' if labels > 0 else 'less'} than {end:,}") if end else NOTHING
    return with_minus(f"{labels:,.0f}")


def needs_in_words(curve: LabelCurve) -> str:
    """`70 % mIoU needs about 120 more than 40 (95 % interval 60 to 300)`; of a curve to look ahead."""
    own, most = curve.needs, f"{curve.counts[-1]:,}"
    level, subject = level_text(curve.level), f"{100 * curve.next_score:.0f} % mIoU needs"
    if own.low == 0 and math.isinf(own.high):
        return f"how many more than {most} it takes to {100 * curve.next_score:.0f} % mIoU cannot be told"
    if math.isinf(own.low):
        return f"{subject} {needed_in_words(own.low, curve)} beyond {most}"
    if math.isinf(own.middle):
        return f"{subject} at least {own.low:,.0f} more than {most} ({level} bound)"
    ends = f"{own.low:,.0f} to {needed_in_words(own.high, curve)}"
    return f"{subject} about {own.middle:,.0f} more than {most} ({level} interval {ends})"


def needed_in_words(labels: float, curve: LabelCurve) -> str:
    """`120`, or `more than 120` where that is as far as a curve is followed."""
    return f"more than {(REACH - 1) * curve.counts[-1]:,}" if math.isinf(labels) else f"{labels:,.0f}"


def _counted(found: Comparison, listed: Sequence[Worth]) -> str:
    """Of many none is picked out."""
    signs = Counter(_sign(own.at(own.told_at)) for own in listed)
    told = [f"{verb} some in {signs[sign]}" for sign, verb in ((1, "is worth"), (-1, "costs")) if signs[sign]]
    told += [f"in {signs[0]} this cannot be told"] * bool(signs[0])
    return f"In labelled images, of {len(listed)} comparisons with {found.over} an arm {_listed(told)}."


def _listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _sign(own: Labels) -> int:
    return 1 if own.low > 0 else -1 if own.high < 0 else 0


# ---- as a table ----


def rows(found: Comparison) -> list[dict[str, Any]]:
    """Of labels.csv: for each arm what it scores with each number of labels, and is worth; then what lies ahead."""
    of_arm = {(own.arm, own.held): own for own in worths(found)}
    return [row for curve in curves(found) for row in _rows_of(curve, of_arm.get((curve.arm, curve.held)))]


def _rows_of(curve: LabelCurve, worth: Worth | None) -> Iterator[dict[str, Any]]:
    """Shares from 0 to 1, labelled images; `inf` is beyond what was measured, nothing where nothing can be said."""
    about = {"arm": curve.arm.label, **dict(curve.held)}
    for place, count in enumerate(curve.counts):
        values = curve.values[:, place].tolist()
        interval = t_interval(values, curve.level)
        row = {**about, AXIS: count, "predicted": 0, "n": len(values), "score": mean(values)}
        row |= {"low": interval and interval.low, "high": interval and interval.high}
        row |= _columns("worth", worth.at(count) if worth is not None and count in worth.counts else None)
        ahead = curve.can_look_ahead and count == curve.counts[-1]
        row |= {"next_score": curve.next_score if ahead else None}
        yield row | _columns("needs", curve.needs if ahead else None)
    if curve.can_look_ahead:
        counts = (2 * curve.counts[-1], REACH * curve.counts[-1])
        for count, (low, middle, high) in zip(counts, curve.ahead(counts).T.tolist(), strict=True):
            row = {**about, AXIS: count, "predicted": 1, "n": len(curve.values), "score": middle}
            row |= {"low": low, "high": high, **_columns("worth", None), "next_score": None}
            yield row | _columns("needs", None)


def _columns(name: str, own: Labels | None) -> dict[str, float | None]:
    ends = {"": None, "_low": None, "_high": None}
    if own is not None:
        ends = {"": own.middle, "_low": own.low, "_high": own.high}
    return {f"{name}{end}": value for end, value in ends.items()}

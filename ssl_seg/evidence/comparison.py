"""What a comparison is: arms scored under the same conditions, and the paired gain of each over its baseline.

Run folders, an MLflow experiment (`compare`) and a study (`results`) are all read into one `Comparison`. Sentences,
tables and pages are made from it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from ssl_seg.config import UserError
from ssl_seg.evidence.pairs import Changed, Pairs, Spread, independent, of_starts, over_starts
from ssl_seg.evidence.passport import Passports
from ssl_seg.evidence.statistics import LEVEL, Interval, bootstrap_t_interval, holm_where_known, sign_flip_p, t_interval
from ssl_seg.runs.folder import RunFolder, software_of
from ssl_seg.scores import ImageConfusions, read_image_confusion

SCRATCH = "scratch"
MAIN_SCORES = ("test/miou", "val/miou")

Condition = tuple[tuple[str, str], ...]  # dotted keys of a study's grid with their values as text; () without a grid


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run as a comparison sees it."""

    name: str  # of its folder as it was given, of a study's cell, or in MLflow
    stage: str
    pair: Hashable  # what two runs of different arms have in common that are a pair: the seeds
    scores: Mapping[str, float]  # `val/miou`, `test/iou/road`, `val/denoise/psnr`; empty until it has finished
    condition: Condition = ()
    status: str = "finished"
    message: str = ""  # why it is not finished
    settings: Mapping[str, str] = field(default_factory=dict)  # `compare.outcome`
    start: str | None = None  # the name of the run that it started from
    weights: str | None = None  # which weights it started from; None from scratch
    passports: Passports = field(default_factory=dict)  # what the scores of each part mean
    labelled: str = ""  # digest of the labelled images; '' where there are none or they were not noted
    held_out: str = ""  # digest of the names of a pretraining's held-out images; '' where it is not known
    leaks: str = "none"  # `folder.leak_word`
    apart: str = ""  # why it is no pair with the run of the baseline that has the same seeds
    run: RunFolder | None = None  # None for a run that is known from MLflow alone

    @property
    def folder(self) -> Path | None:
        return None if self.run is None else self.run.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """Of its run; empty where it is not known."""
        return {} if self.run is None else self.run.config

    @property
    def software(self) -> Mapping[str, str]:
        """What it was made with; empty where it is not known."""
        return {} if self.run is None else software_of(self.run.record)


@dataclass(frozen=True, eq=False)
class Arm:
    """One of what is compared: runs that differ in their seeds alone, and in a study in their condition."""

    label: str  # short, and different from those of the other arms
    outcomes: tuple[Outcome, ...]
    from_scratch: bool = False  # whether these are fine-tunings, or evaluations of some, that started from no weights
    tasks: tuple[str, ...] | None = None  # of a study's `subsets`, those that it was pretrained with; else None

    @property
    def settings(self) -> Mapping[str, str]:
        return self.outcomes[0].settings

    @property
    def stage(self) -> str:
        return self.outcomes[0].stage

    @property
    def passports(self) -> Passports:
        return self.outcomes[0].passports

    @property
    def runs(self) -> tuple[RunFolder, ...]:
        return tuple(outcome.run for outcome in self.outcomes if outcome.run is not None)

    def at(self, condition: Condition) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.condition == condition)

    def spread(self, score: str | None, condition: Condition = ()) -> Spread | None:
        """Of the runs under a condition that have the score; None where none has it, or no score is to be looked at."""
        if score is None:
            return None
        values = [outcome.scores[score] for outcome in self.at(condition) if score in outcome.scores]
        return Spread(tuple(values)) if values else None


@dataclass(frozen=True, eq=False)
class Gain:
    """The paired differences of an arm to its baseline in one score, and how sure their mean is."""

    arm: Arm
    score: str
    differences: Spread  # one for each choice of seeds; `Shared` where some pairs start from one pretraining
    conditions: tuple[Condition, ...] = ((),)  # those that each difference is the mean over
    level: float = LEVEL

    @property
    def n(self) -> int:
        return self.differences.n

    @property
    def mean(self) -> float:
        return self.differences.mean

    @property
    def values(self) -> tuple[float, ...]:
        return self.differences.values

    @property
    def independent(self) -> tuple[float, ...]:
        """What counts as independent: the means of pretrainings that pairs share, or the pairs."""
        return independent(self.differences)

    @property
    def interval(self) -> Interval | None:
        """By which a gain is told: Student's, of what counts as independent; None for a single pair."""
        return self.over_starts or self.over_seeds

    @cached_property
    def over_seeds(self) -> Interval | None:
        """Student's, of the pairs."""
        return t_interval(self.values, self.level)

    @cached_property
    def over_starts(self) -> Interval | None:
        """Student's, over pretrainings where 3 or more serve several pairs each and count as independent; else None."""
        means = over_starts(self.differences)
        return None if means is None else t_interval(means, self.level)

    @cached_property
    def bootstrap(self) -> Interval | None:
        """Of the pairs as `over_seeds`, without normal differences."""
        return bootstrap_t_interval(self.values, self.level)

    @cached_property
    def p(self) -> float | None:
        """Exact, by sign flips of what counts as independent; None below 8 of them."""
        return sign_flip_p(self.independent)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedGain(Gain):
    """A gain under one condition, with what is known of its pairs."""

    base: Spread  # what the baseline reaches
    own: Spread  # what the arm reaches
    keys: tuple[Hashable, ...]  # what the runs of a pair have in common
    starts: tuple[str, ...]  # the weights behind it, on either side; its key where all is from scratch
    num_weights: int  # different ones that the arm starts from; 0 from scratch
    p_holm: float | None = None  # `p` adjusted for all comparisons that have one

    @property
    def condition(self) -> Condition:
        return self.conditions[0]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Arms, each with its baseline if it has one, under every condition."""

    arms: tuple[Arm, ...]
    baselines: Mapping[Arm, Arm]  # what the gains of an arm are measured from; none of an arm that is not in it
    tables: tuple[tuple[Arm, ...], ...]  # the arms whose scores may be ranked together
    bases: tuple[Arm, ...] = ()  # those that others may be measured from
    over: str = SCRATCH  # what gains are over, in words
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the keys of the conditions, with their values
    conditions: tuple[Condition, ...] = ((),)
    level: float = LEVEL
    resamples: int = 10_000  # of the images, for an interval over them
    # Dotted key -> its value in each arm, None where it has none: only keys in which arms differ.
    differing: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    apart: tuple[str, ...] = ()  # a line for all that is not compared with the rest, and why
    unfinished: tuple[str, ...] = ()  # runs that were left out, for they have no result yet

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        return tuple(outcome for arm in self.arms for outcome in arm.outcomes)

    @cached_property
    def scores(self) -> tuple[str, ...]:
        """Every score that some run has."""
        return tuple(dict.fromkeys(name for outcome in self.outcomes for name in outcome.scores))

    @cached_property
    def main_score(self) -> str | None:
        """The mIoU to look at: that which most runs have; None where none has one, as among pretrainings."""
        return main_score_of(self.arms)

    @property
    def part(self) -> str:
        """The part whose scores are looked at: `test` or `val`."""
        return (self.main_score or MAIN_SCORES[-1]).partition("/")[0]

    def arm(self, label: str) -> Arm:
        return next(arm for arm in self.arms if arm.label == label)

    def shows_pretraining(self, arm: Arm) -> bool:
        """Whether its gain is one of pretraining; over a pretrained baseline it is one of something else."""
        return not arm.from_scratch and self.baselines[arm].from_scratch

    def pairs(self, arm: Arm, condition: Condition = ()) -> Pairs[Outcome]:
        """The runs of an arm and of its baseline by what a pair has in common; none for an arm without a baseline."""
        return self._pairs(arm, condition)

    def gain(self, arm: Arm, score: str, condition: Condition = ()) -> PairedGain | None:
        """Of the pairs that have the score on both sides; None where there are none.

        Several runs of the same seeds count by their mean.
        """
        pairs = self.pairs(arm, condition)
        sides, differences = pairs.sides(score), pairs.gain(score)
        if differences is None:
            return None
        starts = [dict.fromkeys(pairs.start_of(key, base, run) for run in own) for key, (base, own) in sides.items()]
        base, own = (
            Spread(tuple(mean(run.scores[score] for run in of[side]) for of in sides.values())) for side in (0, 1)
        )
        return PairedGain(
            arm,
            score,
            differences,
            (condition,),
            self.level,
            base=base,
            own=own,
            keys=tuple(sides),
            starts=tuple(map(" ".join, starts)),
            num_weights=len({run.weights for _, runs in sides.values() for run in runs} - {None}),
        )

    @cached_property
    def gains(self) -> tuple[PairedGain, ...]:
        """In the main score, of every arm under every condition that has one."""
        score = self.main_score
        if score is None:
            return ()
        pairs = [(arm, condition) for condition in self.conditions for arm in self.arms]
        found = [gain for arm, condition in pairs if (gain := self.gain(arm, score, condition)) is not None]
        adjusted = holm_where_known([gain.p for gain in found])
        return tuple(replace(gain, p_holm=p) for gain, p in zip(found, adjusted, strict=True))

    @cached_property
    def class_gains(self) -> tuple[PairedGain, ...]:
        """Those in each class's IoU, for each of `gains`."""
        names = [name for name in self.scores if name.startswith(f"{self.part}/iou/")]
        every = [self.gain(gain.arm, name, gain.condition) for gain in self.gains for name in names]
        return tuple(gain for gain in every if gain is not None)

    def over_conditions(self, arm: Arm) -> Gain | None:
        """The gain of an arm as its mean over the conditions that have pairs, a value a seed.

        None without a seed that has a pair under all of these.
        """
        gains = [gain for gain in self.gains if gain.arm is arm]
        if len(gains) < 2:
            return gains[0] if gains else None
        rows = [dict(zip(gain.keys, zip(gain.values, gain.starts, strict=True), strict=True)) for gain in gains]
        common = [key for key in rows[0] if all(key in row for row in rows)]
        if not common:
            return None
        values = [mean(row[key][0] for row in rows) for key in common]
        starts = [" ".join(row[key][1] for row in rows) for key in common]
        conditions = tuple(gain.condition for gain in gains)
        return Gain(arm, gains[0].score, of_starts(values, starts, self.level), conditions, self.level)

    def over_images(self, arm: Arm, score: str, condition: Condition = ()) -> Interval | None:
        """Where the gain in a mIoU lies for other images of the same kind: `Pairs.over_images`.

        None too where the images of a run are damaged, which `faults` then tells: all else is as good as before.
        """
        return self._over_images(arm, score, condition)

    def changed(
        self, arm: Arm, score: str, condition: Condition = (), most: int | None = None
    ) -> tuple[Changed[Outcome], ...]:
        """The images that differ most from the baseline come first: `Pairs.changed`."""
        return self.pairs(arm, condition).changed(score, most)

    @cached_property
    def faults(self) -> list[str]:
        """Why intervals over images are missing that could not be made; filled by `over_images`."""
        return []

    @cached_property
    def _pairs(self) -> Callable[[Arm, Condition], Pairs[Outcome]]:
        """Makes each once: they are asked for again for every score."""
        return cache(self._make_pairs)

    def _make_pairs(self, arm: Arm, condition: Condition) -> Pairs[Outcome]:
        baseline = self.baselines.get(arm)
        if baseline is None:
            return Pairs({}, {})
        pretrained = [not side.from_scratch for side in (baseline, arm)]
        sides = baseline.at(condition), arm.at(condition)
        # Weights that all runs start from are a setting of theirs as the network is: what is compared is another one.
        is_setting = all(pretrained) and len({run.weights for side in sides for run in side}) == 1

        def start(base: Outcome, own: Outcome) -> str | None:
            """The weights behind a pair, on the sides that start from some; None where they are no source of chance."""
            weights = [run.weights or "" for run, starts in zip((base, own), pretrained, strict=True) if starts]
            return " ".join(weights) if weights and not is_setting else None

        return Pairs(_by_pair(sides[0]), _by_pair(sides[1]), start, self._read, self.level)

    @cached_property
    def _over_images(self) -> Callable[[Arm, str, Condition], Interval | None]:
        """Resamples for each once."""
        return cache(self._resample)

    def _resample(self, arm: Arm, score: str, condition: Condition) -> Interval | None:
        try:
            return self.pairs(arm, condition).over_images(score, self.resamples)
        except UserError as error:
            self.faults.append(str(error))
            return None

    @cached_property
    def _read(self) -> Callable[[Path], Mapping[str, ImageConfusions]]:
        """Reads the images of a run once: a baseline has many comparisons."""
        return cache(read_image_confusion)


def main_score_of(arms: Sequence[Arm]) -> str | None:
    """The mIoU that most runs of some arms have; None where none has one."""
    outcomes = [outcome for arm in arms for outcome in arm.outcomes]
    counts = {name: sum(name in outcome.scores for outcome in outcomes) for name in MAIN_SCORES}
    name = max(MAIN_SCORES, key=counts.__getitem__)  # the first of equals
    return name if counts[name] else None


def labels_of(arms: Iterable[Arm]) -> str:
    return ", ".join(arm.label for arm in arms)


def condition_text(condition: Condition) -> str:
    """`labels.count=10, train.steps=400`."""
    return ", ".join(f"{key}={value}" for key, value in condition)


def _by_pair(outcomes: Iterable[Outcome]) -> dict[Hashable, list[Outcome]]:
    """Runs by what a pair has in common."""
    found: dict[Hashable, list[Outcome]] = {}
    for outcome in outcomes:
        if not outcome.apart:
            found.setdefault(outcome.pair, []).append(outcome)
    return found

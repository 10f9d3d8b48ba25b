"""Runs side by side: groups that differ in seeds alone, their scores with spread, and only the keys that differ.

Fine-tunings are paired with those from scratch that had the same seeds, and so the same labelled images, order and
crops: the spread of such gains is smaller than that of the scores, and is what tells whether pretraining helped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ssl_seg.config import UserError
from ssl_seg.runs import RunFolder, described, find_runs, origin, scores_of
from ssl_seg.tracking import prepare

SEEDS = ("seed", "labels.seed")  # keys that only draw random numbers: runs that differ in them are one group
TIMM = "model.encoder.pretrained"
# What a fine-tuning from scratch has otherwise than its pretrained twin.
STARTS = ("init", "init_allow", "transfer", TIMM)
SCRATCH = "scratch"
SEED_IN_NAME = re.compile(r"[_\-. ]*(?:p|s|seed)?[_\-. ]*[0-9]+$")  # of pretrained_0, four_p1, run-seed2
MAIN_SCORES = ("test/miou", "val/miou")


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
class Outcome:
    """A finished run as a comparison sees it."""

    name: str
    stage: str
    settings: dict[str, str]  # dotted key -> value as text; those of the run it started from are under `init.`
    seeds: dict[str, str]
    start: str | None  # the name of what it started from
    scores: dict[str, float]  # `val/miou`, `test/iou/road`, `val/denoise/psnr`

    @property
    def kind(self) -> tuple[str, ...]:
        """What all runs of its group have in common."""
        return self.stage, *(f"{key}={value}" for key, value in sorted(self.settings.items()))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    label: str  # short, and different from those of the other groups
    outcomes: tuple[Outcome, ...]

    @property
    def settings(self) -> dict[str, str]:
        return self.outcomes[0].settings

    @property
    def stage(self) -> str:
        return self.outcomes[0].stage

    @property
    def from_scratch(self) -> bool:
        """Whether these are fine-tunings that started from no weights at all."""
        return _is_scratch(self.outcomes)

    def spread(self, score: str) -> Spread | None:
        """Of the runs that have the score; None where none has it."""
        values = [outcome.scores[score] for outcome in self.outcomes if score in outcome.scores]
        return Spread(tuple(values)) if values else None


@dataclass(frozen=True)
class Comparison:
    """Pretrainings first, then what is from scratch, then the others, each in the order in which they were given."""

    groups: tuple[Group, ...]
    differing: dict[str, tuple[str | None, ...]]  # dotted key -> its value in each group, None where it has none
    unfinished: tuple[str, ...]  # runs that were left out, for they have no result yet

    @cached_property
    def scores(self) -> tuple[str, ...]:
        """Every score that some run has."""
        outcomes = (outcome for group in self.groups for outcome in group.outcomes)
        return tuple(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))

    @cached_property
    def main_score(self) -> str | None:
        """The mIoU to look at: that which most fine-tunings have; None among pretrainings."""
        outcomes = [outcome for group in self.groups for outcome in group.outcomes]
        counts = {name: sum(name in outcome.scores for outcome in outcomes) for name in MAIN_SCORES}
        name = max(MAIN_SCORES, key=counts.__getitem__)  # the first of equals
        return name if counts[name] else None

    def baseline(self, group: Group) -> Group | None:
        """The fine-tunings from scratch with the same settings otherwise; None for themselves, or if there are none."""
        if group.stage != "finetune" or group.from_scratch:
            return None
        others = (other for other in self.groups if other.from_scratch)
        return next((other for other in others if _without_start(other) == _without_start(group)), None)

    def gain(self, group: Group, score: str) -> Spread | None:
        """Paired differences to the baseline, one for each choice of seeds; None without such pairs.

        Runs of the same seeds, as those from several pretrainings, count by their mean: they share their baseline.
        """
        baseline = self.baseline(group)
        if baseline is None:
            return None
        base, own = _by_seeds(baseline, score), _by_seeds(group, score)
        differences = [mean(own[seeds]) - mean(base[seeds]) for seeds in own if seeds in base]
        return Spread(tuple(differences)) if differences else None


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Group the runs in `folders`; a folder without a run.json stands for the runs in it. None counts twice.

    Raises UserError for one that neither is nor holds a run, and where no run has a result yet.
    """
    found = find_runs(folders)
    unfinished = [str(run.folder) for run in found if not run.is_done]
    return group([_outcome(run) for run in found if run.is_done], unfinished)


def compare_experiment(experiment: str, uri: str | None = None) -> Comparison:
    """The same for the runs of an MLflow experiment, which need no folders here."""
    prepare()
    from ssl_seg.tracking.server import fetch  # mlflow is wanted here alone

    fetched = fetch(experiment, uri)
    done = [run for run in fetched if run.scores]
    outcomes = [outcome(run.name, run.stage, run.description, run.scores) for run in done]
    return group(outcomes, [run.name for run in fetched if not run.scores])


def group(outcomes: Sequence[Outcome], unfinished: Sequence[str] = ()) -> Comparison:
    """Those that differ in their seeds alone together. Raises UserError where there is nothing to compare."""
    if not outcomes:
        first = unfinished[0] if unfinished else "compare"
        raise UserError(f"{first}: has no result yet; finish it by the command that started it")
    members: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault(outcome.kind, []).append(outcome)
    kinds = sorted(members.values(), key=lambda own: (own[0].stage == "finetune", not _is_scratch(own)))
    differing = _differing([(own[0].stage, own[0].settings) for own in kinds])
    starts = tuple(", ".join(dict.fromkeys(run.start for run in own if run.start)) or None for own in kinds)
    if len(set(starts)) > 1:
        differing = {"init": starts, **{key: values for key, values in differing.items() if key != "init"}}
    labels = _labels(kinds, differing)
    groups = tuple(Group(label, tuple(own)) for label, own in zip(labels, kinds, strict=True))
    return Comparison(groups, differing, tuple(unfinished))


def _outcome(run: RunFolder) -> Outcome:
    # Runs of the first versions do not say where they came from.
    start = run.record["origin"] if "origin" in run.record else origin(run.config.get("init"))
    scores = scores_of(run.result or {})
    return outcome(str(run.folder), run.stage, described(run.config, start), scores)


def outcome(name: str, stage: str, description: Mapping[str, str], scores: Mapping[str, float]) -> Outcome:
    """A run from what `runs.described` says of it."""
    seeds = {key: description[key] for key in SEEDS if key in description}
    settings = {key: value for key, value in description.items() if _tells_apart(key, description)}
    init = Path(description.get("init", "null"))
    start = init.resolve().parent.name if init.name == "encoder" else init.name
    return Outcome(name, stage, settings, seeds, None if start == "null" else start, dict(scores))


def _tells_apart(key: str, description: Mapping[str, str]) -> bool:
    """Not seeds, of whichever stage; nor the folder of a start that is described itself."""
    bare = key
    while bare.startswith("init."):
        bare = bare.removeprefix("init.")
    return bare not in SEEDS and f"{key}.stage" not in description


def _by_seeds(group: Group, score: str) -> dict[tuple[tuple[str, str], ...], list[float]]:
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for outcome in group.outcomes:
        if score in outcome.scores:
            found.setdefault(tuple(sorted(outcome.seeds.items())), []).append(outcome.scores[score])
    return found


def _without_start(group: Group) -> dict[str, str]:
    return {key: value for key, value in group.settings.items() if not _is_start(key)}


def _is_start(key: str) -> bool:
    return key in STARTS or key.startswith("init.")


# ---- what differs ----


def _differing(kinds: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, tuple[str | None, ...]]:
    """Only keys that tell groups of the same stage apart: those of another stage are other keys."""
    found: dict[str, tuple[str | None, ...]] = {}
    for stage in dict.fromkeys(stage for stage, _ in kinds):
        trees = [_tree(settings) if own == stage else None for own, settings in kinds]
        for key, values in _differing_below("", trees).items():
            former = found.get(key, (None,) * len(kinds))
            found[key] = tuple(one if one is not None else other for one, other in zip(former, values, strict=True))
    return found


def _differing_below(prefix: str, trees: Sequence[Any]) -> dict[str, tuple[str | None, ...]]:
    """Where some have a whole mapping and others have not, that is one line, not forty."""
    mappings = [tree for tree in trees if isinstance(tree, Mapping)]
    found: dict[str, tuple[str | None, ...]] = {}
    for key in dict.fromkeys(key for tree in mappings for key in tree):
        values = [tree.get(key) if isinstance(tree, Mapping) else None for tree in trees]
        shown = tuple("given" if isinstance(value, Mapping) else value for value in values)
        among = {value for value, tree in zip(shown, trees, strict=True) if isinstance(tree, Mapping)}
        if len(among) > 1:
            found[f"{prefix}{key}"] = shown
        if any(isinstance(value, Mapping) for value in values):
            found |= _differing_below(f"{prefix}{key}.", values)
    return found


def _tree(flat: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        place = tree
        *parents, last = key.split(".")
        for parent in parents:
            below = place.get(parent)
            place[parent] = below if isinstance(below, dict) else {}
            place = place[parent]
        place[last] = value
    return tree


# ---- names ----


def _labels(kinds: Sequence[Sequence[Outcome]], differing: Mapping[str, Sequence[str | None]]) -> list[str]:
    """What a group starts from, then the keys in which it differs from the others."""
    labels = []
    told = [key for key in differing if not _is_start(key)]
    for index, own in enumerate(kinds):
        first = own[0]
        words = [_start_label(own)] if first.stage == "finetune" else [first.stage]
        _, _, decoder = first.settings.get("transfer", "").partition("+")
        words += [f"+ {decoder} decoder"] if decoder else []
        rest = [f"{key}={differing[key][index]}" for key in told if differing[key][index] is not None]
        labels.append(" ".join([*words, f"({', '.join(rest)})"] if rest else words))
    return [label if labels.count(label) == 1 else f"{label} #{number}" for number, label in enumerate(labels, start=1)]


def _is_scratch(own: Iterable[Outcome]) -> bool:
    return all(outcome.stage == "finetune" and outcome.start is None and not _of_timm(outcome) for outcome in own)


def _of_timm(outcome: Outcome) -> bool:
    """`pretrained` is true, a tag or a file."""
    return outcome.settings.get(TIMM, "false") not in ("false", "null")


def _start_label(own: Iterable[Outcome]) -> str:
    outcomes = list(own)
    names = list(dict.fromkeys(outcome.start for outcome in outcomes if outcome.start is not None))
    if not names:
        return "weights of timm" if _of_timm(outcomes[0]) else SCRATCH
    if len(names) > 1:
        names = list(dict.fromkeys(SEED_IN_NAME.sub("", name) or name for name in names))
    return ", ".join(names)

"""Runs side by side: groups that differ in seeds alone, their scores with spread, and only the keys that differ.

Fine-tunings are paired with those from scratch that had the same seeds and labelled images. Scores of different
passports (another definition, other images) are never ranked together: they stand in tables of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ssl_seg.config import UserError
from ssl_seg.evidence.pairs import Changed, Pairs, Shared, Spread, software_in_words
from ssl_seg.evidence.passport import Passports, definition_of, differing, passports_in
from ssl_seg.evidence.statistics import Interval
from ssl_seg.runs.folder import (
    RunFolder,
    description_of,
    find_runs,
    labelled_digest,
    leak_word,
    scores_of,
    software_of,
    transfer_in_words,
)
from ssl_seg.scores import ImageConfusions, read_image_confusion

SEEDS = ("seed", "labels.seed")  # keys that only draw random numbers: runs that differ in them are one group
# By which no weight and no score comes out differently: runs on different machines may be one group.
IDLE = ("train.workers", "train.log_every", "train.save_every", "workers")
TIMM = "model.encoder.pretrained"
# What a fine-tuning from scratch has otherwise than its pretrained twin.
STARTS = ("init", "init_allow", "transfer", TIMM)
SCRATCH = "scratch"
SEED_IN_NAME = re.compile(r"[_\-. ]*(?:p|s|seed)?[_\-. ]*[0-9]+$")  # of pretrained_0, four_p1, run-seed2
MAIN_SCORES = ("test/miou", "val/miou")
# Of images, for an interval at a glance: its ends then move by 3 % of its width from seed to seed, and 500 runs take
# seconds. A study's own tables take more.
RESAMPLES = 2_000
LEAKS = {  # what is to be said of scores by the word for their run's leaks.json
    "allowed": "trained on some of the scored images, which leaks.allow let pass",
    "cut": "trained on frames beside scored ones, at the cut that the run made itself",
    "found": "trained on some of the scored images",
    "unchecked": "not checked for training images among the scored ones (leaks.check=false)",
    "unknown": "started from weights whose training images are not known, so these were not checked",
}


@dataclass(frozen=True)
class Outcome:
    """A finished run as a comparison sees it."""

    name: str
    stage: str
    settings: dict[str, str]  # dotted key -> value as text; those of the run it started from are under `init.`
    seeds: dict[str, str]
    start: str | None  # the name of what it started from
    scores: dict[str, float]  # `val/miou`, `test/iou/road`, `val/denoise/psnr`
    passports: Passports = field(default_factory=dict)  # what the scores of each part mean
    labelled: str = ""  # digest of the labelled images; '' where there are none or they were not noted
    folder: Path | None = None  # None for a run that is known from MLflow alone
    leaks: str = "none"  # `folder.leak_word`
    held_out: str = ""  # digest of the names of a pretraining's held-out images; '' where it is not known
    software: Mapping[str, str] = field(default_factory=dict)  # what it was made with; empty where it is not known
    weights: str | None = None  # the folder that it started from; None from scratch, and from weights of timm

    @property
    def kind(self) -> tuple[str, ...]:
        """What all runs of its group have in common."""
        settings = (f"{key}={value}" for key, value in sorted(self.settings.items()))
        return self.stage, *settings, *definition_of(self.passports)

    @property
    def draws(self) -> tuple[Any, ...]:
        """What two runs have in common that are a pair."""
        return *sorted(self.seeds.items()), self.labelled


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
    def passports(self) -> Passports:
        return self.outcomes[0].passports

    @property
    def from_scratch(self) -> bool:
        """Whether these are fine-tunings, or evaluations of some, that started from no weights at all."""
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
        return main_score_of(self.groups)

    @cached_property
    def tables(self) -> tuple[tuple[Group, ...], ...]:
        """The groups whose scores may be ranked together: within one no two passports of a part differ."""
        found: list[list[Group]] = []
        for group in self.groups:
            fitting = (table for table in found if not _differing_passports(table, group))
            table = next(fitting, None)
            if table is None:
                found.append([group])
            else:
                table.append(group)
        return tuple(tuple(table) for table in found)

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """A line for each table but the first: by what its scores are others; and one for scores without a passport."""
        lines = []
        for table in self.tables[1:]:
            fields = _differing_passports(self.tables[0], table[0])
            lines.append(f"not ranked with the first table: {_labels_of(table)}; it differs in {'; '.join(fields)}")
        unknown = [group for group in self.groups if None in group.passports.values()]
        if unknown:
            lines.append(f"no passport, so nothing says whether the images are the same: {_labels_of(unknown)}")
        return tuple(lines)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """`apart`, and a line for all else that is to be known of scores: leaks, and other held-out images."""
        lines = [f"{said}: {_having(self.groups, word)}" for word, said in LEAKS.items() if _having(self.groups, word)]
        pretrained = [group for group in self.groups if group.stage == "pretrain"]
        held_out = {outcome.held_out for group in pretrained for outcome in group.outcomes if outcome.held_out}
        if len(held_out) > 1:
            lines.append(
                f"scored on different held-out images (data.val), so not to be ranked: {_labels_of(pretrained)}"
            )
        of_groups = ((group, self.pairs(group), main_score_of([group])) for group in self.groups)
        software = {own.label: pairs.other_software(score) for own, pairs, score in of_groups if pairs and score}
        told = software_in_words(software.values())
        if told:
            names = ", ".join(label for label, other in software.items() if other)
            lines.append(f"not made with the same as what is from scratch ({told}): {names}")
        gains = ((group, self.gain(group, score)) for group in self.groups if (score := main_score_of([group])))
        shared = [(group.label, gain) for group, gain in gains if isinstance(gain, Shared)]
        if shared:
            counts = ", ".join(f"{label} ({gain.n} pairs, pretrainings: {gain.num_starts})" for label, gain in shared)
            lines.append(f"pairs that start from one pretraining are not independent: {counts}")
        return (*self.apart, *lines)

    def baseline(self, group: Group) -> Group | None:
        """What is from scratch with the same settings otherwise; None for themselves, or if there is none."""
        if id(group) not in self._baselines:
            self._baselines[id(group)] = self._find_baseline(group)
        return self._baselines[id(group)]

    @cached_property
    def _baselines(self) -> dict[int, Group | None]:
        """By the group's identity: of hundreds of groups each is asked for again for every score."""
        return {}

    def _find_baseline(self, group: Group) -> Group | None:
        if group.from_scratch or not _is_finetuned(group.outcomes[0]):
            return None
        wanted = _without_start(group)
        same = [other for other in self.groups if other.stage == group.stage and _without_start(other) == wanted]
        scratch = [other for other in same if other.from_scratch]
        return next((other for other in scratch if not differing(other.passports, group.passports)), None)

    def pairs(self, group: Group) -> Pairs[Outcome] | None:
        """The runs of the group and those of its baseline with the same seeds and the same labelled images."""
        baseline = self.baseline(group)
        if baseline is None:
            return None
        return Pairs(_by_draws(baseline), _by_draws(group), lambda _, run: run.weights or "", self._read)

    def gain(self, group: Group, score: str) -> Spread | None:
        """Paired differences to the baseline, one for each choice of seeds; None without such pairs.

        `Shared` where pairs start from one pretraining; several runs of the same seeds count by their mean.
        """
        pairs = self.pairs(group)
        return None if pairs is None else pairs.gain(score)

    def over_images(self, group: Group, score: str) -> Interval | None:
        """Where the gain in a mIoU lies for other images of the same kind: `Pairs.over_images`."""
        pairs = self.pairs(group)
        return None if pairs is None else pairs.over_images(score, resamples=RESAMPLES)

    def changed(self, group: Group, score: str, most: int | None = None) -> tuple[Changed[Outcome], ...]:
        """The images that differ most from the baseline come first: `Pairs.changed`."""
        pairs = self.pairs(group)
        return () if pairs is None else pairs.changed(score, most)

    @cached_property
    def _read(self) -> Callable[[Path], Mapping[str, ImageConfusions]]:
        """Reads the images of a run once: a baseline has many comparisons."""
        return cache(read_image_confusion)


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Group the runs in `folders`; a folder without a run.json stands for the runs in it. None counts twice.

    Raises UserError for one that neither is nor holds a run, and where no run has a result yet.
    """
    found = find_runs(folders)
    unfinished = [str(run.folder) for run in found if not run.is_done]
    return group([_outcome(run) for run in found if run.is_done], unfinished)


def main_score_of(groups: Sequence[Group]) -> str | None:
    """The mIoU that most runs of some groups have; None where none has one."""
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    counts = {name: sum(name in outcome.scores for outcome in outcomes) for name in MAIN_SCORES}
    name = max(MAIN_SCORES, key=counts.__getitem__)  # the first of equals
    return name if counts[name] else None


def group(outcomes: Sequence[Outcome], unfinished: Sequence[str] = ()) -> Comparison:
    """Those that differ in their seeds alone together. Raises UserError where there is nothing to compare."""
    if not outcomes:
        first = unfinished[0] if unfinished else "compare"
        raise UserError(f"{first}: has no result yet; finish it by the command that started it")
    members: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault(outcome.kind, []).append(outcome)
    kinds = sorted(members.values(), key=lambda own: (_is_finetuned(own[0]), not _is_scratch(own)))
    differing = _differing([(own[0].stage, own[0].settings) for own in kinds])
    starts = tuple(", ".join(dict.fromkeys(run.start for run in own if run.start)) or None for own in kinds)
    if len(set(starts)) > 1:
        differing = {"init": starts, **{key: values for key, values in differing.items() if key != "init"}}
    labels = _labels(kinds, differing)
    groups = tuple(Group(label, tuple(own)) for label, own in zip(labels, kinds, strict=True))
    return Comparison(groups, differing, tuple(unfinished))


def _outcome(run: RunFolder) -> Outcome:
    result = run.result or {}
    held_out = (run.read("data.json") or {}).get("val", {}).get("sha256_of_names", "")
    return outcome(
        str(run.folder),
        run.stage,
        description_of(run.record),
        scores_of(result),
        passports=passports_in(result),
        labelled=labelled_digest(run.read("split.json")),
        folder=run.folder,
        leaks=leak_word(run.read("leaks.json")),
        held_out=held_out,
        software=software_of(run.record),
    )


def outcome(
    name: str,
    stage: str,
    description: Mapping[str, str],
    scores: Mapping[str, float],
    passports: Passports | None = None,
    labelled: str = "",
    folder: Path | None = None,
    leaks: str = "none",
    held_out: str = "",
    software: Mapping[str, str] | None = None,
) -> Outcome:
    """A run from what `folder.description_of` says of it."""
    seeds = {key: description[key] for key in SEEDS if key in description}
    settings = {key: value for key, value in description.items() if _tells_apart(key, description)}
    init = Path(description.get("init", "null")).resolve()
    home = init.parent if init.name == "encoder" else init  # one pretraining, however it was named
    return Outcome(
        name=name,
        stage=stage,
        settings=settings,
        seeds=seeds,
        start=None if init.name == "null" else home.name,
        scores=dict(scores),
        passports=passports or {},
        labelled=labelled,
        folder=folder,
        leaks=leaks,
        held_out=held_out,
        software=software or {},
        weights=None if init.name == "null" else str(home),
    )


def _tells_apart(key: str, description: Mapping[str, str]) -> bool:
    """Not seeds and what changes nothing, of whichever stage; nor the folder of a start that is described itself."""
    bare = key
    while bare.startswith("init."):
        bare = bare.removeprefix("init.")
    return bare not in (*SEEDS, *IDLE) and f"{key}.stage" not in description


def _labels_of(groups: Iterable[Group]) -> str:
    return ", ".join(group.label for group in groups)


def _having(groups: Iterable[Group], word: str) -> str:
    counts = [(group, sum(outcome.leaks == word for outcome in group.outcomes)) for group in groups]
    return ", ".join(f"{group.label} ({count} of {len(group.outcomes)} runs)" for group, count in counts if count)


def _by_draws(group: Group) -> dict[tuple[Any, ...], list[Outcome]]:
    """The runs of a group by their choice of seeds."""
    found: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in group.outcomes:
        found.setdefault(outcome.draws, []).append(outcome)
    return found


def _differing_passports(table: Sequence[Group], group: Group) -> list[str]:
    found = (differing(other.passports, group.passports) for other in table)
    return next((fields for fields in found if fields), [])


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
    several = len({own[0].stage for own in kinds}) > 1
    for index, own in enumerate(kinds):
        first = own[0]
        words = [_start_label(own)] if _is_finetuned(first) else [first.stage]
        words += ["evaluated"] if words != ["evaluate"] and first.stage == "evaluate" and several else []
        words += transfer_in_words(first.settings.get("transfer", ""))
        rest = [f"{key}={differing[key][index]}" for key in told if differing[key][index] is not None]
        labels.append(" ".join([*words, f"({', '.join(rest)})"] if rest else words))
    return [label if labels.count(label) == 1 else f"{label} #{number}" for number, label in enumerate(labels, start=1)]


def _is_scratch(own: Iterable[Outcome]) -> bool:
    return all(_is_finetuned(outcome) and outcome.start is None and not _of_timm(outcome) for outcome in own)


def _is_finetuned(outcome: Outcome) -> bool:
    """A fine-tuning, or an evaluation that says of which one."""
    return outcome.stage == "finetune" or (outcome.stage == "evaluate" and any(map(_is_start, outcome.settings)))


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

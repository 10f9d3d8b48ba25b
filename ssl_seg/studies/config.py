"""What a study may be asked: its config, and the arms that it compares.

A study compares *arms*, such as from scratch and from a pretrained encoder, under every combination of the *grid*, such
as 5 to 80 labelled images, each with the same *seeds*: arms are paired by them, so that they see the same labelled
images in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ssl_seg.config import Config, UserError, find_recipe, flatten, merge, read_words, unflatten
from ssl_seg.evidence.comparison import SCRATCH
from ssl_seg.evidence.statistics import LEVEL
from ssl_seg.runs.folder import transfer_in_words

IMAGENET = "imagenet"  # an `init`: the weights that timm publishes for the encoder
NO_TASK = "no task"  # the arm of no task, where all pretrainings of `subsets` go on from weights
MAX_SEEDS = 10_000  # each is a run of every arm
MAX_TASKS = 6  # of `subsets`: 63 pretrainings and 64 arms
ARM_AXES = ("init", "transfer")  # keys of the grid that are compared, not conditions of the comparison


def _flat(values: Any) -> Any:
    """Dotted keys, however they were nested: the command line makes `labels: {count: [5]}` of `labels.count=[5]`."""
    return flatten(values) if isinstance(values, Mapping) else values


Dotted = Annotated[dict[str, Any], BeforeValidator(_flat)]


class Search(Config):
    """The learning rate, or whatever else, chosen for each arm by itself: else the one that suits the baseline wins.

    Each value is tried with `seeds` seeds of its own under every condition, at the cell's own budget, and scored on
    labelled images that are held out of `data.labelled`; neither data.val nor data.test is looked at. So every arm has
    the same budget of trials, and the labelled images that choose are more than `labels.count` says.
    """

    grid: Annotated[dict[str, list[Any]], BeforeValidator(_flat)]  # keys, each with the values that are tried
    seeds: PositiveInt = 2  # with which each value is tried
    at: Dotted = Field(default={})  # axes of the grid held at one value while searching, to save time

    @field_validator("grid")
    @classmethod
    def _something(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return _axes(grid, "search.grid")


class Primary(Config):
    """The comparisons that a study is made for, named before a score is seen.

    The answer speaks of them, and is corrected for their number; all else is exploratory. A study that has a score
    keeps those that it was begun with.
    """

    contrasts: dict[str, str] = Field(min_length=1)  # an arm -> the arm that it is measured from, perhaps no baseline
    at: Dotted = Field(default={})  # axes of the grid held at one value; over those left out a gain is the mean


class StudyConfig(Config):
    """`ssl-seg study`: what its YAML may hold."""

    finetune: dict[str, Any]  # what all cells share: keys of `ssl-seg finetune`, over those of a `recipe`
    # Pretrainings to be made first: keys of `ssl-seg pretrain`, or with `data.labelled` of `ssl-seg finetune`, where
    # other images' masks are learnt first, as of drawn scenes.
    pretrain: dict[str, dict[str, Any]] = Field(default={})
    # Keys of one pretraining more. It is made with every choice of its tasks, each of them an arm, beside one without
    # pretraining: `evidence.ledger` then tells what each task earned. All else is the same, steps and images too.
    subsets: dict[str, Any] = Field(default={})
    # How many of each, with seeds 0, 1, ...; the seeds of the study take them in turn. With one for each seed the
    # intervals hold for other pretrainings too; fewer save time, and the page says so.
    pretrainings: PositiveInt = 1
    arms: dict[str, Dotted] = Field(default={})  # by name, what each changes; `init` may name one of `pretrain`
    # What the comparison is repeated under: dotted keys of `ssl-seg finetune`, each with its values. `init`,
    # `transfer` and the keys in `compare` make arms instead.
    grid: Annotated[dict[str, list[Any]], BeforeValidator(_flat)] = Field(default={})
    compare: tuple[str, ...] = ()  # axes of the grid that make arms
    baseline: str | None = None  # the arm that gains are measured from; None: the one from scratch, else the first
    # Pairs: a number, or a list. 8 are the fewest for an exact p below 0.01; their interval is a third of that of 3.
    seeds: tuple[int, ...] = tuple(range(8))
    search: Search | None = None  # what each arm chooses for itself
    primary: Primary | None = None  # None: every arm against the baseline, corrected for their number
    level: float = Field(default=LEVEL, gt=0.5, lt=1.0)  # of the intervals, and of what they tell
    timeout: PositiveFloat | None = None  # seconds that a cell may take
    # Seconds without a line of metrics, a picture, a checkpoint or a word, after which a cell hangs: from its first
    # step on. Before it an hour at least, since imports from a slow disk and a look at every image say nothing.
    stall: PositiveFloat | None = 3600.0
    submitit: dict[str, Any] = Field(default={})  # parameters of --executor submitit, such as slurm_partition

    @model_validator(mode="before")
    @classmethod
    def _seed_is_an_axis_too(cls, values: Any) -> Any:
        """`grid: {seed: [0, 1]}` is `seeds: [0, 1]`."""
        if isinstance(values, Mapping) and isinstance(values.get("grid"), Mapping) and "seed" in values["grid"]:
            grid = dict(values["grid"])
            if "seeds" in values:
                raise ValueError("seeds and grid.seed are both given; keep one of them")
            return {**values, "seeds": grid.pop("seed"), "grid": grid}
        return values

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_of_seeds(cls, seeds: Any) -> Any:
        if not isinstance(seeds, int) or isinstance(seeds, bool):
            return seeds
        if seeds > MAX_SEEDS:
            raise ValueError(f"{seeds}: {MAX_SEEDS} pairs at most; name fewer")
        return tuple(range(seeds))

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)}: name one seed or more, each once")
        return seeds

    @field_validator("grid")
    @classmethod
    def _axes_with_values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return _axes(grid, "grid")

    @field_validator("pretrain", "arms")
    @classmethod
    def _plain_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not re.fullmatch(r"[\w+\-. ]+", name) or name.startswith("."):
                raise ValueError(f"'{name}' cannot name a folder; use letters, digits and _ + - .")
            if name == "init":  # so the leak guard calls what weights from elsewhere were trained on
                raise ValueError("'init' is the key that names a start; choose another name")
        return named

    @model_validator(mode="after")
    def _arms_from_one_place(self) -> StudyConfig:
        axes = [key for key in self.grid if key in ARM_AXES or key in self.compare]
        for place in ("arms", "subsets"):
            if getattr(self, place) and axes:
                raise ValueError(
                    f"{place}, and the axis {axes[0]} of the grid, both say what is compared; keep one of them"
                )
        for key in self.compare:
            if key not in self.grid:
                raise ValueError(f"compare: {key} is no axis of the grid; name one of: {', '.join(self.grid)}")
        for key in self.search.at if self.search else ():
            if key not in self.grid:
                raise ValueError(f"search.at: {key} is no axis of the grid")
        for key, value in self.primary.at.items() if self.primary else ():
            if value not in self.grid.get(key, ()):
                raise ValueError(f"primary.at.{key}: {value} is no value of that axis of the grid")
        return self


def _axes(grid: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    for key, values in grid.items():
        texts = [json.dumps(value, default=str) for value in values]
        if not values or len(set(texts)) < len(texts):
            raise ValueError(f"{where}.{key}: name one value or more, each once")
    return grid


# ---- arms ----


@dataclass(frozen=True)
class PlannedArm:
    """One of what a study compares, before it has runs (`evidence.comparison.Arm`)."""

    name: str
    changes: Mapping[str, Any]  # dotted keys of `ssl-seg finetune`
    pretraining: str | None = None  # the one of `pretrainings_of` that it starts from
    tasks: tuple[str, ...] | None = None  # of `subsets`, those that it is pretrained with; None for any other arm


def arms_of(config: StudyConfig) -> tuple[PlannedArm, ...]:
    """What is compared: the named arms, or every combination of the axes that make arms."""
    pretrainings = pretrainings_of(config)
    if config.arms or config.subsets:
        return (*_subset_arms(config), *(_arm(name, changes, pretrainings) for name, changes in config.arms.items()))
    axes = {key: values for key, values in config.grid.items() if key in ARM_AXES or key in config.compare}
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    # Without weights to start from no decoder can come along, and timm publishes none.
    plain = [own for own in combinations if own.get("init", True) not in (None, IMAGENET) or _is_plain(own)]
    arms = [_arm(_arm_name(own), own, pretrainings) for own in plain]
    if len(arms) < 2:
        raise UserError("arms: nothing to compare; name two arms or more, or give grid.init several values")
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"grid.init: two arms would be called '{twice}'; name them under arms: instead")
    return tuple(arms)


def base(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that a study gives a stage, on those of the `recipe` among them."""
    own = unflatten({key: value for key, value in given.items() if key != "recipe"})
    if "recipe" not in given:
        return own
    if not isinstance(given["recipe"], str):
        raise UserError(f"{where}.recipe: not the name of a recipe or a YAML file: {given['recipe']!r}")
    find_recipe(given["recipe"])
    return merge(read_words([given["recipe"]]), own)


def pretrainings_of(config: StudyConfig) -> dict[str, dict[str, Any]]:
    """The keys of every pretraining by its name: those of `pretrain`, and one for each choice of tasks of `subsets`."""
    made = {"+".join(own["tasks"]): own for own in _subsets(config)}
    twice = next((name for name in made if name in config.pretrain), None)
    if twice is not None:
        raise UserError(f"pretrain.{twice}: so one of subsets is called already; choose another name")
    return {**config.pretrain, **made}


def _subsets(config: StudyConfig) -> Iterator[dict[str, Any]]:
    """The keys of a pretraining with each choice of the tasks, few tasks first; none without `subsets`."""
    if not config.subsets:
        return
    given = base(config.subsets, "subsets")
    named = given.get("tasks")
    tasks = {name: own for name, own in named.items() if own is not None} if isinstance(named, Mapping) else {}
    if not 2 <= len(tasks) <= MAX_TASKS:
        many = f"{len(tasks)} of them; name 2 to {MAX_TASKS}, as in tasks: {{denoise: {{}}, inpaint: {{}}}}"
        raise UserError(f"subsets.tasks: {many}: every choice is a pretraining")
    odd = next((name for name in tasks if not re.fullmatch(r"[\w\-]+", name)), None)
    if odd is not None:
        raise UserError(f"subsets.tasks.{odd}: names an arm and a folder; use letters, digits, _ and -")
    for size in range(1, len(tasks) + 1):
        for chosen in combinations(tasks, size):
            yield {**given, "tasks": {name: tasks[name] for name in chosen}}


def _subset_arms(config: StudyConfig) -> Iterator[PlannedArm]:
    """One for each choice of tasks, after one with none, which starts where all the pretrainings start."""
    made = list(_subsets(config))
    if not made:
        return
    before = {"init": made[0].get("init"), **_pretrained(made[0])}
    changes = {key: value for key, value in before.items() if value}
    names = [NO_TASK if changes else SCRATCH, *("+".join(own["tasks"]) for own in made)]
    twice = next((name for name in names if name in config.arms), None)
    if twice is not None:
        raise UserError(f"arms.{twice}: so one of subsets is called already; choose another name")
    yield PlannedArm(names[0], changes, tasks=())
    for name, own in zip(names[1:], made, strict=True):
        yield PlannedArm(name, {"init": name}, name, tuple(own["tasks"]))


def _pretrained(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the encoder of a pretraining begins with published weights, as the key of a fine-tuning."""
    encoder = (given.get("model") or {}).get("encoder")
    return {"model.encoder.pretrained": encoder.get("pretrained")} if isinstance(encoder, Mapping) else {}


def _is_plain(changes: Mapping[str, Any]) -> bool:
    return changes.get("transfer", "encoder") == "encoder"


def _arm(name: str, changes: Mapping[str, Any], pretrainings: Collection[str]) -> PlannedArm:
    start = changes.get("init")
    if start is not None and not isinstance(start, str):
        raise UserError(f"arm {name}: init is a name, a path, imagenet or null, not {start!r}")
    if start in pretrainings:
        return PlannedArm(name, changes, start)
    if start == IMAGENET:
        return PlannedArm(name, {**changes, "init": None, "model.encoder.pretrained": True})
    return PlannedArm(name, changes)


def _arm_name(changes: Mapping[str, Any]) -> str:
    """`scratch`, `four`, `four + denoise decoder`; other axes by their value."""
    words = []
    if "init" in changes:
        start = changes["init"]
        place = Path(str(start))
        folder = place.parent if place.name == "encoder" else place
        words.append("scratch" if start is None else folder.name)
    words += transfer_in_words(str(changes.get("transfer", "")))
    words += [f"{key}={value}" for key, value in changes.items() if key not in ARM_AXES]
    return " ".join(words) or "encoder"


def conditions_of(config: StudyConfig) -> dict[str, list[Any]]:
    """The axes of the grid that make no arms."""
    return {key: own for key, own in config.grid.items() if key not in (*ARM_AXES, *config.compare)}


def refuse_keys_said_twice(config: StudyConfig, arms: Sequence[PlannedArm]) -> None:
    """A key that an arm, the grid and the search all set would be that of the last, and the others said in vain."""
    places = {f"arms.{arm.name}": list(arm.changes) for arm in arms} if config.arms else {}
    places |= {"grid": list(conditions_of(config)), "search.grid": list(config.search.grid) if config.search else []}
    for place, keys in places.items():
        for key in keys:
            if key in ("seed", "labels.seed"):
                raise UserError(f"{place}.{key}: the seeds of a study are those of `seeds`; drop the key")
            for other, others in places.items():
                clash = next((own for own in others if _overlap(key, own)), None)
                arms_alone = place.startswith("arms.") and other.startswith("arms.")
                if clash is not None and place < other and not arms_alone:
                    raise UserError(f"{place}.{key}: {other}.{clash} sets it too; say it in one place")


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")

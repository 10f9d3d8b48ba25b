"""What a study is made of: its config, and from it every run with an id, before anything is done.

A study compares *arms*, such as from scratch and from a pretrained encoder, under every combination of the *grid*, such
as 5 to 80 labelled images, each with the same *seeds*: arms are paired by them, so that they see the same labelled
images in the same order. A *cell* is one of these fine-tunings, known by its whole config and the weights it starts
from: what is done already can be told from what is not, whatever else of the study has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ssl_seg import files, weights
from ssl_seg.config import Config, UserError, find_recipe, flatten, load, merge, read_words, unflatten
from ssl_seg.findings import CELLS, PRETRAINED, SEARCHED
from ssl_seg.finetune import FinetuneConfig
from ssl_seg.pretrain import PretrainConfig

IMAGENET = "imagenet"  # an `init`: the weights that timm publishes for the encoder
ARM_AXES = ("init", "transfer")  # keys of the grid that are compared, not conditions of the comparison
SEARCH_SEEDS = 1000  # the first seed of the search: no cell of the study has it, so none was tuned on its own draws
NUM_HEX = 8  # of a cell's digest: among 10,000 cells two share one with a chance of 1 %, and then names differ too


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

    grid: Annotated[dict[str, list[Any]], BeforeValidator(_flat)]
    seeds: PositiveInt = 2
    at: Dotted = Field(default={})  # axes of the grid held at one value while searching, to save time

    @field_validator("grid")
    @classmethod
    def _something(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return _axes(grid, "search.grid")


class StudyConfig(Config):
    """`ssl-seg study`: what its YAML may hold."""

    finetune: dict[str, Any]  # what all cells share: keys of `ssl-seg finetune`, over those of a `recipe`
    pretrain: dict[str, dict[str, Any]] = Field(default={})  # pretrainings to be made first: keys of `ssl-seg pretrain`
    # How many of each, with seeds 0, 1, ...; seed s of the study starts from number s modulo this. As many as seeds
    # show how much pretrainings differ; fewer save time, and the page says so.
    pretrainings: PositiveInt = 1
    arms: dict[str, Dotted] = Field(default={})  # by name, what each changes; `init` may name one of `pretrain`
    # What the comparison is repeated under: dotted keys of `ssl-seg finetune`, each with its values. `init`,
    # `transfer` and the keys in `compare` make arms instead.
    grid: Annotated[dict[str, list[Any]], BeforeValidator(_flat)] = Field(default={})
    compare: tuple[str, ...] = ()
    baseline: str | None = None  # the arm that gains are measured from; None: the one from scratch, else the first
    # Pairs: a number, or a list. 8 are the fewest for an exact p below 0.01, and halve the interval of 3.
    seeds: tuple[int, ...] = tuple(range(8))
    search: Search | None = None
    level: float = Field(default=0.95, gt=0.5, lt=1.0)  # of the intervals
    timeout: PositiveFloat | None = None  # seconds that a cell may take
    stall: PositiveFloat | None = 3600.0  # without a line of metrics, a picture, a checkpoint or a word: it hangs
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
        return tuple(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

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
        return named

    @model_validator(mode="after")
    def _arms_from_one_place(self) -> StudyConfig:
        axes = [key for key in self.grid if key in ARM_AXES or key in self.compare]
        if self.arms and axes:
            raise ValueError(f"arms, and the axis {axes[0]} of the grid, both say what is compared; keep one of them")
        for key in self.compare:
            if key not in self.grid:
                raise ValueError(f"compare: {key} is no axis of the grid; name one of: {', '.join(self.grid)}")
        for key in self.search.at if self.search else ():
            if key not in self.grid:
                raise ValueError(f"search.at: {key} is no axis of the grid")
        return self


def _axes(grid: dict[str, list[Any]], where: str) -> dict[str, list[Any]]:
    for key, values in grid.items():
        texts = [json.dumps(value, default=str) for value in values]
        if not values or len(set(texts)) < len(texts):
            raise ValueError(f"{where}.{key}: name one value or more, each once")
    return grid


# ---- the plan ----


@dataclass(frozen=True)
class Arm:
    """One of what is compared."""

    name: str
    changes: Mapping[str, Any]  # dotted keys of `ssl-seg finetune`
    pretraining: str | None = None  # the one of `pretrain` that it starts from

    @property
    def from_scratch(self) -> bool:
        return self.changes.get("init") is None and not self.changes.get("model.encoder.pretrained")


@dataclass(frozen=True)
class Cell:
    """One run of a study: a fine-tuning, or a pretraining that some of them start from."""

    stage: Literal["pretrain", "finetune"]
    place: str  # CELLS, PRETRAINED or SEARCHED: the folder in the study's that its own lies in
    id: str  # its folder's name
    config: Config
    arm: str  # of a pretraining its name
    condition: Mapping[str, Any]
    seed: int
    start: str | None = None  # the id of the study's pretraining that it starts from


@dataclass(frozen=True)
class Plan:
    """All that a study is going to do, before anything is done."""

    arms: tuple[Arm, ...]
    baseline: str
    axes: Mapping[str, Sequence[Any]]  # the grid without what makes arms
    pretrainings: Mapping[tuple[str, int], Cell]  # by name and seed
    cells: tuple[Cell, ...]


def arms_of(config: StudyConfig) -> tuple[Arm, ...]:
    """What is compared: the named arms, or every combination of the axes that make arms."""
    if config.arms:
        return tuple(_arm(name, changes, config) for name, changes in config.arms.items())
    axes = {key: values for key, values in config.grid.items() if key in ARM_AXES or key in config.compare}
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    # Without weights to start from no decoder can come along.
    possible = [own for own in combinations if own.get("init", True) or own.get("transfer", "encoder") == "encoder"]
    arms = [_arm(_arm_name(own), own, config) for own in possible if own.get("init") != IMAGENET or _is_plain(own)]
    if len(arms) < 2:
        raise UserError("arms: nothing to compare; name two arms or more, or give grid.init several values")
    return tuple(arms)


def _is_plain(changes: Mapping[str, Any]) -> bool:
    return changes.get("transfer", "encoder") == "encoder"


def _arm(name: str, changes: Mapping[str, Any], config: StudyConfig) -> Arm:
    start = changes.get("init")
    if start in config.pretrain:
        return Arm(name, changes, start)
    if start == IMAGENET:
        return Arm(name, {**changes, "init": None, "model.encoder.pretrained": True})
    return Arm(name, changes)


def _arm_name(changes: Mapping[str, Any]) -> str:
    """`scratch`, `four`, `four + denoise decoder`; other axes by their value."""
    words = []
    if "init" in changes:
        start = changes["init"]
        place = None if start is None else Path(start)
        folder = place and (place.parent if place.name == "encoder" else place)
        words.append("scratch" if folder is None else folder.name)
    _, _, decoder = str(changes.get("transfer", "")).partition("+")
    words += [f"+ {decoder} decoder"] if decoder else []
    words += [f"{key}={value}" for key, value in changes.items() if key not in ARM_AXES]
    return " ".join(words) or "encoder"


def baseline_of(config: StudyConfig, arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    if config.baseline is None:
        return next((arm.name for arm in arms if arm.from_scratch), names[0])
    if config.baseline not in names:
        raise UserError(f"baseline: there is no arm '{config.baseline}'; name one of: {', '.join(names)}")
    return config.baseline


def make_plan(config: StudyConfig, out: Path, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> Plan:
    """Every run of the study with its config, checked. `chosen` is what a search has found (`choice_key` -> keys).

    Raises UserError that names the arm where a config is wrong.
    """
    arms = arms_of(config)
    axes = {key: own for key, own in config.grid.items() if key not in (*ARM_AXES, *config.compare)}
    needed = dict.fromkeys(arm.pretraining for arm in arms if arm.pretraining)
    pretrainings = {(name, seed): _pretraining(config, name, seed, out) for name in needed for seed in _starts(config)}
    common = _common(config)
    cells = []
    for values in product(*axes.values()):
        condition = dict(zip(axes, values, strict=True))
        for arm, seed in product(arms, config.seeds):
            found = (chosen or {}).get(choice_key(config, arm.name, condition), {})
            cells.append(_cell(config, common, arm, condition, seed, {**condition, **found}, pretrainings, out))
    return Plan(arms, baseline_of(config, arms), axes, pretrainings, tuple(cells))


def _starts(config: StudyConfig) -> range:
    return range(min(config.pretrainings, max(1, len(config.seeds))))


def _pretraining(config: StudyConfig, name: str, seed: int, out: Path) -> Cell:
    values = merge(base(config.pretrain[name], f"pretrain.{name}"), {"seed": seed})
    whole = _checked(PretrainConfig, _tracked(values, out), f"pretrain.{name}")
    return Cell("pretrain", PRETRAINED, f"{slug(name)}-seed{seed}-{_digest(whole, None)}", whole, name, {}, seed)


def _cell(
    config: StudyConfig,
    common: Mapping[str, Any],
    arm: Arm,
    condition: Mapping[str, Any],
    seed: int,
    keys: Mapping[str, Any],
    pretrainings: Mapping[tuple[str, int], Cell],
    out: Path,
    searching: bool = False,
) -> Cell:
    """One fine-tuning; `common` is what all share, `keys` are those of its condition and of its search."""
    values = merge(common, unflatten(arm.changes))
    values = merge(values, unflatten(keys))
    values = merge(values, {"seed": seed, "labels": {"seed": seed}})
    start = None
    if arm.pretraining:
        place = config.seeds.index(seed) if seed in config.seeds else seed
        start = pretrainings[arm.pretraining, place % len(_starts(config))]
        values["init"] = str(out / PRETRAINED / start.id)
    if searching:
        values = merge(values, {"data": {"val": None, "test": None}, "select": "last"})
    whole = _checked(FinetuneConfig, _tracked(values, out), f"arm {arm.name}")
    digest = _digest(whole, start.id if start else _start_digest(whole.init))
    words = [slug(arm.name), *(f"{_short(key)}{slug(str(value))}" for key, value in keys.items()), f"seed{seed}"]
    folder = SEARCHED if searching else CELLS
    name = "-".join([*words, digest])
    return Cell("finetune", folder, name, whole, arm.name, condition, seed, start.id if start else None)


def _common(config: StudyConfig) -> dict[str, Any]:
    """What all arms share. Where the study names no model, that of the first pretraining or start is everybody's.

    Else the arm from scratch would take the default, and the others what they start from.
    """
    values = base(config.finetune, "finetune")
    if "model" in values:
        return values
    for arm in arms_of(config):
        start = arm.changes.get("init")
        if arm.pretraining:
            values["model"] = base(config.pretrain[arm.pretraining], f"pretrain.{arm.pretraining}").get("model", {})
        elif start is not None:
            values["model"] = weights.read_encoder_info(start).get("config", {})
        if values.get("model"):
            break
    return values


def base(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that a study gives a stage, on those of the `recipe` among them."""
    own = unflatten({key: value for key, value in given.items() if key != "recipe"})
    if "recipe" not in given:
        return own
    if not isinstance(given["recipe"], str):
        raise UserError(f"{where}.recipe: not the name of a recipe or a YAML file: {given['recipe']!r}")
    find_recipe(given["recipe"])
    return merge(read_words([given["recipe"]]), own)


def _checked(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    try:
        return load(cls, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _tracked(values: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The run as a child of the study's in MLflow, unless the study says otherwise."""
    own = values.get("tracking", {})
    return dict(values) if isinstance(own, str) else merge(values, {"tracking": {"parent": out.name, **own}})


def _digest(config: Config, start: str | None) -> str:
    """Of all that decides what comes out: the weights a run starts from, not where they lie nor how it is watched."""
    kept = {key: value for key, value in config.dump().items() if key not in ("tracking", "leaks", "init")}
    return files.sha256(json.dumps([kept, start], sort_keys=True).encode())[:NUM_HEX]


def _start_digest(init: str | None) -> str | None:
    if init is None:
        return None
    info = weights.read_encoder_info(init)
    if "sha256" in info:
        return info["sha256"]
    return files.sha256(Path(init).read_bytes())


def slug(text: str) -> str:
    """Fit for a file's name, and short; the digest behind it tells apart what is cut away."""
    return re.sub(r"[^\w+.]+", "_", text).strip("_")[:32]


def _short(key: str) -> str:
    return key.rpartition(".")[2]


# ---- the search ----


def choice_key(config: StudyConfig, arm: str, condition: Mapping[str, Any]) -> str:
    """Which search a cell takes its keys from: that of its arm, and of its condition with `search.at` laid on it."""
    held = config.search.at if config.search else {}
    return json.dumps([arm, {**condition, **held}])


@dataclass(frozen=True)
class Trial:
    """A run of the search."""

    key: str
    found: Mapping[str, Any]  # the keys it tries
    cell: Cell


def make_trials(config: StudyConfig, plan: Plan, out: Path) -> tuple[Trial, ...]:
    """The runs that choose each arm's own values; none without a search."""
    if config.search is None:
        return ()
    tries = [dict(zip(config.search.grid, own, strict=True)) for own in product(*config.search.grid.values())]
    common = _common(config)
    trials: dict[str, Trial] = {}
    for values in product(*plan.axes.values()):
        condition = {**dict(zip(plan.axes, values, strict=True)), **config.search.at}
        for arm, found, number in product(plan.arms, tries, range(config.search.seeds)):
            keys = {**condition, **found}
            seed = SEARCH_SEEDS + number
            cell = _cell(config, common, arm, condition, seed, keys, plan.pretrainings, out, searching=True)
            trials[cell.id] = Trial(choice_key(config, arm.name, condition), found, cell)
    return tuple(trials.values())


def choose(trials: Sequence[Trial], scores: Mapping[str, float]) -> dict[str, Mapping[str, Any]]:
    """For each search the keys with the best mean of `scores` (id -> mIoU), the first of equals."""
    found: dict[str, dict[str, list[float]]] = {}
    for trial in trials:
        tried = found.setdefault(trial.key, {}).setdefault(json.dumps(trial.found), [])
        tried += [scores[trial.cell.id]] if trial.cell.id in scores else []
    best = {}
    for key, tried in found.items():
        means = {text: mean(values) for text, values in tried.items() if values}
        if means:
            best[key] = json.loads(max(means, key=means.__getitem__))
    return best

"""Every run of a study with its config and an id, before anything is done.

A *cell* is one fine-tuning, known by its whole config and the weights it starts from: what is done already can be told
from what is not, whatever else of the study has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Generic, Literal, TypeVar

from ssl_seg import files
from ssl_seg.config import (
    C,
    Config,
    UserError,
    flatten,
    load,
    merge,
    unflatten,
    user_path,
)
from ssl_seg.evidence.results import CELLS, FOLDS, PRETRAINED, SEARCHED
from ssl_seg.runs.folder import WATCHING, WHOLE
from ssl_seg.stages.finetune import SEGMENT, FinetuneConfig, check_data
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.setup import check_images
from ssl_seg.studies.config import (
    PlannedArm,
    StudyConfig,
    arms_of,
    base,
    conditions_of,
    pretrainings_of,
    refuse_keys_said_twice,
)
from ssl_seg.weights.export import read_encoder_info

SEARCH_SEEDS = 1000  # the first seed of the search, or above the study's own, so that none is tuned on its own draws
NUM_HEX = 8  # of a cell's digest: among 10,000 cells two share one with a chance of 1 %, and then names differ too


Stage = TypeVar("Stage", bound=PretrainConfig | FinetuneConfig)


@dataclass(frozen=True)
class Cell(Generic[Stage]):
    """One run of a study: a fine-tuning, or a pretraining that some of them start from."""

    stage: Literal["pretrain", "finetune"]
    place: str  # CELLS, FOLDS, PRETRAINED or SEARCHED: the folder in the study's that its own lies in
    id: str  # its folder's name
    config: Stage
    arm: str  # of a pretraining its name
    condition: Mapping[str, Any]
    seed: int
    start: str | None = None  # the id of the study's pretraining that it starts from
    folds: tuple[Cell[FinetuneConfig], ...] = ()  # the runs whose scores it pools; of a cell that is a run itself none

    @property
    def runs(self) -> tuple[Cell[Any], ...]:
        """What is executed for it."""
        return self.folds or (self,)

    @property
    def from_scratch(self) -> bool:
        """Whether it starts from no trained weights at all."""
        encoder = self.config.model.encoder if self.config.model else None
        return self.config.init is None and not getattr(encoder, "pretrained", False)


# A pretraining by tasks, or one by other images' masks.
Start = Cell[PretrainConfig] | Cell[FinetuneConfig]


@dataclass(frozen=True)
class Trial:
    """A run of the search."""

    key: str  # which choice it is for
    found: Mapping[str, Any]  # the keys it tries
    cell: Cell[FinetuneConfig]


@dataclass(frozen=True)
class Plan:
    """All that a study is going to do, before anything is done."""

    arms: tuple[PlannedArm, ...]
    baseline: str
    axes: Mapping[str, Sequence[Any]]  # the grid without what makes arms
    pretrainings: tuple[Start, ...]
    trials: tuple[Trial, ...]  # none without a search
    cells: tuple[Cell[FinetuneConfig], ...]

    @property
    def folds(self) -> tuple[Cell[FinetuneConfig], ...]:
        """The runs of folds; none where cells are runs themselves."""
        return tuple(fold for cell in self.cells for fold in cell.folds)

    def from_scratch(self, arm: str) -> bool:
        return next(cell for cell in self.cells if cell.arm == arm).from_scratch


def make_plan(config: StudyConfig, out: Path, scores: Mapping[str, float] | None = None) -> Plan:
    """Every run of the study with its config, checked. `scores` are those of trials that are done (id -> mIoU).

    Cells take what the search has chosen as far as all its trials are done; before, their own keys. Raises UserError
    that names the arm where a config is wrong, where keys are said twice, and where a start does not fit.
    """
    arms = arms_of(config)
    axes = conditions_of(config)
    refuse_keys_said_twice(config, arms)
    maker = _Maker(config, out, arms)
    conditions = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    trials = tuple(maker.trials(arms, conditions))
    chosen = choose(trials, scores or {})
    cells = []
    for condition, arm, seed in product(conditions, arms, config.seeds):
        found = chosen.get(choice_key(config, arm.name, condition), {})
        cells.append(maker.cell(arm, condition, seed, {**condition, **found}))
    _refuse_equal_arms(cells)
    _refuse_unknown_contrasts(config, arms)
    _refuse_what_folds_leave_out(cells, trials)
    if trials and any(cell.config.data.val is None and cell.config.data.test is None for cell in cells):
        raise UserError("search: would choose on the images that score; give finetune.data.val or finetune.data.test")
    return Plan(arms, _baseline_of(config, cells), axes, tuple(maker.pretrainings.values()), trials, tuple(cells))


def _baseline_of(config: StudyConfig, cells: Sequence[Cell]) -> str:
    by_name = {cell.arm: cell for cell in reversed(cells)}
    if config.baseline is None:
        return next((cell.arm for cell in cells if cell.from_scratch), cells[0].arm)
    if config.baseline not in by_name:
        names = dict.fromkeys(cell.arm for cell in cells)
        raise UserError(f"baseline: there is no arm '{config.baseline}'; name one of: {', '.join(names)}")
    return config.baseline


def _refuse_equal_arms(cells: Sequence[Cell]) -> None:
    """Two arms of one config would be trained twice, and their difference told as nothing."""
    digests: dict[str, str] = {}
    for cell in cells:
        former = digests.setdefault(cell.id.rpartition("-")[2], cell.arm)
        if former != cell.arm:
            raise UserError(f"arms: {former} and {cell.arm} are one and the same run; drop one, or let them differ")


def _refuse_what_folds_leave_out(cells: Sequence[Cell[FinetuneConfig]], trials: Sequence[Trial]) -> None:
    """A single fold, which would be no score of all images, and images that would be scored beside the folds."""
    for cell in cells:
        if cell.config.labels.fold is not None:
            raise UserError("labels.fold: a study makes every fold, and pools them into one score; drop the key")
        if cell.folds and cell.config.data.test is not None:
            raise UserError(
                "labels.folds: the labelled images are what such a study scores; drop finetune.data.test, and give it "
                "to ssl-seg evaluate, or drop labels.folds"
            )
    if trials and any(cell.folds for cell in cells):
        raise UserError(
            "search: with labels.folds every labelled image scores, and none is left to choose on; drop one"
        )


def _refuse_unknown_contrasts(config: StudyConfig, arms: Sequence[PlannedArm]) -> None:
    names = [arm.name for arm in arms]
    for pair in config.primary.contrasts.items() if config.primary else ():
        unknown = next((name for name in pair if name not in names), None)
        if unknown is not None:
            raise UserError(f"primary.contrasts: there is no arm '{unknown}'; name two of: {', '.join(names)}")
        if len(set(pair)) == 1:
            raise UserError(f"primary.contrasts: {pair[0]} is measured from itself; name another arm")


def check_images_of(plan: Plan) -> None:
    """What a run refuses before its work, for all of them: an empty folder, too few labelled images, other classes."""
    for cell in plan.pretrainings:
        _check_images_of_start(cell)
    different: dict[str, Cell[FinetuneConfig]] = {}
    for cell in (*plan.cells, *(trial.cell for trial in plan.trials)):
        run = cell.runs[0]  # the number of groups is that of every cut
        labels = {key: value for key, value in run.config.labels.dump().items() if not cell.folds or key != "seed"}
        different.setdefault(json.dumps([run.config.data.dump(), labels], sort_keys=True), run)
    for cell in different.values():
        try:
            check_data(cell.config)
        except UserError as error:
            raise UserError(f"arm {cell.arm}: {error}") from error
    _check_classes_of_starts(plan)


def _check_images_of_start(cell: Start) -> None:
    if isinstance(cell.config, PretrainConfig):
        check_images(f"pretrain.{cell.arm}.data.pool", cell.config.data.pool)
        return
    try:
        check_data(cell.config)
    except UserError as error:
        raise UserError(f"pretrain.{cell.arm}: {error}") from error


def _check_classes_of_starts(plan: Plan) -> None:
    """A whole network goes on with the classes that it has learnt: else its cells would fail after hours."""
    starts = {cell.id: cell for cell in plan.pretrainings}
    for cell in plan.cells:
        start = starts.get(cell.start or "")
        if start is None or cell.config.transfer != WHOLE or not isinstance(start.config, FinetuneConfig):
            continue
        own, theirs = (config.data.labelled.class_names for config in (cell.config, start.config))
        if own != theirs:
            raise UserError(
                f"arm {cell.arm}: transfer: {WHOLE}: pretrain.{start.arm} tells {', '.join(theirs)} apart, and "
                f"finetune.data.labelled {', '.join(own)}; transfer: encoder+{SEGMENT} takes all but the last layer"
            )


def _as_begun(out: Path) -> dict[str, Any]:
    """The former default of Dice, where all cells that are there were made by it, as before version 0.2.

    Else a study that goes on, or is extended, would train all of them again under other names.
    """
    records = [path for path in (out / CELLS).glob("*/run.json") if path.is_file()]
    configs = [files.read_json(path).get("config") or {} for path in records]
    weights = [(config.get(SEGMENT) or {}).get("dice") for config in configs]
    return {SEGMENT: {"dice": 0.0}} if weights and not any(weights) else {}


# ---- single runs ----


class _Maker:
    """Makes the cells of one study: what they share is looked up once."""

    def __init__(self, config: StudyConfig, out: Path, arms: Sequence[PlannedArm]) -> None:
        self.config = config
        self.out = out
        self.number = min(config.pretrainings, len(config.seeds))
        self.given = pretrainings_of(config)
        needed = dict.fromkeys(arm.pretraining for arm in arms if arm.pretraining)
        self.pretrainings = {
            (name, seed): self._pretraining(name, seed) for name in needed for seed in range(self.number)
        }
        self.common = self._common(arms)
        self._digests: dict[tuple[str | None, str], str | None] = {}

    def _pretraining(self, name: str, seed: int) -> Start:
        where = f"pretrain.{name}" if name in self.config.pretrain else "subsets"
        given = base(self.given[name], where)
        if "seed" in self.given[name]:
            raise UserError(f"{where}.seed: they have the seeds 0, 1, ...; say how many by `pretrainings`")
        data = given.get("data")
        if isinstance(data, Mapping) and data.get("labelled") is not None:
            values = merge(given, {"seed": seed, "labels": {"seed": seed}})
            learnt = _checked(FinetuneConfig, _tracked(values, self.out), where)
            place = _place_of_start(name, seed, _digest(learnt, _start_digest(learnt.init, learnt.transfer)))
            return Cell("finetune", PRETRAINED, place, learnt, name, {}, seed)
        whole = _checked(PretrainConfig, _tracked(merge(given, {"seed": seed}), self.out), where)
        place = _place_of_start(name, seed, _digest(whole, _start_digest(whole.init, "encoder")))
        return Cell("pretrain", PRETRAINED, place, whole, name, {}, seed)

    def _common(self, arms: Sequence[PlannedArm]) -> dict[str, Any]:
        """What all arms share. What the study does not say of the model is that of the first start, for every arm.

        Else the arm from scratch would take the default, and the others what they start from. Not where its own weights
        came from: a pretraining that goes on from ImageNet makes no other arm start there.
        """
        values = merge(_as_begun(self.out), base(self.config.finetune, "finetune"))
        model: Mapping[str, Any] = {}
        for arm in arms:
            start = arm.changes.get("init")
            if arm.pretraining and not model:
                model = base(self.given[arm.pretraining], "pretrain").get("model", {})
            elif start is not None and not model:
                model = read_encoder_info(start).get("config", {})
        if isinstance(model.get("encoder"), Mapping):
            encoder = {key: value for key, value in model["encoder"].items() if key != "pretrained"}
            model = {**model, "encoder": encoder}
        own = values.get("model") or {}
        if isinstance(own.get("encoder"), str):  # the word stands for the name of one of timm's, and may get more keys
            own = {**own, "encoder": {"type": "timm", "name": own["encoder"]}}
        return {**values, "model": merge(model, own)} if model or own else values

    def cell(
        self, arm: PlannedArm, condition: Mapping[str, Any], seed: int, keys: Mapping[str, Any], searching: bool = False
    ) -> Cell[FinetuneConfig]:
        """One fine-tuning; `keys` are those of its condition and of its search."""
        values = merge(self.common, unflatten(arm.changes))
        values = merge(values, unflatten(keys))
        values = merge(values, {"seed": seed, "labels": {"seed": seed}})
        start = self._start(arm, seed)
        if start is not None:
            values["init"] = str(self.out / PRETRAINED / start.id)
        if searching:
            values = merge(values, {"data": {"val": None, "test": None}, "select": "last"})
        whole = _checked(FinetuneConfig, _tracked(values, self.out), f"arm {arm.name}")
        if start is not None:
            _check_fit(arm, whole, start)
        digest = _digest(whole, start.id if start else self._digest_of_start(whole))
        words = [files.slug(arm.name), *(f"{_short(key)}{files.slug(str(value))}" for key, value in keys.items())]
        name = "-".join([*words, f"seed{seed}", digest])
        folder = SEARCHED if searching else CELLS
        made = Cell("finetune", folder, name, whole, arm.name, condition, seed, start.id if start else None)
        count = 0 if whole.labels.fold is not None else whole.labels.folds or 0
        return replace(made, folds=tuple(_fold_of(made, number) for number in range(count)))

    def _start(self, arm: PlannedArm, seed: int) -> Start | None:
        if arm.pretraining is None:
            return None
        place = self.config.seeds.index(seed) if seed in self.config.seeds else seed
        return self.pretrainings[arm.pretraining, place % self.number]

    def _digest_of_start(self, config: FinetuneConfig) -> str | None:
        asked = config.init, config.transfer
        if asked not in self._digests:
            self._digests[asked] = _start_digest(*asked)
        return self._digests[asked]

    def trials(self, arms: Sequence[PlannedArm], conditions: Sequence[Mapping[str, Any]]) -> Iterator[Trial]:
        """The runs that choose each arm's own values, each once."""
        search = self.config.search
        if search is None:
            return
        tries = [dict(zip(search.grid, own, strict=True)) for own in product(*search.grid.values())]
        held = list({json.dumps(own): own for condition in conditions for own in [{**condition, **search.at}]}.values())
        first = max(SEARCH_SEEDS, max(self.config.seeds) + 1)
        for condition, arm, found, number in product(held, arms, tries, range(search.seeds)):
            cell = self.cell(arm, condition, first + number, {**condition, **found}, searching=True)
            yield Trial(choice_key(self.config, arm.name, condition), found, cell)


def _fold_of(cell: Cell[FinetuneConfig], number: int) -> Cell[FinetuneConfig]:
    """The run of a cell that holds one fold out."""
    labels = cell.config.labels.model_copy(update={"fold": number})
    config = cell.config.model_copy(update={"labels": labels})
    return replace(cell, place=FOLDS, id=f"{cell.id}-fold{number}", config=config)


def _place_of_start(name: str, seed: int, digest: str) -> str:
    return f"{files.slug(name)}-seed{seed}-{digest}"


def _check_fit(arm: PlannedArm, config: FinetuneConfig, start: Start) -> None:
    """Whether a cell can start from a pretraining of the study, before that is made."""
    models = [own.model for own in (config, start.config) if own.model is not None]
    encoders = [model.encoder.dump() for model in models]
    names = [encoder.get("name", encoder["type"]) for encoder in encoders]
    if len(names) == 2 and names[0] != names[1]:  # one that names none takes the other's
        raise UserError(f"arm {arm.name}: its encoder is {names[0]}, and that of pretrain.{start.arm} is {names[1]}")
    _, _, task = config.transfer.partition("+")
    if config.transfer == WHOLE and start.stage == "pretrain":
        raise UserError(f"arm {arm.name}: transfer: {WHOLE} takes a fine-tuned run, and pretrain.{start.arm} is none")
    drawn = [SEGMENT, *start.config.tasks] if start.stage == "finetune" else list(start.config.tasks)
    if task and task not in drawn:
        known = ", ".join(drawn)
        raise UserError(f"arm {arm.name}: transfer: pretrain.{start.arm} has no task {task}; it has: {known}")


def _checked(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    try:
        return load(cls, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _tracked(values: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The run as a child of the study's in MLflow, unless the study says otherwise."""
    own = values.get("tracking", {})
    return merge(values, {"tracking": {"parent": out.name, **own}}) if isinstance(own, Mapping) else dict(values)


def _digest(config: Config, start: str | None) -> str:
    """Of all that decides what comes out: the weights a run starts from, not where they lie nor how it is watched."""
    kept = {
        key: value for key, value in flatten(config.dump()).items() if not f"{key}.".startswith((*WATCHING, "init."))
    }
    return files.sha256(json.dumps([kept, start], sort_keys=True).encode())[:NUM_HEX]


def _start_digest(init: str | None, transfer: str) -> str | None:
    """Of the weights that `init` and `transfer` take; Raises UserError where there are none."""
    if init is None:
        return None
    digest = read_encoder_info(init).get("sha256") or files.sha256(user_path(init).read_bytes())
    _, _, task = transfer.partition("+")
    part = "model/model.json" if transfer == WHOLE else f"decoders/{task}.json" if task else None
    others = [folder / part for folder in (user_path(init), user_path(init).parent)] if part else []
    return "+".join([digest, *(str(files.read_json(path).get("sha256", "")) for path in others if path.is_file())])


def _short(key: str) -> str:
    return key.rpartition(".")[2]


# ---- the search ----


def choice_key(config: StudyConfig, arm: str, condition: Mapping[str, Any]) -> str:
    """Which search a cell takes its keys from: that of its arm, and of its condition with `search.at` laid on it."""
    held = config.search.at if config.search else {}
    return json.dumps([arm, {**condition, **held}])


def choose(trials: Sequence[Trial], scores: Mapping[str, float]) -> dict[str, Mapping[str, Any]]:
    """For each search the keys with the best mean of `scores` (id -> mIoU), the first of equals.

    Only keys whose runs have all finished count: one that crashes for some seeds must not win by the others.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for trial in trials:
        runs = found.setdefault(trial.key, {}).setdefault(json.dumps(trial.found), [])
        runs.append(trial.cell.id)
    best = {}
    for key, tried in found.items():
        means = {text: mean(scores[run] for run in runs) for text, runs in tried.items() if scores.keys() >= {*runs}}
        if means:
            best[key] = json.loads(max(means, key=means.__getitem__))
    return best

"""What a study has found: a comparison of its cells, and the tables that a spreadsheet reads.

Reads the folder that `ssl-seg study` writes and imports no torch, so that a report or a notebook costs little. A gain,
a loss and nothing to tell stand in the same columns; nothing is picked out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.evidence import label_curve, ledger
from ssl_seg.evidence.compare import TIMM
from ssl_seg.evidence.comparison import Arm, Comparison, Gain, Outcome
from ssl_seg.evidence.pairs import MIN_STARTS
from ssl_seg.evidence.passport import differing, passports_in
from ssl_seg.evidence.statistics import detectable, holm_where_known
from ssl_seg.runs.folder import RunFolder, as_text, labelled_digest, scores_of
from ssl_seg.runs.schema import Finite, FolderName, LeaksShape, Shape

STUDY_FILE = "study.json"
# Folders of runs in a study's. With `labels.folds` a cell is what its runs in `folds` have come to together.
CELLS, PRETRAINED, SEARCHED, FOLDS = "cells", "pretrained", "searched", "folds"
_AGAIN = "give the study's command again, which makes it anew from the cells"
CELLS_FILE, GAINS_FILE, LABELS_FILE, PRIMARY_FILE = "cells.csv", "gains.csv", "labels.csv", "primary.csv"
LEDGER_FILE = "ledger.csv"


@dataclass(frozen=True, eq=False)
class Contrast:
    """A comparison that a study is made for: it was named before there was a score."""

    found: Study  # the study, as if this were all that it compares
    arm: Arm
    gain: Gain | None  # the mean over the conditions that it is asked under; None without a pair
    p_holm: float | None = None  # its exact p adjusted for all of these that have one


@dataclass(frozen=True, eq=False)
class Study(Comparison):
    """A study's folder, read: its arms, the baseline first, under every condition of its grid."""

    folder: Path = Path()
    record: Mapping[str, Any] = field(default_factory=dict)  # study.json
    cells: tuple[Outcome, ...] = ()  # in the order of study.json

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def pretrained(self) -> Sequence[Mapping[str, Any]]:
        """Its pretrainings, as study.json has them."""
        return self.record.get("pretrained", ())

    @property
    def folds(self) -> Sequence[Mapping[str, Any]]:
        """The runs whose held-out folds its cells pool; none without `labels.folds`."""
        return self.record.get("folds", ())

    @property
    def trials(self) -> Sequence[Mapping[str, Any]]:
        """The runs of its search; none without one."""
        return self.record.get("search", {}).get("trials", ())

    @cached_property
    def contrasts(self) -> tuple[Contrast, ...]:
        """What it is made for; empty where nothing was named."""
        named = self.record.get("config", {}).get("primary")
        if not named:
            return ()
        at = {(key, as_text(value)) for key, value in named["at"].items()}
        conditions = tuple(condition for condition in self.conditions if at <= set(condition))
        found = []
        for label, base in named["contrasts"].items():
            arm, other = self.arm(label), self.arm(base)
            alone = replace(self, baselines={arm: other}, bases=(other,), over=base, conditions=conditions)
            found.append(Contrast(alone, arm, alone.over_conditions(arm)))
        adjusted = holm_where_known([own.gain and own.gain.p for own in found])
        return tuple(replace(own, p_holm=p) for own, p in zip(found, adjusted, strict=True))


def read(folder: str | Path) -> Study:
    """Raises UserError for what is no study's folder."""
    folder = Path(folder)
    if not files.is_there(folder / STUDY_FILE):
        raise UserError(
            f"{folder}: is no study (it has no {STUDY_FILE}); give the folder that ssl-seg study --out named"
        )
    record = read_record(folder / STUDY_FILE)
    found = [(own["arm"], _outcome(folder, own)) for own in record["cells"]]
    base = {(cell.condition, cell.pair): cell for arm, cell in found if arm == record["baseline"]}
    found = [(arm, replace(cell, apart=_apart(cell, base.get((cell.condition, cell.pair))))) for arm, cell in found]
    cells = tuple(cell for _, cell in found)
    listed = sorted(record["arms"], key=lambda own: own["name"] != record["baseline"])
    arms = tuple(_arm(own, (cell for arm, cell in found if arm == own["name"])) for own in listed)
    return Study(
        arms=arms,
        baselines=dict.fromkeys(arms[1:], arms[0]),
        tables=(arms,),
        bases=arms[:1],
        over=record["baseline"],
        axes={key: tuple(as_text(value) for value in values) for key, values in record["axes"].items()},
        conditions=tuple(dict.fromkeys(cell.condition for cell in cells)),
        level=record["level"],
        apart=tuple(f"{cell.name}: {cell.apart}" for cell in cells if cell.apart),
        folder=folder,
        record=record,
        cells=cells,
    )


def read_record(path: Path) -> dict[str, Any]:
    """A study.json. Raises UserError for one that is damaged or not as a study writes it."""
    try:
        record = files.read_json(path)
        _StudyShape.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "baseline"
        raise UserError(f"{path}: not as ssl-seg study writes it ({place}: {first['msg']}); {_AGAIN}") from error
    except UserError as error:
        raise UserError(f"{path}: damaged; {_AGAIN}") from error
    return record


def _outcome(folder: Path, own: Mapping[str, Any]) -> Outcome:
    """A cell as its entry in study.json and its run say it."""
    run = RunFolder(folder / CELLS / own["id"])
    about = Outcome(
        name=own["id"],
        stage="finetune",
        pair=own["seed"],
        scores={},
        condition=tuple((key, as_text(value)) for key, value in own["condition"].items()),
        status=own["status"],
        message=own["message"],
        start=own["start"],
        run=run,
    )
    if own["status"] != "finished" or not (run.folder / "result.json").is_file():
        return about
    result = run.result or {}
    return replace(
        about,
        scores=scores_of(result),
        weights=own["start"] or _weights_of(run),
        passports=passports_in(result),
        labelled=labelled_digest(run.read("split.json")),
    )


def _weights_of(run: RunFolder) -> str | None:
    """What a cell starts from that no pretraining of the study made."""
    of_timm = ((run.config.get("model") or {}).get("encoder") or {}).get("pretrained")
    return run.config.get("init") or (f"timm: {of_timm}" if of_timm else None)


def _apart(cell: Outcome, base: Outcome | None) -> str:
    """What keeps a cell from being a pair with that of the baseline; '' where nothing does.

    Images that were changed between two starts of a study: those that are scored, and the labelled ones unless the arms
    themselves ask for others.
    """
    if base is None or not base.scores or not cell.scores:
        return ""
    fields = differing(base.passports, cell.passports)
    if fields:
        return f"no pair with {base.name}: their scores differ in {'; '.join(fields)}"
    asked = [(own.config.get("labels"), own.config.get("data", {}).get("labelled")) for own in (base, cell)]
    others = asked[0] == asked[1] and base.labelled != cell.labelled
    return f"no pair with {base.name}: their labelled images differ" if others else ""


def _arm(own: Mapping[str, Any], cells: Iterable[Outcome]) -> Arm:
    """One with its cells; where the study does not say whether it is from scratch, what it changes tells."""
    told = own.get("from_scratch")
    starts = own["changes"].get("init") is not None or bool(own["changes"].get(TIMM))
    from_scratch = told if isinstance(told, bool) else not starts
    tasks = own.get("tasks")
    return Arm(own["name"], tuple(cells), from_scratch, None if tasks is None else tuple(tasks))


class _RunShape(Shape):
    id: FolderName
    arm: str
    condition: dict[str, Any]
    seed: int
    status: str
    message: str
    start: str | None
    seconds: Finite


class _TrialShape(_RunShape):
    tried: dict[str, Any]
    miou: Finite


class _ChosenShape(Shape):
    arm: str
    condition: dict[str, Any]
    chosen: dict[str, Any] | None


class _SearchShape(Shape):
    trials: list[_TrialShape] = Field(default=[])
    chosen: list[_ChosenShape] = Field(default=[])


class _ArmShape(Shape):
    name: str
    changes: dict[str, Any]
    tasks: list[str] | None = None


class _PrimaryShape(Shape):
    contrasts: dict[str, str]
    at: dict[str, Any]


class _ConfigShape(Shape):
    primary: _PrimaryShape | None = None


class _StudyShape(Shape):
    arms: list[_ArmShape]
    baseline: str
    axes: dict[str, list[Any]]
    seeds: list[int]
    level: Annotated[float, Field(gt=0.5, lt=1.0)]
    cells: list[_RunShape]
    folds: list[_RunShape] = Field(default=[])
    pretrained: list[_RunShape] = Field(default=[])
    search: _SearchShape = _SearchShape()
    config: _ConfigShape = _ConfigShape()
    versions: dict[str, Any] = Field(default={})
    resumed: list[Any] = Field(default=[])
    leaks: LeaksShape | None = None

    @model_validator(mode="after")
    def _conditions_are_of_the_axes(self) -> _StudyShape:
        axes = {key: {as_text(value) for value in values} for key, values in self.axes.items()}
        for cell in self.cells:
            condition = {key: as_text(value) for key, value in cell.condition.items()}
            if condition.keys() != axes.keys() or any(value not in axes[key] for key, value in condition.items()):
                raise ValueError(f"the condition of cell {cell.id} is none of the axes")
        return self

    @model_validator(mode="after")
    def _all_is_of_the_arms(self) -> _StudyShape:
        names = [arm.name for arm in self.arms]
        if self.baseline not in names:
            raise ValueError("is none of the arms")
        primary = self.config.primary
        if primary and not {*primary.contrasts, *primary.contrasts.values()} <= set(names):
            raise ValueError("primary names an arm that there is not")
        stray = next((cell.id for cell in self.cells if cell.arm not in names), None)
        if stray is not None:
            raise ValueError(f"cell {stray} is of none of the arms")
        return self


# ---- tables ----


def write_tables(study: Study) -> None:
    """Tidy, for a spreadsheet or pandas: cells.csv, a row a cell, and gains.csv, a row a gain of mIoU or of a class.

    Of learning curves also labels.csv, a row for each arm with each number of labels; primary.csv, a row for each
    comparison that was named beforehand; and of `subsets` ledger.csv, a row for each task and pair of tasks.
    """
    files.write_atomic(study.folder / CELLS_FILE, _csv(cell_rows(study)))
    files.write_atomic(study.folder / GAINS_FILE, _csv(gain_rows(study)))
    if labels := label_curve.rows(study):
        files.write_atomic(study.folder / LABELS_FILE, _csv(labels))
    if study.contrasts:
        files.write_atomic(study.folder / PRIMARY_FILE, _csv(primary_rows(study)))
    if earned := ledger.rows(study):
        files.write_atomic(study.folder / LEDGER_FILE, _csv(earned))


def cell_rows(study: Study) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for cell in study.cells for name in cell.scores))
    rows = []
    for cell, own in zip(study.cells, study.record["cells"], strict=True):
        about = {
            "cell": cell.name,
            "arm": own["arm"],
            **dict(cell.condition),
            "seed": own["seed"],
            "status": cell.status,
        }
        rows.append({**about, **{name: cell.scores.get(name, "") for name in names}, "message": cell.message})
    return rows


def gain_rows(study: Study) -> list[dict[str, Any]]:
    """Shares in [0, 1]; nothing where there are too few pairs for a figure."""
    rows = []
    for gain in (*study.gains, *study.class_gains):
        is_main = gain.score == study.main_score
        images = study.over_images(gain.arm, gain.score, gain.condition) if is_main else None
        row: dict[str, Any] = {"score": gain.score, "arm": gain.arm.label, **dict(gain.condition), "n": gain.n}
        row |= {"baseline_mean": gain.base.mean, "baseline_sd": gain.base.sd}
        row |= {"mean": gain.own.mean, "sd": gain.own.sd, "gain": gain.mean, "gain_sd": gain.differences.sd}
        for prefix, interval in (("", gain.over_seeds), ("bootstrap_", gain.bootstrap), ("images_", images)):
            row |= {f"{prefix}low": interval and interval.low, f"{prefix}high": interval and interval.high}
        starts, values = gain.over_starts, gain.independent
        row |= {"starts_low": starts and starts.low, "starts_high": starts and starts.high, "independent": len(values)}
        row |= {"detectable": detectable(values, gain.level) if len(values) >= MIN_STARTS else None}
        rows.append({**row, "p": gain.p, "p_holm": gain.p_holm, "pretrainings": gain.num_weights})
    return rows


def primary_rows(study: Study) -> list[dict[str, Any]]:
    """Shares in [0, 1]; a mean is over the conditions that `primary.at` leaves open."""
    rows = []
    for contrast in study.contrasts:
        gain = contrast.gain
        row: dict[str, Any] = {"arm": contrast.arm.label, "from": contrast.found.over}
        row |= {"conditions": len(contrast.found.conditions), "n": 0 if gain is None else gain.n}
        interval = gain and gain.interval
        row |= {"gain": gain and gain.mean, "gain_sd": gain and gain.differences.sd}
        row |= {"low": interval and interval.low, "high": interval and interval.high}
        rows.append({**row, "p": gain and gain.p, "p_holm": contrast.p_holm})
    return rows


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    listed = list(rows)
    text = io.StringIO(newline="")
    if listed:
        table = csv.DictWriter(text, fieldnames=list(listed[0]))
        table.writeheader()
        table.writerows(listed)
    return text.getvalue().encode()

"""What a study has found: its cells as a table, and the paired gain of every arm over the baseline.

Reads the folder that `ssl-seg study` writes and imports no torch, so that a report or a notebook costs little. Nothing
is picked out: a gain, a loss and nothing to tell stand in the same columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.evidence.compare import MAIN_SCORES, TIMM
from ssl_seg.evidence.pairs import MIN_STARTS, Changed, Pairs, Spread, independent, over_starts
from ssl_seg.evidence.passport import Passports, differing, passports_in
from ssl_seg.evidence.statistics import Interval, bootstrap_t_interval, detectable, holm, sign_flip_p, t_interval
from ssl_seg.runs.folder import RunFolder, as_text, labelled_digest, scores_of, software_of
from ssl_seg.runs.schema import Finite, LeaksShape
from ssl_seg.scores import ImageConfusions, read_image_confusion

STUDY_FILE = "study.json"
CELLS, PRETRAINED, SEARCHED = "cells", "pretrained", "searched"  # folders of runs in a study's
CELLS_FILE, GAINS_FILE = "cells.csv", "gains.csv"

Condition = tuple[tuple[str, str], ...]  # dotted keys of the grid with their values as text


@dataclass(frozen=True)
class CellFound:
    """One fine-tuning of a study, and its scores where it has finished."""

    id: str
    arm: str
    condition: Condition
    seed: int
    status: str  # finished, failed, timeout, stalled, waiting
    message: str  # why it is not finished
    start: str | None  # the id of the pretraining of the study that it started from
    run: RunFolder
    scores: Mapping[str, float]  # val/miou, val/iou/road; empty until it has finished
    passports: Passports  # what they mean, by part
    labelled: str  # digest of the labelled images that it used

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def software(self) -> dict[str, str]:
        return software_of(self.run.record)


@dataclass(frozen=True)
class Gain:
    """An arm against the baseline under one condition, by pairs with the same seed: the same labelled images."""

    arm: str
    condition: Condition
    score: str
    baseline: Spread  # of the paired cells
    own: Spread
    gains: Spread  # own minus baseline, in the order of `seeds`; `Shared` where pairs share pretrainings
    seeds: tuple[int, ...]
    starts: tuple[str, ...]  # what each pair starts from, on either side; one of its own where all is from scratch
    num_starts: int  # different weights that the arm's cells start from; 0 from scratch
    interval: Interval | None  # of the mean gain over seeds, by Student
    bootstrap: Interval | None  # the same without normal differences
    images: Interval | None  # over images, the runs as they are
    over_starts: Interval | None  # by Student over pretrainings, where 3 or more serve several pairs each
    p: float | None  # exact, by sign flips of what counts as independent; None below 8 of them
    p_holm: float | None = None  # adjusted for all comparisons of the study


@dataclass(frozen=True)
class Findings:
    """A study's folder, read."""

    folder: Path
    record: Mapping[str, Any]  # study.json
    cells: tuple[CellFound, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def arms(self) -> tuple[str, ...]:
        """All that is compared, the baseline first."""
        names = [arm["name"] for arm in self.record["arms"]]
        return (self.baseline, *(name for name in names if name != self.baseline))

    @property
    def baseline(self) -> str:
        return self.record["baseline"]

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The keys that the comparison is repeated under, with their values as text."""
        return {key: tuple(as_text(value) for value in values) for key, values in self.record["axes"].items()}

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(dict.fromkeys(cell.condition for cell in self.cells))

    @cached_property
    def main_score(self) -> str:
        """`test/miou` where the cells have one, else `val/miou`."""
        return next((name for name in MAIN_SCORES if any(name in cell.scores for cell in self.cells)), MAIN_SCORES[-1])

    @property
    def part(self) -> str:
        return self.main_score.partition("/")[0]

    def of(self, arm: str, condition: Condition) -> dict[int, CellFound]:
        """The finished cells by seed."""
        own = (cell for cell in self.cells if cell.arm == arm and cell.condition == condition)
        return {cell.seed: cell for cell in own if cell.scores}

    def spread(self, arm: str, condition: Condition, score: str | None = None) -> Spread | None:
        """A score of all finished cells."""
        name = score or self.main_score
        values = [cell.scores[name] for cell in self.of(arm, condition).values() if name in cell.scores]
        return Spread(tuple(values)) if values else None

    def gain(self, arm: str, condition: Condition, score: str | None = None, images: bool = False) -> Gain | None:
        """None for the baseline itself, and without a pair that both have the score.

        `images` asks for the interval over images too, which is only made of the main score.
        """
        name = score or self.main_score
        if arm == self.baseline:
            return None
        pairs = self.pairs(arm, condition)
        cells = {seed: (lower, upper) for seed, ((lower,), (upper,)) in pairs.sides(name).items()}
        if not cells:
            return None
        lower, upper = (tuple(pair[side].scores[name] for pair in cells.values()) for side in (0, 1))
        starts = tuple(self._start(arm, *pair) for pair in cells.values())
        gains = pairs.gain(name)
        means = over_starts(gains)
        level = self.record["level"]
        return Gain(
            arm=arm,
            condition=condition,
            score=name,
            baseline=Spread(lower),
            own=Spread(upper),
            gains=gains,
            seeds=tuple(cells),
            starts=starts,
            num_starts=len({_weights_of(own) for _, own in cells.values()} - {None}),
            interval=t_interval(gains.values, level),
            bootstrap=bootstrap_t_interval(gains.values, level),
            images=self._over_images(pairs, name) if images else None,
            over_starts=None if means is None else t_interval(means, level),
            p=sign_flip_p(independent(gains)),
        )

    def pairs(self, arm: str, condition: Condition) -> Pairs[CellFound]:
        """The finished cells of an arm and of the baseline by their seed, but for those that are no pair (`apart`)."""
        base, own = self.of(self.baseline, condition), self.of(arm, condition)
        seeds = [seed for seed in own if seed in base and _may_be_ranked(base[seed], own[seed])]
        sides = ({seed: [cells[seed]] for seed in seeds} for cells in (base, own))
        return Pairs(*sides, lambda lower, upper: self._start(arm, lower, upper), self._read)

    def is_pretrained(self, arm: str) -> bool:
        """Whether an arm starts from weights; by what it changes alone where the study does not say."""
        own = next(own for own in self.record["arms"] if own["name"] == arm)
        if isinstance(own.get("from_scratch"), bool):
            return not own["from_scratch"]
        return own["changes"].get("init") is not None or bool(own["changes"].get(TIMM))

    def _start(self, arm: str, base: CellFound, own: CellFound) -> str:
        """The pretrainings behind a pair, of either side; one of its own where both are from scratch."""
        sides = {self.baseline: base, arm: own}
        # Weights that no pretraining of the study made are the same for all seeds.
        starts = [cell.start or "" for name, cell in sides.items() if self.is_pretrained(name)]
        return " ".join(starts) if starts else str(own.seed)

    @cached_property
    def gains(self) -> tuple[Gain, ...]:
        """The main score's, of every arm under every condition."""
        pairs = [(arm, condition) for condition in self.conditions for arm in self.arms]
        found = [gain for arm, condition in pairs if (gain := self.gain(arm, condition, images=True)) is not None]
        told = [index for index, gain in enumerate(found) if gain.p is not None]
        for index, adjusted in zip(told, holm([found[index].p for index in told]), strict=True):
            found[index] = replace(found[index], p_holm=adjusted)
        return tuple(found)

    @cached_property
    def class_gains(self) -> tuple[Gain, ...]:
        """Those of each class's IoU."""
        names = dict.fromkeys(
            name for cell in self.cells for name in cell.scores if name.startswith(f"{self.part}/iou/")
        )
        every = [self.gain(gain.arm, gain.condition, name) for gain in self.gains for name in names]
        return tuple(gain for gain in every if gain is not None)

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """A line for each cell whose score means something else than that of its pair, so that they are no pair."""
        lines = []
        for cell in self.cells:
            base = self.of(self.baseline, cell.condition).get(cell.seed)
            if cell.scores and base is not None and not _may_be_ranked(base, cell):
                lines.append(f"{cell.id}: no pair with {base.id}: {_what_differs(base, cell)}")
        return tuple(lines)

    def changed(self, arm: str, condition: Condition, most: int) -> tuple[Changed[CellFound], ...]:
        """The images whose own mIoU differs most from the baseline's, as a mean over pairs."""
        return self.pairs(arm, condition).changed(self.main_score, most)

    @cached_property
    def faults(self) -> list[str]:
        """Why intervals over images are missing that could not be made; filled by `gains`."""
        return []

    def _over_images(self, pairs: Pairs[CellFound], score: str) -> Interval | None:
        """None too where a cell's images are damaged: all else is as good as before."""
        try:
            return pairs.over_images(score, self.record["level"])
        except UserError as error:
            self.faults.append(str(error))
            return None

    @cached_property
    def _read(self) -> Callable[[Path], Mapping[str, ImageConfusions]]:
        """Reads the images of a cell once: the baseline's have many comparisons."""
        return cache(read_image_confusion)


def read(folder: str | Path) -> Findings:
    """Raises UserError for what is no study's folder."""
    folder = Path(folder)
    if not (folder / STUDY_FILE).is_file():
        raise UserError(
            f"{folder}: is no study (it has no {STUDY_FILE}); give the folder that ssl-seg study --out named"
        )
    record = files.read_json(folder / STUDY_FILE)
    try:
        _StudyShape.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "baseline"
        raise UserError(
            f"{folder / STUDY_FILE}: not as ssl-seg study writes it ({place}: {first['msg']}); "
            "give the study's command again"
        ) from error
    return Findings(folder, record, tuple(_found(folder, own) for own in record["cells"]))


class _Shape(BaseModel):
    """As much of study.json as its readers rely on; it may be a stranger's. Other keys may be there too."""

    model_config = ConfigDict(extra="allow", strict=True)


class _RunShape(_Shape):
    # The name of a folder, and no path out of the study's: neither . nor ..
    id: Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")]
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


class _ChosenShape(_Shape):
    arm: str
    condition: dict[str, Any]
    chosen: dict[str, Any] | None


class _SearchShape(_Shape):
    trials: list[_TrialShape] = []
    chosen: list[_ChosenShape] = []


class _ArmShape(_Shape):
    name: str
    changes: dict[str, Any]


class _StudyShape(_Shape):
    arms: list[_ArmShape]
    baseline: str
    axes: dict[str, list[Any]]
    seeds: list[int]
    level: Annotated[float, Field(gt=0.5, lt=1.0)]
    cells: list[_RunShape]
    pretrained: list[_RunShape] = []
    search: _SearchShape = _SearchShape()
    config: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    resumed: list[Any] = []
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
    def _baseline_is_an_arm(self) -> _StudyShape:
        if self.baseline not in [arm.name for arm in self.arms]:
            raise ValueError("is none of the arms")
        return self


def _found(folder: Path, own: Mapping[str, Any]) -> CellFound:
    run = RunFolder(folder / CELLS / own["id"])
    done = own["status"] == "finished" and (run.folder / "result.json").is_file()
    return CellFound(
        id=own["id"],
        arm=own["arm"],
        condition=tuple((key, as_text(value)) for key, value in own["condition"].items()),
        seed=own["seed"],
        status=own["status"],
        message=own["message"],
        start=own["start"],
        run=run,
        scores=scores_of(run.result or {}) if done else {},
        passports=passports_in(run.result or {}) if done else {},
        labelled=labelled_digest(run.read("split.json")) if done else "",
    )


def _weights_of(cell: CellFound) -> str | None:
    """What a cell starts from: a pretraining of the study, or weights that its config names."""
    named = cell.start or cell.run.config.get("init")
    of_timm = cell.run.config.get("model") or {}
    pretrained = (of_timm.get("encoder") or {}).get("pretrained")
    return named or (f"timm: {pretrained}" if pretrained else None)


def _may_be_ranked(one: CellFound, other: CellFound) -> bool:
    return not _what_differs(one, other)


def _what_differs(one: CellFound, other: CellFound) -> str:
    """What keeps two cells from being a pair; '' where nothing does.

    Images that were changed between two starts of a study: those that are scored, and the labelled ones unless the arms
    themselves ask for others.
    """
    fields = differing(one.passports, other.passports)
    if fields:
        return f"their scores differ in {'; '.join(fields)}"
    asked = [(cell.run.config.get("labels"), cell.run.config.get("data", {}).get("labelled")) for cell in (one, other)]
    return "their labelled images differ" if asked[0] == asked[1] and one.labelled != other.labelled else ""


def condition_text(condition: Condition) -> str:
    """`labels.count=10, train.steps=400`."""
    return ", ".join(f"{key}={value}" for key, value in condition)


# ---- tables ----


def write_tables(found: Findings) -> None:
    """cells.csv, a row a cell, and gains.csv, a row a gain of mIoU or of a class: tidy, for a spreadsheet or pandas."""
    files.write_atomic(found.folder / CELLS_FILE, _csv(cell_rows(found)))
    files.write_atomic(found.folder / GAINS_FILE, _csv(gain_rows(found)))


def cell_rows(found: Findings) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for cell in found.cells for name in cell.scores))
    rows = []
    for cell in found.cells:
        about = {"cell": cell.id, "arm": cell.arm, **dict(cell.condition), "seed": cell.seed, "status": cell.status}
        rows.append({**about, **{name: cell.scores.get(name, "") for name in names}, "message": cell.message})
    return rows


def gain_rows(found: Findings) -> list[dict[str, Any]]:
    """Shares in [0, 1]; nothing where there are too few pairs for a figure."""
    rows = []
    for gain in (*found.gains, *found.class_gains):
        row = {"score": gain.score, "arm": gain.arm, **dict(gain.condition), "n": gain.gains.n}
        row |= {"baseline_mean": gain.baseline.mean, "baseline_sd": gain.baseline.sd}
        row |= {"mean": gain.own.mean, "sd": gain.own.sd, "gain": gain.gains.mean, "gain_sd": gain.gains.sd}
        for prefix, interval in (("", gain.interval), ("bootstrap_", gain.bootstrap), ("images_", gain.images)):
            row |= {f"{prefix}low": interval and interval.low, f"{prefix}high": interval and interval.high}
        starts, values = gain.over_starts, independent(gain.gains)
        row |= {"starts_low": starts and starts.low, "starts_high": starts and starts.high, "independent": len(values)}
        row |= {"detectable": detectable(values) if len(values) >= MIN_STARTS else None}
        rows.append({**row, "p": gain.p, "p_holm": gain.p_holm, "pretrainings": gain.num_starts})
    return rows


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    listed = list(rows)
    text = io.StringIO(newline="")
    if listed:
        table = csv.DictWriter(text, fieldnames=list(listed[0]))
        table.writeheader()
        table.writerows(listed)
    return text.getvalue().encode()

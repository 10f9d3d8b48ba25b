"""Arms: what a page compares, each with a colour and a mark, for pages about runs and about studies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ssl_seg.evidence.claims import Answer
from ssl_seg.evidence.compare import Comparison, Group
from ssl_seg.evidence.formatting import count_of, state
from ssl_seg.evidence.pairs import Spread
from ssl_seg.evidence.results import Condition, Findings
from ssl_seg.figures import charts
from ssl_seg.figures.charts import Style
from ssl_seg.reports.blocks import Front
from ssl_seg.runs.folder import RunFolder


@dataclass(frozen=True)
class Arm:
    """A group of a comparison as the page shows it; where nothing is finished yet, a single run."""

    label: str
    style: Style
    mark: Markup
    group: Group | None
    runs: tuple[RunFolder, ...]
    shown: RunFolder  # whose pictures and config stand for all: the median one by the main score

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    @cached_property
    def metrics(self) -> list[list[dict[str, float]]]:
        return [run.metrics() for run in self.runs]


@dataclass(frozen=True)
class Page:
    """What every section is made from."""

    runs: tuple[RunFolder, ...]
    comparison: Comparison
    arms: tuple[Arm, ...]

    @property
    def score(self) -> str | None:
        return self.comparison.main_score

    @property
    def part(self) -> str:
        return "val" if self.score is None else self.score.partition("/")[0]

    def gain(self, arm: Arm, score: str) -> Spread | None:
        return None if arm.group is None else self.comparison.gain(arm.group, score)

    def spread(self, arm: Arm, score: str) -> Spread | None:
        return None if arm.group is None else arm.group.spread(score)


def make_page(runs: Sequence[RunFolder], comparison: Comparison) -> Page:
    """The groups of a comparison with their runs, each with its look."""
    return Page(tuple(runs), comparison, tuple(_arms(comparison, runs)))


def make_front(page: Page, told: Answer) -> Front:
    """The head of a page about runs."""
    marks = {arm.label: arm.mark for arm in page.arms}
    unfinished = tuple((run.name, state(run)) for run in page.runs if not run.is_done)
    return Front(_title(page.runs), _counts(page), told, marks, unfinished)


def _title(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return common_folder(runs).name or "runs"


def common_folder(runs: Sequence[RunFolder]) -> Path:
    """The nearest folder that all of them lie in."""
    return Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))


def _counts(page: Page) -> str:
    groups = f" in {len(page.arms)} groups" if 1 < len(page.arms) < len(page.runs) else ""
    return f"{count_of(len(page.runs), 'run')}{groups}"


def _arms(comparison: Comparison, runs: Sequence[RunFolder]) -> Iterator[Arm]:
    if not comparison.groups:
        looks = charts.styles([False] * len(runs))
        for run, style in zip(runs, looks, strict=True):
            yield Arm(run.name, style, Markup(charts.swatch(style)), None, (run,), run)
        return
    by_name = {str(run.folder): run for run in runs}
    looks = charts.styles([group.from_scratch for group in comparison.groups])
    for group, style in zip(comparison.groups, looks, strict=True):
        own = tuple(by_name[outcome.name] for outcome in group.outcomes)
        mark = Markup(charts.swatch(style))
        yield Arm(group.label, style, mark, group, own, by_name[_median(group, comparison.main_score)])


def _median(group: Group, score: str | None) -> str:
    """The name of the run in the middle by the main score, the lower one of two; the first where there is no score."""
    scored = [outcome for outcome in group.outcomes if score in outcome.scores]
    if not scored:
        return group.outcomes[0].name
    return sorted(scored, key=lambda outcome: outcome.scores[score])[(len(scored) - 1) // 2].name


def which(arm: Arm) -> str:
    if len(arm.runs) == 1:
        return arm.shown.name
    of = "the median run" if arm.stage != "pretrain" else "the first"
    return f"{arm.shown.name}, {of} of {len(arm.runs)}"


@dataclass(frozen=True)
class Side:
    """An arm as the page shows it."""

    label: str
    style: Style
    mark: Markup
    is_pretrained: bool  # starts from weights


@dataclass(frozen=True)
class StudyPage:
    """What every section is made from."""

    found: Findings
    sides: tuple[Side, ...]  # the baseline first
    place: Path  # the folder that the page goes into: links start there

    @property
    def rivals(self) -> tuple[Side, ...]:
        return self.sides[1:]

    @property
    def over(self) -> str:
        return f"gain over {self.found.baseline}"

    @property
    def level(self) -> str:
        """`95 %`."""
        return f"{100 * self.found.record['level']:g} %"

    @property
    def pretrained(self) -> Sequence[Mapping[str, Any]]:
        """The study's pretrainings, as study.json has them."""
        return self.found.record.get("pretrained", ())

    @property
    def trials(self) -> Sequence[Mapping[str, Any]]:
        """The runs of its search; none without one."""
        return self.found.record.get("search", {}).get("trials", ())

    def score(self, side: Side, condition: Condition) -> Spread | None:
        return self.found.spread(side.label, condition)

    def gain(self, side: Side, condition: Condition) -> Spread | None:
        found = (own for own in self.found.gains if (own.arm, own.condition) == (side.label, condition))
        return next((own.gains for own in found), None)


def make_study_page(found: Findings, place: Path) -> StudyPage:
    looks = charts.styles([arm == found.baseline for arm in found.arms])
    sides = (
        Side(arm, style, Markup(charts.swatch(style)), found.is_pretrained(arm))
        for arm, style in zip(found.arms, looks, strict=True)
    )
    return StudyPage(found, tuple(sides), place)


def legend_of(sides: Sequence[Side]) -> tuple[tuple[Markup, str], ...]:
    return tuple((side.mark, side.label) for side in sides) if len(sides) > 1 else ()

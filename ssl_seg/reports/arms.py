"""What a page is made from: a comparison, and the colour and mark by which each of its arms is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Generic, TypeVar

from markupsafe import Markup

from ssl_seg.evidence.comparison import Arm, Comparison
from ssl_seg.evidence.formatting import level_text
from ssl_seg.figures import charts
from ssl_seg.figures.charts import Style
from ssl_seg.runs.folder import RunFolder

C = TypeVar("C", bound=Comparison)


@dataclass(frozen=True)
class Page(Generic[C]):
    """What every section is made from."""

    found: C
    styles: Mapping[Arm, Style]
    marks: Mapping[Arm, Markup]
    place: Path  # the folder that the page goes into: links start there
    runs: tuple[RunFolder, ...] = ()  # those that the page was asked for, finished or not; none for a study

    @property
    def level(self) -> str:
        """`95 %`."""
        return level_text(self.found.level)

    @property
    def over(self) -> str:
        return f"gain over {self.found.over}"

    @property
    def scored(self) -> list[Arm]:
        """The arms that have the main score under some condition."""
        score = self.found.main_score
        return [arm for arm in self.found.arms if any(score in outcome.scores for outcome in arm.outcomes)]

    def legend(self, arms: Sequence[Arm]) -> tuple[tuple[Markup, str], ...]:
        """Mark and label of each; an arm alone needs none."""
        return tuple((self.marks[arm], arm.label) for arm in arms) if len(arms) > 1 else ()

    def shown(self, arm: Arm) -> RunFolder:
        """The run whose pictures and config stand for all: the median by the main score, the lower one of two.

        The first where there is no score.
        """
        score = self.found.main_score or ""
        scored = [(own.scores[score], own.run) for own in arm.outcomes if own.run is not None and score in own.scores]
        runs = [run for _, run in sorted(scored, key=itemgetter(0))] or arm.runs[:1]
        return runs[(len(runs) - 1) // 2]

    def which(self, arm: Arm) -> str:
        """That run by its name: `fine_2, the median run of 3`."""
        name = self.shown(arm).name
        if len(arm.runs) == 1:
            return name
        of = "the median run" if arm.stage != "pretrain" else "the first"
        return f"{name}, {of} of {len(arm.runs)}"


def make_page(found: C, place: Path, runs: Sequence[RunFolder] = ()) -> Page[C]:
    """Each arm with its look: grey for those that gains are measured from."""
    looks = charts.styles([arm in found.bases for arm in found.arms])
    styles = dict(zip(found.arms, looks, strict=True))
    marks = {arm: Markup(charts.swatch(style)) for arm, style in styles.items()}
    return Page(found, styles, marks, place, tuple(runs))

"""What every section of a study's page is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ssl_seg.evidence.pairs import Spread
from ssl_seg.evidence.results import Condition, Findings
from ssl_seg.figures import charts
from ssl_seg.figures.charts import Style


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


def make_page(found: Findings, place: Path) -> StudyPage:
    looks = charts.styles([arm == found.baseline for arm in found.arms])
    sides = (
        Side(arm, style, Markup(charts.swatch(style)), found.is_pretrained(arm))
        for arm, style in zip(found.arms, looks, strict=True)
    )
    return StudyPage(found, tuple(sides), place)


def legend_of(sides: Sequence[Side]) -> tuple[tuple[Markup, str], ...]:
    return tuple((side.mark, side.label) for side in sides) if len(sides) > 1 else ()

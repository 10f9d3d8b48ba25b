"""Tables of a comparison and of a study on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ssl_seg.terminal import print_lines

if TYPE_CHECKING:
    from rich.table import Table

    from ssl_seg.evidence.compare import Comparison, Group
    from ssl_seg.evidence.pairs import Spread
    from ssl_seg.evidence.results import Findings
    from ssl_seg.evidence.statistics import Interval
    from ssl_seg.scores import SegmentationScores

GROUPS_ABREAST = 6  # columns of a table that fits a wide terminal


def score_lines(part: str, scores: SegmentationScores, class_names: Sequence[str]) -> list[str]:
    width = max(len(name) for name in class_names)
    rows = [f"  {name:<{width}} {iou:.4f}" for name, iou in zip(class_names, scores.iou.tolist(), strict=True)]
    averaged = sum(iou == iou for iou in scores.iou.tolist())  # nan: neither in the truth nor predicted
    over = f" over {averaged} of {len(class_names)} classes" if averaged < len(class_names) else ""
    return [f"{part} mIoU {scores.miou:.4f}{over}, pixel accuracy {scores.accuracy:.4f}", *rows]


def print_comparison(found: Comparison) -> None:
    """For each table: a row a group with its main score; then what differs, every score and gain, a column a group."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    numbers = {id(group): f"#{number}" for number, group in enumerate(found.groups, start=1)}
    for groups in found.tables:
        console.print(_main_table(found, groups, numbers))
        for start in range(0, len(groups), GROUPS_ABREAST):
            console.print(_figure_table(found, groups[start : start + GROUPS_ABREAST], numbers))
    print_lines(found.notes)
    for run in found.unfinished:
        print(f"not finished, left out: {run}", file=sys.stderr)


def _main_table(found: Comparison, groups: Sequence[Group], numbers: Mapping[int, str]) -> Table:
    from rich.table import Table

    from ssl_seg.evidence.compare import main_score_of

    score = main_score_of(groups)
    gaining = [group for group in groups if score and found.baseline(group)]
    columns = ["gain over scratch", "95 % over images"] if gaining else []
    table = Table("", "group", "n", *([score] if score else []), *columns)
    for group in groups:
        row = [numbers[id(group)], group.label, str(len(group.outcomes))]
        if score:
            spread = group.spread(score)
            row.append(spread.text() if spread else "-")
        if group in gaining:
            gain = found.gain(group, score)
            row.append(f"{gain.text(sign='+')} (n = {gain.n})" if gain else "no pair: other seeds or labelled images")
            row.append(_interval_text(found.over_images(group, score)))
        table.add_row(*row)
    return table


def _figure_table(found: Comparison, groups: Sequence[Group], numbers: Mapping[int, str]) -> Table:
    """Keys that differ, every score, and the gain over scratch in each."""
    from rich.table import Table

    table = Table("", *(numbers[id(group)] for group in groups))
    for key, values in found.differing.items():
        own = [value for group, value in zip(found.groups, values, strict=True) if group in groups]
        table.add_row(key, *("-" if value is None else value for value in own))
    table.add_section()
    for name in found.scores:
        spreads = [group.spread(name) for group in groups]
        if any(spreads):
            table.add_row(name, *("-" if spread is None else spread.text() for spread in spreads))
    table.add_section()
    for name in (name for name in found.scores if not name.endswith("/averaged_classes")):
        gains = [found.gain(group, name) for group in groups]
        if any(gains):
            cells = (_gain_text(found, group, name, gain) for group, gain in zip(groups, gains, strict=True))
            table.add_row(f"gain in {name}", *cells)
    return table


def _gain_text(found: Comparison, group: Group, name: str, gain: Spread | None) -> str:
    """With its spread over seeds; of the pixels near boundaries also over images, as the main table has it of all."""
    if gain is None:
        return "-"
    over_images = found.over_images(group, name) if name.endswith("/band/miou") else None
    interval = "" if over_images is None else f" (over images {_interval_text(over_images)})"
    return f"{gain.text(sign='+')}{interval}"


def print_findings(found: Findings) -> None:
    """A row an arm under each condition, the baseline first, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    from ssl_seg.evidence.claims import answer_of_study
    from ssl_seg.evidence.formatting import NOTHING, between, p_as_number, percent, points
    from ssl_seg.evidence.results import CELLS_FILE, GAINS_FILE

    level = f"{100 * found.record['level']:g} %"
    columns = ["arm", "n", f"{found.part} mIoU, %", f"gain over {found.baseline}, points"]
    shares = any(gain.over_starts for gain in found.gains)  # pretrainings, enough for an interval of their own
    over = ["seeds", *(["pretrainings"] if shares else []), "images"]
    table = Table(*found.axes, *columns, *(f"{level} over {what}" for what in over), "exact p")
    gains = {(gain.arm, gain.condition): gain for gain in found.gains}
    for condition in found.conditions:
        for arm in found.arms:
            row = [*dict(condition).values(), arm, str(len(found.of(arm, condition)))]
            row.append(percent(found.spread(arm, condition)))
            gain = gains.get((arm, condition))
            if gain is not None:
                row += [f"{points(gain.gains.mean)} (n = {gain.gains.n})", between(gain.interval)]
                row += [between(gain.over_starts)] if shares else []
                row += [between(gain.images)]
                row += [NOTHING if gain.p is None else p_as_number(gain.p)]
            table.add_row(*row)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    tables = f"{found.folder / CELLS_FILE}, {found.folder / GAINS_FILE}"
    print_lines([answer_of_study(found).headline, f"tables: {tables}", f"report: {found.folder / 'report.html'}"])


def _interval_text(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"

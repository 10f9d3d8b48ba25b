"""Tables of a comparison on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ssl_seg.terminal import print_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ssl_seg.evidence.comparison import Arm, Comparison, Condition, Gain
    from ssl_seg.evidence.results import Study
    from ssl_seg.evidence.statistics import Interval
    from ssl_seg.scores import SegmentationScores

    Column = tuple[str, Callable[[Arm, Condition, Gain | None], str]]  # its head, and what stands in the row of an arm

ARMS_ABREAST = 6  # columns of a table that fits a wide terminal


def score_lines(part: str, scores: SegmentationScores, class_names: Sequence[str]) -> list[str]:
    """The mIoU of a part, and the IoU of each class."""
    width = max(len(name) for name in class_names)
    rows = [f"  {name:<{width}} {iou:.4f}" for name, iou in zip(class_names, scores.iou.tolist(), strict=True)]
    averaged = sum(iou == iou for iou in scores.iou.tolist())  # nan: neither in the truth nor predicted
    over = f" over {averaged} of {len(class_names)} classes" if averaged < len(class_names) else ""
    return [f"{part} mIoU {scores.miou:.4f}{over}, pixel accuracy {scores.accuracy:.4f}", *rows]


def print_comparison(found: Comparison) -> None:
    """For each table: a row an arm with its main score; then what differs, every score and gain, a column an arm."""
    from ssl_seg.evidence.cautions import notes
    from ssl_seg.evidence.comparison import main_score_of

    console = _console()
    for arms in found.tables:
        score = main_score_of(arms)
        console.print(_arm_table(found, arms, score, _columns(found, arms, score)))
        for start in range(0, len(arms), ARMS_ABREAST):
            console.print(_figure_table(found, arms[start : start + ARMS_ABREAST]))
    print_lines([*notes(found), *(f"no interval over images: {fault}" for fault in found.faults)])
    for run in found.unfinished:
        print(f"not finished, left out: {run}", file=sys.stderr)


def print_study(study: Study) -> None:
    """A row an arm under each condition, the baseline first, and where everything is."""
    from ssl_seg.evidence.claims import answer
    from ssl_seg.evidence.results import CELLS_FILE, GAINS_FILE

    _console().print(_arm_table(study, study.arms, study.main_score, _columns_of_study(study)))
    tables = f"{study.folder / CELLS_FILE}, {study.folder / GAINS_FILE}"
    print_lines([answer(study).headline, f"tables: {tables}", f"report: {study.folder / 'report.html'}"])


def _arm_table(found: Comparison, arms: Sequence[Arm], score: str | None, columns: Sequence[Column]) -> Table:
    """A row an arm under each condition."""
    from rich.table import Table

    table = Table(*(head for head, _ in columns))
    for condition in found.conditions:
        for arm in arms:
            gain = None if score is None else found.gain(arm, score, condition)
            table.add_row(*(cell(arm, condition, gain) for _, cell in columns))
        table.add_section()
    return table


def _columns(found: Comparison, arms: Sequence[Arm], score: str | None) -> list[Column]:
    """Of runs: shares from 0 to 1, as in their files."""
    from ssl_seg.evidence.formatting import level_text

    def own(arm: Arm, *_: object) -> str:
        spread = arm.spread(score)
        return spread.text() if spread else "-"

    def gained(arm: Arm, _: Condition, gain: Gain | None) -> str:
        if arm not in found.baselines:
            return ""
        return f"{_signed(gain)} (n = {gain.n})" if gain else "no pair: other seeds or labelled images"

    def over_images(arm: Arm, *_: object) -> str:
        return _interval(found.over_images(arm, score)) if arm in found.baselines else ""

    columns: list[Column] = [
        ("", lambda arm, *_: _number(found, arm)),
        ("group", lambda arm, *_: arm.label),
        ("n", lambda arm, *_: str(len(arm.outcomes))),
    ]
    if score is not None:
        columns.append((score, own))
        if any(arm in found.baselines for arm in arms):
            columns.append((f"gain over {found.over}", gained))
            columns.append((f"{level_text(found.level)} over images", over_images))
    return columns


def _columns_of_study(study: Study) -> list[Column]:
    """Scores in per cent, gains in points."""
    from ssl_seg.evidence.formatting import NOTHING, between, level_text, p_as_number, percent, points

    def of_gain(cell: Callable[[Gain], str]) -> Callable[[Arm, Condition, Gain | None], str]:
        return lambda arm, condition, gain: "" if gain is None else cell(gain)

    def axis(key: str) -> Column:
        return key, lambda arm, condition, gain: dict(condition)[key]

    level = level_text(study.level)
    columns: list[Column] = [axis(key) for key in study.axes]
    columns += [
        ("arm", lambda arm, *_: arm.label),
        ("n", lambda arm, condition, _: str(sum(bool(cell.scores) for cell in arm.at(condition)))),
        (f"{study.part} mIoU, %", lambda arm, condition, _: percent(arm.spread(study.main_score, condition))),
        (f"gain over {study.over}, points", of_gain(lambda gain: f"{points(gain.mean)} (n = {gain.n})")),
        (f"{level} over seeds", of_gain(lambda gain: between(gain.over_seeds))),
    ]
    if any(gain.over_starts for gain in study.gains):  # pretrainings, enough for an interval of their own
        columns.append((f"{level} over pretrainings", of_gain(lambda gain: between(gain.over_starts))))
    columns += [
        (
            f"{level} over images",
            of_gain(lambda gain: between(study.over_images(gain.arm, gain.score, *gain.conditions))),
        ),
        ("exact p", of_gain(lambda gain: NOTHING if gain.p is None else p_as_number(gain.p))),
    ]
    return columns


def _figure_table(found: Comparison, arms: Sequence[Arm]) -> Table:
    """Keys that differ, every score, and the gain over scratch in each."""
    from rich.table import Table

    table = Table("", *(_number(found, arm) for arm in arms))
    for key, values in found.differing.items():
        own = [value for arm, value in zip(found.arms, values, strict=True) if arm in arms]
        table.add_row(key, *("-" if value is None else value for value in own))
    table.add_section()
    for name in found.scores:
        spreads = [arm.spread(name) for arm in arms]
        if any(spreads):
            table.add_row(name, *("-" if spread is None else spread.text() for spread in spreads))
    table.add_section()
    for name in (name for name in found.scores if not name.endswith("/averaged_classes")):
        gains = [found.gain(arm, name) for arm in arms]
        if any(gains):
            table.add_row(f"gain in {name}", *(_gain_text(found, gain) for gain in gains))
    return table


def _gain_text(found: Comparison, gain: Gain | None) -> str:
    """With its spread over seeds; of the pixels near boundaries also over images, as the first table has it of all."""
    if gain is None:
        return "-"
    over_images = found.over_images(gain.arm, gain.score) if gain.score.endswith("/band/miou") else None
    return _signed(gain) + ("" if over_images is None else f" (over images {_interval(over_images)})")


def _number(found: Comparison, arm: Arm) -> str:
    return f"#{found.arms.index(arm) + 1}"


def _signed(gain: Gain) -> str:
    """`+0.0073 ± 0.0085`."""
    return gain.differences.text(sign="+")


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)

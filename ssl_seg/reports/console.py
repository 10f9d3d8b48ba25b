"""Tables of a comparison on the terminal."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ssl_seg.calibration import in_words, left_out_in_words
from ssl_seg.terminal import print_lines, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ssl_seg.evidence.comparison import Arm, Comparison, Condition, Gain
    from ssl_seg.evidence.ledger import Ledger
    from ssl_seg.evidence.results import Study
    from ssl_seg.evidence.statistics import Interval
    from ssl_seg.models.support import Support
    from ssl_seg.scores import Average, SegmentationScores
    from ssl_seg.stages.check import Checked
    from ssl_seg.stages.gap import Gaps
    from ssl_seg.stages.probe import Probes
    from ssl_seg.stages.scoring import Measured

    Cells = Callable[[Arm, Condition], list[str]]  # the row of an arm

OF_A_KIND = 5  # findings of `check` on the terminal
ARMS_ABREAST = 6  # columns of a table that fits a wide terminal


def score_lines(
    part: str, scores: SegmentationScores, class_names: Sequence[str], averages: Sequence[Average] = ()
) -> list[str]:
    """The mIoU of a part, the IoU of each class, and the averages that were asked for."""
    width = max(len(name) for name in class_names)
    rows = [f"  {name:<{width}} {iou:.4f}" for name, iou in zip(class_names, scores.iou.tolist(), strict=True)]
    averaged = sum(iou == iou for iou in scores.iou.tolist())  # nan: neither in the truth nor predicted
    over = f" over {averaged} of {len(class_names)} classes" if averaged < len(class_names) else ""
    first = f"{part} mIoU {scores.miou:.4f}{over}, pixel accuracy {scores.accuracy:.4f}"
    return [first, *rows, *_average_lines(scores, averages)]


def confidence_lines(
    part: str, measured: Measured, temperature: float | None = None, is_in_sample: bool = False
) -> list[str]:
    """How sure the model is of a part and how often right, also at a temperature; and how its outlines fit."""
    lines = [f"{part} {in_words(measured.confidences)}"]
    if measured.tempered is not None and temperature is not None:
        sample = "in-sample: it was fitted on these images" if is_in_sample else "not the set that it was fitted on"
        of = f"at temperature {temperature:.2f} ({sample})"
        lines.append(f"{part} {of}: {in_words(measured.tempered)}")
    lines.append(f"{part} AURC {measured.confidences.aurc:.4f}: {left_out_in_words(measured.confidences)}")
    if measured.contours is not None:
        named = measured.contours.named()
        width = max(len(name) for name in measured.contours.class_names)
        lines.append(f"{part} outlines: {'':<{max(0, width - 9)}}Boundary IoU  Hausdorff 95, pixels")
        for name in measured.contours.class_names:
            iou, distance = named[f"boundary/iou/{name}"], named[f"hd95/{name}"]
            cells = ["-" if iou is None else f"{iou:.4f}", "-" if distance is None else f"{distance:.1f}"]
            lines.append(f"  {name:<{width}} {cells[0]:>12}  {cells[1]:>20}")
    return lines


def _average_lines(scores: SegmentationScores, averages: Sequence[Average]) -> list[str]:
    """A row a figure, under the names of the averages."""
    columns = {average: scores.averaged(average) for average in averages}
    names = list(next(iter(columns.values()), ()))
    width = max(map(len, names), default=0)
    lines = ["  ".join([f"  {'':<{width}}", *(f"{average:>6}" for average in columns)])] if columns else []
    for name in names:
        values = [(own[name], max(6, len(average))) for average, own in columns.items()]
        cells = [f"{'-':>{room}}" if math.isnan(value) else f"{value:>{room}.4f}" for value, room in values]
        lines.append("  ".join([f"  {name:<{width}}", *cells]))
    return lines


def probe_lines(found: Probes) -> list[str]:
    """A row an encoder, beside the same network with random weights; then what chance is."""
    rows = [
        ("mIoU, %", "random", "seconds", "encoder"),
        *((_share(one.scores.miou), _share(one.random.miou), f"{one.seconds:.1f}", one.name) for one in found.encoders),
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    table = ["  ".join([*(row[place].rjust(widths[place]) for place in range(3)), row[3]]) for row in rows]
    most = found.class_names[int(found.chance.confusion.sum(axis=0).argmax())]
    return [
        f"one linear layer on frozen maps, {len(found.labelled)} labelled images, each scored by a layer of others:",
        *table,
        f"for scale: all pixels taken for {most} {_share(found.chance.miou)}",
    ]


def _share(value: float) -> str:
    return f"{value * 100:.1f}"


def gap_lines(found: Gaps) -> list[str]:
    """A row a pool, the nearest first; then what these numbers mean for this target."""
    rows = [("gap", "95 % interval", "reaches", "inside", "pool")]
    for pool in found.pools:
        ends = "-" if pool.interval is None else f"{_gap(pool.interval.low)} to {_gap(pool.interval.high)}"
        shares = (f"{pool.reached * 100:.0f} %", f"{pool.inside * 100:.0f} %")
        rows.append((_gap(pool.gap), ends, *shares, f"{pool.name} ({pool.count} images)"))
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    table = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    halves = "" if found.halves is None else f"19 of 20 halvings of the target below {_gap(found.halves)}; "
    lines = [
        f"from {found.count} target images, by {found.encoder}:",
        *table,
        f"for scale: {halves}the target itself without colour {_gap(found.grey)}, out of focus {_gap(found.blurred)}",
    ]
    nearest, *others = found.pools
    if others:
        behind = [pool.name for pool in others if pool.behind is None or pool.behind.low <= 0]
        lines += [f"nearest: {nearest.name}" + (f"; not surely nearer than {', '.join(behind)}" if behind else "")]
    lines += [f"{pool.name}: {pool.shared} of its images are the target's too" for pool in found.pools if pool.shared]
    return lines


def _gap(value: float) -> str:
    return f"{value:.2f}" if round(value, 2) else "0.00"  # no -0.00


def check_lines(found: Checked) -> list[str]:
    """What each part holds, then what is to be mended, what is worth knowing, and the command that trains."""
    lines = []
    for part in found.parts:
        lines += [f"data.{part.name}"] if len(found.parts) > 1 else []
        sizes = list(part.sizes)
        told = (
            f"all {sizes[0]}" if len(sizes) == 1 else f"{len(sizes)} sizes, most {sizes[0]}" if sizes else "none read"
        )
        kinds = ", ".join(part.kinds)
        deep = part.used is not None and not kinds.startswith(("8 ", "1 "))
        used = f", {part.used[0]:g} to {part.used[1]:g} used" if deep and part.used else ""
        lines.append(f"images  {part.images}, {told}, {kinds}{used}")
        if part.masks is not None:
            shares = ", ".join(f"{own.name} {own.percent}" for own in part.classes) or "not known"
            ignored = f"; ignored {part.ignored * 100:.2g} % of all pixels" if part.ignored else ""
            lines.append(f"masks   {part.masks}, {len(part.values)} values; classes: {shares}{ignored}")
    for head, findings in (("faults", found.faults), ("worth knowing", found.notes)):
        lines += [f"{head}: {len(findings)}"] if findings else []
        told_of = Counter[str]()
        for one in findings:
            told_of[one.kind] += 1
            where = f"data.{one.part}: " if len(found.parts) > 1 else ""
            lines += [f"  {where}{one.text}"] if told_of[one.kind] <= OF_A_KIND else []
        more = [f"{count - OF_A_KIND} more of {kind}" for kind, count in told_of.items() if count > OF_A_KIND]
        lines += [f"  and {', '.join(more)}: --json has all"] if more else []
    if found.command is None:
        return [*lines, "next: mend the faults, and check again"]
    return [*lines, f"next: {found.command}"]


def print_comparison(found: Comparison) -> None:
    """For each table: a row an arm with its main score; then what differs, every score and gain, a column an arm."""
    from ssl_seg.evidence.cautions import notes
    from ssl_seg.evidence.comparison import main_score_of

    console = _console()
    for arms in found.tables:
        _print_arms(console, found, arms, *_rows_of_runs(found, arms, main_score_of(arms)))
        for start in range(0, len(arms), ARMS_ABREAST):
            console.print(_figure_table(found, arms[start : start + ARMS_ABREAST]))
    print_lines([*notes(found), *(f"no interval over images: {fault}" for fault in found.faults)])
    for run in found.unfinished:
        say(f"not finished, left out: {run}")


def print_study(study: Study) -> None:
    """A row an arm under each condition, the baseline first, and where everything is."""
    from ssl_seg.evidence import label_curve, ledger
    from ssl_seg.evidence.claims import answer
    from ssl_seg.evidence.results import CELLS_FILE, GAINS_FILE, LABELS_FILE, LEDGER_FILE, PRIMARY_FILE

    _print_arms(_console(), study, study.arms, *_rows_of_study(study))
    books = ledger.ledgers(study)
    if any(book.whole is not None for book in books):
        _console().print(_ledger_table(study, books))
    print_lines([note for book in books for note in ledger.notes(book)])
    written = [CELLS_FILE, GAINS_FILE, *[LABELS_FILE] * bool(label_curve.curves(study))]
    written += [PRIMARY_FILE] * bool(study.contrasts)
    written += [LEDGER_FILE] * any(book.whole is not None for book in books)
    tables = ", ".join(str(study.folder / name) for name in written)
    told = [words for words in (answer(study).headline, label_curve.sentence(study)) if words]
    print_lines([*told, f"tables: {tables}", f"report: {study.folder / 'report.html'}"])


def _print_arms(console: Console, found: Comparison, arms: Sequence[Arm], heads: Sequence[str], cells: Cells) -> None:
    """A row an arm under each condition."""
    from rich.table import Table

    table = Table(*heads)
    for condition in found.conditions:
        for arm in arms:
            table.add_row(*cells(arm, condition))
        table.add_section()
    console.print(table)


def _rows_of_runs(found: Comparison, arms: Sequence[Arm], score: str | None) -> tuple[list[str], Cells]:
    """Shares from 0 to 1, as in the files of runs; gains where some arm has a baseline."""
    from ssl_seg.evidence.formatting import level_text

    heads = ["", "group", "n"]
    heads += [score] if score else []
    if score and any(arm in found.baselines for arm in arms):
        heads += [f"gain over {found.over}", f"{level_text(found.level)} over images"]

    def cells(arm: Arm, _: Condition) -> list[str]:
        row = [_number(found, arm), arm.label, str(len(arm.outcomes))]
        if score:
            spread = arm.spread(score)
            row.append(spread.text() if spread else "-")
            if arm in found.baselines:
                gain = found.gain(arm, score)
                row.append(f"{_signed(gain)} (n = {gain.n})" if gain else "no pair: other seeds or labelled images")
                row.append(_interval(found.over_images(arm, score)))
        return row

    return heads, cells


def _rows_of_study(study: Study) -> tuple[list[str], Cells]:
    """Scores in per cent, gains in points."""
    from ssl_seg.evidence.formatting import NOTHING, between, level_text, p_as_number, percent, points

    gains = {(gain.arm, gain.condition): gain for gain in study.gains}
    shares = any(gain.over_starts for gain in study.gains)  # pretrainings, enough for an interval of their own
    intervals = ["seeds", *["pretrainings"] * shares, "images"]
    heads = [*study.axes, "arm", "n", f"{study.part} mIoU, %", f"gain over {study.over}, points"]
    heads += [*(f"{level_text(study.level)} over {what}" for what in intervals), "exact p"]

    def cells(arm: Arm, condition: Condition) -> list[str]:
        done = sum(bool(cell.scores) for cell in arm.at(condition))
        row = [*dict(condition).values(), arm.label, str(done), percent(arm.spread(study.main_score, condition))]
        gain = gains.get((arm, condition))
        if gain is not None:
            row += [f"{points(gain.mean)} (n = {gain.n})", between(gain.over_seeds)]
            row += [between(gain.over_starts)] * shares
            row += [between(study.over_images(arm, gain.score, condition))]
            row += [NOTHING if gain.p is None else p_as_number(gain.p)]
        return row

    return heads, cells


def _ledger_table(study: Study, books: Sequence[Ledger]) -> Table:
    """A row a task with its share and what it gives alone, a row for all, and a row a pair, in points."""
    from rich.table import Table

    from ssl_seg.evidence.formatting import NOTHING, between, level_text, p_as_number, points

    heads = ["share of the gain", "points", level_text(study.level), "exact p", "n", "alone, points"]
    table = Table(*study.axes, *heads)
    for book in books:
        if book.whole is None:
            continue
        alone = {entry.tasks: points(entry.mean) for entry in book.alone}
        listed = [(entry.name, entry) for entry in book.shares]
        listed += [("all, less none", book.whole)]
        listed += [(f"{entry.name}, as a pair", entry) for entry in book.extras]
        for name, entry in listed:
            p = NOTHING if entry.p is None else p_as_number(entry.p)
            cells = [points(entry.mean), between(entry.interval), p, str(entry.n), alone.get(entry.tasks, "")]
            table.add_row(*dict(book.condition).values(), name, *cells)
        table.add_section()
    return table


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


def print_support(rows: Sequence[Support]) -> None:
    """A row an encoder of timm, and how many there are of each kind."""
    from rich.table import Table

    table = Table("encoder", "family", "M", "maps at 2 to 32", "dilates", "batch norm", "not", "weights", "")
    for row in rows:
        table.add_row(
            row.encoder,
            row.family,
            row.parameters,
            row.channels,
            row.dilates,
            row.batch_norm,
            row.refused_by,
            row.weights,
            row.how if row.state == "adapted" else f"{row.state}{': ' * bool(row.how)}{row.how}",
        )
    _console().print(table)
    counts = Counter(row.state for row in rows)
    kinds = ", ".join(f"{count} {state}" for state, count in counts.items())
    print_lines([f"{len(rows)} networks of timm: {kinds}; not: decoders that do not take its maps"])

"""Sections that pages about runs and about studies have: curves, classes, leaks, and how they fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ssl_seg.evidence import results
from ssl_seg.evidence.claims import MIN_PAIRS
from ssl_seg.evidence.formatting import NOTHING, PARTS, between, count_of, foremost, percent, points, unit_of, with_unit
from ssl_seg.evidence.pairs import Spread, independent
from ssl_seg.evidence.results import Condition, Findings, Gain
from ssl_seg.evidence.statistics import Interval, t_interval
from ssl_seg.figures import charts
from ssl_seg.leaks.record import sentence
from ssl_seg.reports.arms import Arm, Page, Side, StudyPage, legend_of, which
from ssl_seg.reports.blocks import (
    Fold,
    Gallery,
    Heading,
    Panel,
    Panels,
    Section,
    Table,
    TableRow,
    Text,
    drawn,
    is_own,
    shot,
)
from ssl_seg.runs.folder import RunFolder

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "evaluate": "Evaluation"}
OF_CLASSES = (
    "IoU in %, mean ± standard deviation, in brackets the mean paired gain over scratch. Absent: the class is neither "
    "in the truth nor in a prediction, and no part of the mIoU."
)
MACHINE = ("lr", "grad_norm", "images_per_s")  # figures of the training itself, not of what was learnt
SHOWN = 8  # groups with pictures, matrices and config: with those of forty nobody could load the page
OPEN = 3  # of these, unfolded at first
PAIRS = 20  # of leaking images that are listed
LOGARITHM_FROM = 4  # ratio of largest to smallest value of an axis
ClassGains = Sequence[Sequence[Gain | None]]  # of an arm: [class, condition]


def curves(page: Page) -> Iterator[Section]:
    blocks: list[Any] = []
    stages = list(dict.fromkeys(arm.stage for arm in page.arms))
    for stage in stages:
        arms = [arm for arm in page.arms if arm.stage == stage]
        first, more = _curve_panels(arms, stage)
        if len(stages) > 1 and (first or more):
            blocks.append(Heading(STAGES.get(stage, stage)))
        if first:
            blocks.append(Panels(first, legend(arms)))
        if more:
            blocks.append(
                Fold("More curves: other figures, learning rate, gradient, speed", (Panels(more, legend(arms)),))
            )
    if blocks:
        several = any(len(arm.runs) > 1 for arm in page.arms)
        long = any(len(lines) > charts.POINTS for arm in page.arms for lines in arm.metrics)
        notes = ["Strong: the mean of a group's runs; thin: each of them."] * several
        notes += [f"Of more than {charts.POINTS} points neighbours are averaged."] * long
        blocks = [*(Text(note) for note in notes), *blocks]
    yield Section("curves", "Curves", tuple(blocks))


def _curve_panels(arms: Sequence[Arm], stage: str) -> tuple[tuple[Panel, ...], tuple[Panel, ...]]:
    """Small multiples: each task's loss and its foremost figure first, then all others; a single point is no curve."""
    names = list(dict.fromkeys(name for arm in arms for lines in arm.metrics for line in lines for name in line))
    losses = [name for name in names if name.startswith("train/") and name.count("/") > 1]
    held_out = [name for name in names if name.startswith("val/") and not name.startswith(("val/iou/", "val/averaged"))]
    first = [*losses, *foremost(held_out)]
    whole = ["train/loss"] if len(losses) > 1 else []
    panels: dict[str, Panel] = {}
    for number, name in enumerate(dict.fromkeys([*first, *whole, *held_out, *MACHINE])):
        lines = [charts.Curve(runs, arm.style) for arm in arms if (runs := _lines(arm, name))]
        if any(len(steps) > 1 for line in lines for steps, _ in line.runs):
            shown = with_unit(name)
            about = f"{shown} over steps for {', '.join(arm.label for arm in arms)}"
            svg = drawn(charts.curves, f"{stage}{number}", lines, about, by_logarithm="loss" in name)
            panels[name] = Panel(shown, svg)
    return (
        tuple(panel for name, panel in panels.items() if name in first),
        tuple(panel for name, panel in panels.items() if name not in first),
    )


def _lines(arm: Arm, name: str) -> tuple[tuple[list[float], list[float]], ...]:
    found = []
    factor, _ = unit_of(name)
    for records in arm.metrics:
        having = [record for record in records if name in record]
        if having:
            found.append(([record["step"] for record in having], [factor * record[name] for record in having]))
    return tuple(found)


def classes(page: Page) -> Iterator[Section]:
    names = class_names(page)
    arms = [arm for arm in page.arms if page.score is not None and page.spread(arm, page.score) is not None]
    if not arms or not names:
        return
    keys = [f"{page.part}/iou/{name}" for name in names]
    figures = [
        Panel(
            "IoU of each class: mean, and a line from least to most.",
            drawn(
                charts.classes, "classes", names, _series(arms, keys, page.spread), f"{page.part} IoU, %", _about(names)
            ),
        )
    ]
    if any(page.gain(arm, key) is not None for arm in arms for key in keys):
        svg = drawn(
            charts.classes,
            "class_gains",
            names,
            _series(arms, keys, page.gain),  # of all groups, so that the rows are as high as beside it
            "gain over scratch, points of IoU",
            f"paired gains of each class over scratch: {', '.join(names)}",
            zero=True,
        )
        figures.append(Panel("The same, as paired gains over scratch.", svg))
    panels = Panels(tuple(figures), legend(arms), shape="wide")
    yield Section("classes", "Classes", (panels, _class_table(page, arms, names)))


def _about(names: Sequence[str]) -> str:
    return f"IoU of the classes {', '.join(names)}; the table below has the numbers"


def _series(
    arms: Sequence[Arm], keys: Sequence[str], spread_of: Callable[[Arm, str], Spread | None]
) -> list[charts.Series]:
    def values(spread: Spread | None) -> tuple[float, ...]:
        return () if spread is None else tuple(100 * value for value in spread.values)

    return [charts.Series(tuple(values(spread_of(arm, key)) for key in keys), arm.style) for arm in arms]


def _class_table(page: Page, arms: Sequence[Arm], names: Sequence[str]) -> Fold:
    rows = []
    for name in names:
        key = f"{page.part}/iou/{name}"
        cells = []
        for arm in arms:
            spread, gain = page.spread(arm, key), page.gain(arm, key)
            own = "absent" if spread is None else percent(spread)
            cells.append(own if gain is None else f"{own} ({points(gain.mean)})")
        rows.append(TableRow(name, tuple(cells)))
    return Fold("The numbers", (Table(OF_CLASSES, ("Class", *(arm.label for arm in arms)), tuple(rows)),))


def class_names(page: Page) -> list[str]:
    """Of all runs, in the order of the data set."""
    found: dict[str, None] = {}
    for run in page.runs:
        matrix = run.read("confusion.json") or {}
        scores = (run.result or {}).get(page.part) or {}
        listed = [name.removeprefix("iou/") for name in scores if name.startswith("iou/")]
        found |= dict.fromkeys([*matrix.get("classes", ()), *listed])
    return list(found)


def confusions(page: Page) -> Iterator[Section]:
    def panel(arm: Arm) -> Panel | None:
        matrices = [matrix for run in arm.runs if (matrix := run.read("confusion.json")) and page.part in matrix]
        names = {tuple(matrix["classes"]) for matrix in matrices}
        if len(names) != 1:
            return None
        counts = np.sum([np.asarray(matrix[page.part], dtype=np.int64) for matrix in matrices], axis=0)
        about = f"confusion matrix of {arm.label}, {len(counts)} classes; rows are the truth"
        summed = f", summed over {len(matrices)} runs" if len(matrices) > 1 else ""
        svg = drawn(charts.confusion, f"confusion{page.arms.index(arm)}", counts, *names, about)
        return Panel(f"{arm.label}: {counts.sum():,} pixels{summed}", svg)

    found = [(arm, own) for arm in page.arms if (own := panel(arm)) is not None]
    if not found:
        return
    of = PARTS.get(page.part, page.part)
    panels = tuple(own for _, own in found[:SHOWN])
    many = len(class_names(page)) > charts.NUMBERED
    shape = "full" if many else "wide"
    how = "the share (its square root, as depth of colour)" if many else "per cent"
    blocks: list[Any] = [Text(f"Of a class's pixels in the {of} (a row), {how} that was predicted as each class.")]
    blocks.append(Panels(panels[:OPEN], shape=shape))
    blocks += [Fold("More groups", (Panels(panels[OPEN:], shape=shape),))] if panels[OPEN:] else []
    blocks += not_shown([arm for arm, _ in found[SHOWN:]])
    yield Section("confusion", "What is taken for what", tuple(blocks))


def legend(arms: Sequence[Arm]) -> tuple[tuple[Markup, str], ...]:
    """Mark and label of each group; a group alone needs none."""
    return tuple((arm.mark, arm.label) for arm in arms) if len(arms) > 1 else ()


def folds(arms: Sequence[Arm], blocks_of: Callable[[Arm], Sequence[Any]], num_open: int = OPEN) -> list[Any]:
    """A fold a group that has such blocks, the first ones open; no more groups than a page can bear."""
    folds: list[Any] = []
    left = []
    for arm in arms:
        if len(folds) == SHOWN:
            left.append(arm)
        elif blocks := blocks_of(arm):
            folds.append(Fold(f"{arm.label}: {which(arm)}", tuple(blocks), len(folds) < num_open, arm.mark))
    return [*folds, *not_shown(left)]


def not_shown(arms: Sequence[Arm]) -> list[Text]:
    labels = ", ".join(arm.label for arm in arms)
    return [Text(f"Left out here, to keep the page small; name fewer runs to see more: {labels}.")] if arms else []


def leak_blocks(found: Iterable[tuple[Mapping[str, Any] | None, RunFolder]], within: Path | None = None) -> list[Any]:
    """What leaks.json says, of each run or None: a sentence for all that say the same, then the pairs of each.

    The picture of the worst pairs is taken from `within`, by default the run: a page must not carry what a link in a
    stranger's folder points at.
    """
    records: dict[str, Mapping[str, Any]] = {}
    runs_of: dict[str, list[RunFolder]] = {}
    for record, run in found:
        words = sentence(record)
        records.setdefault(words, record or {})
        runs_of.setdefault(words, []).append(run)
    told = [Text(f"{f'{len(runs)} runs: ' if len(runs) > 1 else ''}{words}") for words, runs in runs_of.items()]
    pairs = [_leaking_pairs(record.get("leaks", ()), runs_of[words], within) for words, record in records.items()]
    return [*told, *(block for blocks in pairs for block in blocks)]


def _leaking_pairs(
    pairs: Sequence[Mapping[str, Any]], runs: Sequence[RunFolder], within: Path | None
) -> Iterator[Fold | Gallery]:
    if not pairs:
        return
    rows = tuple(_leak_row(pair) for pair in pairs[:PAIRS])
    caption = f"The worst {len(rows)} of {count_of(len(pairs), 'pair')}."
    yield Fold("The pairs", (Table(caption, ("Trained on", "Scored", "Kind", "How", "Allowed"), rows, words=True),))
    sheets = [path for run in runs if is_own(path := run.folder / "leaks.png", within or run.folder)]
    if sheets:
        yield Gallery((shot(sheets[0], "The worst pairs side by side."),), wide=True)


def _leak_row(pair: Mapping[str, Any]) -> TableRow:
    trained, scored = (f"{pair[part]}: {pair[name]}" for part, name in (("part", "name"), ("scored_part", "scored")))
    return TableRow(trained, (scored, pair["kind"], pair["detail"], "yes" if pair["allowed"] else "no"))


def learning(page: StudyPage) -> Iterator[Section]:
    axis = _numeric_axis(page.found)
    if axis is None:
        yield from _dots(page)
        return
    scores = _learning_panels(page, axis, page.sides, page.score, f"{page.found.part} mIoU, %")
    gains = _learning_panels(page, axis, page.rivals, page.gain, f"{page.over}, points of mIoU", zero=True)
    if scores:
        note = (
            f"Lines are means over seeds, bands their {page.level} intervals (Student, from {MIN_PAIRS} runs on), "
            "small dots single runs, or single pairs of a gain."
        )
        # Gains beside scores; where each has several panels, such as a short and a long budget, those of a kind.
        rows = [scores + gains] if len(scores) == 1 else [scores, gains]
        blocks = [Panels(own, legend_of(page.sides) if own is rows[0] else (), shape="wide") for own in rows]
        yield Section("learning", "Learning curves", (Text(note), *blocks))


def _numeric_axis(found: Findings) -> str | None:
    """The axis with most values among those with numbers, the first of equals."""
    numeric = {
        key: len(values)
        for key, values in found.axes.items()
        if len(values) > 1 and all(_number(value) is not None for value in values)
    }
    return max(numeric, key=numeric.__getitem__) if numeric else None


def _number(text: str) -> float | None:
    with suppress(ValueError):
        number = float(text)
        return number if math.isfinite(number) else None
    return None


def _learning_panels(
    page: StudyPage,
    axis: str,
    sides: Sequence[Side],
    spread_of: Callable[[Side, Condition], Spread | None],
    what: str,
    zero: bool = False,
) -> tuple[Panel, ...]:
    """Figures over the axis, one for each choice of the other keys, all of one height."""
    others = {key: values for key, values in page.found.axes.items() if key != axis}
    lines: dict[Condition, list[charts.Band]] = {}
    for values in product(*others.values()):
        held = tuple(zip(others, values, strict=True))
        own = [condition for condition in page.found.conditions if {*held} <= {*condition} and axis in dict(condition)]
        at = sorted((_number(dict(condition)[axis]), condition) for condition in own)
        bands = [_band(page, side, [(place, spread_of(side, condition)) for place, condition in at]) for side in sides]
        lines |= {held: bands} if any(any(band.values) for band in bands) else {}
    every = [number for bands in lines.values() for band in bands for number in _numbers(band)]
    panels = []
    for number, (held, bands) in enumerate(lines.items()):
        title = f"{results.condition_text(held)}: {what}" if held else what
        about = f"{title} over {axis} for {', '.join(side.label for side in sides)}; the gain table has numbers"
        places = bands[0].places
        by_logarithm = places[0] > 0 and places[-1] >= LOGARITHM_FROM * places[0]
        reach = (min([*every, 0.0] if zero else every), max([*every, 0.0] if zero else every))
        name = f"{'gains' if zero else 'scores'}{number}"
        panels.append(Panel(title, drawn(charts.bands, name, bands, axis, about, reach, by_logarithm, zero)))
    return tuple(panels)


def _band(page: StudyPage, side: Side, at: Sequence[tuple[float, Spread | None]]) -> charts.Band:
    values = [() if spread is None else _hundredths(spread) for _, spread in at]
    tested = [() if spread is None else _hundredths(Spread(independent(spread))) for _, spread in at]
    # Of two values it would reach so far that nothing else could be seen.
    intervals = [t_interval(own, page.found.record["level"]) if len(own) >= MIN_PAIRS else None for own in tested]
    return charts.Band(
        tuple(place for place, _ in at),
        tuple(values),
        tuple(None if own is None else (own.low, own.high) for own in intervals),
        side.style,
    )


def _numbers(band: charts.Band) -> Iterator[float]:
    """All that the figure of a band has to hold."""
    for values, interval in zip(band.values, band.intervals, strict=True):
        yield from values
        yield from interval or ()


def _hundredths(spread: Spread) -> tuple[float, ...]:
    return tuple(100 * value for value in spread.values)


def _dots(page: StudyPage) -> Iterator[Section]:
    """Where no axis has numbers: every run, and every pair, as a dot."""
    figures = []
    several = len(page.found.conditions) > 1
    at = list(product(page.found.conditions, page.sides))
    scores = [(*own, spread) for own in at if (spread := page.score(own[1], own[0])) is not None]
    if scores:
        rows = [_row(condition, side, spread, percent(spread), several) for condition, side, spread in scores]
        about = f"{page.found.part} mIoU of every run; the gain table has the means"
        svg = drawn(charts.dots, "scores", rows, f"{page.found.part} mIoU, %", about)
        figures.append(Panel("Every run is a dot, the stroke is the mean.", svg))
    gains = [(*own, gain) for own in at if (gain := page.gain(own[1], own[0])) is not None]
    if gains:
        rows = [_row(condition, side, gain, points(gain.mean), several) for condition, side, gain in gains]
        about = f"every paired {page.over}; the gain table has the means"
        svg = drawn(charts.dots, "gains", rows, f"{page.over}, points of mIoU", about, zero=True)
        figures.append(Panel(f"Every pair is a dot: a run minus {page.found.baseline} with its seed.", svg))
    if figures:
        yield Section("scores", "Scores", (Panels(tuple(figures), shape="wide"),))


def _row(condition: Condition, side: Side, spread: Spread, note: str, is_one_of_many: bool) -> charts.Row:
    at = f" ({results.condition_text(condition)})" if is_one_of_many else ""
    return charts.Row(f"{side.label}{at}", _hundredths(spread), side.style, note)


def study_classes(page: StudyPage) -> Iterator[Section]:
    found = page.found
    if not found.class_gains:
        return
    keys = tuple(dict.fromkeys(gain.score for gain in found.class_gains))
    by_place = {(gain.arm, gain.score, gain.condition): gain for gain in found.class_gains}
    gains = {
        side: [[by_place.get((side.label, key, condition)) for condition in found.conditions] for key in keys]
        for side in page.rivals
    }
    names = [key.partition("/iou/")[2] for key in keys]
    is_single = len(found.conditions) == 1
    share = 100 * (1 - found.record["level"])
    note = (
        f"Every class is a comparison of its own, {len(found.class_gains)} in all, and none is corrected for the "
        f"others: where pretraining does nothing, {share:g} in 100 lie apart from 0 by chance."
    )
    bold = "" if is_single else f" Bold: the {page.level} interval (Student) of {MIN_PAIRS} pairs or more leaves 0 out."
    figure = _class_dots(page, names, gains) if is_single else _class_maps(page, names, gains)
    tables = tuple(_study_class_table(page, side, names, own) for side, own in gains.items())
    yield Section("classes", "Gains of the classes", (Text(note + bold), figure, Fold("The numbers", tables)))


def _class_dots(page: StudyPage, names: Sequence[str], gains: Mapping[Side, ClassGains]) -> Panels:
    series = [charts.Series(tuple(_ends(gain) for (gain,) in own), side.style) for side, own in gains.items()]
    about = f"{page.over} of the classes {', '.join(names)}; the table below has the numbers"
    svg = drawn(charts.classes, "classes", names, series, f"{page.over}, points of IoU", about, zero=True)
    return Panels((Panel(f"Mean gain, and its {page.level} interval.", svg),), legend_of(page.rivals), shape="wide")


def _class_maps(page: StudyPage, names: Sequence[str], gains: Mapping[Side, ClassGains]) -> Panels:
    largest = 100 * max(abs(gain.gains.mean) for gain in page.found.class_gains)
    axis = ", ".join(page.found.axes)
    maps = []
    for number, (side, own) in enumerate(gains.items()):
        cells = [[_change(gain) for gain in row] for row in own]
        about = f"{page.over} of each class for {side.label}; the tables below have the numbers"
        svg = drawn(charts.changes, f"classes{number}", names, _heads(page.found), cells, axis, about, largest)
        maps.append(Panel(f"{side.label}: {page.over}, points of IoU.", svg))
    return Panels(tuple(maps), shape="wide")


def _ends(gain: Gain | None) -> tuple[float, ...]:
    """The ends of an interval, whose middle is the mean; that alone of pairs too few for one that is of use."""
    if gain is None:
        return ()
    few = gain.gains.n < MIN_PAIRS
    ends = (gain.gains.mean,) if few else (_deciding(gain).low, _deciding(gain).high)
    return tuple(100 * end for end in ends)


def _change(gain: Gain | None) -> charts.Change | None:
    if gain is None:
        return None
    is_sure = gain.gains.n >= MIN_PAIRS and not _deciding(gain).low <= 0 <= _deciding(gain).high
    return charts.Change(100 * gain.gains.mean, is_sure)


def _study_class_table(page: StudyPage, side: Side, names: Sequence[str], gains: ClassGains) -> Table:
    rows = [TableRow(name, tuple(map(_class_cell, own))) for name, own in zip(names, gains, strict=True)]
    under = f" Under each {', '.join(page.found.axes)}." if page.found.axes else ""
    caption = f"{side.label}: {page.over} in points of IoU, with its {page.level} interval (Student).{under}"
    return Table(caption, ("Class", *_heads(page.found)), tuple(rows))


def _heads(found: Findings) -> list[str]:
    """Of a column a condition: its values alone; the gain where there is but one condition."""
    return [", ".join(value for _, value in condition) or "Gain" for condition in found.conditions]


def _class_cell(gain: Gain | None) -> str:
    if gain is None:
        return NOTHING
    interval = _deciding(gain)
    return points(gain.gains.mean) if interval is None else f"{points(gain.gains.mean)} ({between(interval)})"


def _deciding(gain: Gain) -> Interval | None:
    """The interval by which a gain is told: over pretrainings where pairs share enough of them, else over pairs."""
    return gain.interval if gain.over_starts is None else gain.over_starts

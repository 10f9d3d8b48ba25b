"""The figures of a study's page: learning curves or dots, and the gains of the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product

from ssl_seg.evidence import results
from ssl_seg.evidence.claims import MIN_PAIRS, NOTHING, between, percent, points
from ssl_seg.evidence.pairs import Spread, independent
from ssl_seg.evidence.results import Condition, Findings, Gain
from ssl_seg.evidence.statistics import Interval, t_interval
from ssl_seg.figures import charts
from ssl_seg.reports.blocks import Fold, Panel, Panels, Section, Table, TableRow, Text, drawn
from ssl_seg.reports.study_page import Side, StudyPage, legend_of

LOGARITHM_FROM = 4  # ratio of largest to smallest value of an axis
ClassGains = Sequence[Sequence[Gain | None]]  # of an arm: [class, condition]


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


def classes(page: StudyPage) -> Iterator[Section]:
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
    tables = tuple(_class_table(page, side, names, own) for side, own in gains.items())
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


def _class_table(page: StudyPage, side: Side, names: Sequence[str], gains: ClassGains) -> Table:
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

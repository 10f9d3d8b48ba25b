"""Curves over an axis of numbers on the page of a study: what more labels or steps give, and what labels are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product

from ssl_seg.evidence import label_curve
from ssl_seg.evidence.comparison import Arm, Condition, condition_text
from ssl_seg.evidence.pairs import MIN_PAIRS
from ssl_seg.evidence.results import Study
from ssl_seg.evidence.statistics import Interval, t_interval
from ssl_seg.figures import charts
from ssl_seg.reports import sections
from ssl_seg.reports.arms import Page
from ssl_seg.reports.blocks import Fold, Panel, Panels, Section, Table, TableRow, Text, drawn

LOGARITHM_FROM = 4  # ratio of largest to smallest value of an axis
OF_WORTH = (
    "What an arm scores with so many labels, {over} scores with this many more, by its means and lines between them "
    "over the logarithm of the labels; below 0 the arm costs labels. Intervals of {level}, open where {over} was not "
    "measured that far or is too flat; a dash where it was not measured on that side at all. Every row is a comparison "
    "of its own."
)
OF_AHEAD = (
    "What twice the labels give by power laws, with intervals of {level}, and how many more than measured the next "
    f"round score takes. No curve is followed beyond {label_curve.REACH} times the most labels."
)
OF_ARROWS = (
    "The arrow leads from an arm to where the baseline scores as much; the bar behind it is the interval of its tip, "
    "open where it ends at the edge. Dotted, with faint bands: what lies ahead by power laws."
)
Values = tuple[tuple[float, ...], Interval | None]  # what is drawn as dots, and the interval of their mean


def learning(page: Page[Study]) -> Iterator[Section]:
    study, axis = page.found, _numeric_axis(page.found)
    if axis is None:
        if panels := sections.dots(page):
            yield Section("scores", "Scores", (Panels(panels, shape="wide"),))
        return
    scored = {
        (arm, condition): (spread.values, t_interval(spread.values, study.level))
        for arm, condition in product(study.arms, study.conditions)
        if (spread := arm.spread(study.main_score, condition)) is not None
    }
    gained = {(gain.arm, gain.condition): (gain.values, gain.interval) for gain in study.gains}
    scores = _learning_panels(page, axis, study.arms, scored, f"{study.part} mIoU, %")
    gains = _learning_panels(page, axis, study.arms[1:], gained, f"{page.over}, points of mIoU", zero=True)
    if scores:
        note = (
            f"Lines are means over seeds, bands their {page.level} intervals (Student, from {MIN_PAIRS} runs on), "
            "small dots single runs, or single pairs of a gain."
        )
        # Gains beside scores; where each has several panels, such as a short and a long budget, those of a kind.
        rows = [scores + gains] if len(scores) == 1 else [scores, gains]
        blocks = [Panels(own, page.legend(study.arms) if own is rows[0] else (), shape="wide") for own in rows]
        yield Section("learning", "Learning curves", (Text(note), *blocks))


def labels(page: Page[Study]) -> Iterator[Section]:
    """What labelled images are worth, where a study has numbers of them."""
    study = page.found
    told = label_curve.sentence(study)
    if not told:
        return
    found = {(own.arm, own.held): own for own in label_curve.curves(study)}
    listed = label_curve.worths(study)
    others = [key for key in study.axes if key != label_curve.AXIS]
    panels = [_equivalent(page, number, own, found) for number, own in enumerate(listed[: sections.SHOWN])]
    worth_rows = [_worth_row(page, own, count) for own in listed for count in own.counts]
    ahead_rows = [_ahead_row(page, own) for own in found.values() if own.can_look_ahead]
    columns = ("Arm", *others, "Labels", "Independent pairs", "Worth, labels", "Interval")
    tables = [Table(OF_WORTH.format(over=study.over, level=page.level), columns, tuple(worth_rows))] * bool(worth_rows)
    columns = ("Arm", *others, "Labels", "mIoU, %", "Interval", "Next mIoU, %", "Labels more", "Interval")
    tables += [Table(OF_AHEAD.format(level=page.level), columns, tuple(ahead_rows))] * bool(ahead_rows)
    figures = [Panels(tuple(panels), page.legend(study.arms), shape="wide"), Text(OF_ARROWS)] * bool(panels)
    folds = [Fold("The numbers", tuple(tables))] * bool(tables)
    yield Section("labels", "What labelled images are worth", (Text(told), *figures, *folds))


def _equivalent(
    page: Page[Study],
    number: int,
    worth: label_curve.Worth,
    curves: Mapping[tuple[Arm, Condition], label_curve.LabelCurve],
) -> Panel:
    """The curves of an arm and of its baseline with what lies ahead, and the arrow from the one to the other."""
    study, at = page.found, worth.told_at
    sides = [curves[arm, worth.held] for arm in (study.baselines[worth.arm], worth.arm) if (arm, worth.held) in curves]
    bands = [_label_band(page, own) for own in sides]
    own = worth.at(at)
    height = 100 * float(worth.own[:, worth.counts.index(at)].mean())
    tip, low, high = (at + more for more in (own.middle, own.low, own.high))
    arrow = charts.Arrow(height, at, tip, low, high, page.styles[worth.arm])
    every = [height, *(number for band in bands for number in _numbers(band))]
    under = f" ({condition_text(worth.held)})" if worth.held else ""
    axis = label_curve.AXIS
    about = f"{study.part} mIoU over {axis} for {study.over} and {worth.arm.label}{under}; the tables have numbers"
    svg = drawn(
        charts.bands, f"labels{number}", bands, axis, about, (min(every), max(every)), by_logarithm=True, arrow=arrow
    )
    return Panel(f"{worth.arm.label}{under}: {study.part} mIoU, %, and its equivalent at {at}.", svg)


def _label_band(page: Page[Study], curve: label_curve.LabelCurve) -> charts.Band:
    columns = [tuple(own) for own in curve.values.T.tolist()]
    band = _band(
        page.styles[curve.arm],
        [(float(count), own, t_interval(own, curve.level)) for count, own in zip(curve.counts, columns, strict=True)],
    )
    if not curve.can_look_ahead:
        return band
    at = [float(curve.counts[-1] * times) for times in (1, 2, label_curve.REACH)]
    return replace(band, ahead=tuple(zip(at, *(100 * curve.ahead(at)).tolist(), strict=True)))


def _worth_row(page: Page[Study], worth: label_curve.Worth, count: int) -> TableRow:
    own = worth.at(count)
    middle, interval = label_curve.in_words(own.middle, worth, count), label_curve.between(own, worth, count)
    cells = (*dict(worth.held).values(), f"{count:,}", str(len(worth.own)), middle, interval)
    return TableRow(worth.arm.label, cells, page.marks[worth.arm])


def _ahead_row(page: Page[Study], curve: label_curve.LabelCurve) -> TableRow:
    most, needs = curve.counts[-1], curve.needs
    low, middle, high = (100 * curve.ahead((2 * most,))[:, 0]).tolist()
    cells = [*dict(curve.held).values(), f"{2 * most:,}", f"{middle:.1f}", f"{low:.1f} to {high:.1f}"]
    cells += [f"{100 * curve.next_score:.0f}", label_curve.needed_in_words(needs.middle, curve)]
    cells += [" to ".join(dict.fromkeys(label_curve.needed_in_words(end, curve) for end in (needs.low, needs.high)))]
    return TableRow(curve.arm.label, tuple(cells), page.marks[curve.arm])


def _numeric_axis(study: Study) -> str | None:
    """The axis with most values among those with numbers, the first of equals."""
    numeric = {
        key: len(values)
        for key, values in study.axes.items()
        if len(values) > 1 and all(_number(value) is not None for value in values)
    }
    return max(numeric, key=numeric.__getitem__) if numeric else None


def _number(text: str) -> float | None:
    with suppress(ValueError):
        number = float(text)
        return number if math.isfinite(number) else None
    return None


def _learning_panels(
    page: Page[Study],
    axis: str,
    arms: Sequence[Arm],
    drawn_at: Mapping[tuple[Arm, Condition], Values],
    what: str,
    zero: bool = False,
) -> tuple[Panel, ...]:
    """Figures over the axis, one for each choice of the other keys, all of one height."""
    others = {key: values for key, values in page.found.axes.items() if key != axis}
    lines: dict[Condition, list[charts.Band]] = {}
    for values in product(*others.values()):
        held = tuple(zip(others, values, strict=True))
        own = [condition for condition in page.found.conditions if {*held} <= {*condition} and axis in dict(condition)]
        numbers = [(_number(dict(condition)[axis]), condition) for condition in own]
        at = sorted((number, condition) for number, condition in numbers if number is not None)
        bands = [
            _band(page.styles[arm], [(place, *drawn_at.get((arm, own), ((), None))) for place, own in at])
            for arm in arms
        ]
        lines |= {held: bands} if any(any(band.values) for band in bands) else {}
    every = [number for bands in lines.values() for band in bands for number in _numbers(band)]
    panels = []
    for number, (held, bands) in enumerate(lines.items()):
        title = f"{condition_text(held)}: {what}" if held else what
        about = f"{title} over {axis} for {', '.join(arm.label for arm in arms)}; the gain table has numbers"
        places = bands[0].places
        by_logarithm = places[0] > 0 and places[-1] >= LOGARITHM_FROM * places[0]
        reach = (min([*every, 0.0] if zero else every), max([*every, 0.0] if zero else every))
        name = f"{'gains' if zero else 'scores'}{number}"
        panels.append(Panel(title, drawn(charts.bands, name, bands, axis, about, reach, by_logarithm, zero)))
    return tuple(panels)


def _band(style: charts.Style, at: Sequence[tuple[float, tuple[float, ...], Interval | None]]) -> charts.Band:
    return charts.Band(
        tuple(place for place, *_ in at),
        tuple(sections.hundredths(values) for _, values, _ in at),
        tuple(_ends(values, interval) for _, values, interval in at),
        style,
    )


def _ends(values: Sequence[float], interval: Interval | None) -> tuple[float, float] | None:
    """In hundredths; none of two values, where it would reach so far that nothing else could be seen."""
    return None if interval is None or len(values) < MIN_PAIRS else (100 * interval.low, 100 * interval.high)


def _numbers(band: charts.Band) -> Iterator[float]:
    """All that the figure of a band has to hold."""
    for values, interval in zip(band.values, band.intervals, strict=True):
        yield from values
        yield from interval or ()
    for _, *forecast in band.ahead:
        yield from forecast

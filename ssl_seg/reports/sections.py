"""Sections, and parts of sections, that pages about runs and about studies share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_seg import calibration, files
from ssl_seg.calibration import Confidences
from ssl_seg.config import flatten
from ssl_seg.evidence.comparison import Arm, Condition, Gain, condition_text
from ssl_seg.evidence.formatting import NOTHING, average, between, count_of, duration, percent, points
from ssl_seg.evidence.pairs import MIN_PAIRS
from ssl_seg.figures import charts
from ssl_seg.leaks.record import sentence
from ssl_seg.reports.arms import Page
from ssl_seg.reports.blocks import (
    Fold,
    Gallery,
    Listing,
    Panel,
    Panels,
    Section,
    Table,
    TableRow,
    Text,
    drawn,
    shot,
)
from ssl_seg.runs.cost import Cost
from ssl_seg.runs.folder import RunFolder, as_text

OF_CLASSES = (
    "IoU in %, mean ± standard deviation, in brackets the mean paired gain over {over}. Absent: the class is neither "
    "in the truth nor in a prediction, and no part of the mIoU."
)
SHOWN = 8  # arms with pictures, matrices and config: with those of forty nobody could load the page
OPEN = 3  # of these, unfolded at first
WORST = 10  # of so many images one is marked on a map, the worst predicted
PAIRS = 20  # of leaking images that are listed
GainsOfArm = Sequence[Sequence[Gain | None]]  # [class, condition]


# ---- scores and gains ----


def gain_text(gain: Gain) -> str:
    """In points: `+1.5 ± 0.4`."""
    sd = gain.differences.sd
    return points(gain.mean) + ("" if sd is None else f" ± {100 * sd:.1f}")


def hundredths(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(100 * value for value in values)


def dots(page: Page) -> tuple[Panel, ...]:
    """Every run, and every pair, as a dot; a row an arm under each condition."""
    found = page.found

    def panel(name: str, rows: Sequence[charts.Row], axis: str, what: str, caption: str, **options: bool) -> Panel:
        about = f"{what}: " + "; ".join(f"{row.label} {row.note}" for row in rows)
        return Panel(caption, drawn(charts.dots, name, rows, axis, about, **options))

    def row(condition: Condition, arm: Arm, values: Sequence[float], note: str) -> charts.Row:
        under = f" ({condition_text(condition)})" if len(found.conditions) > 1 else ""
        return charts.Row(f"{arm.label}{under}", hundredths(values), page.styles[arm], note)

    scores = [
        row(condition, arm, spread.values, percent(spread))
        for condition in found.conditions
        for arm in page.scored
        if (spread := arm.spread(found.main_score, condition)) is not None
    ]
    gains = [row(gain.condition, gain.arm, gain.values, gain_text(gain)) for gain in found.gains]
    panels = []
    if scores:
        about = f"{found.part} mIoU of every run"
        caption = "Every run is a dot, the stroke is the mean."
        panels.append(panel("dots", scores, f"{found.part} mIoU, %", about, caption))
    if gains:
        caption = f"Every pair is a dot: a run minus the one from {found.over} with its seeds."
        axis = f"{page.over}, points of mIoU"
        panels.append(panel("gains", gains, axis, f"paired gains over {found.over}", caption, zero=True))
    return tuple(panels)


# ---- classes ----


def classes(page: Page) -> Iterator[Section]:
    """The IoU of each class and the gains in it, of arms under a single condition."""
    found, arms, names = page.found, page.scored, class_names(page)
    if not arms or not names:
        return
    keys = [f"{found.part}/iou/{name}" for name in names]
    spreads = {arm: [arm.spread(key) for key in keys] for arm in arms}
    gains = {arm: [found.gain(arm, key) for key in keys] for arm in arms}

    def series(of: Mapping[Arm, Sequence[Any]]) -> list[charts.Series]:
        """Of all arms, so that the rows of two charts are of one height."""
        values = {arm: tuple(() if one is None else hundredths(one.values) for one in own) for arm, own in of.items()}
        return [charts.Series(own, page.styles[arm]) for arm, own in values.items()]

    about = f"IoU of the classes {', '.join(names)}; the table below has the numbers"
    svg = drawn(charts.classes, "classes", names, series(spreads), f"{found.part} IoU, %", about)
    panels = [Panel("IoU of each class: mean, and a line from least to most.", svg)]
    if any(gain is not None for own in gains.values() for gain in own):
        about = f"paired gains of each class over {found.over}: {', '.join(names)}"
        axis = f"{page.over}, points of IoU"
        svg = drawn(charts.classes, "class_gains", names, series(gains), axis, about, zero=True)
        panels.append(Panel(f"The same, as paired gains over {found.over}.", svg))

    def cell(arm: Arm, index: int) -> str:
        spread, gain = spreads[arm][index], gains[arm][index]
        own = "absent" if spread is None else percent(spread)
        return own if gain is None else f"{own} ({points(gain.mean)})"

    rows = tuple(TableRow(name, tuple(cell(arm, index) for arm in arms)) for index, name in enumerate(names))
    table = Table(OF_CLASSES.format(over=found.over), ("Class", *(arm.label for arm in arms)), rows)
    blocks = (Panels(tuple(panels), page.legend(arms), shape="wide"), Fold("The numbers", (table,)))
    yield Section("classes", "Classes", blocks)


def class_names(page: Page) -> list[str]:
    """Of all runs, in the order of the data set."""
    found: dict[str, None] = {}
    for run in (run for arm in page.found.arms for run in arm.runs):
        matrix = run.read("confusion.json") or {}
        scores = (run.result or {}).get(page.found.part) or {}
        listed = [name.removeprefix("iou/") for name in scores if name.startswith("iou/")]
        found |= dict.fromkeys([*matrix.get("classes", ()), *listed])
    return list(found)


def confidences(arm: Arm, part: str, kind: str) -> Confidences:
    """Of all runs of an arm that have counted some: `plain`, or those at a temperature."""
    found = Confidences.none()
    for run in arm.runs:
        parts = (run.read(calibration.FILE) or {}).get("parts", {})
        dumped = parts.get(part, {}).get(kind)
        found = found if dumped is None else found + Confidences.load(dumped)
    return found


def class_gains(page: Page) -> Iterator[Section]:
    """The gain in each class with its interval: dots under a single condition, else a map of classes by conditions."""
    found = page.found
    if not found.class_gains:
        return
    keys = tuple(dict.fromkeys(gain.score for gain in found.class_gains))
    by_place = {(gain.arm, gain.score, *gain.conditions): gain for gain in found.class_gains}
    gains = {
        arm: [[by_place.get((arm, key, condition)) for condition in found.conditions] for key in keys]
        for arm in found.arms
        if arm in found.baselines
    }
    names = [key.partition("/iou/")[2] for key in keys]
    is_single = len(found.conditions) == 1
    note = (
        f"Every class is a comparison of its own, {len(found.class_gains)} in all, and none is corrected for the "
        f"others: where pretraining does nothing, {100 * (1 - found.level):g} in 100 lie apart from 0 by chance."
    )
    bold = "" if is_single else f" Bold: the {page.level} interval (Student) of {MIN_PAIRS} pairs or more leaves 0 out."
    figure = _class_dots(page, names, gains) if is_single else _class_maps(page, names, gains)
    tables = tuple(_class_table(page, arm, names, own) for arm, own in gains.items())
    yield Section("classes", "Gains of the classes", (Text(note + bold), figure, Fold("The numbers", tables)))


def _class_dots(page: Page, names: Sequence[str], gains: Mapping[Arm, GainsOfArm]) -> Panels:
    series = [charts.Series(tuple(_ends(gain) for (gain,) in own), page.styles[arm]) for arm, own in gains.items()]
    about = f"{page.over} of the classes {', '.join(names)}; the table below has the numbers"
    svg = drawn(charts.classes, "classes", names, series, f"{page.over}, points of IoU", about, zero=True)
    return Panels((Panel(f"Mean gain, and its {page.level} interval.", svg),), page.legend([*gains]), shape="wide")


def _class_maps(page: Page, names: Sequence[str], gains: Mapping[Arm, GainsOfArm]) -> Panels:
    largest = 100 * max(abs(gain.mean) for gain in page.found.class_gains)
    axis = ", ".join(page.found.axes)
    maps = []
    for number, (arm, own) in enumerate(gains.items()):
        cells = [[_change(gain) for gain in row] for row in own]
        about = f"{page.over} of each class for {arm.label}; the tables below have the numbers"
        svg = drawn(charts.changes, f"classes{number}", names, _heads(page), cells, axis, about, largest)
        maps.append(Panel(f"{arm.label}: {page.over}, points of IoU.", svg))
    return Panels(tuple(maps), shape="wide")


def _ends(gain: Gain | None) -> tuple[float, ...]:
    """The ends of an interval, whose middle is the mean; that alone of pairs too few for one that is of use."""
    if gain is None:
        return ()
    interval = gain.interval
    return hundredths((gain.mean,) if gain.n < MIN_PAIRS or interval is None else (interval.low, interval.high))


def _change(gain: Gain | None) -> charts.Change | None:
    if gain is None:
        return None
    interval = gain.interval
    is_sure = gain.n >= MIN_PAIRS and interval is not None and not interval.low <= 0 <= interval.high
    return charts.Change(100 * gain.mean, is_sure)


def _class_table(page: Page, arm: Arm, names: Sequence[str], gains: GainsOfArm) -> Table:
    def cell(gain: Gain | None) -> str:
        if gain is None:
            return NOTHING
        return points(gain.mean) if gain.interval is None else f"{points(gain.mean)} ({between(gain.interval)})"

    rows = [TableRow(name, tuple(map(cell, own))) for name, own in zip(names, gains, strict=True)]
    under = f" Under each {', '.join(page.found.axes)}." if page.found.axes else ""
    caption = f"{arm.label}: {page.over} in points of IoU, with its {page.level} interval (Student).{under}"
    return Table(caption, ("Class", *_heads(page)), tuple(rows))


def _heads(page: Page) -> list[str]:
    """Of a column a condition: its values alone; the gain where there is but one condition."""
    return [", ".join(value for _, value in condition) or "Gain" for condition in page.found.conditions]


# ---- leaks ----


def leaks(found: Iterable[tuple[Mapping[str, Any] | None, RunFolder]], within: Path | None = None) -> Section:
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
    return Section("leaks", "Leaks", (*told, *(block for blocks in pairs for block in blocks)))


def _leaking_pairs(
    pairs: Sequence[Mapping[str, Any]], runs: Sequence[RunFolder], within: Path | None
) -> Iterator[Fold | Gallery]:
    if not pairs:
        return
    rows = tuple(_leak_row(pair) for pair in pairs[:PAIRS])
    caption = f"The worst {len(rows)} of {count_of(len(pairs), 'pair')}."
    yield Fold("The pairs", (Table(caption, ("Trained on", "Scored", "Kind", "How", "Allowed"), rows, words=True),))
    sheets = [path for run in runs if files.lies_in(path := run.folder / "leaks.png", within or run.folder)]
    if sheets:
        yield Gallery((shot(sheets[0], "The worst pairs side by side."),), wide=True)


def _leak_row(pair: Mapping[str, Any]) -> TableRow:
    trained, scored = (f"{pair[part]}: {pair[name]}" for part, name in (("part", "name"), ("scored_part", "scored")))
    return TableRow(trained, (scored, pair["kind"], pair["detail"], "yes" if pair["allowed"] else "no"))


# ---- where images lie ----


def maps(page: Page) -> Iterator[Section]:
    """Labelled, scored and worst predicted images of a run of each arm, alike ones close together."""
    part = page.found.part
    panels = [(arm, own) for arm in page.scored if (own := _map(page, arm, part)) is not None]
    if not panels:
        return
    told = (
        "Alike images lie close together: the first two components of what an untrained encoder sees in them. Where "
        "images score badly and none is labelled, label some."
    )
    figures = tuple(panel for _, panel in panels[:SHOWN])
    left = not_shown([arm for arm, _ in panels[SHOWN:]])
    yield Section("map", "Map of the images", (Text(told), Panels(figures, shape="wide"), *left))


def _map(page: Page, arm: Arm, part: str) -> Panel | None:
    record = page.shown(arm).read("kinds.json") or {}
    places = record.get("places", {})
    if not {part, "labelled"} <= places.keys():
        return None
    points = {own: np.array([places[own]["x"], places[own]["y"]], dtype=float).T for own in (part, "labelled")}
    miou = np.array(places[part].get("miou", ()), dtype=float)  # null is nan, which is sorted last
    worst = np.argsort(miou, kind="stable")[: -(-int(np.isfinite(miou).sum()) // WORST)]
    groups = {f"worst of {part}": points[part][worst], "labelled": points["labelled"], part: points[part]}
    about = f"map of the images of {arm.label}: " + ", ".join(f"{len(own)} {name}" for name, own in groups.items())
    svg = drawn(charts.plane, f"map{page.found.arms.index(arm)}", groups, about)
    return Panel(f"{arm.label}: {page.which(arm)}. The worst tenth by mIoU stands out.", svg)


# ---- cost, config and versions ----


def mean_costs(costs: Sequence[Cost]) -> tuple[str, str, str]:
    """Time, images a second and peak memory, as means over runs."""
    return (
        average([cost.seconds for cost in costs], duration),
        average([cost.rate for cost in costs], lambda number: f"{number:.1f}"),
        average([cost.peak_memory_mib for cost in costs], lambda number: f"{number:,.0f} MiB"),
    )


def set_up(facts: Iterable[tuple[str, str]], config: Mapping[str, Any]) -> tuple[Table, Fold]:
    """Facts that are known, a row each, and every key of a config."""
    rows = tuple(TableRow(name, (value,)) for name, value in facts if value)
    listing = "\n".join(f"{key}: {as_text(value)}" for key, value in flatten(config).items())
    return Table("", ("", ""), rows, words=True), Fold("Config", (Listing(listing),))


def versions_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """With what a run or a study was made."""
    versions = record.get("versions") or {}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "Commit", str(record.get("git_commit") or "")


# ---- how much a page can bear ----


def folds(page: Page, blocks_of: Callable[[Arm], Sequence[Any]], num_open: int = OPEN) -> list[Any]:
    """A fold an arm that has such blocks, the first ones open; no more arms than a page can bear."""
    shown: list[Any] = []
    left = []
    for arm in page.found.arms:
        if len(shown) == SHOWN:
            left.append(arm)
        elif blocks := blocks_of(arm):
            shown.append(Fold(f"{arm.label}: {page.which(arm)}", tuple(blocks), len(shown) < num_open, page.marks[arm]))
    return [*shown, *not_shown(left)]


def not_shown(arms: Sequence[Arm]) -> list[Text]:
    labels = ", ".join(arm.label for arm in arms)
    return [Text(f"Left out here, to keep the page small; name fewer runs to see more: {labels}.")] if arms else []

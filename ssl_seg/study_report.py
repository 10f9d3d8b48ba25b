"""`ssl-seg report STUDY`: what a study has found, on one page.

As on the page about runs the answer comes first, in one sentence, then all it rests on, in the order of SECTIONS. A
gain, a loss and nothing to tell are drawn and told alike, and of several arms and conditions none is picked out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ssl_seg import evidence, files, findings, plots
from ssl_seg.answers import MIN_PAIRS, NOTHING, RULES, Answer, count_of, percent, points
from ssl_seg.config import UserError, flatten
from ssl_seg.evidence import Interval, t_interval
from ssl_seg.findings import CELLS, PRETRAINED, SEARCHED, STUDY_FILE, Condition, Findings, Gain
from ssl_seg.page import (
    Fold,
    Front,
    Gallery,
    Listing,
    Panel,
    Panels,
    Section,
    Table,
    TableRow,
    Text,
    drawn,
    is_own,
    leak_blocks,
    render,
    shot,
)
from ssl_seg.pairs import Spread, independent
from ssl_seg.plots import Style
from ssl_seg.report import Cost, Report, cost_of, duration
from ssl_seg.runs import RunFolder, as_text, is_held
from ssl_seg.study_answers import (
    OF_CONDITIONS,
    answer,
    of_shared_starts,
    state_of,
    states,
)
from ssl_seg.tracking.record import read_record

CHANGED = "changed"  # the folder of pictures of images that changed most
PICTURES = 8  # of them at most: a page is looked at, and sent by mail
FEW_CELLS = 12  # up to which their table is unfolded at first
LOGARITHM_FROM = 4  # ratio of largest to smallest value of an axis
OF_GAINS = (
    "Means ± standard deviation over pairs, mIoU in %, gains in points, with {level} intervals of the mean gain. Over "
    "seeds: with other labelled images, orders and first weights. Over images: with other images like the scored ones, "
    "and the runs as they are."
)

ClassGains = Sequence[Sequence[Gain | None]]  # of an arm: [class, condition]


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


def is_study(folder: str | Path) -> bool:
    return (Path(folder) / STUDY_FILE).is_file()


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Write the page about a study, whose folder is named alone. Raises UserError as `findings.read` and `write`."""
    if len(folders) > 1:
        study = next(folder for folder in folders if is_study(folder))
        raise UserError(f"{study}: is a study, which has a page of its own; name it alone")
    return write(findings.read(folders[0]), out)


def write(found: Findings, out: str | Path | None = None) -> Report:
    """Write the page, by default STUDY/report.html.

    Raises UserError for a damaged file of a run, runs that were scored on different images, and a page that cannot be
    written.
    """
    path = Path(out) if out is not None else found.folder / "report.html"
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name the file to write, such as {path / 'report.html'}")
    page = make_page(found, path.parent)
    told = answer(found)
    sections = [section for build in SECTIONS for section in build(page)]
    files.write_atomic(path, render(_front(page, told), sections))
    return Report(path, told.headline)


def make_page(found: Findings, place: Path) -> StudyPage:
    looks = plots.styles([arm == found.baseline for arm in found.arms])
    sides = (
        Side(arm, style, Markup(plots.swatch(style)), found.is_pretrained(arm))
        for arm, style in zip(found.arms, looks, strict=True)
    )
    return StudyPage(found, tuple(sides), place)


def _front(page: StudyPage, told: Answer) -> Front:
    found = page.found
    seeds = count_of(len(found.record["seeds"]), "seed")
    conditions = f"{len(found.conditions)} conditions, " if len(found.conditions) > 1 else ""
    counts = f"study: {count_of(len(found.arms), 'arm')}, {conditions}{seeds}, {count_of(len(found.cells), 'cell')}"
    missing = Counter(state_of(cell) for cell in found.cells if not cell.scores)
    unfinished = [(count_of(count, "cell"), state) for state, count in missing.items()]
    status = _status(found)
    unfinished += [("the study", status)] if status not in ("finished", "failed") else []
    marks = {side.label: side.mark for side in page.sides}
    rules = (OF_CONDITIONS, *RULES) if len(found.conditions) > 1 else RULES
    return Front(found.name, counts, told, marks, tuple(unfinished), rules)


def _status(found: Findings) -> str:
    """As it says itself; one whose process is gone without a word was killed."""
    status = str(found.record.get("status", "finished"))
    return "killed" if status == "running" and not is_held(found.folder) else status


# ---- the sections, in their order ----


def _gains(page: StudyPage) -> Iterator[Section]:
    found = page.found
    if not found.gains:
        return
    axes = list(found.axes)
    columns = ["Arm", *axes, f"{found.baseline}, %", "Arm, %", "Pairs", "Gain, points"]
    columns += ["Over seeds (t)", "Over seeds (bootstrap\N{NON-BREAKING HYPHEN}t)", "Over images"]
    columns += ["Exact p (Holm)", "Starts"]
    columns += ["Over starts (t)"] * _has_starts(found)
    rows = [_gain_row(page, gain) for gain in found.gains]
    blocks: list[Any] = [Table(OF_GAINS.format(level=page.level), tuple(columns), tuple(rows))]
    blocks += [Text(" ".join(_on_gains(page)))]
    yield Section("gains", "Gains", tuple(blocks))


def _gain_row(page: StudyPage, gain: Gain) -> TableRow:
    side = next(side for side in page.sides if side.label == gain.arm)
    condition = dict(gain.condition)
    spread = "" if gain.gains.sd is None else f" ± {100 * gain.gains.sd:.1f}"
    cells = [condition.get(key, NOTHING) for key in page.found.axes]
    cells += [percent(gain.baseline), percent(gain.own), str(gain.gains.n), f"{points(gain.gains.mean)}{spread}"]
    cells += [_span(interval) for interval in (gain.interval, gain.bootstrap, gain.images)]
    cells += [NOTHING if gain.p is None else f"{gain.p:.3f} ({gain.p_holm:.3f})"]
    cells += [str(gain.num_starts) if side.is_pretrained else NOTHING]
    cells += [_span(gain.over_starts)] * _has_starts(page.found)
    return TableRow(gain.arm, tuple(cells), side.mark)


def _has_starts(found: Findings) -> bool:
    """Whether pairs share pretrainings, and these are enough for an interval of their own."""
    return any(gain.over_starts is not None for gain in found.gains)


def _span(interval: Interval | None) -> str:
    """In points: `+0.4 to +2.8`."""
    return NOTHING if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def _on_gains(page: StudyPage) -> Iterator[str]:
    """What is to be known of the table, and why figures are missing where they are."""
    gains = page.found.gains
    with_p = [gain for gain in gains if gain.p is not None]
    if with_p:
        yield f"In brackets p is corrected for the {count_of(len(with_p), 'comparison')} that have an exact one (Holm)."
    if any(gain.gains.n < evidence.MIN_FLIPS for gain in gains):
        yield f"An exact p is told from {evidence.MIN_FLIPS} pairs on: of fewer it could hardly be small."
    if any(gain.gains.n > evidence.MAX_FLIPS for gain in gains):
        yield f"Above {evidence.MAX_FLIPS} pairs there is no exact p: the interval by Student says the same."
    if any(gain.bootstrap is None for gain in gains):
        yield f"A bootstrap-t interval needs {evidence.MIN_RESAMPLED} pairs."
    if any(gain.interval is None for gain in gains):
        yield "An interval by Student needs 2 pairs."
    if any(gain.images is None for gain in gains):
        yield (
            f"An interval over images needs {evidence.MIN_BLOCKS} blocks of {evidence.NEIGHBOURS} neighbouring images "
            "or so, and the stored matrices of every run."
        )
    if any(side.is_pretrained for side in page.sides):
        yield "Starts: how many different pretrainings the runs of an arm began from."
    if _has_starts(page.found):
        yield "Over starts: the interval by Student of the means of the pairs that share a pretraining."
    yield from of_shared_starts(page.found)


def _learning(page: StudyPage) -> Iterator[Section]:
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
        blocks = [Panels(own, _legend(page.sides) if own is rows[0] else (), shape="wide") for own in rows]
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
    lines: dict[Condition, list[plots.Band]] = {}
    for values in product(*others.values()):
        held = tuple(zip(others, values, strict=True))
        own = [condition for condition in page.found.conditions if {*held} <= {*condition} and axis in dict(condition)]
        at = sorted((_number(dict(condition)[axis]), condition) for condition in own)
        bands = [_band(page, side, [(place, spread_of(side, condition)) for place, condition in at]) for side in sides]
        lines |= {held: bands} if any(any(band.values) for band in bands) else {}
    every = [number for bands in lines.values() for band in bands for number in _numbers(band)]
    panels = []
    for number, (held, bands) in enumerate(lines.items()):
        title = f"{findings.condition_text(held)}: {what}" if held else what
        about = f"{title} over {axis} for {', '.join(side.label for side in sides)}; the gain table has numbers"
        places = bands[0].places
        by_logarithm = places[0] > 0 and places[-1] >= LOGARITHM_FROM * places[0]
        reach = (min([*every, 0.0] if zero else every), max([*every, 0.0] if zero else every))
        name = f"{'gains' if zero else 'scores'}{number}"
        panels.append(Panel(title, drawn(plots.bands, name, bands, axis, about, reach, by_logarithm, zero)))
    return tuple(panels)


def _band(page: StudyPage, side: Side, at: Sequence[tuple[float, Spread | None]]) -> plots.Band:
    values = [() if spread is None else _hundredths(spread) for _, spread in at]
    tested = [() if spread is None else _hundredths(Spread(independent(spread))) for _, spread in at]
    # Of two values it would reach so far that nothing else could be seen.
    intervals = [t_interval(own, page.found.record["level"]) if len(own) >= MIN_PAIRS else None for own in tested]
    return plots.Band(
        tuple(place for place, _ in at),
        tuple(values),
        tuple(None if own is None else (own.low, own.high) for own in intervals),
        side.style,
    )


def _numbers(band: plots.Band) -> Iterator[float]:
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
        svg = drawn(plots.dots, "scores", rows, f"{page.found.part} mIoU, %", about)
        figures.append(Panel("Every run is a dot, the stroke is the mean.", svg))
    gains = [(*own, gain) for own in at if (gain := page.gain(own[1], own[0])) is not None]
    if gains:
        rows = [_row(condition, side, gain, points(gain.mean), several) for condition, side, gain in gains]
        about = f"every paired {page.over}; the gain table has the means"
        svg = drawn(plots.dots, "gains", rows, f"{page.over}, points of mIoU", about, zero=True)
        figures.append(Panel(f"Every pair is a dot: a run minus {page.found.baseline} with its seed.", svg))
    if figures:
        yield Section("scores", "Scores", (Panels(tuple(figures), shape="wide"),))


def _row(condition: Condition, side: Side, spread: Spread, note: str, is_one_of_many: bool) -> plots.Row:
    at = f" ({findings.condition_text(condition)})" if is_one_of_many else ""
    return plots.Row(f"{side.label}{at}", _hundredths(spread), side.style, note)


def _classes(page: StudyPage) -> Iterator[Section]:
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
    series = [plots.Series(tuple(_ends(gain) for (gain,) in own), side.style) for side, own in gains.items()]
    about = f"{page.over} of the classes {', '.join(names)}; the table below has the numbers"
    svg = drawn(plots.classes, "classes", names, series, f"{page.over}, points of IoU", about, zero=True)
    return Panels((Panel(f"Mean gain, and its {page.level} interval.", svg),), _legend(page.rivals), shape="wide")


def _class_maps(page: StudyPage, names: Sequence[str], gains: Mapping[Side, ClassGains]) -> Panels:
    largest = 100 * max(abs(gain.gains.mean) for gain in page.found.class_gains)
    axis = ", ".join(page.found.axes)
    maps = []
    for number, (side, own) in enumerate(gains.items()):
        cells = [[_change(gain) for gain in row] for row in own]
        about = f"{page.over} of each class for {side.label}; the tables below have the numbers"
        svg = drawn(plots.changes, f"classes{number}", names, _heads(page.found), cells, axis, about, largest)
        maps.append(Panel(f"{side.label}: {page.over}, points of IoU.", svg))
    return Panels(tuple(maps), shape="wide")


def _ends(gain: Gain | None) -> tuple[float, ...]:
    """The ends of an interval, whose middle is the mean; that alone of pairs too few for one that is of use."""
    if gain is None:
        return ()
    few = gain.gains.n < MIN_PAIRS
    ends = (gain.gains.mean,) if few else (_deciding(gain).low, _deciding(gain).high)
    return tuple(100 * end for end in ends)


def _change(gain: Gain | None) -> plots.Change | None:
    if gain is None:
        return None
    is_sure = gain.gains.n >= MIN_PAIRS and not _deciding(gain).low <= 0 <= _deciding(gain).high
    return plots.Change(100 * gain.gains.mean, is_sure)


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
    return points(gain.gains.mean) if interval is None else f"{points(gain.gains.mean)} ({_span(interval)})"


def _deciding(gain: Gain) -> Interval | None:
    """The interval by which a gain is told: over pretrainings where pairs share enough of them, else over pairs."""
    return gain.interval if gain.over_starts is None else gain.over_starts


def _search(page: StudyPage) -> Iterator[Section]:
    if not page.trials:
        return
    seeds = len({trial["seed"] for trial in page.trials})
    note = (
        "Chosen for each arm by itself, or what suits the baseline would win. Every value was tried with "
        f"{count_of(seeds, 'seed')} that no cell has, and scored on labelled images held out of data.labelled; neither "
        "data.val nor data.test was looked at. So every arm had the same number of trials, and more labelled images "
        "were used to choose than labels.count says."
    )
    listed = page.found.record["search"].get("chosen", ())
    chosen = {(own["arm"], _shown(own["condition"])): own["chosen"] for own in listed}
    values = list(dict.fromkeys(_shown(trial["tried"]) for trial in page.trials))
    marks = {side.label: side.mark for side in page.sides}
    rows = []
    for (arm, condition), scores in _tried(page.trials).items():
        cells = [percent(Spread(tuple(scores[value]))) if scores.get(value) else NOTHING for value in values]
        taken = chosen.get((arm, condition))
        cells += [NOTHING if taken is None else _shown(taken)]
        rows.append(TableRow(arm, (condition or NOTHING, *cells), marks.get(arm)))
    caption = "mIoU in %, mean ± standard deviation over the seeds of the search."
    table = Table(caption, ("Arm", "Under", *values, "Taken"), tuple(rows))
    yield Section("search", "The search", (Text(note), table))


def _tried(trials: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """The scores of every value that was tried, by arm and condition."""
    tried: dict[tuple[str, str], dict[str, list[float]]] = {}
    for trial in trials:
        own = tried.setdefault((trial["arm"], _shown(trial["condition"])), {})
        own.setdefault(_shown(trial["tried"]), []).extend([] if trial["miou"] is None else [trial["miou"]])
    return tried


def _shown(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={as_text(value)}" for key, value in keys.items())


def _leaks(page: StudyPage) -> Iterator[Section]:
    yield Section("leaks", "Leaks", tuple(leak_blocks(_leak_records(page), page.found.folder)))


def _leak_records(page: StudyPage) -> list[tuple[Mapping[str, Any] | None, RunFolder]]:
    """What was found, with the run that says so; the study's own where it has one."""
    found = page.found
    if found.record.get("leaks") is not None:
        return [(found.record["leaks"], RunFolder(found.folder))]
    done = [run for runs in _pretrained(page).values() for run in runs]
    runs = [*done, *(cell.run for cell in found.cells if cell.scores)]
    return [(run.read("leaks.json"), run) for run in runs] or [(None, RunFolder(found.folder))]


def _changed(page: StudyPage) -> Iterator[Section]:
    folder = page.found.folder
    pictures = [path for path in sorted((folder / CHANGED).glob("*.png")) if is_own(path, folder)]
    if pictures:
        shots = tuple(shot(path, path.stem) for path in pictures[:PICTURES])
        more = f" The first {PICTURES} of {len(pictures)}." if len(pictures) > PICTURES else ""
        note = (
            f"Images whose own mIoU differs most between {page.found.baseline} and an arm, for better or worse.{more}"
        )
        yield Section("changed", "Images that changed most", (Text(note), Gallery(shots, wide=True)))


def _missing(page: StudyPage) -> Iterator[Section]:
    places = ((PRETRAINED, page.pretrained), (SEARCHED, page.trials))
    lacking = [
        (place, own["id"], own["status"], own["message"])
        for place, listed in places
        for own in listed
        if own["status"] != "finished"
    ]
    lacking += [(CELLS, cell.id, state_of(cell), cell.message) for cell in page.found.cells if not cell.scores]
    if lacking:
        rows = [TableRow(name, (state, told), link=_link(page, place, name)) for place, name, state, told in lacking]
        note = "The command of the study makes what is missing, and nothing else."
        table = Table(note, ("Run", "State", "Message"), tuple(rows), words=True)
        yield Section("missing", "Runs without a result", (table,))


def _costs(page: StudyPage) -> Iterator[Section]:
    found = page.found
    noted = {own["id"]: own["seconds"] for own in (*found.record["cells"], *page.pretrained)}
    kinds = [(f"pretraining {name}", None, runs) for name, runs in _pretrained(page).items()]
    kinds += [
        (side.label, side.mark, [cell.run for cell in found.cells if cell.arm == side.label and cell.scores])
        for side in page.sides
    ]
    rows, every = [], []
    for label, mark, runs in kinds:
        costs = [cost_of(run) for run in runs]
        walls = [
            cost.seconds if noted[run.folder.name] is None else noted[run.folder.name]
            for run, cost in zip(runs, costs, strict=True)
        ]
        every += walls
        rows += [TableRow(label, (str(len(runs)), *_cost_cells(walls, costs)), mark)] * bool(runs)
    if page.trials:
        walls = [own["seconds"] for own in page.trials]
        every += walls
        rows.append(TableRow("search", (str(len(walls)), *_cost_cells(walls, []))))
    known = [wall for wall in every if wall is not None]
    if known:
        columns = ("Runs of", "Number", "Time of one", "of it training", "Images a second", "Peak memory", "Together")
        caption = "Means over runs. Time is that of the process from start to end; training includes evaluating."
        total = Text(f"Together {duration(sum(known))} of computing for {count_of(len(known), 'run')}.")
        yield Section("cost", "Cost", (Table(caption, columns, tuple(rows)), total))


def _pretrained(page: StudyPage) -> dict[str, list[RunFolder]]:
    """The pretrainings that have finished, by their names."""
    by_name: dict[str, list[RunFolder]] = {}
    for own in page.pretrained:
        run = RunFolder(page.found.folder / PRETRAINED / own["id"])
        if own["status"] == "finished" and (run.folder / "run.json").is_file():
            by_name.setdefault(own["arm"], []).append(run)
    return by_name


def _cost_cells(walls: Sequence[float | None], costs: Sequence[Cost]) -> list[str]:
    known = [wall for wall in walls if wall is not None]
    return [
        _average(known, duration),
        _average([cost.seconds for cost in costs], duration),
        _average([cost.rate for cost in costs], lambda number: f"{number:.1f}"),
        _average([cost.peak_memory_mib for cost in costs], lambda number: f"{number:,.0f} MiB"),
        duration(sum(known)) if known else NOTHING,
    ]


def _average(values: Iterable[float | None], shown: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return shown(mean(known)) if known else NOTHING


def _cells(page: StudyPage) -> Iterator[Section]:
    table = _cell_table(page)
    folds = [Fold(f"All {count_of(len(table.rows), 'cell')}", (table,), is_open=len(table.rows) <= FEW_CELLS)]
    for place, title, listed in (
        (PRETRAINED, "Pretrainings", page.pretrained),
        (SEARCHED, "Runs of the search", page.trials),
    ):
        rows = tuple(TableRow(own["id"], (own["status"],), link=_link(page, place, own["id"])) for own in listed)
        folds += [Fold(title, (Table("", ("Run", "State"), rows, words=True),))] * bool(rows)
    yield Section("cells", "Cells", tuple(folds))


def _cell_table(page: StudyPage) -> Table:
    found = page.found
    noted = {own["id"]: own["seconds"] for own in found.record["cells"]}
    ids = {cell.id: _mlflow(cell.run) for cell in found.cells}
    tracked = any(ids.values())
    rows = []
    for cell in found.cells:
        score, seconds = cell.scores.get(found.main_score), noted[cell.id]
        values = dict(cell.condition)
        cells = [cell.arm, *(values.get(key, NOTHING) for key in found.axes), str(cell.seed), state_of(cell)]
        cells += [NOTHING if score is None else f"{100 * score:.1f}", NOTHING if seconds is None else duration(seconds)]
        cells += [ids[cell.id] or NOTHING] * tracked
        rows.append(TableRow(cell.id, tuple(cells), link=_link(page, CELLS, cell.id)))
    columns = ["Cell", "Arm", *found.axes, "Seed", "State", f"{found.part} mIoU, %", "Time"]
    columns += ["MLflow run"] * tracked
    return Table("Links lead to a run's folder, or to its own report.", tuple(columns), tuple(rows))


def _link(page: StudyPage, place: str, name: str) -> str | None:
    """Relative, so that the study's folder can be moved whole: to a run's page or its folder; None before it began."""
    folder = page.found.folder / place / name
    if not folder.is_dir():
        return None
    start = os.path.relpath(page.found.folder, page.place)
    path = Path(start) / place / name
    return quote(path.as_posix()) + ("/report.html" if (folder / "report.html").is_file() else "/")


def _mlflow(run: RunFolder) -> str:
    """Its id at the tracking servers; '' where it was not tracked."""
    with suppress(UserError):
        return ", ".join(dict.fromkeys(read_record(run.folder).runs.values()))
    return ""


def _set_up(page: StudyPage) -> Iterator[Section]:
    record = page.found.record
    versions = record.get("versions", {})
    facts = {
        "Folder": str(page.found.folder),
        "Command": str(record.get("command") or ""),
        "State": f"{_status(page.found)}, {states(page.found)}",
        "Started": str(record.get("started") or ""),
        "Taken up again": ", ".join(map(_when, record.get("resumed", ()))),
        "Ended": str(record.get("ended") or ""),
        "Seeds": ", ".join(str(seed) for seed in record["seeds"]),
        "Baseline": page.found.baseline,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Commit": str(record.get("git_commit") or ""),
    }
    arms = {f"Arm {arm['name']}": _shown(arm["changes"]) or "nothing changed" for arm in record["arms"]}
    rows = tuple(TableRow(name, (value,)) for name, value in {**facts, **arms}.items() if value)
    listing = "\n".join(f"{key}: {as_text(value)}" for key, value in flatten(record.get("config", {})).items())
    blocks = (Table("", ("", ""), rows, words=True), Fold("Config", (Listing(listing),)))
    yield Section("setup", "Config and versions", blocks)


def _when(resumed: Any) -> str:
    """An entry of `resumed`; the first studies wrote the time alone."""
    return str(resumed.get("started", "")) if isinstance(resumed, Mapping) else str(resumed)


def _legend(sides: Sequence[Side]) -> tuple[tuple[Markup, str], ...]:
    return tuple((side.mark, side.label) for side in sides) if len(sides) > 1 else ()


SECTIONS: tuple[Callable[[StudyPage], Iterator[Section]], ...] = (
    _gains,
    _learning,
    _classes,
    _search,
    _leaks,
    _changed,
    _missing,
    _costs,
    _cells,
    _set_up,
)

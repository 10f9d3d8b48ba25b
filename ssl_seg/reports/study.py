"""`ssl-seg report STUDY`: what a study has found, on one page.

As on the page about runs the answer comes first, in one sentence, then all it rests on, in the order of SECTIONS. A
gain, a loss and nothing to tell are drawn and told alike, and of several arms and conditions none is picked out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.evidence import label_curve, results
from ssl_seg.evidence.cautions import of_shared_starts
from ssl_seg.evidence.claims import OF_CONDITIONS, answer, rules, state_of, states
from ssl_seg.evidence.comparison import Arm, Condition, PairedGain, condition_text
from ssl_seg.evidence.formatting import NOTHING, average, between, count_of, duration, p_as_number, percent
from ssl_seg.evidence.pairs import MIN_PAIRS, Spread
from ssl_seg.evidence.results import CELLS, PRETRAINED, SEARCHED, STUDY_FILE, Study
from ssl_seg.evidence.statistics import (
    MAX_FLIPS,
    MIN_BLOCKS,
    MIN_FLIPS,
    MIN_RESAMPLED,
    NEIGHBOURS,
    Interval,
    t_interval,
)
from ssl_seg.figures import charts
from ssl_seg.reports import sections
from ssl_seg.reports.arms import Page, make_page
from ssl_seg.reports.blocks import (
    Fold,
    Front,
    Gallery,
    Panel,
    Panels,
    Report,
    Section,
    Table,
    TableRow,
    Text,
    drawn,
    place_of,
    shot,
    write,
)
from ssl_seg.reports.changed import CHANGED
from ssl_seg.runs.cost import Cost, cost_of
from ssl_seg.runs.folder import RunFolder, as_text
from ssl_seg.runs.lock import is_held
from ssl_seg.tracking.record import read_record

PICTURES = 8  # of them at most: a page is looked at, and sent by mail
FEW_CELLS = 12  # up to which their table is unfolded at first
LOGARITHM_FROM = 4  # ratio of largest to smallest value of an axis
OF_GAINS = (
    "Means ± standard deviation over pairs, mIoU in %, gains in points, with {level} intervals of the mean gain. Over "
    "seeds: with other labelled images, orders and first weights. Over images: with other images like the scored ones, "
    "and the runs as they are."
)
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
Kind = tuple[str, Markup | None, Sequence[RunFolder]]  # runs of one kind, with its label and its arm's mark


def is_study(folder: str | Path) -> bool:
    return files.is_there(Path(folder) / STUDY_FILE)


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Write the page about a study; its folder is named alone. Raises UserError as `results.read` and `write_page`."""
    if len(folders) > 1:
        study = next(folder for folder in folders if is_study(folder))
        raise UserError(f"{study}: is a study, which has a page of its own; name it alone")
    return write_page(results.read(folders[0]), out)


def write_page(study: Study, out: str | Path | None = None) -> Report:
    """Write the page, by default STUDY/report.html.

    Raises UserError for a damaged file of a run, and for a page that cannot be written.
    """
    path = place_of(out, study.folder / "report.html")
    page = make_page(study, path.parent)
    return write(path, _front(page), [section for build in SECTIONS for section in build(page)])


def _front(page: Page[Study]) -> Front:
    study = page.found
    seeds = count_of(len(study.record["seeds"]), "seed")
    conditions = f"{len(study.conditions)} conditions, " if len(study.conditions) > 1 else ""
    missing = Counter(state_of(cell) for cell in study.cells if not cell.scores)
    unfinished = [(count_of(count, "cell"), state) for state, count in missing.items()]
    status = _status(study)
    unfinished += [("the study", status)] if status not in ("finished", "failed") else []
    return Front(
        title=study.name,
        counts=f"study: {count_of(len(study.arms), 'arm')}, {conditions}{seeds}, {count_of(len(study.cells), 'cell')}",
        told=answer(study),
        marks={arm.label: mark for arm, mark in page.marks.items()},
        rules=(*[OF_CONDITIONS] * (len(study.conditions) > 1), *rules(study.level)),
        unfinished=tuple(unfinished),
    )


def _status(study: Study) -> str:
    """As it says itself; one whose process is gone without a word was killed."""
    status = str(study.record.get("status", "finished"))
    return "killed" if status == "running" and not is_held(study.folder) else status


# ---- the sections, in their order ----


def _gains(page: Page[Study]) -> Iterator[Section]:
    study = page.found
    if not study.gains:
        return
    columns = ["Arm", *study.axes, f"{study.over}, %", "Arm, %", "Pairs", "Gain, points"]
    columns += ["Over seeds (t)", "Over seeds (bootstrap\N{NON-BREAKING HYPHEN}t)", "Over images"]
    columns += ["Exact p (Holm)", "Starts"]
    columns += ["Over starts (t)"] * _has_starts(study)
    rows = [_gain_row(page, gain) for gain in study.gains]
    table = Table(OF_GAINS.format(level=page.level), tuple(columns), tuple(rows))
    yield Section("gains", "Gains", (table, Text(" ".join(_on_gains(study)))))


def _gain_row(page: Page[Study], gain: PairedGain) -> TableRow:
    study = page.found
    condition = dict(gain.condition)
    cells = [condition.get(key, NOTHING) for key in study.axes]
    cells += [percent(gain.base), percent(gain.own), str(gain.n), sections.gain_text(gain)]
    cells += [between(interval) for interval in (gain.over_seeds, gain.bootstrap, _over_images(study, gain))]
    cells += [
        NOTHING if gain.p is None or gain.p_holm is None else f"{p_as_number(gain.p)} ({p_as_number(gain.p_holm)})"
    ]
    cells += [NOTHING if gain.arm.from_scratch else str(gain.num_weights)]
    cells += [between(gain.over_starts)] * _has_starts(study)
    return TableRow(gain.arm.label, tuple(cells), page.marks[gain.arm])


def _over_images(study: Study, gain: PairedGain) -> Interval | None:
    return study.over_images(gain.arm, gain.score, gain.condition)


def _has_starts(study: Study) -> bool:
    """Whether pairs share pretrainings, and these are enough for an interval of their own."""
    return any(gain.over_starts is not None for gain in study.gains)


def _on_gains(study: Study) -> Iterator[str]:
    """What is to be known of the table, and why figures are missing where they are."""
    gains = study.gains
    numbers = [len(gain.independent) for gain in gains]
    with_p = [gain for gain in gains if gain.p is not None]
    if with_p:
        yield f"In brackets p is corrected for the {count_of(len(with_p), 'comparison')} that have an exact one (Holm)."
    if any(number < MIN_FLIPS for number in numbers):
        yield f"An exact p is told from {MIN_FLIPS} independent pairs on: of fewer it could hardly be small."
    if any(number > MAX_FLIPS for number in numbers):
        yield f"Above {MAX_FLIPS} pairs there is no exact p: the interval by Student says the same."
    if any(gain.bootstrap is None for gain in gains):
        yield f"A bootstrap-t interval needs {MIN_RESAMPLED} pairs whose gains are not mostly the same."
    if any(gain.over_seeds is None for gain in gains):
        yield "An interval by Student needs 2 pairs."
    if any(_over_images(study, gain) is None for gain in gains):
        yield (
            f"An interval over images needs {MIN_BLOCKS} blocks of {NEIGHBOURS} neighbouring images "
            "or so, and the stored matrices of every run."
        )
    yield from dict.fromkeys(f"No interval over images: {fault}." for fault in study.faults)
    if any(not arm.from_scratch for arm in study.arms):
        yield "Starts: how many different pretrainings the runs of an arm began from."
    if _has_starts(study):
        yield "Over starts: the interval by Student of the means of the pairs that share a pretraining."
    yield from of_shared_starts(study)


def _learning(page: Page[Study]) -> Iterator[Section]:
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


def _labels(page: Page[Study]) -> Iterator[Section]:
    """What labelled images are worth, where a study has numbers of them."""
    study = page.found
    told = label_curve.sentence(study)
    if not told:
        return
    curves = {(own.arm, own.held): own for own in label_curve.curves(study)}
    listed = label_curve.worths(study)
    others = [key for key in study.axes if key != label_curve.AXIS]
    panels = [_equivalent(page, number, own, curves) for number, own in enumerate(listed[: sections.SHOWN])]
    worth_rows = [_worth_row(page, own, count) for own in listed for count in own.counts]
    ahead_rows = [_ahead_row(page, own) for own in curves.values() if own.can_look_ahead]
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


def _search(page: Page[Study]) -> Iterator[Section]:
    if not page.found.trials:
        return
    seeds = len({trial["seed"] for trial in page.found.trials})
    note = (
        "Chosen for each arm by itself, or what suits the baseline would win. Every value was tried with "
        f"{count_of(seeds, 'seed')} that no cell has, and scored on labelled images held out of data.labelled; neither "
        "data.val nor data.test was looked at. So every arm had the same number of trials, and more labelled images "
        "were used to choose than labels.count says."
    )
    listed = page.found.record["search"].get("chosen", ())
    chosen = {(own["arm"], _shown(own["condition"])): own["chosen"] for own in listed}
    values = list(dict.fromkeys(_shown(trial["tried"]) for trial in page.found.trials))
    marks = {arm.label: mark for arm, mark in page.marks.items()}
    rows = []
    for (arm, condition), scores in _tried(page.found.trials).items():
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


def _leaks(page: Page[Study]) -> Iterator[Section]:
    yield sections.leaks(_leak_records(page), page.found.folder)


def _leak_records(page: Page[Study]) -> list[tuple[Mapping[str, Any] | None, RunFolder]]:
    """What was found, with the run that says so; the study's own where it has one."""
    found = page.found
    if found.record.get("leaks") is not None:
        return [(found.record["leaks"], RunFolder(found.folder))]
    done = [run for runs in _pretrained(page).values() for run in runs]
    runs = [*done, *(cell.run for cell in found.cells if cell.scores)]
    return [(run.read("leaks.json"), run) for run in runs] or [(None, RunFolder(found.folder))]


def _changed(page: Page[Study]) -> Iterator[Section]:
    folder = page.found.folder
    pictures = [path for path in sorted((folder / CHANGED).glob("*.png")) if files.lies_in(path, folder)]
    if pictures:
        shots = tuple(shot(path, path.stem) for path in pictures[:PICTURES])
        more = f" The first {PICTURES} of {len(pictures)}." if len(pictures) > PICTURES else ""
        note = (
            f"Images whose own mIoU differs most, as a mean over pairs, between {page.found.over} and an arm"
            f"{_under_last(page.found)}, for better or worse. Shown is the pair nearest to that mean.{more}"
        )
        yield Section("changed", "Images that changed most", (Text(note), Gallery(shots, wide=True)))


def _under_last(study: Study) -> str:
    """` under labels.count=40`, the condition that pictures are drawn of; nothing where there is but one."""
    return f" under {condition_text(study.conditions[-1])}" if len(study.conditions) > 1 else ""


def _missing(page: Page[Study]) -> Iterator[Section]:
    places = ((PRETRAINED, page.found.pretrained), (SEARCHED, page.found.trials))
    lacking = [
        (place, own["id"], own["status"], own["message"])
        for place, listed in places
        for own in listed
        if own["status"] != "finished"
    ]
    lacking += [(CELLS, cell.name, state_of(cell), cell.message) for cell in page.found.cells if not cell.scores]
    if lacking:
        rows = [TableRow(name, (state, told), link=_link(page, place, name)) for place, name, state, told in lacking]
        note = "The command of the study makes what is missing, and nothing else."
        table = Table(note, ("Run", "State", "Message"), tuple(rows), words=True)
        yield Section("missing", "Runs without a result", (table,))


def _costs(page: Page[Study]) -> Iterator[Section]:
    study = page.found
    noted = {own["id"]: own["seconds"] for own in (*study.record["cells"], *study.pretrained)}
    pretrained = _pretrained(page).items()
    kinds: list[Kind] = [(f"pretraining {name}", None, runs) for name, runs in pretrained]
    for arm in study.arms:
        runs = [cell.run for cell in arm.outcomes if cell.run is not None and cell.scores]
        kinds.append((arm.label, page.marks[arm], runs))
    rows, every = [], []
    for label, mark, runs in kinds:
        costs = [cost_of(run) for run in runs]
        walls = [
            cost.seconds if noted[run.folder.name] is None else noted[run.folder.name]
            for run, cost in zip(runs, costs, strict=True)
        ]
        every += walls
        rows += [TableRow(label, (str(len(runs)), *_cost_cells(walls, costs)), mark)] * bool(runs)
    if study.trials:
        walls = [own["seconds"] for own in study.trials]
        every += walls
        rows.append(TableRow("search", (str(len(walls)), *_cost_cells(walls, []))))
    known = [wall for wall in every if wall is not None]
    if known:
        columns = ("Runs of", "Number", "Time of one", "of it training", "Images a second", "Peak memory", "Together")
        caption = "Means over runs. Time is that of the process from start to end; training includes evaluating."
        total = Text(f"Together {duration(sum(known))} of computing for {count_of(len(known), 'run')}.")
        yield Section("cost", "Cost", (Table(caption, columns, tuple(rows)), total))


def _pretrained(page: Page[Study]) -> dict[str, list[RunFolder]]:
    """The pretrainings that have finished, by their names."""
    by_name: dict[str, list[RunFolder]] = {}
    for own in page.found.pretrained:
        run = RunFolder(page.found.folder / PRETRAINED / own["id"])
        if own["status"] == "finished" and (run.folder / "run.json").is_file():
            by_name.setdefault(own["arm"], []).append(run)
    return by_name


def _cost_cells(walls: Sequence[float | None], costs: Sequence[Cost]) -> list[str]:
    known = [wall for wall in walls if wall is not None]
    return [average(known, duration), *sections.mean_costs(costs), duration(sum(known)) if known else NOTHING]


def _cells(page: Page[Study]) -> Iterator[Section]:
    table = _cell_table(page)
    folds = [Fold(f"All {count_of(len(table.rows), 'cell')}", (table,), is_open=len(table.rows) <= FEW_CELLS)]
    for place, title, listed in (
        (PRETRAINED, "Pretrainings", page.found.pretrained),
        (SEARCHED, "Runs of the search", page.found.trials),
    ):
        rows = tuple(TableRow(own["id"], (own["status"],), link=_link(page, place, own["id"])) for own in listed)
        folds += [Fold(title, (Table("", ("Run", "State"), rows, words=True),))] * bool(rows)
    yield Section("cells", "Cells", tuple(folds))


def _cell_table(page: Page[Study]) -> Table:
    study = page.found
    ids = {cell.name: _mlflow(cell.run) for cell in study.cells if cell.run is not None}
    tracked = any(ids.values())
    rows = []
    for cell, own in zip(study.cells, study.record["cells"], strict=True):
        score, seconds = cell.scores.get(study.main_score or ""), own["seconds"]
        values = dict(cell.condition)
        cells = [own["arm"], *(values.get(key, NOTHING) for key in study.axes), str(own["seed"]), state_of(cell)]
        cells += [NOTHING if score is None else f"{100 * score:.1f}", NOTHING if seconds is None else duration(seconds)]
        cells += [ids.get(cell.name) or NOTHING] * tracked
        rows.append(TableRow(cell.name, tuple(cells), link=_link(page, CELLS, cell.name)))
    columns = ["Cell", "Arm", *study.axes, "Seed", "State", f"{study.part} mIoU, %", "Time"]
    columns += ["MLflow run"] * tracked
    return Table("Links lead to a run's folder, or to its own report.", tuple(columns), tuple(rows))


def _link(page: Page[Study], place: str, name: str) -> str | None:
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
        record = read_record(run.folder)
        return "" if record is None else ", ".join(dict.fromkeys(record.runs.values()))
    return ""


def _set_up(page: Page[Study]) -> Iterator[Section]:
    study, record = page.found, page.found.record
    facts = {
        "Folder": str(study.folder),
        "Command": str(record.get("command") or ""),
        "State": f"{_status(study)}, {states(study)}",
        "Started": str(record.get("started") or ""),
        "Taken up again": ", ".join(map(_when, record.get("resumed", ()))),
        "Ended": str(record.get("ended") or ""),
        "Seeds": ", ".join(str(seed) for seed in record["seeds"]),
        "Baseline": study.over,
        **dict(sections.versions_of(record)),
    }
    arms = {f"Arm {arm['name']}": _shown(arm["changes"]) or "nothing changed" for arm in record["arms"]}
    blocks = sections.set_up({**facts, **arms}.items(), record.get("config", {}))
    yield Section("setup", "Config and versions", blocks)


def _when(resumed: Any) -> str:
    """An entry of `resumed`; the first studies wrote the time alone."""
    return str(resumed.get("started", "")) if isinstance(resumed, Mapping) else str(resumed)


SECTIONS: tuple[Callable[[Page[Study]], Iterator[Section]], ...] = (
    _gains,
    _learning,
    _labels,
    sections.class_gains,
    _search,
    _leaks,
    sections.maps,
    _changed,
    _missing,
    _costs,
    _cells,
    _set_up,
)

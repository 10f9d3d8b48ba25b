"""`ssl-seg report STUDY`: what a study has found, on one page.

As on the page about runs the answer comes first, in one sentence, then all it rests on, in the order of SECTIONS. A
gain, a loss and nothing to tell are drawn and told alike, and of several arms and conditions none is picked out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.evidence import ledger, results
from ssl_seg.evidence.cautions import of_shared_starts
from ssl_seg.evidence.claims import OF_CONDITIONS, answer, rules, state_of, states
from ssl_seg.evidence.comparison import PairedGain, condition_text
from ssl_seg.evidence.formatting import NOTHING, average, begun, between, count_of, duration, p_as_number, percent
from ssl_seg.evidence.pairs import Spread
from ssl_seg.evidence.results import CELLS, FOLDS, PRETRAINED, SEARCHED, STUDY_FILE, Study
from ssl_seg.evidence.statistics import (
    MAX_FLIPS,
    MIN_BLOCKS,
    MIN_FLIPS,
    MIN_RESAMPLED,
    NEIGHBOURS,
    Interval,
)
from ssl_seg.figures import charts
from ssl_seg.reports import curves, sections
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
OF_GAINS = (
    "Means ± standard deviation over pairs, mIoU in %, gains in points, with {level} intervals of the mean gain. Over "
    "seeds: with other labelled images, orders and first weights. Over images: with other images like the scored ones, "
    "and the runs as they are."
)
OF_CONTRASTS = (
    "Named in the study's config before there was a score; p by Holm is corrected for these alone. Of several "
    "conditions a gain is the mean, seed by seed."
)
OF_SHARES = (
    "A task's share is what it adds to the tasks before it, as a mean over all orders in which they may come (Shapley "
    "1953): the shares add up to the gain of all. Alone is its gain without the others. Points of mIoU, ± standard "
    "deviation over seeds, {level} intervals of the mean. Every choice of tasks took as many steps and read as many "
    "images; where each task sees all of them (train.views: all), more tasks take longer."
)
OF_EXTRAS = (
    "How much more two tasks give beside each other than each without the other, as a mean over the tasks before them "
    "(Shapley-Taylor index, Sundararajan et al. 2020); below 0 they give the same twice. A task's share is what it "
    "gives alone and half of what each of its pairs adds."
)
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
    cells = count_of(len(study.cells), "cell") + (f" of {count_of(len(study.folds), 'fold')}" if study.folds else "")
    missing = Counter(state_of(cell) for cell in study.cells if not cell.scores)
    unfinished = [(count_of(count, "cell"), state) for state, count in missing.items()]
    status = _status(study)
    unfinished += [("the study", status)] if status not in ("finished", "failed") else []
    return Front(
        title=study.name,
        counts=f"study: {count_of(len(study.arms), 'arm')}, {conditions}{seeds}, {cells}",
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


def _primary(page: Page[Study]) -> Iterator[Section]:
    """The comparisons that were named beforehand."""
    contrasts = page.found.contrasts
    if not contrasts:
        return
    rows = []
    for own in contrasts:
        gain = own.gain
        cells = [own.found.over, "; ".join(filter(None, map(condition_text, own.found.conditions))) or NOTHING]
        if gain is None:
            cells += ["0", *[NOTHING] * 4]
        else:
            p = NOTHING if gain.p is None else p_as_number(gain.p)
            adjusted = NOTHING if own.p_holm is None else p_as_number(own.p_holm)
            cells += [str(gain.n), sections.gain_text(gain), between(gain.interval), p, adjusted]
        rows.append(TableRow(own.arm.label, tuple(cells), page.marks[own.arm]))
    columns = ("Arm", "From", "Under", "Pairs", "Gain, points", f"{page.level} interval", "Exact p", "Holm")
    yield Section("primary", "What was asked beforehand", (Table(OF_CONTRASTS, columns, tuple(rows)),))


def _gains(page: Page[Study]) -> Iterator[Section]:
    study = page.found
    if not study.gains:
        return
    columns = ["Arm", *study.axes, f"{study.over}, %", "Arm, %", "Pairs", "Gain, points"]
    columns += ["Over seeds (t)", "Over seeds (bootstrap\N{NON-BREAKING HYPHEN}t)", "Over images"]
    columns += ["Exact p (Holm)"] * (not study.contrasts) + ["Starts"]
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
    p = NOTHING if gain.p is None or gain.p_holm is None else f"{p_as_number(gain.p)} ({p_as_number(gain.p_holm)})"
    cells += [p] * (not study.contrasts)
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
    if study.folds:
        yield (
            "Every labelled image is scored once in each cell, by the run that has not learnt from it: the matrices of "
            "all folds are summed."
        )
    numbers = [len(gain.independent) for gain in gains]
    with_p = [gain for gain in gains if gain.p is not None and not study.contrasts]
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


def _ledger(page: Page[Study]) -> Iterator[Section]:
    """Which task earned what, where a study has every choice of some."""
    books = ledger.ledgers(page.found)
    if not books:
        return
    shares, extras, panels = [], [], []
    for number, book in enumerate(own for own in books if own.whole is not None):
        alone = dict(zip(book.shares, book.alone, strict=True))
        shares += [_entry_row(page, own, alone[own]) for own in book.shares]
        shares += [_entry_row(page, book.whole, book.whole, "all, less none")] if book.whole else []
        extras += [_entry_row(page, own) for own in book.extras]
        if number < sections.SHOWN:
            panels.append(_share_dots(page, number, book))
    told = [Text(f"{begun(note)}.") for book in books for note in ledger.notes(book)]
    axes, numbers = tuple(page.found.axes), ("Points", f"{page.level} interval", "Exact p (Holm)", "Seeds", "Starts")
    blocks = [Panels(tuple(panels), shape="wide")] * bool(panels)
    if shares:
        blocks += [Table(OF_SHARES.format(level=page.level), ("Task", *axes, *numbers, "Alone, points"), tuple(shares))]
        blocks += [Table(OF_EXTRAS, ("Pair", *axes, *numbers), tuple(extras))]
    yield Section("ledger", "Which task earned what", (*blocks, *told))


def _entry_row(page: Page[Study], own: ledger.Entry, alone: ledger.Entry | None = None, name: str = "") -> TableRow:
    cells = [dict(own.conditions[0]).get(key, NOTHING) for key in page.found.axes]
    cells += [sections.gain_text(own), between(own.interval)]
    cells += [NOTHING if own.p is None or own.p_holm is None else f"{p_as_number(own.p)} ({p_as_number(own.p_holm)})"]
    cells += [str(own.n), str(own.num_weights)]
    cells += [] if alone is None else [NOTHING if alone is own else sections.gain_text(alone)]
    return TableRow(name or own.name, tuple(cells), None if len(own.tasks) > 1 else page.marks[own.arm])


def _share_dots(page: Page[Study], number: int, book: ledger.Ledger) -> Panel:
    """The share of each task in every seed."""
    under = f" ({condition_text(book.condition)})" if book.condition else ""
    rows = [
        charts.Row(own.name, sections.hundredths(own.values), page.styles[own.arm], sections.gain_text(own))
        for own in book.shares
    ]
    about = f"share of each task{under}: " + "; ".join(f"{row.label} {row.note}" for row in rows)
    svg = drawn(charts.dots, f"ledger{number}", rows, "share, points of mIoU", about, zero=True)
    return Panel(f"The share of each task{under}, a dot a seed.", svg)


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
    places = ((PRETRAINED, page.found.pretrained), (SEARCHED, page.found.trials), (FOLDS, page.found.folds))
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
        (FOLDS, "Runs of folds", page.found.folds),
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
    _primary,
    _gains,
    _ledger,
    curves.learning,
    curves.labels,
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

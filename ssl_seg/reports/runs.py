"""`ssl-seg report`: what one or many runs have shown, on one page.

The answer comes first, in one sentence; then all it rests on, section by section in the order of SECTIONS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ssl_seg import files
from ssl_seg.config import UserError, flatten
from ssl_seg.evidence import compare
from ssl_seg.evidence.claims import ALPHA, MIN_PAIRS, answer
from ssl_seg.evidence.compare import Comparison
from ssl_seg.evidence.formatting import (
    NOTHING,
    PARTS,
    average,
    between,
    count_of,
    duration,
    images_of,
    percent,
    points,
    state,
    unit_of,
    with_unit,
)
from ssl_seg.evidence.pairs import Spread, independent
from ssl_seg.evidence.statistics import t_interval
from ssl_seg.figures import charts
from ssl_seg.figures.svg import to_svg, with_minus
from ssl_seg.reports.arms import Arm, Page, common_folder, make_front, make_page, which
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
    is_own,
    render,
    shot,
)
from ssl_seg.reports.sections import SHOWN, classes, confusions, curves, folds, leak_blocks, not_shown
from ssl_seg.runs.cost import cost_of, numbers_in
from ssl_seg.runs.folder import RunFolder, as_text, find_runs

ABREAST = 5  # groups that stand beside each other in a table of keys; more stand below each other
# What tables show.
OF_SCORES = "Mean ± standard deviation over the runs of a group, which differ in their seeds alone."
OF_COST = (
    "Means of a group's runs. Time is that of training and evaluating; of runs that did not note it, from start to "
    "end. Network: numbers in the exported file, weights and statistics."
)


@dataclass(frozen=True)
class Report:
    """What `report` gives back."""

    path: Path
    headline: str


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Write one page about the runs in `folders`; a folder without a run.json stands for the runs in it.

    By default RUN/report.html for one run, else report.html in the folder that holds them all. Raises UserError for
    what is no run, a damaged file of one, and a page that cannot be written.
    """
    runs = find_runs(folders)
    path = Path(out) if out is not None else default_path(runs)
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name the file to write, such as {path / 'report.html'}")
    comparison = compared(runs)
    told = answer(comparison, runs)
    page = make_page(runs, comparison)
    sections = [section for build in SECTIONS for section in build(page)]
    files.write_atomic(path, render(make_front(page, told), sections))
    return Report(path, told.headline)


def default_path(runs: Sequence[RunFolder]) -> Path:
    """Where the page about `runs` goes unless a person says otherwise."""
    if len(runs) == 1:
        return runs[0].folder / "report.html"
    return common_folder(runs) / "report.html"


def compared(runs: Sequence[RunFolder]) -> Comparison:
    """As `compare`, and without a group where no run has a result yet."""
    if any(run.is_done for run in runs):
        return compare.compare([run.folder for run in runs])
    return Comparison((), {}, tuple(str(run.folder) for run in runs))


# ---- the sections, in their order ----


def _scores(page: Page) -> Iterator[Section]:
    blocks: list[Any] = []
    segmenting = [arm for arm in page.arms if page.score is not None and page.spread(arm, page.score) is not None]
    if segmenting:
        blocks.append(_score_table(page, segmenting))
        if sum(len(arm.runs) for arm in segmenting) > 1:
            blocks.append(Panels(tuple(_score_dots(page, segmenting)), shape="wide"))
    for stage in dict.fromkeys(arm.stage for arm in page.arms if arm not in segmenting and arm.group is not None):
        blocks += _figure_table(page, [arm for arm in page.arms if arm.stage == stage and arm not in segmenting])
    blocks += [Text(f"{line[0].upper()}{line[1:]}.") for line in page.comparison.notes]
    if len(page.runs) > 1:
        blocks.append(Fold("Every single run", (_run_table(page),)))
    yield Section("scores", "Scores", tuple(blocks))


def _score_table(page: Page, arms: Sequence[Arm]) -> Table:
    parts = [part for part in PARTS if f"{part}/miou" in page.comparison.scores]
    gains = {arm.label: page.gain(arm, page.score) for arm in arms}
    columns = ["Group", "Runs"]
    columns += [f"{name}, {part}, %" for part in parts for name in ("mIoU", "Pixel accuracy")]
    told = ["Gain over scratch, points", "95 % over seeds", "Pairs"] if any(gains.values()) else []
    rows = []
    for arm in arms:
        cells = [str(len(arm.runs))]
        cells += [percent(page.spread(arm, f"{part}/{name}")) for part in parts for name in ("miou", "accuracy")]
        cells += _gain_cells(gains[arm.label]) if told else []
        rows.append(TableRow(arm.label, tuple(cells), arm.mark))
    captions = [OF_SCORES] * any(len(arm.runs) > 1 for arm in arms)
    paired = f"Gains are paired differences of {page.part} mIoU to the run from scratch with the same seeds."
    captions += [paired] * bool(told)
    return Table(" ".join(captions), tuple(columns + told), tuple(rows))


def _gain_cells(gain: Spread | None) -> list[str]:
    if gain is None:
        return [NOTHING] * 3
    spread = "" if gain.sd is None else f" ± {100 * gain.sd:.1f}"
    return [
        f"{points(gain.mean)}{spread}",
        _interval(gain),
        str(gain.n),
    ]


def _interval(gain: Spread) -> str:
    """Where the gain lies, by Student, as the sentence on top has it; of fewer pairs than it wants nothing."""
    if gain.n < MIN_PAIRS:
        return NOTHING
    return between(t_interval(independent(gain), 1 - ALPHA))


def _score_dots(page: Page, arms: Sequence[Arm]) -> Iterator[Panel]:
    def row(arm: Arm, spread: Spread, note: str) -> charts.Row:
        return charts.Row(arm.label, tuple(100 * value for value in spread.values), arm.style, note)

    spreads = [(arm, page.spread(arm, page.score)) for arm in arms]
    rows = [row(arm, spread, percent(spread)) for arm, spread in spreads]
    about = f"{page.part} mIoU of every run: " + "; ".join(f"{own.label} {own.note}" for own in rows)
    yield Panel(
        "Every run is a dot, the stroke is the mean.", drawn(charts.dots, "dots", rows, f"{page.part} mIoU, %", about)
    )
    gains = [(arm, gain) for arm in arms if (gain := page.gain(arm, page.score)) is not None]
    if gains:
        rows = [row(arm, gain, _gain_cells(gain)[0]) for arm, gain in gains]
        about = "paired gains over scratch: " + "; ".join(f"{own.label} {own.note}" for own in rows)
        svg = drawn(charts.dots, "gains", rows, "gain over scratch, points of mIoU", about, zero=True)
        yield Panel("Every pair is a dot: a run minus the one from scratch with its seeds.", svg)


def _figure_table(page: Page, arms: Sequence[Arm]) -> list[Table]:
    """What groups reach that have no mIoU: the figures of pretext tasks, a row each."""
    rows = []
    for name in page.comparison.scores:
        spreads = [page.spread(arm, name) for arm in arms]
        if any(spreads):
            cells = tuple(NOTHING if spread is None else _to_digits(spread, unit_of(name)[0]) for spread in spreads)
            rows.append(TableRow(with_unit(name.partition("/")[2]), cells))
    columns = ("Figure", *(f"{arm.label}, {count_of(len(arm.runs), 'run')}" for arm in arms))
    caption = "Pretext tasks on held-out images: mean ± standard deviation over the runs of a group."
    return [Table(caption, columns, tuple(rows))] if rows else []


def _to_digits(spread: Spread, factor: float) -> str:
    """Three digits or so of the mean, and as many places of the standard deviation."""
    scaled = Spread(tuple(factor * value for value in spread.values))
    size = abs(scaled.mean)
    digits = 0 if size == 0 else max(0, min(6, 2 - math.floor(math.log10(size))))
    return with_minus(scaled.text(digits))


def _run_table(page: Page) -> Table:
    groups = {run.folder: arm for arm in page.arms for run in arm.runs}
    scores = {outcome.name: outcome.scores for group in page.comparison.groups for outcome in group.outcomes}
    rows = []
    for run in page.runs:
        arm = groups.get(run.folder)
        score = scores.get(str(run.folder), {}).get(page.score)
        cells = (
            arm.label if arm else NOTHING,
            str(run.config.get("seed", NOTHING)),
            state(run),
            NOTHING if score is None else f"{100 * score:.1f}",
            str(run.record.get("started", NOTHING)),
        )
        rows.append(TableRow(run.name, cells, arm.mark if arm else None))
    columns = ("Run", "Group", "Seed", "State", f"{page.part} mIoU, %" if page.score else "Score", "Started")
    return Table("In the order in which they were given.", columns, tuple(rows), words=True)


def _differences(page: Page) -> Iterator[Section]:
    differing = page.comparison.differing
    if len(page.arms) < 2 or not differing:
        return
    told = {key: tuple(NOTHING if value is None else value for value in own) for key, own in differing.items()}
    labels = [arm.label for arm in page.arms]
    if len(page.arms) <= ABREAST:
        columns = ("Key", *labels)
        rows = [TableRow(key, own) for key, own in told.items()]
    else:
        columns = ("Group", *told)
        turned = zip(*told.values(), strict=True)
        rows = [TableRow(arm.label, own, arm.mark) for arm, own in zip(page.arms, turned, strict=True)]
    caption = "Config keys in which the groups differ; all others are the same, seeds aside."
    yield Section("differences", "What differs", (Table(caption, columns, tuple(rows), words=True),))


def _leaks(page: Page) -> Iterator[Section]:
    found = [(run.read("leaks.json"), run) for run in page.runs]
    yield Section("leaks", "Leaks", tuple(leak_blocks((record, run) for record, run in found if record or run.is_done)))


def _pretext(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        made = [picture for picture in arm.shown.pictures() if picture.name != "predictions"]
        found: list[Any] = []
        as_configured = [name for name in arm.shown.config.get("tasks") or () if any(own.name == name for own in made)]
        for task in dict.fromkeys([*as_configured, *(picture.name for picture in made)]):
            own = [picture for picture in made if picture.name == task]
            chosen = sorted({0, (len(own) - 1) // 2, len(own) - 1})
            shots = [shot(own[index].path, f"{task}, step {own[index].step:,}") for index in chosen]
            found.append(Gallery(tuple(shots)))
        return found

    shown = folds(page.arms, blocks)
    if shown:
        note = "The same images each time, a row each: what the task is given, what it answers, what it should answer."
        yield Section("pretext", "Pretext tasks over time", (Text(note), *shown))


def _predictions(page: Page) -> Iterator[Section]:
    def extremes(arm: Arm) -> list[Any]:
        listed = (arm.shown.read("extremes.json") or {}).get(page.part) or []
        found: list[Any] = []
        for kind in ("worst", "best"):
            own = [entry for entry in listed if entry.get("kind") == kind]
            shots = [shot(path, _extreme(entry)) for entry in own if (path := _inside(arm.shown, entry)) is not None]
            if shots:
                found += [
                    Text(f"{kind.capitalize()}: image, prediction, truth, errors."),
                    Gallery(tuple(shots), wide=True),
                ]
        return found

    blocks: list[Any] = []
    panels = [(arm, path) for arm in page.arms if (path := _panel_of(arm.shown)) is not None]
    if panels:
        shots = [shot(path, f"{arm.label} ({which(arm)})") for arm, path in panels[:SHOWN]]
        blocks += [Text("A row an image: image, prediction, truth."), Gallery(tuple(shots), wide=True)]
        blocks += not_shown([arm for arm, _ in panels[SHOWN:]])
    yield Section("predictions", "Predictions", (*blocks, *folds(page.arms, extremes)))


def _panel_of(run: RunFolder) -> Path | None:
    """The last prediction panel of a run, or that of `evaluate`."""
    panels = [picture.path for picture in run.pictures() if picture.name == "predictions"]
    scored = run.folder / "predictions.png"
    own = scored.is_file() and not scored.is_symlink()
    return panels[-1] if panels else scored if own else None


def _extreme(entry: Mapping[str, Any]) -> str:
    miou = entry.get("miou")
    score = "no score" if miou is None else f"mIoU {100 * miou:.1f} %"
    return f"{entry.get('name', '')}: {score}"


def _inside(run: RunFolder, entry: Mapping[str, Any]) -> Path | None:
    """The picture of an entry if it is one of the run's own: a page must not carry what a stranger's list points at."""
    path = run.folder / str(entry.get("picture", ""))
    return path if is_own(path, run.folder) else None


def _norm_shares(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        model = arm.shown.config.get("model")
        if not (isinstance(model, Mapping) and str(model.get("norm", "")).startswith("switch")):
            return []
        # It reads weights, so it costs the import of torch: for runs with switch norm only.
        from ssl_seg.reports.norms import draw, read_parts

        try:
            parts = read_parts(arm.shown.folder)
        except UserError as error:  # a run whose weights were cleared away still has all the rest to report
            return [Text(str(error))]
        about = f"shares of instance, layer and batch statistics in each switch norm layer of {arm.label}"
        svg = Markup(to_svg(draw(parts), f"norms{page.arms.index(arm)}", about))
        return [Panels((Panel("Shares of each layer, first layer on top.", svg),), shape="full")]

    shown = folds(page.arms, blocks, num_open=1)
    if shown:
        note = "Which statistics each switch norm layer has learnt to use; dotted: the equal shares of a new layer."
        yield Section("norms", "Norm shares", (Text(note), *shown))


def _costs(page: Page) -> Iterator[Section]:
    rows, known = [], []
    for arm in page.arms:
        costs = [cost_of(run) for run in arm.runs]
        known += [cost.seconds for cost in costs if cost.seconds is not None]
        cells = (
            average([cost.seconds for cost in costs], duration),
            average([cost.images for cost in costs], lambda number: f"{number:,.0f}"),
            average([cost.rate for cost in costs], lambda number: f"{number:.1f}"),
            average([cost.peak_memory_mib for cost in costs], lambda number: f"{number:,.0f} MiB"),
            average([numbers_in(arm.shown)], lambda number: f"{number / 1e6:.2f} M"),
        )
        rows.append(TableRow(arm.label, (str(len(arm.runs)), *cells), arm.mark))
    if not any(cell != NOTHING for row in rows for cell in row.cells[1:]):
        return
    columns = ("Group", "Runs", "Time", "Images seen", "Images a second", "Peak memory", "Network")
    blocks: list[Any] = [Table(OF_COST, columns, tuple(rows))]
    if len(known) > 1:
        blocks.append(Text(f"Together {duration(sum(known))} for {len(known)} runs."))
    yield Section("cost", "Cost", tuple(blocks))


def _set_up(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        run = arm.shown
        facts = [TableRow(name, (value,)) for name, value in _facts(run) if value]
        listing = "\n".join(f"{key}: {as_text(value)}" for key, value in flatten(run.config).items())
        return [Table("", ("", ""), tuple(facts), words=True), Fold("Config", (Listing(listing),))]

    yield Section("setup", "Config and versions", tuple(folds(page.arms, blocks, num_open=len(page.arms) == 1)))


def _facts(run: RunFolder) -> Iterator[tuple[str, str]]:
    record = run.record
    counts = images_of(run)
    yield "Folder", str(run.folder)
    yield "Command", str(record.get("command", ""))
    yield "State", state(run)
    yield "Started", str(record.get("started", ""))
    for again in record.get("resumed") or ():
        yield "Resumed", f"{again.get('at', '')} after step {again.get('after_step', '')}"
    yield "Ended", str(record.get("ended") or "")
    yield "Seed", str(record.get("seed", ""))
    yield "Device", str(record.get("device", ""))
    versions = record.get("versions") or {}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "Commit", str(record.get("git_commit") or "")
    yield "Images", ", ".join(f"{part} {count:,}" for part, count in counts.items())
    for part, receipt in (run.read("receipts.json") or {}).items():
        yield f"Loaded: {part}", _receipt_in_words(receipt)


def _receipt_in_words(receipt: Mapping[str, Any]) -> str:
    lengths = {name: len(receipt.get(name) or ()) for name in ("matched", "missing", "left_over", "mismatched")}
    counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lengths.items())
    same = {True: "; gives the exporter's features", False: "; features differ from the exporter's"}
    tail = same.get(receipt.get("features_equal"), "")
    return f"{receipt.get('share', 0):.0%} of the parameters ({counted} tensors) from {receipt.get('path', '')}{tail}"


SECTIONS: tuple[Callable[[Page], Iterator[Section]], ...] = (
    _scores,
    _differences,
    _leaks,
    curves,
    classes,
    confusions,
    _pretext,
    _predictions,
    _norm_shares,
    _costs,
    _set_up,
)

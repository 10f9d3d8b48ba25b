"""`ssl-seg report`: what one or many runs have shown, on one page.

The answer comes first, in one sentence; then all it rests on, section by section in the order of SECTIONS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ssl_seg import calibration, files
from ssl_seg.calibration import Confidences
from ssl_seg.config import UserError
from ssl_seg.evidence import compare
from ssl_seg.evidence.cautions import notes
from ssl_seg.evidence.claims import answer, rules
from ssl_seg.evidence.comparison import Arm, Comparison, Gain
from ssl_seg.evidence.formatting import (
    NOTHING,
    PARTS,
    average,
    begun,
    between,
    count_of,
    duration,
    foremost,
    images_of,
    percent,
    points,
    state,
    unit_of,
    with_unit,
)
from ssl_seg.evidence.pairs import MIN_PAIRS, Spread
from ssl_seg.figures import charts
from ssl_seg.figures.svg import to_svg, with_minus
from ssl_seg.reports import sections
from ssl_seg.reports.arms import Page, make_page
from ssl_seg.reports.blocks import (
    Fold,
    Front,
    Gallery,
    Heading,
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
from ssl_seg.runs.cost import cost_of, numbers_in
from ssl_seg.runs.folder import RunFolder, find_runs

ABREAST = 5  # arms that stand beside each other in a table of keys; more stand below each other
STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "evaluate": "Evaluation"}
SUREST = (1.0, 0.9, 0.8)  # of the pixels, in the table of errors
AFFINITY = "train/affinity/"
MACHINE = ("lr", "grad_norm", "images_per_s")  # figures of the training itself, not of what was learnt
# What tables show.
OF_SCORES = "Mean ± standard deviation over the runs of a group, which differ in their seeds alone."
OF_COST = (
    "Means of a group's runs. Time is that of training and evaluating; of runs that did not note it, from start to "
    "end. Network: numbers in the exported file, weights and statistics."
)

Metrics = Sequence[Sequence[Mapping[str, float]]]  # lines of each run of an arm


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Write one page about the runs in `folders`; a folder without a run.json stands for the runs in it.

    By default RUN/report.html for one run, else report.html in the folder that holds them all. Raises UserError for
    what is no run, a damaged file of one, and a page that cannot be written.
    """
    runs = find_runs(folders)
    path = place_of(out, default_path(runs))
    page = make_page(compared(runs), path.parent, runs)
    return write(path, _front(page), [section for build in SECTIONS for section in build(page)])


def default_path(runs: Sequence[RunFolder]) -> Path:
    """Where the page about `runs` goes unless a person says otherwise."""
    if len(runs) == 1:
        return runs[0].folder / "report.html"
    return _common_folder(runs) / "report.html"


def compared(runs: Sequence[RunFolder]) -> Comparison:
    """As `compare`, and each run alone where none has a result yet."""
    if any(run.is_done for run in runs):
        return compare.compare([run.folder for run in runs])
    return compare.ungrouped(runs)


def _front(page: Page) -> Front:
    arms, runs = page.found.arms, page.runs
    groups = f" in {len(arms)} groups" if 1 < len(arms) < len(runs) else ""
    return Front(
        title=runs[0].name if len(runs) == 1 else _common_folder(runs).name or "runs",
        counts=f"{count_of(len(runs), 'run')}{groups}",
        told=answer(page.found),
        marks={arm.label: mark for arm, mark in page.marks.items()},
        rules=rules(page.found.level),
        unfinished=tuple((run.name, state(run)) for run in runs if not run.is_done),
    )


def _common_folder(runs: Sequence[RunFolder]) -> Path:
    """The nearest folder that all of them lie in."""
    return Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))


# ---- the sections, in their order ----


def _scores(page: Page) -> Iterator[Section]:
    found, scored = page.found, page.scored
    blocks: list[Any] = []
    if scored:
        blocks.append(_score_table(page, scored))
        if sum(len(arm.runs) for arm in scored) > 1:
            blocks.append(Panels(sections.dots(page), shape="wide"))
    others = [arm for arm in found.arms if arm not in scored and any(own.is_done for own in arm.runs)]
    for stage in dict.fromkeys(arm.stage for arm in others):
        blocks += _figure_table(page, [arm for arm in others if arm.stage == stage])
    blocks += [Text(f"{line[0].upper()}{line[1:]}.") for line in notes(found)]
    if len(page.runs) > 1:
        blocks.append(Fold("Every single run", (_run_table(page),)))
    yield Section("scores", "Scores", tuple(blocks))


def _score_table(page: Page, arms: Sequence[Arm]) -> Table:
    found = page.found
    parts = [part for part in PARTS if f"{part}/miou" in found.scores]
    gains = {arm: found.gain(arm, found.main_score) for arm in arms}
    has_gains = any(gains.values())
    columns = ["Group", "Runs"]
    columns += [f"{name}, {part}, %" for part in parts for name in ("mIoU", "Pixel accuracy")]
    columns += [f"Gain over {found.over}, points", f"{page.level} over seeds", "Pairs"] * has_gains
    rows = []
    for arm in arms:
        cells = [str(len(arm.runs))]
        cells += [percent(arm.spread(f"{part}/{name}")) for part in parts for name in ("miou", "accuracy")]
        cells += _gain_cells(gains[arm]) * has_gains
        rows.append(TableRow(arm.label, tuple(cells), page.marks[arm]))
    captions = [OF_SCORES] * any(len(arm.runs) > 1 for arm in arms)
    paired = f"Gains are paired differences of {found.part} mIoU to the run from scratch with the same seeds."
    captions += [paired] * has_gains
    return Table(" ".join(captions), tuple(columns), tuple(rows))


def _gain_cells(gain: Gain | None) -> list[str]:
    """The gain, where it lies as the sentence on top has it, and the pairs; of too few pairs no interval."""
    if gain is None:
        return [NOTHING] * 3
    return [sections.gain_text(gain), between(gain.interval) if gain.n >= MIN_PAIRS else NOTHING, str(gain.n)]


def _figure_table(page: Page, arms: Sequence[Arm]) -> list[Table]:
    """What groups reach that have no mIoU: the figures of pretext tasks, a row each."""
    rows = []
    for name in page.found.scores:
        spreads = [arm.spread(name) for arm in arms]
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
    found = page.found
    arms = {outcome.name: (arm, outcome.scores) for arm in found.arms for outcome in arm.outcomes}
    rows = []
    for run in page.runs:
        arm, scores = arms.get(str(run.folder), (None, {}))
        score = scores.get(found.main_score)
        cells = (
            arm.label if arm else NOTHING,
            str(run.config.get("seed", NOTHING)),
            state(run),
            NOTHING if score is None else f"{100 * score:.1f}",
            str(run.record.get("started", NOTHING)),
        )
        rows.append(TableRow(run.name, cells, page.marks[arm] if arm else None))
    columns = ("Run", "Group", "Seed", "State", f"{found.part} mIoU, %" if found.main_score else "Score", "Started")
    return Table("In the order in which they were given.", columns, tuple(rows), words=True)


def _differences(page: Page) -> Iterator[Section]:
    arms, differing = page.found.arms, page.found.differing
    if len(arms) < 2 or not differing:
        return
    told = {key: tuple(NOTHING if value is None else value for value in own) for key, own in differing.items()}
    if len(arms) <= ABREAST:
        columns = ("Key", *(arm.label for arm in arms))
        rows = [TableRow(key, own) for key, own in told.items()]
    else:
        columns = ("Group", *told)
        turned = zip(*told.values(), strict=True)
        rows = [TableRow(arm.label, own, page.marks[arm]) for arm, own in zip(arms, turned, strict=True)]
    caption = "Config keys in which the groups differ; all others are the same, seeds aside."
    yield Section("differences", "What differs", (Table(caption, columns, tuple(rows), words=True),))


def _leaks(page: Page) -> Iterator[Section]:
    found = [(run.read("leaks.json"), run) for run in page.runs]
    yield sections.leaks((record, run) for record, run in found if record or run.is_done)


def _curves(page: Page) -> Iterator[Section]:
    blocks: list[Any] = []
    metrics = {arm: [run.metrics() for run in arm.runs] for arm in page.found.arms}
    stages: list[str] = list(dict.fromkeys(arm.stage for arm in metrics))
    for stage in stages:
        arms = [arm for arm in metrics if arm.stage == stage]
        first, more = _curve_panels(page, {arm: metrics[arm] for arm in arms}, stage)
        if len(stages) > 1 and (first or more):
            blocks.append(Heading(STAGES.get(stage, stage)))
        if first:
            blocks.append(Panels(first, page.legend(arms)))
        if more:
            blocks.append(
                Fold("More curves: other figures, learning rate, gradient, speed", (Panels(more, page.legend(arms)),))
            )
    if blocks:
        several = any(len(own) > 1 for own in metrics.values())
        long = any(len(lines) > charts.POINTS for own in metrics.values() for lines in own)
        notes = ["Strong: the mean of a group's runs; thin: each of them."] * several
        notes += [f"Of more than {charts.POINTS} points neighbours are averaged."] * long
        blocks = [*(Text(note) for note in notes), *blocks]
    yield Section("curves", "Curves", tuple(blocks))


def _curve_panels(
    page: Page, metrics: Mapping[Arm, Metrics], stage: str
) -> tuple[tuple[Panel, ...], tuple[Panel, ...]]:
    """Small multiples: each task's loss and its foremost figure first, then all others; a single point is no curve."""
    names = list(dict.fromkeys(name for own in metrics.values() for lines in own for line in lines for name in line))
    of_tasks = [name for name in names if name.startswith("train/") and name.count("/") == 2]
    losses = [name for name in of_tasks if name.endswith("/loss")]
    weights = [name for name in of_tasks if name.endswith(("/weight", "/factor"))]
    probed = [name for name in names if name.startswith("probe/")]
    held_out = [name for name in names if name.startswith("val/") and not name.startswith(("val/iou/", "val/averaged"))]
    first = [*losses, *foremost(held_out), *probed]
    whole = ["train/loss"] if len(losses) > 1 else []
    panels: dict[str, Panel] = {}
    for number, name in enumerate(dict.fromkeys([*first, *whole, *held_out, *weights, *MACHINE])):
        lines = [charts.Curve(runs, page.styles[arm]) for arm, own in metrics.items() if (runs := _lines(own, name))]
        if any(len(steps) > 1 for line in lines for steps, _ in line.runs):
            shown = with_unit(name)
            about = f"{shown} over steps for {', '.join(arm.label for arm in metrics)}"
            svg = drawn(charts.curves, f"{stage}{number}", lines, about, by_logarithm="loss" in name)
            panels[name] = Panel(shown, svg)
    return (
        tuple(panel for name, panel in panels.items() if name in first),
        tuple(panel for name, panel in panels.items() if name not in first),
    )


def _lines(metrics: Metrics, name: str) -> tuple[tuple[list[float], list[float]], ...]:
    found = []
    factor, _ = unit_of(name)
    for records in metrics:
        having = [record for record in records if name in record]
        if having:
            found.append(([record["step"] for record in having], [factor * record[name] for record in having]))
    return tuple(found)


def _affinities(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        lines = [line for line in page.shown(arm).metrics() if any(name.startswith(AFFINITY) for name in line)]
        names = list(dict.fromkeys(name for line in lines for name in line if name.startswith(AFFINITY)))
        panels = []
        for pair in (name for name in names if name.removeprefix(AFFINITY).count("/") == 1):
            first, second = pair.removeprefix(AFFINITY).split("/")
            rows = {"encoder": pair} | {
                own.removeprefix(f"{pair}/"): own for own in names if own.startswith(f"{pair}/")
            }
            values = np.array([[line.get(name, np.nan) for line in lines] for name in rows.values()])
            about = f"cosine of the gradients of {first} and {second} over steps, by stage of the encoder, {arm.label}"
            name = f"affinity{page.found.arms.index(arm)}_{len(panels)}"
            svg = drawn(charts.cosines, name, list(rows), [line["step"] for line in lines], values, about)
            panels.append(Panel(f"{first} and {second}: {np.nanmean(values[0]):+.2f} on average", svg))
        return [Panels(tuple(panels))] if panels else []

    shown = sections.folds(page, blocks)
    if shown:
        note = (
            "Cosine of two tasks' gradients, stage by stage, first layers on top, over the steps. Blue: a step for one "
            f"helps the other; orange: it harms it. The deepest colour is {charts.DEEPEST} and more, white 0."
        )
        yield Section("affinity", "Which tasks agree", (Text(note), *shown))


def _confusions(page: Page) -> Iterator[Section]:
    part = page.found.part

    def panel(arm: Arm) -> Panel | None:
        matrices = [matrix for run in arm.runs if (matrix := run.read("confusion.json")) and part in matrix]
        names = {tuple(matrix["classes"]) for matrix in matrices}
        if len(names) != 1:
            return None
        counts = np.sum([np.asarray(matrix[part], dtype=np.int64) for matrix in matrices], axis=0)
        about = f"confusion matrix of {arm.label}, {len(counts)} classes; rows are the truth"
        summed = f", summed over {len(matrices)} runs" if len(matrices) > 1 else ""
        svg = drawn(charts.confusion, f"confusion{page.found.arms.index(arm)}", counts, *names, about)
        return Panel(f"{arm.label}: {counts.sum():,} pixels{summed}", svg)

    found = [(arm, own) for arm in page.found.arms if (own := panel(arm)) is not None]
    if not found:
        return
    of = PARTS.get(part, part)
    panels = tuple(own for _, own in found[: sections.SHOWN])
    many = len(sections.class_names(page)) > charts.NUMBERED
    shape = "full" if many else "wide"
    how = "the share (its square root, as depth of colour)" if many else "per cent"
    blocks: list[Any] = [Text(f"Of a class's pixels in the {of} (a row), {how} that was predicted as each class.")]
    blocks.append(Panels(panels[: sections.OPEN], shape=shape))
    blocks += [Fold("More groups", (Panels(panels[sections.OPEN :], shape=shape),))] if panels[sections.OPEN :] else []
    blocks += sections.not_shown([arm for arm, _ in found[sections.SHOWN :]])
    yield Section("confusion", "What is taken for what", tuple(blocks))


def _confidence(page: Page) -> Iterator[Section]:
    """How sure each group is, how often right, and what leaving out the doubtful pixels buys; summed over its runs."""
    part = page.found.part
    found = {arm: own for arm in page.found.arms if (own := sections.confidences(arm, part, "plain")).total}
    if not found:
        return
    mended = {arm: sections.confidences(arm, part, calibration.TEMPERED) for arm in found}
    has_mended = any(own.total for own in mended.values())
    shown = dict(list(found.items())[: sections.SHOWN])
    of = PARTS.get(part, part)
    lines = []
    for arm, own in shown.items():
        style = page.styles[arm]
        lines += [_reliability(own, style)]
        lines += [_reliability(mended[arm], replace(style, dash="--"))] * bool(mended[arm].total)
    about = "; ".join(f"{arm.label}: {calibration.in_words(own)}" for arm, own in shown.items())
    sure = drawn(charts.reliability, "reliability", lines, f"how often right over how sure, {of}; {about}")
    left_out = np.linspace(0, 0.99, charts.POINTS).tolist()
    hundredths = [100 * share for share in left_out]
    curves = []
    for arm, own in shown.items():
        errors = [100 * own.error_of_surest(1 - share) for share in left_out]
        curves.append(charts.Curve(((hundredths, errors),), page.styles[arm]))
    about = "; ".join(f"{arm.label}: {calibration.left_out_in_words(own)}" for arm, own in shown.items())
    risks = drawn(charts.leaving_out, "leaving_out", curves, f"error of the surer pixels, {of}; {about}")
    panels = (
        Panel(
            "How often it is right (up) when it says so much (along). Below the dotted line it says more than it "
            f"holds; the area of a dot is its share of the pixels.{' Dashed: tempered.' * has_mended}",
            sure,
        ),
        Panel("How many of the pixels that are kept are wrong, as the least sure ones are left out.", risks),
    )
    told = []
    for arm, own in shown.items():
        kept = begun(calibration.left_out_in_words(own))
        told.append(f"{arm.label}: {calibration.in_words(own)}. {kept}.")
    blocks: list[Any] = [Text(line) for line in told]
    blocks += [Panels(panels, page.legend(list(shown)), shape="wide"), _confidence_table(page, found, mended)]
    blocks += sections.not_shown([arm for arm in found if arm not in shown])
    yield Section("confidence", "How sure, and how often right", tuple(blocks))


def _reliability(found: Confidences, style: charts.Style) -> charts.Reliability:
    said, held, shares = found.curve()
    return charts.Reliability(100 * said, 100 * held, 100 * shares, style)


def _confidence_table(page: Page, found: Mapping[Arm, Confidences], mended: Mapping[Arm, Confidences]) -> Table:
    has_mended = any(own.total for own in mended.values())
    rows = []
    for arm, own in found.items():
        errors = [own.error_of_surest(share) for share in SUREST]
        cells = [f"{100 * own.ece:.1f}", points(own.overconfidence)]
        cells += [f"{100 * mended[arm].ece:.1f}" if mended[arm].total else NOTHING] * has_mended
        cells += [f"{100 * error:.1f}" for error in errors]
        cells.append(f"{own.aurc:.4f}")
        rows.append(TableRow(arm.label, tuple(cells), page.marks[arm]))
    of = PARTS.get(page.found.part, page.found.part)
    caption = (
        f"All pixels of the {of} that count, of all runs of a group. ECE: {calibration.BINS} bins of equal width. "
        "Over-confidence: what it says on average, less how often it is right. AURC: the mean of the error over all "
        "shares that are kept."
    )
    caption += " Tempered: with the temperature that validation images gave, or that was named." * has_mended
    columns = ["Group", "ECE, %", "Over-confidence, points", *["Tempered ECE, %"] * has_mended]
    columns += [f"Error, %, of the surest {100 * share:g} %" for share in SUREST]
    return Table(caption, (*columns, "AURC"), tuple(rows))


def _outlines(page: Page) -> Iterator[Section]:
    """Boundary IoU and Hausdorff distances, where runs have them."""
    part, names = page.found.part, sections.class_names(page)
    arms = [arm for arm in page.scored if arm.spread(f"{part}/boundary/miou") is not None]
    if not arms:
        return
    columns = ["Class"]
    columns += [f"{arm.label}: {figure}" for arm in arms for figure in ("Boundary IoU, %", "Hausdorff 95, px")]
    keys = {"mean": ("boundary/miou", "hd95"), **{own: (f"boundary/iou/{own}", f"hd95/{own}") for own in names}}
    rows = []
    for name, (overlap, distance) in keys.items():
        cells: list[str] = []
        for arm in arms:
            far = arm.spread(f"{part}/{distance}")
            cells += [percent(arm.spread(f"{part}/{overlap}")), NOTHING if far is None else far.text(1)]
        rows.append(TableRow(name, tuple(cells)))
    caption = (
        "Boundary IoU: the IoU of the pixels within 2 % of the image's diagonal of each mask's outline, summed over "
        "the images. Hausdorff 95: how far apart outlines are, but for their farthest twentieth, as the mean over the "
        "images that show the class; where only truth or prediction does, the image's diagonal counts."
    )
    yield Section("outlines", "Outlines", (Table(caption, tuple(columns), tuple(rows)),))


def _pretext(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        run = page.shown(arm)
        made = [picture for picture in run.pictures() if picture.name != "predictions"]
        found: list[Any] = []
        as_configured = [name for name in run.config.get("tasks") or () if any(own.name == name for own in made)]
        for task in dict.fromkeys([*as_configured, *(picture.name for picture in made)]):
            own = [picture for picture in made if picture.name == task]
            chosen = sorted({0, (len(own) - 1) // 2, len(own) - 1})
            shots = [shot(own[index].path, f"{task}, step {own[index].step:,}") for index in chosen]
            found.append(Gallery(tuple(shots)))
        return found

    shown = sections.folds(page, blocks)
    if shown:
        note = "The same images each time, a row each: what the task is given, what it answers, what it should answer."
        yield Section("pretext", "Pretext tasks over time", (Text(note), *shown))


def _predictions(page: Page) -> Iterator[Section]:
    def extremes(arm: Arm) -> list[Any]:
        run = page.shown(arm)
        listed = (run.read("extremes.json") or {}).get(page.found.part) or []
        found: list[Any] = []
        for kind in ("worst", "best"):
            own = [entry for entry in listed if entry.get("kind") == kind]
            shots = [shot(path, _extreme(entry)) for entry in own if (path := _inside(run, entry)) is not None]
            if shots:
                found += [
                    Text(f"{kind.capitalize()}: image, prediction, truth, errors."),
                    Gallery(tuple(shots), wide=True),
                ]
        return found

    blocks: list[Any] = []
    panels = [(arm, path) for arm in page.found.arms if (path := _panel_of(page.shown(arm))) is not None]
    if panels:
        shots = [shot(path, f"{arm.label} ({page.which(arm)})") for arm, path in panels[: sections.SHOWN]]
        blocks += [Text("A row an image: image, prediction, truth."), Gallery(tuple(shots), wide=True)]
        blocks += sections.not_shown([arm for arm, _ in panels[sections.SHOWN :]])
    yield Section("predictions", "Predictions", (*blocks, *sections.folds(page, extremes)))


def _panel_of(run: RunFolder) -> Path | None:
    """The last prediction panel of a run, or that of `evaluate`."""
    panels = [picture.path for picture in run.pictures() if picture.name == "predictions"]
    scored = run.folder / "predictions.png"
    return panels[-1] if panels else scored if files.lies_in(scored, run.folder) else None


def _extreme(entry: Mapping[str, Any]) -> str:
    miou = entry.get("miou")
    score = "no score" if miou is None else f"mIoU {100 * miou:.1f} %"
    return f"{entry.get('name', '')}: {score}"


def _inside(run: RunFolder, entry: Mapping[str, Any]) -> Path | None:
    """The picture of an entry if it is one of the run's own: a page must not carry what a stranger's list points at."""
    path = run.folder / str(entry.get("picture", ""))
    return path if files.lies_in(path, run.folder) else None


def _norm_shares(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        run = page.shown(arm)
        model = run.config.get("model")
        if not (isinstance(model, Mapping) and str(model.get("norm", "")).startswith("switch")):
            return []
        # It reads weights, so it costs the import of torch: for runs with switch norm only.
        from ssl_seg.reports.norms import draw, read_parts

        try:
            parts = read_parts(run.folder)
        except UserError as error:  # a run whose weights were cleared away still has all the rest to report
            return [Text(str(error))]
        about = f"shares of instance, layer and batch statistics in each switch norm layer of {arm.label}"
        svg = Markup(to_svg(draw(parts), f"norms{page.found.arms.index(arm)}", about))
        return [Panels((Panel("Shares of each layer, first layer on top.", svg),), shape="full")]

    shown = sections.folds(page, blocks, num_open=1)
    if shown:
        note = "Which statistics each switch norm layer has learnt to use; dotted: the equal shares of a new layer."
        yield Section("norms", "Norm shares", (Text(note), *shown))


def _costs(page: Page) -> Iterator[Section]:
    rows, known = [], []
    for arm in page.found.arms:
        costs = [cost_of(run) for run in arm.runs]
        known += [cost.seconds for cost in costs if cost.seconds is not None]
        time, *rate_and_memory = sections.mean_costs(costs)
        images = average([cost.images for cost in costs], lambda number: f"{number:,.0f}")
        network = average([numbers_in(page.shown(arm))], lambda number: f"{number / 1e6:.2f} M")
        cells = (str(len(arm.runs)), time, images, *rate_and_memory, network)
        rows.append(TableRow(arm.label, cells, page.marks[arm]))
    if not any(cell != NOTHING for row in rows for cell in row.cells[1:]):
        return
    columns = ("Group", "Runs", "Time", "Images seen", "Images a second", "Peak memory", "Network")
    blocks: list[Any] = [Table(OF_COST, columns, tuple(rows))]
    if len(known) > 1:
        blocks.append(Text(f"Together {duration(sum(known))} for {len(known)} runs."))
    yield Section("cost", "Cost", tuple(blocks))


def _set_up(page: Page) -> Iterator[Section]:
    def blocks(arm: Arm) -> list[Any]:
        run = page.shown(arm)
        return [*sections.set_up(_facts(run), run.config)]

    shown = sections.folds(page, blocks, num_open=len(page.found.arms) == 1)
    yield Section("setup", "Config and versions", tuple(shown))


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
    yield from sections.versions_of(record)
    yield "Images", ", ".join(f"{part} {count:,}" for part, count in counts.items())
    for part, receipt in (run.read("receipts.json") or {}).items():
        yield f"Loaded: {part}", _receipt_in_words(receipt)


def _receipt_in_words(receipt: Mapping[str, Any]) -> str:
    lengths = {name: len(receipt.get(name) or ()) for name in ("matched", "missing", "left_over", "mismatched")}
    counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lengths.items())
    same: dict[bool | None, str] = {
        True: "; gives the exporter's features",
        False: "; features differ from the exporter's",
    }
    tail = same.get(receipt.get("features_equal"), "")
    return f"{receipt.get('share', 0):.0%} of the parameters ({counted} tensors) from {receipt.get('path', '')}{tail}"


SECTIONS: tuple[Callable[[Page], Iterator[Section]], ...] = (
    _scores,
    _differences,
    _leaks,
    _curves,
    _affinities,
    sections.classes,
    _confusions,
    _outlines,
    _confidence,
    _pretext,
    _predictions,
    sections.maps,
    _norm_shares,
    _costs,
    _set_up,
)

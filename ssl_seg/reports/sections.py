"""The figures of a page about runs: curves over steps, the classes, what is taken for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ssl_seg.evidence.claims import PARTS, foremost, percent, points, unit_of, with_unit
from ssl_seg.evidence.pairs import Spread
from ssl_seg.figures import charts
from ssl_seg.reports.blocks import (
    OPEN,
    SHOWN,
    Arm,
    Fold,
    Heading,
    Page,
    Panel,
    Panels,
    Section,
    Table,
    TableRow,
    Text,
    drawn,
    legend,
    not_shown,
)

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "evaluate": "Evaluation"}
OF_CLASSES = (
    "IoU in %, mean ± standard deviation, in brackets the mean paired gain over scratch. Absent: the class is neither "
    "in the truth nor in a prediction, and no part of the mIoU."
)
MACHINE = ("lr", "grad_norm", "images_per_s")  # figures of the training itself, not of what was learnt


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

"""Fine-tunings on images chosen by `ssl-seg select` and on images drawn by chance: one row of scores.csv each.

    python -m experiments.selection.run DATA --out runs/selection --sets nuclei wounds

DATA is as `experiments.five_sets` makes it. Rows that are there are not made again.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from experiments.five_sets import IMAGENET, MASKS, Table, folder_of, parser_of, part_of, shared, table_of
from ssl_seg import FinetuneConfig, Options, SelectConfig, finetune, load, select

STEPS = {"tiles": 400}  # in 150 steps no defect is learnt from forty drawn images
COUNTS = (5, 10, 20, 40)
DRAWS, REPEATS = 8, 4  # of random images; of the chosen ones, with other seeds of the training
PARTS, PART, FRAMES = 3, 0.75, 10  # pools that are a part of the whole; frames of CamVid stay together in blocks


def main() -> None:
    options = shared(parser_of(__doc__, list(MASKS))).parse_args()
    table = table_of(options, words=4)
    own, processes = options.share
    for name in options.sets:
        drawn_from, chosen = choose(options.data, name, options.out / f"chosen_{name}_{own}")
        parts = [choose(options.data, name, options.out / f"part_{name}_{own}", part) for part in range(PARTS)]
        fewest = [("chosen of a part", part, order[: COUNTS[0]]) for part, (_, order) in enumerate(parts)]
        for arm, draw, names in [*cells(name, drawn_from, chosen), *fewest][own::processes]:
            if table.has(name, arm, draw, len(names)):
                continue
            run = options.out / f"run_{own}"
            shutil.rmtree(run, ignore_errors=True)
            config = load(FinetuneConfig, config_of(options.data, name, names, draw))
            scores = finetune(config, Options(run, quiet=True)).val
            table.add(name, arm, draw, len(names), scores.miou, *scores.iou)
    print("\n".join(lines(table)))


def lines(table: Table) -> Iterator[str]:
    """The table in points of mIoU, mean (sd), and how far the areas under the curves lie apart."""
    scores: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    for name, arm, draw, count, miou, *_ in table:
        scores.setdefault(name, {}).setdefault(arm, {}).setdefault(int(draw), {})[int(count)] = 100 * float(miou)
    for name, arms in scores.items():
        areas = {}
        for arm, draws in arms.items():
            counts = sorted(set().union(*draws.values()))
            whole = [own for own in draws.values() if sorted(own) == counts]
            for count in counts:
                values = [own[count] for own in draws.values() if count in own]
                yield f"{name} {arm} {count}: {mean(values):.1f} ({np.std(values, ddof=1):.1f}), n = {len(values)}"
            if len(counts) > 1:
                logs = np.log2(counts)
                areas[arm] = [np.trapezoid([own[count] for count in counts], logs) / np.ptp(logs) for own in whole]
        apart = ttest_ind(areas["chosen"], areas["random"], equal_var=False)
        low, high = apart.confidence_interval(0.95)
        gain = mean(areas["chosen"]) - mean(areas["random"])
        yield f"{name}, area under the curve: {gain:+.1f} ({low:+.1f} to {high:+.1f})"


def choose(data: Path, name: str, out: Path, part: int | None = None) -> tuple[list[str], tuple[str, ...]]:
    """Names that may be drawn, which show nothing of what is scored, and those chosen from all or a part of them."""
    parts = {"pool": part_of(data, name, "labelled"), "scored": part_of(data, name, "val")}
    shutil.rmtree(out, ignore_errors=True)
    if part is not None:
        files = _of_part(sorted(Path(parts["pool"]["images"]).iterdir()), name, part)
        parts["pool"] = folder_of(files, out.with_name(f"{out.name}_images"))
    config = load(SelectConfig, {"data": parts, "count": 10**6, "model": {"encoder": IMAGENET}})
    order = select(config, out, quiet=True).names
    return sorted(order), order


def _of_part(files: Sequence[Path], name: str, part: int) -> list[Path]:
    size = FRAMES if name == "camvid" else 1
    blocks = range(-(-len(files) // size))
    kept = set(random.Random(f"sub {name} {part}").sample(blocks, round(PART * len(blocks))))
    return [file for place, file in enumerate(files) if place // size in kept]


def cells(name: str, drawn_from: Sequence[str], chosen: Sequence[str]) -> Iterator[tuple[str, int, Sequence[str]]]:
    """Arm, draw and images, draw by draw: a table that is cut short has whole draws."""
    counts = [count for count in COUNTS if count <= len(drawn_from) / 2]
    for draw in range(DRAWS):
        order = list(drawn_from)
        random.Random(f"{name} {draw}").shuffle(order)
        for count in counts:
            yield "random", draw, order[:count]
            if draw < REPEATS:
                yield "chosen", draw, chosen[:count]


def config_of(data: Path, name: str, names: Sequence[str], seed: int) -> dict[str, Any]:
    return {
        "data": {part: part_of(data, name, part) for part in ("labelled", "val")},
        "labels": {"names": list(names)},
        "model": {"encoder": IMAGENET, "decoder": {"type": "unet", "channels": [128, 64, 48, 32, 24]}},
        "segment": {"dice": 1.0},
        "augment": {"crop": [96, 96], "zoom": [0.8, 1.5]},
        "train": {
            "steps": STEPS.get(name, 150),
            "batch_size": 8,
            "precision": "bf16",
            "channels_last": True,
            "workers": 0,
        },
        "select": "last",
        "leaks": {"check": False},  # what leaks is left out beforehand
        "tracking": "none",
        "seed": seed,
    }


if __name__ == "__main__":
    main()

"""Fine-tunings by one recipe and by that recipe with one thing changed: one row of scores.csv each.

    python -m experiments.recipes.run DATA --out runs/recipes --sets nuclei wounds

DATA is as `experiments.five_sets` makes it. All are scored on the `first` half of each set: what is chosen here is told
of the `second`. Rows that are there are not made again; seed by seed, so a table that is cut short has whole pairs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.five_sets import IMAGENET, MASKS, Table, parser_of, part_of, shared, table_of
from ssl_seg import FinetuneConfig, Options, finetune, load, merge, unflatten

LABELS = {"camvid": 30}  # of the other sets 10
SEEDS = 3  # each draws other images, and trains in another order
BASE: dict[str, Any] = {
    "model": {
        "encoder": IMAGENET,
        "decoder": {"type": "unet", "channels": [128, 64, 48, 32, 24]},
    },
    "segment": {"dice": 1.0},
    "augment": {"crop": [96, 96], "zoom": [0.8, 1.5]},
    "train": {"steps": 150, "batch_size": 8, "precision": "bf16", "channels_last": True, "workers": 0},
    "select": "last",
    "leaks": {"check": False},  # `first` and `second` are told apart beforehand, drives by name
    "tracking": "none",
}
# What is changed, by a word of it; each alone.
LEVERS: dict[str, Mapping[str, Any]] = {
    "base": {},
    # The loss
    "without dice": {"segment.dice": 0.0},
    "tversky for dice": {"segment.tversky": 1.0, "segment.dice": 0.0},
    "lovasz for dice": {"segment.lovasz": 1.0, "segment.dice": 0.0},
    "focal for cross-entropy": {"segment.focal": 1.0, "segment.cross_entropy": 0.0},
    "root-median weights": {"segment.class_weights": {"balance": "median", "power": 0.5}},
    "hardest quarter": {"segment.hardest": 0.25},
    "smoothing 0.1": {"segment.label_smoothing": 0.1},
    # What the images go through
    "rare third": {"augment.rare": 0.33},
    "zoom 0.5 to 2": {"augment.zoom": [0.5, 2.0], "augment.pad": True},
    "colours": {"augment.jitter": 0.4, "augment.saturation": 0.4, "augment.hue": 0.05},
    "rotate 15": {"augment.rotate": 15.0},
    "eight ways": {"augment.turns": True},
    "blur 1": {"augment.blur": 1.0},
    "cutmix": {"segment.mix": "cutmix"},
    "classmix": {"segment.mix": "classmix"},
    # The fitting
    "ema 0.98": {"train.ema": 0.98},
    "encoder rate 0.3": {"train.encoder_lr": 0.3},
    "layer decay 0.8": {"train.layer_decay": 0.8},
    "frozen for a third": {"train.freeze_encoder": 50},
    "rate 3e-3": {"train.lr": 3e-3},
    "rate 3e-4": {"train.lr": 3e-4},
    "three times the steps": {"train.steps": 450},
}


def main() -> None:
    parser = shared(parser_of(__doc__, [*MASKS]))
    parser.add_argument("--levers", nargs="+", default=[*LEVERS], choices=LEVERS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    table = table_of(options, words=3)
    own, processes = options.share
    run = options.out / f"run_{own}"
    sets: list[str] = options.sets
    levers: list[str] = options.levers
    cells = [(seed, lever, name) for seed in range(options.seeds) for lever in levers for name in sets]
    for seed, lever, name in cells[own::processes]:
        if table.has(name, lever, seed):
            continue
        shutil.rmtree(run, ignore_errors=True)
        config = load(FinetuneConfig, config_of(options.data, name, LEVERS[lever], seed))
        start = time.process_time()
        scores = finetune(config, Options(run, quiet=True)).val
        table.add(name, lever, seed, f"{time.process_time() - start:.0f}", scores.miou, *scores.iou)
    print("\n".join(lines(table)))


def config_of(data: Path, name: str, changes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    own = {
        "data": {"labelled": part_of(data, name, "candidates"), "val": part_of(data, name, "first")},
        "labels": {"count": LABELS.get(name, 10), "seed": seed},
        "seed": seed,
    }
    return merge(merge(BASE, own), unflatten(changes))


def lines(table: Table) -> Iterator[str]:
    """By set and lever: mIoU in points, the gain over the base recipe, its spread over the pairs, seconds of CPU."""
    scores: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for name, lever, seed, seconds, miou, *_ in table:
        scores.setdefault(name, {}).setdefault(lever, {})[int(seed)] = (100 * float(miou), float(seconds))
    for name, levers in scores.items():
        for lever, own in levers.items():
            gains = [own[seed][0] - levers["base"][seed][0] for seed in own if seed in levers["base"]]
            spread = f" ({stdev(gains):.1f})" if len(gains) > 1 else ""
            miou, seconds = (mean(values) for values in zip(*own.values(), strict=True))
            yield f"{name}, {lever}: {miou:.1f}, {mean(gains):+.1f}{spread}, n = {len(gains)}, {seconds:.0f} s"


if __name__ == "__main__":
    main()

"""What pools without masks are worth when a pretext task learns them, and whether `ssl-seg gap` tells: a row a run.

    python -m experiments.pool_worth.distilled DATA --photos BSDS --out runs/pool_worth_distilled

DATA is as for `experiments.pool_worth.run`, BSDS a folder of photographs (those of the Berkeley segmentation data set).
Rows that are there are not made again.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from experiments.five_sets import IMAGENET, copy_smaller, folder_of, parser_of, part_of, shared, table_of
from experiments.pool_worth.run import (
    BASE,
    NONE,
    SEEDS,
    STEPS,
    TARGETS,
    gaps_of,
    lines,
    run,
    scores_of,
    seeds,
    target_of,
)
from ssl_seg import Options, PretrainConfig, load, merge, pretrain

IMAGES = 200  # of each pool; the smallest has 228
POOL_STEPS = 400
SIDE = 160  # pixels, the shorter one of a photograph
NETWORK: dict[str, Any] = {
    "model": {**BASE["model"], "encoder": {"name": "resnet18", "pretrained": False}},
    "train": {**BASE["train"], "precision": "bf16"},
}
TASK: dict[str, Any] = {
    "augment": {"crop": [96, 96], "zoom": [0.8, 1.5]},
    "tasks": {"distill": {"teacher": IMAGENET}},
    "tracking": "none",
}


def main() -> None:
    parser = shared(parser_of(__doc__, TARGETS))
    parser.add_argument("--photos", type=Path, required=True)
    options = parser.parse_args()
    table = table_of(options, words=3)
    pools = pools_of(options.data, photos(options.photos, options.out / "photos"))
    own, processes = options.share
    units = [(seed, pool) for seed in range(SEEDS) for pool in (NONE, *pools)]
    for seed, pool in units[own::processes]:
        for target in options.sets:
            if table.has(target, pool, seed):
                continue
            config = merge(merge(merge(BASE, NETWORK), target_of(options.data, target)), seeds(seed, STEPS))
            if pool != NONE:
                config["init"] = str(encoder(options.out, pool, pools[pool], seed))
            scores = run(config, options.out / f"run_{own}")
            table.add(target, pool, seed, scores.miou, *scores.iou)
    named = {name: {"type": "folder", "images": str(folder)} for name, folder in pools.items()}
    gaps = gaps_of(options.data, options.out, dict.fromkeys(options.sets, named))
    print("\n".join(lines(scores_of(table), gaps, start="random weights")))


def pools_of(data: Path, photographs: Path) -> dict[str, Path]:
    """By name, the folders of images; those of the targets' own sources show nothing of what is scored."""
    return {
        "drawn street": data / "drawn_street" / "images",
        "drawn shapes": data / "drawn_shapes" / "images",
        "real nuclei": Path(part_of(data, "nuclei", "pool")["images"]),
        "real street frames": Path(part_of(data, "camvid", "pool")["images"]),
        "photographs": photographs,
    }


def photos(source: Path, out: Path) -> Path:
    """The photographs as small as the other pools are."""
    for file in sorted(source.glob("*.jpg")):
        if not (out / "images" / f"{file.stem}.png").exists():
            copy_smaller(file, None, out, SIDE)
    return out / "images"


def encoder(out: Path, pool: str, images: Path, seed: int) -> Path:
    """The run that has learnt, on a seed's own images of a pool, to say what a network with ImageNet weights says."""
    name = f"{pool.replace(' ', '_')}_{seed}"
    folder = out / f"network_{name}"
    if not (folder / "result.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        drawn = random.Random(name).sample(sorted(images.iterdir()), IMAGES)
        data = {"pool": folder_of(drawn, out / f"images_{name}")}
        config = merge(merge(merge({"data": data}, NETWORK), TASK), seeds(seed, POOL_STEPS))
        pretrain(load(PretrainConfig, config), Options(folder, quiet=True))
    return folder


if __name__ == "__main__":
    main()

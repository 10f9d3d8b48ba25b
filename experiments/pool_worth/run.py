"""What labelled pools are worth when they are learnt first, and whether `ssl-seg gap` tells: a row of scores.csv a run.

    python -m experiments.pool_worth.run DATA --out runs/pool_worth

DATA is as `experiments.five_sets` makes it, with the drawn pools beside (`ssl-seg synth`, see the README) as
`drawn_street`, `drawn_shapes`, `drawn_nuclei` and `drawn_aerial`. Rows that are there are not made again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.stats import rankdata

from experiments.five_sets import IMAGENET, MASKS, Table, parser_of, part_of, shared, table_of
from ssl_seg import FinetuneConfig, GapConfig, Options, finetune, gap, load, merge

TARGETS = ("nuclei", "roads", "camvid")
DRAWN = ("street", "shapes", "nuclei", "aerial")
REAL = ("nuclei", "camvid")  # with masks enough to be a pool
OWN_WORLD = {
    "drawn nuclei": "nuclei",
    "drawn aerial": "roads",
    "drawn street": "camvid",
}  # drawn with this target in mind
NONE = "none"  # ImageNet weights, and no pool
SEEDS = 3
IMAGES = 100  # of each pool, since more images teach more; the smallest has 134, a fifth of which is held out
LABELS = 10
POOL_STEPS, STEPS = 300, 150
SHUFFLES = 20_000
BASE: dict[str, Any] = {
    "model": {"encoder": IMAGENET, "decoder": {"type": "unet", "channels": [128, 64, 48, 32, 24]}},
    "segment": {"dice": 1.0},
    "augment": {"crop": [96, 96], "zoom": [0.5, 2.0], "pad": True},
    "train": {"batch_size": 8, "channels_last": True, "workers": 0},
    "select": "last",
    "leaks": {"check": False},  # no pool or candidate shows what is scored: `five_sets` left such images out
    "tracking": "none",
}


def main() -> None:
    options = shared(parser_of(__doc__, TARGETS)).parse_args()
    table = table_of(options, words=3)
    own, processes = options.share
    units = [(seed, pool) for seed in range(SEEDS) for pool in (NONE, *pools(options.data))]
    for seed, pool in units[own::processes]:
        for target, arm in arms(options.sets, pool):
            if table.has(target, arm, seed):
                continue
            start = {}
            if pool != NONE:
                start = {"init": str(network(options.data, options.out, pool, seed)), "transfer": transfer_of(arm)}
            config = merge(merge(merge(BASE, target_of(options.data, target)), start), seeds(seed, STEPS))
            if arm == f"{pool}, kept":
                config["data"]["beside"] = pools(options.data)[pool]
            scores = run(config, options.out / f"run_{own}")
            table.add(target, arm, seed, scores.miou, *scores.iou)
    others = {target: elsewhere(options.data, target) for target in options.sets}
    gaps = gaps_of(options.data, options.out, others)
    print("\n".join(lines(scores_of(table), gaps)))


def pools(data: Path) -> dict[str, dict[str, Any]]:
    """By name, the configs of the pools with their masks."""
    drawn = {name: data / f"drawn_{name}" for name in DRAWN}
    folders = {
        f"drawn {name}": {"images": str(own / "images"), "masks": str(own / "masks")} for name, own in drawn.items()
    }
    classes = {pool: MASKS[target] for pool, target in OWN_WORLD.items()}
    return {
        **{name: {"type": "folder", **own, **classes.get(name, {})} for name, own in folders.items()},
        **{f"real {name}": part_of(data, name, "labelled") for name in REAL},
    }


def arms(targets: list[str], pool: str) -> Iterator[tuple[str, str]]:
    """What a pool is tried for: every target that is of another source, and kept beside the one it was drawn for."""
    for target in targets:
        if pool != f"real {target}":
            yield target, pool
        if OWN_WORLD.get(pool) == target:
            yield target, f"{pool}, kept"


def network(data: Path, out: Path, pool: str, seed: int) -> Path:
    """The run that has learnt a pool with its masks, from ImageNet weights on."""
    folder = out / f"network_{pool.replace(' ', '_')}_{seed}"
    if not (folder / "result.json").exists():
        parts = {"data": {"labelled": pools(data)[pool]}, "labels": {"count": IMAGES, "blind": True, "seed": seed}}
        run(merge(merge(BASE, parts), seeds(seed, POOL_STEPS)), folder)
    return folder


def transfer_of(arm: str) -> str:
    """The classes of a pool are others than the target's, so the last layer begins anew; not where it is kept."""
    return "model" if arm.endswith(", kept") else "encoder+segment"


def seeds(seed: int, steps: int) -> dict[str, Any]:
    return {"seed": seed, "train": {"steps": steps}}


def target_of(data: Path, name: str) -> dict[str, Any]:
    parts = {"labelled": part_of(data, name, "candidates"), "val": part_of(data, name, "val")}
    return {"data": parts, "labels": {"count": LABELS}}


def run(config: dict[str, Any], folder: Path) -> Any:
    shutil.rmtree(folder, ignore_errors=True)
    return finetune(load(FinetuneConfig, config), Options(folder, quiet=True)).val


def elsewhere(data: Path, target: str) -> dict[str, dict[str, Any]]:
    """The pools that are of another source than the target."""
    return {name: pool for name, pool in pools(data).items() if name != f"real {target}"}


def gaps_of(data: Path, out: Path, pools: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """By target, how far each of its pools lies from it, measured once."""
    file = out / "gaps.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for target, own in pools.items():
        if target not in found:
            parts = {"target": part_of(data, target, "val"), "pools": own}
            config = load(GapConfig, {"data": parts, "model": {"encoder": IMAGENET}, "workers": 0})
            found[target] = {pool.name: pool.gap for pool in gap(config, quiet=True).pools}
            file.write_text(json.dumps(found, indent=1))
    return found


def scores_of(table: Table) -> dict[str, dict[str, dict[int, float]]]:
    """Points of mIoU by target, arm and seed."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for target, arm, seed, miou, *_ in table:
        scores.setdefault(target, {}).setdefault(arm, {})[int(seed)] = 100 * float(miou)
    return scores


def gain_of(arms: Mapping[str, Mapping[int, float]], arm: str) -> list[float]:
    """What an arm has over ImageNet weights alone, seed by seed."""
    return [arms[arm][seed] - arms[NONE][seed] for seed in arms[arm] if seed in arms.get(NONE, {})]


def lines(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    gaps: Mapping[str, Mapping[str, float]],
    start: str = "ImageNet weights",
) -> Iterator[str]:
    """By target its pools, the nearest first, with their gain; then how well the order of gaps is that of the gains."""
    pairs = []
    for target, arms in scores.items():
        alone = arms.get(NONE, {})
        yield f"{target}: {mean(alone.values()):.1f} by {start} alone, n = {len(alone)}"
        for arm in sorted(arms, key=lambda arm: gaps[target].get(arm.removesuffix(", kept"), -1.0)):
            if gains := gain_of(arms, arm) * (arm != NONE):
                spread = f" ({stdev(gains):.1f})" if len(gains) > 1 else ""
                far = gaps[target][arm.removesuffix(", kept")]
                yield f"  {far:.2f} {arm}: {mean(gains):+.1f}{spread}, n = {len(gains)}"
        ranked = [pool for pool in arms if pool in gaps[target]]
        pairs.append(([-gaps[target][pool] for pool in ranked], [mean(gain_of(arms, pool)) for pool in ranked]))
        yield f"  rank correlation of nearness and gain: {in_order(*pairs[-1]):+.2f}, {len(ranked)} pools"
    found, chance = correlation(pairs)
    yield f"mean of {len(pairs)} targets: {found:+.2f}; by chance as high in {chance:.3f} of shuffles"


def in_order(near: Sequence[float], gain: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(rankdata(near), rankdata(gain))[0, 1])


def correlation(pairs: list[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """The mean rank correlation, and the share of shuffles of the gains within each target that reach it."""
    generator = random.Random(0)

    def mean_of(shuffles: bool) -> float:
        each = [(near, generator.sample(gain, len(gain)) if shuffles else gain) for near, gain in pairs]
        return float(np.mean([in_order(near, gain) for near, gain in each]))

    found = mean_of(shuffles=False)
    reached = sum(mean_of(shuffles=True) >= found for _ in range(SHUFFLES))
    return found, (reached + 1) / (SHUFFLES + 1)


if __name__ == "__main__":
    main()

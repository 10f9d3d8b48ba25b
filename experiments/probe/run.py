"""Does the probe of an encoder foretell what fine-tuning makes of it? One row of scores.csv for each encoder and seed.

    python -m experiments.probe.run DATA --out runs/probe --sets nuclei wounds camvid

DATA is as `experiments.five_sets` makes it. Each pretraining is looked at after STEPS: probed on the images that the
fine-tuning then has, and fine-tuned by one recipe. Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from experiments.five_sets import IMAGENET, Table, parser_of, part_of, shared, table_of
from experiments.recipes.run import BASE, LABELS
from ssl_seg import FinetuneConfig, Options, PretrainConfig, ProbeConfig, finetune, load, merge, pretrain, probe

STEPS = (50, 150, 400)
TUNED_FOR = 200  # steps
SEEDS = 2  # each draws other labelled images, and trains in another order
NAME = IMAGENET["name"]
FOUR: dict[str, Any] = {"denoise": {}, "inpaint": {}, "colorize": {}, "jigsaw": {}}
# By name: what the encoder starts from, and what it learns.
PRETRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "four": ({"name": NAME}, FOUR),
    "denoise": ({"name": NAME}, {"denoise": {}}),
    "denoise relative": ({"name": NAME}, {"denoise": {"relative": True}}),
    "distill": ({"name": NAME}, {"distill": {"teacher": IMAGENET}}),
    "imagenet+four": (IMAGENET, FOUR),
    "inpaint": ({"name": NAME}, {"inpaint": {"mask": "grid"}}),
    "jigsaw": ({"name": NAME}, {"jigsaw": {}}),
    "colorize": ({"name": NAME}, {"colorize": {}}),
    "restore": ({"name": NAME}, {"restore": {}}),
}
STARTS: dict[str, dict[str, Any]] = {"scratch": {"name": NAME}, "imagenet": IMAGENET}


def main() -> None:
    parser = shared(parser_of(__doc__, ["nuclei", "wounds", "camvid"]))
    parser.add_argument("--kinds", nargs="+", default=[*STARTS, *PRETRAININGS], choices=[*STARTS, *PRETRAININGS])
    options = parser.parse_args()
    table = table_of(options, words=4)
    own, processes = options.share
    for kind, name in [*product(options.kinds, options.sets)][own::processes]:
        if kind in STARTS:
            measure(table, options, name, kind, 0, None, {"encoder": STARTS[kind]})
            continue
        for steps in STEPS:
            if all(table.has(name, kind, steps, seed) for seed in range(SEEDS)):
                continue
            run = options.out / f"{name}_{kind}"
            encoder, tasks = PRETRAININGS[kind]
            config = load(PretrainConfig, pretraining_of(options.data, name, encoder, tasks, steps))
            done = pretrain(config, Options(run, allow_changed=("train.steps",), quiet=True))
            loss = sum(task.weight * done.scores[f"{word}/loss"] for word, task in config.tasks.items())
            measure(table, options, name, kind, steps, (run, loss), {"encoder": {"name": NAME}})
    print("\n".join(lines(table)))


def measure(
    table: Table,
    options: argparse.Namespace,
    name: str,
    kind: str,
    steps: int,
    pretrained: tuple[Path, float] | None,
    model: Mapping[str, Any],
) -> None:
    """One row for each seed: the pretext loss on images held out, the probe's mIoU and the fine-tuned one's."""
    run, loss = pretrained or (None, "")
    for seed in range(SEEDS):
        if table.has(name, kind, steps, seed):
            continue
        labels = {"count": LABELS.get(name, 10), "seed": seed}
        data = {part: part_of(options.data, name, own) for part, own in (("labelled", "candidates"), ("val", "first"))}
        init = {} if run is None else {"init": str(run)}
        looked = {"data": {"labelled": data["labelled"]}, "labels": labels, "holds_out": False, "seed": seed}
        found = probe(load(ProbeConfig, {**looked, **(init or {"model": model})}), quiet=True).encoders[0]
        tuned = options.out / f"tuned_{options.share[0]}"
        shutil.rmtree(tuned, ignore_errors=True)
        own = {"data": data, "labels": labels, "seed": seed, "train": {"steps": TUNED_FOR}, **init}
        values = merge(BASE, own)
        values["model"] = {**values["model"], **model}
        scores = finetune(load(FinetuneConfig, values), Options(tuned, quiet=True)).val
        table.add(name, kind, steps, seed, loss, found.scores.miou, found.random.miou, scores.miou, *scores.iou)


def pretraining_of(
    data: Path, name: str, encoder: Mapping[str, Any], tasks: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    own = {
        "data": {"pool": part_of(data, name, "pool"), "val": part_of(data, name, "first")},
        "model": {**BASE["model"], "encoder": encoder},
        "tasks": tasks,
        # One rate and one warm-up: the state after 150 steps is then on the way to that after 400.
        "train": {**BASE["train"], "steps": steps, "schedule": "constant", "warmup": 20, "save_every": 1000},
    }
    return {**{key: BASE[key] for key in ("augment", "leaks", "tracking")}, **own}


def lines(table: Table) -> Iterator[str]:
    """Every encoder's means over the seeds, and the rank correlations with the fine-tuned mIoU of each set."""
    rows: dict[str, dict[tuple[str, int], list[list[float]]]] = {}
    for name, kind, steps, _, loss, probed, _, tuned, *_ in table:
        values = [float(loss or "nan"), 100 * float(probed), 100 * float(tuned)]
        rows.setdefault(name, {}).setdefault((kind, int(steps)), []).append(values)
    for name, encoders in rows.items():
        means = {key: [mean(values) for values in zip(*own, strict=True)] for key, own in encoders.items()}
        for (kind, steps), (loss, probed, tuned) in means.items():
            yield f"{name}, {kind} {steps}: loss {loss:.3f}, probe {probed:.1f}, fine-tuned {tuned:.1f}"
        _, probes, scores = zip(*means.values(), strict=True)
        found, _ = spearmanr(probes, scores)
        yield f"{name}: rank correlation of probe and fine-tuned mIoU {found:.2f}, n = {len(means)}"


if __name__ == "__main__":
    main()

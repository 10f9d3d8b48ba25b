"""Does pretraining by denoising and inpainting help on thirty labelled CamVid frames? The answer is in README.md.

    python experiments/camvid_first/run.py --camvid camvid --out runs/camvid_first

For each seed: one pretraining, then three fine-tunings on the same thirty frames. Finished runs are not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

ARMS = {
    "scratch": [],
    "encoder": ["init={pretrained}"],
    "encoder+decoder": ["init={pretrained}", "transfer=encoder+denoise"],
}
# What the recipe has come to hold since.
AS_IT_WAS = [
    *("tasks.colorize=null", "tasks.jigsaw=null", "tasks.denoise.weight=1", "tasks.inpaint.weight=1"),
    "recalibrate=0",
]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--camvid", type=Path, required=True, help="the folder that holds CamVid")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = words.parse_args()
    rows = []
    for seed in given.seeds:
        pretrained = given.out / f"pretrained_{seed}"
        roots = [f"data.pool.root={given.camvid}", f"data.val.root={given.camvid}"]
        ssl_seg("pretrain", "camvid", *roots, *AS_IT_WAS, f"seed={seed}", "--out", pretrained)
        for arm, extra in ARMS.items():
            out = given.out / f"{arm}_{seed}"
            roots = [f"data.labelled.root={given.camvid}", f"data.val.root={given.camvid}"]
            started = [word.format(pretrained=pretrained) for word in extra]
            seeds = [f"seed={seed}", f"labels.seed={seed}"]
            ssl_seg("finetune", "camvid_labelled", *roots, *started, *seeds, "--out", out)
            scores = json.loads((out / "result.json").read_text())["val"]
            rows.append({"arm": arm, "seed": seed, **scores})
    write_table(rows, given.out / "scores.csv")
    print(summary(rows))


def ssl_seg(*words: object) -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "ssl_seg", *map(str, words)], check=True)
    print(f"{words[-1]}: {time.monotonic() - started:.0f} s", flush=True)


def write_table(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def summary(rows: list[dict]) -> str:
    """Per arm the mean and spread over seeds, and the paired gain over scratch, in points of mIoU."""
    scratch = {row["seed"]: row["miou"] for row in rows if row["arm"] == "scratch"}
    lines = []
    for arm in ARMS:
        scores = {row["seed"]: row["miou"] for row in rows if row["arm"] == arm}
        gains = [100 * (score - scratch[seed]) for seed, score in scores.items()]
        line = f"{arm:16} mIoU {100 * mean(scores.values()):.1f} (sd {spread([100 * s for s in scores.values()])})"
        lines.append(f"{line}, gain {mean(gains):+.1f} (sd {spread(gains)}), n = {len(scores)}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{stdev(values):.1f}" if len(values) > 1 else "-"


if __name__ == "__main__":
    main()

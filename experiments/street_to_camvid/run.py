"""Does a drawn street help on real ones, with pretext tasks or with its masks? See README.md.

    python -m experiments.street_to_camvid.run --camvid camvid --out runs/street_to_camvid --jobs 2

The drawn images are written once to <out>/street; the score of the network that has seen them alone is printed too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from experiments.paired import SCRATCH, Arm, cells, finetune_all, pretrain_all, scores, summary, write_table
from ssl_seg.worlds.street import Street

ARMS = {
    SCRATCH: Arm(),
    "tasks": Arm("tasks"),
    "tasks+decoder": Arm("tasks", "encoder+denoise"),
    "masks": Arm("masks"),
    "masks+decoder": Arm("masks", "encoder+segment"),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--camvid", type=Path, required=True, help="the folder that holds CamVid")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--count", type=int, default=2000, help="drawn images")
    words.add_argument("--pretraining-seeds", type=int, nargs="+", default=[0, 1])
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--labels", type=int, nargs="+", default=[10, 30])
    words.add_argument("--steps", type=int, nargs="+", default=[400, 1400], help="fine-tuning budgets")
    words.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    given = words.parse_args()
    street = given.out / "street"
    if not street.exists():
        command = [
            sys.executable,
            "-m",
            "ssl_seg",
            "synth",
            "street",
            "--count",
            str(given.count),
            "--out",
            str(street),
        ]
        subprocess.run(command, check=True)
    drawn = f"type: folder, images: {street}/images"
    labelled = f"{{{drawn}, masks: {street}/masks, classes: [{', '.join(Street().class_names)}]}}"
    val = f"data.val.root={given.camvid}"
    whole = ["labels.count=null", "train.steps=1500"]  # as many steps as the tasks get
    pretrainings = {
        "tasks": ["pretrain", "camvid", f"data.pool={{{drawn}}}", val],
        "masks": ["finetune", "camvid_labelled", f"data.labelled={labelled}", val, *whole],
    }
    pretrained = pretrain_all(pretrainings, given.pretraining_seeds, given.out, given.jobs)
    for seed in given.pretraining_seeds:
        print(f"drawn masks alone, seed {seed}: mIoU {100 * scores(pretrained['masks', seed])['miou']:.1f}")
    rows = []
    for steps in given.steps:
        wanted = cells(ARMS, given.pretraining_seeds, given.seeds, given.labels, steps)
        finetuning = ["camvid_labelled", f"data.labelled.root={given.camvid}", val]
        rows += finetune_all(wanted, ARMS, finetuning, pretrained, given.out, given.jobs)
        write_table(rows, given.out / "scores.csv")
        print(summary(rows, ARMS), flush=True)


if __name__ == "__main__":
    main()

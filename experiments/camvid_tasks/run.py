"""Do four pretext tasks together help more than each alone, on ten and thirty labelled CamVid frames? See README.md.

python -m experiments.camvid_tasks.run --camvid camvid --out runs/camvid_tasks --jobs 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.paired import SCRATCH, Arm, cells, finetune_all, pretrain_all, summary, write_table

TASKS = ("denoise", "inpaint", "colorize", "jigsaw")
ARMS = {
    SCRATCH: Arm(),
    **{task: Arm(task) for task in TASKS},
    "four": Arm("four"),
    "four+decoder": Arm("four", "encoder+denoise"),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--camvid", type=Path, required=True, help="the folder that holds CamVid")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--pretraining-seeds", type=int, nargs="+", default=[0, 1])
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--labels", type=int, nargs="+", default=[10, 30])
    words.add_argument("--steps", type=int, nargs="+", default=[400, 1400], help="fine-tuning budgets")
    words.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    given = words.parse_args()
    roots = {part: f"data.{part}.root={given.camvid}" for part in ("pool", "labelled", "val")}
    shared = ["pretrain", "camvid", roots["pool"], roots["val"]]
    pretrainings = {task: [*shared, *(f"tasks.{other}=null" for other in TASKS if other != task)] for task in TASKS}
    pretrainings["four"] = shared
    pretrained = pretrain_all(pretrainings, given.pretraining_seeds, given.out, given.jobs)
    rows = []
    for steps in given.steps:
        wanted = cells(ARMS, given.pretraining_seeds, given.seeds, given.labels, steps)
        rows += finetune_all(
            wanted, ARMS, ["camvid_labelled", roots["labelled"], roots["val"]], pretrained, given.out, given.jobs
        )
        write_table(rows, given.out / "scores.csv")
        print(summary(rows, ARMS), flush=True)


if __name__ == "__main__":
    main()

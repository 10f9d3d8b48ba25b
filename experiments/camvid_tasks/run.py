"""Do four pretext tasks together help more than each alone, on ten and thirty labelled CamVid frames? See README.md.

python -m experiments.camvid_tasks.run --camvid camvid --out runs/camvid_tasks --jobs 2
"""

from __future__ import annotations

from experiments.paired import SCRATCH, Arm, arguments, pretrain_all, run_budgets

TASKS = ("denoise", "inpaint", "colorize", "jigsaw")
ARMS = {
    SCRATCH: Arm(),
    **{task: Arm(task) for task in TASKS},
    "four": Arm("four"),
    "four+decoder": Arm("four", "encoder+denoise"),
}


def main() -> None:
    given = arguments(__doc__).parse_args()
    roots = {part: f"data.{part}.root={given.camvid}" for part in ("pool", "labelled", "val")}
    shared = ["pretrain", "camvid", roots["pool"], roots["val"]]
    pretrainings = {"four": shared}  # first, since it takes as long as three of the others
    for task in TASKS:
        pretrainings[task] = [*shared, *(f"tasks.{other}=null" for other in TASKS if other != task)]
    pretrained = pretrain_all(pretrainings, given.pretraining_seeds, given.out, given.jobs)
    run_budgets(given, ARMS, ["camvid_labelled", roots["labelled"], roots["val"]], pretrained)


if __name__ == "__main__":
    main()

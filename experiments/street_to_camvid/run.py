"""Does a drawn street help on real ones, with pretext tasks or with its masks? See README.md.

    python -m experiments.street_to_camvid.run --camvid camvid --out runs/street_to_camvid --jobs 2

The drawn images are written once to <out>/street; the score of the network that has seen them alone is printed too.
"""

from __future__ import annotations

import subprocess
import sys

from experiments.paired import SCRATCH, Arm, arguments, pretrain_all, run_budgets, scores

ARMS = {
    SCRATCH: Arm(),
    "tasks": Arm("tasks"),
    "tasks+decoder": Arm("tasks", "encoder+denoise"),
    "masks": Arm("masks"),
    "masks+decoder": Arm("masks", "encoder+segment"),
    "masks+model": Arm("masks", "model"),
    "masks+model_slow": Arm("masks", "model", ("train.lr=1e-4",)),  # a tenth, chosen on other frames: see README.md
}


def main() -> None:
    words = arguments(__doc__)
    words.add_argument("--count", type=int, default=2000, help="drawn images")
    given = words.parse_args()
    street = given.out / "street"
    if not street.exists():
        drawing = ["synth", "street", "--count", str(given.count), "--out", str(street)]
        subprocess.run([sys.executable, "-m", "ssl_seg", *drawing], check=True)
    drawn = f"type: folder, images: {street}/images"
    labelled = f"{{{drawn}, masks: {street}/masks}}"
    val = f"data.val.root={given.camvid}"
    whole = ["labels.count=null", "train.steps=1500"]  # as many steps as the tasks get
    pretrainings = {
        "tasks": ["pretrain", "camvid", f"data.pool={{{drawn}}}", val],
        "masks": ["finetune", "camvid_labelled", f"data.labelled={labelled}", val, *whole],
    }
    pretrained = pretrain_all(pretrainings, given.pretraining_seeds, given.out, given.jobs)
    for seed in given.pretraining_seeds:
        print(f"drawn masks alone, seed {seed}: mIoU {100 * scores(pretrained['masks', seed])['miou']:.1f}")
    run_budgets(given, ARMS, ["camvid_labelled", f"data.labelled.root={given.camvid}", val], pretrained)


if __name__ == "__main__":
    main()

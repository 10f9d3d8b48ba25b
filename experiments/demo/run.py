"""Does pretraining help on drawn streets with eight labelled images? Needs no data; `make demo` runs it.

python -m experiments.demo.run --out runs/demo
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from experiments.paired import SCRATCH, Arm, cells, finetune_all
from ssl_seg.tracking import read_record

ARMS = {SCRATCH: Arm(), "encoder": Arm("pretrained"), "encoder+decoder": Arm("pretrained", "encoder+denoise")}
# Scenes: those to pretrain on, those whose masks may be used, those that are scored. A seed of their own each, so that
# none is in two.
SCENES = {"pool": 500, "labelled": 32, "test": 40}
STEPS = 200  # of fine-tuning


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=Path("runs/demo"))
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--jobs", type=int, default=2, help="fine-tunings at a time, a core each")
    given = words.parse_args()
    started = time.monotonic()
    say("1 of 4: drawing street scenes")
    scenes = given.out.parent / f"{given.out.name}_scenes"
    for seed, (part, count) in enumerate(SCENES.items()):
        if not (scenes / part).exists():
            drawing = ["synth", "street", "--count", count, "--size", "128x96", "--seed", seed, "--out", scenes / part]
            ssl_seg(*drawing)
    say(f"2 of 4: pretraining by four tasks on {SCENES['pool']} scenes without masks")
    pretrained = given.out / "pretrained"
    parent = f"tracking.parent={given.out.name}"
    seen = [f"data.pool.images={scenes}/pool/images", f"data.val.images={scenes}/test/images"]
    ssl_seg("pretrain", "street", *seen, parent, "--out", pretrained)
    number = len(ARMS) * len(given.seeds)
    say(f"3 of 4: {number} fine-tunings on 8 labelled scenes each, {given.jobs} at a time")
    data = []
    for part, name in (("labelled", "labelled"), ("val", "test")):
        data += [f"data.{part}.{kind}={scenes}/{name}/{kind}" for kind in ("images", "masks")]
    wanted = cells(ARMS, [0], given.seeds, [8], STEPS)
    shared = ["street_labelled", *data, parent]
    finetune_all(wanted, ARMS, shared, {("pretrained", 0): pretrained}, given.out, given.jobs)
    say("4 of 4: the answer")
    ssl_seg("compare", given.out)
    ssl_seg("report", given.out)
    say(f"{time.monotonic() - started:.0f} seconds. The report is {given.out / 'report.html'}; all runs in MLflow:")
    print(f"   mlflow ui --backend-store-uri {next(iter(read_record(pretrained).runs), 'URI')}", flush=True)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def ssl_seg(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ssl_seg", *map(str, words)], check=True)


if __name__ == "__main__":
    main()

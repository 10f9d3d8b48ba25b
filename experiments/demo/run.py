"""Does pretraining help on drawn streets with eight labelled images? Needs no data; `make demo` runs it.

python -m experiments.demo.run --out runs/demo
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.paired import SCRATCH, Arm, cells, finetune_all
from ssl_seg.tracking.record import read_record

ARMS = {SCRATCH: Arm(), "encoder": Arm("pretrained"), "encoder+decoder": Arm("pretrained", "encoder+denoise")}
# Scenes: those to pretrain on, those whose masks may be used, those that are scored. A seed of their own each, so that
# none is in two.
SCENES = {"pool": 500, "labelled": 32, "test": 40}
STEPS = 200  # of fine-tuning


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=Path("runs/demo"))
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = words.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs at a time share two cores best with a thread each
    started = time.monotonic()
    say("1 of 4: drawing street scenes")
    scenes = given.out.parent / f"{given.out.name}_scenes"
    missing = [(seed, part) for seed, part in enumerate(SCENES) if not (scenes / part).exists()]
    with ThreadPoolExecutor(len(SCENES)) as together:
        for drawn in [together.submit(draw, part, seed, scenes / part) for seed, part in missing]:
            drawn.result()
    pretrained = given.out / "pretrained"
    parent = f"tracking.parent={given.out.name}"
    data = []
    for part, name in (("labelled", "labelled"), ("val", "test")):
        data += [f"data.{part}.{kind}={scenes}/{name}/{kind}" for kind in ("images", "masks")]

    def finetune(arms: dict[str, Arm], jobs: int) -> None:
        wanted = cells(arms, [0], given.seeds, [8], STEPS)
        words = ["street_labelled", *data, parent]
        finetune_all(wanted, arms, words, {("pretrained", 0): pretrained}, given.out, jobs)

    say(f"2 of 4: pretraining by four tasks on {SCENES['pool']} scenes without masks; beside it, runs from scratch")
    with ThreadPoolExecutor(1) as beside:
        from_scratch = beside.submit(finetune, {SCRATCH: ARMS[SCRATCH]}, jobs=1)
        seen = [f"data.pool.images={scenes}/pool/images", f"data.val.images={scenes}/test/images"]
        ssl_seg("pretrain", "street", *seen, parent, "--out", pretrained)
        from_scratch.result()
    say("3 of 4: fine-tunings of what was pretrained, on the same 8 labelled scenes each, two at a time")
    finetune(ARMS, jobs=2)  # those from scratch are finished, and not made again
    say("4 of 4: the answer")
    ssl_seg("compare", given.out)
    ssl_seg("report", given.out)
    say(f"{time.monotonic() - started:.0f} seconds. The report is {given.out / 'report.html'}; all runs in MLflow:")
    print(f"   mlflow ui --backend-store-uri {next(iter(read_record(pretrained).runs), 'URI')}", flush=True)


def draw(part: str, seed: int, folder: Path) -> None:
    ssl_seg("synth", "street", "--count", SCENES[part], "--size", "128x96", "--seed", seed, "--out", folder)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def ssl_seg(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ssl_seg", *map(str, words)], check=True)


if __name__ == "__main__":
    main()

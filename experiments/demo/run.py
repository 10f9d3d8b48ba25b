"""Does pretraining help on drawn streets with eight labelled images? Needs no data; `make demo` runs it.

python experiments/demo/run.py --out runs/demo
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

SCRATCH = "scratch"
TRANSFERS = {"encoder": "encoder", "encoder+decoder": "encoder+denoise"}  # of the arms that start from the pretraining
# Scenes: those to pretrain on, those whose masks may be used, those that are scored. A seed of their own each, so that
# none is in two.
SCENES = {"pool": 500, "labelled": 32, "test": 40}


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

    def finetune(arm: str, seed: int) -> None:
        start = [] if arm == SCRATCH else [f"init={pretrained}", f"transfer={TRANSFERS[arm]}"]
        seeds = [f"labels.seed={seed}", f"seed={seed}"]
        make(given.out / f"{arm}_s{seed}", "finetune", "street_labelled", *data, parent, *seeds, *start)

    say(f"2 of 4: pretraining by four tasks on {SCENES['pool']} scenes without masks; beside it, runs from scratch")
    with ThreadPoolExecutor(1) as beside:
        from_scratch = [beside.submit(finetune, SCRATCH, seed) for seed in given.seeds]
        seen = [f"data.pool.images={scenes}/pool/images", f"data.val.images={scenes}/test/images"]
        ssl_seg("pretrain", "street", *seen, parent, "--out", pretrained)
        for done in from_scratch:
            done.result()
    say("3 of 4: fine-tunings of what was pretrained, on the same 8 labelled scenes each, two at a time")
    with ThreadPoolExecutor(2) as together:
        for done in [together.submit(finetune, arm, seed) for seed, arm in product(given.seeds, TRANSFERS)]:
            done.result()
    say("4 of 4: the answer")
    ssl_seg("compare", given.out)
    ssl_seg("report", given.out)
    say(f"{time.monotonic() - started:.0f} seconds. The report is {given.out / 'report.html'}; all runs in MLflow:")
    shown = json.loads((pretrained / "tracking" / "mlflow.json").read_text())["runs"]
    print(f"   mlflow ui --backend-store-uri {next(iter(shown), 'URI')}", flush=True)


def draw(part: str, seed: int, folder: Path) -> None:
    ssl_seg("synth", "street", "--count", SCENES[part], "--size", "128x96", "--seed", seed, "--out", folder)


def make(folder: Path, *words: object) -> None:
    """A run of which only the score is shown; a finished one is not made again."""
    if (folder / "result.json").exists():
        return
    scores = ssl_seg(*words, "--out", folder, "--quiet", stdout=subprocess.PIPE).stdout
    print(f"{folder.name}: {scores.splitlines()[0]}", flush=True)
    shutil.rmtree(folder / "state")  # checkpoints: half a gigabyte over all runs


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def ssl_seg(*words: object, stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssl_seg", *map(str, words)]
    return subprocess.run(command, check=True, text=True, stdout=stdout)


if __name__ == "__main__":
    main()

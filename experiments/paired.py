"""Pretrainings, and fine-tunings paired with those from scratch: what several experiments here have in common.

Every run is a process of its own with a folder of its own; finished ones are not made again, so the same command goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from ssl_seg.evidence.pairs import Spread, paired

SCRATCH = "scratch"


@dataclass(frozen=True)
class Arm:
    """Where a fine-tuning's weights come from."""

    pretraining: str | None = None  # the name of one of the pretrainings
    transfer: str = "encoder"
    words: tuple[str, ...] = ()  # what else its runs are given


@dataclass(frozen=True)
class Cell:
    """One fine-tuning. Those that differ in `arm` and `pretraining_seed` alone are paired: same images, same draws."""

    arm: str
    pretraining_seed: int | None
    seed: int  # chooses the labelled images, their order and crops, and the first weights of the head
    labels: int
    steps: int

    @property
    def name(self) -> str:
        start = "" if self.pretraining_seed is None else f"_p{self.pretraining_seed}"
        return f"{self.arm}{start}_s{self.seed}_{self.labels}labels_{self.steps}steps"


def arguments(description: str) -> argparse.ArgumentParser:
    """The words that every experiment on CamVid takes."""
    words = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--camvid", type=Path, required=True, help="the folder that holds CamVid")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--pretraining-seeds", type=int, nargs="+", default=[0, 1])
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--labels", type=int, nargs="+", default=[10, 30])
    words.add_argument("--steps", type=int, nargs="+", default=[400, 1400], help="fine-tuning budgets")
    words.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    return words


def run_budgets(
    given: argparse.Namespace,
    arms: Mapping[str, Arm],
    words: Sequence[str],
    pretrained: Mapping[tuple[str, int], Path],
) -> None:
    """Make the fine-tunings of all arms, budget by budget; after each the table so far is written and printed."""
    rows = []
    for steps in given.steps:
        wanted = cells(arms, given.pretraining_seeds, given.seeds, given.labels, steps)
        rows += finetune_all(wanted, arms, words, pretrained, given.out, given.jobs)
        write_table(rows, given.out / "scores.csv")
        print(summary(rows, arms), flush=True)


def cells(
    arms: Mapping[str, Arm], pretraining_seeds: Sequence[int], seeds: Sequence[int], labels: Iterable[int], steps: int
) -> list[Cell]:
    """Every combination at one budget; from scratch there is no pretraining seed to vary."""
    made = []
    for count, seed, (name, arm) in product(labels, seeds, arms.items()):
        starts = pretraining_seeds if arm.pretraining else [None]
        made += [Cell(name, start, seed, count, steps) for start in starts]
    return made


def pretrain_all(
    pretrainings: Mapping[str, Sequence[str]], seeds: Sequence[int], out: Path, jobs: int
) -> dict[tuple[str, int], Path]:
    """The run folder of each pretraining and seed. Its words begin with the stage: `pretrain`, or `finetune`."""
    folders = {(name, seed): out / f"{name}_p{seed}" for name, seed in product(pretrainings, seeds)}
    runs = [([*pretrainings[name], f"seed={seed}"], folder) for (name, seed), folder in folders.items()]
    run_all(runs, jobs)
    return folders


def finetune_all(
    wanted: Sequence[Cell],
    arms: Mapping[str, Arm],
    words: Sequence[str],
    pretrained: Mapping[tuple[str, int], Path],
    out: Path,
    jobs: int,
) -> list[dict]:
    """Make the cells' runs, each with `words`; gives a row of scores for each cell."""
    runs = []
    for cell in wanted:
        arm = arms[cell.arm]
        given = [f"labels.count={cell.labels}", f"labels.seed={cell.seed}", f"seed={cell.seed}"]
        given += [f"train.steps={cell.steps}"]
        if arm.pretraining:
            given += [f"init={pretrained[arm.pretraining, cell.pretraining_seed]}", f"transfer={arm.transfer}"]
        given += arm.words
        runs.append((["finetune", *words, *given], out / cell.name))
    run_all(runs, jobs)
    return [{**vars(cell), "device": device_of(out / cell.name), **scores(out / cell.name)} for cell in wanted]


def device_of(folder: Path) -> str:
    """`cpu` or `cuda`: what the run was made on, for scores of the two differ in more than the last digits."""
    return json.loads((folder / "run.json").read_text())["device"].rpartition(" ")[2]


def scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["val"]


def run_all(runs: Sequence[tuple[Sequence[str], Path]], jobs: int) -> None:
    """Run those that have no result yet, `jobs` at a time; raises the first failure after the others have ended."""
    left = [(words, folder) for words, folder in runs if not (folder / "result.json").exists()]
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(ssl_seg, words, folder, alone=jobs == 1) for words, folder in left]
        for number, done in enumerate(as_completed(started), start=1):
            print(f"{number} of {len(left)}: {done.result()}", flush=True)


def ssl_seg(words: Sequence[str], folder: Path, alone: bool) -> str:
    """Make one run; gives its name, score and time in words."""
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several runs share the cores best with a thread each.
    environment = os.environ if alone else {**os.environ, "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "ssl_seg", *words, "--out", str(folder), "--quiet"]
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: exit {done.returncode}, see {folder.with_suffix('.log')}")
    shutil.rmtree(folder / "state", ignore_errors=True)  # checkpoints: gigabytes, over so many runs
    miou = scores(folder).get("miou")
    scored = "" if miou is None else f"mIoU {miou:.4f}, "
    return f"{folder.name}: {scored}{time.monotonic() - started:.0f} s"


def write_table(rows: Sequence[Mapping], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def summary(rows: Sequence[Mapping], arms: Iterable[str]) -> str:
    """A table a budget and number of labels: per arm its mIoU and its paired gain over scratch, in points.

    n counts runs; a gain is one a seed, the runs of several pretrainings by their mean, as `ssl-seg compare` has it.
    """
    lines = []
    for steps, labels in sorted({(row["steps"], row["labels"]) for row in rows}):
        own = [row for row in rows if (row["steps"], row["labels"]) == (steps, labels)]
        lines += ["", f"{labels} labels, {steps} steps", "", "| arm | mIoU (sd) | gain (sd) | least, most | n |"]
        lines.append("|---|---|---|---|---|")
        by_seed = {arm: _by_seed([row for row in own if row["arm"] == arm]) for arm in arms}
        for arm in arms:
            values = [value for of_seed in by_seed[arm].values() for value in of_seed]
            shown = "| | |" if arm == SCRATCH else _gain(paired(by_seed[SCRATCH], by_seed[arm]))
            lines.append(f"| {arm} | {spread(values, '.1f')} {shown} {len(values)} |")
    return "\n".join(lines[1:])


def _by_seed(rows: Iterable[Mapping]) -> dict[int, list[float]]:
    """mIoU in points."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(100 * row["miou"])
    return found


def _gain(gain: Spread | None) -> str:
    if gain is None:
        return "| | |"
    return f"| {spread(gain.values, '+.1f')} | {min(gain.values):+.1f}, {max(gain.values):+.1f} |"


def spread(values: Sequence[float], form: str) -> str:
    deviation = f" ({stdev(values):.1f})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"

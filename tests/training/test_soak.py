"""A run of 2,000 steps: its memory and its open files stay what they were."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from ssl_seg.config import load
from ssl_seg.data.synth import synth
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.runs.folder import read_metrics
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.setup import Options
from tests.processes import Child
from tests.small import MODEL, UNTRACKED

STEPS = 2_000
SETTLED = 500  # steps, after which images are cached, all kinds of step were made and the allocator has its pools
EVERY = 0.5  # seconds between two looks
GROWTH = 0.02  # what is allowed, from the first hundreds of steps after that to the last


class Look(NamedTuple):
    """What a run and its workers hold, `memory` in bytes, after `step` steps."""

    step: int
    memory: int
    handles: int


def config_of(folder: Path, workers: int) -> dict[str, Any]:
    """Joint training with unequal batches, on files: three pretext tasks, pseudo-labels, evaluations and saves."""
    drawn = {"type": "folder", "images": str(folder / "images"), "masks": str(folder / "masks")}
    return {
        "data": {"labelled": drawn, "val": drawn, "pool": drawn},
        "model": MODEL,
        "augment": {"crop": [32, 32]},
        "tasks": {"denoise": {}, "inpaint": {}, "colorize": {}, "unimatch": {"confidence": 0.0}},
        "train": {
            "steps": STEPS,
            "batch_size": {"labelled": 3, "pool": 6},
            "ema": 0.9,
            "workers": workers,
            "save_every": 100,
            "eval_every": 200,
            "log_every": 10,
            "device": "cpu",
        },
        "leaks": {"check": False},
        "tracking": UNTRACKED,
    }


def train(values: dict[str, Any], folder: Path) -> None:
    finetune(load(FinetuneConfig, values), Options(folder, quiet=True))


def look(process: psutil.Process, folder: Path) -> Look:
    own = [process, *process.children(recursive=True)]
    lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return Look(
        int(lines[-1]["step"]) if lines else 0,
        sum(each.memory_info().rss for each in own),
        sum(each.num_fds() for each in own),
    )


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_and_open_files_stay_what_they_were(workers: int, tmp_path: Path) -> None:
    synth(load(Synthetic, {"kind": {"type": "shapes"}, "count": 16, "size": [48, 64]}), tmp_path / "drawn", quiet=True)
    child = Child(train, config_of(tmp_path / "drawn", workers), tmp_path / "run")
    process = psutil.Process(child.pid)
    looks = []
    while child.poll() is None:
        try:
            looks.append(look(process, tmp_path / "run"))
        except psutil.NoSuchProcess:  # a worker, or the run itself, has just ended
            continue
        time.sleep(EVERY)
    stdout, stderr = child.communicate()
    assert child.returncode == 0, stdout + stderr
    early = [own for own in looks if SETTLED <= own.step < 2 * SETTLED]
    late = [own for own in looks if STEPS - SETTLED <= own.step < STEPS]
    assert min(len(early), len(late)) > 10
    held = [statistics.median(own.memory for own in part) for part in (early, late)]
    print(f"\n{workers} workers: {held[0] / 2**20:.0f} MiB, then {held[1] / 2**20:.0f}")
    assert held[1] < (1 + GROWTH) * held[0]
    assert max(own.handles for own in late) <= max(own.handles for own in early)

"""How long `compare` takes over 500 runs. Printed, never asserted: `make bench`. The aim is under 5 seconds."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssl_seg.scores import ImageConfusions, Row
from tests.evidence.test_compare import CONFIG, PRETRAINING, laid
from tests.evidence.test_passport import write_scored

pytestmark = pytest.mark.slow
CLASSES = tuple(f"class {number}" for number in range(11))
IMAGES, SHOWN = 101, 45  # as CamVid's validation frames: cells of an image that hold pixels
SEEDS = 10


def like_camvid(seed: int) -> ImageConfusions:
    random = np.random.default_rng(seed)
    rows = []
    for index in range(IMAGES):
        cell = np.sort(random.choice(len(CLASSES) ** 2, SHOWN, replace=False))
        count = random.integers(1, 9000, SHOWN)
        rows.append(Row(index, f"val/0016E5_{index:05d}.png", cell, count, count // 6, f"{index:064d}"))
    return ImageConfusions.from_rows(CLASSES, rows)


def test_five_hundred_runs(tmp_path: Path) -> None:
    """25 groups from scratch and 25 pretrained, 10 seeds each, with their images; a process of its own, imports too."""
    for number in range(500):
        labels, rest = divmod(number, 2 * SEEDS)
        pretrained, seed = divmod(rest, SEEDS)
        config = laid(CONFIG, {"labels.count": labels + 1, "seed": seed, "init": "runs/pre" if pretrained else None})
        origin = {"stage": "pretrain", "config": PRETRAINING, "origin": None} if pretrained else None
        write_scored(tmp_path / f"run_{number}", {"val": like_camvid(number)}, config=config, origin=origin)
    for words in ([], ["--verify"]):
        started, spent = time.perf_counter(), _spent()
        subprocess.run(
            [sys.executable, "-m", "ssl_seg", "compare", str(tmp_path), *words], capture_output=True, check=True
        )
        taken = f"{time.perf_counter() - started:.1f} s, {_spent() - spent:.1f} s of a processor"
        print(f"\n{' '.join(['compare of 500 runs', *words])}: {taken}")


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

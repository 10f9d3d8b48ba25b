"""Figures of a short run, kept: a change of any default, draw or formula shows here as a change one can read.

To accept a change: `python -m tests.test_golden`, and say in the commit why the figures moved.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from ssl_seg.config import load
from ssl_seg.runs.folder import read_metrics
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from tests import GOLDEN
from tests.small import pretraining

KEPT = GOLDEN / "pretraining.json"


def losses(folder: Path) -> list[dict[str, float]]:
    values = pretraining(steps=4, lr=1e-4)
    values["tasks"] = {name: {} for name in ("denoise", "inpaint", "colorize", "jigsaw", "rotate")}
    values["model"] = {**values["model"], "decoder": {"type": "unet", "channels": [32, 16, 16, 8, 8]}}
    pretrain(load(PretrainConfig, values), Options(folder, quiet=True))
    lines = read_metrics(folder)
    return [{name: line[name] for name in sorted(line) if name.startswith("train/")} for line in lines]


def test_the_first_losses_are_those_that_were_kept(tmp_path: Path) -> None:
    kept = json.loads(KEPT.read_text())
    for line, expected in zip(losses(tmp_path / "run"), kept, strict=True):
        assert line == pytest.approx(expected, rel=1e-3)  # other CPUs round differently


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kept = [{name: round(value, 5) for name, value in line.items()} for line in losses(Path(folder) / "run")]
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")

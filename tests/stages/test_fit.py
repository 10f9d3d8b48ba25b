"""Evaluators: each at its own cadence, and once more after the last step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssl_seg.config import load
from ssl_seg.runs.folder import read_metrics
from ssl_seg.runs.writer import Run
from ssl_seg.stages.fit import Evaluator, Job, drawing, fit
from ssl_seg.stages.pretrain import PretrainConfig, assemble, resolve
from ssl_seg.training.processes import Processes
from tests.small import pretraining


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4, 5]), (None, [5]), (5, [5]), (3, [3, 5])])
def test_an_evaluator_is_asked_at_its_own_cadence_and_at_the_end(
    tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    config, start = resolve(load(PretrainConfig, pretraining(steps=5)))
    processes = Processes(config.train)
    asked: list[int] = []

    def measure(step: int) -> dict[str, float]:
        asked.append(step)
        return {"val/probe": step / 10}

    with Run.open(tmp_path / "run", "pretrain", config) as run:
        learner, sources = assemble(config, start, processes, run, quiet=True)
        picture = {"seen": np.zeros((4, 4, 3), dtype=np.uint8)}
        evaluators = {"probe": Evaluator(measure, every), "pictures": drawing(run, processes, lambda: picture, 4)}
        assert fit(Job(run, learner, sources, 0, evaluators, quiet=True).resume()) == 5
    assert asked == steps
    found = {line["step"]: line["val/probe"] for line in read_metrics(tmp_path / "run") if "val/probe" in line}
    assert found == {step: step / 10 for step in steps}
    drawn = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert drawn == [f"{step:08d}_seen.png" for step in (0, 4, 5)]

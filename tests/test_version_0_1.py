"""Folders that version 0.1 has written can be gone on with, started from, compared and reported.

`fixtures/v0_1` holds what its commands left (`pre.yaml`, `fine.yaml`, `study.yaml` with the plug-in `narrow.py`), less
pictures, locks, the study's weights and the last checkpoints. The runs were finished, so what they say of steps 4 to 6
is what a run that goes on from step 3 has to find again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ssl_seg.calibration import Confidences
from ssl_seg.cli import main
from ssl_seg.config import load, read_words, use_plugin
from ssl_seg.evidence.compare import compare
from ssl_seg.evidence.passport import verify
from ssl_seg.evidence.results import read
from ssl_seg.reports import runs, study
from ssl_seg.studies.config import StudyConfig
from ssl_seg.studies.plan import make_plan
from ssl_seg.weights.export import load_model
from tests import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "v0_1"
CUT = 3  # the step of the checkpoints that were kept


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which 0.1 was at work, as working directory."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.chdir(folder)
    return folder


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--plugin", "narrow.py", "--quiet"])
    return ended.value.code


def lines_of(run: Path) -> dict[int, dict[str, float]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "train/loss" in line}


def interrupt(run: Path) -> None:
    """Make the folder that of a run which was killed after its checkpoint."""
    for part in ("encoder", "decoders", "model"):
        shutil.rmtree(run / part, ignore_errors=True)
    for name in ("result.json", "confusion.json", "confusion_images.safetensors", "extremes.json"):
        (run / name).unlink(missing_ok=True)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "killed"}))
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= CUT]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pretrained", ("pretrain", "pre.yaml")),
        ("encoder", ("finetune", "fine.yaml", "init=runs/pretrained")),
    ],
)
def test_a_run_goes_on_as_it_would_have_then(old: Path, name: str, words: tuple[str, ...]) -> None:
    run = old / "runs" / name
    result, lines = json.loads((run / "result.json").read_text()), lines_of(run)
    interrupt(run)
    assert command(*words, "--out", f"runs/{name}") == 0
    again = lines_of(run)
    assert again.keys() == lines.keys() == {1, 2, 3, 4, 5, 6}
    for step, line in lines.items():
        # Not to the bit: the fixture was made with the versions of one machine; the lowest are 6e-4 away.
        assert again[step]["train/loss"] == pytest.approx(line["train/loss"], rel=2e-3)
    scores = json.loads((run / "result.json").read_text())["val"]
    untold = [name for name in scores if name.endswith("/learnt") or name in Confidences.none().named()]
    known = {name: value for name, value in scores.items() if name not in untold}  # what 0.1 told too
    assert known == pytest.approx(result["val"], rel=1e-3, abs=1e-3)
    (start,) = json.loads((run / "run.json").read_text())["resumed"]
    assert start["versions"]["ssl_seg"] == "0.1.0"


def test_weights_are_known_again(old: Path) -> None:
    assert command("finetune", "fine.yaml", "init=runs/pretrained", "transfer=encoder+denoise", "--out", "runs/x") == 0
    receipts = json.loads((old / "runs" / "x" / "receipts.json").read_text())
    assert {part: receipt["share"] for part, receipt in receipts.items()} == {"encoder": 1.0, "decoder": 1.0}
    assert receipts["encoder"]["features_equal"]
    model, _ = load_model(old / "runs" / "encoder")
    assert model.class_names == ("background", "square")


def test_runs_and_a_study_are_compared_and_reported(old: Path) -> None:
    found = compare([old / "runs" / "pretrained", old / "runs" / "scratch", old / "runs" / "encoder"])
    assert [arm.label for arm in found.arms] == ["pretrain", "scratch", "pretrained"]
    assert found.gain(found.arms[2], "val/miou").n == 1
    assert verify(old / "runs" / "encoder").figures > 0
    assert "Too few runs to tell" in runs.report([old / "runs" / "scratch", old / "runs" / "encoder"]).headline
    results = read(old / "runs" / "study")
    assert [sum(bool(run.scores) for run in arm.at(results.conditions[0])) for arm in results.arms] == [2, 2]
    assert "Too few runs to tell (n = 2)" in study.report([old / "runs" / "study"]).headline


def test_the_cells_of_a_study_keep_their_names(old: Path) -> None:
    """A key that is new must not make them others: the study would train all of them again."""
    use_plugin("narrow.py")
    plan = make_plan(load(StudyConfig, read_words(["study.yaml"])), (old / "runs" / "study").resolve())
    made = {path.name for path in (old / "runs" / "study" / "cells").iterdir() if path.is_dir()}
    assert {cell.id for cell in plan.cells} == made

"""Studies of real runs: made once, taken up again, with cells that raise, crash, hang and are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_seg.config import load, use_plugin
from ssl_seg.runs.lock import hold
from ssl_seg.studies import executor
from ssl_seg.studies.config import StudyConfig
from ssl_seg.studies.plan import make_plan
from ssl_seg.studies.study import StudyOptions, leak_question, outline, study
from tests.faults import message_of
from tests.small import finetuning, pretraining

PLUGIN = "tests/small.py"


def short(values: dict[str, Any]) -> dict[str, Any]:
    """Without what a test of studies need not wait for."""
    return {**values, "train": {**values["train"], "steps": 2, "save_every": None, "log_every": 1}}


def values(**keys: Any) -> dict[str, Any]:
    return {
        "finetune": short(finetuning()),
        "pretrain": {"two": short(pretraining())},
        "arms": {"scratch": {}, "encoder": {"init": "two"}},
        "seeds": 1,
        **keys,
    }


def options(out: Path, **keys: Any) -> StudyOptions:
    return StudyOptions(out, jobs=2, plugins=(PLUGIN,), quiet=True, **keys)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "study.json").read_text())


def test_a_study_makes_its_cells_once_and_pairs_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "study"
    config = load(StudyConfig, values())
    assert "2 cells, 0 of them finished" in outline(config, out)
    assert not out.exists()
    found = study(config, options(out))
    assert [arm.label for arm in found.arms] == ["scratch", "encoder"]
    assert found.gains[0].n == 1
    images = [json.loads((cell.run.folder / "split.json").read_text())["labelled"] for cell in found.cells]
    assert images[0] == images[1]
    assert found.cells[1].run.record["origin"]["config"]["seed"] == 0
    assert record(out)["status"] == "finished"
    assert (out / "cells.csv").read_text().count("\n") == 3
    assert not list(out.glob("cells/*/state"))

    made = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    assert len(made) == 3
    again = study(load(StudyConfig, values(baseline="encoder")), options(out))  # another question to the same cells
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")} == made
    assert again.gains[0].mean == pytest.approx(-found.gains[0].mean)
    assert record(out)["resumed"]

    (out / "study.json").write_bytes((out / "study.json").read_bytes()[:300])  # the rest is lost
    rebuilt = study(config, options(out))
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")} == made
    assert rebuilt.gains[0].mean == found.gains[0].mean


def test_a_study_that_has_scores_keeps_its_question(tmp_path: Path) -> None:
    out = tmp_path / "study"
    asked = {"contrasts": {"encoder": "scratch"}}
    write_study(out, config={"primary": {**asked, "at": {}}})
    for other in ({}, {"primary": {"contrasts": {"scratch": "encoder"}}}):
        said = message_of(lambda own=other: study(load(StudyConfig, values(**own)), options(out)))
        assert said.startswith('primary: they were {"contrasts": {"encoder": "scratch"}, "at": {}} before this study')
    write_study(out)
    assert "primary: none were named" in message_of(
        lambda: study(load(StudyConfig, values(primary=asked)), options(out))
    )


def write_study(out: Path, **record: Any) -> None:
    """A study with one cell, which has finished."""
    out.mkdir(exist_ok=True)
    cell = {"id": "one", "arm": "scratch", "condition": {}, "seed": 0, "start": None}
    about = {"baseline": "scratch", "axes": {}, "seeds": [0], "level": 0.95}
    arms = [{"name": "scratch", "changes": {}}, {"name": "encoder", "changes": {}}]
    cells = [{**cell, "status": "finished", "message": "", "seconds": 1.0}]
    (out / "study.json").write_text(json.dumps({**about, "arms": arms, "cells": cells, **record}))


def test_a_study_lets_its_own_cut_pass_as_a_run_does(tmp_path: Path) -> None:
    base = short(finetuning())
    images = base["data"].pop("labelled")
    for val, cuts in ((None, {("labelled", "val")}), ({**images, "seed": 9}, set())):
        config = load(StudyConfig, values(finetune={**base, "data": {**base["data"], "labelled": images, "val": val}}))
        assert leak_question(make_plan(config, tmp_path)).own_cuts == cuts


def test_a_study_learns_other_masks_first(tmp_path: Path) -> None:
    first = short(finetuning())
    first["data"] = {"labelled": {**first["data"]["labelled"], "seed": 11}, "val": {**first["data"]["val"], "seed": 12}}
    arms = {"scratch": {}, "whole": {"init": "other", "transfer": "model"}}
    config = load(StudyConfig, values(pretrain={"other": first}, arms=arms))
    question = leak_question(make_plan(config, tmp_path))
    assert {name: own.seed for name, own in question.trained.items() if own} == {
        "other.labelled": 11,
        "other.val": 12,  # it has chosen the weights
        "labelled": 5,
    }
    found = study(config, options(tmp_path / "study"))
    assert [arm.from_scratch for arm in found.arms] == [True, False]
    assert found.gains[0].n == 1
    receipts = json.loads((found.cells[1].run.folder / "receipts.json").read_text())
    assert list(receipts) == ["model"]
    assert receipts["model"]["share"] == 1
    assert "pretraining other" in (tmp_path / "study" / "report.html").read_text()


def test_images_that_chose_nothing_are_not_learnt(tmp_path: Path) -> None:
    first = {**short(finetuning()), "select": "last"}
    config = load(StudyConfig, values(pretrain={"other": first}, arms={"scratch": {}, "b": {"init": "other"}}))
    question = leak_question(make_plan(config, tmp_path))
    assert "other.val" not in question.trained
    assert "other.test" not in question.trained


@pytest.mark.slow
def test_a_study_goes_on_without_its_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Cut, lost, a pipe or of another kind: the cells are there, and each knows its config."""
    out = tmp_path / "study"
    config = load(StudyConfig, values(pretrain={}, arms={"scratch": {}, "wide": {"train.lr": 0.01}}))
    found = study(config, options(out))
    seconds = {own["id"]: own["seconds"] for own in record(out)["cells"]}
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    assert len(made) == 2
    whole = (out / "study.json").read_bytes()
    for fault in ("cut", "lost", "empty", "pipe"):
        (out / "study.json").unlink()
        if fault == "pipe":
            os.mkfifo(out / "study.json")
        elif fault != "lost":
            (out / "study.json").write_bytes(whole[:200] if fault == "cut" else b"")
        capsys.readouterr()
        again = study(config, StudyOptions(out, jobs=2, plugins=(PLUGIN,)))
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "was lost or damaged" in line] == [
            f"{out / 'study.json'}: was lost or damaged, and is made anew; 2 runs have finished already"
        ]
        assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")} == made
        assert again.gains[0].mean == found.gains[0].mean
        now = record(out)
        assert now["status"] == "finished"
        assert {own["id"]: own["seconds"] for own in now["cells"]}.keys() == seconds.keys()
        assert all(own["seconds"] for own in now["cells"])
        assert now["resumed"][0]["seeds"] == [0], "what tells a later start that seeds were added"
    assert (out / "study.json.damaged").is_fifo()


TRAPS = '''
import os, time
from pathlib import Path
from tests.small import Textured

class Trap(Textured):
    """Raises, crashes or hangs where it is read, as long as the file `armed` is there."""
    mode: str = "none"
    armed: str = ""

    def read(self, index):
        if Path(self.armed).exists():
            if self.mode == "raise":
                raise RuntimeError("a bug of a plug-in")
            if self.mode == "crash":
                os.kill(os.getpid(), 9)
            if self.mode == "hang":
                time.sleep(600)
        return super().read(index)
'''


@pytest.mark.slow
def test_cells_that_raise_crash_or_hang_are_told_of_and_made_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "PATIENCE", 25.0)
    plugin, armed, out = tmp_path / "traps.py", tmp_path / "armed", tmp_path / "study"
    plugin.write_text(TRAPS)
    armed.touch()
    base = short(finetuning())
    base["data"] = {**base["data"], "test": {"type": "trap", "count": 3, "seed": 7, "armed": str(armed)}}
    base["leaks"] = {"check": False}  # which reads the images in the study's own process
    arms = {mode: {"data.test.mode": mode} for mode in ("fine", "raise", "crash", "hang")}
    use_plugin(str(plugin))
    config = load(StudyConfig, values(finetune=base, arms=arms, timeout=60.0, stall=25.0))
    given = StudyOptions(out, jobs=2, plugins=(str(plugin),), quiet=True)
    said = message_of(lambda: study(config, given))
    assert said.startswith(f"{out}: 3 of 4 cells have not finished, first ")
    states = {own["arm"]: own for own in record(out)["cells"]}
    assert {arm: own["status"] for arm, own in states.items()} == {
        "fine": "finished",
        "raise": "failed",
        "crash": "failed",
        "hang": "stalled",
    }
    assert "a bug of a plug-in" in states["raise"]["message"]
    assert states["crash"]["message"].startswith("killed by signal 9")
    assert "no sign of life" in states["hang"]["message"]
    assert (out / "cells.csv").read_text().count("finished") == 1
    made = (out / "cells" / states["fine"]["id"] / "result.json").stat().st_mtime_ns
    armed.unlink()
    study(config, given)
    assert {own["status"] for own in record(out)["cells"]} == {"finished"}
    assert (out / "cells" / states["fine"]["id"] / "result.json").stat().st_mtime_ns == made


@pytest.mark.slow
def test_a_cell_that_a_hung_process_holds_does_not_hold_up_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "PATIENCE", 20.0)
    out = tmp_path / "study"
    config = load(StudyConfig, values(arms={"scratch": {}, "wide": {"train.lr": 0.01}}, stall=20.0))
    held = next(cell for cell in make_plan(config, out).cells if cell.arm == "wide")
    with hold(out / "cells" / held.id):
        (out / "study.json").write_text("{}")
        said = message_of(lambda: study(config, options(out)))
    assert f"process {os.getpid()} holds it and shows no sign of life" in said
    assert {own["arm"]: own["status"] for own in record(out)["cells"]} == {"scratch": "finished", "wide": "stalled"}
    study(config, options(out))
    assert {own["status"] for own in record(out)["cells"]} == {"finished"}


def start(out: Path, config: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ssl_seg", "study", str(config), "--out", str(out), "--jobs", "2", *words]
    return subprocess.Popen([*command, "--plugin", PLUGIN], stderr=subprocess.PIPE, text=True)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_killed_goes_on_where_it_was(tmp_path: Path, number: int) -> None:
    out, config = tmp_path / "study", tmp_path / "study.yaml"
    long = {**finetuning(), "train": {**finetuning()["train"], "steps": 120, "save_every": 20}}
    config.write_text(json.dumps(values(finetune=long, arms={"scratch": {}, "wide": {"train.lr": 0.01}}, seeds=2)))
    first = start(out, config)
    wait_for(lambda: list(out.glob("cells/*/state/step*")))
    first.send_signal(number)
    first.communicate()
    assert first.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert record(out)["status"] == "killed"
        assert {own["status"] for own in record(out)["cells"]} <= {"waiting", "finished"}
        running = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False)
        assert running.stdout == ""
    again = start(out, config)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert {own["status"] for own in record(out)["cells"]} == {"finished"}
    lines = [path.read_text().splitlines() for path in out.glob("cells/*/metrics.jsonl")]
    assert [len({json.loads(line)["step"] for line in own}) for own in lines] == [120] * 4
    assert [len(own) for own in lines] == [120] * 4  # no step twice, none lost

"""Run folders as others read them: pipes and links in the place of files, and folders of other users."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_seg import files, images
from ssl_seg.config import Config, UserError
from ssl_seg.reports import report
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.runs.folder import RunFolder, find_runs, read_metrics
from ssl_seg.runs.lock import hold, holder_of, is_held
from ssl_seg.runs.writer import Run
from tests.faults import message_of
from tests.processes import Child


class Settings(Config):
    lr: float = 1e-3


def written(folder: Path) -> Path:
    """A run with two checkpoints and all that reports look at."""
    with Run.open(folder, "finetune", Settings()) as run:
        for step in (1, 2):
            run.metrics(step, {"val/miou": step / 10})
            run.save_state(step, {"weight": torch.full((2,), float(step))}, {"best": step})
        images.write_image(run.picture_path("predictions", 2), np.zeros((8, 8, 3), dtype=np.uint8))
        run.write_json("result.json", {"steps": 2, "val": {"miou": 0.4}})
    return folder


def in_place_of(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_one_line_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    template = written(tmp_path / "template")
    for name in ("run.json", "result.json", "metrics.jsonl"):
        folder = tmp_path / kind / name
        shutil.copytree(template, folder)
        in_place_of(folder / name, kind)
        said = message_of(lambda folder=folder: report([folder]))
        assert str(folder / name) in said
        assert "a pipe, a device or a folder, and no file" in said or "Invalid argument" in said
    folder = tmp_path / kind / "picture"
    shutil.copytree(template, folder)
    in_place_of(folder / "pictures" / "00000002_predictions.png", kind)
    assert RunFolder(folder).pictures() == []


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_run_goes_on_past_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    for name in ("manifest.json", "state.json", "state.safetensors"):
        folder = written(tmp_path / name)
        newest = folder / "state" / "step_00000002"
        in_place_of(newest / name, kind)
        state = load_state(folder)
        assert (state.step, state.skipped) == (1, [str(newest / name)])
    folder = written(tmp_path / "metrics")
    in_place_of(folder / "metrics.jsonl", kind)
    with Run.open(folder, "finetune", Settings()) as run:
        assert str(folder / "metrics.jsonl") in message_of(run.resume)
        assert str(folder / "metrics.jsonl") in message_of(lambda: run.metrics(3, {"val/miou": 0.5}))
    folder = written(tmp_path / "lock")
    in_place_of(folder / "lock", kind)
    assert not is_held(folder)
    assert str(folder) in message_of(lambda: Run.open(folder, "finetune", Settings()))


def test_what_a_run_writes_stays_in_its_folder(tmp_path: Path) -> None:
    """A folder may be a stranger's, with links by the names of what is written next."""
    mine = tmp_path / "mine"
    mine.write_text("all I have")
    folder = written(tmp_path / "run")
    for name in ("lock", "metrics.jsonl", f"{files.NEW}run.json", f"{files.NEW}report.html"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine)
    report([folder], folder / "report.html")
    message_of(lambda: Run.open(folder, "finetune", Settings()))
    (folder / "lock").unlink()
    with Run.open(folder, "finetune", Settings()) as run:
        message_of(lambda: run.metrics(3, {"val/miou": 0.5}))
    assert mine.read_text() == "all I have"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_pictures_behind_a_link_are_not_shown(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    shutil.move(folder / "pictures", tmp_path / "private")
    (folder / "pictures").symlink_to(tmp_path / "private")
    assert RunFolder(folder).pictures() == []
    os.rename(tmp_path / "private", folder / "kept")
    (folder / "pictures").unlink()
    (folder / "pictures").symlink_to(folder / "kept")
    assert len(RunFolder(folder).pictures()) == 1, "a link that stays inside leads nowhere else"


def test_the_lock_tells_who_holds_a_folder(tmp_path: Path) -> None:
    assert holder_of(tmp_path) is None
    with hold(tmp_path):
        assert holder_of(tmp_path) == str(os.getpid())
    assert holder_of(tmp_path) is None
    assert (tmp_path / "lock").read_text() == str(os.getpid()), "a number alone holds nothing"


def look_as_another(folder: Path) -> None:
    """What a user without rights is told of each folder."""
    actions: dict[str, Callable[[Path], object]] = {
        "compare": lambda run: find_runs([run]),
        "report": lambda run: report([run], Path("/dev/null") / "page.html"),
        "metrics": read_metrics,
        "pictures": lambda run: RunFolder(run).pictures(),
        "go on": lambda run: Run.open(run, "finetune", Settings()),
    }
    for action in actions.values():
        _told(lambda action=action: action(folder / "open"))  # once before, for what is imported late
    os.setresuid(65534, 65534, 65534)
    for place in sorted(folder.iterdir()):
        for name, action in actions.items():
            print(f"{place.name} {name}: {_told(lambda place=place, action=action: action(place))}")


def _told(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "fine"


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become another user")
def test_a_folder_of_another_user_is_one_line(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as place:  # which others may enter, as they may not enter tmp_path
        os.chmod(place, 0o755)
        for name in ("closed", "file", "listed", "open", "pictures"):
            written(Path(place, name))
        os.chmod(Path(place, "closed"), 0o700)
        os.chmod(Path(place, "listed"), 0o744)
        os.chmod(Path(place, "file", "run.json"), 0o600)
        os.chmod(Path(place, "pictures", "pictures"), 0o700)
        child = Child(look_as_another, Path(place))
        said, errors = child.communicate()
        assert child.returncode == 0, errors
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert len(lines) == 25, said
    fine = {words for words, text in lines.items() if text == "fine"}
    assert fine == {"open compare", "open metrics", "open pictures", "file metrics", "file pictures"} | {
        "pictures compare",
        "pictures metrics",
    }
    assert all("Permission denied" in text or "Not a directory" in text for text in lines.values() if text != "fine")

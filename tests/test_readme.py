"""Every block of the README runs, in the order in which a reader meets it, in an empty folder."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ssl_seg import PretrainConfig, images, load
from ssl_seg.datasets.synthetic import Synthetic
from tests import ROOT
from tests.processes import Child, command, start_torchrun
from tests.test_docs import calls

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
# What the reader's own commands would take hours for: two steps of small crops by a small network (the blocks of Python
# have the default one), by the same commands. How runs come to MLflow has tests of its own: a mirror takes longer than
# the run.
TRAIN = ("train.steps=2", "train.batch_size=4", "train.workers=0", "train.eval_every=2")
MODEL = ("model.encoder.name=mobilenetv2_035", "model.decoder.channels=[32,16,16,8,8]")
SHORT = (*TRAIN, *MODEL, "augment.crop=[64,64]", "tracking=none")
FEW = "data.pool.count=40"  # of the 400 squares, each of which is drawn for the guard against leaks
STUDY = (*(f"finetune.{word}" for word in SHORT), "--dry-run")  # its cells tests/studies/test_study.py makes
TORCHRUN = 'torchrun() { ssl-seg torchrun "$@"; }\n'


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def shortened(words: list[str]) -> list[str]:
    """A call of ssl-seg or torchrun, with less to do."""
    few = (FEW,) if "squares" in words else ()
    added = {"pretrain": (*SHORT, *few), "torchrun": (*SHORT, *few), "finetune": SHORT, "study": STUDY}
    return [*words, *added.get(words[0], ())]


def check(child: Child | subprocess.Popen[str]) -> None:
    said = child.communicate()
    assert child.returncode == 0, said


def execute(text: str) -> None:
    text = text.replace('"train": train}', '"train": train, "tracking": {"type": "none"}}')
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README supposes: photos/, held_out/, labelled/ and test/ with images/ and masks/."""
    folder = tmp_path_factory.mktemp("reader")
    for index in range(8):
        photo = Synthetic(count=8, size=(96, 96), seed=2).read(index)  # none that is labelled: that would be a leak
        images.write_image(folder / "photos" / f"{index}.png", photo.image)
        example = Synthetic(count=8, size=(96, 96)).read(index)
        images.write_image(folder / "labelled" / "images" / f"{index}.png", example.image)
        images.write_mask(folder / "labelled" / "masks" / f"{index}.png", example.label)
        scored = Synthetic(count=8, size=(96, 96), seed=3).read(index)
        images.write_image(folder / "test" / "images" / f"{index}.png", scored.image)
        images.write_mask(folder / "test" / "masks" / f"{index}.png", scored.label)
    held_out = Synthetic(count=2, size=(96, 96), seed=1).read(0).image
    images.write_image(folder / "held_out" / "a.png", held_out)
    return folder


@pytest.fixture(scope="module")
def after_python(folder: Path) -> Path:
    """The folder after the README's Python: a task's file, then the other blocks in order."""
    blocks_of_python = blocks("python")
    task = next(text for text in blocks_of_python if "class Pixelate" in text)
    (folder / "pixelate.py").write_text(task)
    for text in blocks_of_python:
        check(Child(execute, text, folder=folder))
    return folder


def test_every_python_block_runs_and_the_task_is_short(after_python: Path) -> None:
    assert len(blocks("python")) == 3
    assert not list(after_python.rglob("mlflow.db")), "nothing was mirrored: execute knows where the settings are"
    task = (after_python / "pixelate.py").read_text().split("class ")[1]
    assert len(task.splitlines()) <= 25


def test_every_command_runs(after_python: Path) -> None:
    assert len(blocks("bash")) == 5
    for words in calls(TORCHRUN + "\n".join(blocks("bash")), after_python):
        first, *rest = shortened(words)
        start = start_torchrun if first == "torchrun" else partial(command, first)
        check(start(*rest, folder=after_python))
    assert images.read_mask(after_python / "predicted" / "masks" / "0.png").shape == (96, 96)
    assert np.isin(images.read_mask(after_python / "predicted" / "masks" / "0.png"), (0, 1)).all()
    assert (after_python / "scores" / "result.json").is_file()


def test_the_config_is_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (text,) = blocks("yaml")
    (folder / "mine.yaml").write_text(text)
    config = load(PretrainConfig, ["mine.yaml"])
    assert (len(config.data.pool), len(config.data.val)) == (8, 1)
    assert set(config.tasks) == {"denoise", "inpaint"}


def test_the_two_commands_are_makes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in TEXT
        assert f"\n{target}: " in makefile

"""A config to begin with: it loads as it is, fits the images, and so does the pretraining that it names."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ssl_seg import FinetuneConfig, PretrainConfig, cli, images, load
from ssl_seg.cli.training import finetune_values, pretrain_values
from ssl_seg.stages.draft import KINDS, draft

LABELLED = {"type": "folder", "images": "labelled/images", "masks": "labelled/masks", "classes": ["on", "a leaf"]}


def run(*words: object) -> int:
    return cli.run(partial(cli.app, args=[str(word) for word in words], prog_name="ssl-seg", standalone_mode=False))


def check(text: str) -> dict[str, Any]:
    """The values, once they and the pretraining in the comments are known to be right."""
    values = yaml.safe_load(text)
    load(FinetuneConfig, values)
    (line,) = [line for line in text.splitlines() if line.startswith("#   ssl-seg pretrain ")]
    first, stage, flag, pool, *words = shlex.split(line.removeprefix("#   "))
    assert (first, stage, flag) == ("ssl-seg", "pretrain", "--images")
    config = load(PretrainConfig, pretrain_values(words[: words.index("--out")], pool))
    assert config.model == load(FinetuneConfig, values).model, "else the encoder would not fit"
    assert list(config.augment.crop) == values["augment"]["crop"]
    assert config.data.resize == load(FinetuneConfig, values).data.resize
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_of_each_kind_is_right(kind: str) -> None:
    text = draft(kind, "a file.yaml", LABELLED)
    values = check(text)
    assert values["data"]["labelled"] == LABELLED
    assert "ssl-seg finetune 'a file.yaml' --out runs/first" in text.splitlines()[0]
    assert values["augment"].get("vertical", False) == (kind in ("microscopy", "aerial"))
    assert ("class_weights" in values.get("segment", {})) == (kind == "streets")


def write(folder: Path, size: tuple[int, int], count: int = 5) -> None:
    for index in range(count):
        random = np.random.default_rng(index)
        label = np.zeros(size, np.uint8)
        label[: 20 + index, :30] = 255
        image = np.kron(random.integers(0, 200, (size[0] // 20, size[1] // 20, 3)), np.ones((20, 20, 1))).astype(
            np.uint8
        )
        images.write_image(folder / "images" / f"{index}.png", image)
        images.write_mask(folder / "masks" / f"ann_{index}.png", label)


def test_a_draft_fits_what_lies_in_the_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cells", (100, 140))
    assert (
        run("new", "microscopy", "--images", "cells", "--classes", "ground,cell", "--out", "own.yaml", "--quiet") == 0
    )
    assert "own.yaml: ssl-seg finetune own.yaml" in capsys.readouterr().out
    values = check(Path("own.yaml").read_text())
    assert values["data"]["labelled"] == {
        "type": "folder",
        "images": "cells/images",
        "masks": "cells/masks/ann_{name}.png",
        "classes": ["ground", "cell"],
        "mapping": {255: 1},
    }
    assert values["augment"]["crop"] == [64, 64]
    config = load(FinetuneConfig, finetune_values(["own.yaml"]))
    assert set(np.unique(config.data.labelled.read(0).label)) == {0, 1}
    before = Path("own.yaml").read_text()
    assert run("new", "--out", "own.yaml") == 2
    assert "--out own.yaml: exists already" in capsys.readouterr().err
    assert Path("own.yaml").read_text() == before


def test_large_photographs_are_brought_to_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, (780, 980), count=3)
    assert run("new", "--images", tmp_path, "--quiet") == 0
    values = check(capsys.readouterr().out)
    assert values["data"]["resize"] == [480, 608]
    assert values["augment"]["crop"] == [256, 256]


def test_images_that_a_training_would_stop_at_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, (60, 60), count=3)
    (tmp_path / "images" / "1.png").write_bytes(b"")
    assert run("new", "--images", tmp_path, "--quiet") == 2
    said = capsys.readouterr().err
    assert "1.png" in said
    assert "ssl-seg check names all" in said
    assert said.count("\n") == 1


def test_drawn_images_are_named_where_they_were_worth_it_and_have_the_classes(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    text = draft("microscopy", str(file), LABELLED)
    file.write_text(text)
    draw, *trainings = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")][2:]
    assert draw.startswith("ssl-seg synth nuclei ")
    first, then = (load(FinetuneConfig, finetune_values(shlex.split(line)[2:-2])) for line in trainings)
    assert first.data.labelled.class_names == then.data.beside.class_names == tuple(LABELLED["classes"])
    assert first.train.steps == 800
    assert (then.init, then.transfer) == ("runs/drawn", "model")
    assert first.model == then.model
    assert "synth" not in draft("microscopy", str(file), {**LABELLED, "classes": ["a", "b", "c"]})
    assert "synth aerial" in draft("aerial", str(file), LABELLED)
    assert "synth street" in draft("streets", str(file), {**LABELLED, "classes": [f"class {n}" for n in range(11)]})

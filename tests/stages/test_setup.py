"""What stages share before the first step: which stored values are black and white, and how palettes are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ssl_seg import images
from ssl_seg.config import load, read_words
from ssl_seg.datasets import Dataset
from ssl_seg.stages.evaluate import EvaluateConfig, evaluate
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.predict import PredictConfig, predict
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options, check_palettes
from tests.faults import message_of
from tests.small import Textured, finetuning, pretraining

TWELVE_BITS = (0.0, 4095.0)


def of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"type": "folder", "images": str(folder / "images"), **more}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 bits in 16, with masks, and a fine-tuning that was told so."""
    folder = tmp_path_factory.mktemp("deep")
    for index in range(4):
        example = Textured().read(index)
        grey = example.image.mean(axis=2) * (4095 / 255)
        (folder / "images").mkdir(exist_ok=True)
        assert cv2.imwrite(str(folder / "images" / f"{index}.png"), grey.astype(np.uint16))
        images.write_mask(folder / "masks" / f"{index}.png", example.label, np.zeros((2, 3), np.uint8))
    labelled = of(folder, masks=str(folder / "masks"), classes=2, range=TWELVE_BITS)
    values = {**finetuning(steps=2), "data": {"labelled": labelled, "val": labelled}, "leaks": {"check": False}}
    finetune(load(FinetuneConfig, values), Options(folder / "run", quiet=True))
    return folder


def test_exports_keep_the_range_and_a_data_set_without_one_is_read_by_it(
    deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("encoder", "model"):
        assert json.loads((deep / "run" / part / f"{part}.json").read_text())["range"] == list(TWELVE_BITS)
    made = {}
    for given in ({}, {"range": TWELVE_BITS}, {"range": (0, 65535)}):
        config = load(PredictConfig, {"model": str(deep / "run"), "data": {"images": of(deep, **given)}, "workers": 0})
        out = tmp_path / str(len(made))
        predict(config, out)
        made[str(given.get("range"))] = (out / "overlays" / "0.png").read_bytes()
        told = capsys.readouterr().err
        if not given:
            assert "data.images: no range is given; 0 is black and 4095 white, as the model has learnt" in told
        elif given["range"] == TWELVE_BITS:
            assert "range" not in told
        else:
            assert "data.images: 0 is black and 65535 white, and for the model 0 and 4095 are" in told
    first, same, other = made.values()
    assert first == same != other


def test_an_evaluation_records_the_range_that_it_has_taken(deep: Path, tmp_path: Path) -> None:
    test = of(deep, masks=str(deep / "masks"), classes=2)
    values = {"model": str(deep / "run"), "data": {"test": test}, "workers": 0, "leaks": {"check": False}}
    evaluate(load(EvaluateConfig, values), tmp_path / "scores")
    recorded = json.loads((tmp_path / "scores" / "run.json").read_text())["config"]["data"]["test"]
    assert recorded["range"] == list(TWELVE_BITS)


def test_runs_whose_images_are_read_by_other_ranges_are_told(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one run, and between a run and the one that it starts from."""
    labelled = of(deep, masks=str(deep / "masks"), classes=2, range=TWELVE_BITS)
    without = {key: value for key, value in labelled.items() if key != "range"}
    off = {"leaks": {"check": False}}
    config = load(FinetuneConfig, {**finetuning(steps=1), "data": {"labelled": labelled, "val": without}, **off})
    finetune(config, Options(deep / "two", overwrite=True))
    told = capsys.readouterr().err
    assert "data.val: 0 is black and 65535 white, and for data.labelled 0 and 4095 are" in told
    assert "give data.val.range=[0,4095]" in told
    values = {**pretraining(steps=1), "data": {"pool": of(deep)}, "init": str(deep / "run"), **off}
    pretrain(load(PretrainConfig, values), Options(deep / "three", overwrite=True))
    assert "data.pool: 0 is black and 65535 white, and for init 0 and 4095 are" in capsys.readouterr().err


def test_eight_bits_have_no_range_that_could_differ(deep: Path, tmp_path: Path) -> None:
    images.write_image(tmp_path / "images" / "a.png", np.zeros((8, 8, 3), np.uint8))
    plain = load(Dataset, of(tmp_path))
    assert plain.value_range() is None
    assert plain.in_range(TWELVE_BITS) is plain
    assert load(Dataset, of(deep)).value_range() == (0, 65535)
    assert load(Dataset, of(deep, range=TWELVE_BITS)).in_range((0, 9)).value_range() == TWELVE_BITS


# ---- palettes of greys ----


def paint(path: Path, indices: np.ndarray, greys: tuple[int, ...]) -> None:
    """A mask whose palette shows its values as these greys."""
    images.write_mask(path, indices, np.repeat(np.array(greys, np.uint8)[:, None], 3, axis=1))


def test_parts_that_read_palettes_of_greys_otherwise_are_refused_with_the_mapping_to_write(tmp_path: Path) -> None:
    """The greys of one part are all classes, those of the other are none: each alone is read rightly, and told."""
    shown = {"labelled": (2, 0, 1), "val": (0, 120, 240)}
    for seed, (part, greys) in enumerate(shown.items()):
        for index in range(4):
            example = Textured(seed=seed).read(index)
            label = example.label.copy()
            label[:8] = 2
            images.write_image(tmp_path / part / "images" / f"{index}.png", example.image)
            paint(tmp_path / part / "masks" / f"{index}.png", np.array([1, 2, 0], np.uint8)[label], greys)
    data = {part: of(tmp_path / part, masks=str(tmp_path / part / "masks"), classes=3) for part in shown}
    values = {**finetuning(steps=1), "data": data, "leaks": {"check": False}}
    said = message_of(lambda: finetune(load(FinetuneConfig, values), Options(tmp_path / "run", quiet=True)))
    assert said.startswith("data.labelled: its masks have palettes of greys, whose greys are taken for ids")
    assert "data.labelled.mapping={'#000000': 0, '#010101': 1, '#020202': 2}" in said
    assert "data.val.mapping={'#000000': 0, '#787878': 1, '#f0f0f0': 2}" in said
    for part, mapping in re.findall(r"data\.(\w+)\.mapping=(\{[^}]*\})", said):
        data[part] = {**data[part], "mapping": read_words([f"mapping={mapping}"])["mapping"]}
    before = [load(Dataset, {**data["val"], "mapping": None}).label(0), load(Dataset, data["val"]).label(0)]
    np.testing.assert_array_equal(*before)
    assert finetune(load(FinetuneConfig, values), Options(tmp_path / "run", quiet=True)).steps == 1


def test_one_part_with_palettes_agrees_with_any_other(tmp_path: Path) -> None:
    paint(tmp_path / "masks" / "a.png", np.arange(3, dtype=np.uint8)[None], (2, 0, 1))
    images.write_image(tmp_path / "images" / "a.png", np.zeros((1, 3, 3), np.uint8))
    painted = load(Dataset, of(tmp_path, masks=str(tmp_path / "masks"), classes=3))
    assert set(painted.greys_read()) == {"greys"}
    check_palettes({"labelled": painted, "val": Textured(), "test": None})


def test_a_folder_in_place_of_a_data_set_is_told_what_to_write(tmp_path: Path) -> None:
    values = {**pretraining(), "data": {"pool": str(tmp_path)}}
    said = message_of(lambda: load(PretrainConfig, values))
    assert said == f"data.pool: '{tmp_path}' is a folder; write {{type: folder, images: {tmp_path}}}"

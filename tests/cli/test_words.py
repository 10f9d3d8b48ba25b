"""The words of a command line: what they say together, and what is meant by words of other programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_seg.cli import meant
from ssl_seg.cli.words import Option, is_run, labelled_options, read
from ssl_seg.config import UserError
from ssl_seg.keys import keys_of
from ssl_seg.stages.evaluate import EvaluateConfig
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.predict import PredictConfig
from ssl_seg.stages.pretrain import PretrainConfig

STAGES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "predict": PredictConfig, "evaluate": EvaluateConfig}


def test_options_are_keys() -> None:
    values = read("finetune", ["seed=3"], None, labelled_options("labelled", "a", "b", "cell, membrane"))
    labelled = {"type": "folder", "images": "a", "masks": "b", "classes": ["cell", "membrane"]}
    assert values == {"seed": 3, "data": {"labelled": labelled}}


def test_a_folder_with_images_and_masks_says_both(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    both = {"images": f"{tmp_path}/images", "masks": f"{tmp_path}/masks"}
    assert [option.value for option in labelled_options("labelled", str(tmp_path), None, None)] == [
        {key: value} for key, value in both.items()
    ]
    assert [option.value for option in labelled_options("pool", str(tmp_path), None, None)] == [
        {"images": both["images"]}
    ]


def test_options_win_over_files_and_agree_with_words(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {labelled: {type: folder, images: c, masks: d, classes: 2}}\ninit: x\n")
    options = [*labelled_options("labelled", "a", None, None), Option("--init", "init", "r")]
    values = read("finetune", [str(file), "data.labelled.images=a"], None, options)
    assert values["data"]["labelled"] == {"type": "folder", "images": "a", "masks": "d", "classes": 2}
    assert values["init"] == "r"
    with pytest.raises(UserError, match=r"^--init r and init=q say different things; keep one of them$"):
        read("finetune", [str(file), "init=q"], None, options)
    with pytest.raises(UserError, match=r"^--images a and data\.labelled\.images=b say different things"):
        read("finetune", ["data.labelled={images: b}"], None, options)


def test_images_take_the_place_of_a_data_set_that_has_none(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {pool: {type: camvid, root: c}}\n")
    values = read("pretrain", [str(file)], None, labelled_options("pool", "a", None, None))
    assert values["data"]["pool"] == {"type": "folder", "images": "a"}
    file.write_text("data: {pool: {type: stack, images: c.tif}}\n")
    values = read("pretrain", [str(file)], None, labelled_options("pool", "a.tif", None, None))
    assert values["data"]["pool"] == {"type": "stack", "images": "a.tif"}


def test_a_run_is_known_by_its_records(tmp_path: Path) -> None:
    assert not is_run(str(tmp_path))
    (tmp_path / "model.json").write_text("{}")
    assert is_run(str(tmp_path))
    assert not is_run(f"model={tmp_path}")


@pytest.mark.parametrize("stage", STAGES)
def test_words_of_others_lead_to_keys_that_there_are(stage: str) -> None:
    known = meant.OF_TRAINING if stage in meant.TRAINING else meant.OF_USING
    of_stage = {key.name for key in keys_of(STAGES[stage])}
    there = {key.name for config in STAGES.values() for key in keys_of(config)}
    there |= {key.name for key in keys_of(FinetuneConfig, "data.labelled.folder")}
    assert {meaning for meaning in known.values() if " " not in meaning} <= there
    assert {"train.lr", "seed"} <= of_stage or {"model", "device"} <= of_stage


@pytest.mark.parametrize("stage", STAGES)
def test_no_key_of_ours_is_taken_for_a_word_of_others(stage: str) -> None:
    for key in keys_of(STAGES[stage]):
        section, _, last = key.name.rpartition(".")
        values = {last: 1} if not section else {section: {last: 1}}
        meant.check_keys(stage, values)
    with pytest.raises(UserError, match="unknown key 'batch'"):
        meant.check_keys(stage, {"batch": 1})

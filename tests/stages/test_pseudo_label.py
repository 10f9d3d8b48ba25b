"""Rounds of pseudo-labels: what is labelled, when it ends, how often an image was used, a stop in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from ssl_seg.config import UserError
from ssl_seg.datasets.relabelled import Relabelled
from ssl_seg.images import read_mask
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.stages import pseudo_label as rounds
from ssl_seg.stages.pseudo_label import PseudoLabelConfig, pseudo_label
from ssl_seg.stages.setup import Options
from ssl_seg.testing import check_dataset
from ssl_seg.weights.export import load_model
from tests.small import POOL, Textured, finetuning


def config_of(**settings: Any) -> PseudoLabelConfig:
    values = finetuning(steps=2)
    values["data"]["pool"] = {**POOL, "count": 5, "seed": 11}
    return PseudoLabelConfig.of({**values, "rounds": settings})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> rounds.PseudoLabelled:
    """Two rounds at least: half of what an untrained network says of two classes is above 0.5."""
    config = config_of(confidence=0.5, sure=0.4, most=2)
    return pseudo_label(config, Options(tmp_path_factory.mktemp("rounds") / "out", quiet=True))


def test_it_ends_when_all_images_are_labelled_and_tells_how_often_each_was_used(done: rounds.PseudoLabelled) -> None:
    assert done.labelled == (0, 5), "of two classes one has a half or more everywhere"
    assert sorted(done.used) == [f"textured_11_{index}" for index in range(5)]
    assert sum(done.used.values()) == 2 * 4 // 2, "two steps of four images, a half of them beside"
    record = json.loads((done.folder / "rounds.json").read_text())
    assert record["used"] == done.used
    assert [own["pseudo_labelled"] for own in record["rounds"]] == [0, 5]
    config = json.loads((done.folder / "round_1" / "run.json").read_text())["config"]
    assert config["data"]["beside"]["type"] == "relabelled"


def test_what_the_model_is_not_sure_of_is_ignored(done: rounds.PseudoLabelled, tmp_path: Path) -> None:
    model, _ = load_model(done.folder / "round_0")
    pool = Textured(count=5, seed=11)
    with torch.no_grad():
        images = torch.from_numpy(np.stack([pool.read(index).image for index in range(5)])).permute(0, 3, 1, 2) / 255
        shares = model.eval()(images).softmax(dim=1).amax(dim=1)
    middle = shares.median().item()
    config = config_of(confidence=middle, sure=0.01)
    names = rounds.label(config, done.folder / "round_0", tmp_path / "labels")
    found = Relabelled(images=config.pool, masks=str(tmp_path / "labels"))
    check_dataset(found)
    assert {found.name(index) for index in range(len(found))} == names
    record = json.loads((tmp_path / "labels" / "masks.json").read_text())
    for index in range(5):
        if pool.name(index) in names:
            mask = read_mask(tmp_path / "labels" / record["masks"][pool.name(index)])
            far = (shares[index] - middle).abs() > 1e-5
            assert torch.equal(torch.from_numpy(mask == 255)[far], (shares[index] < middle)[far])


def test_none_is_labelled_where_the_model_is_sure_of_none(tmp_path: Path) -> None:
    done = pseudo_label(config_of(confidence=0.999, sure=0.99), Options(tmp_path / "out", quiet=True))
    assert done.labelled == (0,)
    assert set(done.used.values()) == {0}


def test_one_that_is_stopped_goes_on_to_the_same_end(done: rounds.PseudoLabelled, tmp_path: Path) -> None:
    config = config_of(confidence=0.5, sure=0.4, most=2)
    options = Options(tmp_path / "out", quiet=True)
    with mock.patch.object(rounds, "draws_of", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        pseudo_label(config, options)
    assert "used" not in json.loads((options.folder / "rounds.json").read_text())
    again = pseudo_label(config, options)
    assert again.used == done.used
    states = [load_state(of.folder / "round_1").tensors for of in (done, again)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    with pytest.raises(UserError, match="its rounds have another settings; name a new folder"):
        pseudo_label(config_of(confidence=0.6), options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, r"data\.pool: missing"),
        ({"pool": POOL, "beside": POOL}, r"data\.beside: the pseudo-labelled images take its place"),
    ],
)
def test_what_cannot_be_is_told(changed: dict[str, Any], message: str) -> None:
    values = finetuning()
    with pytest.raises(UserError, match=message):
        PseudoLabelConfig.of({**values, "data": {**values["data"], **changed}})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no rounds"):
        pseudo_label(config_of(), Options(tmp_path, quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

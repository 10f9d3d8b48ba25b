"""`ssl-seg norms`: the shares it reads are those of the network, in its order; what it draws and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssl_seg import cli
from ssl_seg.config import UserError, load
from ssl_seg.figures import charts
from ssl_seg.norm.convert import norm_shares
from ssl_seg.norm.layers import SHARES
from ssl_seg.reports import norms
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.weights.export import load_model
from tests.small import finetuning, pretraining

MODEL = {"encoder": {"name": "mobilenetv2_035"}, "decoder": {"channels": [16, 16, 8, 8, 8]}, "norm": "switch"}


def small(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "model": MODEL}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms") / "pretrained"
    values = {**small(pretraining(steps=4, lr=0.05)), "recalibrate": 4}
    pretrain(load(PretrainConfig, values), Options(folder, quiet=True))
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms") / "finetuned"
    finetune(load(FinetuneConfig, small(finetuning(steps=4, lr=0.05))), Options(folder, quiet=True))
    return folder


def test_the_shares_of_a_fine_tuned_run_are_its_models(finetuned: Path) -> None:
    found = norms.norms(finetuned)
    model, _ = load_model(finetuned)
    expected = norm_shares(model)
    layers = [layer for part in found.parts for layer in part.layers]
    assert [part.name for part in found.parts] == ["encoder", "head"]
    assert [(layer.channels, layer.mean, layer.var) for layer in layers] == [
        (layer.channels, pytest.approx(layer.mean), pytest.approx(layer.var)) for layer in expected
    ]
    assert all(full.name.endswith(layer.name) for layer, full in zip(layers, expected, strict=True))
    assert layers[0].name == "bn1", "the stem comes first, though not in the alphabet"
    assert layers[0].mean != pytest.approx((1 / 3,) * 3, abs=1e-3), "else nothing has been learnt here"


def test_a_pretrained_run_has_an_encoder_and_the_tasks_decoders(pretrained: Path) -> None:
    found = norms.norms(pretrained)
    assert [(part.name, len(part.layers)) for part in found.parts] == [("encoder", 51), ("decoder of denoise", 10)]
    assert [layer.name for layer in found.parts[1].layers][:2] == ["blocks.0.conv1.1", "blocks.0.conv2.1"]
    assert found.picture == pretrained / "pictures" / "norms.png"
    with Image.open(found.picture) as picture:
        assert picture.width == charts.WIDTH * charts.DOTS_PER_INCH
        assert picture.height > 61 * charts.ROW * charts.DOTS_PER_INCH


def test_the_command_prints_a_row_a_layer(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda: cli.app(args=["norms", str(pretrained)], standalone_mode=False)) == 0
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if "encoder: " in line or "decoder of denoise: " in line]
    assert len(rows) == 61
    for name in SHARES:
        assert f"mean {name}" in said.out
        assert f"var {name}" in said.out
    shares = [float(cell) for cell in rows[0].split("│")[3:-1]]
    assert sum(shares[:3]) == pytest.approx(1.0, abs=2e-3)
    assert sum(shares[3:]) == pytest.approx(1.0, abs=2e-3)
    assert "norms.png" in said.out


def test_a_run_without_switch_norm_is_one_line_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=1)), Options(tmp_path / "run", quiet=True))
    assert cli.run(lambda: cli.app(args=["norms", str(tmp_path / "run")], standalone_mode=False)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "was trained with norm: group" in said
    assert "model.norm=switch" in said
    assert not (tmp_path / "run" / "pictures" / "norms.png").exists()


def test_what_is_no_run_or_has_exported_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        norms.norms(tmp_path)
    (tmp_path / "run.json").write_text('{"stage": "pretrain", "status": "running"}')
    with pytest.raises(UserError, match="pretrain run that is running"):
        norms.norms(tmp_path)


def test_a_damaged_export_is_refused(pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained, tmp_path / "run")
    file = tmp_path / "run" / "encoder" / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="sha256"):
        norms.norms(tmp_path / "run")

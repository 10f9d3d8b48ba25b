"""Models as ONNX: they answer as the model at any size, or are not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_seg import cli
from ssl_seg.config import load
from ssl_seg.models import ModelConfig, SegmentationModel
from ssl_seg.segment import Segment
from ssl_seg.stages.start import build_module
from ssl_seg.weights import forms, onnx
from ssl_seg.weights.export import export_model
from ssl_seg.weights.forms import difference
from ssl_seg.weights.onnx import export_onnx
from tests.faults import message_of

CLASSES = ("ground", "disc", "bar")
BASIC = {"encoder": {"type": "segnet_basic"}, "decoder": {"type": "segnet_basic"}}
SMALL = {"name": "mobilenetv2_035"}
FAMILIES = {
    "segnet_basic": BASIC,
    "unet": {"encoder": SMALL, "decoder": {"channels": [16, 16, 8, 8, 8]}},
    "fpn, group norm": {"encoder": SMALL, "decoder": {"type": "fpn", "pyramid_channels": 32}, "norm": "group"},
    "unet, switch norm": {"encoder": SMALL, "decoder": {"channels": [16, 16, 8, 8, 8]}, "norm": "switch"},
    "deeplabv3plus": {"encoder": SMALL, "decoder": {"type": "deeplabv3plus", "encoder_stride": 32}},
    "segformer": {"encoder": SMALL, "decoder": {"type": "segformer"}},
    "upernet": {"encoder": SMALL, "decoder": {"type": "upernet"}},
    "fcn": {"encoder": SMALL, "decoder": {"type": "fcn"}},
    "convnext": {"encoder": {"name": "convnext_atto"}, "decoder": {"type": "segformer"}},
    "swin": {"encoder": {"name": "swin_tiny_patch4_window7_224"}, "decoder": {"channels": [16, 16, 8, 8, 8]}},
    "vit": {"encoder": {"name": "vit_tiny_patch16_224"}, "decoder": {"type": "segformer"}},
    "segnet": {"encoder": {"type": "segnet"}, "decoder": {"type": "segnet"}},
    "r2unet": {"encoder": {"type": "r2unet", "widths": [8, 16, 32]}, "decoder": {"type": "r2unet"}},
    "mobilenet_unet": {"encoder": {"type": "mobilenet_unet"}, "decoder": {"type": "mobilenet_unet"}},
    "stacked": {
        "encoder": {"type": "stacked", "growth_rate": 16, "blocks": [1, 1, 1, 1], "width": 16},
        "decoder": {"type": "stacked"},
    },
}


def exported(folder: Path, values: dict[str, Any], **extra: Any) -> SegmentationModel:
    """A run's model/ with random weights, and norms that have seen something."""
    config = load(ModelConfig, values)
    module = build_module(config, {"segment": Segment(num_classes=3)}, seed=0)
    model = SegmentationModel(module.encoder, module.heads["segment"], CLASSES)
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 96, 96))
    export_model(folder, model.eval(), config.dump(), extra)
    return model


@pytest.mark.slow  # torch takes half a minute of a free core to write the smallest network
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "family",
    # 2026-11-30: whether segnet's differs in too many places hangs on rounding, by which its five poolings choose.
    [pytest.param(own, marks=pytest.mark.xfail if own == "segnet" else ()) for own in FAMILIES],
)
def test_a_program_answers_as_the_model_at_any_size(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = exported(tmp_path / "run", FAMILIES[family], resize=[64, 48], range=[0.0, 4095.0])
    out = tmp_path / "made" / "model.onnx"
    command = ["export", str(tmp_path / "run"), "--out", str(out)]
    assert cli.run(lambda: cli.app(args=command, standalone_mode=False)) == 0
    told = capsys.readouterr()
    assert "model.onnx: answers as the model at 3 sizes, to " in told.out
    assert "tells ground, disc, bar apart" in told.out
    assert told.err == "", "torch's own words help nobody"
    answer = onnx.runner(out.read_bytes())
    for shape in ((1, 61, 47), (4, 130, 210), (1, 256, 256)):
        assert difference(model, answer, shape) < 1e-4
    receipt = json.loads(out.with_name("model.onnx.json").read_text())
    assert receipt["class_names"] == list(CLASSES)
    assert (receipt["resize"], receipt["range"]) == ([64, 48], [0.0, 4095.0])
    assert set(receipt["compared"]) == {"1x64x64", "2x100x150", "3x225x130"}
    assert "exists already" in message_of(lambda: export_onnx(tmp_path / "run", out))


def test_a_program_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported(tmp_path / "run", BASIC)
    monkeypatch.setattr(onnx, "_traced", lambda network, notes: b"a program")
    monkeypatch.setattr(onnx, "runner", lambda payload: lambda image: 1.1 * model(image))
    said = message_of(lambda: export_onnx(tmp_path / "run", tmp_path / "made.onnx"))
    assert said.startswith("export: the program answers otherwise than the model, by 0.0")
    assert not list(tmp_path.glob("made*"))
    monkeypatch.setattr(onnx, "runner", lambda payload: lambda image: 1 / 0)
    said = message_of(lambda: export_onnx(tmp_path / "run", tmp_path / "made.onnx"))
    assert said.startswith("export: onnxruntime does not run this network for images of 1x64x64 (division by zero)")
    monkeypatch.setattr(onnx, "runner", lambda payload: lambda image: model(image)[..., :-1])
    assert "answers otherwise than the model, by inf" in message_of(
        lambda: export_onnx(tmp_path / "run", tmp_path / "made.onnx")
    )
    monkeypatch.setattr(onnx, "runner", lambda payload: model)
    assert export_onnx(tmp_path / "run", tmp_path / "made.onnx").largest_difference == 0
    assert (tmp_path / "made.onnx").read_bytes() == b"a program"


def test_what_cannot_be_made_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path / "run", BASIC)
    said = message_of(lambda: export_onnx(tmp_path / "run", tmp_path / "made.pt"))
    assert said == f"--out {tmp_path}/made.pt: give a name that ends with .onnx"
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)
    said = message_of(lambda: export_onnx(tmp_path / "run", tmp_path / "made.onnx"))
    assert said.startswith("export: torch cannot write this network for images of any size (division by zero)")
    monkeypatch.setattr(forms, "find_spec", lambda name: None if name == "onnxscript" else object())
    said = message_of(lambda: export_onnx(tmp_path / "run", tmp_path / "made.onnx"))
    assert said == "export: onnxscript not installed; pip install 'ssl_seg[onnx]'"
    assert not list(tmp_path.glob("made*"))

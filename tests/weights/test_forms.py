"""Forms for other programs: what their own libraries read of them answers as the run's network, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import load_file

import ssl_seg
from ssl_seg import cli, files
from ssl_seg.config import load
from ssl_seg.models import EncoderNet, ModelConfig
from ssl_seg.weights import forms, hub, libraries
from ssl_seg.weights.export import export_encoder
from ssl_seg.weights.forms import FORMS, difference, export
from tests import parity
from tests.faults import message_of
from tests.models.test_models import ENCODERS
from tests.weights.test_onnx import BASIC, CLASSES, FAMILIES, SMALL, exported

# What each has behind its last map: nothing that a map hangs on.
BEHIND = ("fc.", "classifier.", "conv_head.", "bn2.", "pre_logits.", "head.", "norm.")
NARROW = {"channels": [16, 16, 8, 8, 8]}


def pretrained(folder: Path, values: dict[str, Any]) -> EncoderNet:
    """A run's encoder/ with random weights, and norms that have seen something."""
    config = load(ModelConfig, values)
    torch.manual_seed(0)
    encoder = config.build_encoder()
    with torch.no_grad():
        encoder.train()(torch.rand(2, 3, 96, 96))
    export_encoder(folder, encoder.eval(), config.dump())
    return encoder


def check_timm(name: str, tmp_path: Path, decoder: dict[str, Any]) -> None:
    """timm's own network with the file's weights gives the encoder's maps."""
    encoder = pretrained(tmp_path / "run", {"encoder": {"name": name}, "decoder": decoder})
    told = export(tmp_path / "run", tmp_path / "leaf.safetensors", "timm")
    receipt = json.loads((tmp_path / "leaf.safetensors.json").read_text())
    network = timm.create_model(name, pretrained=False, **receipt["arguments"]).eval()
    left = network.load_state_dict(load_file(tmp_path / "leaf.safetensors"), strict=False)
    assert left.unexpected_keys == []
    assert left.missing_keys == receipt["missing"]
    assert left.missing_keys
    assert all(key.startswith(BEHIND) for key in left.missing_keys)
    side = 224 if "224" in name else 96
    image = torch.rand(1, 3, side, side)
    mean, std = (torch.tensor(receipt[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        ours = encoder(image)
        theirs = network.forward_intermediates((image - mean) / std, intermediates_only=True, output_fmt="NCHW")
    # Of a plain transformer only the map of stride 16 is timm's own; of others the last is.
    last = ours[3] if name.startswith("vit") else ours[-1]
    torch.testing.assert_close(last, theirs[-1], rtol=1e-4, atol=1e-5)
    assert told.largest_difference < 1e-4


def test_an_encoder_is_timms_own_network(tmp_path: Path) -> None:
    check_timm("mobilenetv2_035", tmp_path, NARROW)
    dilated = {"type": "deeplabv3plus"}
    check_timm("resnet18", tmp_path / "dilated", dilated)
    receipt = json.loads((tmp_path / "dilated" / "leaf.safetensors.json").read_text())
    assert receipt["arguments"] == {"output_stride": 16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_core_encoder_is_timms_own_network(name: str, tmp_path: Path) -> None:
    check_timm(name, tmp_path, NARROW)


def test_a_fine_tuned_model_gives_its_encoder(tmp_path: Path) -> None:
    model = exported(tmp_path / "run", {"encoder": SMALL, "decoder": NARROW})
    export(tmp_path / "run" / "model", tmp_path / "leaf.safetensors")
    tensors = load_file(tmp_path / "leaf.safetensors")
    own = model.encoder.state_dict()["backbone.network.conv_stem.weight"]
    assert torch.equal(tensors["conv_stem.weight"], own)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (BASIC, "encoder segnet_basic: is no network of timm"),
        ({"encoder": SMALL, "norm": "switch"}, "into switch norm, which timm's mobilenetv2_035 does not have"),
        ({"encoder": SMALL, "norm": "group"}, "into group, instance or layer norm, which timm's"),
        ({"encoder": {"type": "mobilenet_unet", "name": "mobilenetv2_035"}}, "takes its maps from other places"),
    ],
)
def test_an_encoder_that_timm_has_not_is_refused(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    pretrained(tmp_path / "run", {"decoder": NARROW, **values})
    said = message_of(lambda: export(tmp_path / "run", tmp_path / "leaf.safetensors"))
    assert reason in said
    assert not list(tmp_path.glob("leaf*"))


def test_a_unet_is_a_model_of_smp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = exported(tmp_path / "run", {"encoder": SMALL, "decoder": {**NARROW, "interpolation": "bilinear"}})
    out = tmp_path / "leaf_smp"
    command = ["export", str(tmp_path / "run"), "--to", "smp", "--out", str(out)]
    assert cli.run(lambda: cli.app(args=command, standalone_mode=False)) == 0
    assert 'smp.Unet("tu-mobilenetv2_035") answers as the model, to ' in capsys.readouterr().out
    theirs = smp.from_pretrained(str(out)).eval()
    receipt = json.loads(out.with_name("leaf_smp.json").read_text())
    image = torch.rand(2, 3, 96, 160)
    mean, std = (torch.tensor(receipt[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(theirs((image - mean) / std), model(image))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"], "no licence but theirs"
    assert "exists already; name a new folder" in message_of(lambda: export(tmp_path / "run", out, "smp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder", "called"),
    [
        ("resnet18", {"attention": "scse"}, "resnet18"),
        ("resnet50", NARROW, "resnet50"),
        ("resnet18", {"type": "unetplusplus"}, "resnet18"),
        ("vgg11_bn", {"center": True}, "vgg11_bn"),
        ("convnext_atto", NARROW, "tu-convnext_atto"),
        ("swin_tiny_patch4_window7_224", NARROW, "tu-swin_tiny_patch4_window7_224"),
    ],
)
def test_models_of_smp_answer_alike(encoder: str, decoder: dict[str, Any], called: str, tmp_path: Path) -> None:
    exported(tmp_path / "run", {"encoder": {"name": encoder}, "decoder": decoder})
    export(tmp_path / "run", tmp_path / "leaf", "smp")
    receipt = json.loads((tmp_path / "leaf.json").read_text())
    assert receipt["arguments"]["encoder_name"] == called
    assert max(receipt["compared"].values()) < 1e-4


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"encoder": SMALL, "decoder": {"type": "segformer"}},
            "decoder segformer: smp's model has a last layer of 1 x 1",
        ),
        (BASIC, "decoder segnet_basic: smp has no such decoder"),
        ({"encoder": SMALL, "decoder": NARROW, "norm": "group"}, "model.norm: group: smp's networks have the norm"),
        ({"encoder": SMALL, "decoder": {**NARROW, "center": True}}, "smp has no model with these layers"),
        ({"encoder": {"name": "vit_tiny_patch16_224"}, "decoder": NARROW}, "smp takes encoders of timm that give maps"),
    ],
)
def test_a_model_that_smp_has_not_is_refused(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    exported(tmp_path / "run", values)
    assert reason in message_of(lambda: export(tmp_path / "run", tmp_path / "leaf", "smp"))
    assert not list(tmp_path.glob("leaf*"))


RECORD = {"stage": "finetune", "config": {}}  # the least that a run.json holds


def test_a_folder_for_the_hub_is_loaded_by_two_lines(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = exported(run, {**BASIC}, resize=[64, 48])
    (run / "run.json").write_text(json.dumps({**RECORD, "seed": 3, "versions": {"ssl_seg": "0.2.0"}}))
    (run / "split.json").write_text(json.dumps({"labelled": ["a", "b"]}))
    scores = {"miou": 0.5, "accuracy": 0.75, "iou/ground": 0.5, "iou/disc": 0.25, "iou/bar": None}
    (run / "result.json").write_text(json.dumps({"test": scores}))
    told = ssl_seg.export(run, tmp_path / "leaf", "hub")
    assert told.largest_difference == 0
    again = ssl_seg.load_model(tmp_path / "leaf")
    assert again.class_names == CLASSES
    assert again.resize == (64, 48)
    with torch.no_grad():
        assert difference(model, again, (1, 70, 90)) == 0
    card = (tmp_path / "leaf" / "README.md").read_text()
    for words in (
        "pipeline_tag: image-segmentation",
        "value: 0.5",
        "# license: give one",
        'load_model("leaf").predict("photo.jpg")',
        "trained on 2 labelled images",
        "| iou/disc | 0.2500 |",
        "| iou/bar | - |",
        "resized to 64 x 48 (H x W)",
        hub.UNCHECKED,
    ):
        assert words in card
    (tmp_path / "leaf" / "model.safetensors").write_bytes(b"other bytes")
    assert "leaf" in message_of(lambda: ssl_seg.load_model(tmp_path / "leaf"))


def test_a_card_says_what_the_run_began_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    exported(run, {**BASIC})
    leaks = {"checked": True, "trained": {"labelled": 3, "init.labelled": 4, "init.pool": 5}, "scored": {"val": 2}}
    leaks |= {"leaks": [], "pairs": [], "unknown": []}
    (run / "leaks.json").write_text(json.dumps(leaks))
    for record, words in (
        ({"origin": {"stage": "finetune", "config": {}, "origin": None}}, "from weights of another run (finetune)"),
        ({"config": {"init": "web.pth"}}, "from weights of a file, whose licence counts too"),
        ({}, "from no weights of another run"),
    ):
        noted = hub._about_data(run) if (run / "run.json").write_text(json.dumps({**RECORD, **record})) else []
        assert any(words in line for line in noted)
    assert "- trained on 4 images (init.labelled)" in noted
    assert "- trained on 5 images without labels (init.pool)" in noted
    assert f"- {hub.LEAKS['clean']}" in noted
    (run / "result.json").write_text(json.dumps({"val": {"miou": "0.3"}}))
    assert "result.json" in message_of(lambda: export(run, tmp_path / "leaf", "hub"))
    (run / "result.json").write_text(json.dumps({"val": "x"}))
    export(run, tmp_path / "leaf", "hub")
    assert "None are known of this model." in (tmp_path / "leaf" / "README.md").read_text()


def test_exports_beside_each_other_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path / "run", {**BASIC})
    place = tmp_path / "place"
    (place / f"{files.NEW}other").mkdir(parents=True)  # which somebody is writing
    export(tmp_path / "run", place / "leaf", "hub")
    assert (place / f"{files.NEW}other").is_dir()
    assert sorted(path.name for path in place.iterdir()) == [f"{files.NEW}other", "leaf", "leaf.json"]
    assert (place / "leaf").stat().st_mode & 0o777 == 0o755

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    assert "No space left on device" in message_of(lambda: export(tmp_path / "run", place / "more", "hub"))
    assert sorted(path.name for path in place.iterdir()) == [f"{files.NEW}other", "leaf", "leaf.json"]


def test_a_card_keeps_a_path_and_markup_of_names_out(tmp_path: Path) -> None:
    assert hub._plain("a|b\n*c*") == r"a\|b \*c\*"
    weights = tmp_path / "secret" / "weights.safetensors"
    encoder = {**SMALL, "pretrained": str(weights)}
    config = load(ModelConfig, {"encoder": SMALL, "decoder": NARROW})
    model = exported(tmp_path / "run", config.dump())
    ssl_seg.weights.export.export_model(
        tmp_path / "run", model, {**config.dump(), "encoder": {**config.dump()["encoder"], **encoder}}
    )
    export(tmp_path / "run", tmp_path / "leaf", "hub")
    held = [(tmp_path / "leaf" / name).read_text() for name in ("config.json", "README.md")]
    assert not any("secret" in text for text in held)
    assert "began with published weights" in held[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["unet", "unet, switch norm", "upernet", "convnext", "swin", "stacked"])
def test_a_program_of_torch_answers_as_the_model_at_any_size(family: str, tmp_path: Path) -> None:
    model = exported(tmp_path / "run", FAMILIES[family], resize=[64, 48])
    export(tmp_path / "run", tmp_path / "leaf.pt2")
    notes = {"ssl_seg.json": ""}
    program = torch.export.load(tmp_path / "leaf.pt2", extra_files=notes).module()
    receipt = json.loads((tmp_path / "leaf.pt2.json").read_text())
    most = 1 if ": one of" in receipt["input"] else 3
    with torch.no_grad():
        for shape in ((1, 256, 256), (1, 131, 97), (most, 120, 200)):
            assert difference(model, program, shape) < 1e-5
    assert json.loads(notes["ssl_seg.json"])["class_names"] == list(CLASSES)
    assert receipt["resize"] == [64, 48]


def test_what_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path / "run", {"encoder": SMALL, "decoder": NARROW})
    monkeypatch.setattr(libraries, "unequal_maps", lambda *_: 0.02)
    said = message_of(lambda: export(tmp_path / "run", tmp_path / "leaf.safetensors"))
    assert said.startswith(
        "export: timm's mobilenetv2_035 answers otherwise than the model, by 0.02 of its largest value"
    )
    read = libraries.read_files
    monkeypatch.setattr(libraries, "read_files", lambda held: torch.nn.Sequential(read(held), torch.nn.ReLU()).eval())
    said = message_of(lambda: export(tmp_path / "run", tmp_path / "leaf", "smp"))
    assert said.startswith("export: smp's Unet answers otherwise than the model, by ")
    monkeypatch.setattr(hub, "difference", lambda *_: float("nan"))
    said = message_of(lambda: export(tmp_path / "run", tmp_path / "leaf", "hub"))
    assert said.startswith("export: the folder answers otherwise than the model, by nan")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    said = message_of(lambda: export(tmp_path / "run", tmp_path / "leaf.pt2"))
    assert said.startswith("export: torch cannot write this network for images of any size (division by zero)")
    assert not list(tmp_path.glob("leaf*"))


def test_a_form_is_told_by_its_word_or_suffix(tmp_path: Path) -> None:
    known = "onnx (.onnx), torch (.pt2), timm (.safetensors), smp (a folder), hub (a folder)"
    assert (
        message_of(lambda: export(tmp_path, "leaf"))
        == f"--out leaf: its suffix tells no form; say --to with one of: {known}"
    )
    assert message_of(lambda: export(tmp_path, "leaf", "tflite")).startswith(
        "--to tflite: is no form; say --to with one of"
    )
    assert message_of(lambda: export(tmp_path, tmp_path / "leaf.pt", "torch")).endswith(
        "give a name that ends with .pt2"
    )
    (tmp_path / "leaf.pt2.json").touch()
    assert "leaf.pt2.json: exists already; name a new file" in message_of(
        lambda: export(tmp_path, tmp_path / "leaf.pt2")
    )


def test_a_distance_is_of_the_largest_value() -> None:
    wanted = torch.tensor([1.0, -4.0, 2.0])
    assert forms.distance(torch.tensor([1.0, -4.0, 3.0]), wanted) == 0.25
    assert forms.distance(torch.tensor([1.0, -4.0]), wanted) == float("inf")


def test_the_page_has_families_of_the_tests_and_no_large_difference() -> None:
    """`python -m tests.parity` writes it; the slow tests make the same forms."""
    rows = parity.lines_of(parity.PAGE.read_text())
    assert list(rows) == [family for family in FAMILIES if family in rows]
    assert {"unet", "upernet", "segformer", "deeplabv3plus"} <= set(rows)
    for line in rows.values():
        figures = [cell.strip() for cell in line.strip("|").split("|")][1:]
        assert len(figures) == len(parity.FORMS_SHOWN)
        assert figures[1] != "-", "torch writes all of them"
        assert all(word == "-" or float(word.removesuffix(" (one)")) < 1e-3 for word in figures)
    assert set(parity.FORMS_SHOWN) < set(FORMS)

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import UserError, load
from ssl_seg.models import DecoderNet, DenseHead, EncoderNet, Features, ModelConfig, SegmentationModel
from ssl_seg.weights.export import (
    build_model,
    export_decoder,
    export_encoder,
    export_model,
    exported_config,
    load_decoder,
    load_encoder,
    load_model_weights,
    read_encoder_info,
    read_model_info,
)
from ssl_seg.weights.fingerprint import fingerprint
from ssl_seg.weights.receipt import match_tensors
from tests.faults import crash_everywhere, message_of


class Backbone(nn.Module):
    def __init__(self, width: int = 4, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.activation = activation

    def forward(self, image: Tensor) -> list[Tensor]:
        first = self.activation(self.norm1(self.conv1(image)))
        second = self.activation(self.conv2(first))
        third = self.conv3(second)
        fourth = F.avg_pool2d(third, 2)
        return [first, second, third, fourth, F.avg_pool2d(fourth, 2)]


class Decoder(DecoderNet):
    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 5
        self.mix = nn.Conv2d(6, 5, 1)

    def forward(self, features: Features) -> Tensor:
        return self.mix(features[1])


def make_encoder(seed: int, width: int = 4, activation: Callable[[Tensor], Tensor] = F.relu) -> EncoderNet:
    torch.manual_seed(seed)
    encoder = EncoderNet(Backbone(width, activation), channels=(width, 6, 8, 8, 8))
    encoder(torch.rand(2, 3, 32, 32))  # so that the running statistics are not those of a fresh layer
    return encoder


def make_model(seed: int) -> SegmentationModel:
    encoder = make_encoder(seed)
    head = DenseHead(Decoder(), 2)
    return SegmentationModel(encoder, head, ("road", "sky"))


# ---- kills ----


def export_0(folder: Path) -> None:
    export_encoder(folder, make_encoder(0), {"seed": 0})
    export_decoder(folder, "denoise", Decoder())


def export_1(folder: Path) -> None:
    export_encoder(folder, make_encoder(1), {"seed": 1})
    export_decoder(folder, "inpaint", Decoder())


def check_exports(folder: Path) -> None:
    encoder = make_encoder(2)
    assert load_encoder(encoder, folder).features_equal
    seed = read_encoder_info(folder)["config"]["seed"]
    assert torch.equal(encoder.backbone.conv1.weight, make_encoder(seed).backbone.conv1.weight)
    assert load_decoder(Decoder(), folder, "denoise").share == 1.0


def test_a_kill_at_each_system_call_of_an_export_leaves_the_old_or_the_new(tmp_path):
    assert crash_everywhere(tmp_path, export_0, export_1, check_exports) >= 20


# ---- receipts ----


def write_foreign(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def replace_weights(folder: Path, change: Callable[[dict[str, Tensor]], None], marked: bool = True) -> None:
    """Change the tensors of an exported encoder as a tool would that keeps the sha256 right, and the marks or none."""
    file = folder / "encoder/encoder.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    described = file.with_suffix(".json")
    info = json.loads(described.read_text())
    if not marked:
        del info["tensors"]
    described.write_text(json.dumps({**info, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("place", ["", "encoder", "encoder/encoder.safetensors"])
def test_an_encoder_comes_back_with_a_full_receipt(tmp_path, place):
    exported, encoder = make_encoder(0), make_encoder(1)
    export_encoder(tmp_path, exported, {"norm": "keep"})
    receipt = load_encoder(encoder, tmp_path / place)
    assert same_weights(encoder, exported)
    assert (receipt.share, receipt.features_equal) == (1.0, True)
    assert receipt.matched == {name: name for name in encoder.state_dict()}
    unusual = (receipt.renamed, receipt.missing, receipt.left_over, receipt.mismatched, receipt.converted)
    assert not any(unusual)
    assert "100.0%" in receipt.summary()
    assert "features equal" in receipt.summary()
    json.dumps(asdict(receipt))
    info = read_encoder_info(tmp_path / place)
    assert (info["config"], info["channels"]) == ({"norm": "keep"}, [4, 6, 8, 8, 8])
    assert sorted(entry.name for entry in (tmp_path / "encoder").iterdir()) == ["encoder.json", "encoder.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "_orig_mod.", "module._orig_mod.encoder."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, suffix, prefix):
    exported, encoder = make_encoder(0), make_encoder(1)
    path = write_foreign(tmp_path / f"x{suffix}", {prefix + name: t for name, t in exported.state_dict().items()})
    receipt = load_encoder(encoder, path)
    assert same_weights(encoder, exported)
    assert (receipt.share, receipt.features_equal) == (1.0, None)
    assert len(receipt.renamed) == (len(receipt.matched) if prefix else 0)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_torch_checkpoint_may_hold_its_tensors_under_a_key(tmp_path, key):
    exported, encoder = make_encoder(0), make_encoder(1)
    torch.save({key: exported.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    load_encoder(encoder, tmp_path / "x.pth")
    assert same_weights(encoder, exported)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_torch_checkpoint_runs_no_code(tmp_path):
    torch.save({"state_dict": make_encoder(0).state_dict(), "x": Canary(tmp_path / "canary")}, tmp_path / "x.pt")
    assert "x.pt" in message_of(lambda: load_encoder(make_encoder(1), tmp_path / "x.pt"))
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol=2))
    assert "y.pt" in message_of(lambda: load_encoder(make_encoder(1), tmp_path / "y.pt"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": {"b": torch.ones(1)}}}, torch.ones(3)])
def test_a_torch_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "x.pt" in message_of(lambda: load_encoder(make_encoder(1), tmp_path / "x.pt"))


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin"])
@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 100, b"PK\x03\x04" + b"\0" * 50, bytes(range(256))])
def test_a_file_of_another_kind_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in message_of(lambda: load_encoder(make_encoder(1), tmp_path / name))


def test_missing_and_left_over_tensors_are_refused_unless_allowed(tmp_path):
    tensors = make_encoder(0).state_dict()
    tensors["fc.weight"] = torch.ones(3)
    del tensors["backbone.conv3.weight"]
    path = write_foreign(tmp_path / "x.safetensors", tensors)
    encoder, untouched = make_encoder(1), make_encoder(1)
    text = message_of(lambda: load_encoder(encoder, path))
    suggestion = "init_allow=[backbone.conv3.weight,fc.weight]"
    for part in ("1 missing: backbone.conv3.weight", "1 left over: fc.weight", suggestion):
        assert part in text
    assert "fc.weight" in message_of(lambda: load_encoder(encoder, path, ["backbone.conv3.*"]))
    assert same_weights(encoder, untouched)
    receipt = load_encoder(encoder, path, ["backbone.conv3.*", "fc.*"])
    assert (receipt.missing, receipt.left_over) == (["backbone.conv3.weight"], ["fc.weight"])
    counts = [parameter.numel() for parameter in encoder.parameters()]
    absent = encoder.backbone.conv3.weight.numel()
    assert receipt.share == pytest.approx(1 - absent / sum(counts))
    assert torch.equal(encoder.backbone.conv1.weight, tensors["backbone.conv1.weight"])
    assert torch.equal(encoder.backbone.conv3.weight, untouched.backbone.conv3.weight)


def test_another_encoder_is_refused_by_its_shapes(tmp_path):
    export_encoder(tmp_path, make_encoder(0, width=5), {})
    text = message_of(lambda: load_encoder(make_encoder(1), tmp_path))
    assert "backbone.conv1.weight (5, 3, 3, 3) for (4, 3, 3, 3)" in text
    globs = ["backbone.conv1.*", "backbone.norm1.*", "backbone.conv2.weight"]
    receipt = load_encoder(make_encoder(1), tmp_path, globs)
    assert receipt.features_equal is False
    assert 0.0 < receipt.share < 1.0
    assert receipt.mismatched["backbone.conv1.weight"] == "(5, 3, 3, 3) for (4, 3, 3, 3)"


def test_weights_of_another_kind_of_number_are_refused(tmp_path):
    tensors = make_encoder(0).state_dict()
    tensors["backbone.conv1.weight"] = torch.ones(4, 3, 3, 3, dtype=torch.uint8)
    path = write_foreign(tmp_path / "x.safetensors", tensors)
    assert "torch.uint8 for torch.float32" in message_of(lambda: load_encoder(make_encoder(1), path))


def test_a_file_that_gives_nothing_is_refused_even_when_everything_is_allowed(tmp_path):
    # The normalization's constants match in every encoder of ours, so they must not count.
    tensors = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1), "layer1.weight": torch.ones(2)}
    path = write_foreign(tmp_path / "x.safetensors", tensors)
    assert "layer1.weight" in message_of(lambda: load_encoder(make_encoder(1), path, ["*"]))
    empty = write_foreign(tmp_path / "empty.safetensors", {})
    assert "no tensors" in message_of(lambda: load_encoder(make_encoder(1), empty, ["*"]))


def swap_colours(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.conv1.weight"] = tensors["backbone.conv1.weight"].flip(1).contiguous()


def forget_statistics(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.norm1.running_mean"].zero_()
    tensors["backbone.norm1.running_var"].fill_(1.0)


def nudge_the_last_stage(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.conv3.weight"][0, 0, 0, 0] += 0.01


def swap_the_order_of_features(tensors: dict[str, Tensor]) -> None:
    for name in ("weight", "bias"):
        tensors[f"backbone.conv3.{name}"] = tensors[f"backbone.conv3.{name}"].flip(0).contiguous()


CHANGES = (swap_colours, forget_statistics, nudge_the_last_stage, swap_the_order_of_features)


@pytest.mark.parametrize("change", CHANGES)
def test_features_tell_what_names_and_shapes_do_not(tmp_path, change):
    export_encoder(tmp_path, make_encoder(0), {})
    replace_weights(tmp_path, change, marked=False)
    encoder, untouched = make_encoder(1), make_encoder(1)
    text = message_of(lambda: load_encoder(encoder, tmp_path))
    assert "init_allow=[features]" in text
    assert same_weights(encoder, untouched)
    receipt = load_encoder(encoder, tmp_path, ["features"])
    assert (receipt.share, receipt.features_equal) == (1.0, False)
    assert "features differ" in receipt.summary()


@pytest.mark.parametrize("change", CHANGES)
def test_marks_name_the_tensors_that_are_others(tmp_path, change):
    exported = make_encoder(0)
    export_encoder(tmp_path, exported, {})
    replace_weights(tmp_path, change)
    encoder = make_encoder(1)
    text = message_of(lambda: load_encoder(encoder, tmp_path))
    assert "changed since the export: backbone." in text
    allowed = text.partition("init_allow=[")[2].rstrip("]").split(",")
    receipt = load_encoder(encoder, tmp_path, allowed)
    before, after = exported.state_dict(), encoder.state_dict()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(receipt.changed) == differing == set(allowed)
    assert "changed since the export" in receipt.summary()


def test_the_same_weights_in_another_architecture_are_refused(tmp_path):
    export_encoder(tmp_path, make_encoder(0), {})
    assert "other features" in message_of(lambda: load_encoder(make_encoder(0, activation=F.silu), tmp_path))
    dilated = make_encoder(0, activation=F.silu)
    dilated.strides = (2, 4, 8, 16, 16)
    text = message_of(lambda: load_encoder(dilated, tmp_path))
    assert "strides [2, 4, 8, 16, 16] here and [2, 4, 8, 16, 32] there" in text


def test_a_file_changed_after_its_export_is_refused(tmp_path):
    export_encoder(tmp_path, make_encoder(0), {})
    file = tmp_path / "encoder/encoder.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    text = message_of(lambda: load_encoder(make_encoder(1), tmp_path, ["*"]))
    assert "encoder.safetensors" in text
    assert "sha256" in text


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_an_export_without_its_json_is_refused(tmp_path, content):
    export_encoder(tmp_path, make_encoder(0), {})
    described = tmp_path / "encoder/encoder.json"
    described.unlink()
    if content is not None:
        described.write_text(content)
    assert "encoder.json" in message_of(lambda: load_encoder(make_encoder(1), tmp_path))


def test_half_precision_is_converted_and_reported(tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in make_encoder(0).state_dict().items()}
    encoder = make_encoder(1)
    receipt = load_encoder(encoder, write_foreign(tmp_path / "x.safetensors", half))
    assert receipt.converted["backbone.conv1.weight"] == "torch.float16 to torch.float32"
    assert "converted" in receipt.summary()
    assert torch.equal(encoder.backbone.conv1.weight, half["backbone.conv1.weight"].float())
    export_encoder(tmp_path, make_encoder(0).half(), {})
    assert load_encoder(encoder, tmp_path).features_equal


def test_a_fingerprint_leaves_the_network_as_it_is():
    encoder = make_encoder(0)
    encoder.backbone.norm1.eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    dice = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = fingerprint(encoder)
    assert inside == fingerprint(encoder)
    assert torch.equal(torch.get_rng_state(), dice)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_fingerprint_does_not_ask_how_weights_lie_in_memory():
    """Else a SegNet trained with `channels_last` may be refused: which value of a window is the largest is rounded."""
    torch.manual_seed(0)
    config = load(ModelConfig, {"encoder": {"type": "segnet_basic"}, "decoder": {"type": "segnet_basic"}})
    model = build_model(config, ("a", "b"))
    lying = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert fingerprint(lying) == fingerprint(model)
    assert not next(lying.parameters()).is_contiguous(), "the network is left as it is"


def test_a_fingerprint_bears_a_map_that_is_absent():
    encoder = make_encoder(0)
    encoder.backbone.forward = lambda image: [image[:, :0], image]
    assert [len(level) for level in fingerprint(encoder)] == [0, 6]


def test_a_diverged_encoder_is_not_exported(tmp_path):
    encoder = make_encoder(0)
    with torch.no_grad():
        encoder.backbone.conv2.bias[0] = math.nan
    assert "not finite" in message_of(lambda: export_encoder(tmp_path, encoder, {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_place_without_an_export_is_one_line(tmp_path, name):
    text = message_of(lambda: load_encoder(make_encoder(0), tmp_path / name))
    assert str(tmp_path / name) in text


def test_decoders_of_several_tasks_lie_side_by_side(tmp_path):
    torch.manual_seed(0)
    first, second, third = Decoder(), Decoder(), Decoder()
    export_decoder(tmp_path, "denoise", first)
    export_decoder(tmp_path, "inpaint", second)
    export_decoder(tmp_path, "inpaint", third)
    decoder = Decoder()
    assert load_decoder(decoder, tmp_path, "denoise").share == 1.0
    assert same_weights(decoder, first)
    load_decoder(decoder, tmp_path / "decoders", "inpaint")
    assert same_weights(decoder, third)
    load_decoder(decoder, tmp_path / "decoders/denoise.safetensors", "denoise")
    assert same_weights(decoder, first)
    assert "decoders/jigsaw" in message_of(lambda: load_decoder(decoder, tmp_path, "jigsaw"))
    assert "../x" in message_of(lambda: export_decoder(tmp_path, "../x", decoder))


@pytest.mark.parametrize("place", ["", "model", "model/model.safetensors"])
def test_a_model_comes_back_with_what_must_be_known_of_it(tmp_path, place):
    exported, model = make_model(0), make_model(1)
    export_model(tmp_path, exported, {"norm": "keep"}, {"resize": (64, 96), "metrics": {"miou": math.nan}})
    info = read_model_info(tmp_path / place)
    assert info["config"] == {"norm": "keep"}
    assert info["class_names"] == ["road", "sky"]
    assert info["resize"] == [64, 96]
    assert info["metrics"] == {"miou": None}
    assert "RGB in [0, 1]" in info["preprocessing"]
    receipt = load_model_weights(model, tmp_path / place)
    assert receipt.features_equal
    assert same_weights(model, exported)


def test_a_model_file_without_its_json_has_no_info(tmp_path):
    path = write_foreign(tmp_path / "model.safetensors", make_model(0).state_dict())
    assert "model.json" in message_of(lambda: read_model_info(path))


def test_an_encoder_can_be_taken_out_of_a_whole_model(tmp_path):
    exported, encoder = make_model(0), make_encoder(1)
    export_model(tmp_path, exported, {})
    path = shutil.copy(tmp_path / "model/model.safetensors", tmp_path / "weights.safetensors")
    receipt = load_encoder(encoder, path, ["head.*"])
    assert same_weights(encoder, exported.encoder)
    assert receipt.renamed["backbone.conv1.weight"] == "encoder.backbone.conv1.weight"


def test_tensors_are_paired_with_exact_names_first():
    module = nn.Linear(2, 2)
    given = {"module.weight": torch.zeros(2, 2), "weight": torch.ones(2, 2), "encoder.bias": torch.ones(2)}
    receipt = match_tensors(Path("x"), module, given)
    assert receipt.matched == {"weight": "weight", "bias": "encoder.bias"}
    assert receipt.left_over == ["module.weight"]


# The JSON beside the weights

ABSENT = object()
OTHERS = (None, "x", 7, -1, math.nan, True, [], [1], [[]], {}, {"a": 1}, ABSENT)


def places(value: Any, most: int | None = None) -> list[tuple[str | int, ...]]:
    """The way to every key of a JSON mapping, and to the first two keys and items of what lies in it."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [(key, *way) for key, inner in items[:most] for way in [(), *places(inner, 2)]]


def replaced(value: Any, way: tuple[str | int, ...], other: Any) -> Any:
    copied = json.loads(json.dumps(value))
    at = copied
    for key in way[:-1]:
        at = at[key]
    if other is ABSENT:
        del at[way[-1]]
    else:
        at[way[-1]] = other
    return copied


SMALLEST = {"encoder": {"type": "timm", "name": "mobilenetv2_035"}, "decoder": {"type": "fpn"}, "norm": "keep"}


@pytest.mark.parametrize("part", ["encoder", "model"])
def test_any_other_value_in_the_json_of_an_export_is_one_line_or_means_the_same(tmp_path: Path, part: str) -> None:
    export_encoder(tmp_path, make_encoder(0), SMALLEST)
    export_model(tmp_path, make_model(0), SMALLEST, {"resize": (64, 96)})
    path = tmp_path / part / f"{part}.json"
    written = json.loads(path.read_text())
    read = read_encoder_info if part == "encoder" else read_model_info
    taken, refusals = set(), []
    for way in places(written):
        for other in OTHERS if len(way) == 1 else OTHERS[::2]:
            path.write_text(json.dumps(replaced(written, way, other)))
            try:
                info = read(tmp_path)
                exported_config(tmp_path, info)
                if part == "encoder":
                    load_encoder(make_encoder(1), tmp_path)
                else:
                    load_model_weights(make_model(1), tmp_path)
                taken.add(str(way[0]))
            except UserError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert all(str(tmp_path) in text and "\n" not in text for text in refusals)
    # What the config says is another network's; of the rest only what may be left out, and what nobody computes with.
    free = {"config", "tensors", "switch_layers", "channels", "strides", "resize", "preprocessing", "class_names"}
    assert taken <= free


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: "absent" if other is ABSENT else str(other))
def test_any_other_value_in_the_json_of_a_decoder_is_one_line_or_means_the_same(tmp_path: Path, other: Any) -> None:
    export_decoder(tmp_path, "model", Decoder())
    path = tmp_path / "decoders" / "model.json"
    written = json.loads(path.read_text())
    for way in places(written):
        path.write_text(json.dumps(replaced(written, way, other)))
        with suppress(UserError):
            load_decoder(Decoder(), tmp_path, "model")


def test_a_file_whose_json_has_lost_its_sha256_is_no_stranger_s(tmp_path: Path) -> None:
    export_encoder(tmp_path, make_encoder(0), {})
    path = tmp_path / "encoder/encoder.json"
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), ("sha256",), ABSENT)))
    assert "holds no sha256" in message_of(lambda: load_encoder(make_encoder(1), path.with_suffix(".safetensors")))


def test_many_tensors_are_suggested_by_their_modules(tmp_path: Path) -> None:
    exported, encoder = make_encoder(0), make_encoder(1)
    tensors = exported.state_dict()
    for module in ("head.mlp.0", "head.mlp.2", "head.last"):
        tensors |= {f"{module}.weight": torch.ones(2), f"{module}.bias": torch.ones(2)}
    path = write_foreign(tmp_path / "x.safetensors", {"fc.weight": torch.ones(2), **tensors})
    text = message_of(lambda: load_encoder(encoder, path))
    assert "model.encoder.pretrained" in text
    allowed = text.partition("init_allow=[")[2].rstrip("]").split(",")
    assert set(allowed) == {"fc.*", "head.mlp.0.*", "head.mlp.2.*", "head.last.*"}
    load_encoder(encoder, path, allowed)
    assert same_weights(encoder, exported)
    many = {f"head.{index}.{name}.weight": torch.ones(1) for index in range(9) for name in "ab"}
    path = write_foreign(tmp_path / "y.safetensors", tensors | many)
    assert message_of(lambda: load_encoder(encoder, path)).endswith("init_allow=[head.*]")


def test_the_teacher_of_a_checkpoint_is_taken_and_named(tmp_path: Path) -> None:
    exported, encoder = make_encoder(0), make_encoder(1)
    other = {f"module.{name}": tensor for name, tensor in make_encoder(2).state_dict().items()}
    torch.save({"student": other, "teacher": exported.state_dict(), "epoch": 1}, tmp_path / "dino.pth")
    receipt = load_encoder(encoder, tmp_path / "dino.pth")
    assert same_weights(encoder, exported)
    assert receipt.path == f"{tmp_path / 'dino.pth'} (teacher)"


def test_a_run_of_the_longest_name_and_the_folder_we_are_in_can_be_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / ("x" * 255)
    export_encoder(run, make_encoder(0), {})
    assert load_encoder(make_encoder(1), run).features_equal
    monkeypatch.chdir(run)
    assert load_encoder(make_encoder(1), ".").features_equal
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_encoder(make_encoder(1), f"~/{run.name}/encoder").features_equal

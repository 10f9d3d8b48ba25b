"""Wrong checkpoints given as `init`: each gives a receipt that is true, or one line that names what is wrong.

Real encoders, whose scales and statistics are not those of a fresh network: there a block may end in a scale of zero
that hides what lies before it.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from ssl_seg import cli
from ssl_seg.config import UserError, load
from ssl_seg.models import DenseHead, EncoderNet, SegmentationModel
from ssl_seg.models.timm import Timm
from ssl_seg.norm.convert import convert_norm
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.weights.export import export_encoder, export_model, load_encoder, load_model_weights
from ssl_seg.weights.fingerprint import ROUNDED_TOLERANCES, TOLERANCE, feature_distance, fingerprint
from tests.faults import message_of
from tests.small import finetuning, pretraining
from tests.weights.test_export import Canary, Decoder, make_encoder, make_model, replace_weights, write_foreign


def trained(name: str = "resnet10t", seed: int = 0, norm: str = "keep") -> EncoderNet:
    torch.manual_seed(seed)
    encoder = Timm(name=name).build()
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            layer.momentum = 1.0
    encoder(torch.rand(4, 3, 64, 64))
    convert_norm(encoder, norm)
    return encoder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    export_encoder(folder / "small", trained(), {})
    for name in ("resnet18", "resnet34"):
        export_encoder(folder / name, trained(name), {})
    export_encoder(folder / "group", trained(norm="group"), {})
    return folder


Tensors = dict[str, Tensor]
STEM = "backbone.network.conv1.0.weight"  # resnet10t has a stem of three convolutions
BLOCK = "backbone.network.layer2.0"


def renamed(tensors: Tensors, old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


def under_ddp(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def under_another_name(tensors: Tensors) -> None:
    del tensors["mean"], tensors["std"]
    renamed(tensors, "backbone.network.", "model.student.")


def names_of_another_version(tensors: Tensors) -> None:
    renamed(tensors, ".bn1.", ".norm1.")


def stages_in_another_order(tensors: Tensors) -> None:
    renamed(tensors, "layer1", "layer_")
    renamed(tensors, "layer2", "layer1")
    renamed(tensors, "layer_", "layer2")


def layers_in_another_order(tensors: Tensors) -> None:
    first, second = f"{BLOCK}.bn1.weight", f"{BLOCK}.bn2.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def colours_swapped(tensors: Tensors) -> None:
    tensors[STEM] = tensors[STEM].flip(1)


def statistics_of_a_fresh_network(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "running_" in name:
            tensor.fill_(float(name.endswith("var")))


def kernel_transposed(tensors: Tensors) -> None:
    tensors[f"{BLOCK}.conv2.weight"] = tensors[f"{BLOCK}.conv2.weight"].transpose(2, 3)


def one_stage_random(tensors: Tensors) -> None:
    other = trained(seed=1).state_dict()
    tensors.update({name: other[name] for name in tensors if "layer3" in name and name.endswith("weight")})


def to_half(tensors: Tensors) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items() if tensor.is_floating_point()})


def to_half_with_a_kernel_transposed(tensors: Tensors) -> None:
    kernel_transposed(tensors)
    to_half(tensors)


def not_a_number(tensors: Tensors) -> None:
    tensors[STEM][0, 0, 0, 0] = math.nan


def outcome(encoder: EncoderNet, path: Path) -> str:
    """`loaded` and the receipt, or `refused` and why: then the network has been left as it was."""
    before = copy.deepcopy(encoder).state_dict()
    try:
        receipt = load_encoder(encoder, path)
    except UserError as error:
        text = str(error)
    else:
        return f"loaded: {receipt.summary()}"
    assert "\n" not in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    return f"refused: {text}"


# What is done to the tensors -> what is said of the export with a sha256 that fits, and of the bare file.
WRONG: dict[Callable[[Tensors], None], tuple[str, str]] = {
    under_ddp: ("loaded: .* renamed; features equal", "loaded: .* renamed; features not compared"),
    under_another_name: ("refused: .*2 missing: mean, std", "loaded: .* renamed, 2 missing; features not compared"),
    names_of_another_version: ("refused: .* missing: .*bn1.* left over: .*norm1",) * 2,
    stages_in_another_order: ("refused: .* of another shape: .*layer1.0.conv1.weight",) * 2,
    layers_in_another_order: ("refused: .*2 changed since the export: .*bn1.weight, .*bn2.weight", "loaded"),
    colours_swapped: ("refused: .*1 changed since the export: .*network.conv1.0.weight", "loaded"),
    statistics_of_a_fresh_network: ("refused: .* changed since the export: .*running_mean", "loaded"),
    kernel_transposed: (r"refused: .*1 changed since the export: .*layer2.0.conv2.weight", "loaded"),
    one_stage_random: (r"refused: .* changed since the export: .*layer3.0", "loaded"),
    to_half: ("loaded: .* converted from float16; features equal to 0.1", "loaded: .* converted from float16"),
    to_half_with_a_kernel_transposed: (r"refused: .*1 changed since the export: .*layer2.0.conv2", "loaded"),
    not_a_number: ("refused: .*1 not finite: .*network.conv1.0.weight",) * 2,
}
FIT = (
    layers_in_another_order,
    colours_swapped,
    statistics_of_a_fresh_network,
    kernel_transposed,
    one_stage_random,
    to_half_with_a_kernel_transposed,
)


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_checkpoint_is_named_or_renamed(exports, tmp_path, change):
    shutil.copytree(exports / "small", tmp_path / "run")
    encoder = trained(seed=2)
    in_its_folder, bare = WRONG[change]
    replace_weights(tmp_path / "run", change)
    assert re.match(in_its_folder, outcome(encoder, tmp_path / "run"))
    alone = Path(shutil.copy(tmp_path / "run/encoder/encoder.safetensors", tmp_path / "alone.safetensors"))
    said = outcome(trained(seed=2), alone)
    assert re.match(bare, said)
    if said.startswith("loaded"):
        assert said.endswith("features not compared"), (
            "a bare file has nothing to compare with, and the receipt says so"
        )


@pytest.mark.parametrize("change", FIT)
def test_features_alone_find_what_fits_by_name_and_shape(exports, tmp_path, change):
    shutil.copytree(exports / "small", tmp_path / "run")
    replace_weights(tmp_path / "run", change, marked=False)
    assert re.match(
        r"refused: .* other features .* init_allow=\[features\]", outcome(trained(seed=2), tmp_path / "run")
    )


@pytest.mark.parametrize(
    ("given", "name", "norm", "said"),
    [
        ("resnet34", "resnet18", "keep", r"refused: .* left over: .*layer1\.2"),
        ("resnet18", "resnet34", "keep", r"refused: .* missing: .*layer1\.2"),
        ("small", "resnet10t", "group", "refused: .* left over: .*num_batches_tracked"),
        ("group", "resnet10t", "keep", "refused: .* missing: .*running_mean"),
        ("small", "mobilenetv2_035", "keep", "refused: .*nothing in it fits this network"),
    ],
)
def test_another_network_is_named(exports, given, name, norm, said):
    assert re.match(said, outcome(trained(name, norm=norm), exports / given))


def test_a_damaged_file_is_named(exports, tmp_path):
    shutil.copytree(exports / "small", tmp_path / "run")
    file = tmp_path / "run/encoder/encoder.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert re.match("refused: .*encoder.safetensors: not readable", outcome(trained(seed=2), tmp_path / "run"))
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    assert re.match(r"refused: .*sha256 differs; other tensors: \S+\)", outcome(trained(seed=2), tmp_path / "run"))


@pytest.mark.parametrize("classes", [1, 3])
def test_a_head_of_other_classes_is_named(tmp_path, classes):
    exported = make_encoder(0)
    head = DenseHead(Decoder(), classes)
    names = ("road", "sky", "tree")[:classes]
    export_model(tmp_path, SegmentationModel(exported, head, names), {})
    text = message_of(lambda: load_model_weights(make_model(1), tmp_path))
    assert f"2 of another shape: head.last.weight ({classes}, 5, 3, 3) for (2, 5, 3, 3)" in text


@pytest.mark.parametrize("change", [None, lambda tensors: tensors["encoder.backbone.conv2.bias"].add_(1.0)])
def test_the_encoder_of_a_model_is_judged_by_its_marks(tmp_path, change):
    export_model(tmp_path, make_model(0), {})
    file = tmp_path / "model/model.safetensors"
    assert "head.last.weight" in message_of(lambda: load_encoder(make_encoder(1), file))
    if change is None:
        receipt = load_encoder(make_encoder(1), file, ["head.*"])
        assert (receipt.share, receipt.features_equal, receipt.changed) == (1.0, None, [])
        return
    for name in ("safetensors", "json"):
        (tmp_path / "encoder").mkdir(exist_ok=True)
        shutil.copy(file.with_suffix(f".{name}"), tmp_path / f"encoder/encoder.{name}")
    replace_weights(tmp_path, change)
    text = message_of(lambda: load_encoder(make_encoder(1), tmp_path / "encoder", ["head.*"]))
    assert "1 changed since the export: backbone.conv2.bias" in text


def test_timms_own_file_fits_but_for_its_classifier(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t")
    path = write_foreign(tmp_path / "resnet10t.safetensors", theirs.state_dict())
    encoder = trained()
    text = message_of(lambda: load_encoder(encoder, path))
    assert "2 left over: fc.bias, fc.weight" in text
    receipt = load_encoder(encoder, path, text.partition("init_allow=[")[2].rstrip("]").split(","))
    assert (receipt.share, receipt.missing, receipt.features_equal) == (1.0, ["mean", "std"], None)
    image = torch.rand(1, 3, 64, 64)
    theirs.eval(), encoder.eval()
    last = theirs.forward_features((image - encoder.mean) / encoder.std)
    assert torch.allclose(encoder(image)[-1], last, rtol=1e-4, atol=1e-5)


def test_a_file_with_two_networks_is_not_guessed_at(tmp_path):
    tensors = {
        f"{part}.{name}": t for part in ("student", "teacher") for name, t in make_encoder(0).state_dict().items()
    }
    text = message_of(lambda: load_encoder(make_encoder(1), write_foreign(tmp_path / "x.pt", tensors)))
    assert "'student.'" in text
    assert "'teacher.'" in text


def test_what_a_fresh_block_hides_from_the_features_its_marks_show(tmp_path):
    torch.manual_seed(0)
    encoder = Timm(name="resnet10t").build()  # its blocks end in a scale of zero
    export_encoder(tmp_path, encoder, {})
    before = fingerprint(encoder)
    kernel = encoder.get_parameter(f"{BLOCK}.conv2.weight")
    with torch.no_grad():
        kernel.copy_(kernel.transpose(2, 3).clone())
    assert fingerprint(encoder) == before
    replace_weights(tmp_path, kernel_transposed)
    assert f"1 changed since the export: {BLOCK}.conv2.weight" in message_of(lambda: load_encoder(trained(), tmp_path))


def test_features_are_equal_again_by_a_wide_margin_and_wrong_ones_far_off():
    encoder = trained()
    exported = fingerprint(encoder)
    torch.set_num_threads(2)
    again = feature_distance(exported, fingerprint(encoder))
    torch.set_num_threads(1)
    assert again < TOLERANCE / 10
    half = feature_distance(exported, fingerprint(copy.deepcopy(encoder).half()))
    brain = feature_distance(exported, fingerprint(copy.deepcopy(encoder).bfloat16()))
    assert TOLERANCE < half < ROUNDED_TOLERANCES[torch.float16] / 2
    assert half < brain < ROUNDED_TOLERANCES[torch.bfloat16] / 2
    for name, parameter in encoder.named_parameters():
        if parameter.shape[2:] == (3, 3):
            kept = parameter.detach().clone()
            parameter.data = kept.transpose(2, 3).contiguous()
            assert feature_distance(exported, fingerprint(encoder)) > 1000 * TOLERANCE, name
            parameter.data = kept


def test_a_look_at_the_features_leaves_the_network_as_it_was():
    """One in float32 on the CPU is looked at itself, any other in a copy: both find the same and change nothing."""
    encoder = trained().train()
    encoder.backbone.network.layer1.eval()
    modes = [part.training for part in encoder.modules()]
    before = copy.deepcopy(encoder.state_dict())
    itself = fingerprint(encoder)
    assert [part.training for part in encoder.modules()] == modes
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
    assert fingerprint(copy.deepcopy(encoder).double()) == itself


def test_fingerprints_that_cannot_be_compared_are_infinitely_far():
    one = [[0.0, 1.0, 0.5]]
    assert feature_distance(one, one) == 0.0
    assert feature_distance(one, [[0.0, 1.0, 0.51]]) == pytest.approx(0.01)
    for other in ([], [[]], [*one, *one], [[0.0, 1.0, math.nan]], [[math.inf, 1.0, 0.5]]):
        assert feature_distance(one, other) == math.inf
    assert feature_distance([[0.0, 0.0, 0.0]], [[0.0, 0.0, 1e-9]]) == math.inf
    assert feature_distance([[]], [[]]) == 0.0


def test_an_encoder_in_half_precision_keeps_its_own_marks(tmp_path):
    export_encoder(tmp_path, make_encoder(0).bfloat16(), {})
    encoder = make_encoder(1)
    receipt = load_encoder(encoder, tmp_path)
    assert (receipt.features_equal, receipt.tolerance, receipt.changed) == (True, TOLERANCE, [])
    assert "converted from bfloat16" in receipt.summary()
    replace_weights(tmp_path, to_half)
    assert load_encoder(encoder, tmp_path).features_equal, "a precision without a mark is judged by features"


def run(*words: str) -> int:
    return cli.run(lambda: cli.app(args=[str(word) for word in words], prog_name="ssl-seg", standalone_mode=False))


def as_yaml(path: Path, values: dict) -> Path:
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_commands_refuse_a_wrong_init_in_one_line(tmp_path, capsys, stage):
    exported = trained("mobilenetv2_035", norm="group")
    export_encoder(tmp_path / "good", exported, load(PretrainConfig, pretraining()).model.dump())
    shutil.copytree(tmp_path / "good", tmp_path / "wrong")
    replace_weights(tmp_path / "wrong", lambda tensors: tensors["backbone.network.conv_stem.weight"].neg_())
    shutil.copytree(tmp_path / "good", tmp_path / "without")
    (tmp_path / "without/encoder/encoder.json").unlink()
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    (tmp_path / "notes.txt").write_text("weights")
    config = as_yaml(tmp_path / "c.yaml", pretraining(steps=1) if stage == "pretrain" else finetuning(steps=1))
    for init, said in {
        "wrong": "conv_stem.weight",
        "without": "encoder.json",
        "pickle.pth": "save its state_dict alone",
        "notes.txt": "state_dict saved by torch",
        "nowhere": "does not exist",
    }.items():
        assert run(stage, config, f"init={tmp_path / init}", "--out", tmp_path / "out", "--quiet") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0]
        assert str(tmp_path / init) in lines[0]
    assert not (tmp_path / "canary").exists()
    # The same command with the right file goes ahead.
    assert run(stage, config, f"init={tmp_path / 'good'}", "--out", tmp_path / "out") == 0
    assert "100.0% of the parameters" in capsys.readouterr().err

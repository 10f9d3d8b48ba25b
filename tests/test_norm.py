"""Conversion of batch norm: nothing but the statistics changes, and a sample no longer depends on its batch."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from ssl_seg.config import UserError
from ssl_seg.models import ModelConfig
from ssl_seg.norm import convert_norm, has_batch_norm, num_groups


@given(st.integers(1, 4096))
def test_groups_divide_the_channels_and_are_neither_many_nor_thin(channels):
    groups = num_groups(channels)
    assert channels % groups == 0
    assert groups == 1 or (groups <= 32 and channels // groups >= 4)
    larger = [other for other in range(groups + 1, 33) if channels % other == 0 and channels // other >= 4]
    assert not larger


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 16), (24, 6), (17, 1), (3, 1), (96, 24), (320, 32)])
def test_group_counts_of_usual_widths(channels, groups):
    assert num_groups(channels) == groups


def _with_activation() -> nn.Sequential:
    torch.manual_seed(0)
    layer = BatchNormAct2d(24, eps=1e-3, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.0))
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return nn.Sequential(layer)


def test_group_norm_keeps_affine_weights_eps_and_activation():
    module = _with_activation()
    layer = module[0]
    x = torch.randn(2, 24, 5, 7)
    assert convert_norm(module, "group") == 1
    wanted = F.silu(F.group_norm(x, 6, layer.weight, layer.bias, eps=1e-3))
    torch.testing.assert_close(module(x), wanted)
    assert module[0].weight is layer.weight
    assert set(module.state_dict()) == {"0.weight", "0.bias"}


def test_dropout_inside_the_layer_is_kept():
    module = _with_activation()
    module[0].drop = nn.Dropout(0.5)
    convert_norm(module, "group")
    x = torch.randn(2, 24, 5, 7)
    assert (module.train()(x) == 0).any()
    assert not (module.eval()(x) == 0).any()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "vovnet39a"])
def test_every_layer_of_a_timm_network_is_converted_and_its_activations_stay(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    activations = [type(getattr(layer, "act", None)) for layer in layers]
    assert convert_norm(network, "group") == len(layers) > 10
    groups = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    assert not has_batch_norm(network)
    assert [type(getattr(layer, "act", None)) for layer in groups] == activations


def test_a_layer_used_twice_stays_shared():
    shared = nn.BatchNorm2d(8)
    module = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)])
    assert convert_norm(module, "group") == 1
    assert module[0][0] is module[1][0]


def test_mode_dtype_and_frozen_weights_are_kept():
    module = nn.Sequential(nn.BatchNorm2d(8)).double().eval()
    module.requires_grad_(False)
    convert_norm(module, "group")
    assert not module[0].training
    assert module[0].weight.dtype == torch.float64
    assert not module[0].weight.requires_grad


def test_layers_without_affine_weights_are_converted():
    module = nn.Sequential(nn.BatchNorm2d(8, eps=0.1, affine=False))
    convert_norm(module, "group")
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(module(x), F.group_norm(x, 2, eps=0.1))


@pytest.mark.parametrize("kind", ["keep", "batch"])
def test_keep_and_batch_change_nothing(kind):
    module = nn.Sequential(nn.BatchNorm2d(8))
    before = module[0]
    assert convert_norm(module, kind) == 0
    assert module[0] is before


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_a_network_without_batch_norm_is_refused_in_one_line(kind):
    with pytest.raises(UserError, match="LayerNorm networks have nothing to convert; use norm: keep") as caught:
        convert_norm(nn.Sequential(nn.GroupNorm(2, 8)), kind)
    assert "\n" not in str(caught.value)


def test_keep_is_always_allowed():
    assert convert_norm(nn.Sequential(nn.LayerNorm(8)), "keep") == 0


def _train_pass(config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    encoder = config.build_encoder()
    head = config.spec(encoder).dense(3)
    pair = copy.deepcopy((encoder, head))  # a pass of batch norm changes its running statistics
    whole = head(encoder(x), x.shape[-2:])
    alone = pair[1](pair[0](x[:1]), x.shape[-2:])
    return (whole[:1] - alone).abs().max() / whole.abs().max()


def test_with_group_norm_a_sample_does_not_depend_on_its_batch_while_training():
    x = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    model = {"encoder": {"type": "timm", "name": "resnet18"}, "decoder": {"type": "unet"}}
    assert _train_pass(ModelConfig.model_validate(model | {"norm": "group"}), x) < 1e-4
    assert _train_pass(ModelConfig.model_validate(model | {"norm": "batch"}), x) > 1e-2


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("convnext_atto", "unet"), ("resnet18", "fpn"), ("resnet18", "deeplabv3plus"), ("convnext_atto", "upernet")],
)
def test_group_converts_whichever_of_encoder_and_decoder_has_batch_norm(encoder, decoder):
    model = {"encoder": {"type": "timm", "name": encoder}, "decoder": {"type": decoder}, "norm": "group"}
    config = ModelConfig.model_validate(model)
    built = config.build_encoder()
    assert not has_batch_norm(built)
    assert not has_batch_norm(config.spec(built).dense(3))


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_a_model_is_refused_only_where_no_part_of_it_has_batch_norm(kind):
    model = {"encoder": {"type": "timm", "name": "convnext_atto"}, "decoder": {"type": "fpn"}, "norm": kind}
    with pytest.raises(UserError, match="use norm: keep"):
        ModelConfig.model_validate(model).build_encoder()


def test_asking_the_decoder_leaves_the_random_numbers_alone():
    states = []
    for kind in ("keep", "group"):
        model = {"encoder": {"type": "timm", "name": "convnext_atto"}, "decoder": {"type": "unet"}, "norm": kind}
        torch.manual_seed(0)
        ModelConfig.model_validate(model).build_encoder()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)

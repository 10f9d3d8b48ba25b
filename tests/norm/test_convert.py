"""Norm layers against torch's own and against the paper's formulas, what conversions keep, and clean statistics."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Samples
from ssl_seg.models import ModelConfig
from ssl_seg.norm import convert
from ssl_seg.norm.convert import GAP, convert_norm, has_batch_norm, norm_shares
from ssl_seg.norm.layers import FrozenNorm, GroupNorm, SwitchNorm2d, SyncNorm, _warn_of_cpu, num_groups
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options, recalibrate
from ssl_seg.stages.start import build_module
from ssl_seg.training.learner import Learner, not_decayed
from ssl_seg.training.loop import train
from ssl_seg.training.processes import Processes
from tests.processes import in_pair
from tests.small import finetuning, pretraining
from tests.two_processes import cut_after

KINDS = ("sync", "group", "instance", "layer", "switch", "switch_sync", "frozen")


# ---- conversion ----


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
    """A trained layer of timm's: affine weights, statistics, an activation."""
    torch.manual_seed(0)
    layer = BatchNormAct2d(24, eps=1e-3, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.0))
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return nn.Sequential(layer)


def _switched(x: Tensor, layer: nn.Module, shares: Tensor) -> Tensor:
    """The paper's formulas as they stand, in evaluation mode, with the same shares for mean and variance."""
    mean, var = _paper_moments(x, (layer.running_mean, layer.running_var))
    mixed = [sum(share * moment for share, moment in zip(shares, moments, strict=True)) for moments in (mean, var)]
    normal = (x - mixed[0]) / (mixed[1] + layer.eps).sqrt()
    return normal * layer.weight[:, None, None] + layer.bias[:, None, None]


NEAR_BATCH = torch.tensor([0.0, 0.0, GAP]).softmax(0)
ORACLES: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "sync": lambda x, y: F.batch_norm(x, y.running_mean, y.running_var, y.weight, y.bias, eps=y.eps),
    "group": lambda x, y: F.group_norm(x, 6, y.weight, y.bias, y.eps),
    "instance": lambda x, y: F.instance_norm(x, weight=y.weight, bias=y.bias, eps=y.eps),
    "layer": lambda x, y: F.layer_norm(x, x.shape[1:], eps=y.eps) * y.weight[:, None, None] + y.bias[:, None, None],
    "switch": lambda x, y: _switched(x, y, NEAR_BATCH),
    "switch_sync": lambda x, y: _switched(x, y, NEAR_BATCH),
    "frozen": lambda x, y: F.batch_norm(x, y.running_mean, y.running_var, y.weight, y.bias, eps=y.eps),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_changes_the_statistics_and_nothing_else(kind: str, plain: bool) -> None:
    module = _with_activation().eval()
    if plain:
        layer = nn.BatchNorm2d(24, eps=1e-3).eval()
        layer.load_state_dict(module[0].state_dict())
        module = nn.Sequential(layer)
    layer = module[0]
    x = torch.randn(2, 24, 5, 7)
    assert convert_norm(module, kind) == 1
    expected = ORACLES[kind](x, layer)
    torch.testing.assert_close(module(x), expected if plain else F.silu(expected))
    assert module[0].weight is layer.weight or kind == "frozen"
    assert not module[0].training


def test_group_norm_keeps_weights_alone():
    module = _with_activation()
    convert_norm(module, "group")
    assert set(module.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sync"])
def test_dropout_inside_the_layer_is_kept(kind: str) -> None:
    module = _with_activation()
    module[0].drop = nn.Dropout(0.5)
    convert_norm(module, kind)
    x = torch.randn(2, 24, 5, 7)
    assert (module.train()(x) == 0).any()
    assert not (module.eval()(x) == 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "vovnet39a"])
def test_every_layer_of_a_timm_network_is_converted_and_its_activations_stay(name: str, kind: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
        layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        activations = [type(getattr(layer, "act", nn.Identity())) for layer in layers]
        assert convert_norm(network, kind) == len(layers) > 10
    ours = (GroupNorm, SwitchNorm2d, FrozenNorm, SyncNorm)
    made = [layer for layer in network.modules() if isinstance(layer, ours)]
    assert has_batch_norm(network) == (kind == "sync")
    assert [type(layer.act) for layer in made] == activations


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_twice_stays_shared(kind: str) -> None:
    shared = nn.BatchNorm2d(8)
    module = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)])
    assert convert_norm(module, kind) == 1
    assert module[0][0] is module[1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_mode_dtype_and_frozen_weights_are_kept(kind: str) -> None:
    module = nn.Sequential(nn.BatchNorm2d(8)).double().eval()
    module.requires_grad_(False)
    convert_norm(module, kind)
    assert not module[0].training
    floats = [value for value in module.state_dict().values() if value.is_floating_point()]
    assert all(value.dtype == torch.float64 for value in floats)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module(torch.randn(2, 8, 4, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_affine_weights_are_converted(kind: str) -> None:
    module = nn.Sequential(nn.BatchNorm2d(8, eps=0.1, affine=False)).eval()
    convert_norm(module, kind)
    x = torch.randn(2, 8, 3, 3)
    assert module(x).isfinite().all()
    if kind == "group":
        torch.testing.assert_close(module(x), F.group_norm(x, 2, eps=0.1))


@pytest.mark.parametrize("kind", ["keep", "batch"])
def test_keep_and_batch_change_nothing(kind):
    module = nn.Sequential(nn.BatchNorm2d(8))
    before = module[0]
    assert convert_norm(module, kind) == 0
    assert module[0] is before


@pytest.mark.parametrize("kind", ["batch", *KINDS])
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
    assert _train_pass(ModelConfig.model_validate(model | {"norm": "switch"}), x) > 1e-2


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


@pytest.mark.parametrize("kind", ["batch", "group", "switch", "frozen"])
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


def test_frozen_is_for_the_encoder_and_leaves_the_decoder_its_batch_norm() -> None:
    config = ModelConfig.model_validate({"decoder": {"type": "unet"}, "norm": "frozen"})
    encoder = config.build_encoder()
    assert not has_batch_norm(encoder)
    assert has_batch_norm(config.spec(encoder).dense(3))
    swin = {"encoder": {"name": "convnext_atto"}, "decoder": {"type": "unet"}, "norm": "frozen"}
    with pytest.raises(UserError, match="use norm: keep"):
        ModelConfig.model_validate(swin).build_encoder()


# ---- the smallest maps and batches ----


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sync"])
def test_small_maps_train(kind: str, images: int, size: tuple[int, int]) -> None:
    module = nn.Sequential(nn.BatchNorm2d(8))
    convert_norm(module, kind)
    x = torch.randn(images, 8, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert y.std() > 0.1, "the map must not become a constant"
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_instance_norm_of_a_single_pixel_is_layer_norm() -> None:
    layer = nn.BatchNorm2d(8)
    module = nn.Sequential(layer)
    convert_norm(module, "instance")
    x = torch.randn(3, 8, 1, 1)
    torch.testing.assert_close(module(x), F.group_norm(x, 1, layer.weight, layer.bias))


def test_one_value_a_channel_leaves_the_running_statistics_alone() -> None:
    layer = SwitchNorm2d(4)
    layer(torch.randn(1, 4, 1, 1))
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert torch.equal(layer.running_var, torch.ones(4))


# ---- frozen and sync ----


def test_frozen_layers_never_change() -> None:
    module = nn.Sequential(nn.Conv2d(3, 24, 3), *_with_activation())
    convert_norm(module, "frozen")
    before = {name: value.clone() for name, value in module[1].state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module.train()(torch.randn(4, 3, 6, 6)).sum().backward()
        optimizer.step()
    assert not list(module[1].parameters())
    assert module[0].weight.grad.abs().sum() > 0, "the gradient goes through"
    assert all(torch.equal(value, before[name]) for name, value in module[1].state_dict().items())


@pytest.mark.parametrize("kind", ["frozen", "sync"])
def test_weights_go_from_batch_norm_and_back(kind: str) -> None:
    trained, other = _with_activation(), _with_activation()
    nn.init.zeros_(other[0].running_mean)
    convert_norm(other, kind)
    other.load_state_dict(trained.state_dict())
    x = torch.randn(2, 24, 5, 5)
    torch.testing.assert_close(other.eval()(x), trained.eval()(x))
    _with_activation().load_state_dict(other.state_dict())


def test_statistics_that_are_not_kept_cannot_be_frozen() -> None:
    with pytest.raises(UserError, match="no running statistics"):
        convert_norm(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "frozen")


def test_sync_on_the_cpu_is_batch_norm_and_says_so_once() -> None:
    _warn_of_cpu.cache_clear()
    module = nn.Sequential(*_with_activation(), *_with_activation())
    batch = copy.deepcopy(module)
    convert_norm(module, "sync")
    x = torch.randn(4, 24, 5, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.eval()(x)
        assert not caught, "what is evaluated needs no synchronisation"
        for _ in range(2):
            torch.testing.assert_close(module.train()(x), batch(x))
    assert ["norm: sync: works on GPUs only" in str(warning.message) for warning in caught] == [True]
    torch.testing.assert_close(module.state_dict(), batch.state_dict())


# ---- switch norm ----


def _paper_moments(x: Tensor, running: tuple[Tensor, Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Means and variances over a channel, an image, and a channel of all images, from the pixels themselves."""
    means, variances = [], []
    for dims in ((2, 3), (1, 2, 3), (0, 2, 3)):
        mean = x.mean(dims, keepdim=True)
        means.append(mean)
        variances.append((x - mean).square().mean(dims, keepdim=True))
    if running is not None:
        means[2], variances[2] = (value[None, :, None, None] for value in running)
    return means, variances


def _paper(layer: SwitchNorm2d, x: Tensor, running: tuple[Tensor, Tensor] | None) -> Tensor:
    means, variances = _paper_moments(x, running)
    exp_mean, exp_var = layer.mean_logits.exp(), layer.var_logits.exp()
    mean = sum(exp_mean[k] / exp_mean.sum() * means[k] for k in range(3))
    var = sum(exp_var[k] / exp_var.sum() * variances[k] for k in range(3))
    gamma, beta = layer.weight[None, :, None, None], layer.bias[None, :, None, None]
    return gamma * (x - mean) / (var + layer.eps).sqrt() + beta


def _random_layer(channels: int, dtype: torch.dtype = torch.float64) -> SwitchNorm2d:
    torch.manual_seed(1)
    layer = SwitchNorm2d(channels).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return layer


SHAPES = [(4, 6, 5, 7), (1, 6, 5, 7), (4, 6, 1, 1), (1, 6, 1, 1), (3, 1, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_switch_norm_is_the_papers_in_values_and_gradients(shape: tuple[int, ...], training: bool) -> None:
    layer = _random_layer(shape[1]).train(training)
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).requires_grad_()
    running = None if training else (layer.running_mean.clone(), layer.running_var.clone())
    wanted = _paper(layer, x, running)
    direction = torch.randn(shape, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    wanted_gradients = torch.autograd.grad((wanted * direction).sum(), leaves)
    given = layer(x)
    gradients = torch.autograd.grad((given * direction).sum(), leaves)
    torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)


@pytest.mark.parametrize("training", [True, False])
def test_the_gradients_are_those_of_finite_differences(training: bool) -> None:
    layer = _random_layer(3).train(training)
    x = torch.randn(3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    names = list(dict(layer.named_parameters()))

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        # On a copy: each call of a training layer moves its statistics.
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize(
    ("share", "other"),
    [
        (0, lambda x, y: F.instance_norm(x, weight=y.weight, bias=y.bias)),
        (1, lambda x, y: F.group_norm(x, 1, y.weight, y.bias)),
        (2, lambda x, y: F.batch_norm(x, None, None, y.weight, y.bias, training=True)),
    ],
)
def test_a_share_of_one_is_torchs_own_norm(share: int, other: Callable[[Tensor, nn.Module], Tensor]) -> None:
    layer = _random_layer(6, torch.float32)
    for logits in (layer.mean_logits, layer.var_logits):
        logits.data = torch.where(torch.arange(3) == share, 100.0, 0.0)
    x = torch.randn(4, 6, 9, 5) * 3 + 1
    torch.testing.assert_close(layer(x), other(x, layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_running_statistics_are_batch_norms(momentum: float | None) -> None:
    batch, switch = nn.BatchNorm2d(5, momentum=momentum), SwitchNorm2d(5, momentum=momentum)
    for seed in range(4):
        x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        batch(x), switch(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(switch, name), getattr(batch, name))
    before = copy.deepcopy(switch.state_dict())
    switch.eval()(x)
    torch.testing.assert_close(switch.state_dict(), before, rtol=0, atol=0)


def test_without_running_statistics_evaluation_uses_the_batch() -> None:
    layer = SwitchNorm2d(4, track_running_stats=False)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_under_autocast(dtype: torch.dtype) -> None:
    layer = _random_layer(6, torch.float32)
    exact = copy.deepcopy(layer)
    x = (torch.randn(4, 6, 16, 16) + 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        given = layer(x)
    assert given.dtype == dtype
    torch.testing.assert_close(given, exact(x.float()).to(dtype))
    torch.testing.assert_close(layer.running_mean, exact.running_mean)
    assert layer.running_mean.dtype == torch.float32


def test_large_means_keep_their_digits() -> None:
    """Float32 squares of these means have no digit left for the variance between them."""
    layer = SwitchNorm2d(8)
    x = torch.randn(4, 8, 8, 8) + 3e3
    torch.testing.assert_close(layer(x), SwitchNorm2d(8).double()(x.double()).float(), rtol=0, atol=5e-3)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.double().var((0, 2, 3)).float(), rtol=1e-3, atol=0)


def test_memory_format_is_kept_and_does_not_matter() -> None:
    layer = _random_layer(6, torch.float32)
    x = torch.randn(4, 6, 9, 5)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(x))


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("shape", [(3, 6, 17, 16), (3, 6, 5, 7), (1, 6, 1, 1), (4, 1, 16, 16), (3, 6, 9), (4, 6)])
def test_the_quick_way_is_the_plain_one(shape: tuple[int, ...], laid: str, dtype: torch.dtype, training: bool) -> None:
    """Both ways of memory, large and small maps: `plainly` is differentiated by autograd."""
    if laid == "channels_last" and len(shape) != 4:
        pytest.skip("of images alone")
    layers = [_random_layer(6 if shape[1] == 6 else 1, torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    given = LAID[laid]((torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype))
    direction = torch.randn(shape, dtype=torch.float64).to(dtype)
    found = []
    for layer, way in zip(layers, (SwitchNorm2d.forward, SwitchNorm2d.plainly), strict=True):
        x = given.detach().requires_grad_()
        y = way(layer.train(training), x)
        y.backward(direction)
        assert x.grad is not None
        gradients = [parameter.grad for parameter in layer.parameters()]
        found.append((y.detach(), x.grad, *gradients, *layer.state_dict().values()))
    near = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 2e-2)}[dtype]
    for quick, plain in zip(*found, strict=True):
        assert quick.dtype == plain.dtype
        torch.testing.assert_close(quick, plain, rtol=near[0], atol=near[1])


@pytest.mark.parametrize("laid", ["rows", "channels_last"])
def test_half_precision_keeps_the_map_as_it_came_and_tables(laid: str) -> None:
    kept = {}
    x = LAID[laid](torch.randn(4, 16, 32, 32)).bfloat16().requires_grad_()

    def keep(value: Tensor) -> Tensor:
        kept[value.data_ptr()] = value.nbytes
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        SwitchNorm2d(16)(x)
    assert sum(kept.values()) < 1.02 * x.nbytes


@pytest.mark.parametrize("laid", ["rows", "channels_last"])
def test_the_quick_way_is_as_exact_as_the_plain_one_where_means_are_large(laid: str) -> None:
    x, direction = (LAID[laid](torch.randn(4, 8, 32, 32)) for _ in range(2))
    x = x + 1e3
    off = {}
    exact = SwitchNorm2d(8).double()
    wide = x.double().requires_grad_()
    exact.plainly(wide).backward(direction.double())
    for way in (SwitchNorm2d.forward, SwitchNorm2d.plainly):
        layer, own = SwitchNorm2d(8), x.detach().requires_grad_()
        way(layer, own).backward(direction)
        assert own.grad is not None
        found = (own.grad, layer.weight.grad, layer.var_logits.grad)
        wanted = (wide.grad, exact.weight.grad, exact.var_logits.grad)
        off[way.__name__] = [(a.double() - b).norm().item() for a, b in zip(found, wanted, strict=True)]
    assert all(quick <= 1.5 * plain for quick, plain in zip(off["forward"], off["plainly"], strict=True)), off


def test_the_gradient_has_no_gradient() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(SwitchNorm2d(3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_traced_program_is_of_torchs_own_operations() -> None:
    layer = _random_layer(4, torch.float32).eval()
    x = torch.randn(2, 4, 6, 5)
    program = torch.export.export(layer, (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_logits_are_not_decayed() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4))
    convert_norm(module, "switch")
    assert not_decayed(module) == set(dict(module.named_parameters()))


def test_norm_shares_are_the_softmax_in_the_networks_order() -> None:
    module = nn.ModuleDict({"b": nn.Sequential(nn.BatchNorm2d(4)), "a": nn.Sequential(nn.BatchNorm2d(6))})
    convert_norm(module, "switch")
    module["a"][0].mean_logits.data = torch.tensor([0.0, 1.0, 2.0]).log()
    found = norm_shares(module)
    assert [(layer.name, layer.channels) for layer in found] == [("b.0", 4), ("a.0", 6)]
    assert found[0].mean == found[0].var == pytest.approx([1 / 3] * 3)
    assert found[1].mean == pytest.approx([0, 1 / 3, 2 / 3])


# ---- from batch norm to switch norm ----


def _trained() -> tuple[nn.Module, Tensor]:
    """A small network fitted for a moment, with the statistics that came of it, and a batch."""
    torch.manual_seed(0)
    convolutions = [[nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()] for i, o in ((3, 8), (8, 16), (16, 16))]
    network = nn.Sequential(*[layer for block in convolutions for layer in block], nn.Conv2d(16, 2, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(40):
        x = torch.rand(8, 3, 32, 32) * torch.rand(8, 3, 1, 1)
        optimizer.zero_grad()
        target = F.avg_pool2d(x, 8)
        (
            network(x) - torch.cat([target.mean(1, keepdim=True), target.amax(1, keepdim=True)], 1)
        ).square().mean().backward()
        optimizer.step()
    return network, x


def test_the_default_gap_keeps_the_network_and_lets_the_shares_learn() -> None:
    network, x = _trained()
    before = network.eval()(x)
    change, gradient = {}, {}
    for gap in (0.0, GAP, 12.0):
        switched = copy.deepcopy(network)
        convert_norm(switched, "switch", gap)
        change[gap] = ((switched(x) - before).norm() / before.norm()).item()
        logits = [value for name, value in switched.named_parameters() if name.endswith("_logits")]
        gradients = torch.autograd.grad(switched.train()(x).square().mean(), logits)
        gradient[gap] = torch.cat(gradients).norm().item()
    assert change[12.0] < change[GAP] < 0.05 < change[0.0]
    assert gradient[GAP] > 50 * gradient[12.0] > 0


def test_a_network_that_has_seen_nothing_starts_with_equal_shares() -> None:
    fresh = nn.Sequential(nn.BatchNorm2d(4))
    convert_norm(fresh, "switch")
    assert torch.equal(fresh[0].mean_logits, torch.zeros(3))
    counted = nn.Sequential(nn.BatchNorm2d(4))  # as published weights without a count
    counted[0].running_mean += 1
    convert_norm(counted, "switch", gap=2.0)
    assert counted[0].var_logits.tolist() == [0, 0, 2.0]
    assert torch.equal(counted[0].running_mean, torch.ones(4))


# ---- clean statistics ----


def _with_dropout() -> nn.Sequential:
    inside = BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.5))
    return nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), inside, SwitchNorm2d(4))


def test_recalibration_averages_the_batches_and_changes_nothing_else() -> None:
    torch.manual_seed(0)
    module = _with_dropout()
    module(torch.randn(4, 3, 6, 6))
    module[3].eval()
    weights = {name: value.clone() for name, value in module.named_parameters()}
    modes = [part.training for part in module.modules()]
    batches = [torch.randn(4, 3, 5, 5) * 3 + 2 for _ in range(3)]
    dice = torch.get_rng_state()
    assert convert.recalibrate(module, batches) == 3
    assert torch.equal(torch.get_rng_state(), dice)
    assert [part.training for part in module.modules()] == modes
    assert module[1].momentum == module[4].momentum == 0.1
    assert all(torch.equal(value, weights[name]) for name, value in module.named_parameters())
    assert all(value.grad is None for value in module.parameters())
    first = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(module[1].running_mean, first)
    spread = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(module[1].running_var, spread)
    second = [module[2](F.batch_norm(batch, None, None, training=True)) for batch in batches]
    torch.testing.assert_close(module[3].running_mean, torch.stack([x.mean((0, 2, 3)) for x in second]).mean(0))
    third = [F.relu(F.batch_norm(x, None, None, training=True)) for x in second]
    torch.testing.assert_close(module[4].running_mean, torch.stack([x.mean((0, 2, 3)) for x in third]).mean(0))


def test_recalibration_is_torchs_update_bn_where_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    theirs = copy.deepcopy(ours)
    batches = [torch.randn(2, 3, 7, 6) * 3 + 2 for _ in range(3)]
    assert convert.recalibrate(ours, batches) == 2
    torch.optim.swa_utils.update_bn(batches, theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", ["batch", "sync", "switch", "switch_sync"])
def test_in_evaluation_the_batchs_own_statistics_are_those_of_training(kind: str) -> None:
    torch.manual_seed(0)
    dropping = BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.5))
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Dropout(0.5), dropping)
    convert_norm(module, kind)
    with convert.unsynchronised(module):
        module(torch.randn(8, 3, 5, 5) * 3 + 2)
    module.eval()
    image = torch.randn(1, 3, 6, 7) - 4
    before, running = copy.deepcopy(module.state_dict()), module(image)
    with convert.batch_statistics(module):
        found = module(image)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(module(image), running)
    assert not torch.allclose(found, running, atol=0.1)
    trained = copy.deepcopy(module).train()
    for layer in trained.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    with convert.unsynchronised(trained):
        torch.testing.assert_close(found, trained(image))


def test_statistics_that_are_constants_stay_what_they_are() -> None:
    module = _with_activation()
    convert_norm(module, "frozen")
    assert not convert.layers_with_statistics(module.eval())
    image = torch.randn(1, 24, 5, 5)
    expected = module(image)
    with convert.batch_statistics(module):
        assert torch.equal(module(image), expected)


def test_frozen_statistics_and_those_of_no_batch_stay() -> None:
    module = _with_activation()
    before = copy.deepcopy(module.state_dict())
    assert convert.recalibrate(module, []) == 0
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    convert_norm(module, "frozen")
    assert convert.recalibrate(module, _never()) == 0


def _never() -> Any:
    raise AssertionError("there is nothing to estimate, so nothing is to be read")
    yield


BATCH = {"encoder": {"name": "mobilenetv2_035"}, "decoder": {"channels": [16, 16, 8, 8, 8]}, "norm": "batch"}
NUM_ENCODER, NUM_DECODER = 51, 10  # its batch norm layers


def _pretrained(folder: Path, kind: str, **changed: Any) -> Path:
    values = {**pretraining(steps=3, save_every=3), "model": {**BATCH, "norm": kind}, "recalibrate": 8, **changed}
    pretrain(load(PretrainConfig, values), Options(folder, quiet=True))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("norm")
    return {kind: _pretrained(place / kind, kind) for kind in ("batch", "switch", "group")}


def test_the_export_has_clean_statistics_and_the_state_those_of_training(runs: dict[str, Path], tmp_path: Path) -> None:
    off = _pretrained(tmp_path / "off", "switch", recalibrate=0)
    name = "backbone.network.bn1.running_mean"
    state = load_file(next((runs["switch"] / "state").glob("step_*")) / "state.safetensors")
    kept = load_file(off / "encoder" / "encoder.safetensors")
    clean = load_file(runs["switch"] / "encoder" / "encoder.safetensors")
    assert torch.equal(kept[name], state[f"model/encoder.{name}"])
    assert not torch.equal(clean[name], kept[name])
    statistics = {name for name in clean if not torch.equal(clean[name], kept[name])}
    assert all(name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in statistics)
    decoders = [load_file(run / "decoders" / "denoise.safetensors") for run in (off, runs["switch"])]
    changed = [name for name, value in decoders[0].items() if not torch.equal(value, decoders[1][name])]
    assert any("running_mean" in name for name in changed)
    assert all(value.any() for name, value in decoders[1].items() if name.endswith("running_mean")), "they were shown"
    # Taken up again, a finished run exports the same.
    before = clean[name].clone()
    _pretrained(runs["switch"], "switch")
    assert torch.equal(load_file(runs["switch"] / "encoder" / "encoder.safetensors")[name], before)


def test_one_image_is_too_few_to_recalibrate_on() -> None:
    with pytest.raises(UserError, match="recalibrate: one image has no batch statistics"):
        load(PretrainConfig, {**pretraining(), "recalibrate": 1})


# ---- weights of one norm for a network of another ----


def _finetuned(folder: Path, init: Path | None, kind: str | None, **changed: Any) -> dict[str, Any]:
    """Fine-tuning of one step at no learning rate: what it started from, and its receipt."""
    values = {**finetuning(steps=1, lr=1e-30, save_every=1), "init": init and str(init), "select": "last", **changed}
    values["model"] = {} if kind is None else {"norm": kind}
    if init is None:
        values["model"] = {**BATCH, "norm": kind}
    done = finetune(load(FinetuneConfig, values), Options(folder, quiet=True))
    receipts = json.loads((done.folder / "receipts.json").read_text())
    return {"weights": load_file(done.folder / "model" / "model.safetensors"), **receipts}


BN1 = "encoder.backbone.network.bn1"


@pytest.mark.parametrize("kind", ["switch", "group", "instance", "frozen", "keep", None])
def test_fine_tuning_converts_what_was_pretrained_with_batch_norm(
    runs: dict[str, Path], tmp_path: Path, kind: str | None
) -> None:
    done = _finetuned(tmp_path / "run", runs["batch"], kind, transfer="encoder+denoise")
    for part in ("encoder", "decoder"):
        assert done[part]["share"] == 1.0
        assert not done[part]["left_over"] + done[part]["missing"]
    assert done["encoder"]["features_equal"] is True
    exported = load_file(runs["batch"] / "encoder" / "encoder.safetensors")
    weight = "backbone.network.blocks.1.0.conv_pw.weight"
    torch.testing.assert_close(done["weights"][f"encoder.{weight}"], exported[weight])
    statistics = f"{BN1}.running_var" in done["weights"]
    assert statistics == (kind not in ("group", "instance"))
    if kind == "switch":
        logits = [value for name, value in done["weights"].items() if name.endswith("_logits")]
        assert len(logits) == 2 * (NUM_ENCODER + NUM_DECODER)
        assert all(value.tolist() == pytest.approx([0, 0, GAP]) for value in logits)
    if kind == "frozen":
        frozen = "backbone.network.bn1.running_mean"
        assert torch.equal(done["weights"][f"encoder.{frozen}"], exported[frozen])
        decoder = load_file(runs["batch"] / "decoders" / "denoise.safetensors")
        counted = [name for name in decoder if name.endswith("num_batches_tracked")]
        assert len(counted) == NUM_DECODER
        for name in counted:  # batch norm as before, which has taken in the one step
            assert done["weights"][f"head.decoder.{name}"] == decoder[name] + 1


def test_a_fresh_decoder_beside_a_converted_encoder_starts_with_equal_shares(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    weights = _finetuned(tmp_path / "run", runs["batch"], "switch")["weights"]
    assert weights[f"{BN1}.mean_logits"].tolist() == pytest.approx([0, 0, GAP])
    decoder = [value for name, value in weights.items() if "head" in name and name.endswith("_logits")]
    assert len(decoder) == 2 * NUM_DECODER
    assert all(value.tolist() == pytest.approx([0, 0, 0]) for value in decoder)


@pytest.mark.parametrize("kind", ["switch", None])
def test_switch_norm_goes_on_with_what_it_has_learnt(runs: dict[str, Path], tmp_path: Path, kind: str | None) -> None:
    done = _finetuned(tmp_path / "run", runs["switch"], kind)
    assert (done["encoder"]["share"], done["encoder"]["features_equal"]) == (1.0, True)
    exported = load_file(runs["switch"] / "encoder" / "encoder.safetensors")
    logits = exported["backbone.network.bn1.mean_logits"]
    assert logits.abs().sum() > 0, "else the next line shows nothing"
    torch.testing.assert_close(done["weights"][f"{BN1}.mean_logits"], logits)


@pytest.mark.parametrize(("trained", "kind"), [("switch", "batch"), ("switch", "group"), ("group", "switch")])
def test_a_norm_that_cannot_be_converted_is_named(
    runs: dict[str, Path], tmp_path: Path, trained: str, kind: str
) -> None:
    message = rf"model.norm: {kind}, but init was trained with {trained}, .*leave model.norm out"
    with pytest.raises(UserError, match=message) as caught:
        _finetuned(tmp_path / "run", runs[trained], kind)
    assert "\n" not in str(caught.value)


def test_an_init_that_has_nothing_to_convert_is_named(tmp_path: Path) -> None:
    values = pretraining(steps=1)
    values["model"] = {"encoder": "convnext_atto", "decoder": values["model"]["decoder"]}
    pretrain(load(PretrainConfig, values), Options(tmp_path / "init", quiet=True))
    with pytest.raises(UserError, match=r"norm: switch: LayerNorm networks have nothing to convert"):
        _finetuned(tmp_path / "run", tmp_path / "init", "switch")


def test_a_converted_run_is_taken_up_again(runs: dict[str, Path], tmp_path: Path) -> None:
    train = finetuning(steps=4, save_every=3)
    values = {**train, "init": str(runs["batch"]), "model": {"norm": "switch"}, "select": "last"}
    config = load(FinetuneConfig, values)
    whole = finetune(config, Options(tmp_path / "whole", quiet=True))
    cut_after(3, tmp_path / "whole", tmp_path / "cut")
    again = finetune(config, Options(tmp_path / "cut", quiet=True))
    models = [load_file(done.folder / "model" / "model.safetensors") for done in (whole, again)]
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)


def test_nothing_can_be_frozen_from_scratch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.norm: frozen: a new encoder has no statistics"):
        _finetuned(tmp_path / "run", None, "frozen")


def test_pretraining_goes_on_from_batch_norm_with_switch_norm(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = _pretrained(tmp_path / "run", "switch", init=str(runs["batch"]))
    receipt = json.loads((folder / "receipts.json").read_text())["encoder"]
    assert (receipt["share"], receipt["features_equal"]) == (1.0, True)
    logits = load_file(folder / "encoder" / "encoder.safetensors")["backbone.network.bn1.mean_logits"]
    assert logits[2] > GAP - 0.1


# ---- two processes ----


def _direction(x: Tensor) -> Tensor:
    return torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)


def _whole_batch() -> Tensor:
    return torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 1


def _one_layer(x: Tensor, direction: Tensor, sync: bool) -> dict[str, Tensor]:
    """What a layer makes of a batch, and the gradients of a sum over it."""
    layer = _random_layer(4)
    layer.sync = sync
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * direction).sum().backward()
    seen = {name: value.grad for name, value in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **seen, "mean": layer.running_mean, "var": layer.running_var}


def _learn(kind: str) -> dict[str, Any]:
    """Losses of a few steps, then clean statistics."""
    values = {**pretraining(steps=5, batch_size=8, lr=1e-4), "model": {**BATCH, "norm": kind}}
    config = load(PretrainConfig, values)
    processes = Processes(config.train)
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, processes)
    samples = {"pool": Samples(config.data.pool, config.augment, config.seed)}
    streams = open_streams(samples, config.train, processes, learner.module.tasks, 0)
    losses = [step.metrics["train/loss"] for step in train(learner, streams, 0, seed=0)]
    assert recalibrate(learner, samples["pool"], 8) == NUM_ENCODER + NUM_DECODER
    state = learner.module.state_dict()
    total = float(sum(value.double().sum() for value in state.values()))
    statistics = torch.cat([value for name, value in state.items() if name.endswith("running_mean")])
    return {"losses": losses, "statistics": statistics, "totals": processes.gather([total])}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("norm_ddp") / "seen.pt"
    in_pair(_in_each_process, str(out))
    return torch.load(out, weights_only=True)


def test_synchronised_statistics_are_those_of_the_whole_batch(two: dict[str, Any]) -> None:
    x = _whole_batch()
    alone = _one_layer(x, _direction(x), sync=False)
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([part[name] for part in two["layer"]]), alone[name])
    for name in ("weight", "bias", "mean_logits", "var_logits"):
        torch.testing.assert_close(sum(part[name] for part in two["layer"]), alone[name])
    for part in two["layer"]:
        torch.testing.assert_close(part["mean"], alone["mean"])
        torch.testing.assert_close(part["var"], alone["var"])


def test_two_processes_with_synchronised_switch_norm_learn_what_one_does(two: dict[str, Any]) -> None:
    alone = _learn("switch")
    assert two["learnt"]["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    # As a whole: Adam's first steps are signs, so a weight whose gradient is all rounding may go the other way.
    difference = two["learnt"]["statistics"] - alone["statistics"]
    assert difference.norm() < 5e-3 * alone["statistics"].norm()


def test_all_processes_end_with_the_same_clean_statistics(two: dict[str, Any]) -> None:
    for kind in ("learnt", "apart"):
        first, second = two[kind]["totals"]
        assert first == second


def _in_each_process(out: str) -> None:
    learnt = _learn("switch_sync")
    apart = _learn("batch")
    processes = Processes(load(PretrainConfig, pretraining()).train)
    x = _whole_batch()
    mine = slice(0, 2) if processes.is_main else slice(2, 6)  # shares of different size
    layers = processes.gather([_one_layer(x[mine], _direction(x)[mine], sync=True)])
    if processes.is_main:
        torch.save({"learnt": learnt, "apart": apart, "layer": layers}, out)

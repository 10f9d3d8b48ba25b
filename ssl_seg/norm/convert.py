"""Which normalization a network uses, chosen after it is built: one word for every architecture.

Ours, because the libraries' own options do not cover it: `norm_layer` arguments crash for many encoders, timm's
`BatchNormAct2d` is a `BatchNorm2d` that also holds a dropout and the activation, so a plain swap would drop the ReLUs,
and no library at hand has switchable normalization. Every layer here therefore ends with `act(drop(...))`, which are
identities where the batch norm had none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.norm.layers import LOGITS, SHARES, BatchNorm, FrozenNorm, GroupNorm, SwitchNorm2d, SyncNorm, num_groups

Kind = Literal["keep", "batch", "sync", "group", "instance", "layer", "switch", "switch_sync", "frozen"]
# Layers of the kinds of a row hold the same tensors under the same names, and evaluate alike.
BATCH_KINDS = ("keep", "batch", "sync", "frozen")
SWITCH_KINDS = ("switch", "switch_sync")
STATISTICS = ("running_mean", "running_var")
FOLLOWING = (*STATISTICS, "num_batches_tracked")  # what a training pass changes
CHANNELWISE = ("weight", "running_mean")  # tensors with a value a channel, where the layer has them
# Measured on a resnet18 U-Net of 30 layers, pretrained on street photographs, for gaps of 0, 2, 5, 8
# and 12: the output changes by 56, 28, 2.9, 0.16 and under 0.01 %, and the gradient of the shares is 35, 37, 5.9, 0.32
# and 0.006 (in thousandths). At 5 the network is still itself, and its shares can still be learnt. torch 2.14, CPU.
GAP = 5.0


# ---- conversion ----


def convert_norm(module: nn.Module, kind: Kind, gap: float = GAP) -> int:
    """Change the batch norm layers inside `module`, in place, and return how many were replaced.

    - `keep`: nothing is changed, whatever the layers are.
    - `batch`: the batch norm layers stay (0 replaced); a promise that there are some.
    - `sync`: batch norm over the images of all processes; on the CPU plain batch norm, with one warning in training.
    - `group`: group norm, so that a sample's result no longer depends on its batch.
    - `instance`: each channel of each image by itself.
    - `layer`: each image by itself, over `(C, H, W)`.
    - `switch`: a learnt mixture of instance, layer and batch statistics (`SwitchNorm2d`); `switch_sync`: its batch
      statistics over the images of all processes.
    - `frozen`: the running statistics and affine weights become constants.

    Affine weights and biases, eps, activation, dropout, device, mode and requires_grad are kept; running statistics
    where the new layer has some. A switch norm starts with equal shares, as in the paper, where the batch norm has seen
    no image yet; else from its trained self: the batch logit leads by `gap`. Layers of other kinds
    (layer norm, group norm) stay as they are.

    Raises UserError for a module without batch norm, except for `keep`.
    """
    if kind == "keep":
        return 0
    if not has_batch_norm(module):
        raise UserError(f"norm: {kind}: LayerNorm networks have nothing to convert; use norm: keep")
    makers: dict[str, Callable[[BatchNorm], nn.Module]] = {
        "sync": _sync,
        "group": partial(_group, groups_of=num_groups),
        "instance": partial(_group, groups_of=int),
        "layer": partial(_group, groups_of=lambda channels: 1),
        "switch": partial(_switch, gap=gap, sync=False),
        "switch_sync": partial(_switch, gap=gap, sync=True),
        "frozen": _frozen,
    }
    return _replace(module, makers[kind]) if kind in makers else 0


def has_batch_norm(module: nn.Module) -> bool:
    """Whether there is something to convert: a layer that cannot train on one image of one pixel."""
    return any(isinstance(layer, BatchNorm) for layer in module.modules())


def are_one(a: Kind, b: Kind) -> bool:
    """Whether trained weights go from one kind to the other as they are."""
    return a == b or any(a in row and b in row for row in (BATCH_KINDS, SWITCH_KINDS))


def loads_as(exported: Kind, wanted: Kind) -> Kind:
    """The norm under which weights trained with `exported` are loaded into a network that is to have `wanted`.

    `keep` means: as they were, and then `convert_norm`, which can only keep the statistics of what is there.
    """
    return "keep" if exported in BATCH_KINDS and wanted not in BATCH_KINDS else wanted


def is_fresh(layer: BatchNorm | FrozenNorm) -> bool:
    """Whether a norm layer's running statistics are still those it was built with, or absent.

    Their own values say it: published weights often come with a count of 0 batches.
    """
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or mean.is_meta:
        return True
    return not mean.any() and bool((var == 1).all())


def _group(layer: BatchNorm, groups_of: Callable[[int], int]) -> nn.Module:
    channels = layer.num_features
    return _with_weights(GroupNorm(groups_of(channels), channels, layer.eps, layer.affine), layer)


def _sync(layer: BatchNorm) -> nn.Module:
    return _with_statistics(_with_weights(SyncNorm(layer), layer), layer)


def _switch(layer: BatchNorm, gap: float, sync: bool) -> nn.Module:
    new = SwitchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, sync)
    if not is_fresh(layer):
        for logits in (new.mean_logits, new.var_logits):
            logits.data[SHARES.index("batch")] = gap
    like = next((value for value in (layer.weight, layer.running_mean) if value is not None), new.mean_logits)
    new.to(like.device, like.dtype)
    if layer.affine:
        new.requires_grad_(layer.weight.requires_grad)
    return _with_statistics(_with_weights(new, layer), layer)


def _frozen(layer: BatchNorm) -> nn.Module:
    if layer.running_mean is None:
        raise UserError("norm: frozen: a batch norm layer here keeps no running statistics; use another norm")
    return FrozenNorm(layer)


def _with_weights(new: nn.Module, old: BatchNorm) -> nn.Module:
    # The same Parameter objects: an optimizer or a requires_grad flag that was set before still holds.
    new.weight = old.weight
    new.bias = old.bias
    return new


def _with_statistics(new: nn.Module, old: BatchNorm) -> nn.Module:
    for name in (*STATISTICS, "num_batches_tracked"):
        setattr(new, name, getattr(old, name))
    return new


def _replace(module: nn.Module, make: Callable[[BatchNorm], nn.Module]) -> int:
    made: dict[nn.Module, nn.Module] = {}  # a layer that two parents share stays shared
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BatchNorm):
                if layer not in made:
                    made[layer] = _finish(make(layer), layer)
                setattr(parent, name, made[layer])
    return len(made)


def _finish(new: nn.Module, old: nn.Module) -> nn.Module:
    new.train(old.training)  # before the parts that have a mode of their own come in
    new.drop = getattr(old, "drop", new.drop)
    new.act = getattr(old, "act", new.act)
    return new


# ---- what a network has learnt ----


@dataclass(frozen=True)
class Shares:
    """What a switch norm layer mixes: shares of instance, layer and batch statistics, each three summing to 1."""

    name: str
    channels: int | None  # None: it has neither affine weights nor running statistics
    mean: tuple[float, ...]
    var: tuple[float, ...]


def norm_shares(model: nn.Module) -> list[Shares]:
    """The shares of every switch norm layer, in the order in which `model` holds them."""
    return shares_in(model.state_dict(), switch_layers(model))


def shares_in(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[Shares]:
    """The shares of the switch norm layers `names`, from a state dict or an exported file."""
    found = []
    for name in names:
        prefix = f"{name}." if name else ""
        mean, var = (tensors[f"{prefix}{logits}"].float().softmax(0) for logits in LOGITS)
        channels = next((len(tensors[f"{prefix}{key}"]) for key in CHANNELWISE if f"{prefix}{key}" in tensors), None)
        found.append(Shares(name, channels, tuple(mean.tolist()), tuple(var.tolist())))
    return found


def switch_layers(model: nn.Module) -> list[str]:
    """The names of the switch norm layers; a state dict's file forgets their order."""
    return [name for name, layer in model.named_modules() if isinstance(layer, SwitchNorm2d)]


# ---- running statistics ----


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that each process fills from its own share of a batch; frozen layers fill none."""
    layers = [layer for layer in module.modules() if not isinstance(layer, FrozenNorm)]
    buffers = [named for layer in layers for named in layer.named_buffers(recurse=False)]
    return [value for name, value in buffers if name in STATISTICS]


def layers_with_statistics(module: nn.Module) -> list[BatchNorm | SwitchNorm2d]:
    """Those that keep running statistics and normalize by them in evaluation; frozen ones, which are constants, not."""
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm | SwitchNorm2d)]
    return [layer for layer in layers if layer.running_mean is not None]


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, norm layers in evaluation mode take the statistics of what they are given; the running ones stay.

    Of one image these are the image's own. Nothing else is as in training: dropout is off, and processes do not meet.
    """
    layers = layers_with_statistics(module)
    kept = [(layer, name, getattr(layer, name)) for layer in layers for name in STATISTICS]
    for layer, name, _ in kept:
        setattr(layer, name, None)  # torch's layers, timm's and ours: where none are kept, those of the batch are taken
    try:
        yield
    finally:
        for layer, name, value in kept:
            setattr(layer, name, value)


class OneByOne(nn.Module):
    """A model whose batch norms take the statistics of the image at hand, each image by itself, for the running ones.

    The batch's share of a switch norm likewise. So an answer does not depend on what else is in the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        with batch_statistics(self.model):
            return torch.cat([self.model(one) for one in image.split(1)])


def follow_once(module: nn.Module) -> None:
    """Have the running statistics inside follow each batch once, where checkpointing computes a forward pass again.

    torch's `checkpoint` restores random numbers for its second pass, and lets statistics follow twice.
    """
    for layer in layers_with_statistics(module):
        layer.register_forward_pre_hook(_put_copies)
        layer.register_forward_hook(_put_back, always_call=True)  # torch ends a second pass early, by an exception


def _put_copies(layer: Any, _: object) -> None:
    # A forward pass inside a backward one is a second one. torch has no public word for it; its checkpointing asks so.
    if torch._C._current_graph_task_id() != -1:
        layer.first_statistics = [getattr(layer, name) for name in FOLLOWING]
        for name, value in zip(FOLLOWING, layer.first_statistics, strict=True):
            setattr(layer, name, None if value is None else value.clone())


def _put_back(layer: Any, *_: object) -> None:
    for name, value in zip(FOLLOWING, layer.__dict__.pop("first_statistics", ()), strict=False):
        setattr(layer, name, value)


def recalibrate(module: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object] | None = None) -> int:
    """Estimate the running statistics inside `module` anew, and give the number of layers that have some.

    Each becomes the plain average over `batches`, which should be of one size; `forward` shows the module a batch
    (itself if None). Dropout is off, gradients are not made, and all else (modes, momenta, weights, the state of the
    random numbers) is as before. Frozen layers keep theirs. Nothing is read where there is nothing to estimate.

    torch's `swa_utils.update_bn` does so for batch norm alone, and with dropout on.
    """
    layers = layers_with_statistics(module)
    if not layers:
        return 0
    show = forward or module
    seen = 0
    with _averaging(module, layers), torch.no_grad():
        for batch in batches:
            if seen == 0:
                for layer in layers:
                    layer.reset_running_stats()
            show(batch)
            seen += 1
    return len(layers) if seen else 0


@contextmanager
def _averaging(module: nn.Module, layers: Sequence[BatchNorm | SwitchNorm2d]) -> Iterator[None]:
    """Evaluation mode, but for `layers`: those take in each batch with equal weight."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.training = True  # not `train()`: the dropout inside a BatchNormAct2d stays off
        layer.momentum = None  # a cumulative average
    try:
        with unsynchronised(module):  # every process sees the same images; together they would count each several times
            yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for part, training in modes:
            part.training = training


# ---- several processes ----


@contextmanager
def unsynchronised(module: nn.Module) -> Iterator[None]:
    """Inside, `sync` and `switch_sync` take a process's own images alone: none waits in a norm layer for another."""
    shared = [layer for layer in module.modules() if isinstance(layer, SwitchNorm2d | SyncNorm) and layer.sync]
    for layer in shared:
        layer.sync = False
    try:
        yield
    finally:
        for layer in shared:
            layer.sync = True


def is_always_synchronised(module: nn.Module) -> bool:
    """Whether it has synchronised norms of another maker, which `keep` has kept and `unsynchronised` leaves alone."""
    return any(isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, SyncNorm) for layer in module.modules())

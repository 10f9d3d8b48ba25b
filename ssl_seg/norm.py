"""Which normalization a network uses, chosen after it is built: one word for every architecture.

Ours, because the libraries' own options do not cover it: `norm_layer` arguments crash for many encoders, and timm's
`BatchNormAct2d` is a `BatchNorm2d` that also holds a dropout and the activation, so a plain swap would drop the ReLUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from ssl_seg.config import UserError

Kind = Literal["keep", "batch", "group"]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MAX_GROUPS = 32  # the default of Wu and He, "Group Normalization", ECCV 2018
MIN_GROUP_CHANNELS = 4  # the same paper's table 3: fewer channels a group are worse, one (instance norm) the worst


class GroupNormAct(nn.GroupNorm):
    """Group norm followed by what a `BatchNormAct2d` holds beside its statistics."""

    def __init__(self, num_groups: int, num_channels: int, eps: float, affine: bool, drop: nn.Module, act: nn.Module):
        super().__init__(num_groups, num_channels, eps=eps, affine=affine)
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        normal = super().forward(x)
        return self.act(self.drop(normal))


def convert_norm(module: nn.Module, kind: Kind) -> int:
    """Change the batch norm layers inside `module`, in place, and return how many were replaced.

    - `keep`: nothing is changed, whatever the layers are.
    - `batch`: the batch norm layers stay (0 replaced); a promise that there are some.
    - `group`: each becomes a group norm, so a sample's result no longer depends on its batch.

    Affine weights and biases, eps, activation, dropout, device and mode are kept; running statistics are dropped.
    Layers of other kinds (layer norm, group norm) stay as they are: they do not depend on the batch.

    Raises UserError for a module without batch norm, except for `keep`.
    """
    if kind == "keep":
        return 0
    if not has_batch_norm(module):
        raise UserError(f"norm: {kind}: LayerNorm networks have nothing to convert; use norm: keep")
    return _replace(module, CONVERSIONS[kind]) if kind in CONVERSIONS else 0


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a sample's result depends on its batch while training."""
    return any(isinstance(layer, BATCH_NORMS) for layer in module.modules())


def num_groups(num_channels: int) -> int:
    """The largest divisor of `num_channels` up to 32 that leaves four channels or more a group; 1 if there is none.

    64 channels get 16 groups, 128 and more powers of two 32, 24 channels 6, a prime number 1.
    """
    limit = min(MAX_GROUPS, num_channels // MIN_GROUP_CHANNELS)
    fitting = (groups for groups in range(limit, 1, -1) if num_channels % groups == 0)
    return next(fitting, 1)


def _group(layer: nn.Module) -> nn.Module:
    channels = layer.num_features
    groups = num_groups(channels)
    if hasattr(layer, "act") and hasattr(layer, "drop"):
        return GroupNormAct(groups, channels, layer.eps, layer.affine, layer.drop, layer.act)
    return nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {"group": _group}


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> int:
    made: dict[nn.Module, nn.Module] = {}  # a layer that two parents share stays shared
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BATCH_NORMS):
                if layer not in made:
                    made[layer] = _like(layer, make(layer))
                setattr(parent, name, made[layer])
    return len(made)


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    # The same Parameter objects: an optimizer or a requires_grad flag that was set before still holds.
    new.weight = old.weight
    new.bias = old.bias
    return new.train(old.training)

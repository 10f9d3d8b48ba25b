"""Normalization layers: switchable (which learns the statistics it takes), group, frozen and synchronised.

Ours, because no library at hand has switch norm (timm, torch, smp), and because each layer ends with the dropout and
activation that timm's batch norms hold.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SHARES = ("instance", "layer", "batch")  # the order of the logits of a SwitchNorm2d
LOGITS = ("mean_logits", "var_logits")
# All that `convert_norm` replaces; timm's layers are subclasses.
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
MAX_GROUPS = 32  # the default of Wu and He, "Group Normalization", ECCV 2018
MIN_GROUP_CHANNELS = 4  # the same paper's table 3: fewer channels a group are worse, one (instance norm) the worst


class SwitchNorm2d(nn.Module):
    """Switchable normalization: a learnt mixture of instance, layer and batch statistics.

    Luo et al., "Differentiable learning-to-normalize via switchable normalization", ICLR 2019, equations 3 to 5. The
    three means are mixed by the softmax of `mean_logits`, the three variances by that of `var_logits`, `(3,)` each in
    the order of `SHARES`. Layer and batch statistics are made from the instance statistics, so the map is read once for
    all three. Takes `(B, C, ...)`; statistics and mixture are float32 (or float64 for such input), the output has the
    input's dtype.

    In evaluation the batch statistics are moving averages, kept as torch keeps those of batch norm (`momentum`, None
    for a cumulative average; unbiased variance). A single value a channel (one image of one pixel) has no variance and
    leaves them as they are; the layer share is what normalizes it. With `sync` the batch statistics are those of all
    processes together, on CPUs too.
    """

    # Buffers: all three, or none of them. `running_mean` is the one to ask.
    running_mean: Tensor | None
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,  # torch's, as are the next three
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        sync: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.sync = sync
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        # Two vectors and not a matrix: the optimizer decays what has two dimensions. Equal shares, as in the paper.
        self.mean_logits = nn.Parameter(torch.zeros(len(SHARES)))
        self.var_logits = nn.Parameter(torch.zeros(len(SHARES)))
        self.register_buffer("running_mean", torch.zeros(num_features) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = x if x.dtype == torch.float64 else x.float()
        mean_in, var_in = InstanceMoments.apply(values)  # (B, C) each
        mean_ln = mean_in.mean(dim=1, keepdim=True)  # (B, 1)
        # The paper has mean(var + mean^2) - mean^2: the same, but it loses all digits where means are large.
        var_ln = var_in.mean(dim=1, keepdim=True) + mean_in.var(dim=1, correction=0, keepdim=True)
        mean_bn, var_bn = self._batch_moments(mean_in, var_in, x)  # (C,) each
        of_means, of_vars = self.mean_logits.softmax(0), self.var_logits.softmax(0)
        mean = of_means[0] * mean_in + of_means[1] * mean_ln + of_means[2] * mean_bn  # (B, C)
        var = of_vars[0] * var_in + of_vars[1] * var_ln + of_vars[2] * var_bn
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        normal = torch.addcmul(_over_pixels(shift, x), values, _over_pixels(scale, x))
        return self.act(self.drop(normal.to(x.dtype)))

    def _batch_moments(self, mean_in: Tensor, var_in: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training and self.running_mean is not None:
            return self.running_mean.to(mean_in.dtype), self.running_var.to(mean_in.dtype)
        shared = self.training and self.sync and dist.is_initialized() and dist.get_world_size() > 1
        if shared:
            mean, var, images = _moments_of_all(mean_in, var_in)
        else:
            mean = mean_in.mean(dim=0)
            var = var_in.mean(dim=0) + mean_in.var(dim=0, correction=0)
            images = len(mean_in)
        count = (
            images * x.shape[2:].numel()
        )  # not before evaluation has left: it would fix the size of a traced program
        if self.training and (shared or count > 1):
            self._follow(mean.detach(), var.detach() * (count / (count - 1)))
        return mean, var

    def _follow(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(var.to(self.running_var.dtype), rate)

    def reset_running_stats(self) -> None:
        """Begin the running statistics anew, if there are any; the name is torch's."""
        if self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1.0)
            self.num_batches_tracked.zero_()

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, sync={self.sync}"


class InstanceMoments(torch.autograd.Function):
    """`(B, C, ...)` to mean and biased variance over the pixels, `(B, C)` each.

    What autograd would do by itself, in a third of its time: the gradient is linear in x, one pass writes it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = _flat(x)
        mean = flat.mean(dim=2)
        var = (flat - mean[..., None]).square_().mean(dim=2)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        pixels = x.shape[2:].numel()
        slope = by_var * (2 / pixels)
        offset = by_mean / pixels - slope * mean
        return torch.addcmul(_over_pixels(offset, x), x, _over_pixels(slope, x))


class SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors, on each; so is the gradient. torch's own version is deprecated (2.14)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> Tensor:
        total = by_total.contiguous().clone()
        dist.all_reduce(total)
        return total


def _moments_of_all(mean_in: Tensor, var_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch mean and variance `(C,)` over the images of all processes, and how many those are; one message."""
    mean, var = mean_in.double(), var_in.double()  # so that the difference of squares below keeps its digits
    mine = torch.cat([mean.sum(dim=0), (var + mean.square()).sum(dim=0), mean.new_full((1,), len(mean))])
    total = SumOverProcesses.apply(mine)
    images = total[-1].detach()
    mean, square = (total[:-1] / images).chunk(2)
    var = square - mean.square()
    return mean.to(mean_in.dtype), var.to(mean_in.dtype), images


def _flat(x: Tensor) -> Tensor:
    """`(B, C, ...)` as `(B, C, pixels)`: a view in both memory formats."""
    return x.flatten(2) if x.ndim > 2 else x[..., None]


def _over_pixels(value: Tensor, x: Tensor) -> Tensor:
    return value[(...,) + (None,) * (x.ndim - 2)]  # (B, C) -> (B, C, 1, 1)


class GroupNorm(nn.GroupNorm):
    """Group norm, with one channel a group instance norm, with one group layer norm over `(C, H, W)`.

    Where a group is a single value (instance norm of a map of one pixel, as in the image pooling of DeepLab) it would
    become zero whatever the image shows: there all channels are one group.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float, affine: bool) -> None:
        super().__init__(num_groups, num_channels, eps=eps, affine=affine)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        alone = self.num_groups == self.num_channels and x.shape[2:].numel() == 1
        groups = 1 if alone else self.num_groups
        normal = F.group_norm(x, groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(normal))


class FrozenNorm(nn.Module):
    """A batch norm whose statistics and affine weights are constants, whatever the mode.

    All are buffers, under the names they have in a batch norm. torchvision's `FrozenBatchNorm2d` is the same without
    activation, and leaves the half precision of autocast.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: BatchNorm) -> None:
        super().__init__()
        self.eps = layer.eps
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            value = getattr(layer, name)
            self.register_buffer(name, None if value is None else value.detach())
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normal = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(normal))

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}"


class SyncNorm(nn.SyncBatchNorm):
    """torch's synchronised batch norm; where that refuses to run, on the CPU, plain batch norm after one warning.

    Plain too where `sync` is taken away for a while.
    """

    def __init__(self, layer: BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.sync = True
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu"
        if self.training and on_cpu and self.sync:
            _warn_of_cpu()
        if self.training and (on_cpu or not self.sync):
            normal = super(nn.SyncBatchNorm, self).forward(x)
        else:
            normal = super().forward(x)
        return self.act(self.drop(normal))


@cache
def _warn_of_cpu() -> None:
    """Once a program, by its first process; what is cached is that it has been said."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            "norm: sync: works on GPUs only; on the CPU it is batch norm over each process's own images", stacklevel=2
        )


def num_groups(num_channels: int) -> int:
    """The largest divisor of `num_channels` up to 32 that leaves four channels or more a group; 1 if there is none.

    64 channels get 16 groups, 128 and more powers of two 32, 24 channels 6, a prime number 1.
    """
    limit = min(MAX_GROUPS, num_channels // MIN_GROUP_CHANNELS)
    fitting = (groups for groups in range(limit, 1, -1) if num_channels % groups == 0)
    return next(fitting, 1)

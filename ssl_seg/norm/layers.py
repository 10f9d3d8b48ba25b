"""Normalization layers: switchable (which learns the statistics it takes), group, frozen and synchronised.

Ours, because no library at hand has switch norm (timm, torch, smp), and because each layer ends with the dropout and
activation that timm's batch norms hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

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
FEWEST_PIXELS = 256  # of a map: below it the kernels' calls take longer than they save
MIN_GROUP_CHANNELS = 4  # the same paper's table 3: fewer channels a group are worse, one (instance norm) the worst


class Mixture(NamedTuple):
    """What a switch norm makes of a map's moments; the first of two is the mean, the second the variance."""

    mixed: Tensor  # (2, B, C)
    instance: Tensor  # (2, B, C)
    layer: Tensor  # (2, B, 1)
    batch: Tensor  # (2, C)
    shares: Tensor  # (2, 3)
    images: int | Tensor | None  # of which the batch's are; None: they are the running ones

    def gradients(self, by_mixed: Tensor, of_all: bool) -> tuple[Tensor, Tensor]:
        """Of a loss the gradients of `instance` and of the logits `(2, 3)`, by that of `mixed`.

        With `of_all` the batch's moments are those of all processes, and so is what comes back to them.
        """
        channels = self.instance.shape[2]
        row, column = by_mixed.sum(dim=2), by_mixed.sum(dim=1)  # (2, B), (2, C)
        products = (by_mixed * self.instance).sum(dim=(1, 2)), (row * self.layer[..., 0]).sum(dim=1)
        by_shares = torch.stack([*products, (column * self.batch).sum(dim=1)], dim=1)
        by_logits = self.shares * (by_shares - (self.shares * by_shares).sum(dim=1, keepdim=True))
        row = row * (self.shares[:, 1:2] / channels)
        found = self.shares[:, :1, None] * by_mixed + row[..., None]
        mean = self.instance[0]
        # A mean over images or channels also moves the variance between them.
        by_mean = 2 * row[1][:, None] * (mean - self.layer[0])
        if self.images is not None:
            if of_all:
                dist.all_reduce(column)
            column = column * (self.shares[:, 2:] / self.images)
            found += column[:, None]
            by_mean += 2 * column[1] * (mean - self.batch[0])
        found[0] += by_mean
        return found, by_logits


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
        if torch.compiler.is_compiling():  # a program that is traced is made of torch's own operations
            return self.act(self.drop(self.plainly(x)))
        normal = _Switched.apply(x, self, self.mean_logits, self.var_logits, self.weight, self.bias)
        return self.act(self.drop(normal))

    def plainly(self, x: Tensor) -> Tensor:
        """The formulas as they stand, without activation, differentiated by autograd: what `_Switched` is held to."""
        values = _wide(x)
        mean, var = self.mixture(_plain_moments(values), x).mixed
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(_over_pixels(shift, x), values, _over_pixels(scale, x)).to(x.dtype)

    def mixture(self, moments: Tensor, x: Tensor) -> Mixture:
        """Of the means and variances of each image and channel of `x`, `(2, B, C)`, those that it is normalized by.

        In training the running statistics follow.
        """
        layer = moments.mean(dim=2, keepdim=True)  # (2, B, 1)
        # The paper has mean(var + mean^2) - mean^2: the same, but it loses all digits where means are large.
        layer = torch.stack([layer[0], layer[1] + (moments[0] - layer[0]).square().mean(dim=1, keepdim=True)])
        batch, images = self._batch_moments(moments, x)  # (2, C)
        shares = torch.stack([self.mean_logits, self.var_logits]).to(moments.dtype).softmax(dim=1)  # (2, 3)
        instance_share, layer_share, batch_share = shares[..., None, None].unbind(1)
        mixed = instance_share * moments + layer_share * layer + batch_share * batch[:, None]
        return Mixture(mixed, moments, layer, batch, shares, images)

    def _batch_moments(self, moments: Tensor, x: Tensor) -> tuple[Tensor, int | Tensor | None]:
        if not self.training and self.running_mean is not None:
            return torch.stack([self.running_mean, self.running_var]).to(moments.dtype), None
        images: int | Tensor
        if self.shares_statistics:
            batch, images = _moments_of_all(moments)
        else:
            batch, images = moments.mean(dim=1), moments.shape[1]
            batch = torch.stack([batch[0], batch[1] + (moments[0] - batch[0]).square().mean(dim=0)])
        # Not before evaluation has left: it would fix the size of a traced program.
        count = images * x.shape[2:].numel()
        if self.training and (self.shares_statistics or count > 1):
            self._follow(batch[0].detach(), batch[1].detach() * (count / (count - 1)))
        return batch, images

    @property
    def shares_statistics(self) -> bool:
        """Whether several processes take theirs together now."""
        return self.training and self.sync and dist.is_initialized() and dist.get_world_size() > 1

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


class _Switched(torch.autograd.Function):
    """`SwitchNorm2d.plainly` in a fraction of its time; for the gradient it keeps the map as it came, and tables.

    The map is read twice and written once each way, by torch's kernels of other norms. The gradient cannot be
    differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: SwitchNorm2d,
        mean_logits: Tensor,
        var_logits: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        mixture = layer.mixture(_moments(x), x)
        mean, var = mixture.mixed
        root = torch.rsqrt(var + layer.eps)
        scale = root if weight is None else root * weight
        ctx.save_for_backward(x, root, scale)
        ctx.mixture, ctx.of_all = mixture, layer.shares_statistics
        return _affine(x, mean, scale, torch.zeros_like(mean) if bias is None else bias.expand_as(mean))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        x, root, scale = ctx.saved_tensors
        mixture: Mixture = ctx.mixture
        mean_in, mean = mixture.instance[0], mixture.mixed[0]
        if by_y.stride() != x.stride():
            by_y = torch.empty_like(x).copy_(by_y)
        by_shift, centred = _sums(by_y, x, mean_in)
        by_scale = centred + (mean_in - mean) * by_shift
        by_mixed = torch.stack([-scale * by_shift, -0.5 * by_scale * scale * root.square()])
        (by_mean_in, by_var_in), by_logits = mixture.gradients(by_mixed, ctx.of_all)
        by_x = None
        if ctx.needs_input_grad[0]:
            pixels = x.shape[2:].numel()
            by_x = _gradient(by_y, scale, x, mean_in, by_var_in * (2 / pixels), by_mean_in / pixels)
        by_weight = (by_scale * root).sum(dim=0) if ctx.needs_input_grad[4] else None
        by_bias = by_shift.sum(dim=0) if ctx.needs_input_grad[5] else None
        return by_x, None, *by_logits, by_weight, by_bias


# ---- what a switch norm does with a whole map: tables are (B, C) float32, or float64 of such a map ----


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The map as batches of one image, of which torch's kernels of batch norm make what is each image's and channel's.

    Where the channels of an image lie one after another, all images' are those of one; where they lie side by side an
    image is a piece, as long as it has pixels enough to be worth the call. None: it takes plain operations.
    """
    if x.device.type != "cpu" or x.ndim < 3 or x.numel() == 0:
        return ()
    if x.is_contiguous():
        return (x.view(1, len(x) * x.shape[1], *x.shape[2:]),)
    side_by_side = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.split(1) if side_by_side and x.shape[2:].numel() >= FEWEST_PIXELS else ()


def _rows(table: Tensor, pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A table's values of each piece's channels."""
    return table.contiguous().view(len(pieces), -1).unbind()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _moments(x: Tensor) -> Tensor:
    """Means and biased variances over the pixels of `(B, C, ...)`: `(2, B, C)`."""
    pieces = _pieces(x)
    if not pieces or x.shape[2:].numel() < FEWEST_PIXELS:
        return _plain_moments(_wide(x))
    channels, pixels = pieces[0].shape[1], x.shape[2:].numel()
    like = torch.empty(0, dtype=_table_dtype(x))
    zeros, ones = like.new_zeros(channels), like.new_ones(channels)
    if x.is_contiguous():  # group norm's kernel sums in one pass, Welford's way, and vectorized; batch norm's does not
        _, mean, root = torch.native_group_norm(pieces[0], ones, zeros, 1, channels, pixels, channels, 0.0)
        return torch.stack([mean, root.pow(-2)]).view(2, *x.shape[:2])
    # The running statistics are there for their dtype: without them those of a half precision map would have its own.
    found = [torch.batch_norm_update_stats(piece, zeros, ones, 0.0) for piece in pieces]
    # The kernel's own mean is a running sum: where means are large it has a digit less than a sum in pairs.
    half = x.dtype in (torch.bfloat16, torch.float16)
    mean = torch.stack([mean for mean, _ in found]) if half else x.mean(dim=(2, 3))
    return torch.stack([mean, torch.stack([var for _, var in found])])


def _plain_moments(values: Tensor) -> Tensor:
    flat = _flat(values)
    mean = flat.mean(dim=2)
    return torch.stack([mean, (flat - mean[..., None]).square().mean(dim=2)])


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift."""
    mean, scale, shift = (table.to(_table_dtype(x)) for table in (mean, scale, shift))
    pieces = _pieces(x)
    if not pieces:
        moved = _over_pixels(shift - mean * scale, x)
        return torch.addcmul(moved, _wide(x), _over_pixels(scale, x)).to(x.dtype)
    result = torch.empty_like(x)
    ones, none = torch.ones_like(_rows(mean, pieces)[0]), mean.new_empty(0)
    tables = zip(*(_rows(table, pieces) for table in (scale, shift, mean)), strict=True)
    for piece, out, (own_scale, own_shift, own_mean) in zip(pieces, _pieces(result), tables, strict=True):
        given = (piece, own_scale, own_shift, own_mean, ones, False, 0.0, 0.0)
        torch.native_batch_norm(*given, out=(out, none, none))
    return result


def _sums(by_y: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Over the pixels the sums of `by_y`, and of `by_y * (x - mean)`."""
    pieces = _pieces(x)
    if not pieces:
        wide = _flat(_wide(by_y))
        return wide.sum(dim=2), (wide * (_flat(_wide(x)) - mean[..., None])).sum(dim=2)
    rows = _rows(mean, pieces)
    ones = torch.ones_like(rows[0])
    summed, centred = [], []
    for piece, by_piece, own in zip(pieces, _pieces(by_y), rows, strict=True):
        given = (by_piece, piece, ones, None, None, own, ones, True, 0.0, (False, True, True))
        _, product, total = torch.ops.aten.native_batch_norm_backward(*given)
        summed.append(total)
        centred.append(product)
    return torch.stack(summed).view_as(mean), torch.stack(centred).view_as(mean)


def _gradient(by_y: Tensor, scale: Tensor, x: Tensor, mean: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """by_y * scale + (x - mean) * slope + shift."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.addcmul(_affine(x, mean, slope, shift), by_y, _over_pixels(scale, x).to(x.dtype))
    if not _pieces(x):
        through = _affine(_wide(x), mean, slope, shift)
        return torch.addcmul(through, _wide(by_y), _over_pixels(scale, x)).to(x.dtype)
    nothing = torch.zeros_like(mean)
    return _affine(by_y, nothing, scale, nothing).add_(_affine(x, mean, slope, shift))


def _table_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def _moments_of_all(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Batch mean and variance `(2, C)` over the images of all processes, and how many those are; one message."""
    mean, var = moments.double()  # so that the difference of squares below keeps its digits
    mine = torch.cat([mean.sum(dim=0), (var + mean.square()).sum(dim=0), mean.new_full((1,), len(mean))])
    total = SumOverProcesses.apply(mine)
    images = total[-1].detach()
    mean, square = (total[:-1] / images).chunk(2)
    return torch.stack([mean, square - mean.square()]).to(moments.dtype), images.to(moments.dtype)


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

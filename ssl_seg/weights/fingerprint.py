"""By what a network and its tensors are known again: the maps it makes of a fixed batch, and digests of its weights.

Ours, because neither says enough by itself: features tell another architecture from the same names, and digests tell
which tensor is another one.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ssl_seg import files, rng
from ssl_seg.config import UserError
from ssl_seg.models import evaluating, image_channels_of

PROBE = (2, 64, 64)  # images and their sides: the smallest images that leave the stride-32 map more than one pixel
PROBE_SEED = "ssl_seg.store.fingerprint"  # every export was compared under this word; another would refuse them all
NUM_PROJECTIONS = 4  # several, so that no change of a map can lie across all of them by chance
# Of a map's root mean square. Measured: 1e-6 between 1 and 2 threads, 4e-6 with and without oneDNN. In networks with
# trained scales (mobilenetv2_035, resnet10t, resnet18) any one 3x3 kernel transposed gives 0.38 or more, one layer's
# statistics redrawn 0.08, the stem's colours swapped 1.7.
TOLERANCE = 1e-4
# Where the file rounds what was exported: up to 0.045 and 0.21 in the same networks. Its tensors are told by their
# marks; what is left to the features is the architecture.
ROUNDED_TOLERANCES = {torch.float16: 0.1, torch.bfloat16: 0.4}


def fingerprint(net: nn.Module) -> list[list[float]]:
    """A few figures for each map that `net` makes of a fixed batch: mean, std and projections on keyed directions.

    They change with any weight or statistic that changes the maps. They are computed in float32 on the CPU, by a copy
    where `net` is something else, so its device, precision and mode do not matter. Raises UserError for maps that are
    not finite.
    """
    figures = figures_of(net)
    if not all(math.isfinite(value) for level in figures for value in level):
        raise UserError("weights: give features that are not finite, so the network is of no use; train it again")
    return figures


def figures_of(net: nn.Module) -> list[list[float]]:
    images, *sides = PROBE
    key = rng.as_key(PROBE_SEED)
    probe = rng.uniform(rng.fold_in(key, torch.arange(images)), (image_channels_of(net), *sides))
    plain = net
    if not _is_plain(net):
        plain = copy.deepcopy(net).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    with evaluating(plain), torch.autocast("cpu", enabled=False):
        output = plain(probe)
    maps = [output] if isinstance(output, Tensor) else output
    return [_summarise(level, rng.fold_in(key, f"level {index}")) for index, level in enumerate(maps)]


def _is_plain(net: nn.Module) -> bool:
    """Whether all of it is float32 on the CPU already, and lies in memory as what is loaded does.

    Channels last rounds otherwise. Where pooling tells an unpooling the place of the largest value, as SegNet's does,
    that can move a value: of three such networks one was refused, by 0.005.
    """
    tensors = [*net.parameters(), *net.buffers()]
    return all(
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and (tensor.dtype == torch.float32 or not tensor.is_floating_point())
        for tensor in tensors
    )


def _summarise(level: Tensor, key: Tensor) -> list[float]:
    values = level.flatten().double()  # (B, C, h, w) -> (N,)
    if not len(values):
        return []
    keys = rng.fold_in(key, torch.arange(NUM_PROJECTIONS))
    directions = rng.uniform(keys, (len(values),), low=-1.0, high=1.0).double()  # (P, N)
    projections = directions @ values / math.sqrt(len(values))
    return [values.mean().item(), values.std(correction=0).item(), *projections.tolist()]


def feature_distance(a: list[list[float]], b: list[list[float]]) -> float:
    """How far two fingerprints lie apart: the largest difference, as a share of its map's root mean square.

    Infinite for maps of another number, and where one of them is not finite.
    """
    if [len(level) for level in a] != [len(level) for level in b]:
        return math.inf
    distance = 0.0
    for one, other in zip(a, b, strict=True):
        scale = math.hypot(*one[:2])
        for x, y in zip(one, other, strict=True):
            if x != y:
                share = abs(x - y) / scale if scale else math.inf
                distance = max(distance, share if math.isfinite(share) else math.inf)
    return distance


def marks_of(tensor: Tensor) -> str:
    """By what a tensor is known again: dtype and beginning of the sha256, of itself and of its roundings."""
    kinds = [tensor]
    if tensor.dtype == torch.float32:
        kinds += [tensor.to(dtype) for dtype in ROUNDED_TOLERANCES]
    return ", ".join(mark_of(kind) for kind in kinds)


def mark_of(tensor: Tensor) -> str:
    """Says *which* tensor is another one.

    Features cannot: they say only that some weight is, and not even that where a fresh residual block ends in a scale
    of zero, which hides all that lies before it.
    """
    flat = tensor.detach().to("cpu").contiguous().flatten()
    digest = files.sha256(flat.view(torch.uint8).numpy().tobytes())
    return f"{dtype_name(tensor)} {digest[:16]}"


def digest_of(net: nn.Module) -> str:
    """sha256 of all weights and buffers of a network, by name; where they are, on which device, makes no difference."""
    marks = {name: mark_of(tensor) for name, tensor in sorted(net.state_dict().items())}
    return files.sha256(files.json_bytes(marks))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

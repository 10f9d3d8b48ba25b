"""From what a network of timm gives to the five maps of the contract, without a special case for any family.

Three questions are asked of a network, and each is answered by running it: how an image is to be shown to it (`Sight`),
at which strides its maps then lie (`Look`), and which of the five have to be made (`Maps` none, `Pyramid` some).
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.layers.format import Format
from timm.layers.norm import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import UserError

FINEST, COARSEST = 4, 32  # strides between which a map is made where a network has none
HALVING = (2, 4, 8, 16, 32)
TOO_COARSE = 64  # the stride of some networks' last map, which joins that of stride 32
PROBE_SIZE = (64, 96)  # small, and not square, so that a swap of height and width shows
BORDER = 32  # pixels at each side: more than convolutions without padding cut off
Size = tuple[int, int]


class MapShape(NamedTuple):
    channels: int
    stride: int


# ---- how a network sees an image ----


@dataclass(frozen=True)
class Sight:
    """How an image is shown to a network, and how the maps of what was shown are laid on the image."""

    multiple: int = COARSEST  # of both sides of the image
    patch: int = 1  # pixels of what is shown, for a power of two of the image's: 14 for 16
    unit: Size | None = None  # what is shown has sides that are the nearest multiples of these
    fixed: bool = False  # or these themselves
    border: int = 0  # pixels of the mean colour around the image; the maps are cut free of it again

    @property
    def probe(self) -> Size:
        """The size of a small image that tells what maps there are."""
        if self.unit is not None:
            return self.unit if self.fixed else (self.unit[0], 2 * self.unit[1])
        # Of a large one, what convolutions cut off is little beside a map's sides, by which its stride is told.
        times = 4 if self.border else self.multiple // COARSEST
        return PROBE_SIZE[0] * times, PROBE_SIZE[1] * times

    def shown(self, image: Tensor) -> Tensor:
        size = image.shape[-2:]
        if self.border:
            return F.pad(image, [self.border] * 4)
        if self.unit is not None:
            seen = [self._nearest(side, own) for side, own in zip(size, self.unit, strict=True)]
        elif self.patch > 1:
            seen = [side // nearest_power(self.patch) * self.patch for side in size]
        else:
            return image
        return F.interpolate(image, size=seen, mode="bilinear", antialias=True)

    def _nearest(self, side: int, own: int) -> int:
        return own if self.fixed else max(1, (side + own // 2) // own) * own

    def stride_of(self, level: Tensor, shown: Sequence[int], size: Sequence[int]) -> int:
        """Of the image, which has this `size`. Raises ValueError for a map that cannot be laid on it."""
        sides = tuple(level.shape[-2:])
        strides = {nearest_power(seen / side) for seen, side in zip(shown, sides, strict=True)}
        stride = min(strides)
        if self.border:
            cut = [seen // stride - side for seen, side in zip(shown, sides, strict=True)]
            fits = all(0 <= own <= 2 * self.border // stride for own in cut)
        else:
            fits = self.unit is not None or tuple(side * stride for side in sides) == tuple(size)
        if len(strides) > 1 or not fits:
            raise ValueError(f"its map of {sides} for an image of {tuple(size)} is at no whole stride")
        return stride

    def laid(self, level: Tensor, stride: int, size: Sequence[int]) -> Tensor:
        """The map, at this stride of an image of `size`."""
        # One that is to join the map of stride 32 is laid there at once; sides need not be multiples of 64 then.
        height, width = (side // (min(stride, COARSEST) if self.unit else stride) for side in size)
        if self.border:
            top, left = ((own - wanted) // 2 for own, wanted in zip(level.shape[-2:], (height, width), strict=True))
            return level[..., top : top + height, left : left + width]
        return level if self.unit is None else _sized(level, (height, width))


def sights(network: nn.Module) -> tuple[Sight, ...]:
    """Those to be tried of a network that takes any size, what changes the image least first."""
    strides = cast("Any", network).feature_info.reduction()
    ratios = {stride / nearest_power(stride) for stride in strides}
    return (
        Sight(patch=strides[-1] if len(ratios) == 1 and ratios != {1} else 1),
        Sight(multiple=TOO_COARSE),
        Sight(border=BORDER),
    )


def sights_of(unit: Size) -> tuple[Sight, ...]:
    """Those to be tried of a network that knows one size."""
    return Sight(unit=unit), Sight(unit=unit, fixed=True)


@dataclass(frozen=True)
class Look:
    """What a network gives under a sight of an image: its maps, as many as it has."""

    sight: Sight
    shapes: tuple[MapShape, ...]
    image_channels: int = 3

    @classmethod
    def at(cls, network: nn.Module, sight: Sight, image_channels: int = 3) -> Look:
        """Run the network: what networks say of their maps is not always so. Raises whatever it raises.

        Weights that reach no map will not be trained: several processes would wait for their gradients.
        """
        network.eval()  # or the look would count in batch norm's running statistics
        shown = sight.shown(torch.zeros(1, image_channels, *sight.probe))
        with torch.enable_grad():
            maps = channels_first(network, shown)
        network.train()
        strides = [sight.stride_of(level, shown.shape[-2:], sight.probe) for level in maps]
        if len({(stride, level.shape[-2:]) for stride, level in zip(strides, maps, strict=True)}) > len(set(strides)):
            raise ValueError("it gives maps of several sizes at one stride, of which no decoder reads more than one")
        last = dict(zip(strides, maps, strict=True))
        reached = _weights_behind(last.values())
        for weight in network.parameters():
            weight.requires_grad_(id(weight) in reached)
        shapes = [MapShape(level.shape[1], stride) for level, stride in zip(maps, strides, strict=True)]
        return cls(sight, tuple(shapes), image_channels)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(shape.stride for shape in self.shapes)

    @property
    def places(self) -> dict[int, int]:
        """By stride, which of the maps is used: of several at one, as of the blocks of a transformer, the last."""
        return {stride: place for place, stride in enumerate(self.strides)}

    def maps(self, network: nn.Module, image: Tensor) -> list[Tensor]:
        maps = channels_first(network, self.sight.shown(image))
        pairs = zip(maps, self.strides, strict=True)
        return [self.sight.laid(level, stride, image.shape[-2:]) for level, stride in pairs]


def channels_first(network: nn.Module, image: Tensor) -> list[Tensor]:
    maps = network(image)
    if getattr(network, "output_fmt", Format.NCHW) == Format.NHWC:
        return [level.permute(0, 3, 1, 2) for level in maps]  # (B, h, w, C) -> (B, C, h, w)
    return list(maps)


def _weights_behind(outputs: Iterable[Tensor]) -> set[int]:
    """The `id` of those that autograd has met on the way to any of the outputs."""
    ahead = [output.grad_fn for output in outputs]
    met = set(ahead)
    found = set()
    while ahead:
        node = cast("Any", ahead.pop())
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        further = {parent for parent, _ in getattr(node, "next_functions", ())} - met
        ahead += further
        met |= further
    return found


def nearest_power(number: float) -> int:
    """Of two."""
    return 2 ** round(math.log2(number))


# ---- the five maps ----


class Maps(nn.Module):
    """timm's maps as the contract wants them: one of stride 1 left out, a missing one of stride 2 without channels."""

    def __init__(self, network: nn.Module, look: Look, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.name = name  # timm's, of the whole network
        # Its constructor's arguments, by which the same network is made again.
        self.options = options if look.image_channels == 3 else {**options, "in_chans": look.image_channels}
        self.network = network
        self.look = look
        kept = [shape for shape in look.shapes if shape.stride > 1]
        self.num_skipped = len(look.shapes) - len(kept)
        self.has_stride_2 = bool(kept) and kept[0].stride == 2
        if not self.has_stride_2:
            kept = [MapShape(0, 2), *kept]
        self.channels = tuple(shape.channels for shape in kept)
        self.strides = tuple(shape.stride for shape in kept)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.look.maps(self.network, image)[self.num_skipped :]
        if self.has_stride_2:
            return maps
        return [_no_channels(maps[0], image), *maps]

    def checkpoint(self) -> None:
        """Turn on timm's own checkpointing. Raises UserError where it has none, or none that keeps less."""
        before = kept_bytes(self)
        inside = whole_in(self.network)
        turn_on = getattr(self.network if inside is None else inside[1], "set_grad_checkpointing", None)
        if turn_on is not None:
            with suppress(AssertionError, NotImplementedError):  # what timm raises where there is none
                turn_on()
        if kept_bytes(self) >= before:
            raise UserError(
                f"train.checkpointing: timm's {self.name} has none that keeps less; drop it, or take "
                "train.encode=in_turn or train.accumulate=auto for less memory"
            )

    def no_weight_decay(self) -> set[str]:
        """As timm's networks have it: the names of weights that are not pulled towards 0.

        A part that gives maps has lost the list of the whole network, and writes a `_` for some dots in names. Where
        the whole network is inside, it lists them itself.
        """
        spared = frozenset() if whole_in(self.network) else _not_decayed(self.name)
        names = [name for name, _ in self.network.named_parameters() if name.replace(".", "_") in spared]
        return {f"network.{name}" for name in names}

    def depths(self) -> dict[str, int]:
        """As timm groups the whole network's weights by layer: how deep each lies, 0 beside the image."""
        inside = whole_in(self.network)
        if inside is not None:
            place, inner = inside
            return {f"network.{place}.{name}": depth for name, depth in _depths(inner).items()}
        with quiet(), torch.device("meta"):
            whole = timm.create_model(self.name, **self.options)
        of_whole = _depths(whole)
        # A norm that has been converted has weights of its own: they lie where those of its former did.
        known = {name.rpartition(".")[0].replace(".", "_"): depth for name, depth in of_whole.items()}
        known |= {name.replace(".", "_"): depth for name, depth in of_whole.items()}
        names = [name for name, _ in self.network.named_parameters()]
        found = {name: _of_nearest(name, known) for name in names}
        return {f"network.{name}": depth for name, depth in found.items() if depth is not None}


def kept_bytes(maps: Maps, image: Tensor | None = None) -> int:
    """What a training pass keeps for the gradient, without the weights: of `image`, or of two small ones."""
    trial = copy.deepcopy(maps).train()  # statistics of norms stay as they are
    own = {weight.untyped_storage().data_ptr() for weight in trial.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if image is None:
        image = torch.zeros(2, maps.look.image_channels, *maps.look.sight.probe, device=next(trial.parameters()).device)
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = trial(image)
    assert answer, "what is kept lives as long as the answer"
    return sum(kept.values())


def whole_in(network: nn.Module) -> tuple[str, nn.Module] | None:
    """The whole network inside timm's that gives maps, and its name there; None where timm took it apart."""
    whole = [(name, part) for name, part in network.named_children() if hasattr(part, "group_matcher")]
    return whole[0] if whole else None


def _of_nearest(name: str, known: Mapping[str, int]) -> int | None:
    """What is known of a weight or of the innermost part that holds it, by names with `_` for dots."""
    while name and name.replace(".", "_") not in known:
        name = name.rpartition(".")[0]
    return known.get(name.replace(".", "_")) if name else None


def _depths(network: nn.Module) -> dict[str, int]:
    matcher = cast("Callable[..., Any]", network.group_matcher)
    return group_parameters(network, matcher(coarse=False), reverse=True)


@cache
def _not_decayed(name: str) -> frozenset[str]:
    """What timm's whole network lists, with `_` for dots; building one without weights takes as long as ten steps."""
    with torch.device("meta"):
        whole = timm.create_model(name)
    return frozenset(own.replace(".", "_") for own in getattr(whole, "no_weight_decay", set)())


class Pyramid(Maps):
    """Five maps of a network that lacks some, or has a coarser one; of a plain vision transformer from its only map.

    The simple feature pyramid of Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV
    2022: transposed convolutions make what is finer, max pooling what is coarser. Theirs has a branch of its own for
    each stride; here each goes on from the next coarser one, so that a decoder which uses stride 4 alone still trains
    every weight. A map of stride 64 is upsampled and joins those of stride 32 as further channels: nothing that the
    network knows is left out.
    """

    def __init__(
        self, network: nn.Module, look: Look, name: str, options: dict[str, Any], output_stride: int = COARSEST
    ) -> None:
        super().__init__(network, look, name, options)
        self.places = look.places
        widths = {stride: look.shapes[place].channels for stride, place in self.places.items()}
        if TOO_COARSE in widths:
            widths[COARSEST] += widths[TOO_COARSE]
        self.own_strides = tuple(sorted({min(stride, COARSEST) for stride in widths} - {1}))
        coarsest = self.own_strides[-1]
        self.made = [stride for stride in (16, 8, 4) if stride < coarsest and stride not in widths]
        for stride in self.made:
            widths[stride] = widths[2 * stride] // 2
            enlarged = nn.ConvTranspose2d(widths[2 * stride], widths[stride], kernel_size=2, stride=2)
            self.add_module(f"to_{stride}", enlarged)
            if stride // 2 in self.made:
                self.add_module(f"norm_{stride}", LayerNorm2d(widths[stride]))
        self.sources = tuple(min(stride, coarsest) for stride in HALVING)
        self.strides = tuple(min(stride, output_stride) for stride in HALVING)
        self.channels = tuple(widths.get(source, 0) for source in self.sources)

    @classmethod
    def fits(cls, look: Look, output_stride: int) -> bool:
        """Whether five maps can be made of these, none coarser than `output_stride`."""
        found = set(look.strides) - {1}
        coarsest = max(found, default=0)
        joins = {TOO_COARSE, COARSEST} <= found
        known = all(stride == nearest_power(stride) for stride in found)
        return known and FINEST <= (COARSEST if joins else coarsest) <= output_stride

    def forward(self, image: Tensor) -> list[Tensor]:
        given = self.look.maps(self.network, image)
        maps = {stride: given[place] for stride, place in self.places.items()}
        if TOO_COARSE in maps:
            size = maps[COARSEST].shape[-2:]
            maps[COARSEST] = torch.cat([maps[COARSEST], _sized(maps[TOO_COARSE], size)], dim=1)
        for stride in self.made:
            source = maps[2 * stride]
            made = self.get_submodule(f"to_{stride}")(F.gelu(source) if 2 * stride in self.made else source)
            maps[stride] = self.get_submodule(f"norm_{stride}")(made) if stride // 2 in self.made else made
        if not self.channels[0]:
            maps[2] = _no_channels(given[-1], image)
        pairs = zip(self.sources, self.strides, strict=True)
        return [F.max_pool2d(maps[own], at // own) if at > own else maps[own] for own, at in pairs]

    def depths(self) -> dict[str, int]:
        """What the pyramid adds is as deep as the last."""
        found = super().depths()
        last = max(found.values())
        return {name: found.get(name, last) for name, _ in self.named_parameters()}


def _sized(level: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(level.shape[-2:]) == tuple(size):
        return level
    return F.interpolate(level, size=tuple(size), mode="bilinear")


def _no_channels(like: Tensor, image: Tensor) -> Tensor:
    # Of a map's own type: beside half-precision maps a float32 one would turn their concatenation into float32.
    return like.new_empty(image.shape[0], 0, image.shape[-2] // 2, image.shape[-1] // 2)


@contextmanager
def quiet() -> Iterator[None]:
    """timm warns past --quiet of tensors that it leaves over, such as a classifier: those that are missing count."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of names that timm has changed
            yield
    finally:
        logger.setLevel(level)

"""An encoder's weights by the names of timm's own network, as `timm.create_model(name)` has them.

Ours, because `features_only` renames: `stages.0` becomes `stages_0`, a transformer gets a `model.` in front, and what
stands behind the last map is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ssl_seg.config import UserError, first_line
from ssl_seg.models import EncoderNet
from ssl_seg.models.timm import REFUSALS
from ssl_seg.models.timm_maps import COARSEST, Maps, Pyramid, channels_first, quiet, whole_in
from ssl_seg.norm.layers import GroupNorm, SwitchNorm2d

INSTEAD = "export the whole model instead: --to torch, onnx or hub"


@dataclass(frozen=True)
class Plain:
    """What of an encoder belongs to timm's own network."""

    name: str  # timm's
    arguments: dict[str, Any]  # of `timm.create_model`, beside the name
    tensors: dict[str, Tensor]  # by the names of that network
    left_out: tuple[str, ...]  # our names of what is no part of it: the layers that make a pyramid of its maps

    def network(self, missing: list[str] | None = None) -> nn.Module:
        """timm's network with these weights, in evaluation mode; what it lacks (its classifier) is put into `missing`.

        Raises UserError for tensors that it does not have.
        """
        with quiet(), torch.random.fork_rng(devices=[]):
            network = timm.create_model(self.name, pretrained=False, **self.arguments)
        found = network.load_state_dict(self.tensors, strict=False)
        if found.unexpected_keys:
            raise UserError(f"export: timm's {self.name} has no {', '.join(found.unexpected_keys[:3])}; {INSTEAD}")
        if missing is not None:
            missing += found.missing_keys
        return network.eval()


def plain_of(encoder: EncoderNet, called: str, output_stride: int = COARSEST) -> Iterator[Plain]:
    """The ways in which an encoder may be timm's own network: one, or two if it may be dilated to `output_stride`.

    `called` is the type of the encoder, for what is told of it. Raises UserError for an encoder that is none: one of
    our own, one that taps timm's network where timm does not, and one whose norm layers were converted to others than
    timm's.
    """
    backbone = encoder.backbone
    if not isinstance(backbone, Maps):
        raise UserError(f"export: encoder {called}: is no network of timm; {INSTEAD}")
    if type(backbone) not in (Maps, Pyramid):
        raise UserError(
            f"export: encoder {called}: takes its maps from other places in {backbone.name} than timm, whose own "
            f"network gives none of them; {INSTEAD}"
        )
    converted = next(
        (layer for layer in backbone.network.modules() if isinstance(layer, GroupNorm | SwitchNorm2d)), None
    )
    if converted is not None:
        kind = "switch norm" if isinstance(converted, SwitchNorm2d) else "group, instance or layer norm"
        raise UserError(
            f"export: model.norm has made the encoder's batch norm into {kind}, which timm's {backbone.name} does not "
            f"have; {INSTEAD}, or pretrain with norm: keep"
        )
    tensors, left_out = _renamed(backbone)
    yield Plain(backbone.name, dict(backbone.options), tensors, left_out)
    if output_stride < COARSEST:
        yield Plain(backbone.name, {**backbone.options, "output_stride": output_stride}, tensors, left_out)


def _renamed(backbone: Maps) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of timm's part by the whole network's names, and our names of the others."""
    with quiet(), torch.device("meta"):
        whole = timm.create_model(backbone.name, **backbone.options).state_dict()
    by_flat = {_flat(name): name for name in whole}
    if len(by_flat) < len(whole):
        raise UserError(f"export: two tensors of timm's {backbone.name} have one name but for their dots; {INSTEAD}")
    inside = whole_in(backbone.network)
    prefix = "network." if inside is None else f"network.{inside[0]}."
    tensors, left_out = {}, []
    for name, tensor in backbone.state_dict().items():
        if not name.startswith(prefix):
            left_out.append(name)
            continue
        own = by_flat.get(_flat(name.removeprefix(prefix)))
        if own is None or whole[own].shape != tensor.shape:
            raise UserError(f"export: timm's {backbone.name} has no tensor like {name}; {INSTEAD}")
        tensors[own] = tensor
    return tensors, tuple(left_out)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def sizes_of(plain: Plain, tried: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Of `tried` shapes (B, H, W), brought to whole strides; the only one of a network that knows but one."""
    cfg = get_pretrained_cfg(plain.name)
    if cfg is not None and cfg.fixed_input_size:
        given = plain.arguments.get("img_size", cfg.input_size[1:])
        height, width = (given, given) if isinstance(given, int) else given
        return [(1, height, width)]
    return [(batch, -(-height // 64) * 64, -(-width // 64) * 64) for batch, height, width in tried]


def unequal_maps(encoder: EncoderNet, network: nn.Module, image: Tensor) -> float:
    """How far the encoder's maps differ from those of timm's own `network`, as a part of each map's largest value.

    `image` is normalized, `(B, 3, H, W)`. Each of our maps is compared with the nearest of timm's that has its shape.
    Raises UserError where timm's network cannot show its maps.
    """
    ours = channels_first(cast("Any", encoder.backbone).network, image)
    try:
        given = cast("Any", network).forward_intermediates(image, intermediates_only=True, output_fmt="NCHW")
    except REFUSALS as error:
        raise UserError(
            f"export: timm's network does not show its maps ({first_line(error)[:200]}); {INSTEAD}"
        ) from error
    distances = []
    for level in ours:
        alike = [own for own in given if own.shape == level.shape]
        apart = [((own - level).abs().max() / level.abs().max()).item() for own in alike]
        distances.append(min(apart, default=float("inf")))
    return max(distances)

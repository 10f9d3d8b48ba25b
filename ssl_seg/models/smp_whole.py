"""A model of ours as one of segmentation_models_pytorch (smp), where smp has the same network.

It has it for `unet` and `unetplusplus` on an encoder of timm that is taken as it is: every layer is smp's or timm's. It
has none for the others, of which `models.smp` takes decoders of smp too: the last layer of smp's `FPN`, `UPerNet`,
`Segformer` and `DeepLabV3Plus` is 1 x 1, that of ours 3 x 3, and they enlarge their answer with aligned corners, which
moves a pixel by an amount that depends on the image's size, and ours without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.models import Decoder, DenseHead, SegmentationModel
from ssl_seg.models.smp import Unet, UnetPlusPlus
from ssl_seg.models.timm import ANY_SIZE, REFUSALS
from ssl_seg.models.timm_maps import Maps, quiet

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a folder as smp writes it
UNIVERSAL = "tu-"  # in front of a name of timm's: smp's encoder by timm's `features_only`
UNUSED = ".attention1."  # of the last block, which smp builds and never runs; here there is none
OF_SMP = ("fpn", "upernet", "segformer", "deeplabv3plus")
INSTEAD = "take --to timm for the encoder alone, or --to torch, onnx or hub"


@dataclass(frozen=True)
class Whole:
    """A model of smp with our weights. It takes normalized images whose sides 32 divides."""

    net: nn.Module
    name: str  # smp's class
    arguments: dict[str, Any]  # of that class


def wholes_of(model: SegmentationModel, decoder: Decoder) -> Iterator[Whole]:
    """Models of smp that take all weights of ours: by smp's own encoder of that name, and by timm's.

    They may answer otherwise all the same, as another encoder of the same layers does. Raises UserError where smp has
    no such decoder or encoder; gives none where it has other layers.
    """
    if not isinstance(decoder, Unet | UnetPlusPlus):
        reason = "smp has no such decoder"
        if decoder.type in OF_SMP:
            reason = "smp's model has a last layer of 1 x 1 and aligns corners, ours one of 3 x 3 and does not"
        raise UserError(f"export: decoder {decoder.type}: {reason}; {INSTEAD}")
    backbone = model.encoder.backbone
    head = model.head
    if type(backbone) is not Maps or not isinstance(head, DenseHead):
        raise UserError(
            "export: smp takes encoders of timm that give maps at strides 2 or 4 to 32, all by themselves, which this "
            f"one does not; {INSTEAD}"
        )
    ours = {f"encoder.{own}": tensor for own, tensor in backbone.network.state_dict().items()}
    ours |= {f"decoder.{own}": tensor for own, tensor in cast("Any", head.decoder).decoder.state_dict().items()}
    ours |= {f"segmentation_head.0.{own}": tensor for own, tensor in head.last.state_dict().items()}
    shared = {
        "decoder_channels": list(decoder.channels),
        "decoder_attention_type": decoder.attention,
        "decoder_interpolation": decoder.interpolation,
        "classes": len(model.class_names),
        "in_channels": model.image_channels,
        "encoder_weights": None,
    }
    for encoder in _encoder_arguments(backbone):
        arguments = {**encoder, **shared}
        with quiet(), torch.random.fork_rng(devices=[]):
            try:
                net = getattr(smp, type(decoder).__name__)(**arguments)
            except REFUSALS:  # no encoder of smp is called so, or it takes no such argument
                continue
        if _load(net, ours):
            yield Whole(net.eval(), type(decoder).__name__, arguments)


def files_of(whole: Whole) -> dict[str, bytes]:
    """What smp writes of a model, but for its README, which would put the user's weights under smp's licence."""
    with tempfile.TemporaryDirectory() as folder:
        cast("Any", whole.net).save_pretrained(folder)
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def read_files(held: Mapping[str, bytes]) -> nn.Module:
    """The model that smp reads from a folder of such files, in evaluation mode."""
    with tempfile.TemporaryDirectory() as folder:
        for name, payload in held.items():
            (Path(folder) / name).write_bytes(payload)
        return smp.from_pretrained(folder).eval()


def _encoder_arguments(backbone: Maps) -> Iterator[dict[str, Any]]:
    options = {key: value for key, value in backbone.options.items() if key != "in_chans"}  # smp's `in_channels`
    if not options:
        yield {"encoder_name": backbone.name}
    for any_size in reversed(ANY_SIZE):  # without a word first: a network that takes any size wants none
        yield {"encoder_name": UNIVERSAL + backbone.name, **options, **any_size}


def _load(net: nn.Module, ours: Mapping[str, Tensor]) -> bool:
    """Fill a model of smp, where all of ours has a place in it and all that it runs is filled."""
    theirs = net.state_dict()
    places = {_flat(name): name for name in theirs}
    found = {places.get(_flat(name), ""): tensor for name, tensor in ours.items()}
    fits = all(name in theirs and theirs[name].shape == tensor.shape for name, tensor in found.items())
    missing = [name for name in theirs if name not in found and UNUSED not in name]
    if not fits or missing or len(found) < len(ours):
        return False
    net.load_state_dict(found, strict=False)
    return True


def _flat(name: str) -> str:
    """A name as smp's own encoders and its encoders by timm have it, without what tells them apart."""
    return name.removeprefix("encoder.model.").removeprefix("encoder.").replace(".", "_")

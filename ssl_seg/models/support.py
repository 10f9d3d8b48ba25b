"""Which networks of timm are encoders, how they are adapted, and which decoders and norms they go with.

Everything is found by building a network without its numbers, on torch's device `meta`. What was found of some 150
networks is kept in `support.csv`, which `python -m tests.support` writes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import torch

from ssl_seg.config import UserError
from ssl_seg.models import Decoder, EncoderNet
from ssl_seg.models.fcn import FCN
from ssl_seg.models.mobilenet_unet import MobilenetUnetDecoder
from ssl_seg.models.r2unet import R2UnetDecoder
from ssl_seg.models.smp import FPN, DeepLabV3Plus, Segformer, Unet, UnetPlusPlus, UPerNet
from ssl_seg.models.timm import PACKAGED, Timm, family_of, names_like, tags_of
from ssl_seg.models.timm_maps import COARSEST, HALVING, TOO_COARSE, Maps, Pyramid, nearest_power
from ssl_seg.norm.convert import has_batch_norm

SHIPPED = Path(__file__).with_name("support.csv")
# Decoders that ask for no encoder of their own. deeplabv3plus is asked about at stride 16 apart.
GENERAL: tuple[Decoder, ...] = (
    Unet(),
    UnetPlusPlus(),
    FPN(),
    DeepLabV3Plus(encoder_stride=32),
    UPerNet(),
    Segformer(),
    R2UnetDecoder(),
    FCN(),
    MobilenetUnetDecoder(),
)
IMAGENET = re.compile(r"in(1|12|21|22)k|imagenet")
MOST_LOOKED_AT = 100  # networks for one pattern: a minute or two


@dataclass(frozen=True)
class Support:
    """Of one network of timm; '' where it is refused and there is nothing to tell."""

    encoder: str
    family: str  # timm's file
    state: str  # supported as timm gives it, adapted or refused
    how: str  # it is adapted, or why it is refused and what to take
    parameters: str  # of the encoder, in millions
    channels: str  # of its maps at strides 2 to 32
    multiple: str  # to which images are padded
    dilates: str  # yes or no: to output stride 16, for deeplabv3plus as published
    batch_norm: str  # yes or no: whether `model.norm` converts the encoder
    refused_by: str  # general decoders that its maps do not fit
    weights: str  # ImageNet's; else the tag of others; and whether a package holds some

    def cells(self) -> list[str]:
        return list(asdict(self).values())


COLUMNS = [field.name for field in fields(Support)]


def support_of(name: str) -> Support:
    """What is found of one network: a second or so."""
    nothing = dict.fromkeys(COLUMNS, "")
    known = {"encoder": name, "family": family_of(name), "weights": _weights(name)}
    config = Timm(name=name)
    try:
        with torch.device("meta"):
            encoder = config.build()
    except UserError as error:
        reason = str(error).removeprefix(f"encoder {name}: ")
        return Support(**nothing | known | {"state": "refused", "how": reason})
    how = adaptation(encoder)
    return Support(
        **known,
        state="adapted" if how else "supported",
        how=how,
        parameters=f"{sum(weight.numel() for weight in encoder.parameters()) / 1e6:.1f}",
        channels=" ".join(map(str, encoder.channels)),
        multiple=str(encoder.multiple),
        dilates="yes" if _dilates(config) else "no",
        batch_norm="yes" if has_batch_norm(encoder) else "no",
        refused_by=" ".join(decoder.type for decoder in GENERAL if not _takes(decoder, encoder)),
    )


def adaptation(encoder: EncoderNet) -> str:
    """How the maps of an encoder of timm differ from those that timm gives; '' where they are the same."""
    backbone = encoder.backbone
    assert isinstance(backbone, Maps), "an encoder of timm"
    sight = backbone.look.sight
    said = []
    if sight.multiple > COARSEST:
        said.append(f"sees the image padded to multiples of {sight.multiple}")
    if sight.patch > 1:
        said.append(f"sees the image at {sight.patch}/{nearest_power(sight.patch)} of its size")
    if sight.unit is not None:
        height, width = sight.unit
        said.append(f"sees the image resized to {'' if sight.fixed else 'multiples of '}{height} x {width}")
    if sight.border:
        said.append(f"sees {sight.border} pixels more at each side, of which its convolutions cut some off")
    if isinstance(backbone, Pyramid):
        found = sorted(backbone.places)
        said.append(f"has stride{'s' if len(found) > 1 else ''} {_and(found)}")
        if backbone.made:
            said.append(f"{_and(sorted(backbone.made))} by transposed convolutions")
        pooled = [stride for stride in HALVING if stride > backbone.own_strides[-1]]
        if pooled:
            said.append(f"{_and(pooled)} by pooling")
        if TOO_COARSE in backbone.places:
            said.append(f"{TOO_COARSE} joins 32")
    return ", ".join(said)


def _and(numbers: Iterable[int]) -> str:
    *former, last = map(str, numbers)
    return f"{', '.join(former)} and {last}" if former else last


def _dilates(config: Timm) -> bool:
    try:
        with torch.device("meta"):
            config.build(16)
    except UserError:
        return False
    return True


def _takes(decoder: Decoder, encoder: EncoderNet) -> bool:
    try:
        with torch.device("meta"):
            decoder.build(encoder.channels, encoder.strides)
    except UserError:
        return False
    return True


def _weights(name: str) -> str:
    tags = tags_of(name)
    imagenet = any(IMAGENET.search(tag) for tag in tags)
    found = ["ImageNet"] if imagenet else tags[:1]
    return ", ".join([*found, *(["package"] if name in PACKAGED else [])]) or "none"


# ---- of many ----


def matching(pattern: str) -> list[str]:
    """Names of timm's networks: the one that is called so, or those that hold or match it.

    Raises UserError for none, and for more than are looked at in a minute or two.
    """
    names = names_like(pattern)
    if not names:
        close = get_close_matches(pattern, names_like("*"), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "try a part of a name, such as convnext"
        raise UserError(f"models: no network of timm is called or matches '{pattern}'; {hint}")
    if len(names) > MOST_LOOKED_AT:
        raise UserError(
            f"models: '{pattern}' matches {len(names)} networks of timm; narrow it to {MOST_LOOKED_AT} or fewer, as "
            f"{names[0]} or {names[0][:6]}*"
        )
    return names


def shipped() -> list[Support]:
    """What `support.csv` holds."""
    with SHIPPED.open(newline="", encoding="utf-8") as file:
        return [Support(**row) for row in csv.DictReader(file)]


def write(rows: Iterable[Support], path: Path = SHIPPED) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row.cells() for row in rows)

"""A run's weights for the libraries that its network is made of: timm's encoders, segmentation_models_pytorch's models.

These need no package of ours to read them. What normalizes and pads is not in them: the receipt says how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.models import EncoderNet, ModelConfig, SegmentationModel, evaluating
from ssl_seg.models.smp_whole import Whole, files_of, read_files, wholes_of
from ssl_seg.models.support import adaptation
from ssl_seg.models.timm_plain import Plain, plain_of, sizes_of, unequal_maps
from ssl_seg.weights import forms
from ssl_seg.weights.export import (
    exported_config,
    holds_encoder,
    load_encoder,
    load_model,
    read_encoder_info,
    read_model_info,
)
from ssl_seg.weights.forms import COMPARED, Exported, words_of

Differences = dict[str, float]  # by the shape of the images: `forms.distance`
MULTIPLE = 32  # of both sides of what a model of smp takes


def export_timm(run: str | Path, out: str | Path) -> Exported:
    """Write a run's encoder as timm's own network has it, and a receipt beside it (`out` with .json after its name).

    The run is pretrained or fine-tuned. Raises UserError for an `out` that is there or has another suffix, for an
    encoder that is no network of timm as timm has it, and, with nothing left, where timm's network with these weights
    gives other maps.

    Read it by `timm.create_model(name).load_state_dict(load_file("leaf.safetensors"), strict=False)`: what is missing
    then stands behind the last map, as a classifier does.
    """
    out = forms.new_place(out, ".safetensors")
    encoder, config, info = _encoder_of(run)
    with evaluating(encoder):
        plain, missing, differences = _plain_that_fits(encoder, config)
    largest = forms.check_equal(differences, f"timm's {plain.name}", "value")
    payload = files.tensor_bytes(plain.tensors)
    made = f"timm.create_model({_called(plain.name, plain.arguments)})"
    receipt = {
        "timm": plain.name,
        "arguments": plain.arguments,
        "read": f'{made}.load_state_dict(safetensors.torch.load_file("{out.name}"), strict=False)',
        "missing": missing,  # of timm's network: what stands behind its last map
        "left_out": plain.left_out,  # of ours: what makes further maps of timm's
        "mean": encoder.mean.flatten().tolist(),  # to subtract from RGB in [0, 1], and to divide by
        "std": encoder.std.flatten().tolist(),
        "adapted": adaptation(encoder),  # how our maps are made of timm's; '': they are timm's own
        "compared": differences,  # the largest difference of a map's value, as a part of the map's largest
        **forms.facts(info, ("timm",)),
    }
    forms.write(out, payload, receipt)
    beside = f"; {len(plain.left_out)} tensors that make further maps are left out" if plain.left_out else ""
    told = (
        f"{out}: {made} gives the encoder's maps, to {largest:.0e} of their largest value; missing by strict=False: "
        f"{', '.join(missing) or 'nothing'}{beside}"
    )
    return Exported(out, largest, told)


def export_smp(run: str | Path, out: str | Path) -> Exported:
    """Write a fine-tuned model as a folder of segmentation_models_pytorch, and a receipt beside it (`out` + .json).

    Raises UserError for an `out` that is there, for a network that smp does not have (`models.smp_whole` says which),
    and, with nothing left, for a model that answers otherwise than ours.

    Read it by `segmentation_models_pytorch.from_pretrained("leaf_smp")`.
    """
    out = forms.new_place(out, "")
    network, _ = load_model(run)
    info = read_model_info(run)
    config = exported_config(run, info)
    if config.norm not in ("keep", "batch", "sync", "frozen"):
        raise UserError(
            f"export: model.norm: {config.norm}: smp's networks have the norm layers of their architecture; take --to "
            "torch, onnx or hub"
        )
    with evaluating(network), forms.quietly():
        whole, held, differences = _whole_that_fits(network, config)
    largest = forms.check_equal(differences, f"smp's {whole.name}")
    receipt = {
        "smp": whole.name,
        "arguments": whole.arguments,
        "read": f'segmentation_models_pytorch.from_pretrained("{out.name}")',
        "mean": network.encoder.mean.flatten().tolist(),  # to subtract from RGB in [0, 1], and to divide by
        "std": network.encoder.std.flatten().tolist(),
        "multiple": MULTIPLE,  # of height and width: pad with zeros, right and below, after that
        "compared": differences,  # the largest difference of a logit, as a part of the largest logit
        **forms.facts(info, ("segmentation_models_pytorch", "timm")),
    }
    forms.write(out, held, receipt)
    told = (
        f'{out}: smp.{whole.name}("{whole.arguments["encoder_name"]}") answers as the model, to {largest:.0e} of the '
        f'largest logit, for normalized images: segmentation_models_pytorch.from_pretrained("{out}")'
    )
    return Exported(out, largest, told)


def _whole_that_fits(network: SegmentationModel, config: ModelConfig) -> tuple[Whole, dict[str, bytes], Differences]:
    """Of smp's models that take our weights the first that answers as ours, else the last; its files, read again."""
    found = None
    for whole in wholes_of(network, config.decoder):
        held = files_of(whole)
        reread = read_files(held)
        found = whole, held, _answer_differences(network, reread)
        if max(found[2].values()) < forms.TOLERANCE:
            break
    if found is None:
        raise UserError(
            "export: smp has no model with these layers (its encoder or decoder has others); take --to timm for the "
            "encoder alone, or --to torch, onnx or hub"
        )
    return found


def _answer_differences(network: SegmentationModel, net: nn.Module) -> Differences:
    """By the shape of the images; infinite where smp's model does not take them."""
    found = {}
    for shape in _whole_strides(COMPARED):
        image = forms.noise(shape, network.image_channels)
        try:
            answer = net((image - network.encoder.mean) / network.encoder.std)
        except Exception:  # smp and timm raise many kinds for a size that they do not take
            found[words_of(shape)] = math.inf
        else:
            found[words_of(shape)] = forms.distance(answer, network(image))
    return found


def _encoder_of(run: str | Path) -> tuple[EncoderNet, ModelConfig, dict[str, Any]]:
    """The encoder of a run, its model's config, and the JSON of the export that it comes from."""
    if holds_encoder(run):
        info = read_encoder_info(run)
        if "config" not in info:
            raise UserError(f"{run}: has no encoder.json beside it, so nobody knows its network; name a run folder")
        config = exported_config(run, info)
        encoder = config.without_pretrained().build_encoder()
        load_encoder(encoder, run)
        return encoder, config, info
    network, _ = load_model(run)
    info = read_model_info(run)
    return network.encoder, exported_config(run, info), info


def _plain_that_fits(encoder: EncoderNet, config: ModelConfig) -> tuple[Plain, list[str], Differences]:
    """Of the ways in which the encoder may be timm's network, the one whose maps differ least."""
    best: tuple[Plain, list[str], Differences] | None = None
    for plain in plain_of(encoder, config.encoder.type, config.decoder.output_stride):
        missing: list[str] = []
        try:
            network = plain.network(missing)
        except TypeError:  # it takes no output_stride, so it is not dilated
            continue
        differences = _map_differences(encoder, plain, network)
        if best is None or max(differences.values()) < max(best[2].values()):
            best = plain, missing, differences
    assert best is not None, "the first way has no argument that timm's network has not had already"
    return best


def _map_differences(encoder: EncoderNet, plain: Plain, network: nn.Module) -> Differences:
    """By the shape of the images."""
    found = {}
    for shape in sizes_of(plain, list(COMPARED)):
        normal = (forms.noise(shape, encoder.image_channels) - encoder.mean) / encoder.std
        with torch.no_grad():
            found[words_of(shape)] = unequal_maps(encoder, network, normal)
    return found


def _whole_strides(shapes: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [
        (batch, -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE) for batch, height, width in shapes
    ]


def _called(name: str, arguments: dict[str, Any]) -> str:
    return ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])

"""What a run's switch norm layers have learnt to mix: a table and a picture of the shares, layer by layer.

Read from the exported weights alone; no network is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.figures import charts, svg
from ssl_seg.norm.convert import Shares, shares_in
from ssl_seg.norm.layers import SHARES
from ssl_seg.weights.export import read_export


@dataclass(frozen=True)
class Part:
    """One exported network of a run and its switch norm layers, first to last; names without what all begin with."""

    name: str
    layers: tuple[Shares, ...]


@dataclass(frozen=True)
class Norms:
    """What `norms` gives back."""

    parts: tuple[Part, ...]
    picture: Path


def norms(run: str | Path) -> Norms:
    """The shares in a run's encoder and decoders, or its model; writes RUN/pictures/norms.png.

    Raises UserError for what is no run, one that has exported nothing yet, and one without switch norm.
    """
    folder = Path(run)
    parts = read_parts(folder)
    picture = folder / "pictures" / "norms.png"
    with files.naming(picture.parent):
        picture.parent.mkdir(exist_ok=True)
    files.write_atomic(picture, svg.to_png(draw(parts)))
    return Norms(parts, picture)


def read_parts(folder: Path) -> tuple[Part, ...]:
    """What `norms` shows, nothing written; raises UserError as it does."""
    if not files.is_there(folder / "run.json"):
        raise UserError(f"{folder}: is no run folder (it has no run.json); give one that --out named")
    stage = files.read_json(folder / "run.json").get("stage")
    parts = _of_model(folder) if stage == "finetune" else _of_pretraining(folder)
    if not parts:
        raise UserError(
            f"{folder}: was trained with norm: {_norm_of(folder, stage)}, so it has no shares to show; "
            "train one with model.norm=switch"
        )
    return tuple(parts)


def draw(parts: Sequence[Part]) -> charts.Figure:
    """A row per layer, first on top; a stacked bar of the three shares for the mean, one for the variance."""
    return charts.norm_shares({part.name: part.layers for part in parts}, SHARES)


def _of_model(folder: Path) -> list[Part]:
    layers = _read(folder, "model", "model")
    halves = [(name, [layer for layer in layers if layer.name.startswith(f"{name}.")]) for name in ("encoder", "head")]
    return [_part(name, own) for name, own in halves if own]


def _of_pretraining(folder: Path) -> list[Part]:
    found = [("encoder", _read(folder, "encoder", "encoder"))]
    tasks = sorted(file.stem for file in files.committed(folder / "decoders").glob("*.safetensors"))
    found += [(f"decoder of {task}", _read(folder, "decoders", task)) for task in tasks]
    return [_part(name, layers) for name, layers in found if layers]


def _read(folder: Path, part: str, name: str) -> list[Shares]:
    tensors, info = read_export(folder, part, name)
    return shares_in(tensors, info.get("switch_layers", []))


def _part(name: str, layers: Sequence[Shares]) -> Part:
    """Their names without the words with which all begin; a number keeps the word before it."""
    words = [layer.name.split(".") for layer in layers]
    common = takewhile(lambda column: len(set(column)) == 1, zip(*(own[:-1] for own in words), strict=False))
    start = len(list(common))
    if start and any(own[start].isdigit() for own in words):
        start -= 1
    shortened = (replace(layer, name=".".join(own[start:])) for layer, own in zip(layers, words, strict=True))
    return Part(name, tuple(shortened))


def _norm_of(folder: Path, stage: str | None) -> str:
    part = "model" if stage == "finetune" else "encoder"
    return read_export(folder, part, part)[1].get("config", {}).get("norm", "keep")

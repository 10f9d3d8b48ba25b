"""What a run's switch norm layers have learnt to mix: a table and a picture of the shares, layer by layer.

Read from the exported weights alone; no network is built.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from ssl_seg import files, weights
from ssl_seg.config import UserError
from ssl_seg.norm import Shares, shares_in
from ssl_seg.switch_norm import SHARES

# Of the bar and of the number on it. Okabe and Ito, 2008: colour-blind readers tell them apart too.
COLOURS = (("#0072B2", "white"), ("#E69F00", "black"), ("#009E73", "white"))
ROW, MARGIN, WIDTH = 0.2, 0.9, 10.0  # inches: of a layer, around all of them, of the whole
NARROW = 0.06  # a share with less room than its own number
DOTS_PER_INCH = 130


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
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json); give one that --out named")
    stage = files.read_json(folder / "run.json").get("stage")
    parts = _of_model(folder) if stage == "finetune" else _of_pretraining(folder)
    if not parts:
        raise UserError(
            f"{folder}: was trained with norm: {_norm_of(folder, stage)}, so it has no shares to show; "
            "train one with model.norm=switch"
        )
    picture = folder / "pictures" / "norms.png"
    with files.naming(picture.parent):
        picture.parent.mkdir(exist_ok=True)
    files.write_atomic(picture, draw(parts))
    return Norms(tuple(parts), picture)


def draw(parts: Sequence[Part]) -> bytes:
    """A PNG: a row per layer, first on top; a stacked bar of the three shares for the mean, one for the variance."""
    layers = [layer for part in parts for layer in part.layers]
    heads = _head_rows(parts)
    rows = [head + 1 + index for head, part in zip(heads, parts, strict=True) for index in range(len(part.layers))]
    height = MARGIN + ROW * (len(layers) + len(parts))
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
    of_mean, of_var = figure.subplots(1, 2, sharey=True)
    bars = _draw_bars(of_mean, "shares in the mean", rows, [layer.mean for layer in layers])
    _draw_bars(of_var, "shares in the variance", rows, [layer.var for layer in layers])
    names = [f"{layer.name}  ({layer.channels})" for layer in layers]
    of_mean.set_yticks(rows, names, fontsize=7)
    of_mean.set_ylim(rows[-1] + 0.7, -0.7)
    for part, row in zip(parts, heads, strict=True):
        of_mean.text(0.0, row, part.name, fontsize=8, fontweight="bold", va="center")
    of_mean.text(-0.01, heads[0], "layer  (channels)", fontsize=7, ha="right", va="center")
    figure.legend(bars, SHARES, loc="outside upper center", ncols=len(SHARES), fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_bars(panel: Axes, title: str, rows: Sequence[float], values: Sequence[Sequence[float]]) -> list[BarContainer]:
    bars = []
    lefts = [0.0] * len(rows)
    for index, (colour, ink) in enumerate(COLOURS):
        shares = [value[index] for value in values]
        bars.append(panel.barh(rows, shares, left=lefts, color=colour, height=0.86))
        for row, left, share in zip(rows, lefts, shares, strict=True):
            if share >= NARROW:
                panel.text(left + share / 2, row, f"{share:.0%}", fontsize=6, color=ink, ha="center", va="center")
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    panel.set_title(title, fontsize=9)
    panel.set_xlim(0, 1)
    panel.set_xticks([0, 1 / 3, 2 / 3, 1], ["0", "1/3", "2/3", "1"], fontsize=7)
    panel.get_xticklabels()[-1].set_horizontalalignment("right")  # else it is cut off at the edge
    for equal in (1 / 3, 2 / 3):
        panel.axvline(equal, color="black", linewidth=0.6, linestyle=":")  # where a fresh layer starts
    panel.tick_params(length=2)
    panel.spines[["top", "right", "left"]].set_visible(False)
    return bars


def _head_rows(parts: Sequence[Part]) -> list[int]:
    """The row of each part's name, above those of its layers."""
    return [sum(len(part.layers) + 1 for part in parts[:index]) for index in range(len(parts))]


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
    tensors, info = weights.read_export(folder, part, name)
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
    return weights.read_export(folder, part, part)[1].get("config", {}).get("norm", "keep")

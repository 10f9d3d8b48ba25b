"""A fine-tuned model as a program of torch.export (.pt2), which runs with torch alone.

It takes RGB in [0, 1], `(B, 3, H, W)`, and gives logits `(B, K, H, W)`: normalizing and padding are part of it. Number
and size of the images are free where torch can trace the network so; else what is fixed is told, and stands in the
receipt.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as tracing

from ssl_seg.config import UserError, first_line
from ssl_seg.images import Size
from ssl_seg.models import evaluating
from ssl_seg.weights import forms
from ssl_seg.weights.export import load_model, read_model_info
from ssl_seg.weights.forms import COMPARED, Exported, difference, words_of

TRACED = (2, 97, 131)  # B, H, W that the trace is made with, as of ONNX
SMALLEST = min(side for _, *sides in COMPARED for side in sides)  # below, layer norm of a map of one pixel may refuse
NOTES = "ssl_seg.json"  # the file in the archive that says what the model is


@dataclass(frozen=True)
class Freedom:
    """What of a batch of images may vary."""

    number: bool
    size: Size | None  # the size (H, W) that all images have; None: any

    @property
    def words(self) -> str:
        count = "any number" if self.number else "one"
        size = f"any size from {SMALLEST} x {SMALLEST} on" if self.size is None else f"{self.size[0]} x {self.size[1]}"
        return f"{count} of {size}"

    def dimensions(self) -> dict[int, Any]:
        free = torch.export.Dim.DYNAMIC
        return {**({0: free} if self.number else {}), **({2: free, 3: free} if self.size is None else {})}

    def shapes(self) -> list[tuple[int, int, int]]:
        """Of the images by which the program is compared (B, H, W)."""
        found = []
        for batch, height, width in COMPARED:
            found.append((batch if self.number else 1, *(self.size or (height, width))))
        return list(dict.fromkeys(found))

    def example(self) -> tuple[int, ...]:
        """The shape (B, 3, H, W) of the images that a trace is made with."""
        batch, height, width = TRACED
        return (batch if self.number else 1, 3, *(self.size or (height, width)))


def freedoms(resize: Size | None) -> list[Freedom]:
    """From the most on, for torch cannot trace every network so; the last where a run's images were resized."""
    ways = [Freedom(number=True, size=None), Freedom(number=False, size=None)]
    return ways + ([Freedom(number=True, size=resize)] if resize is not None else [])


@contextmanager
def tracing_any_size() -> Iterator[None]:
    """In it a trace takes no size of its example for granted.

    Else it does, and the program checks, that no side was 1 on the way and that the image's own size is no multiple of
    the stride: it then refuses every image of 256 x 256.
    """
    with cast("Any", tracing).patch(backed_size_oblivious=True):
        yield


def export_program(model: str | Path, out: str | Path) -> Exported:
    """Write the model of a run folder as a .pt2 file, and a receipt beside it (`out` with .json after its name).

    Free in number and size if torch traces the network so, else in the size, else in the number at the size that the
    run's images were resized to. Raises UserError for an `out` that is there or has another suffix, for a network that
    torch traces in no such way, and, with nothing left, for a program that answers otherwise than the model.

    Read it by `torch.export.load("leaf.pt2").module()`.
    """
    out = forms.new_place(out, ".pt2")
    network, resize = load_model(model)
    info = read_model_info(model)
    notes = {"class_names": network.class_names, "model_sha256": info["sha256"], "resize": resize}
    with evaluating(network), forms.quietly():
        payload, freedom, differences = _first_that_runs(network, resize, {NOTES: json.dumps(notes)})
    largest = forms.check_equal(differences, "the program")
    count = len(network.class_names)
    about = {
        "input": f"(B, 3, H, W) float32, RGB in [0, 1]: {freedom.words}",
        "output": f"(B, {count}, H, W) float32; the class is the largest",
        "read": f'torch.export.load("{out.name}").module()(image)',
        "compared": differences,  # the largest difference of a logit, as a part of the largest logit
        **forms.facts(info, ()),
    }
    forms.write(out, payload, about)
    told = (
        f"{out}: answers as the model on images of {', '.join(differences)}, to {largest:.0e} of the largest logit; "
        f'takes RGB in [0, 1], {freedom.words}: torch.export.load("{out}").module()(image)'
    )
    return Exported(out, largest, told)


def _first_that_runs(
    network: nn.Module, resize: Size | None, notes: Mapping[str, str]
) -> tuple[bytes, Freedom, dict[str, float]]:
    """A program that is as free as torch can make it; its own differences from the network, by the shape."""
    refusal: Exception | None = None
    for freedom in freedoms(resize):
        try:
            payload = _traced(network, freedom, notes)
            answer = runner(payload)
            found = {words_of(shape): difference(network, answer, shape) for shape in freedom.shapes()}
        except Exception as error:  # torch raises many kinds, with pages of text
            refusal = refusal or error
        else:
            return payload, freedom, found
    assert refusal is not None, "the first way was tried"
    also = "" if resize is not None else ", or a run with data.resize, whose size the program would have"
    raise UserError(
        f"export: torch cannot write this network for images of any size ({first_line(refusal)[:200]}); take ssl-seg "
        f"predict{also}"
    ) from refusal


def runner(payload: bytes) -> Callable[[Tensor], Tensor]:
    """What runs such a file: images to logits."""
    return torch.export.load(io.BytesIO(payload)).module()


def _traced(network: nn.Module, freedom: Freedom, notes: Mapping[str, str]) -> bytes:
    image = torch.rand(freedom.example())
    with tracing_any_size():
        program = torch.export.export(network, (image,), dynamic_shapes=(freedom.dimensions(),))
    payload = io.BytesIO()
    torch.export.save(program, payload, extra_files=dict(notes))
    return payload.getvalue()

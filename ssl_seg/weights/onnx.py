"""A fine-tuned model as an ONNX file, which runs without this package.

It takes RGB in [0, 1], `(B, 3, H, W)` of any number and size, and gives logits `(B, K, H, W)`: normalizing and padding
are part of it. What is written is run by onnxruntime first, and compared with the model at several sizes, before a word
is said of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ssl_seg.config import UserError, first_line
from ssl_seg.models import SegmentationModel, evaluating
from ssl_seg.weights import forms
from ssl_seg.weights.export import in_words, load_model, read_model_info
from ssl_seg.weights.forms import COMPARED, Exported, difference, words_of

NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages
# B, H, W of the images that the trace is made with. Multiples of no stride: so it holds what makes up for that, which
# does nothing where there is nothing to make up for.
TRACED = (2, 97, 131)
# By how many of the logits a program is judged. The last of a hundred is left out, since SegNet's poolings choose: of
# two pixels that are alike but for rounding either is right, and the convolutions behind spread it: 0.5 in 100 of
# SegNet-basic's logits on noise. A wrong layer changes most.
ALL_BUT_FEW = 0.99
IMAGE, LOGITS = "image", "logits"


def export_onnx(model: str | Path, out: str | Path) -> Exported:
    """Write the model of a run folder as ONNX, and a receipt beside it (`out` with .json after its name).

    Raises UserError for an `out` that is there or has another suffix, where packages are missing, for a network that
    torch cannot trace, and, with nothing left, for a program that answers otherwise than the model.
    """
    out = forms.new_place(out, ".onnx")
    forms.require(NEEDED, "onnx")
    network, _ = load_model(model)
    info = read_model_info(model)
    with evaluating(network), forms.quietly():
        payload = _traced(network, {"class_names": json.dumps(network.class_names), "model_sha256": info["sha256"]})
        differences = _differences(network, payload, ALL_BUT_FEW)
        largest = forms.check_equal(differences, "the program")
        of_all = _differences(network, payload, 1.0)
    about = {
        "input": {IMAGE: forms.input_words(network)},
        "output": {LOGITS: f"(B, {len(network.class_names)}, H, W) float32; the class is the largest"},
        "compared": differences,  # 99 in 100 logits differ by no more, as a part of the largest
        "compared_all": of_all,  # the largest of all differences
        **forms.facts(info, NEEDED),
    }
    forms.write(out, payload, about)
    told = (
        f"{out}: answers as the model at {len(COMPARED)} sizes, to {largest:.0e} of the largest logit; takes "
        f"{in_words(network.image_channels)} in [0, 1] of any size, tells {', '.join(network.class_names)} apart"
    )
    return Exported(out, largest, told)


def runner(payload: bytes) -> Callable[[Tensor], Tensor]:
    """What runs such a file: images to logits, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run([LOGITS], {IMAGE: image.numpy()})[0])


def _traced(network: SegmentationModel, notes: Mapping[str, str]) -> bytes:
    """The model as ONNX, with `notes` among its metadata."""
    import onnx

    batch, height, width = TRACED
    any_size = torch.export.Dim.DYNAMIC
    try:
        made = torch.onnx.export(
            _with_pooling_of_any_size(network),
            (torch.rand(batch, network.image_channels, height, width),),
            dynamo=True,
            dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},),
            input_names=[IMAGE],
            output_names=[LOGITS],
            verbose=False,
        )
    except Exception as error:  # torch raises many kinds, with pages of text
        said = first_line(error)[:200]
        raise UserError(
            f"export: torch cannot write this network for images of any size ({said}); ssl-seg predict runs it"
        ) from error
    assert made is not None, "with dynamo it gives a program"
    onnx.helper.set_model_props(made.model_proto, dict(notes))
    return made.model_proto.SerializeToString()


def _with_pooling_of_any_size(network: nn.Module) -> nn.Module:
    """A copy without adaptive pooling to several cells, as UPerNet's pyramid has.

    torch writes that as the windows of the size that was traced: other sizes are refused by onnxruntime, or worse,
    answered wrongly (by 0.07 of the largest logit at 225 x 130).
    """
    changed = copy.deepcopy(network)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (1, (1, 1)):
                setattr(parent, name, _PooledBySums(cast("int | tuple[int | None, ...]", child.output_size)))
    return changed


class _PooledBySums(nn.Module):
    """Adaptive average pooling as weighted sums over rows and columns, whose weights follow from the size."""

    def __init__(self, cells: int | tuple[int | None, ...]) -> None:
        super().__init__()
        self.rows, self.columns = cells if isinstance(cells, tuple) else (cells, cells)

    def forward(self, level: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, rows, columns)`; None of them keeps a side."""
        if self.rows is not None:
            level = _cell_weights(self.rows, level.shape[-2]) @ level
        if self.columns is not None:
            level = level @ _cell_weights(self.columns, level.shape[-1]).T
        return level


def _cell_weights(cells: int, side: int) -> Tensor:
    """`(cells, side)`: the part of each pixel in the mean of each cell; cells overlap where they do not divide."""
    pixel = torch.arange(side)
    cell = torch.arange(cells)[:, None]
    first = cell * side // cells
    end = ((cell + 1) * side + cells - 1) // cells  # rounded up
    inside = (pixel >= first) & (pixel < end)
    return inside.float() / (end - first)


def _differences(network: nn.Module, payload: bytes, share: float) -> dict[str, float]:
    """`difference` by the shape. Raises UserError for what onnxruntime does not run at one of them."""
    found: dict[str, float] = {}
    words = ""
    try:
        answer = runner(payload)
        for shape in COMPARED:
            words = words_of(shape)
            found[words] = difference(network, answer, shape, share)
    except Exception as error:  # onnxruntime's own kinds, none of which it makes public
        of_size = f" for images of {words}" if words else ""
        raise UserError(
            f"export: onnxruntime does not run this network{of_size} ({first_line(error)[:200]}), so nothing is "
            "written; ssl-seg predict runs it"
        ) from error
    return found

"""A fine-tuned model as an ONNX file, which runs without this package.

It takes RGB in [0, 1], `(B, 3, H, W)` of any number and size, and gives logits `(B, K, H, W)`: normalizing and padding
are part of it. What is written is run by onnxruntime first, and compared with the model at several sizes, before a word
is said of it.

torch's own format (torch.export's .pt2) would hold the same trace, but checks at each call what the trace took for
granted of the image's size, and refuses those that a head need not resize for.
"""

from __future__ import annotations

import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_seg import files
from ssl_seg.config import UserError, first_line, user_path
from ssl_seg.models import SegmentationModel, evaluating
from ssl_seg.weights.export import load_model, range_of, read_model_info

SUFFIX = ".onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages
# B, H, W of the images that the trace is made with. Multiples of no stride: so it holds what makes up for that, which
# does nothing where there is nothing to make up for.
TRACED = (2, 97, 131)
COMPARED = ((1, 64, 64), (2, 100, 150), (3, 225, 130))  # and of those that the program is compared by
# Of logits, as a part of the largest: what float32 in another order of sums may give. A wrong layer gives tenths.
TOLERANCE = 1e-4
ALL_BUT_FEW = 0.99
IMAGE, LOGITS = "image", "logits"


@dataclass(frozen=True)
class Exported:
    """A file that answers as the model does."""

    path: Path
    class_names: tuple[str, ...]
    largest_difference: float  # by `difference`, over the images compared


def export_onnx(model: str | Path, out: str | Path) -> Exported:
    """Write the model of a run folder as ONNX, and a receipt beside it (`out` with .json after its name).

    Raises UserError for an `out` that is there or has another suffix, where packages are missing, for a network that
    torch cannot trace, and, with nothing left, for a program that answers otherwise than the model.
    """
    out = user_path(out)
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out}: give a name that ends with {SUFFIX}")
    receipt = out.with_name(f"{out.name}.json")
    taken = next((path for path in (out, receipt) if path.exists()), None)
    if taken is not None:
        raise UserError(f"--out {taken}: exists already; name a new file")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"export: {', '.join(missing)} not installed; pip install 'ssl_seg[onnx]'")
    network, resize = load_model(model)
    info = read_model_info(model)
    with evaluating(network), _quietly():
        payload = _traced(network, {"class_names": json.dumps(network.class_names), "model_sha256": info["sha256"]})
        differences = _differences(network, payload)
    largest = max(differences.values())
    if not largest < TOLERANCE:
        raise UserError(
            f"export: the program answers otherwise than the model, by {largest:.2g} of its largest logit, and is not "
            "written; please report the network's config"
        )
    about = {
        "sha256": files.sha256(payload),
        "model_sha256": info["sha256"],
        "class_names": network.class_names,
        "input": {IMAGE: "(B, 3, H, W) float32, RGB in [0, 1]"},
        "output": {LOGITS: f"(B, {len(network.class_names)}, H, W) float32; the class is the largest"},
        "resize": resize,  # (H, W) that images are to be brought to first; null: none
        "range": range_of(info),  # what was black and white in images of more than 8 bits
        "compared": differences,
        "versions": {name: version(name) for name in ("ssl_seg", "torch", *NEEDED)},
    }
    with files.naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(out, payload)
    files.write_atomic(receipt, files.json_bytes(about))
    return Exported(out, network.class_names, largest)


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
            network,
            (torch.rand(batch, 3, height, width),),
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


def _differences(network: nn.Module, payload: bytes) -> dict[str, float]:
    """`difference` by the shape. Raises UserError for what onnxruntime does not run at one of them."""
    found: dict[str, float] = {}
    words = ""
    try:
        answer = runner(payload)
        for shape in COMPARED:
            words = "x".join(map(str, shape))
            found[words] = difference(network, answer, shape)
    except Exception as error:  # onnxruntime's own kinds, none of which it makes public
        of_size = f" for images of {words}" if words else ""
        raise UserError(
            f"export: onnxruntime does not run this network{of_size} ({first_line(error)[:200]}), so nothing is "
            "written; ssl-seg predict runs it"
        ) from error
    return found


@torch.no_grad()
def difference(network: nn.Module, answer: Callable[[Tensor], Tensor], shape: Sequence[int]) -> float:
    """How far logits differ for random images of a `shape` (B, H, W), as a part of the largest: 99 in 100 of them.

    The last is left out, since SegNet's poolings choose: of two pixels that are alike but for rounding either is right,
    and the convolutions behind spread it: 0.5 in 100 of SegNet-basic's logits on noise. A wrong layer changes most.
    """
    batch, height, width = shape
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
    wanted, found = network(image), answer(image)
    if found.shape != wanted.shape:
        return math.inf
    return ((found - wanted).abs().flatten().quantile(ALL_BUT_FEW) / wanted.abs().max()).item()


@contextmanager
def _quietly() -> Iterator[None]:
    """torch tells of its steps and of its own deprecations, on every stream, and says nothing that a user could do."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

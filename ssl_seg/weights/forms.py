"""The network of a run in a form that other programs read: what all forms have in common.

Whatever is written is read again first, as its user would, and compared with the run's own network. Only then does it
get its name, with a receipt beside it: what it is, what it was compared on, how far it differs. How each form is made
is in a file of its own, reached by name, so that nothing is imported that is not asked for.

Ours, because the libraries write whatever they are given, and none compares.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl_seg import files
from ssl_seg.config import UserError, user_path
from ssl_seg.models import SegmentationModel, image_channels_of
from ssl_seg.weights.export import in_words, range_of


class Form(NamedTuple):
    """Where a form is made, and what its file is called."""

    module: str  # of this package
    verb: str  # (run, out) to Exported
    suffix: str  # of the file; '' for a folder
    meaning: str


FORMS = {
    "onnx": Form("onnx", "export_onnx", ".onnx", "a program for onnxruntime and others"),
    "torch": Form("program", "export_program", ".pt2", "a program for torch alone"),
    "timm": Form("libraries", "export_timm", ".safetensors", "the encoder's weights by timm's own names"),
    "smp": Form("libraries", "export_smp", "", "a folder for segmentation_models_pytorch's from_pretrained"),
    "hub": Form("hub", "export_hub", "", "a folder for the Hugging Face hub, with a model card"),
}
BY_SUFFIX = {form.suffix: word for word, form in FORMS.items() if form.suffix}
COMPARED = ((1, 64, 64), (2, 100, 150), (3, 225, 130))  # B, H, W of the images by which a form is compared
# Of the largest value: what float32 in another order of sums may give. A wrong layer gives tenths.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A file or folder that answers as the run's network does."""

    path: Path
    largest_difference: float  # by `difference`, over all that was compared
    told: str  # a line for a person: what it is, how far it differs, how it is read


def export(run: str | Path, out: str | Path, to: str | None = None) -> Exported:
    """Write the network of a run folder in a form for other programs, and a receipt beside it (`out` + .json).

    `to` is a word of `FORMS`; left out, the suffix of `out` tells it. Raises UserError for a form that is not known,
    an `out` that is there or is called otherwise, packages that are not installed, a network that the form cannot
    hold and, with nothing left, for what answers otherwise than the network.
    """
    word = to or BY_SUFFIX.get(Path(out).suffix)
    if word not in FORMS:
        known = ", ".join(f"{name} ({form.suffix or 'a folder'})" for name, form in FORMS.items())
        given = f"--to {to}: is no form" if to else f"--out {out}: its suffix tells no form"
        raise UserError(f"{given}; say --to with one of: {known}")
    form = FORMS[word]
    write = getattr(importlib.import_module(f"ssl_seg.weights.{form.module}"), form.verb)
    return write(run, out)


def new_place(out: str | Path, suffix: str) -> Path:
    """Where a form is written. Raises UserError where it, or its receipt, is there, or the name has another suffix."""
    out = user_path(out)
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out}: give a name that ends with {suffix}")
    taken = next((path for path in (out, _receipt_of(out)) if path.exists()), None)
    if taken is not None:
        raise UserError(f"--out {taken}: exists already; name a new {'file' if suffix else 'folder'}")
    return out


def require(packages: Sequence[str], extra: str) -> None:
    """Raise UserError unless all are installed, which `extra` of this package does."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"export: {', '.join(missing)} not installed; pip install 'ssl_seg[{extra}]'")


def noise(shape: Sequence[int], channels: int = 3) -> Tensor:
    """Images `(B, C, H, W)` in [0, 1], the same for a shape (B, H, W) at each call."""
    batch, height, width = shape
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(height))


def input_words(network: SegmentationModel) -> str:
    """What a form takes, for its receipt."""
    return f"(B, {network.image_channels}, H, W) float32, {in_words(network.image_channels)} in [0, 1]"


def words_of(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def distance(found: Tensor, wanted: Tensor, share: float = 1.0) -> float:
    """How far two answers lie apart, as a part of the largest value wanted: `share` of all values differ by no more."""
    if found.shape != wanted.shape:
        return math.inf
    apart = (found - wanted).abs().flatten()
    largest = apart.max() if share == 1 else apart.quantile(share)
    return (largest / wanted.abs().max()).item()


@torch.no_grad()
def difference(
    network: nn.Module,
    answer: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    share: float = 1.0,
) -> float:
    """The `distance` of what `answer` says from what `network` says of the `noise` of a shape (B, H, W)."""
    image = noise(shape, image_channels_of(network))
    wanted = network(image)
    return distance(answer(image), wanted, share)


def check_equal(differences: Mapping[str, float], what: str, of: str = "logit") -> float:
    """The largest of them. Raises UserError where it is more than rounding gives."""
    largest = max(differences.values())
    if not largest < TOLERANCE:
        raise UserError(
            f"export: {what} answers otherwise than the model, by {largest:.2g} of its largest {of}, and is not "
            "written; please report the network's config"
        )
    return largest


@contextmanager
def quietly() -> Iterator[None]:
    """torch tells of its steps and of its own deprecations, on every stream, and says nothing that a user could do."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def facts(info: Mapping[str, Any], packages: Sequence[str]) -> dict[str, Any]:
    """What every receipt of a model says, by the JSON of its export."""
    return {
        "model_sha256": info["sha256"],
        "class_names": info.get("class_names"),
        "resize": info.get("resize"),  # (H, W) that images are to be brought to first; null: none
        "range": range_of(info),  # what was black and white in images of more than 8 bits
        "versions": {name: version(name) for name in ("ssl_seg", "torch", *packages)},
    }


def write(out: Path, payload: bytes | Mapping[str, bytes], receipt: Mapping[str, Any]) -> None:
    """A file, or a folder of files, and its receipt with their digests. Raises UserError where the disk refuses."""
    with files.naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(payload, bytes):
        digests = {"sha256": files.sha256(payload)}
    else:
        digests = {"files": {name: files.sha256(held) for name, held in payload.items()}}
    # The receipt first: an export that a full disk leaves without one would be refused as there already.
    files.write_atomic(_receipt_of(out), files.json_bytes(files.finite({**digests, **receipt})))
    try:
        if isinstance(payload, bytes):
            files.write_atomic(out, payload)
        else:
            _write_folder(out, payload)
    except BaseException:
        _receipt_of(out).unlink(missing_ok=True)
        raise


def _write_folder(out: Path, payload: Mapping[str, bytes]) -> None:
    """A new folder, which has its name once all is in it. Beside it others may be writing theirs."""
    with files.naming(out):
        new = Path(tempfile.mkdtemp(prefix=f"{files.NEW}{out.name}-", dir=out.parent))
        try:
            for name, held in payload.items():
                (new / name).write_bytes(held)
            new.chmod(0o755)  # a temporary one is for its owner alone
            new.rename(out)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _receipt_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")

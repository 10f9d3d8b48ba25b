"""Trained weights as they leave a run: exported with what must be known of them, loaded with a receipt.

safetensors holds the tensors, JSON the rest. Ours is what `load_state_dict` cannot say: which tensors of a file arrived
under which name, what share of the network they are, and whether the network still computes the features that were
exported; weights that fit by name and shape alone are often the wrong ones. Less than all of it is refused unless the
user has named it.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssl_seg import files
from ssl_seg.config import UserError, load
from ssl_seg.images import Size
from ssl_seg.models import EncoderNet, ModelConfig, SegmentationModel
from ssl_seg.norm.convert import switch_layers
from ssl_seg.weights.fingerprint import fingerprint, mark_of, marks_of
from ssl_seg.weights.receipt import (
    Receipt,
    compare_features,
    first_names,
    is_changed,
    known_marks,
    match_tensors,
    refuse_misfits,
)

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
TORCH_ERRORS = (RuntimeError, ValueError, LookupError, EOFError, OSError, AttributeError, TypeError, pickle.PickleError)


def export_encoder(folder: str | Path, encoder: EncoderNet, config: Mapping[str, Any]) -> Path:
    """Write the encoder to the run's encoder/, with `config` (a dumped ModelConfig) as JSON."""
    info = {"config": config, "channels": encoder.channels, "strides": encoder.strides}
    return _export(folder, "encoder", encoder, info)


def load_encoder(encoder: EncoderNet, path: str | Path, allow: Sequence[str] = ()) -> Receipt:
    """Fill `encoder` from a run folder, its encoder/, a .safetensors file, or a torch checkpoint of plain tensors.

    Raises UserError, with `encoder` unchanged, for anything less than every tensor and equal features, unless a glob
    of `allow` names it: tensor names, and "features" for the comparison. Nothing matched is refused always.
    """
    return _fill(encoder, *_find_export(path, "encoder", "encoder"), allow)


def read_encoder_info(path: str | Path) -> dict[str, Any]:
    """encoder.json of a run folder, its encoder/ or the file beside it: `config`, `channels`; {} for a foreign file."""
    return _find_export(path, "encoder", "encoder")[1]


def export_decoder(folder: str | Path, task_name: str, module: nn.Module) -> Path:
    """Write a head's decoder to the run's decoders/, beside those of other tasks; gives the weights' file."""
    if not task_name or Path(task_name).name != task_name:
        raise UserError(f"tasks.{task_name}: cannot be a file name; give the task a plain name")
    target = Path(folder) / "decoders"
    former = files.committed(target)
    others = {entry.name: entry.read_bytes() for entry in former.iterdir()} if former.is_dir() else {}
    files.commit_folder(target, others | _pair(task_name, module, {"config": {}}))
    return target / f"{task_name}.safetensors"


def load_decoder(module: nn.Module, path: str | Path, task_name: str, allow: Sequence[str] = ()) -> Receipt:
    """Fill a head's decoder from a run's decoder of the task `task_name`, on the terms of `load_encoder`."""
    return _fill(module, *_find_export(path, "decoders", task_name), allow)


def export_model(
    folder: str | Path, model: SegmentationModel, config: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a segmentation model to the run's model/ with `config` (a dumped ModelConfig); gives that folder.

    `extra` is JSON for model.json: `resize` (H, W) where the model wants one size, `metrics`.
    """
    info = {
        "config": config,
        "class_names": model.class_names,
        "preprocessing": "RGB in [0, 1]; the encoder normalizes and pads",
    }
    return _export(folder, "model", model, {**info, **(extra or {})})


def load_model_weights(model: SegmentationModel, path: str | Path, allow: Sequence[str] = ()) -> Receipt:
    """Fill a segmentation model from a run folder, its model/ or a file, on the terms of `load_encoder`."""
    return _fill(model, *_find_export(path, "model", "model"), allow)


def read_model_info(path: str | Path) -> dict[str, Any]:
    """model.json of a run folder, its model/ or the file model.safetensors: `config`, `class_names`, the extras."""
    weights, info = _find_export(path, "model", "model")
    if "config" not in info or "class_names" not in info:
        raise UserError(f"{weights}: has no model.json beside it; name a run folder or its model/")
    return info


def read_export(path: str | Path, part: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `part`/`name`.safetensors in a run folder, and the JSON beside them; no network is built."""
    weights, info = _find_export(path, part, name)
    return _read_tensors(weights, info), info


def _export(folder: str | Path, part: str, net: nn.Module, info: Mapping[str, Any]) -> Path:
    target = Path(folder) / part
    files.commit_folder(target, _pair(part, net, {**info, "fingerprint": fingerprint(net)}))
    return target


def _pair(name: str, module: nn.Module, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of an export: the weights, and what must be known of them."""
    tensors = module.state_dict()
    weights = files.tensor_bytes(tensors)
    marks = {own: marks_of(tensor) for own, tensor in tensors.items()}
    ordered = switch_layers(module)  # the file sorts its tensors
    described = files.finite({**info, "switch_layers": ordered, "sha256": files.sha256(weights), "tensors": marks})
    return {f"{name}.safetensors": weights, f"{name}.json": files.json_bytes(described)}


def _find_export(path: str | Path, part: str, name: str) -> tuple[Path, dict[str, Any]]:
    """The weights' file that `path` means, and the JSON beside it (empty for a file of other origin)."""
    path = Path(path)
    if path.is_file():
        beside = path.with_suffix(".json")
        info = files.read_json(beside) if path.suffix == ".safetensors" and beside.is_file() else {}
        return path, info if "sha256" in info else {}
    for folder in (files.committed(path), files.committed(path / part)):
        weights = folder / f"{name}.safetensors"
        if weights.is_file():
            info = files.read_json(weights.with_suffix(".json"))
            if "sha256" not in info:
                raise UserError(f"{weights.with_suffix('.json')}: holds no sha256, so it is damaged; export it again")
            return weights, info
    if not path.exists():
        raise UserError(f"{path}: does not exist; name a run folder or a file of weights")
    there = sorted(str(file.relative_to(path)) for file in path.glob("*/*.safetensors")) or ["no weights"]
    record = files.read_json(path / "run.json") if (path / "run.json").is_file() else {}
    kind = f"a {record['stage']} run that is {record.get('status', 'whole')}; it " if "stage" in record else ""
    raise UserError(
        f"{path}: {kind}holds {', '.join(there)} and no {part}/{name}.safetensors; name another run or a file"
    )


def _fill(module: nn.Module, path: Path, info: Mapping[str, Any], allow: Sequence[str]) -> Receipt:
    """Load what fits into `module`, or refuse and leave it as it is."""
    given = _read_tensors(path, info)
    receipt = match_tensors(path, module, given)
    tensors = {own: given[name] for own, name in receipt.matched.items()}
    receipt.changed = [own for own in tensors if is_changed(tensors[own], known_marks(own, receipt, info))]
    receipt.not_finite = [own for own, tensor in tensors.items() if not tensor.float().isfinite().all()]
    refuse_misfits(receipt, allow, foreign=not info)
    if "fingerprint" in info:
        trial = copy.deepcopy(module)
        trial.load_state_dict(tensors, strict=False)
        compare_features(receipt, trial, given, info, allow)
    module.load_state_dict(tensors, strict=False)
    return receipt


def _read_tensors(path: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not readable as safetensors ({error}); it is cut off, damaged or of another kind: export it "
            f"again, or give a .safetensors file or a state_dict saved by torch ({', '.join(TORCH_SUFFIXES)})"
        ) from error
    if "sha256" in info and not files.is_intact(path, info["sha256"]):
        marks = info.get("tensors", {})
        others = [name for name, tensor in tensors.items() if marks and mark_of(tensor) not in marks.get(name, "")]
        named = f"; other tensors: {first_names(others)}" if others else ""
        raise UserError(
            f"{path}: is not the file that its .json was written for (sha256 differs{named}); export it again, or take "
            "it out of its folder to load it by names and shapes alone"
        )
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint, without running what else it may hold."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle protocol, before the error that says it all
            content = torch.load(path, map_location="cpu", weights_only=True)
    except TORCH_ERRORS as error:
        raise UserError(f"{path}: holds more than tensors, or is damaged; save its state_dict alone") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no flat mapping of names to tensors; save its state_dict alone")
    return dict(content)


def build_model(config: ModelConfig, class_names: tuple[str, ...]) -> SegmentationModel:
    """A segmentation model with fresh weights."""
    encoder = config.build_encoder()
    head = config.spec(encoder).dense(len(class_names))
    return SegmentationModel(encoder, head, class_names)


def load_model(path: str | Path) -> tuple[SegmentationModel, Size | None]:
    """A fine-tuned model from a run folder or its `model/`, in evaluation mode, and the size (H, W) it wants images in.

    The model eats RGB in [0, 1], `(B, 3, H, W)` at any size. Raises UserError unless every weight is found.
    """
    info = read_model_info(path)
    config = load(ModelConfig, info["config"])
    model = build_model(config.without_pretrained(), tuple(info["class_names"]))
    load_model_weights(model, path)
    resize = tuple(info["resize"]) if info.get("resize") else None
    return model.eval(), resize

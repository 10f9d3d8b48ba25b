"""Trained weights as they leave a run: exported with what must be known of them, loaded with a receipt.

safetensors holds the tensors, JSON the rest. Ours is what `load_state_dict` cannot say: which tensors of a file arrived
under which name, what share of the network they are, and whether the network still computes the features that were
exported; weights that fit by name and shape alone are often the wrong ones. Less than all of it is refused unless the
user has named it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, TypeAdapter, model_validator
from torch import Tensor, nn

from ssl_seg import files
from ssl_seg.calibration import Temperature
from ssl_seg.config import UserError, load, user_path
from ssl_seg.images import Range, Size, check_size
from ssl_seg.models import RGB, EncoderNet, ModelConfig, SegmentationModel
from ssl_seg.norm.convert import switch_layers
from ssl_seg.runs.schema import Shape, check_shape
from ssl_seg.tensor_files import is_torch_file, read_tensors
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

Figures = Annotated[list[list[Annotated[float, Field(allow_inf_nan=False)]]], Field(min_length=1)]
Two = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
OURS = ("fingerprint", "switch_layers", "tensors")  # keys that no other program writes beside weights


class _ExportShape(Shape):
    """The JSON beside a decoder, and what all exports have in common."""

    config: dict[str, Any]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    range: Two | Annotated[list[Two], Field(min_length=1)] | None = None
    tensors: dict[str, str] = Field(default={})
    switch_layers: list[str] = Field(default=[])


class _EncoderShape(_ExportShape):
    channels: list[NonNegativeInt]
    strides: list[PositiveInt]
    fingerprint: Figures

    @model_validator(mode="after")
    def _of_one_network(self) -> Self:
        if not len(self.channels) == len(self.strides) == len(self.fingerprint):
            raise ValueError("channels, strides and fingerprint are not of one number of maps")
        return self


class _TemperatureShape(Shape):
    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    images: NonNegativeInt
    pixels: NonNegativeInt
    split: str
    nll: Two
    ece: Two


class _ModelShape(_ExportShape):
    class_names: Annotated[list[str], Field(min_length=1)]
    fingerprint: Figures
    resize: Annotated[list[PositiveInt], Field(min_length=2, max_length=2), AfterValidator(check_size)] | None = None
    temperature: _TemperatureShape | None = None


SHAPES = {"encoder": TypeAdapter(_EncoderShape), "model": TypeAdapter(_ModelShape)}
DECODER = TypeAdapter(_ExportShape)
HUB_CONFIG = "config.json"  # what a folder for the Hugging Face hub has in place of model.json
DECODERS = "decoders"  # the folder of a run that holds them


def export_encoder(
    folder: str | Path, encoder: EncoderNet, config: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the encoder to the run's encoder/, with `config` (a dumped ModelConfig) as JSON.

    `extra` is JSON for encoder.json: `range` of the images that it was trained on, as `Dataset.value_range` gives it.
    """
    info = {"config": config, "channels": encoder.channels, "strides": encoder.strides, **(extra or {})}
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


def exported_config(path: str | Path, info: Mapping[str, Any]) -> ModelConfig:
    """The network that the JSON of an export describes. Raises UserError that names `path` where that is none."""
    try:
        return load(ModelConfig, info["config"])
    except UserError as error:
        raise UserError(f"{path}: its .json describes no network that there is here ({error})") from error


def export_decoder(folder: str | Path, task_name: str, module: nn.Module) -> Path:
    """Write a head's decoder to the run's decoders/, beside those of other tasks; gives the weights' file."""
    if not task_name or Path(task_name).name != task_name:
        raise UserError(f"tasks.{task_name}: cannot be a file name; give the task a plain name")
    target = Path(folder) / DECODERS
    former = files.committed(target)
    others = {entry.name: entry.read_bytes() for entry in former.iterdir()} if former.is_dir() else {}
    files.commit_folder(target, others | _pair(task_name, module, {"config": {}}))
    return target / f"{task_name}.safetensors"


def load_decoder(module: nn.Module, path: str | Path, task_name: str, allow: Sequence[str] = ()) -> Receipt:
    """Fill a head's decoder from a run's decoder of the task `task_name`, on the terms of `load_encoder`."""
    return _fill(module, *_find_export(path, DECODERS, task_name), allow)


def export_model(
    folder: str | Path, model: SegmentationModel, config: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a segmentation model to the run's model/ with `config` (a dumped ModelConfig); gives that folder.

    `extra` is JSON for model.json: `resize` (H, W) where the model wants one size, `range` as that of an encoder,
    `temperature` as `temperature_of` reads it.
    """
    info = {
        "config": config,
        "class_names": model.class_names,
        "preprocessing": f"{in_words(model.image_channels)} in [0, 1]; the encoder normalizes and pads",
    }
    return _export(folder, "model", model, {**info, **(extra or {})})


def in_words(channels: int) -> str:
    """What the channels of an image are called."""
    return {1: "grey (1 channel)", 3: "RGB"}.get(channels, f"{channels} channels")


def load_model_weights(model: SegmentationModel, path: str | Path, allow: Sequence[str] = ()) -> Receipt:
    """Fill a segmentation model from a run folder, its model/ or a file, on the terms of `load_encoder`."""
    return _fill(model, *_find_export(path, "model", "model"), allow)


def read_model_info(path: str | Path) -> dict[str, Any]:
    """model.json of a run folder, its model/ or the file model.safetensors: `config`, `class_names`, the extras."""
    weights, info = _find_export(path, "model", "model")
    if "class_names" not in info:
        raise UserError(f"{weights}: has no model.json beside it; name a run folder or its model/")
    return info


def range_of(info: Mapping[str, Any]) -> Range | None:
    """The values that were black and white in training, by the JSON of an export; None for 8 bits, and before 0.2."""
    value_range = info.get("range")
    if value_range is None:
        return None
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value_range)


def channels_of(path: str | Path, info: Mapping[str, Any]) -> int:
    """Of the images that an exported network takes, by the JSON of an export; RGB where that says nothing of it."""
    return exported_config(path, info).channels if "config" in info else RGB


def temperature_of(info: Mapping[str, Any]) -> Temperature | None:
    """What validation images gave, by the JSON of an export; None where they gave none, and before 0.2."""
    written = info.get("temperature")
    return None if written is None else Temperature.load(written)


def holds_model(path: str | Path) -> bool:
    """Whether a run folder holds a model, as one that was fine-tuned does."""
    return os.path.isfile(files.committed(user_path(path) / "model") / "model.safetensors")


def holds_encoder(path: str | Path) -> bool:
    """Whether a run folder, or its encoder/, holds an encoder; the folder of a model has it inside."""
    folder = user_path(path)
    return any(os.path.isfile(files.committed(own) / "encoder.safetensors") for own in (folder, folder / "encoder"))


def read_export(path: str | Path, part: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `part`/`name`.safetensors in a run folder, and the JSON beside them; no network is built."""
    weights, info = _find_export(path, part, name)
    return _read_tensors(weights, info)[0], info


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
    path = user_path(path)
    if path.is_file():
        beside = path.with_suffix(".json")
        info = files.read_json(beside) if path.suffix == ".safetensors" and beside.is_file() else {}
        ours = "sha256" in info or any(key in info for key in OURS)
        return path, _checked(beside, info) if ours else {}
    for folder in (files.committed(path), files.committed(path / part)):
        weights = folder / f"{name}.safetensors"
        if os.path.isfile(weights):  # `Path.is_file` raises for a task's name that is too long
            described = weights.with_suffix(".json")
            if part == "model" and not described.is_file():
                described = folder / HUB_CONFIG
            return weights, _checked(described, files.read_json(described))
    if not path.exists():
        raise UserError(f"{path}: does not exist; name a run folder or a file of weights")
    there = sorted(str(file.relative_to(path)) for file in path.glob("*/*.safetensors")) or ["no weights"]
    record = files.read_json(path / "run.json") if (path / "run.json").is_file() else {}
    kind = f"a {record['stage']} run that is {record.get('status', 'whole')}; it " if "stage" in record else ""
    raise UserError(
        f"{path}: {kind}holds {', '.join(there)} and no {part}/{name}.safetensors; name another run or a file"
    )


def _checked(path: Path, info: dict[str, Any]) -> dict[str, Any]:
    """The JSON of an export. Raises UserError where it has not the shape that those who read it rely on."""
    if "sha256" not in info:
        raise UserError(f"{path}: holds no sha256, so it is damaged; export it again")
    part = "model" if "class_names" in info else path.stem  # a person may have called a whole model encoder.json
    if path.parent.name == DECODERS:  # a decoder is called by its task, which may be `model` too
        part = DECODERS
    check_shape(path, info, SHAPES.get(part, DECODER))
    return info


def _fill(module: nn.Module, path: Path, info: Mapping[str, Any], allow: Sequence[str]) -> Receipt:
    """Load what fits into `module`, or refuse and leave it as it is."""
    given, key = _read_tensors(path, info)
    receipt = match_tensors(path, module, given)
    if key:
        receipt.path = f"{path} ({key})"
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


def _read_tensors(path: Path, info: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """As `tensor_files.read_tensors`; of an export, no others than were exported."""
    tensors, key = read_tensors(path)
    if not is_torch_file(path) and "sha256" in info and not files.is_intact(path, info["sha256"]):
        marks = info.get("tensors", {})
        others = [name for name, tensor in tensors.items() if marks and mark_of(tensor) not in marks.get(name, "")]
        named = f"; other tensors: {first_names(others)}" if others else ""
        raise UserError(
            f"{path}: is not the file that its .json was written for (sha256 differs{named}); export it again, or take "
            "it out of its folder to load it by names and shapes alone"
        )
    return tensors, key


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
    config = exported_config(path, info)
    model = build_model(config.without_pretrained(), tuple(info["class_names"]))
    load_model_weights(model, path)
    resize = tuple(info["resize"]) if info.get("resize") else None
    return model.eval(), resize

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
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.models import EncoderNet, SegmentationModel
from ssl_seg.norm.convert import switch_layers
from ssl_seg.weights.fingerprint import (
    ROUNDED_TOLERANCES,
    TOLERANCE,
    dtype_name,
    feature_distance,
    figures_of,
    fingerprint,
    mark_of,
    marks_of,
)

PREFIXES = ("module.", "encoder.")  # DistributedDataParallel's, and ours inside a whole model
CONSTANTS = ("mean", "std")  # of an EncoderNet: the config gives them too, and no other library's file holds them
MAX_SUGGESTED = 4  # names in one suggestion; more of them speak for a wrong file
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
TORCH_ERRORS = (RuntimeError, ValueError, LookupError, EOFError, OSError, AttributeError, TypeError, pickle.PickleError)


# ---- exports ----


def export_encoder(
    folder: str | Path, encoder: EncoderNet, config: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the encoder to the run's encoder/, with `config` (a dumped ModelConfig) and `extra` as JSON."""
    info = {"config": config, "channels": encoder.channels, "strides": encoder.strides}
    return _export(folder, "encoder", encoder, {**info, **(extra or {})})


def load_encoder(encoder: EncoderNet, path: str | Path, allow: Sequence[str] = ()) -> Receipt:
    """Fill `encoder` from a run folder, its encoder/, a .safetensors file, or a torch checkpoint of plain tensors.

    Raises UserError, with `encoder` unchanged, for anything less than every tensor and equal features, unless a glob
    of `allow` names it: tensor names, and "features" for the comparison. Nothing matched is refused always.
    """
    return _fill(encoder, *_find_export(path, "encoder", "encoder"), allow)


def read_encoder_info(path: str | Path) -> dict[str, Any]:
    """encoder.json of a run folder, its encoder/ or the file beside it: `config`, `channels`; {} for a foreign file."""
    return _find_export(path, "encoder", "encoder")[1]


def export_decoder(
    folder: str | Path, task_name: str, module: nn.Module, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a head's decoder to the run's decoders/, beside those of other tasks; gives the weights' file."""
    if not task_name or Path(task_name).name != task_name:
        raise UserError(f"tasks.{task_name}: cannot be a file name; give the task a plain name")
    target = Path(folder) / "decoders"
    former = files.committed(target)
    others = {entry.name: entry.read_bytes() for entry in former.iterdir()} if former.is_dir() else {}
    files.commit_folder(target, others | _pair(task_name, module, {"config": config or {}}))
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


# ---- receipts ----


@dataclass
class Receipt:
    """What a file gave to a module. Names are the module's, but for `left_over`."""

    path: str
    matched: dict[str, str]  # the module's name -> the file's
    missing: list[str]
    left_over: list[str]
    mismatched: dict[str, str]  # name -> both shapes
    converted: dict[str, str]  # name -> both dtypes, where they differ
    share: float  # of the module's parameters that the file gave, 0 to 1
    changed: list[str] = field(default_factory=list)  # those of `matched` that are not as they were exported
    not_finite: list[str] = field(default_factory=list)  # those of `matched` that hold NaN or infinity
    features_equal: bool | None = None  # on the probe batch; None where the file names none to compare with
    tolerance: float = TOLERANCE  # up to which they are called equal; more where the file is of less precision

    @property
    def renamed(self) -> dict[str, str]:
        """Those of `matched` whose two names differ."""
        return {own: name for own, name in self.matched.items() if own != name}

    def summary(self) -> str:
        """One line for a person."""
        origins = sorted({text.partition(" ")[0].removeprefix("torch.") for text in self.converted.values()})
        figures = {
            "renamed": len(self.renamed),
            f"converted from {' and '.join(origins)}": len(self.converted),
            "missing": len(self.missing),
            "left over": len(self.left_over),
            "of another shape": len(self.mismatched),
            "changed since the export": len(self.changed),
            "not finite": len(self.not_finite),
        }
        details = "".join(f", {count} {word}" for word, count in figures.items() if count)
        limit = "" if self.tolerance == TOLERANCE else f" to {self.tolerance:g}"
        features = {True: f"features equal{limit}", False: "features differ", None: "features not compared"}
        return (
            f"{self.path}: {self.share:.1%} of the parameters in {len(self.matched)} tensors{details}; "
            f"{features[self.features_equal]}"
        )


def match_tensors(path: Path, module: nn.Module, given: Mapping[str, Tensor]) -> Receipt:
    """Pair tensors by name: an exact name, one without the prefixes that wrappers add, one under a prefix of its own.

    Loads nothing. Raises UserError for a file that holds the network twice, as a student and a teacher.
    """
    wanted = module.state_dict()
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    found = {name: name for name in wanted if name in given}
    for name in given:
        own = _own_name(name, wanted)
        if own is not None:
            found.setdefault(own, name)
    if not any(name in found for name in sizes):
        found |= _under_one_prefix(path, wanted, sizes, given)
    mismatched, converted = {}, {}
    for own, name in found.items():
        here, there = wanted[own], given[name]
        if here.shape != there.shape:
            mismatched[own] = f"{tuple(there.shape)} for {tuple(here.shape)}"
        elif here.is_floating_point() != there.is_floating_point():
            mismatched[own] = f"{there.dtype} for {here.dtype}"
        elif here.dtype != there.dtype:
            converted[own] = f"{there.dtype} to {here.dtype}"
    used = set(found.values())
    matched = {own: found[own] for own in wanted if own in found and own not in mismatched}
    arrived = sum(size for name, size in sizes.items() if name in matched)
    return Receipt(
        path=str(path),
        matched=matched,
        missing=[own for own in wanted if own not in found],
        left_over=[name for name in given if name not in used],
        mismatched=mismatched,
        converted=converted,
        share=arrived / sum(sizes.values()) if sizes else 1.0,
    )


def _own_name(name: str, wanted: Collection[str]) -> str | None:
    own = name.replace("_orig_mod.", "")  # torch.compile puts it wherever a module was compiled
    while own not in wanted:
        prefix = next((prefix for prefix in PREFIXES if own.startswith(prefix)), None)
        if prefix is None:
            return None
        own = own.removeprefix(prefix)
    return own


def _under_one_prefix(
    path: Path, wanted: Collection[str], parameters: Collection[str], given: Collection[str]
) -> dict[str, str]:
    """Pairs of names that differ by their beginning alone, as those of timm's own files do; {} if few would match."""
    plain = {name.replace("_orig_mod.", ""): name for name in given}
    least = len(parameters) // 2 + 1  # fewer may be an accident
    pairings: dict[tuple[str, ...], dict[str, str]] = {}
    beginnings: dict[tuple[str, ...], str] = {}
    for ours, theirs in product(_prefixes(parameters, least), _prefixes(plain, least)):
        renamed = {name: theirs + name.removeprefix(ours) for name in wanted if name.startswith(ours)}
        pairs = {own: plain[name] for own, name in renamed.items() if name in plain}
        gained = tuple(pairs[name] for name in parameters if name in pairs)
        if len(pairs) > len(pairings.get(gained, {})):
            pairings[gained] = pairs
            beginnings[gained] = theirs
    most = max((len(gained) for gained in pairings), default=0)
    best = [gained for gained in pairings if len(gained) == most >= least]
    if len(best) > 1:
        places = " and ".join(f"'{beginnings[gained]}'" for gained in best)
        raise UserError(f"{path}: holds this network {len(best)} times, under {places}; save the tensors of one alone")
    return pairings[best[0]] if best else {}


def _prefixes(names: Iterable[str], least: int) -> list[str]:
    """Beginnings up to a dot, the empty one too, that `least` names or more share."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update("".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts)))
    return [prefix for prefix, count in counts.items() if count >= least]


def _fill(module: nn.Module, path: Path, info: Mapping[str, Any], allow: Sequence[str]) -> Receipt:
    """Load what fits into `module`, or refuse and leave it as it is."""
    given = _read_tensors(path, info)
    receipt = match_tensors(path, module, given)
    tensors = {own: given[name] for own, name in receipt.matched.items()}
    receipt.changed = [own for own in tensors if _is_changed(tensors[own], _known_marks(own, receipt, info))]
    receipt.not_finite = [own for own, tensor in tensors.items() if not tensor.float().isfinite().all()]
    _refuse_misfits(receipt, allow, foreign=not info)
    if "fingerprint" in info:
        trial = copy.deepcopy(module)
        trial.load_state_dict(tensors, strict=False)
        _compare_features(receipt, trial, given, info, allow)
    module.load_state_dict(tensors, strict=False)
    return receipt


def _is_changed(tensor: Tensor, marks: str) -> bool:
    """Whether a tensor is another one than was exported; in a precision that has no mark its features alone judge."""
    known = marks.split(", ")
    return any(mark.startswith(f"{dtype_name(tensor)} ") for mark in known) and mark_of(tensor) not in known


def _known_marks(own: str, receipt: Receipt, info: Mapping[str, Any]) -> str:
    marks = info.get("tensors", {})
    return marks.get(receipt.matched[own]) or marks.get(own, "")


def _refuse_misfits(receipt: Receipt, allow: Sequence[str], foreign: bool) -> None:
    # A wrong file often shares a buffer or two (mean, std), so the parameters decide whether anything arrived.
    if not receipt.matched or receipt.share == 0:
        names = ", ".join(receipt.left_over[:3]) or "no tensors"
        also = "; a file of timm's goes to model.encoder.pretrained" if foreign else ""
        raise UserError(f"{receipt.path}: nothing in it fits this network (it holds {names}); name another file{also}")
    kinds = {
        "missing": [name for name in receipt.missing if not (foreign and name in CONSTANTS)],
        "left over": receipt.left_over,
        "of another shape": receipt.mismatched,
        "changed since the export": receipt.changed,
        "not finite": receipt.not_finite,
    }
    refused = {kind: [name for name in names if not _is_allowed(name, allow)] for kind, names in kinds.items()}
    suggested = list(dict.fromkeys(name for names in refused.values() for name in names))
    if not suggested:
        return
    if len(suggested) > MAX_SUGGESTED:
        del suggested[1:]
    texts = [f"{len(names)} {kind}: {_first_names(names, receipt)}" for kind, names in refused.items() if names]
    raise UserError(
        f"{receipt.path}: does not fit this network ({'; '.join(texts)}); "
        f"name the right file, or accept these by globs: init_allow=[{','.join(suggested)}]"
    )


def _compare_features(
    receipt: Receipt, net: nn.Module, given: Mapping[str, Tensor], info: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Fill in the receipt's `features_equal`, or refuse other features than the exporter's."""
    figures = figures_of(net)
    if len(figures) != len(info["fingerprint"]):
        return  # the encoder out of a whole model: that one's map is another thing
    for own, name in receipt.matched.items():
        tensor = given[name]
        if not _known_marks(own, receipt, info).startswith(dtype_name(tensor)):
            receipt.tolerance = max(receipt.tolerance, ROUNDED_TOLERANCES.get(tensor.dtype, 0.0))
    distance = feature_distance(info["fingerprint"], figures)
    receipt.features_equal = distance <= receipt.tolerance
    # Tensors that may be absent or others change the features; whoever allowed the one has allowed the other.
    explained = receipt.missing or receipt.mismatched or receipt.left_over or receipt.changed or receipt.not_finite
    if receipt.features_equal or explained or _is_allowed("features", allow):
        return
    strides = getattr(net, "strides", None)
    reason = "another norm, normalization, activation or architecture"
    if strides is not None and list(strides) != info.get("strides"):
        reason = f"strides {list(strides)} here and {info.get('strides')} there"
    elif receipt.converted or "tensors" not in info:
        reason = f"changed weights, or {reason}"
    raise UserError(
        f"{receipt.path}: every weight fits, but the network gives other features than the one exported, by "
        f"{distance:.2g} of their size ({reason}); build it as its .json says, or accept that with "
        f"init_allow=[features]"
    )


def _first_names(names: Collection[str], receipt: Receipt | None = None) -> str:
    shapes = {} if receipt is None else receipt.mismatched
    shown = [f"{name} {shapes.get(name, '')}".rstrip() for name in list(names)[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + more


def _is_allowed(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


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
        named = f"; other tensors: {_first_names(others)}" if others else ""
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

"""Trained weights as they leave a run: exported with what must be known of them, loaded with a receipt.

safetensors holds the tensors, JSON the rest. Ours is what `load_state_dict` cannot say: which tensors of a file arrived
under which name, what share of the network they are, and whether the network still computes the features that were
exported; weights that fit by name and shape alone are often the wrong ones. Less than all of it is refused unless the
user has named it.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssl_seg import files, rng
from ssl_seg.config import UserError
from ssl_seg.models import EncoderNet, SegmentationModel

PROBE = (2, 3, 64, 64)  # the smallest images that leave the stride-32 map more than one pixel
PROBE_SEED = "ssl_seg.store.fingerprint"  # every export was compared under this word; another would refuse them all
NUM_PROJECTIONS = 4  # several, so that no change of a map can lie across all of them by chance
TOLERANCE = 1e-4  # of a map's root mean square; other CPUs and thread counts differ by about 1e-6
PREFIXES = ("module.", "encoder.")  # DistributedDataParallel's, and ours inside a whole model
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


def _export(folder: str | Path, part: str, net: nn.Module, info: Mapping[str, Any]) -> Path:
    target = Path(folder) / part
    files.commit_folder(target, _pair(part, net, {**info, "fingerprint": fingerprint(net)}))
    return target


def _pair(name: str, module: nn.Module, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of an export: the weights, and what must be known of them."""
    weights = files.tensor_bytes(module.state_dict())
    described = files.finite({**info, "sha256": files.sha256(weights)})
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


# ---- fingerprints ----


def fingerprint(net: nn.Module) -> list[list[float]]:
    """A few figures for each map that `net` makes of a fixed batch: mean, std and projections on keyed directions.

    They change with any weight or statistic that changes the maps. A copy computes them, in float32 on the CPU, so the
    device, the precision and the mode of `net` do not matter. Raises UserError for maps that are not finite.
    """
    images, *shape = PROBE
    key = rng.as_key(PROBE_SEED)
    probe = rng.uniform(rng.fold_in(key, torch.arange(images)), tuple(shape))
    copied = copy.deepcopy(net).to("cpu", torch.float32).eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        output = copied(probe)
    maps = [output] if isinstance(output, Tensor) else output
    figures = [_summarise(level, rng.fold_in(key, f"level {index}")) for index, level in enumerate(maps)]
    if not all(math.isfinite(value) for level in figures for value in level):
        raise UserError("weights: give features that are not finite, so the network is of no use; train it again")
    return figures


def _summarise(level: Tensor, key: Tensor) -> list[float]:
    values = level.flatten().double()  # (B, C, h, w) -> (N,)
    if not len(values):
        return []
    keys = rng.fold_in(key, torch.arange(NUM_PROJECTIONS))
    directions = rng.uniform(keys, (len(values),), low=-1.0, high=1.0).double()  # (P, N)
    projections = directions @ values / math.sqrt(len(values))
    return [values.mean().item(), values.std(correction=0).item(), *projections.tolist()]


def _same_features(a: list[list[float]], b: list[list[float]]) -> bool:
    if [len(level) for level in a] != [len(level) for level in b]:
        return False
    for one, other in zip(a, b, strict=True):
        scale = math.hypot(*one[:2])
        if any(abs(x - y) > TOLERANCE * scale for x, y in zip(one, other, strict=True)):
            return False
    return True


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
    features_equal: bool | None = None  # on the probe batch; None where the file names none to compare with

    @property
    def renamed(self) -> dict[str, str]:
        """Those of `matched` whose two names differ."""
        return {own: name for own, name in self.matched.items() if own != name}

    def summary(self) -> str:
        """One line for a person."""
        figures = {
            "renamed": len(self.renamed),
            "converted": len(self.converted),
            "missing": len(self.missing),
            "left over": len(self.left_over),
            "of another shape": len(self.mismatched),
        }
        details = "".join(f", {count} {word}" for word, count in figures.items() if count)
        features = {True: "features equal", False: "features differ", None: "features not compared"}
        return (
            f"{self.path}: {self.share:.1%} of the parameters in {len(self.matched)} tensors{details}; "
            f"{features[self.features_equal]}"
        )


def match_tensors(path: Path, module: nn.Module, given: Mapping[str, Tensor]) -> Receipt:
    """Pair tensors by name, an exact name first, then without the prefixes that wrappers add. Loads nothing."""
    wanted = module.state_dict()
    found = {name: name for name in wanted if name in given}
    for name in given:
        own = _own_name(name, wanted)
        if own is not None:
            found.setdefault(own, name)
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
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
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


def _fill(module: nn.Module, path: Path, info: Mapping[str, Any], allow: Sequence[str]) -> Receipt:
    """Load what fits into `module`, or refuse and leave it as it is."""
    given = _read_tensors(path, info)
    receipt = match_tensors(path, module, given)
    _refuse_misfits(receipt, allow)
    tensors = {own: given[name] for own, name in receipt.matched.items()}
    if "fingerprint" in info:
        trial = copy.deepcopy(module)
        trial.load_state_dict(tensors, strict=False)
        receipt.features_equal = _same_features(info["fingerprint"], fingerprint(trial))
        _refuse_other_features(receipt, module, info, allow)
    module.load_state_dict(tensors, strict=False)
    return receipt


def _refuse_misfits(receipt: Receipt, allow: Sequence[str]) -> None:
    # A wrong file often shares a buffer or two (mean, std), so the parameters decide whether anything arrived.
    if not receipt.matched or receipt.share == 0:
        names = ", ".join(receipt.left_over[:3]) or "no tensors"
        raise UserError(f"{receipt.path}: nothing in it fits this network (it holds {names}); name another file")
    kinds = {"missing": receipt.missing, "left over": receipt.left_over, "of another shape": receipt.mismatched}
    refused = {kind: [name for name in names if not _is_allowed(name, allow)] for kind, names in kinds.items()}
    example = next((name for names in refused.values() for name in names), None)
    if example is None:
        return
    texts = [f"{len(names)} {kind}: {_first_names(names, receipt)}" for kind, names in refused.items() if names]
    raise UserError(
        f"{receipt.path}: does not fit this network ({'; '.join(texts)}); "
        f"name the right file, or accept these by globs: init_allow=[{example}]"
    )


def _refuse_other_features(receipt: Receipt, module: nn.Module, info: Mapping[str, Any], allow: Sequence[str]) -> None:
    # Tensors that may be absent change the features; whoever allowed the one has allowed the other.
    explained = receipt.missing or receipt.mismatched
    if receipt.features_equal or explained or _is_allowed("features", allow):
        return
    strides = getattr(module, "strides", None)
    reason = "another norm, normalization, activation or architecture"
    if strides is not None and list(strides) != info.get("strides"):
        reason = f"strides {list(strides)} here and {info.get('strides')} there"
    raise UserError(
        f"{receipt.path}: every weight fits, but the network gives other features than the one exported ({reason}); "
        f"build it as its .json says, or accept that with init_allow=[features]"
    )


def _first_names(names: Sequence[str], receipt: Receipt) -> str:
    shown = [f"{name} {receipt.mismatched.get(name, '')}".rstrip() for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + more


def _is_allowed(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _read_tensors(path: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if "sha256" in info and not files.is_intact(path, info["sha256"]):
        raise UserError(f"{path}: is not the file that its .json was written for (sha256 differs); export it again")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); export it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint, without running what else it may hold."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except TORCH_ERRORS as error:
        raise UserError(f"{path}: holds more than tensors, or is damaged; save its state_dict alone") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no flat mapping of names to tensors; save its state_dict alone")
    return dict(content)

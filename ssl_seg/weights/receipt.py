"""The receipt of a loading: which tensors matched, which did not, and what is refused.

Ours, because `load_state_dict(strict=False)` says nothing of weights that never arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_seg.config import UserError
from ssl_seg.weights.fingerprint import ROUNDED_TOLERANCES, TOLERANCE, dtype_name, feature_distance, figures_of, mark_of

PREFIXES = ("module.", "encoder.")  # DistributedDataParallel's, and ours inside a whole model
CONSTANTS = ("mean", "std")  # of an EncoderNet: the config gives them too, and no other library's file holds them
MAX_SUGGESTED = 4  # names in one suggestion; of more, their modules


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
    adapted: dict[str, str] = field(default_factory=dict)  # name -> both shapes, of those made to fit other channels
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
            "adapted to other channels": len(self.adapted),
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


def is_changed(tensor: Tensor, marks: str) -> bool:
    """Whether a tensor is another one than was exported; in a precision that has no mark its features alone judge."""
    known = marks.split(", ")
    return any(mark.startswith(f"{dtype_name(tensor)} ") for mark in known) and mark_of(tensor) not in known


def known_marks(own: str, receipt: Receipt, info: Mapping[str, Any]) -> str:
    """By what the exporter knew a tensor; '' where it noted nothing."""
    marks = info.get("tensors", {})
    return marks.get(receipt.matched[own]) or marks.get(own, "")


def refuse_misfits(receipt: Receipt, allow: Sequence[str], foreign: bool) -> None:
    """Raise UserError, with the globs that would accept them, for tensors that do not fit unless `allow` names them."""
    # A wrong file often shares a buffer or two (mean, std), so the parameters decide whether anything arrived.
    if not receipt.matched or receipt.share == 0:
        names = ", ".join(receipt.left_over[:3]) or "no tensors"
        also = "; a file of another library's goes to model.encoder.pretrained" if foreign else ""
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
    also = " (another library's goes to model.encoder.pretrained)" if foreign else ""
    texts = [f"{len(names)} {kind}: {first_names(names, receipt)}" for kind, names in refused.items() if names]
    raise UserError(
        f"{receipt.path}: does not fit this network ({'; '.join(texts)}); "
        f"name the right file{also}, or accept these by globs: init_allow=[{','.join(_as_globs(suggested))}]"
    )


def _as_globs(names: Sequence[str]) -> list[str]:
    """The names, or where they are many one glob a module: the deepest modules that are few enough to be read."""
    globs: Sequence[str] = names
    modules = [name.split(".")[:-1] for name in names]
    for depth in reversed(range(1, max(map(len, modules)) + 1)):
        if len(globs) <= MAX_SUGGESTED:
            break
        cut = [".".join([*own[:depth], "*"]) if own else name for name, own in zip(names, modules, strict=True)]
        globs = list(dict.fromkeys(cut))
    return list(globs)


def compare_features(
    receipt: Receipt, net: nn.Module, given: Mapping[str, Tensor], info: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Fill in the receipt's `features_equal`, or refuse other features than the exporter's."""
    figures = figures_of(net)
    if len(figures) != len(info["fingerprint"]):
        return  # the encoder out of a whole model: that one's map is another thing
    for own, name in receipt.matched.items():
        tensor = given[name]
        if not known_marks(own, receipt, info).startswith(dtype_name(tensor)):
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


def first_names(names: Collection[str], receipt: Receipt | None = None) -> str:
    """Three of them, with the shapes that differ, and how many more there are."""
    shapes = {} if receipt is None else receipt.mismatched
    shown = [f"{name} {shapes.get(name, '')}".rstrip() for name in list(names)[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + more


def _is_allowed(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)

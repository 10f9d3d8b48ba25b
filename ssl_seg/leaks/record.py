"""Leaks and fingerprints as a run stores them (leaks.json, images.json), and how they are told in words.

Imports no torch: reports read these files too.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.images import show_path
from ssl_seg.leaks.near_duplicates import Fingerprints
from ssl_seg.leaks.neighbours import NONE_SHARED, TOO_FEW
from ssl_seg.runs.folder import beside

Kind = Literal["exact", "sequence", "altered"]
SHOWN = 3  # pairs in the line on the terminal
MOST_STORED = 20_000  # fingerprints of a run, 80 MB, for runs that start from it
TRAINED = (
    "pool",
    "labelled",
    "beside",
    "images",
)  # what parts that are trained on end in, the last where nothing is known


@dataclass(frozen=True)
class Leak:
    """One image that is trained on, and the one that is scored."""

    kind: Kind
    # pool or labelled; init.pool of the pretraining that the weights come from, init.init.pool of the one before that
    part: str
    name: str
    scored_part: str
    scored: str
    alike: float | None  # 1 for equal pixels, the fine structure in common, None where names tell
    detail: str  # such as "mirrored, 72 % of the area" or "31 frames apart"


class Place(Protocol):
    """A folder that keeps records: a run's or a study's."""

    @property
    def folder(self) -> Path: ...
    def read_json(self, name: str) -> dict[str, Any] | None: ...
    def write_json(self, name: str, values: Mapping[str, Any]) -> None: ...


@dataclass
class Compared:
    """What a check has read and found so far."""

    prints: dict[str, Fingerprints] = field(default_factory=dict)  # of every part whose images are known
    unknown: list[str] = field(default_factory=list)  # parts of other runs whose images nobody has stored
    leaks: list[Leak] = field(default_factory=list)


def sentence(record: Mapping[str, Any] | None) -> str:
    """What leaks.json says, in one sentence; None is a run that stopped before the check."""
    if record is None:
        return "Whether training images are among the scored ones was not checked."
    if not record["checked"]:
        return "Whether training images are among the scored ones was not checked (leaks.check=false)."
    gaps = _gaps(record)
    if not record["trained"] or not record["scored"]:
        return f"No leak check: {'; '.join(gaps) or 'there is nothing to compare with'}."
    both = f"{_counted(record['trained'])} compared with {_counted(record['scored'])}"
    if not record["leaks"]:
        return f"No leak: {'; '.join([both, *gaps])}."
    allowed = sum(leak["allowed"] for leak in record["leaks"])
    verdict = "all allowed by leaks.allow" if allowed == len(record["leaks"]) else f"{allowed} of them allowed"
    cut = sum(leak.get("at_own_cut", False) for leak in record["leaks"])
    if cut:
        verdict = f"{allowed} of them allowed, {cut} as frames beside the cut that the run made itself"
    return f"LEAK: {_kinds(record['leaks'])} among {'; '.join([both, verdict, *gaps])}."


def _gaps(record: Mapping[str, Any]) -> list[str]:
    """What could not be compared, or not as well as the rest."""
    pairs = record.get("pairs", ())
    parts = {
        how: list(dict.fromkeys(pair["part"] for pair in pairs if how in (pair["pictures"], pair["names"])))
        for how in ("unknown", "exact only", TOO_FEW, NONE_SHARED)
    }
    words = []
    if parts["unknown"]:
        runs = [part.removesuffix(".images") for part in parts["unknown"]]
        words.append(f"the images that {' and '.join(runs)} was trained on are unknown")
    if parts["exact only"]:
        words.append(f"of {' and '.join(parts['exact only'])} only exact copies were looked for")
    if parts[TOO_FEW]:
        words.append(f"too few images of {' and '.join(parts[TOO_FEW])} to judge neighbours by name")
    if parts[NONE_SHARED]:
        named = " and ".join(parts[NONE_SHARED])
        words.append(f"names of {named} share no numbering with the scored ones, so no neighbours were looked for")
    return words


def say_doubts(doubts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for every kind of doubt about the images of each part, which are given by name."""
    lines = []
    for part, named in doubts.items():
        for words, count in Counter(named.values()).items():
            names = [show_path(name) for name, own in named.items() if own == words]
            more = ", ..." if count > SHOWN else ""
            images = "1 image" if count == 1 else f"{count} images"
            lines.append(f"CAUTION: {part}: {images} ({', '.join(names[:SHOWN])}{more}): {words}")
    return lines


def _kinds(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(leak["kind"] for leak in found).items())


def say_leaks(record: Mapping[str, Any], folder: Path) -> str | None:
    """The line that stops a run; None where nothing is found that is not allowed."""
    stopping = [leak for leak in record["leaks"] if not leak["allowed"]]
    if not stopping:
        return None
    inits = record["basis"].get("inits", {})
    between: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for leak in stopping:
        between[leak["part"], leak["scored_part"]].append(leak)
    told = []
    for (part, scored), found in between.items():
        examples = "" if told else f": {_examples(found)}"
        told.append(f"{_place(part, inits)}: leak into {_place(scored, inits)}: {_kinds(found)}{examples}")
    kinds = ",".join(dict.fromkeys(leak["kind"] for leak in stopping))
    return (
        f"{'; '.join(told)}; see {folder / 'leaks.json'} and leaks.png; take the images out, keep whole sequences on "
        f"one side, or allow them by name: leaks.allow=[{kinds}]"
    )


def _examples(found: Sequence[Mapping[str, Any]]) -> str:
    pairs = [f"{show_path(leak['name'])} ~ {show_path(leak['scored'])} ({leak['detail']})" for leak in found[:SHOWN]]
    return "; ".join(pairs) + (", ..." if len(found) > SHOWN else "")


def _place(part: str, inits: Mapping[str, Mapping[str, Any]]) -> str:
    """Where in the config the images of a part come from."""
    name = next((name for name in inits if part.startswith(f"{name}.")), None)
    *before, own = part.removeprefix(f"{name}.").split(".")
    own = own.partition("#")[0]  # a study numbers parts of other data
    if name is not None:
        key = "init" if name.startswith("init.") else name  # evaluate has model, a run may start from pretrained
        key = key if len(inits) == 1 else f"{key}={inits[name]['path']}"
        return f"{key}: the {own} {'that its own init' if before else 'it'} was trained on"
    return f"pretrain.{'.'.join(before)}.data.{own}" if before else f"data.{own}"


def _counted(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} images of {part}" for part, count in parts.items())


class _Part(BaseModel):
    """An entry of images.json: the images of a part in order."""

    model_config = ConfigDict(extra="forbid")
    names: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()  # of each image's pixels
    sha256_of_fingerprints: str | None = None  # None where there are none: of what is scored, or too many
    unknown: bool = False


def write_fingerprints(run: Place, result: Compared) -> None:
    """images.json, the manifest of what the run saw, and the fingerprints for runs that start from this one.

    With those of the runs before, so that a chain of pretrainings is seen to its beginning.
    """
    from safetensors.numpy import save

    stored: dict[str, np.ndarray] = {}
    left = MOST_STORED
    for part in sorted(result.prints, key=lambda part: part.count(".")):  # its own first
        thumbs = result.prints[part].thumbs
        if _is_trained(part) and thumbs is not None and len(thumbs) <= left:
            stored[part] = np.ascontiguousarray(thumbs)
            left -= len(thumbs)
    manifest = {part: _Part(unknown=True) for part in result.unknown}
    for part, prints in result.prints.items():
        digest = _digest(stored[part]) if part in stored else None
        manifest[part] = _Part(names=prints.names, sha256=prints.digests, sha256_of_fingerprints=digest)
    if stored:
        files.write_atomic(run.folder / "fingerprints.safetensors", save(stored))
    run.write_json("images.json", {part: about.model_dump(exclude_defaults=True) for part, about in manifest.items()})


def read_fingerprints(init: str | None) -> tuple[dict[str, Fingerprints], list[str]]:
    """What the run that `init` names was trained on, as it has stored it, and the parts of which nobody knows anything.

    Weights of another origin have one unknown part, `images`. Raises UserError for a record that is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if init is None:
        return {}, []
    path = beside(init, "images.json")
    if path is None:
        return {}, ["images"]
    store = path.with_name("fingerprints.safetensors")
    try:
        manifest = TypeAdapter(dict[str, _Part]).validate_python(files.read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: not a run's list of images; {_REPAIR}") from error
    try:
        thumbs = load_file(store) if store.is_file() else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{store}: damaged; {_REPAIR}") from error
    known: dict[str, Fingerprints] = {}
    for part, about in manifest.items():
        if not _is_trained(part) or about.unknown:
            continue
        if len(about.names) != len(about.sha256):
            raise UserError(f"{path}: {part} has not one sha256 for each name; {_REPAIR}")
        own = None
        if thumbs is not None and about.sha256_of_fingerprints is not None:
            own = thumbs.get(part)
            if own is None or len(own) != len(about.names) or _digest(own) != about.sha256_of_fingerprints:
                raise UserError(f"{store}: the fingerprints of {part} are not those that were written; {_REPAIR}")
        known[part] = Fingerprints(about.names, about.sha256, own)
    return known, [part for part, about in manifest.items() if about.unknown]


_REPAIR = "restore it, make the run again, or remove images.json: its images are then said to be unknown"


def _is_trained(part: str) -> bool:
    return part.rpartition(".")[2] in TRAINED


def _digest(thumbs: np.ndarray) -> str:
    """sha256 of the kind, shape and values of an array."""
    about = f"{thumbs.dtype}{thumbs.shape}".encode()
    return hashlib.sha256(about + thumbs.tobytes()).hexdigest()

"""Checkpoints: weights and state written so that a kill or a damaged disk always leaves a whole one to go on from.

Ours, because accelerate's `save_state` keeps no such promise: the newest checkpoint may be half a one, and it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import safetensors.torch
from torch import Tensor

from ssl_seg import files
from ssl_seg.config import UserError

STATE_TENSORS, STATE_DATA, MANIFEST = "state.safetensors", "state.json", "manifest.json"
NUM_NEWEST = 2  # one to resume from, one more for when a disk has damaged it


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run has weights to go on from, so that those it once started from are no longer needed."""
    return bool(checkpoints_in(Path(folder)))


@dataclass
class State:
    """A checkpoint as it was saved; `skipped` names a damaged file of each newer one that had to be passed over."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU
    data: dict[str, Any]
    skipped: list[str] = field(default_factory=list)


def save_state(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    keep: Collection[int] = (),
) -> None:
    """Commit the checkpoint of `step` to the run `folder`; then drop all but the newest two and those of steps `keep`.

    `data` is JSON: tuples come back as lists, keys as strings, NaN and infinity as they are. Raises UserError, with
    nothing changed, where the disk does not take it.
    """
    state = Path(folder) / "state"
    payloads = {STATE_TENSORS: files.tensor_bytes(tensors), STATE_DATA: files.json_bytes(data)}
    digests = {name: files.sha256(payload) for name, payload in payloads.items()}
    files.commit_folder(state / f"step_{step:08d}", payloads | {MANIFEST: files.json_bytes(digests)})
    with files.naming(state, "an old checkpoint cannot be removed"):
        _prune(folder, step, keep)


@overload
def load_state(folder: str | Path, step: int) -> State: ...
@overload
def load_state(folder: str | Path, step: None = None) -> State | None: ...
def load_state(folder: str | Path, step: int | None = None) -> State | None:
    """The newest whole checkpoint of a run, None where there is none; or that of `step`.

    Raises UserError where every checkpoint is damaged, or that of `step` is damaged or absent.
    """
    skipped: list[str] = []
    for number, place in sorted(checkpoints_in(folder).items(), reverse=True):
        if step not in (None, number):
            continue
        damaged = _find_damage(place)
        if damaged is None:
            tensors = safetensors.torch.load_file(place / STATE_TENSORS)
            return State(number, tensors, files.read_json(place / STATE_DATA), skipped)
        skipped.append(str(damaged))
    if skipped:
        others = "" if step is not None else ", and so is every other checkpoint"
        raise UserError(f"{skipped[0]}: damaged{others}; start anew with --overwrite")
    if step is not None:
        raise UserError(f"{folder}: holds no checkpoint of step {step}; continue the run, or start anew --overwrite")
    return None


def checkpoints_in(folder: str | Path) -> dict[int, Path]:
    """Every step of which a run has a committed checkpoint, and where that lies."""
    state = Path(folder) / "state"
    names = [name for name in files.committed_names(state) if re.fullmatch(r"step_\d{8,}", name)]
    return {int(name.removeprefix("step_")): files.committed(state / name) for name in names}


def keep_alone(folder: str | Path, steps: Collection[int]) -> None:
    """Drop all checkpoints of a run but those of `steps`: the oldest first, so a kill leaves one to go on from."""
    for number, place in sorted(checkpoints_in(folder).items()):
        if number not in steps:
            files.discard(place)


def _find_damage(place: Path) -> Path | None:
    """The first file of a checkpoint that is not as it was written."""
    manifest = place / MANIFEST
    try:
        digests, written = files.read_json(manifest), files.read_bytes(manifest)
    except (UserError, OSError):
        return manifest
    # Written out again it must be the same text: else a changed space would go unnoticed.
    if set(digests) != {STATE_TENSORS, STATE_DATA} or written != files.json_bytes(digests):
        return manifest
    return next((place / name for name, digest in digests.items() if not files.is_intact(place / name, digest)), None)


def _prune(folder: str | Path, step: int, keep: Collection[int]) -> None:
    # Those after `step` were damaged, or the run would have continued from them.
    earlier = sorted(number for number in checkpoints_in(folder) if number <= step)
    keep_alone(folder, {step, *keep, *earlier[-NUM_NEWEST:]})

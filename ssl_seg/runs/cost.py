"""What runs have used, for the pages about them: time, images, memory, and the size of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from safetensors import SafetensorError, safe_open

from ssl_seg import files
from ssl_seg.runs.folder import RunFolder


@dataclass(frozen=True)
class Cost:
    """What a run has used, None where it did not note it."""

    seconds: float | None
    images: float | None
    rate: float | None  # images a second
    peak_memory_mib: float | None


def cost_of(run: RunFolder) -> Cost:
    """What a run has noted; of one that ended before it could, from start to end."""
    noted = run.record.get("cost") or {}
    seconds = noted.get("seconds", _from_start_to_end(run))
    number = noted.get("images")
    if number and noted.get("seconds"):
        return Cost(seconds, number, number / seconds, noted.get("peak_memory_mib"))
    rates = [line["images_per_s"] for line in run.metrics() if "images_per_s" in line]
    return Cost(seconds, number, rates[-1] if rates else None, noted.get("peak_memory_mib"))


def _from_start_to_end(run: RunFolder) -> float | None:
    """Of a run that did not note its cost; None for one that was interrupted, since the pause would count."""
    started, ended = run.record.get("started"), run.record.get("ended")
    if not started or not ended or run.record.get("resumed"):
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()


def numbers_in(run: RunFolder) -> int | None:
    """How many numbers the exported network holds; None where there is none."""
    for name in ("model", "encoder"):
        path = files.committed(run.folder / name) / f"{name}.safetensors"
        if path.is_file():
            try:
                with safe_open(path, framework="numpy") as file:
                    names = file.keys()
                    return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
            except SafetensorError:
                return None
    return None

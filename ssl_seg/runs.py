"""Run folders as others read them: to compare, to report, to track. `store` writes them.

Imports no torch, so that a table of many runs, or the process that mirrors one, costs little.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_seg import files
from ssl_seg.config import UserError, flatten

LOCK = "lock"  # of the process that runs; its number stands in it
TIME = "time"  # of a line of metrics: milliseconds since 1970
PICTURE = re.compile(r"(\d{8,})_(.+)\.png")


@dataclass(frozen=True)
class Picture:
    """A picture that a run has made of itself."""

    name: str  # predictions, or a task's
    step: int
    path: Path


@dataclass(frozen=True)
class RunFolder:
    """What one run has written down; each file is read when it is asked for."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> RunFolder:
        """Raises UserError for what is no run folder, or none of ours."""
        found = cls(Path(folder))
        if not (found.folder / "run.json").is_file():
            raise UserError(f"{folder}: is no run folder (it has no run.json); give one that --out named")
        if not isinstance(found.record.get("config"), Mapping) or "stage" not in found.record:
            raise UserError(f"{folder}: its run.json is not one of ours; give a folder that --out named")
        return found

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return files.read_json(self.folder / "run.json")

    @property
    def config(self) -> dict[str, Any]:
        """The config that the weights come from: config.yaml a person may have edited since."""
        return self.record["config"]

    @property
    def stage(self) -> str:
        return self.record["stage"]

    @property
    def status(self) -> str:
        """running, finished, failed or killed; one whose process is gone without a word was killed."""
        status = self.record.get("status", "finished")  # a score on other images has none
        return "killed" if status == "running" and not is_held(self.folder) else status

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """result.json; None until the run has finished."""
        return self.read("result.json")

    @property
    def is_done(self) -> bool:
        """Whether the result is that of the settings: a run that goes on holds its former one until its own end."""
        return self.result is not None and self.status == "finished"

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, None where it has none."""
        path = self.folder / name
        return files.read_json(path) if path.is_file() else None

    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.folder)

    def pictures(self) -> list[Picture]:
        """All that were made while training, by name and step."""
        # A link could lead a report to what is not the run's.
        entries = (entry for entry in (self.folder / "pictures").glob("*.png") if not entry.is_symlink())
        matched = [(PICTURE.fullmatch(entry.name), entry) for entry in entries]
        found = [Picture(match[2], int(match[1]), entry) for match, entry in matched if match]
        return sorted(found, key=lambda picture: (picture.name, picture.step))


def find_runs(folders: Iterable[str | Path]) -> list[RunFolder]:
    """The run in each folder, or those directly in it; named twice, a run is found once."""
    found = [run for folder in folders for run in _runs_in(Path(folder))]
    return list({run.folder.resolve(): run for run in found}.values())


def _runs_in(folder: Path) -> list[RunFolder]:
    inside = sorted(path.parent for path in folder.glob("*/run.json"))
    if (folder / "run.json").is_file() or not inside:
        return [RunFolder.open(folder)]
    return [RunFolder.open(run) for run in inside]


def is_held(folder: Path) -> bool:
    """Whether a process has the folder open as a run."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # none there, or a disk without locks
    return False


def origin(init: str | None) -> dict[str, Any] | None:
    """Stage, config and own origin of the run that `init` names by its folder or encoder/; None for a mere file."""
    places = [] if init is None else [Path(init), Path(init).parent]
    for place in places:
        if (place / "run.json").is_file():
            record = files.read_json(place / "run.json")
            if isinstance(record.get("config"), Mapping) and "stage" in record:
                return {"stage": record["stage"], "config": record["config"], "origin": record.get("origin")}
    return None


def described(config: Mapping[str, Any], start: Mapping[str, Any] | None) -> dict[str, str]:
    """Every key of a run's config, dotted, with its value as text; under `init.` those of the run it started from.

    `start` is that run's `origin`. Where a run is tracked says nothing about it and is left out.
    """
    description = {key: as_text(value) for key, value in flatten(config).items() if not key.startswith("tracking.")}
    if start is not None:
        inner = {"stage": start["stage"], **described(start["config"], start["origin"])}
        description |= {f"init.{key}": value for key, value in inner.items()}
    return description


def as_text(value: Any) -> str:
    """A config value as tables and MLflow's parameters show it."""
    return value if isinstance(value, str) else json.dumps(value)


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result.json, `part/name`."""
    parts = {part: named for part, named in result.items() if isinstance(named, Mapping)}
    flat = {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}
    return {name: value for name, value in flat.items() if isinstance(value, int | float) and math.isfinite(value)}


def now() -> int:
    """Milliseconds since 1970, as lines of metrics have them."""
    return time.time_ns() // 10**6


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, null as NaN; a last line still being written is left out.

    Each has its `step` and its `time` in milliseconds since 1970.
    """
    records = [record for _, record in metric_lines(Path(folder) / "metrics.jsonl")]
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def metric_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line of a metrics file with its content. A line is whole once its line break is written."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            whole = isinstance(record["step"], int)
        except (ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{path}: line {number} is no metrics record; delete that line")
        yield line, record

"""Run folders as others read them: to compare, to report, to track. `writer` writes them.

Imports no torch, so that a table of many runs, or the process that mirrors one, costs little.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_seg import files
from ssl_seg.config import UserError, flatten, user_path
from ssl_seg.runs.lock import LOCK, is_held
from ssl_seg.runs.schema import check_shape, read_checked

WHOLE = "model"  # the word of `transfer` for all of a fine-tuned network
WATCHING = ("tracking.", "leaks.")  # config keys by which nothing comes out differently
TIME = "time"  # of a line of metrics: milliseconds since 1970
PICTURE = re.compile(r"(\d{8,})_(.+)\.png")


@dataclass(frozen=True)
class Picture:
    """A picture that a run has made of itself."""

    name: str  # predictions, or a task's
    step: int
    path: Path


@dataclass(frozen=True)
class Records:
    """A folder that keeps JSON records, each written whole."""

    folder: Path

    def is_new(self) -> bool:
        """Whether the folder is empty, but for what a kill may leave of a start."""
        if not self.folder.is_dir():
            return False
        return all(entry.name == LOCK or files.is_unfinished(entry) for entry in self.folder.iterdir())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """None where there is no such file."""
        path = self.folder / name
        return files.read_json(path) if files.is_there(path) else None

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """NaN and infinity become null."""
        files.write_atomic(self.folder / name, files.json_bytes(files.finite(values)))


@dataclass(frozen=True)
class RunFolder:
    """What one run has written down; each file is read when it is asked for."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> RunFolder:
        """Raises UserError for what is no run folder, or none of ours."""
        found = cls(Path(folder))
        if not files.is_there(found.folder / "run.json"):
            raise UserError(f"{folder}: is no run folder (it has no run.json); give one that --out named")
        record = files.read_json(found.folder / "run.json")
        if not isinstance(record.get("config"), Mapping) or "stage" not in record:
            raise UserError(f"{folder}: its run.json is not one of ours; give a folder that --out named")
        check_shape(found.folder / "run.json", record)
        return found

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return read_checked(self.folder / "run.json")

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
        return read_checked(path) if files.is_there(path) else None

    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.folder)

    def files_in(self, name: str) -> list[Path]:
        """Every file in a folder of the run and in those below it, sorted; none that a link outside leads to."""
        found: list[Path] = []
        for path in (self.folder / name / entry for entry in files.names_in(self.folder / name)):
            if path.is_dir() and not path.is_symlink():
                found += self.files_in(str(path.relative_to(self.folder)))
            elif files.lies_in(path, self.folder):
                found.append(path)
        return found

    def pictures(self) -> list[Picture]:
        """All that were made while training, by name and step."""
        matched = [(PICTURE.fullmatch(entry.name), entry) for entry in self.files_in("pictures")]
        found = [Picture(match[2], int(match[1]), entry) for match, entry in matched if match]
        return sorted(found, key=lambda picture: (picture.name, picture.step))


def find_runs(folders: Iterable[str | Path]) -> list[RunFolder]:
    """The run in each folder, or those directly in it; named twice, a run is found once."""
    found = [run for folder in folders for run in _runs_in(Path(folder))]
    return list({run.folder.resolve(): run for run in found}.values())


def _runs_in(folder: Path) -> list[RunFolder]:
    if files.is_there(folder / "run.json"):
        return [RunFolder.open(folder)]
    inside = [folder / name for name in files.names_in(folder) if files.is_there(folder / name / "run.json")]
    return [RunFolder.open(run) for run in inside or [folder]]


def beside(weights: str | Path, name: str) -> Path | None:
    """The file `name` of the run whose weights are named: by its folder, by a part of it (encoder/, model/) or a file.

    None where there is none, as for weights of another origin.
    """
    named = user_path(weights)
    start = named.parent if named.is_file() else named
    return next((place / name for place in (start, start.parent) if (place / name).is_file()), None)


def origin(init: str | None) -> dict[str, Any] | None:
    """Stage, config, pool and own origin of the run that `init` names; None for weights that lie in no run.

    The pool by the number of its images and the digest of their names: under one path other images may lie by now.
    """
    path = None if init is None else beside(init, "run.json")
    if path is None:
        return None
    record = files.read_json(path)
    if not isinstance(record.get("config"), Mapping) or "stage" not in record:
        return None
    check_shape(path, record)
    known = {"stage": record["stage"], "config": record["config"], "origin": record.get("origin")}
    return known | _pool_in(path.with_name("data.json"))


def _pool_in(path: Path) -> dict[str, Any]:
    pool = read_checked(path).get("pool") if files.is_there(path) else None
    return {} if pool is None else {"pool": f"{pool['images']} images, names {pool['sha256_of_names'][:12]}"}


def described(config: Mapping[str, Any], start: Mapping[str, Any] | None) -> dict[str, str]:
    """Every key of a run's config, dotted, with its value as text; under `init.` those of the run it started from.

    `start` is that run's `origin`. What says nothing about it is left out: where it is tracked, what was checked.
    """
    description = {key: as_text(value) for key, value in flatten(config).items() if not key.startswith(WATCHING)}
    if start is not None:
        inner = {"stage": start["stage"], **described(start["config"], start.get("origin"))}
        inner |= {"pool": start["pool"]} if "pool" in start else {}
        description |= {f"init.{key}": value for key, value in inner.items()}
    return description


def description_of(record: Mapping[str, Any]) -> dict[str, str]:
    """`described` of a run.json. An evaluation is described as the run whose model it scores, with its own test set."""
    config = record["config"]
    evaluates = record["stage"] == "evaluate" and isinstance(config.get("model"), str)
    start = record.get("origin")
    if not evaluates or start is None:
        return described(config, start)
    data = {**start["config"].get("data", {}), "test": config.get("data", {}).get("test")}
    return described({**start["config"], "data": data}, start.get("origin"))


def software_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made with: each package's version, the device as `device`, variables of torch as `environment`.

    Also the `precision` that its device gave it.

    `2.10, 2.14` for one resumed so.
    """
    found: dict[str, dict[str, None]] = {}
    for start in [*(record.get("resumed") or ()), record]:
        versions, variables = start.get("versions"), start.get("environment")
        named = {**(versions if isinstance(versions, Mapping) else {}), "device": start.get("device")}
        named["precision"] = start.get("precision")
        if isinstance(variables, Mapping):
            named["environment"] = " ".join(f"{name}={value}" for name, value in variables.items()) or "none set"
        for name, value in named.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in found.items()}


def transfer_in_words(transfer: str) -> list[str]:
    """What of a start is taken beside its encoder: `+ denoise decoder`, `+ whole model`; nothing for `encoder`."""
    if transfer == WHOLE:
        return ["+ whole model"]
    _, _, decoder = transfer.partition("+")
    return [f"+ {decoder} decoder"] if decoder else []


def as_text(value: Any) -> str:
    """A config value as tables and MLflow's parameters show it."""
    return value if isinstance(value, str) else json.dumps(value)


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result.json, `part/name`."""
    parts = {part: named for part, named in result.items() if isinstance(named, Mapping)}
    flat = {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}
    return {name: value for name, value in flat.items() if _is_figure(value)}


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # which NaN is not


def manifest_of(names: Iterable[str]) -> dict[str, Any]:
    """What data.json says of a set of images: how many, and the sha256 of their names in their order."""
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        count += 1
    return {"images": count, "sha256_of_names": digest.hexdigest()}


def labelled_digest(split: Mapping[str, Any] | None) -> str:
    """What tells the labelled images of one run from those of another, by its split.json: names, and pixels of some.

    '' for a run that wrote none.
    """
    if not split or "labelled" not in split:
        return ""
    names = json.dumps([split["labelled"], split.get("sha256_of_labelled", "")])
    return hashlib.sha256(names.encode()).hexdigest()


def leak_word(record: Mapping[str, Any] | None) -> str:
    """A leaks.json in a word: `clean`, `allowed`, `cut`, `found` (not allowed), `unchecked`, `unknown` or `none`.

    `cut` has none but frames beside the cut that the run made itself, `unknown` is clean as far as it could be looked
    at, `none` had nothing to compare or stopped before it was checked.
    """
    if record is None:
        return "none"
    if not record["checked"]:
        return "unchecked"
    if record["leaks"]:
        if all(leak.get("at_own_cut") for leak in record["leaks"]):
            return "cut"
        return "allowed" if all(leak["allowed"] for leak in record["leaks"]) else "found"
    if any(pair["pictures"] == "unknown" for pair in record.get("pairs", ())):
        return "unknown"
    return "clean" if record["trained"] and record["scored"] else "none"


def epoch_ms() -> int:
    """Milliseconds since 1970, as lines of metrics have them."""
    return time.time_ns() // 10**6


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, null as NaN; a last line still being written is left out.

    Each has its `step` and its `time` in milliseconds since 1970.
    """
    records = [record for _, record in metric_lines(Path(folder) / "metrics.jsonl")]
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def metric_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line of a metrics file with its content. A line is whole once its line break is written."""
    if not files.is_there(path):
        return
    try:
        text = files.read_bytes(path).decode(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or leave the run out") from error
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            whole = isinstance(record["step"], int) and all(map(_is_number, record.values()))
        except (ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{path}: line {number} is no metrics record; delete that line")
        yield line, record

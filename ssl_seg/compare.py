"""Runs side by side: their scores, beside only the config keys in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_seg import files
from ssl_seg.config import UserError, flatten


@dataclass(frozen=True)
class Comparison:
    """One row a run, in the order given."""

    runs: tuple[str, ...]
    differing: dict[str, tuple[Any, ...]]  # dotted config key -> the value in each run
    scores: dict[str, tuple[float | None, ...]]  # name -> the value in each run; None where a run has none


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Read the configs and results of run folders. Raises UserError for one that is no run or has no result yet."""
    configs = [flatten(_read_config(Path(folder))) for folder in folders]
    results = [_read_result(Path(folder)) for folder in folders]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: tuple(config.get(key) for config in configs) for key in keys}
    differing = {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
    names = dict.fromkeys(name for result in results for name in result)
    scores = {name: tuple(result.get(name) for result in results) for name in names}
    return Comparison(tuple(str(folder) for folder in folders), differing, scores)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"  # not config.yaml, which a person may have edited since
    if not path.is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json); give folders that --out named")
    return files.read_json(path)["config"]


def _read_result(folder: Path) -> dict[str, float]:
    path = folder / "result.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no result yet; finish it by the command that started it")
    flat = flatten(files.read_json(path))
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}

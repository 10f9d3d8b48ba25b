"""The run folder while one training run writes it.

    runs/<name>/ config.yaml  run.json  metrics.jsonl  pictures/  result.json
                 state/step_00005000/ (resume only)  encoder/  decoders/<task>.safetensors  model/

Ours is what the loggers and checkpoint writers at hand do not promise: a folder that is never shared by two runs nor
taken from a stranger, and a config that cannot change unnoticed. `lock` says who may write, `checkpoint` what a run
goes on from.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from ssl_seg import files
from ssl_seg.config import Config, UserError, diff
from ssl_seg.runs.checkpoint import State, checkpoints_in, has_checkpoint, keep_alone, load_state, save_state
from ssl_seg.runs.folder import TIME, epoch_ms, metric_lines, origin
from ssl_seg.runs.lock import LOCK, drop_inherited_locks, free_lock, take_lock
from ssl_seg.runs.schema import read_checked

Status = Literal["running", "finished", "failed", "killed"]
EXPORTS = ("encoder", "decoders", "model")
# All that a run may write; --overwrite deletes these and nothing else.
RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "pictures",
    "state",
    "result.json",
    "confusion.json",
    "confusion_images.safetensors",
    "calibration.json",
    "contours.csv",
    "extremes.json",
    "kinds.json",
    "report.html",
    "nonfinite.json",
    "tasks.json",
    "data.json",
    "files.json",
    "images.json",
    "fingerprints.safetensors",
    "leaks.json",
    "leaks.png",
    "split.json",
    "receipts.json",
    "tracking",
    *EXPORTS,
)
PACKAGES = ("ssl_seg", "torch", "torchvision", "timm", "accelerate", "segmentation-models-pytorch", "numpy")
# Environment variables by which torch and its libraries give the same command other bits: threads, instructions, TF32.
CHANGING = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# Config keys that may change when a run goes on: the weights do not come from them.
FREE = ("tracking.*", "leaks.*", "train.workers", "train.worker_timeout", "train.process_timeout", "train.keep_state")
# What the config stands for in a run.
OF_CONFIG = ("config.yaml", "data.json", "files.json", "split.json", "tasks.json")


class Run:
    """A run's folder, held by one process at a time. Where `main` is False nothing is checked, locked or written.

    Use it as a context manager: an error leaves the status `failed`, an interruption `killed`. A kill -9 leaves
    `running`; the kernel then frees the lock, and the same command goes on from the newest checkpoint.
    """

    def __init__(self, folder: Path, record: dict[str, Any], lock: int | None) -> None:
        self.folder = folder
        self._record = record
        self._lock = lock
        self._awaited: dict[str, Any] | None = None  # the record that `go_on` makes this run's
        self._held: dict[str, bytes] = {}  # files that belong to it
        self._kept: Collection[int] | None = None  # steps whose checkpoints outlive the end; None: all

    @classmethod
    def open(
        cls,
        folder: str | Path,
        stage: str,
        config: Config,
        *,
        overwrite: bool = False,
        allow_changed: Sequence[str] = (),
        main: bool = True,
        device: str = "cpu",
        seed: int = 0,
        precision: str | None = None,
    ) -> Self:
        """A new run, or the one in `folder` to be continued; `device` and `seed` are noted in run.json.

        So is `precision`, where the config leaves it to the device.

        A run continues under the config it was started with, but for the dotted keys that globs of `allow_changed`
        name, and under these from `go_on` on. Without a checkpoint there is nothing to lose, and it starts anew under
        any config. Raises UserError for
        another key that differs, another stage, a run that is finished or has exported and holds no checkpoint, a
        folder that is no run (never touched, whatever `overwrite` says), one in use, and one that cannot be written.
        """
        folder = Path(folder)
        if not main:
            return cls(folder, {}, None)
        with ExitStack() as undo, files.naming(folder, "cannot be used as a run folder"):
            _refuse_stranger(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder)
            undo.callback(free_lock, lock)
            record = _new_record(stage, config, device, seed, precision)
            former = _start(folder, record, overwrite, allow_changed)
            run = cls(folder, record if former is None else {**former, "status": "running", "ended": None}, lock)
            if former is not None:
                run._awaited = _going_on(former, record, max(checkpoints_in(folder)))
            files.write_atomic(folder / "run.json", files.json_bytes(run._record))
            run._write_or_hold("config.yaml", config.to_yaml().encode())
            undo.pop_all()
        return run

    def go_on(self) -> None:
        """Take up the config that the run was opened with, once nothing can refuse it any more.

        Until then a run with a checkpoint keeps the record of the config which that was made under: another command
        that fails, over other images or weights that do not fit, leaves a folder that the right one continues.
        """
        if self._awaited is not None:
            self._record, self._awaited = self._awaited, None
            files.write_atomic(self.folder / "run.json", files.json_bytes(self._record))
        while self._held:
            name, payload = self._held.popitem()
            files.write_atomic(self.folder / name, payload)

    def _write_or_hold(self, name: str, payload: bytes) -> None:
        if self._awaited is not None and name in OF_CONFIG:
            self._held[name] = payload
        else:
            files.write_atomic(self.folder / name, payload)

    def resume(self) -> State | None:
        """The newest whole checkpoint, None for a run that has none; the metrics after it are dropped."""
        state = load_state(self.folder)
        if state is not None:
            self.rewind(state.step)
        return state

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`: they are made again."""
        if self._lock is not None:
            _rewind_metrics(self.folder / "metrics.jsonl", step)

    def line_of(self, step: int) -> dict[str, float] | None:
        """The metrics of `step` as they were written, NaN for null; None where there is no such line."""
        records = [record for _, record in metric_lines(self.folder / "metrics.jsonl") if record["step"] == step]
        line = records[-1] if records else {}
        return {name: math.nan if value is None else value for name, value in line.items()} or None

    def save_state(
        self, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any], keep: Collection[int] = ()
    ) -> None:
        """As the function of that name, after the metrics so far: a resumed run does not make them again."""
        if self._lock is None:
            return
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            with files.naming(metrics):
                files.sync(metrics)
        save_state(self.folder, step, tensors, data, keep)

    def keep_at_end(self, steps: Collection[int]) -> None:
        """Once the run has finished, keep the checkpoints of these steps alone."""
        self._kept = steps

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl: `{"step": 5, "time": ..., "train/loss": 0.25}`.

        JSON has no NaN or infinity: null. The time makes a later replay of the lines the same as sending them now.
        """
        if self._lock is None:
            return
        line = {"step": step, TIME: epoch_ms(), **{name: float(value) for name, value in values.items()}}
        path = self.folder / "metrics.jsonl"
        with files.naming(path):
            files.append(path, json.dumps(files.finite(line)) + "\n")

    def picture_path(self, name: str, step: int) -> Path:
        """Where the picture `name` of `step` belongs; its folder exists on the main process."""
        folder = self.folder / "pictures"
        if self._lock is not None:
            with files.naming(folder):
                folder.mkdir(exist_ok=True)
        return folder / f"{step:08d}_{name.replace('/', '_')}.png"

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write one of RUN_FILES, such as result.json, atomically. NaN and infinity become null."""
        if name not in RUN_FILES:
            raise ValueError(f"{name}: not in RUN_FILES; name it there, or --overwrite would leave it behind")
        if self._lock is not None:
            self._write_or_hold(name, files.json_bytes(files.finite(values)))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, on every process; None where there is no such file."""
        if name in self._held:
            return json.loads(self._held[name])
        path = self.folder / name
        return read_checked(path) if path.exists() else None

    def note(self, **facts: Any) -> None:
        """Facts for run.json that are known only when the run ends."""
        self._record |= facts

    def close(self, status: Status = "finished") -> None:
        """Write how the run ended and let go of the folder. A second call does nothing."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        record = {**self._record, "status": status, "ended": timestamp()}
        try:
            files.write_atomic(self.folder / "run.json", files.json_bytes(record))
            if status == "finished" and self._kept is not None:
                keep_alone(self.folder, self._kept)
        finally:
            free_lock(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(UserError):  # the first error is the one to show
            self.close("failed" if issubclass(kind, Exception) else "killed")


def former_config(folder: str | Path) -> dict[str, Any] | None:
    """The config of the run that the same command would take up again; None where there is nothing to take up."""
    path = Path(folder) / "run.json"
    return read_checked(path)["config"] if path.is_file() and has_checkpoint(folder) else None


def former_precision(folder: str | Path) -> Literal["fp32", "bf16"] | None:
    """That of the run which the same command would take up again, where its config leaves it to the device."""
    path = Path(folder) / "run.json"
    return read_checked(path).get("precision") if path.is_file() and has_checkpoint(folder) else None


def _rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last one that a kill has torn."""
    if not path.exists():
        return
    kept = "".join(f"{line}\n" for line, record in metric_lines(path) if record["step"] <= step)
    files.write_atomic(path, kept.encode())


def _refuse_stranger(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a run folder; choose another folder")
    # A kill right after the start leaves a lock and perhaps a temporary file: that folder is still ours.
    names = sorted(entry.name for entry in folder.iterdir() if not files.is_unfinished(entry))
    strangers = [name for name in names if name != LOCK]
    if strangers and not (folder / "run.json").exists():
        raise UserError(f"{folder}: is no run (it holds {strangers[0]} but no run.json); choose another folder")


def _start(
    folder: Path, record: Mapping[str, Any], overwrite: bool, allow_changed: Sequence[str]
) -> dict[str, Any] | None:
    """Make a locked folder ready; gives the run.json of the run to be continued in it, None for one that starts."""
    path = folder / "run.json"
    files.settle(folder)
    files.settle(folder / "state")
    former = read_checked(path) if path.exists() else None
    if former is not None:
        _check_ours(folder, former, record["stage"])
    if overwrite:
        former = None
    if former is not None:
        _check_continues(folder, former, record, allow_changed)
    if former is not None and checkpoints_in(folder):
        return former
    _clear(folder)
    return None


def _going_on(former: Mapping[str, Any], record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The run.json of a run that is continued after `step`."""
    resumed = {"at": record["started"], "after_step": step, "changed": diff(former["config"], record["config"])}
    # of the steps before
    resumed |= {key: former[key] for key in ("versions", "environment", "device", "precision") if key in former}
    kept = {key: former[key] for key in ("origin", "cost") if key in former}
    return {**record, "started": former["started"], "resumed": [*(former["resumed"] or []), resumed], **kept}


def _check_ours(folder: Path, former: Mapping[str, Any], stage: str) -> None:
    """A run of this stage: --overwrite is meant for doing the same again, not for the run that this one starts from."""
    if not {"stage", "status", "started", "resumed", "config"} <= set(former):
        raise UserError(f"{folder / 'run.json'}: is not one of ours; choose another folder")
    if former["stage"] != stage:
        raise UserError(f"{folder}: holds a {former['stage']} run, not {stage}; choose another folder")


def _check_continues(
    folder: Path, former: Mapping[str, Any], record: Mapping[str, Any], allow_changed: Sequence[str]
) -> None:
    if not checkpoints_in(folder):
        # Weights whose checkpoints a person has deleted are still a result, even of a run that was killed right then.
        if former["status"] == "finished" or any((folder / name).exists() for name in EXPORTS):
            raise UserError(f"{folder}: holds a finished run; choose another folder or --overwrite")
        return
    for key, (old, new) in diff(former["config"], record["config"]).items():
        free = any(fnmatchcase(key, glob) for glob in FREE)
        if not free and not any(fnmatchcase(key, glob) for glob in allow_changed):
            raise UserError(
                f"{folder}: {key} was {json.dumps(old)} and is now {json.dumps(new)}; give the old value, "
                f"start anew with --overwrite, or accept it with --allow-changed {key}"
            )


def _clear(folder: Path) -> None:
    for name in RUN_FILES:
        # run.json stays to be replaced: without it a kill in here would leave a folder that is nobody's run.
        if name != "run.json" and os.path.lexists(folder / name):
            files.discard(folder / name)


def _new_record(stage: str, config: Config, device: str, seed: int, precision: str | None) -> dict[str, Any]:
    return {
        "stage": stage,
        "status": "running",
        **provenance(),
        "resumed": [],
        "ended": None,
        "device": device,
        **({} if precision is None else {"precision": precision}),
        "seed": seed,
        # What `init` was trained on and how, so that runs can be told apart when its folder is gone.
        "origin": origin(getattr(config, "init", None)),
        # Also in config.yaml; that one a person may edit for the next run, this one tells what the weights come from.
        "config": config.dump(),
    }


def provenance() -> dict[str, Any]:
    """By what command, when, and of which versions something is made."""
    return {
        "command": shlex.join(sys.argv),
        "started": timestamp(),
        "git_commit": _git_commit(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in CHANGING if name in os.environ},
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages on which the weights depend."""
    return {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}}


def _git_commit() -> str | None:
    """The commit of the working directory, where that is a git checkout with one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def timestamp() -> str:
    """The time in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# A forked loader worker shares the lock and outlives a killed run for seconds, so the same command would be refused.
os.register_at_fork(after_in_child=drop_inherited_locks)

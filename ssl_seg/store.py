"""What is kept on disk: the run folder, its checkpoints, and exported weights that are loaded with a receipt.

    runs/<name>/ config.yaml  run.json  metrics.jsonl  pictures/  result.json
                 state/step_00005000/ (resume only)  encoder/  decoders/<task>.safetensors  model/

safetensors and JSON hold everything, so reading a file runs no code. Ours is what the two lack: a commit that a kill or
a full disk cannot leave half done, checksums (a flipped bit loads silently from a safetensors file), and a receipt that
says which weights arrived and whether they still compute the same features.

Every function here is for one writing process; where there are several, the caller lets the main one write and puts
barriers around it.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.config import Config, UserError, diff
from ssl_seg.models import EncoderNet, SegmentationModel

Status = Literal["running", "finished", "failed", "killed"]
LOCK = "lock"
# What is worked out once, before the first step; a run that has no checkpoint yet works it out again.
RECORDS = ("tasks.json", "labelled.json", "receipts.json")
# All that a run may write; --overwrite deletes these and nothing else.
RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "pictures",
    "state",
    "encoder",
    "decoders",
    "model",
    "result.json",
    "confusion.json",
    "report.html",
    "nonfinite.json",
    *RECORDS,
)
PACKAGES = ("ssl_seg", "torch", "torchvision", "timm", "accelerate", "segmentation-models-pytorch", "numpy")
NEW, OLD = ".ssl_seg-new-", ".ssl_seg-old-"  # prefixes of what a kill may leave behind; never a stranger's names
STATE_TENSORS, STATE_DATA, MANIFEST = "state.safetensors", "state.json", "manifest.json"
NUM_NEWEST = 2  # one to resume from, one more for when a disk has damaged it
PROBE = (2, 3, 64, 64)  # the smallest images that leave the stride-32 map more than one pixel
NUM_PROJECTIONS = 4  # several, so that no change of a map can lie across all of them by chance
TOLERANCE = 1e-4  # of a map's root mean square; other CPUs and thread counts differ by about 1e-6
PREFIXES = ("module.", "encoder.")  # DistributedDataParallel's, and ours inside a whole model
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
TORCH_ERRORS = (RuntimeError, ValueError, LookupError, EOFError, OSError, AttributeError, TypeError, pickle.PickleError)


# ---- the run folder ----


class Run:
    """A run's folder, held by one process at a time. Where `main` is False nothing is checked, locked or written.

    Use it as a context manager: an error leaves the status `failed`, an interruption `killed`. A kill -9 leaves
    `running`; the kernel then frees the lock, and the same command goes on from the newest checkpoint.
    """

    def __init__(self, folder: Path, record: dict[str, Any], lock: int | None) -> None:
        self.folder = folder
        self._record = record
        self._lock = lock

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
    ) -> Self:
        """A new run, or the one in `folder` to be continued; `device` and `seed` are noted in run.json.

        A run continues under the config it was started with, but for the dotted keys that globs of `allow_changed`
        name. Raises UserError for another key that differs, another stage, a finished run without a checkpoint, a
        folder that is no run (never touched, whatever `overwrite` says), one in use, and one that cannot be written.
        """
        folder = Path(folder)
        if not main:
            return cls(folder, {}, None)
        with ExitStack() as undo, _naming(folder, "cannot be used as a run folder"):
            _refuse_stranger(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(folder)
            undo.callback(_free_lock, lock)
            record = _start(folder, _new_record(stage, config, device, seed), overwrite, allow_changed)
            _write_atomic(folder / "config.yaml", config.to_yaml().encode())
            undo.pop_all()
        return cls(folder, record, lock)

    def resume(self) -> State | None:
        """The newest whole checkpoint, None for a run that has none; the metrics after it are dropped."""
        state = load_state(self.folder)
        if self._lock is not None:
            _rewind_metrics(self.folder / "metrics.jsonl", -1 if state is None else state.step)
        return state

    def save_state(
        self, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any], keep: Collection[int] = ()
    ) -> None:
        """As the function of that name, after the metrics so far: a resumed run does not make them again."""
        if self._lock is None:
            return
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            with _naming(metrics):
                _sync(metrics)
        save_state(self.folder, step, tensors, data, keep)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl: `{"step": 5, "train/loss": 0.25}`. JSON has no NaN or infinity: null."""
        if self._lock is None:
            return
        line = {"step": step, **{name: float(value) for name, value in values.items()}}
        path = self.folder / "metrics.jsonl"
        with _naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def picture_path(self, name: str, step: int) -> Path:
        """Where the picture `name` of `step` belongs; its folder exists on the main process."""
        folder = self.folder / "pictures"
        if self._lock is not None:
            with _naming(folder):
                folder.mkdir(exist_ok=True)
        return folder / f"{step:08d}_{name.replace('/', '_')}.png"

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write one of RUN_FILES, such as result.json, atomically. NaN and infinity become null."""
        if name not in RUN_FILES:
            raise ValueError(f"{name}: not in RUN_FILES; name it there, or --overwrite would leave it behind")
        if self._lock is None:
            return
        path = self.folder / name
        with _naming(path):
            _write_atomic(path, _json(_finite(values)))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, on every process; None where there is no such file."""
        path = self.folder / name
        return _read_json(path) if path.exists() else None

    def close(self, status: Status = "finished") -> None:
        """Write how the run ended and let go of the folder. A second call does nothing."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        path = self.folder / "run.json"
        try:
            with _naming(path):
                _write_atomic(path, _json({**self._record, "status": status, "ended": _now()}))
        finally:
            _free_lock(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(UserError):  # the first error is the one to show
            self.close("failed" if issubclass(kind, Exception) else "killed")


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, null as NaN; a last line still being written is left out."""
    records = [record for _, record in _metric_lines(Path(folder) / "metrics.jsonl")]
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def _metric_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last one that a kill has torn."""
    if not path.exists():
        return
    kept = "".join(f"{line}\n" for line, record in _metric_lines(path) if record["step"] <= step)
    with _naming(path):
        _write_atomic(path, kept.encode())


def _refuse_stranger(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a run folder; choose another folder")
    # A kill right after the start leaves a lock and perhaps a temporary file: that folder is still ours.
    names = sorted(entry.name for entry in folder.iterdir())
    strangers = [name for name in names if name != LOCK and not name.startswith(NEW)]
    if strangers and not (folder / "run.json").exists():
        raise UserError(f"{folder}: is no run (it holds {strangers[0]} but no run.json); choose another folder")


def _start(folder: Path, record: dict[str, Any], overwrite: bool, allow_changed: Sequence[str]) -> dict[str, Any]:
    """Make a locked folder ready, to continue the run in it or to start anew; gives the content of its run.json."""
    path = folder / "run.json"
    _settle(folder)
    _settle(folder / "state")
    if path.exists() and overwrite:
        _clear(folder, RUN_FILES)
    elif path.exists():
        former = _read_json(path)
        _check_continues(folder, former, record, allow_changed)
        record |= {"started": former["started"], "resumed": [*former["resumed"], record["started"]]}
        if not _checkpoints(folder / "state"):
            _clear(folder, RECORDS)
    _write_atomic(path, _json(record))
    return record


def _check_continues(
    folder: Path, former: Mapping[str, Any], record: Mapping[str, Any], allow_changed: Sequence[str]
) -> None:
    if not {"stage", "status", "started", "resumed", "config"} <= set(former):
        raise UserError(f"{folder / 'run.json'}: is not one of ours; choose another folder")
    if former["stage"] != record["stage"]:
        raise UserError(
            f"{folder}: holds a {former['stage']} run, not {record['stage']}; choose another folder or --overwrite"
        )
    if former["status"] == "finished" and not _checkpoints(folder / "state"):
        raise UserError(f"{folder}: holds a finished run; choose another folder or --overwrite")
    for key, (old, new) in diff(former["config"], record["config"]).items():
        if not _is_allowed(key, allow_changed):
            raise UserError(
                f"{folder}: {key} was {json.dumps(old)} and is now {json.dumps(new)}; give the old value, "
                f"start anew with --overwrite, or accept it with --allow-changed {key}"
            )


def _clear(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        # run.json stays to be replaced: without it a kill in here would leave a folder that is nobody's run.
        if name != "run.json" and os.path.lexists(folder / name):
            _discard(folder / name)


def _new_record(stage: str, config: Config, device: str, seed: int) -> dict[str, Any]:
    return {
        "stage": stage,
        "status": "running",
        "command": shlex.join(sys.argv),
        "started": _now(),
        "resumed": [],
        "ended": None,
        "git_commit": _git_commit(),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
        "device": device,
        "seed": seed,
        # Also in config.yaml; that one a person may edit for the next run, this one tells what the weights come from.
        "config": config.dump(),
    }


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- the lock ----

_locks: set[int] = set()


def _take_lock(folder: Path) -> int:
    """Hold the folder until `_free_lock` or the end of this process, however it ends."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace") or "unknown"
        os.close(lock)
        raise UserError(f"{folder}: in use by process {holder}; wait for it or choose another folder") from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    _locks.add(lock)
    return lock


def _free_lock(lock: int) -> None:
    if lock in _locks:
        _locks.remove(lock)
        os.close(lock)


def _drop_inherited_locks() -> None:
    for lock in list(_locks):
        _free_lock(lock)


# A forked loader worker shares the lock and outlives a killed run for seconds, so the same command would be refused.
os.register_at_fork(after_in_child=_drop_inherited_locks)


# ---- checkpoints ----


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
    newest: int = NUM_NEWEST,
) -> None:
    """Commit the checkpoint of `step` to the run `folder`; then drop all but the `newest` and those of steps `keep`.

    `data` is JSON: tuples come back as lists, keys as strings, NaN and infinity as they are. Raises UserError, with
    nothing changed, where the disk does not take it.
    """
    state = Path(folder) / "state"
    files = {STATE_TENSORS: _serialize(tensors), STATE_DATA: _json(data)}
    files[MANIFEST] = _json({name: _sha256(payload) for name, payload in files.items()})
    commit_folder(state / f"step_{step:08d}", files)
    with _naming(state, "an old checkpoint cannot be removed"):
        _prune(state, step, keep, newest)


def load_state(folder: str | Path, step: int | None = None) -> State | None:
    """The newest whole checkpoint of a run, None where there is none; or that of `step`.

    Raises UserError where every checkpoint is damaged, or that of `step` is damaged or absent.
    """
    skipped: list[str] = []
    for number, place in sorted(_checkpoints(Path(folder) / "state").items(), reverse=True):
        if step not in (None, number):
            continue
        damaged = _find_damage(place)
        if damaged is None:
            tensors = safetensors.torch.load_file(place / STATE_TENSORS)
            return State(number, tensors, _read_json(place / STATE_DATA), skipped)
        skipped.append(str(damaged))
    if skipped:
        others = "" if step is not None else ", and so is every other checkpoint"
        raise UserError(f"{skipped[0]}: damaged{others}; start anew with --overwrite")
    if step is not None:
        raise UserError(f"{folder}: holds no checkpoint of step {step}; continue the run, or start anew --overwrite")
    return None


def _checkpoints(state: Path) -> dict[int, Path]:
    """Every step that has a committed checkpoint, and where it lies."""
    if not state.is_dir():
        return {}
    names = {entry.name.removeprefix(OLD) for entry in state.iterdir()}
    found = {int(name.removeprefix("step_")): state / name for name in names if re.fullmatch(r"step_\d{8,}", name)}
    return {step: _committed(target) for step, target in found.items()}


def _find_damage(place: Path) -> Path | None:
    """The first file of a checkpoint that is not as it was written."""
    manifest = place / MANIFEST
    try:
        text = manifest.read_bytes()
        digests = json.loads(text)
    except (OSError, ValueError):
        return manifest
    # Written out again it must be the same text: else a changed space would go unnoticed.
    if not isinstance(digests, dict) or set(digests) != {STATE_TENSORS, STATE_DATA} or text != _json(digests):
        return manifest
    for name, digest in digests.items():
        try:
            intact = _file_sha256(place / name) == digest
        except OSError:
            intact = False
        if not intact:
            return place / name
    return None


def _prune(state: Path, step: int, keep: Collection[int], newest: int) -> None:
    known = _checkpoints(state)
    # Those after `step` were damaged, or the run would have continued from them.
    earlier = sorted(number for number in known if number <= step)
    wanted = {step, *keep, *earlier[-newest:]}
    for number, place in known.items():
        if number not in wanted:
            _discard(place)


# ---- exports ----


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


def export_encoder(
    folder: str | Path, encoder: EncoderNet, config: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the encoder to the run's encoder/, with `config` (a dumped ModelConfig) and `extra` as JSON."""
    info = {
        "config": config,
        "channels": encoder.channels,
        "strides": encoder.strides,
        "fingerprint": fingerprint(encoder),
    }
    target = Path(folder) / "encoder"
    commit_folder(target, _pair("encoder", encoder, {**info, **(extra or {})}))
    return target


def load_encoder(encoder: EncoderNet, path: str | Path, allow: Sequence[str] = ()) -> Receipt:
    """Fill `encoder` from a run folder, its encoder/, a .safetensors file, or a torch checkpoint of plain tensors.

    Raises UserError, with `encoder` unchanged, for anything less than every tensor and equal features, unless a glob
    of `allow` names it: tensor names, and "features" for the comparison. Nothing matched is refused always.
    """
    weights, info = _find_export(path, "encoder", "encoder")
    return _fill(encoder, weights, info, allow)


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
    committed = _committed(target)
    others = {entry.name: entry.read_bytes() for entry in committed.iterdir()} if committed.is_dir() else {}
    commit_folder(target, others | _pair(task_name, module, {"config": config or {}}))
    return target / f"{task_name}.safetensors"


def load_decoder(module: nn.Module, path: str | Path, task_name: str, allow: Sequence[str] = ()) -> Receipt:
    """Fill a head's decoder from a run's decoder of the task `task_name`, on the terms of `load_encoder`."""
    weights, info = _find_export(path, "decoders", task_name)
    return _fill(module, weights, info, allow)


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
        "fingerprint": fingerprint(model),
    }
    target = Path(folder) / "model"
    commit_folder(target, _pair("model", model, {**info, **(extra or {})}))
    return target


def read_model_info(path: str | Path) -> dict[str, Any]:
    """model.json of a run folder, its model/ or the file model.safetensors: `config`, `class_names`, the extras."""
    weights, info = _find_export(path, "model", "model")
    if "config" not in info or "class_names" not in info:
        raise UserError(f"{weights}: has no model.json beside it; name a run folder or its model/")
    return info


def load_model_weights(model: SegmentationModel, path: str | Path, allow: Sequence[str] = ()) -> Receipt:
    """Fill a segmentation model from a run folder, its model/ or a file, on the terms of `load_encoder`."""
    weights, info = _find_export(path, "model", "model")
    return _fill(model, weights, info, allow)


def fingerprint(net: nn.Module) -> list[list[float]]:
    """A few figures for each map that `net` makes of a fixed batch: mean, std and projections on keyed directions.

    They change with any weight or statistic that changes the maps. A copy computes them, in float32 on the CPU, so the
    device, the precision and the mode of `net` do not matter. Raises UserError for maps that are not finite.
    """
    images, *shape = PROBE
    key = rng.as_key("ssl_seg.store.fingerprint")
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
    shapes = [f"{name} {shapes}" for name, shapes in receipt.mismatched.items() if not _is_allowed(name, allow)]
    kinds = {
        "missing": [name for name in receipt.missing if not _is_allowed(name, allow)],
        "left over": [name for name in receipt.left_over if not _is_allowed(name, allow)],
        "of another shape": shapes,
    }
    if not any(kinds.values()):
        return
    texts = [f"{len(names)} {kind}: {_first_names(names)}" for kind, names in kinds.items() if names]
    example = next(names[0] for names in kinds.values() if names).split(" ")[0]
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


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_allowed(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _pair(name: str, module: nn.Module, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of an export: the weights, and what must be known of them."""
    weights = _serialize(module.state_dict())
    described = _finite({**info, "sha256": _sha256(weights)})
    return {f"{name}.safetensors": weights, f"{name}.json": _json(described)}


def _find_export(path: str | Path, part: str, name: str) -> tuple[Path, dict[str, Any]]:
    """The weights' file that `path` means, and the JSON beside it (empty for a file of other origin)."""
    path = Path(path)
    if path.is_file():
        beside = path.with_suffix(".json")
        info = _read_json(beside) if path.suffix == ".safetensors" and beside.is_file() else {}
        return path, info if "sha256" in info else {}
    for folder in (_committed(path), _committed(path / part)):
        weights = folder / f"{name}.safetensors"
        if weights.is_file():
            info = _read_json(weights.with_suffix(".json"))
            if "sha256" not in info:
                raise UserError(f"{weights.with_suffix('.json')}: holds no sha256, so it is damaged; export it again")
            return weights, info
    if not path.exists():
        raise UserError(f"{path}: does not exist; name a run folder or a file of weights")
    raise UserError(
        f"{path}: holds no {part}/{name}.safetensors; name a run that has exported it, or a file of weights"
    )


def _read_tensors(path: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if "sha256" in info and _file_sha256(path) != info["sha256"]:
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


# ---- files that are whole or absent ----


def commit_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make `target` a folder of just these files: at every instant the old one or the new one can be found, whole.

    Raises UserError, with the old one untouched, where the disk does not take them.
    """
    new, old = target.with_name(NEW + target.name), target.with_name(OLD + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle(target.parent)
        new.mkdir()
        for name, payload in files.items():
            _write_synced(new / name, payload)
        _sync(new)
        if target.exists():
            os.rename(target, old)  # a rename cannot replace a folder with files; `_committed` bridges the gap
        os.rename(new, target)
        _sync(target.parent)
    except OSError as error:
        with suppress(OSError):
            _settle(target.parent)
        size = sum(len(payload) for payload in files.values())
        raise UserError(
            f"{target}: not written ({error.strerror}); it needs {size} bytes, make room or choose another folder"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def _committed(target: Path) -> Path:
    """Where the folder committed as `target` lies: under its other name if a kill came between the two renames."""
    old = target.with_name(OLD + target.name)
    return old if old.exists() and not target.exists() else target


def _settle(parent: Path) -> None:
    """Undo what a kill has left half done in `parent`: drop what is unfinished, put back what is between two names."""
    if not parent.is_dir():
        return
    for entry in sorted(parent.iterdir()):
        target = entry.with_name(entry.name.removeprefix(OLD))
        if target != entry and not target.exists():
            os.rename(entry, target)
        elif target != entry or entry.name.startswith(NEW):
            _remove(entry)


def _discard(path: Path) -> None:
    """Delete a file or folder so that a kill half way leaves nothing under its name."""
    new = path.with_name(NEW + path.name)
    os.rename(path, new)
    _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_atomic(path: Path, payload: bytes) -> None:
    new = path.with_name(NEW + path.name)
    _write_synced(new, payload)
    os.replace(new, path)
    _sync(path.parent)


def _write_synced(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have the kernel write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _naming(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """An OSError inside becomes one line about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: {what} ({error.strerror}); make room, mend the rights or choose another folder"
        ) from error


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    # Each is copied: safetensors refuses tensors that share memory, and knows no strides.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # As bytes and not by its own save_file, which hides a full disk's OSError and gives the file to its owner alone.
    return safetensors.torch.save(copies)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _finite(values: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON; restore it or make it anew") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; restore it or make it anew")
    return values


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The process that mirrors a run while it lives, and the same once more for a run that has ended."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from ssl_seg import files
from ssl_seg.config import UserError, load
from ssl_seg.runs.folder import RunFolder
from ssl_seg.runs.lock import holder_of
from ssl_seg.tracking import LOCK, Tracking, prepare
from ssl_seg.tracking.client import explained, resolved
from ssl_seg.tracking.record import FOLDER
from ssl_seg.tracking.server import MirroredRun
from ssl_seg.tracking.system_metrics import Load

GLANCE = 0.25  # seconds between two looks at whether the run is over
LONGEST_PAUSE = 60.0  # seconds between two tries of a server that does not answer
LAST_TRY = 30.0  # seconds that `track` waits for the mirror of a run that has just ended
INCOMPLETE = 3  # exit code of a mirror that could not send everything


@dataclass(frozen=True)
class Tracked:
    """What `track` gives back."""

    folder: Path
    uri: str
    experiment: str
    run_id: str
    lines: int  # of metrics sent now
    pictures: int


def track(
    folder: str | Path, uri: str | None = None, experiment: str | None = None, model: bool | None = None
) -> Tracked:
    """Send what MLflow has not got of a run, whichever way that ended; a second call sends nothing.

    With `model` its fine-tuned model too, as `tracking.model` says.

    Raises UserError where the server does not take it, for a run that is being mirrored this moment, and for one of
    which only its own files name the server: whoever made them would get what is sent. Give that one as `uri`.
    """
    RunFolder.open(folder)  # before a folder is made in it
    given = {"uri": uri, "experiment": experiment, "model": model}
    prepare()
    with alone(Path(folder), LAST_TRY):
        run = RunFolder.open(folder)  # as it is now: a mirror that was waited for may have seen its end
        if run.status == "running":
            raise UserError(f"{folder}: is still running; stop it or wait for its end")
        tracking = _tracking_of(run)
        if uri is None and resolved(tracking.uri, run.folder) != resolved(None, run.folder):
            raise UserError(f"{folder}: only its own files say that it goes to {tracking.uri!r}; give that as --uri")
        wanted = {key: value for key, value in given.items() if value is not None}
        return _track(run, tracking.model_copy(update=wanted))


def _track(run: RunFolder, tracking: Tracking) -> Tracked:
    with MirroredRun(run, tracking) as mirrored:
        with explained(mirrored.uri):
            mirrored.open()
            mirrored.send()
            mirrored.finish(run.status)
        sent = {"lines": mirrored.num_lines, "pictures": mirrored.num_pictures}
        return Tracked(run.folder, mirrored.uri, tracking.experiment, mirrored.run_id, **sent)


def follow(folder: str | Path, pid: int) -> int:
    """Mirror a run until it ends or process `pid` no longer holds it; the exit code says whether everything arrived."""
    with suppress(psutil.Error):
        psutil.Process().nice(10)  # the training comes first
    with alone(Path(folder), math.inf) as lock:
        run = RunFolder.open(folder)
        with MirroredRun(run, _tracking_of(run)) as mirrored:
            return _follow(mirrored, pid, lock)


def _follow(mirrored: MirroredRun, pid: int, lock: BinaryIO) -> int:
    folder, tracking = mirrored.run.folder, mirrored.tracking
    mirrored.note(None)  # what a former mirror has met is no word of this one
    load = Load(folder, _process(pid)) if tracking.system_metrics else None
    next_try, pause = time.monotonic(), tracking.every
    while True:
        if not _is_ours(folder, lock):
            mirrored.abandon()
            return INCOMPLETE
        over = holder_of(folder) != str(pid) or RunFolder(folder).record.get("status") != "running"
        if load is not None:
            load.sample(time.monotonic())
        if over or time.monotonic() >= next_try:
            error = _tried(mirrored, over)
            mirrored.note(error)
            if over:
                return INCOMPLETE if error else 0
            pause = min(2 * pause, LONGEST_PAUSE) if error else tracking.every
            next_try = time.monotonic() + pause
        time.sleep(GLANCE)


def _tried(mirrored: MirroredRun, over: bool) -> str | None:
    """Send what there is; what went wrong, in one line."""
    try:
        with explained(mirrored.uri):
            mirrored.open()
            mirrored.send()
            if over:
                mirrored.finish(_end_of(RunFolder(mirrored.run.folder)))
    except UserError as error:
        return str(error)
    return None


def _end_of(run: RunFolder) -> str:
    """How a run ended that no longer lives: without a word if it was killed. It may have been started again since."""
    return "killed" if run.status == "running" else run.status


def _tracking_of(run: RunFolder) -> Tracking:
    """As the run was started; an evaluation knows no tracking, and some runs were not to be tracked then."""
    given = run.config.get("tracking")
    try:
        return load(Tracking, {**(given if isinstance(given, Mapping) else {}), "type": "mlflow"})
    except UserError as error:
        raise UserError(f"{run.folder / 'run.json'}: tracking.{error}; restore the file") from error


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _is_ours(folder: Path, lock: BinaryIO) -> bool:
    """Whether the folder still holds the run that is mirrored: it may have been removed, or overwritten by another."""
    with suppress(OSError):
        there = (folder / "run.json").is_file() and (folder / FOLDER / LOCK).stat().st_ino
        return there == os.fstat(lock.fileno()).st_ino
    return False


@contextmanager
def alone(folder: Path, patience: float) -> Iterator[BinaryIO]:
    """One mirror at a time for a run, waiting `patience` seconds for the former, which may still be sending.

    Gives the lock, whose file is another one once the run is overwritten.
    """
    with files.naming(folder / FOLDER):
        (folder / FOLDER).mkdir(exist_ok=True)
        lock = os.fdopen(files.open_regular(folder / FOLDER / LOCK, os.O_CREAT), "rb")
    with lock:
        until = time.monotonic() + patience
        while not _taken(lock):
            if time.monotonic() >= until:
                raise UserError(f"{folder}: is being mirrored by the run itself; wait for its end")
            time.sleep(GLANCE)
        yield lock


def _taken(lock: BinaryIO) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False

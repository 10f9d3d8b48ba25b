"""MLflow mirrors a run folder: a process of its own reads what the run has written and sends it.

Ours is the mirror, not the tracking: a logger inside the training process waits for a dead server, loses what it could
not send, and cannot say that it was killed. Beside it, the folder stays the truth, `ssl-seg track RUN` sends whatever
the server has not got, and what it has is asked of the server, so nothing arrives twice.

This file is what a run needs: the config and the start of the mirror. `record` is what the folder knows of MLflow,
`mirror` is that process, `server` what it says to MLflow, `client` how, `model` a network among it, `load` what it
measures; these are imported by it alone, since mlflow takes its time.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from ssl_seg import files
from ssl_seg.config import Config, UserError, known_to_0_1
from ssl_seg.terminal import say
from ssl_seg.tracking.record import FOLDER, RECORD, read_record

SYSTEM, LOG, LOCK = "system.jsonl", "log", "lock"  # in the folder's FOLDER
# A silent server must not keep the mirror for minutes: MLflow's own are 120 s and 7 times.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run tells nobody but the server it was given
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
FAREWELL = 10.0  # seconds that a finished run waits for its mirror, which goes on without it


# Tags that are a run's own: by some it is found again, by others its scores are compared.
RESERVED = (
    *("stage", "device", "host", "folder", "folder_key", "init.run_id", "selected_step", "labelled", "leaks"),
    *("continues", "continued_by", "parent_of"),
)
RESERVED_PARTS = ("changed.", "passport.", "version.")
NOTE = "mlflow.note.content"  # the only one of MLflow's own that is a person's: the description of a run


def _check_tags(tags: dict[str, str]) -> dict[str, str]:
    for name in tags:
        if name in RESERVED or name.startswith(RESERVED_PARTS) or (name.startswith("mlflow.") and name != NOTE):
            raise ValueError(f"'{name}' is a tag that a run sets itself; choose another name")
    return tags


class Tracking(Config):
    """`tracking`: where a run is shown while and after it runs. It may change when a run goes on."""

    type: Literal["mlflow", "none"] = "mlflow"  # none: no MLflow
    # Where MLflow keeps runs. None: MLFLOW_TRACKING_URI, else mlflow.db in the folder `runs` that the run lies in.
    uri: str | None = None
    experiment: str = Field(default="ssl_seg", min_length=1)  # under which name MLflow keeps runs together
    name: str | None = None  # None: the folder's
    parent: str | None = Field(default=None, min_length=1)  # runs that name the same parent are shown below it
    tags: Annotated[dict[str, str], AfterValidator(_check_tags)] = Field(default={})  # further tags of the run
    system_metrics: bool = True  # load and memory of the machine and its GPUs (those want nvidia-ml-py)
    weights: bool = False  # send the exported weights too; they are in the run's folder anyway
    # Log a fine-tuned model as one of MLflow's own, with a signature: `mlflow.pytorch.load_model` gives it back. Off,
    # since it is tens of megabytes a run, and a study has a hundred; `ssl-seg track RUN --model` logs that of one.
    model: bool = False
    every: PositiveFloat = 5.0  # seconds between two messages

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("model",))


def _word_is_type(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


TrackingField = Annotated[Tracking, BeforeValidator(_word_is_type)]


_left_behind: list[subprocess.Popen[bytes]] = []  # mirrors that are still sending; Python warns of one it forgets


class Mirror:
    """Starts the process that mirrors a run, and at the end waits for it for a moment.

    It reads files and nothing else, so it can neither slow nor stop the training. It ends by itself once the run has
    ended or its process is gone, and notes then how.
    """

    def __init__(self, tracking: Tracking, folder: Path, main: bool = True, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        # The command that sends what is missing; `track` takes no server from a folder alone.
        self.replay = shlex.join(["ssl-seg", "track", str(folder), *(["--uri", tracking.uri] if tracking.uri else [])])
        self.wanted = main and tracking.type == "mlflow"
        self.process: subprocess.Popen[bytes] | None = None
        self.former = self._stamp()

    def start(self) -> None:
        """Call it when run.json and the metrics are those that the run goes on from."""
        if not self.wanted:
            return
        try:
            self._start()
        except (OSError, UserError) as error:  # no run fails for what only shows it
            say(f"MLflow: no mirror ({error}); {self.replay} sends the run later", self.quiet)

    def leave_alone(self) -> None:
        """Start it for a folder that is finished, and wait for nothing."""
        self.start()
        if self.process is not None:
            _left_behind.append(self.process)

    def _start(self) -> None:
        _left_behind[:] = [process for process in _left_behind if process.poll() is None]
        with files.naming(self.folder / FOLDER):
            (self.folder / FOLDER).mkdir(exist_ok=True)
            log = os.fdopen(files.open_regular(self.folder / FOLDER / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")
        # -P: nothing that lies in the working directory is imported.
        command = [sys.executable, "-P", "-m", "ssl_seg", "track", str(self.folder), "--follow", str(os.getpid())]
        paths = [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])]
        # A session of its own: Ctrl-C and a killed process group must not take the witness too.
        with log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            with suppress(KeyboardInterrupt):  # the run is over; the mirror goes on alone
                self._take_leave(self.process)

    def _take_leave(self, process: subprocess.Popen[bytes]) -> None:
        _left_behind.append(process)
        last = self._error()
        until = time.monotonic() + (0.0 if last else FAREWELL)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        last = last or self._error()
        if last:
            say(f"MLflow: {last}; nothing is lost, {self.replay} sends the rest", self.quiet)
        elif process.poll() is None:
            say("MLflow: the rest is being sent in the background", self.quiet)
        elif process.returncode:
            log = self.folder / FOLDER / LOG
            end = _last_line(log)
            say(f"MLflow: the mirror stopped ({end}; {log} says more); {self.replay} sends the rest", self.quiet)

    def _error(self) -> str | None:
        """What this run's mirror has met; a former one may have left another."""
        with suppress(OSError, UserError):
            if self._stamp() != self.former:
                record = read_record(self.folder)
                return None if record is None else record.error
        return None

    def _stamp(self) -> tuple[int, int] | None:
        """What tells one version of the record from another, whatever the clock says."""
        with suppress(OSError):
            found = (self.folder / FOLDER / RECORD).stat()
            return found.st_ino, found.st_mtime_ns
        return None


def check(tracking: Tracking) -> None:
    """Whether the run can be mirrored at all, before any work is done."""
    if tracking.type == "mlflow" and find_spec("mlflow") is None:
        raise UserError("tracking: mlflow is not installed; pip install mlflow, or set tracking=none")


def _last_line(log: Path) -> str:
    """How a mirror's log ends: with its error, in one line."""
    with suppress(OSError):
        said = files.read_bytes(log).decode(errors="replace")
        return next(reversed(said.strip().splitlines()), "without a word")[:200]
    return "without a word"


def prepare() -> None:
    """Call it before mlflow is imported: whether it is there, and how patient it is. What a person has set stays."""
    check(Tracking())
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
